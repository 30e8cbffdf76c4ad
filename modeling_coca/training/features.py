"""Features of a frozen image encoder, computed once, kept in one file that is mapped into memory, and trained from.

Why it is fast on CPUs: each core works alone on small batches (no barrier to wait at, activations stay in the cache),
images are decoded on the same threads, convolutions are channels-last, and batch norms are folded into them.
"""

import copy
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.data import Dataset
from transformers import PreTrainedModel
from transformers.utils import logging

from ..modeling_coca import run_vision_model
from ..saving import told_if_full, write_file
from .data import ImageAugmentation

logger = logging.get_logger(__name__)

_CHUNK = 64  # batches after which what is done is written down


class FrozenFeatures:
    """
    Features of the rows of a data set, `(views, tokens, width)` each, in half precision.

    Equal images, of which each may have several questions say, are in the file once.

    Args:
        path (`str`): `.npy` file (images, views, tokens, width).
        image_of_row (`np.ndarray` of shape `(rows,)`): which of the file's images each row has.
    """

    def __init__(self, path: str | os.PathLike[str], image_of_row: np.ndarray):
        self.path, self.image_of_row = Path(path), image_of_row
        try:
            self.array = np.load(self.path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise ValueError(f"{path} is damaged ({error}): delete it, and the features are computed again.") from error

    def __len__(self) -> int:
        return len(self.image_of_row)

    @property
    def views(self) -> int:
        return self.array.shape[1]

    def __getitem__(self, row: int) -> np.ndarray:
        return self.array[self.image_of_row[row]]

    def select(self, rows: Sequence[int]) -> "FrozenFeatures":
        """Those of some rows, as `datasets.Dataset.select`."""
        return FrozenFeatures(self.path, self.image_of_row[list(rows)])

    def __getstate__(self) -> dict[str, Any]:  # to a worker process goes the file's name, not what is in it
        return {"path": self.path, "image_of_row": self.image_of_row}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)


class FeatureDataset(Dataset):
    """
    The rows of a data set with features of the frozen encoder instead of the image.

    Args:
        dataset (`datasets.Dataset`): the rows that the features were computed of.
        features ([`FrozenFeatures`]): their features.
        image_column (`str`, defaults to `"image"`): is left out.
        column (`str`, defaults to `"image_hidden_states"`): name of the features, `(tokens, width)`.
        random_view (`bool`, defaults to `False`): for training: one of the views, by PyTorch's generator; else the plain one.
    """

    def __init__(
        self,
        dataset: "datasets.Dataset",
        features: FrozenFeatures,
        image_column: str = "image",
        column: str = "image_hidden_states",
        random_view: bool = False,
    ):
        if len(dataset) != len(features):
            raise ValueError(f"There are features of {len(features)} rows for {len(dataset)} rows.")
        self.rows = dataset.remove_columns([image_column]) if image_column in dataset.column_names else dataset
        self.image_features, self.column, self.random_view = features, column, random_view

    @property
    def column_names(self) -> list[str]:
        return [*self.rows.column_names, self.column]

    @property
    def features(self) -> Mapping[str, Any]:
        """Types of the other columns, as of a `datasets.Dataset`."""
        return self.rows.features

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict[str, Any]:
        if row >= len(self):
            raise IndexError(row)
        views = self.image_features[row]
        view = int(torch.randint(len(views), ())) if self.random_view else 0
        return {**self.rows[row], self.column: views[view]}


