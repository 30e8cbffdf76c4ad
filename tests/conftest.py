"""Shared by all tests: no network, few threads, equal seeds, one tiny configuration."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

os.environ["HF_HUB_OFFLINE"] = "1"  # read once, when huggingface_hub is imported

import torch
from transformers import TrainingArguments

from modeling_coca import CocaConfig, CocaForConditionalGeneration, CocaImageProcessorPil, CocaProcessor, CocaTokenizer

torch.set_num_threads(1)  # with tiny tensors, several threads only wait for each other

TINY_CONFIG = Path(__file__).parents[1] / "hub_configs" / "coca-tiny" / "config.json"


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., CocaConfig]:
    """`tiny_config(pooler_type="shared", text_config={"vocab_size": 99})`: a new config, with these fields changed."""
    fields = json.loads(TINY_CONFIG.read_text())

    def build(**changes) -> CocaConfig:
        parts = {
            name: {**fields[name], **changes.pop(name)} for name in ("vision_config", "text_config") if name in changes
        }
        return CocaConfig(**{**fields, **parts, **changes})

    return build


@pytest.fixture(scope="session")
def model_folder(tiny_config, tmp_path_factory) -> Path:
    """A tiny model that writes, with random weights, and its processor, as saved."""
    texts = ["a photo of a red square", "a drawing of a green circle", "what is it?", "yellow blue white"]
    tokenizer = CocaTokenizer(model_max_length=16).train_new_from_iterator(texts, vocab_size=450)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = tiny_config(text_config={"vocab_size": len(tokenizer), "max_position_embeddings": 17, **ids})
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    model = CocaForConditionalGeneration(config)
    model.lm_head.weight.data[ids["eos_token_id"]] *= 3  # captions of unequal length
    model.save_pretrained(folder)
    CocaProcessor(CocaImageProcessorPil(size=config.vision_config.image_size), tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    """Twelve different pictures of several sizes and formats, two of them in a folder below."""
    folder, random = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    (folder / "more").mkdir()
    for number in range(12):
        pixels = random.integers(0, 256, (20 + 3 * number, 50 - 2 * number, 3), dtype=np.uint8)
        suffix = ("png", "jpg", "webp")[number % 3]
        Image.fromarray(pixels).save(folder / ("more" if number > 9 else "") / f"{number:02d}.{suffix}")
    return folder


@pytest.fixture
def arguments(tmp_path) -> Callable[..., TrainingArguments]:
    """`arguments(max_steps=6)`: of a short training on the CPU that writes nothing but its log."""

    def build(**changes) -> TrainingArguments:
        fields = {
            "output_dir": str(tmp_path / "out"),
            "per_device_train_batch_size": 4,
            "max_steps": 3,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            "remove_unused_columns": False,
        }
        return TrainingArguments(**{**fields, **changes})

    return build


@pytest.fixture
def coca(model_folder, monkeypatch, capsys):
    """The command, within the test's process: `coca("caption", "a.png")` -> exit code, stdout, stderr. It has a model."""
    from modeling_coca.cli import main

    monkeypatch.setenv("COCA_MODEL", str(model_folder))
    monkeypatch.setenv("COLUMNS", "200")

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["coca", *map(str, args)])
        with pytest.raises(SystemExit) as exit_info:
            main()
        out, err = capsys.readouterr()
        code = exit_info.value.code
        return (1, out, err + code) if isinstance(code, str) else (code or 0, out, err)

    return run
