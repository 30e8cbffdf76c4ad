"""Models for inference, and images in batches: decoded and resized by worker processes, unreadable ones with the reason."""

import io
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel, ProcessorMixin
from transformers.utils import logging

from modeling_coca.image_processing_pil_coca import load_rgb

from .limits import check_image, check_plain
from .sources import ImageShard


class ImageRef(NamedTuple):
    """Where an image is: its shard, its place in the shard's list, its id, and the key by which the shard reads it."""

    shard: int
    position: int
    id: str
    key: Any


@dataclass
class ImageBatch:
    """
    Args:
        refs (`list[ImageRef]`), kept (`list[dict]`): the images that could be read, and their kept columns.
        pixel_values (`torch.Tensor` of shape `(len(refs), 3, H, W)`): `None` where none could be read.
        errors (`list[tuple[ImageRef, str]]`): the others, with the reason.
    """

    refs: list[ImageRef] = field(default_factory=list)
    kept: list[dict[str, Any]] = field(default_factory=list)
    pixel_values: torch.Tensor | None = None
    errors: list[tuple[ImageRef, str]] = field(default_factory=list)

    def pin_memory(self) -> "ImageBatch":
        """Called by `DataLoader`."""
        if self.pixel_values is not None:
            self.pixel_values = self.pixel_values.pin_memory()
        return self


def choose_device(device: str | None = None) -> torch.device:
    """The device asked for, else an accelerator if there is one; under `accelerate launch` each process its own."""
    if device is not None:
        return torch.device(device)
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def default_num_workers(device: torch.device, many_images: bool) -> int:
    """Workers that keep the model busy: the cores that this process can have, but one, at most 8."""
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return min(8, max(cores - 1, device.type != "cpu")) if many_images else 0


