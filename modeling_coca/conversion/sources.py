"""Where checkpoints lie and how they are opened: a folder, a file or a repository of the Hub.

Weights are mapped from disk and read tensor by tensor. Pickles are opened with `weights_only=True` and in no other way,
so that a checkpoint from a stranger runs no code.
"""

import json
import os
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils import logging

from .table import Shapes

logger = logging.get_logger(__name__)

CONFIG_FILES = ("open_clip_config.json", "config.json")

# Names that libraries give to a model's weights, in the order in which open_clip looks for them
WEIGHT_FILES = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth",
    "model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.pth",
    "model.pth",
)
_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
# What a training script saves beside the weights
_NO_WEIGHTS = ("optimizer", "scheduler", "scaler", "rng_state", "training_args", "random_states")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json")
RELEASE_AFTER = 2**27  # bytes that are read before a file is closed and opened again, which unmaps them
_INDEX_SUFFIX = ".index.json"


class Checkpoint(NamedTuple):
    """What was found at a source.

    Args:
        name: As the user gave it.
        folder: Where its other files lie.
        weights: The tensors.
        config: The JSON beside them, or `None`.
        config_path: Its file.
        repository: Its id on the Hub, or `None`.
    """

    name: str
    folder: Path
    weights: "Weights"
    config: dict | None
    config_path: Path | None
    repository: str | None


class Weights(Mapping):
    """One or more weight files as a state dict that reads a tensor when it is asked for.

    `release` closes the files that are mapped. They are opened again when needed; until then what was read of them costs no
    memory. Pickles of before PyTorch 1.6 cannot be mapped, and stay.
    """

    def __init__(self, paths: list[Path]):
        self.paths = paths
        self._files: dict[Path, Mapping[str, torch.Tensor]] = {}
        self._home = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self.shapes: Shapes = {}
        for path in paths:
            for name, tensor in self._open(path).items():
                if name in self._home:
                    raise ValueError(
                        f"{name} is in {self._home[name].name} and in {path.name}: keep one of the two files."
                    )
                self._home[name] = path
                self.shapes[name], self.dtypes[name] = tuple(tensor.shape), tensor.dtype
            self.release()

    def _open(self, path: Path) -> Mapping[str, torch.Tensor]:
        if path not in self._files:
            self._files[path] = open_weights(path)
        return self._files[path]

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._open(self._home[name])[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._home)

    def __len__(self) -> int:
        return len(self._home)

    def release(self):
        self._files = {path: file for path, file in self._files.items() if not _can_be_mapped(path)}

    @property
    def num_bytes(self) -> int:
        """Of the tensors, without what else the files hold."""
        return sum(torch.Size(self.shapes[name]).numel() * dtype.itemsize for name, dtype in self.dtypes.items())


class _SafetensorsFile(Mapping):
    def __init__(self, path: Path):
        self._file = safe_open(path, framework="pt")
        self._names = set(self._file.keys())

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def open_weights(path: Path) -> Mapping[str, torch.Tensor]:
    """Opens a weight file without reading it.

    Args:
        path: safetensors, or a PyTorch file: a state dict, or a training checkpoint that holds one as `state_dict` or
            `model`.

    Raises:
        ValueError: The file is cut off, no weight file, or needs code of its own to be opened.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist.")
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(64)
    if head.startswith(b"version https://git-lfs"):
        raise ValueError(
            f"{path} is a pointer of Git LFS and no weight file: run `git lfs pull`, or download it again."
        )
    if path.suffix == ".safetensors":
        try:
            return _SafetensorsFile(path)
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{path} ({size:,} bytes) cannot be read: it is cut off or no safetensors file. Download it again. ({error})"
            ) from error
    is_zip = _can_be_mapped(path)
    if head.startswith(b"PK") and not is_zip:
        raise ValueError(f"{path} ({size:,} bytes) is cut off: the end of the file is missing. Download it again.")
    if is_zip:
        try:
            with zipfile.ZipFile(path) as archive:
                packed = [part.filename for part in archive.infolist() if part.compress_type != zipfile.ZIP_STORED]
        except Exception as error:  # of the list of what is in it
            raise ValueError(f"{path} ({size:,} bytes) is damaged: {error}. Download it again.") from error
        if packed:
            raise ValueError(f"{path} is compressed, which `torch.save` never does: {packed[0]} could be of any size.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:  # whatever bytes can do to an unpickler
        if refused := _GLOBAL.search(str(error)):
            raise ValueError(
                f"{path} is refused: more than tensors is pickled in it, and opening that runs code of whoever wrote it "
                f"({refused[1]}). If you trust it, load it once yourself with "
                "`torch.load(path, weights_only=False)` and save its state dict alone with `safetensors.torch.save_file`."
            ) from error
        raise ValueError(
            f"{path} ({size:,} bytes) cannot be read: it is cut off, or no weight file of PyTorch. Download it again. "
            f"({_last_line(error)})"
        ) from error
    return _state_dict(content, path)


def _can_be_mapped(path: Path) -> bool:
    return path.suffix == ".safetensors" or zipfile.is_zipfile(path)


# What a pickle wanted to import
_GLOBAL = re.compile(r"(?:Unsupported global: |unsupported )GLOBAL (\S+)")


def _last_line(error: Exception) -> str:
    """PyTorch puts a page of advice around what happened, which is that anybody may ask for `weights_only=False`."""
    told = re.search(r"WeightsUnpickler error:\s*(\S.*)", str(error))
    return told[1] if told else str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__


def _state_dict(content: Any, path: Path) -> dict[str, torch.Tensor]:
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__} and no state dict.")
    tensors = {name: tensor for name, tensor in content.items() if isinstance(tensor, torch.Tensor)}
    if not tensors:
        raise ValueError(f"{path} holds no tensors: its keys are {sorted(map(str, content))[:8]}.")
    for name, tensor in tensors.items():
        if tensor.layout is not torch.strided or tensor.nbytes > tensor.untyped_storage().nbytes():
            raise ValueError(f"{path}: {name} of shape {tuple(tensor.shape)} is larger than what the file holds of it.")
    return tensors


def read_json(path: Path) -> dict:
    """A JSON object.

    Raises:
        ValueError: With the file and the line.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, not a {type(content).__name__}.")
    return content


