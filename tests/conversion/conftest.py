"""Small checkpoints of other libraries, with what those computed from them."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

FIXTURES = Path(__file__).parents[1] / "fixtures"


class Sample(NamedTuple):
    """One model of another library: the arguments that build it, its weights, inputs and outputs."""

    config: dict[str, Any]
    state_dict: dict[str, torch.Tensor]
    tensors: dict[str, torch.Tensor]


@pytest.fixture(scope="session")
def sample():
    """`sample(name)` reads `tests/fixtures/<name>.safetensors`."""

    def read(name: str) -> Sample:
        with safe_open(FIXTURES / f"{name}.safetensors", framework="pt") as file:
            names = file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
            config = json.loads(file.metadata()["config"])
        state_dict = {name[3:]: tensor for name, tensor in tensors.items() if name.startswith("sd.")}
        return Sample(config, state_dict, {name: x for name, x in tensors.items() if not name.startswith("sd.")})

    return read


@pytest.fixture
def checkpoint(sample, tmp_path):
    """`checkpoint(name, file, config_file, ...)`: a sample as a folder on disk, as people keep them."""

    def write(
        name="open_clip_default",
        file="open_clip_pytorch_model.bin",
        config_file="open_clip_config.json",
        folder="source",
        prefix="",
        dtype=None,
        extra=None,
        change=lambda state_dict: state_dict,
    ):
        given, path = sample(name), tmp_path / folder
        path.mkdir()
        state_dict = {prefix + key: x.to(dtype or x.dtype) for key, x in change(given.state_dict).items()}
        if config_file:
            (path / config_file).write_text(json.dumps(given.config))
        if file.endswith(".safetensors"):
            save_file(state_dict, path / file)
        else:
            torch.save(state_dict if extra is None else {"state_dict": state_dict, **extra}, path / file)
        return path

    return write
