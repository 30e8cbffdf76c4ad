"""Images with captions from where they lie: the Hub, folders, parquet, CSV, JSON, WebDataset shards."""

import functools
import glob
import hashlib
import io
import json
import math
import os
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from huggingface_hub.constants import HF_HUB_CACHE
from PIL import Image
from transformers.utils import logging

from ..evaluation.evaluator import missing_column
from ..inference.limits import check_image, check_inside
from ..inference.sources import root_of

try:
    import datasets
except ImportError as error:
    raise ImportError("Data are loaded by datasets: run `pip install datasets`.") from error

logger = logging.get_logger(__name__)

_BUILDERS = {
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".tar": "webdataset",
    ".tar.gz": "webdataset",
}


class SkippedImages:
    """
    The images that could not be read: one warning each, and one line each in a file, from all worker processes.

    Args:
        path (`str`, *optional*):
            A file of JSON lines with `split`, `image` (path, key or row) and `error`.
        resume (`bool`, defaults to `False`): go on with the list in an existing file, and do not replace it.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None, resume: bool = False):
        self.path = None if path is None else Path(path)
        self._entries: dict[tuple[str, str], str] = {}
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if resume:
                self._entries = {(e["split"], e["image"]): e["error"] for e in self.entries()}
            else:
                self.path.unlink(missing_ok=True)

    def add(self, split: str, image: str, error: str) -> None:
        if (split, image) in self._entries:  # another epoch
            return
        self._entries[split, image] = error
        logger.warning(f"Left out an image of {split!r} that cannot be read: {image} ({error}).")
        if self.path is not None:
            line = json.dumps({"split": split, "image": image, "error": error}) + "\n"
            with open(self.path, "a", encoding="utf-8") as file:  # one short write, so that processes do not mix lines
                file.write(line)

    def entries(self) -> list[dict[str, str]]:
        """Each of them once, those of other processes included where there is a file."""
        found = dict(self._entries)
        if self.path is not None and self.path.is_file():
            for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    entry = json.loads(line)
                    found[entry["split"], entry["image"]] = entry["error"]
                except (ValueError, TypeError, KeyError):  # cut off by a kill; another epoch adds it again
                    continue
        return [{"split": split, "image": image, "error": error} for (split, image), error in found.items()]

    def __len__(self) -> int:
        return len(self.entries())


def load_data(
    name: str | os.PathLike[str] | None = None,
    *,
    config_name: str | None = None,
    data_files: Mapping[str, str | Sequence[str]] | None = None,
    image_column: str = "image",
    image_root: str | os.PathLike[str] | None = None,
    streaming: bool = False,
    shuffle_buffer: int = 1000,
    seed: int = 0,
    num_proc: int | None = None,
    skipped: SkippedImages | None = None,
) -> "datasets.DatasetDict | datasets.IterableDatasetDict":
    """
    Loads images with what belongs to them, and leaves out the images that cannot be read.

    | what | how |
    |---|---|
    | a data set of the Hub | `load_data("org/name")` |
    | a folder with `metadata.jsonl` or `metadata.csv` (`imagefolder`), or with parquet files | `load_data("folder")` |
    | what `save_to_disk` has written | `load_data("folder")` |
    | parquet, CSV, TSV, JSON (a column of paths is relative to the file's folder) | `load_data("train.csv")` |
    | WebDataset shards; their columns are called `jpg`, `txt`, ... | `load_data(data_files={"train": "shards/*.tar"}, streaming=True)` |

    Without streaming, all images are decoded once beforehand (by `num_proc` processes; `datasets` keeps the result), so
    the number of rows is that of the readable ones. With streaming, unreadable ones are left out on the way: shards are
    divided among the workers of the `DataLoader`, and shuffled with a buffer. Either way each is warned of and listed
    in `skipped`.

    Args:
        name (`str`, *optional*): of a data set, folder or file.
        config_name (`str`, *optional*): which configuration of a data set of the Hub.
        data_files (`Mapping[str, str | Sequence[str]]`, *optional*): instead of `name`, files or patterns for each split.
        image_column (`str`, defaults to `"image"`): column of the images: images, their bytes, or paths.
        image_root (`str`, *optional*): folder that paths in the data may lead into; by default the folder of the file, or the
            data set's. URLs are not followed.
        streaming (`bool`, defaults to `False`): read while training. The splits are iterable then.
        shuffle_buffer (`int`, defaults to 1000): rows to draw from, when streaming the split `"train"`; 0 keeps the order.
        seed (`int`, defaults to 0): of the shuffling.
        num_proc (`int`, *optional*): processes that look through the images.
        skipped ([`SkippedImages`], *optional*): the list to which unreadable images are added.

    Returns:
        `datasets.DatasetDict`, or `datasets.IterableDatasetDict` when streaming, with PIL images in `image_column`.

    Raises:
        ValueError: there is no such column, the file type is unknown, or not one image can be read.

    Example:

    ```python
    >>> import tempfile
    >>> from pathlib import Path
    >>> from PIL import Image
    >>> from modeling_coca.training import SkippedImages, load_data

    >>> with tempfile.TemporaryDirectory() as folder:
    ...     Image.new("RGB", (8, 8), "red").save(f"{folder}/red.png")
    ...     _ = Path(f"{folder}/broken.png").write_bytes(b"no image")
    ...     _ = Path(f"{folder}/all.csv").write_text("image,text\\nred.png,a red square\\nbroken.png,nothing\\n")
    ...     skipped = SkippedImages()
    ...     rows = load_data(f"{folder}/all.csv", skipped=skipped)["train"]
    ...     rows["text"][:], len(skipped)
    (['a red square'], 1)
    ```
    """
    if (name is None) == (data_files is None):
        raise ValueError("Give either `name`, of a data set, folder or file, or `data_files` for each split.")
    skipped = SkippedImages() if skipped is None else skipped
    if name is not None and _builder_of(str(name)) and Path(name).is_file():
        data_files, name = {"train": str(name)}, None
    root, own = "", ""
    if data_files is not None:
        files = {split: [paths] if isinstance(paths, str) else list(paths) for split, paths in data_files.items()}
        builder, options, folders = _describe(files)
        root = folders[0] if len(folders) == 1 else ""
        roots = [folder or "." for folder in folders]
        for path in (path for paths in files.values() for path in paths):
            _check_begin(path, builder)
        with _explained(files):
            data = datasets.load_dataset(builder, data_files=files, streaming=streaming, **options)
    elif any((Path(name) / marker).is_file() for marker in ("dataset_dict.json", "state.json")):
        if streaming:
            raise ValueError(f"{name} was written by `save_to_disk` and is mapped from there: leave out `streaming`.")
        roots = [str(name)]
        data = datasets.load_from_disk(str(name))
        data = data if isinstance(data, datasets.DatasetDict) else datasets.DatasetDict({"train": data})
    else:
        with _explained(name):
            data = datasets.load_dataset(str(name), config_name, streaming=streaming)
        if Path(name).is_dir():
            roots, own = [root_of(str(name))], os.path.join(os.path.abspath(name), "")
        else:
            roots, own = [str(datasets.config.HF_DATASETS_CACHE), HF_HUB_CACHE], f"hf://datasets/{name}@"
    place = _Place(root, [*([image_root] if image_root else []), *roots], own)
    clean = {}
    for split, rows in data.items():
        if rows.features is None:  # a stream that says nothing of itself: look at its beginning
            with _explained(data_files or name):
                rows = rows._resolve_features()
        if image_column not in rows.features:
            raise ValueError(missing_column(image_column, "image_column", rows.features))
        if not _may_hold_images(rows.features[image_column]):
            raise ValueError(
                f"Column {image_column!r} (`image_column`) of {split!r} holds {rows.features[image_column]!r}: it must be of "
                "images, their bytes, or paths."
            )
        rows = rows.cast_column(image_column, datasets.Image(decode=False))
        if streaming:
            clean[split] = _readable_stream(rows, split, image_column, place, shuffle_buffer, seed, skipped)
        else:
            clean[split] = _readable_rows(rows, split, image_column, place, num_proc, skipped)
    return datasets.IterableDatasetDict(clean) if streaming else datasets.DatasetDict(clean)


def _may_hold_images(feature: Any) -> bool:
    if isinstance(feature, datasets.Value):
        return feature.dtype.removeprefix("large_") in ("string", "binary")
    return isinstance(feature, datasets.Image) or (isinstance(feature, Mapping) and set(feature) <= {"bytes", "path"})


# Of Arrow, pandas and tarfile
_UNREADABLE = (ValueError, OSError, NotImplementedError, StopIteration, tarfile.TarError)


@contextmanager
def _explained(where: Any) -> Iterator[None]:
    """What `datasets`, pandas and Arrow say of a file that they cannot read, as an error that names it."""
    try:
        yield
    except (FileNotFoundError, ConnectionError):
        raise
    except (*_UNREADABLE, datasets.exceptions.DatasetGenerationError) as error:
        cause = error.__cause__ or error
        why = "it has no rows" if isinstance(cause, StopIteration) else cause
        raise ValueError(f"{where} cannot be read: {why}. Correct the file, or leave it out.") from error


def _check_begin(path: str, builder: str) -> None:
    """JSON that begins with neither an object nor a list is none of a table; of some, Arrow ends the process."""
    if "://" in path:
        return
    files = glob.glob(path, recursive=True)
    if not files:
        raise FileNotFoundError(f"No file matches {path}.")
    for file in files if builder == "json" else []:
        with open(file, "rb") as opened:
            begin = opened.read(2**16).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
        if begin not in (b"{", b"["):
            raise ValueError(f"{file} is no table in JSON: it must hold an object a line, or a list of objects.")


def _builder_of(path: str) -> str | None:
    return next((builder for ending, builder in _BUILDERS.items() if path.lower().endswith(ending)), None)


def _describe(files: Mapping[str, list[str]]) -> tuple[str, dict[str, Any], list[str]]:
    """How to read the files: the builder of `datasets`, its options, and the folders that they are in."""
    paths = [path for some in files.values() for path in some]
    builders = {_builder_of(path) for path in paths}
    if len(builders) != 1 or None in builders:
        raise ValueError(
            f"`data_files` must be of one type of {', '.join(_BUILDERS)}, got {', '.join(map(repr, paths[:5]))}."
        )
    (builder,) = builders
    folders = sorted({os.path.dirname(path) for path in paths if "://" not in path})
    return builder, {"sep": "\t"} if paths[0].lower().endswith(".tsv") else {}, folders


class _Place(NamedTuple):
    """Where the paths in data start from (`root`), which folders they may lead into, and the address of the set itself."""

    root: str
    roots: list[str | os.PathLike[str]]
    own: str


def _located(cell: Mapping[str, Any] | None, root: str) -> Mapping[str, Any] | None:
    """A path in a table is relative to the table."""
    if cell is None or cell.get("bytes") is not None or not cell.get("path") or "://" in cell["path"]:
        return cell
    return {"bytes": None, "path": os.path.join(root, cell["path"])}


def _read(cell: Mapping[str, Any] | None, place: _Place) -> tuple[Image.Image | None, str | None]:
    """The decoded image, or why there is none."""
    cell = _located(cell, place.root)
    if cell is None or (cell.get("bytes") is None and not cell.get("path")):
        return None, "no image"
    try:
        content = cell.get("bytes")
        if content is None and "://" in cell["path"]:
            if not place.own or not re.match(rf"((zip|tar)://[^:]*::)?{re.escape(place.own)}", cell["path"]):
                raise ValueError("the image is a URL: download it first, for example with img2dataset")
        else:
            if content is None:
                check_inside(cell["path"], place.roots)
            with Image.open(cell["path"] if content is None else io.BytesIO(content)) as image:
                check_image(image)
        return datasets.Image().decode_example(dict(cell)), None
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError and more
        return None, re.sub(r" <_io\.BytesIO.*?>", "", f"{type(error).__name__}: {error}")


def _errors(cells: Sequence[Mapping[str, Any] | None], place: _Place) -> dict[str, list[Any]]:
    is_path = [cell is not None and cell.get("bytes") is None for cell in cells]
    return {"error": [_read(cell, place)[1] for cell in cells], "is_path": is_path}


def _name_of(cell: Mapping[str, Any] | None, others: Mapping[str, Any]) -> str:
    """What tells an image from the others: its path, the key of its shard, or what it and its row hold."""
    name = (cell or {}).get("path") or others.get("__key__")
    if name:
        return str(name)
    content = (cell or {}).get("bytes")
    if content is not None:
        return f"{len(content)} bytes, sha256 {hashlib.sha256(content).hexdigest()[:16]}"
    return f"none in the row {dict(others)!r}"[:200]


def _readable_rows(
    rows: "datasets.Dataset", split: str, image_column: str, place: _Place, num_proc: int | None, skipped: SkippedImages
) -> "datasets.Dataset":
    cells = rows.select_columns([image_column])
    looked = cells.map(
        _errors,
        input_columns=image_column,
        fn_kwargs={"place": place},
        batched=True,
        batch_size=64,
        remove_columns=[image_column],
        features=datasets.Features({"error": datasets.Value("string"), "is_path": datasets.Value("bool")}),
        num_proc=num_proc,
        desc=f"Looking through the images of {split}",
    )
    errors = looked["error"][:]
    kept = [row for row, error in enumerate(errors) if error is None]
    for row, error in enumerate(errors):
        if error is not None:
            skipped.add(split, f"row {row}: {_name_of(cells[row][image_column], {})}", error)
    if not kept:
        raise ValueError(f"Not one image of {split!r} ({len(errors)} rows) can be read; the first: {errors[:1]}.")
    if len(kept) < len(errors):
        logger.warning(f"{len(errors) - len(kept)} of {len(errors)} images of {split!r} are left out.")
        rows = rows.select(kept)
    if place.root and any(looked["is_path"][:]):
        rows = rows.map(
            lambda cell: {image_column: _located(cell, place.root)},
            input_columns=image_column,
            features=rows.features,
            desc="Paths",
        )
    return rows.cast_column(image_column, datasets.Image())


def _readable_stream(
    rows: "datasets.IterableDataset",
    split: str,
    image_column: str,
    place: _Place,
    shuffle_buffer: int,
    seed: int,
    skipped: SkippedImages,
) -> "datasets.IterableDataset":
    if split == "train" and shuffle_buffer:
        rows = rows.shuffle(seed=seed, buffer_size=shuffle_buffer)
    decode = functools.partial(_decode_batch, split=split, image_column=image_column, place=place, skipped=skipped)
    return rows.map(decode, batched=True, batch_size=16)


def _decode_batch(
    batch: Mapping[str, list[Any]], split: str, image_column: str, place: _Place, skipped: SkippedImages
) -> dict[str, list[Any]]:
    """Decodes a stream's images; rows without a readable one are left out."""
    cells = batch[image_column]
    images, kept = [], []
    for i, cell in enumerate(cells):
        image, error = _read(cell, place)
        if error is None:
            images.append(image)
            kept.append(i)
        else:
            others = {column: values[i] for column, values in batch.items() if column != image_column}
            skipped.add(split, _name_of(cell, others), error)
    decoded = {column: [values[i] for i in kept] for column, values in batch.items()}
    return {**decoded, image_column: images}


# ------------------------------------------------------------------------------------------------------ augmentation


@dataclass(frozen=True)
class ImageAugmentation:
    """
    Random views of an image. By default it does nothing: what captions tell apart (left and right, colours, what is at
    the edge) differs from set to set.

    Args:
        zoom (`(float, float)`, defaults to `(1.0, 1.0)`): smallest and largest magnification.
        shift (`float`, defaults to 0): largest move along each axis, in image widths and heights.
        rotate (`float`, defaults to 0): largest rotation, in degrees.
        flip (`bool`, defaults to `False`): mirror half of the images.
        color (`float`, defaults to 0): largest relative change of brightness, contrast and saturation, each.
        fill (`(int, int, int)`, defaults to white): what comes into sight from outside.
        size (`int`, *optional*):
            Resize the shorter side to this beforehand, so that a small image is not turned in its own coarse grid.

    Example:

    ```python
    >>> import numpy as np
    >>> from PIL import Image
    >>> from modeling_coca.training import ImageAugmentation

    >>> augment = ImageAugmentation(zoom=(0.85, 1.1), rotate=8, flip=True)
    >>> augment(Image.new("RGB", (64, 48), "red"), np.random.default_rng(0)).size
    (64, 48)
    ```
    """

    zoom: tuple[float, float] = (1.0, 1.0)
    shift: float = 0.0
    rotate: float = 0.0
    flip: bool = False
    color: float = 0.0
    fill: tuple[int, int, int] = (255, 255, 255)
    size: int | None = None

    def __post_init__(self):
        if len(self.zoom) != 2 or not 0 < self.zoom[0] <= self.zoom[1]:
            raise ValueError(f"`zoom` must be the smallest and the largest magnification, got {self.zoom}.")
        if not 0 <= self.color < 1:
            raise ValueError(f"`color` is a relative change and must lie in [0, 1), got {self.color}.")
        if self.shift < 0 or self.rotate < 0:
            raise ValueError(f"`shift` ({self.shift}) and `rotate` ({self.rotate}) must not be negative.")

    @property
    def is_active(self) -> bool:
        return self.flip or any((self.shift, self.rotate, self.color)) or tuple(self.zoom) != (1.0, 1.0)

    def __call__(self, image: Image.Image, rng: np.random.Generator | None = None) -> Image.Image:
        """
        Args:
            image (`PIL.Image.Image`): any image; transparency is lost.
            rng (`np.random.Generator`, *optional*): by default one that PyTorch's generator seeds, which differs in
                each worker of a `DataLoader`.
        """
        if rng is None:
            rng = np.random.default_rng(int(torch.randint(2**31, ())))
        image = image.convert("RGB")
        if self.size is not None:
            image = _resize_shorter_side(image, self.size)
        image = self._move(image, rng)
        return self._recolor(image, rng) if self.color else image

    def _move(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        zoom = math.exp(rng.uniform(*(math.log(value) for value in self.zoom)))
        angle = math.radians(rng.uniform(-self.rotate, self.rotate))
        shift_x, shift_y = rng.uniform(-self.shift, self.shift, 2) * image.size
        mirror = -1 if self.flip and rng.random() < 0.5 else 1
        if zoom == 1 and angle == shift_x == shift_y == 0 and mirror == 1:
            return image
        cos, sin = math.cos(angle) / zoom, math.sin(angle) / zoom
        x, y = image.width / 2, image.height / 2
        # Pillow maps each pixel of the view to its place in the image
        matrix = (mirror * cos, -mirror * sin, x - mirror * (cos * (x + shift_x) - sin * (y + shift_y)))
        matrix += (sin, cos, y - sin * (x + shift_x) - cos * (y + shift_y))
        return image.transform(
            image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=tuple(self.fill)
        )

    def _recolor(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        from PIL import ImageEnhance

        for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
            image = enhance(image).enhance(1 + rng.uniform(-self.color, self.color))
        return image


def _resize_shorter_side(image: Image.Image, size: int) -> Image.Image:
    scale = size / min(image.size)
    width, height = max(size, round(image.width * scale)), max(size, round(image.height * scale))
    return image.resize((width, height), Image.Resampling.BICUBIC)


_SENTENCE_END = re.compile(r"(?<=[.!?。！？])\s+")


def caption_variants(
    captions: str | Sequence[str], templates: Sequence[str] = (), sentences: bool = False
) -> str | list[str]:
    """
    Text augmentation: what a caption may also be, as a list from which [`CocaDataCollator`] takes one at random, and
    evaluation the first.

    Args:
        captions (`str` or `Sequence[str]`): one caption, or several.
        templates (`Sequence[str]`): sentences with `{}` for the caption, such as a class name (CLIP, arXiv 2103.00020).
        sentences (`bool`): a long caption as a whole, or any one of its sentences.

    Returns:
        `str | list[str]`: as given, if nothing is to be done.

    Example:

    ```python
    >>> from modeling_coca.training import caption_variants

    >>> caption_variants("sneaker", ["a photo of a {}.", "a {} on white."])
    ['a photo of a sneaker.', 'a sneaker on white.']
    >>> caption_variants("A red boat. It is old.", sentences=True)
    ['A red boat. It is old.', 'A red boat.', 'It is old.']
    ```
    """
    if not templates and not sentences:
        return captions
    if bad := [template for template in templates if "{}" not in template]:
        raise ValueError(f"Each of `templates` needs a '{{}}' where the caption goes, got {bad[0]!r}.")
    variants = []
    for caption in [captions] if isinstance(captions, str) else captions:
        parts = [part for part in _SENTENCE_END.split(caption) if part] if sentences else []
        texts = [caption, *parts] if len(parts) > 1 else [caption]
        variants += [template.replace("{}", text) for text in texts for template in templates or ("{}",)]
    return list(dict.fromkeys(variants))


def augment(
    dataset: Any,
    image_augmentation: ImageAugmentation | None = None,
    *,
    templates: Sequence[str] = (),
    sentences: bool = False,
    image_column: str = "image",
    text_column: str = "text",
) -> Any:
    """
    The same rows for training: whenever one is read, with a new view of its image, and with the variants of its caption.

    Args:
        dataset (`datasets.Dataset` or `datasets.IterableDataset`): rows.
        image_augmentation ([`ImageAugmentation`], *optional*): of the images, if there are any.
        templates, sentences: see [`caption_variants`].
        image_column (`str`, defaults to `"image"`), text_column (`str`, defaults to `"text"`): columns.
    """
    if not templates and not sentences and not (image_augmentation and image_augmentation.is_active):
        return dataset
    change = functools.partial(
        _augment_batch,
        image_augmentation=image_augmentation,
        templates=tuple(templates),
        sentences=sentences,
        image_column=image_column,
        text_column=text_column,
    )
    if isinstance(dataset, datasets.IterableDataset):
        return dataset.map(change, batched=True, batch_size=16)
    return dataset.with_transform(change)


def _augment_batch(
    batch: Mapping[str, list[Any]],
    image_augmentation: ImageAugmentation | None,
    templates: Sequence[str],
    sentences: bool,
    image_column: str,
    text_column: str,
) -> dict[str, list[Any]]:
    batch = dict(batch)
    if image_augmentation is not None and image_column in batch:
        batch[image_column] = [image_augmentation(image) for image in batch[image_column]]
    if text_column in batch:
        batch[text_column] = [caption_variants(text, templates, sentences) for text in batch[text_column]]
    return batch


__all__ = [
    "ImageAugmentation",
    "SkippedImages",
    "augment",
    "caption_variants",
    "load_data",
]