def load_for_inference(
    model: str | os.PathLike | PreTrainedModel,
    model_class: type[PreTrainedModel],
    processor: ProcessorMixin | None = None,
    device: str | None = None,
    dtype: str | None = None,
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """
    Model and processor from a folder or the Hub, ready to run; a model that is loaded already is taken as it is.

    Args:
        model: folder, Hub id, or model.
        model_class (`type`): what to load, `CocaModel` or `CocaForConditionalGeneration`.
        processor (*optional*): needed beside a model that is loaded already.
        device, dtype (`str`, *optional*): by default an accelerator if there is one, in bf16, else the CPU in the
            model's own type.
    """
    if isinstance(model, PreTrainedModel):
        if processor is None:
            raise ValueError("Pass the `processor` of a model that is loaded already.")
        return model.eval(), processor
    from modeling_coca import CocaProcessor

    folder = os.fspath(model)
    if not os.path.isdir(folder) and (folder.startswith((".", "/", "~")) or folder.count("/") > 1):
        raise FileNotFoundError(f"There is no model folder {folder}.")
    place = choose_device(device)
    if dtype is None:
        dtype = "bfloat16" if place.type == "cuda" else "auto"
    show_progress = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # that of the weights, which are there in a moment
    try:
        loaded = model_class.from_pretrained(folder, dtype=dtype).eval().requires_grad_(False).to(place)
        return loaded, processor or CocaProcessor.from_pretrained(folder, trust_remote_code=False)  # and ask nobody
    finally:
        if show_progress:
            logging.enable_progress_bar()


class _Images(Dataset):
    """Reads images by `ImageRef`, a batch at a time."""

    def __init__(self, shards: Sequence[ImageShard], image_processor, fast_decode: bool = False):
        self.shards = shards
        self.image_processor = image_processor
        # Twice the size asked for: the rest of the way is resized as usual, so that little is lost
        self.at_least = 2 * max(dict(image_processor.size).values()) if fast_decode else None

    def __getitems__(self, refs: list[ImageRef]) -> ImageBatch:
        batch, images = ImageBatch(), []
        for ref in refs:
            try:
                source, kept = self.shards[ref.shard].read(ref.key)
                image = open_image(source, self.at_least)
            except MemoryError as error:  # says nothing of the image: it may well be readable the next time
                raise MemoryError(f"there was none left to read {ref.id}") from error
            except Exception as error:  # a worker must live on, whatever the file or the decoder came up with
                batch.errors.append((ref, reason_of(error)))
                continue
            batch.refs.append(ref)
            batch.kept.append(kept)
            images.append(image)
        try:
            if images:
                batch.pixel_values = self._prepare(images)
        except ValueError:  # one of them: find out which
            prepared, readable = [], []
            for row, image in enumerate(images):
                try:
                    prepared.append(self._prepare([image]))
                    readable.append(row)
                except ValueError as error:
                    batch.errors.append((batch.refs[row], str(error).removeprefix("images[0]: ")))
            batch.refs = [batch.refs[row] for row in readable]
            batch.kept = [batch.kept[row] for row in readable]
            batch.pixel_values = torch.cat(prepared) if prepared else None
        return batch

    def _prepare(self, images: list[Any]) -> torch.Tensor:
        return self.image_processor(images, return_tensors="pt")["pixel_values"]


def open_image(source: Any, at_least: int | None = None) -> Any:
    """
    Encoded bytes or a path to an RGB image that stands upright; images and arrays stay as they are.

    With `at_least` a JPEG is decoded at a half, a quarter or an eighth of its size, while both sides stay that long.
    """
    if source is None:
        raise ValueError("the row has no image")
    if isinstance(source, str) and "://" in source:
        raise ValueError("the image is a URL: download it first, for example with img2dataset")
    if isinstance(source, (str, os.PathLike, bytes)):
        if not isinstance(source, bytes):
            check_plain(source)
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            if at_least is not None:
                image.draft("RGB", (at_least, at_least))  # JPEG's own way; other formats ignore it
            check_image(image)
            return load_rgb(image)
    if not isinstance(source, (Image.Image, np.ndarray, torch.Tensor)):
        raise TypeError(f"{type(source).__name__} is no image, path or encoded image")
    return source


def reason_of(error: Exception) -> str:
    """One line for people, without the addresses and temporary objects that Pillow names."""
    if isinstance(error, Image.UnidentifiedImageError):
        return "no image format that Pillow knows"
    text = " ".join(str(error).split()) or type(error).__name__
    return text if isinstance(error, (OSError, TypeError, ValueError)) else f"{type(error).__name__}: {text}"


class ImageLoader:
    """
    Iterates over images in batches.

    Batches are drawn from as many shards at a time as there are workers, in turn, so that each worker reads its own
    tar file or Parquet row group from front to back. A batch may go on in the next shard: only the last ones are short.

    Args:
        shards (`Sequence[ImageShard]`): see [`open_images`].
        image_processor: CoCa's.
        batch_size (`int`): images a batch.
        num_workers (`int`): processes that read; 0 reads in this one.
        refs (`Iterable[Iterable[ImageRef]]`, *optional*): what to read, shard by shard; by default everything.
        pin_memory (`bool`): for copies to an accelerator.
        fast_decode (`bool`): decode JPEGs at a fraction of their size, never below twice the processor's.
    """

    def __init__(
        self,
        shards: Sequence[ImageShard],
        image_processor,
        batch_size: int = 32,
        num_workers: int = 0,
        refs: Iterable[Iterable[ImageRef]] | None = None,
        pin_memory: bool = False,
        fast_decode: bool = False,
    ):
        self.shards = shards
        self.batch_size = batch_size
        self.num_streams = max(num_workers, 1)
        self.refs = map(self._refs_of, range(len(shards))) if refs is None else refs
        self.loader = DataLoader(
            _Images(shards, image_processor, fast_decode),
            batch_sampler=self._batches(),
            num_workers=num_workers,
            collate_fn=_as_is,
            pin_memory=pin_memory,
        )

    def _refs_of(self, shard: int) -> Iterator[ImageRef]:
        for position, (name, key) in enumerate(self.shards[shard].list()):
            yield ImageRef(shard, position, name, key)

    def _batches(self) -> Iterator[list[ImageRef]]:
        shards = iter(self.refs)

        def stream() -> Iterator[ImageRef]:
            for refs in shards:  # shared: whichever stream is done takes the next shard
                yield from refs

        streams = [stream() for _ in range(self.num_streams)]
        while streams:
            for source in list(streams):
                batch = [ref for _, ref in zip(range(self.batch_size), source, strict=False)]
                if batch:
                    yield batch
                if len(batch) < self.batch_size:
                    streams.remove(source)

    def __iter__(self) -> Iterator[ImageBatch]:
        try:
            yield from self.loader
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise OSError(
                f"A process that reads images was ended from outside, as when memory runs out ({error}): use fewer "
                "`num_workers`, or 0."
            ) from error


def _as_is(batch: ImageBatch) -> ImageBatch:
    return batch


__all__ = [
    "ImageBatch",
    "ImageLoader",
    "ImageRef",
    "choose_device",
    "default_num_workers",
    "load_for_inference",
    "open_image",
]