def compute_features(
    dataset: "datasets.Dataset",
    vision_model: PreTrainedModel,
    image_processor: Any,
    path: str | os.PathLike[str],
    *,
    views: int = 1,
    augmentation: ImageAugmentation | None = None,
    feature_layers: Sequence[int] | None = None,
    image_column: str = "image",
    batch_size: int | None = None,
    seed: int = 0,
    desc: str = "features",
) -> FrozenFeatures:
    """
    Encodes `views` views of each image with a frozen encoder, on as many CPU cores as PyTorch may use, or on the
    encoder's device. View 0 is the plain image, as the image processor prepares it; the others are augmented.

    The features are kept in `path`, and beside it a `.json` with what they were made from: a later call with the same
    weights, images and settings only opens the file. After an interruption it goes on where it was.

    Args:
        dataset (`datasets.Dataset`): rows with an image column.
        vision_model (`PreTrainedModel`): the encoder: `model.model.vision_model` of a CoCa, or any other.
        image_processor ([`CocaImageProcessorPil`] or the like): prepares the images.
        path (`str`): `.npy` file to write.
        views (`int`, defaults to 1): views of each image.
        augmentation ([`ImageAugmentation`], *optional*): makes the views after the first.
        feature_layers (`Sequence[int]`, *optional*): see `CocaConfig.vision_feature_layers`.
        image_column (`str`, defaults to `"image"`): column of the images.
        batch_size (`int`, *optional*): images at a time on each core.
        seed (`int`, defaults to 0): a view depends on it, its image's place and its number alone.
        desc (`str`): label of the progress bar.

    Returns:
        [`FrozenFeatures`]

    Example:

    ```python
    >>> from modeling_coca.training import CocaDataCollator, FeatureDataset, compute_features

    >>> features = compute_features(  # doctest: +SKIP
    ...     dataset, model.model.vision_model, processor.image_processor, "cache/train.npy"
    ... )
    >>> train = FeatureDataset(dataset, features, random_view=True)  # doctest: +SKIP
    >>> collator = CocaDataCollator(processor, image_hidden_states_column="image_hidden_states")  # doctest: +SKIP
    ```
    """
    if views > 1 and (augmentation is None or not augmentation.is_active):
        raise ValueError(f"`views` is {views} and `augmentation` changes nothing: give one, or leave `views` at 1.")
    if isinstance(dataset, datasets.IterableDataset):
        raise ValueError("Features are computed of rows with numbers: load the data without streaming.")
    path = Path(path)
    cells = dataset.with_format(None).select_columns([image_column])
    cells = cells.cast_column(image_column, datasets.Image(decode=False))
    image_of_row, first_rows, digest = _distinct_images(row[image_column] for row in cells)
    key = {
        "weights": _digest(tensor.detach().cpu().numpy().tobytes() for tensor in vision_model.state_dict().values()),
        "encoder": str(vision_model.config.to_dict().get("architecture", vision_model.config.model_type)),
        "images": digest,
        "image_processor": json.loads(image_processor.to_json_string()),
        "feature_layers": None if feature_layers is None else list(feature_layers),
        "views": views,
        "augmentation": json.loads(json.dumps(asdict(augmentation))) | {"seed": seed} if views > 1 else None,
    }
    key_path = path.with_name(path.name + ".json")
    if path.is_file() and _json(key_path) == key:
        return FrozenFeatures(path, image_of_row)

    def load(image: int, view: int) -> Image.Image:
        picture = datasets.Image().decode_example(cells[int(first_rows[image])][image_column])
        return augmentation(picture, np.random.default_rng([seed, image, view])) if view else picture

    def prepare(images: list[Image.Image]) -> torch.Tensor:
        pixel_values = image_processor(images, return_tensors="pt")["pixel_values"]
        if on_cpu:
            pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)
        return pixel_values.to(vision_model.device, vision_model.dtype)

    def run(batch: list[tuple[int, int]]) -> int:
        tokens = _encode(model, prepare([load(*job) for job in batch]), feature_layers)
        images, columns = zip(*batch, strict=True)
        array[list(images), list(columns)] = tokens.to("cpu", torch.float16).numpy()
        return len(batch)

    jobs = [(image, view) for image in range(len(first_rows)) for view in range(views)]
    on_cpu = vision_model.device.type == "cpu"
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished, progress_path = path.with_name(path.name + ".unfinished"), path.with_name(path.name + ".progress")
    progress = _json(progress_path) or {}
    done = progress.get("done", 0) if progress.get("key") == key else 0

    def finish() -> FrozenFeatures:
        """The key goes before its features and comes after them, and what is done is forgotten last."""
        if unfinished.is_file():
            key_path.unlink(missing_ok=True)
            os.replace(unfinished, path)
        write_file(key_path, json.dumps(key))
        progress_path.unlink()
        return FrozenFeatures(path, image_of_row)

    if done == len(jobs) and (unfinished.is_file() or path.is_file()):
        return finish()
    done = done if unfinished.is_file() else 0
    training = vision_model.training
    vision_model.eval()
    try:
        with _single_threads() as workers, logging.tqdm(total=len(jobs), initial=done, desc=desc, unit="img") as bar:
            pixel_values = prepare([load(0, 0)] * 2)
            model = workers.submit(_optimize_for_cpu, vision_model, pixel_values).result() if on_cpu else vision_model
            if done:
                array = np.load(unfinished, mmap_mode="r+", allow_pickle=False)
                logger.info(f"Going on with {path} after {done} of {len(jobs)} images.")
            else:
                unfinished.unlink(missing_ok=True)  # which may be a link
                shape = (len(first_rows), views, *_encode(vision_model, pixel_values, feature_layers).shape[1:])
                with told_if_full(path):
                    array = np.lib.format.open_memmap(unfinished, "w+", np.float16, shape)
                    if hasattr(
                        os, "posix_fallocate"
                    ):  # or a full disk would end the process, when a page is written to
                        with open(unfinished, "r+b") as file:
                            os.posix_fallocate(file.fileno(), 0, unfinished.stat().st_size)
            # 16 is the least with which PyTorch hands 1x1 convolutions to oneDNN on one thread
            size = batch_size or max(16, 16 * 128**2 // (pixel_values.shape[-1] * pixel_values.shape[-2]))
            batches = [jobs[start : start + size] for start in range(done, len(jobs), size)]
            for start in range(0, len(batches), _CHUNK):
                chunk = [workers.submit(run, batch) for batch in batches[start : start + _CHUNK]]
                for finished in as_completed(chunk):
                    bar.update(finished.result())
                array.flush()
                done += sum(map(len, batches[start : start + _CHUNK]))
                write_file(progress_path, json.dumps({"key": key, "done": done}))
    finally:
        vision_model.train(training)
        if not done:
            unfinished.unlink(missing_ok=True)
            progress_path.unlink(missing_ok=True)
    return finish()


@torch.inference_mode()
def _encode(
    model: PreTrainedModel, pixel_values: torch.Tensor, feature_layers: Sequence[int] | None = None
) -> torch.Tensor:
    """The tokens (B, N, D) as CoCa takes them."""
    return run_vision_model(model, pixel_values, feature_layers=feature_layers).last_hidden_state


def _optimize_for_cpu(model: PreTrainedModel, pixel_values: torch.Tensor) -> PreTrainedModel:
    """
    A copy of a convolutional `model` with each batch norm folded into the convolution before it and channels-last
    weights. Pairs are found by running the model. The copy is compared with the model, and dropped if it differs.
    """
    if not any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        return model
    fast = copy.deepcopy(model).eval()
    names = {module: name for name, module in fast.named_modules()}
    produced: list[tuple[torch.Tensor, nn.Module]] = []  # holds the outputs, so that identity means something
    pairs: list[tuple[nn.Module, nn.Module]] = []

    def find_producer(norm: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        pairs.extend((conv, norm) for output, conv in produced if output is inputs[0])

    hooks = []
    for module in names:
        if isinstance(module, nn.Conv2d):
            hooks.append(module.register_forward_hook(lambda conv, _, output: produced.append((output, conv))))
        elif isinstance(module, nn.BatchNorm2d):
            hooks.append(module.register_forward_pre_hook(find_producer))
    expected = _encode(fast, pixel_values)
    for hook in hooks:
        hook.remove()
    for conv, norm in pairs:
        fast.set_submodule(names[conv], fuse_conv_bn_eval(conv, norm))
        fast.set_submodule(names[norm], getattr(norm, "act", nn.Identity()))  # timm's batch norm holds the activation
    fast = fast.to(memory_format=torch.channels_last)
    error = (_encode(fast, pixel_values) - expected).abs().max() / expected.abs().max()
    return fast if error < 1e-4 else model


@contextmanager
def _single_threads() -> Iterator[ThreadPoolExecutor]:
    """A pool with one worker for each of PyTorch's threads, in which each operation runs on one thread."""
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


def _distinct_images(cells: Iterable[Mapping[str, Any]]) -> tuple[np.ndarray, np.ndarray, str]:
    """For each row the number of its image; for each image its first row; and a digest of all images."""
    numbers: dict[bytes, int] = {}
    image_of_row, first_rows, total = [], [], hashlib.sha256()
    for row, cell in enumerate(cells):
        content = cell["bytes"]
        if content is None:  # a file: it is taken for unchanged while its size and time are
            stat = os.stat(cell["path"])
            content = f"{cell['path']}\n{stat.st_size}\n{stat.st_mtime_ns}".encode()
        digest = hashlib.sha256(content).digest()
        if digest not in numbers:
            numbers[digest] = len(numbers)
            first_rows.append(row)
            total.update(digest)
        image_of_row.append(numbers[digest])
    if not first_rows:
        raise ValueError("`dataset` is empty: there is nothing to encode.")
    return np.array(image_of_row), np.array(first_rows), total.hexdigest()[:16]


def _digest(chunks: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()[:16]


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text()) if path.is_file() else None
    except ValueError:  # damaged: as good as none
        return None


__all__ = ["FeatureDataset", "FrozenFeatures", "compute_features"]