def find(source: str | Path, revision: str | None = None, **hub_kwargs) -> Checkpoint:
    """Finds weights and config.

    Args:
        source: A folder, a weight file, or a repository of the Hub.
        revision: Branch, tag or commit, of a repository.
        hub_kwargs: `cache_dir`, `token`, `force_download`, `local_files_only`, passed to `huggingface_hub`.

    Raises:
        FileNotFoundError: There is nothing to open; the message lists what there is.
    """
    path, repository = Path(source), None
    if not path.exists():
        if str(source).count("/") > 1 or path.suffix in _SUFFIXES or str(source).startswith((".", "/", "~")):
            raise FileNotFoundError(f"{source} does not exist.")
        repository = str(source)
        path = _download(repository, revision, **hub_kwargs)
    folder = path if path.is_dir() else path.parent
    weights = Weights(_weight_files(path))
    config_path = next((folder / name for name in CONFIG_FILES if (folder / name).is_file()), None)
    if path.is_file() and config_path is None and (beside := path.with_suffix(".json")).is_file():
        config_path = beside
    config = None if config_path is None else read_json(config_path)
    return Checkpoint(str(source), folder, weights, config, config_path, repository)


def _weight_files(path: Path) -> list[Path]:
    if path.is_file():
        return _shards(path) if path.name.endswith(_INDEX_SUFFIX) else [path]
    for name in WEIGHT_FILES:
        if (path / name).is_file():
            return [path / name]
        if (path / (name + _INDEX_SUFFIX)).is_file():
            return _shards(path / (name + _INDEX_SUFFIX))
    others = sorted(
        entry
        for entry in path.iterdir()
        if entry.is_file() and entry.suffix in _SUFFIXES and not entry.name.startswith(_NO_WEIGHTS)
    )
    if len(others) == 1:
        return others
    found = sorted(entry.name for entry in path.iterdir())
    if others:
        raise FileNotFoundError(
            f"{path} holds several weight files, name one of them: {[str(entry.name) for entry in others]}."
        )
    raise FileNotFoundError(
        f"{path} holds no weights: one of {', '.join(WEIGHT_FILES)}, or a single file of another name ending in "
        f"{', '.join(_SUFFIXES)}; it holds {found}."
    )


def _shards(index: Path) -> list[Path]:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise ValueError(
            f"{index} must hold a `weight_map` from names of tensors to names of files. Download it again."
        )
    names = sorted(set(places.values()))
    if outside := [name for name in names if Path(name).name != name]:
        raise ValueError(f"{index} names files outside its folder, which are not opened: {outside[:3]}.")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing or not names:
        raise FileNotFoundError(f"{index} names {len(names)} files, of which these are missing: {missing}.")
    return [index.parent / name for name in names]


def check_files(folder: str | Path, only_indices: bool = False) -> None:
    """Opens the weight files of a folder, or reads only the indices of those in shards.

    Raises:
        ValueError, FileNotFoundError: One is damaged, missing or outside. The message names it.
    """
    folder = Path(folder)
    for index in sorted(folder.glob("*" + _INDEX_SUFFIX)):
        if not (folder / index.name.removesuffix(_INDEX_SUFFIX)).is_file():  # which comes first
            _shards(index)
    if only_indices:
        return
    try:
        paths = _weight_files(folder)
    except FileNotFoundError:  # what is not there is not damaged
        return
    for path in paths:
        open_weights(path)


def _download(repository: str, revision: str | None, **hub_kwargs) -> Path:
    """A repository's JSON files, tokenizer and one file of weights, from the cache where they are there."""
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import HFValidationError

    patterns = [*CONFIG_FILES, *_TOKENIZER_FILES, "*" + _INDEX_SUFFIX]
    try:
        if constants.HF_HUB_OFFLINE or hub_kwargs.get("local_files_only"):
            return Path(snapshot_download(repository, revision=revision, **{**hub_kwargs, "local_files_only": True}))
        files = HfApi(token=hub_kwargs.get("token")).list_repo_files(repository, revision=revision)
        best = next((name for name in WEIGHT_FILES if name in files), None)
        patterns += [best] if best else [f"*{suffix}" for suffix in _SUFFIXES]
        return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns, **hub_kwargs))
    except HFValidationError as error:
        raise FileNotFoundError(f"{repository} is neither a file nor a folder nor the id of a repository.") from error
    except Exception as error:  # of connection, access or cache: huggingface_hub passes on those of its HTTP client
        raise FileNotFoundError(
            f"{repository} is no file or folder here, and the Hub did not give it: {error}"
        ) from error


def tokenizer_files(folder: Path) -> list[str]:
    """Those of a tokenizer that lie in `folder`."""
    return [name for name in _TOKENIZER_FILES if os.path.isfile(folder / name)]
