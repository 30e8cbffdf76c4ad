"""Where images come from: folders, globs, lists, CSV, Parquet, WebDataset tar shards, `datasets` sets, images in memory.

Each source is cut into `ImageShard`s. A shard lists its images cheaply, in the main process, and reads them in the
loader's workers. Shards depend on the source alone, not on the number of processes, so work can be shared and resumed.
"""

import csv
import glob
import json
import os
import re
import tarfile
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from transformers.utils import logging

from . import limits

logger = logging.get_logger(__name__)

IMAGE_SUFFIXES = {".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
TABLE_SUFFIXES = {".csv", ".tsv", ".jsonl"}
_IMAGE_COLUMNS = ("image", "img", "jpg", "png", "image_path", "path", "file_name", "filename", "filepath", "file")


class ImageShard:
    """
    Images that are listed, captioned and written together.

    `list` gives the id of each image and the key by which `read` finds it; `read` gives the image, encoded (bytes or a
    path) or as it came, and the values of the columns that are kept. `size` is `None` where it takes a look inside to
    know.
    """

    size: int | None

    def list(self) -> Sequence[tuple[str, Any]]:
        raise NotImplementedError

    def read(self, key: Any) -> tuple[Any, dict[str, Any]]:
        raise NotImplementedError


class RowShard(ImageShard):
    """Rows in memory, `(id, image or path, kept columns)`: files, tables, images at hand. Paths lead into `roots` only."""

    def __init__(self, rows: Sequence[tuple[str, Any, dict[str, Any]]], roots: Sequence[str] = ("/",)):
        self.rows, self.roots = rows, roots
        self.size = len(rows)

    def list(self) -> Sequence[tuple[str, Any]]:
        return [(row[0], i) for i, row in enumerate(self.rows)]

    def read(self, key: int) -> tuple[Any, dict[str, Any]]:
        _, image, kept = self.rows[key]
        return _allowed(image, self.roots), kept


class DatasetShard(ImageShard):
    """Rows `start` to `stop` of a `datasets.Dataset`. Paths lead into `roots` only."""

    def __init__(
        self,
        dataset,
        name: str,
        start: int,
        stop: int,
        image: str,
        id_column: str | None,
        keep: list[str],
        roots: Sequence[str],
    ):
        self.dataset, self.name, self.start, self.size = dataset, name, start, stop - start
        self.image, self.id_column, self.keep, self.roots = image, id_column, keep, roots

    def list(self) -> Sequence[tuple[str, Any]]:
        rows = range(self.start, self.start + self.size)
        if self.id_column is None:
            return [(f"{self.name}/{row}", row) for row in rows]
        ids = self.dataset.select_columns([self.id_column])[self.start : self.start + self.size][self.id_column]
        return [(str(name), row) for name, row in zip(ids, rows, strict=True)]

    def read(self, key: int) -> tuple[Any, dict[str, Any]]:
        row = self.dataset[key]
        return _allowed(_encoded(row[self.image]), self.roots), {name: row[name] for name in self.keep}


class ParquetShard(ImageShard):
    """Rows `start` to `stop` of a Parquet file. Paths in it are relative to its folder, and lead into `roots` only."""

    def __init__(
        self,
        path: str,
        start: int,
        stop: int,
        image: str,
        id_column: str | None,
        keep: list[str],
        roots: Sequence[str],
    ):
        self.path, self.start, self.size = path, start, stop - start
        self.image, self.id_column, self.keep, self.roots = image, id_column, keep, roots

    def list(self) -> Sequence[tuple[str, Any]]:
        rows = range(self.start, self.start + self.size)
        if self.id_column is None:
            return [(f"{self.path}/{row}", row) for row in rows]
        return [(str(_parquet_row(self.path, row, (self.id_column,))[self.id_column]), row) for row in rows]

    def read(self, key: int) -> tuple[Any, dict[str, Any]]:
        row = _parquet_row(self.path, key, (self.image, *self.keep))
        image = _encoded(row[self.image])
        if isinstance(image, str) and "://" not in image:
            image = os.path.join(os.path.dirname(self.path), image)
        return _allowed(image, self.roots), {name: row[name] for name in self.keep}


class TarShard(ImageShard):
    """A WebDataset shard: files of a sample stand together and share their name up to the first dot."""

    def __init__(self, path: str, keep: list[str]):
        self.path, self.keep, self.size = path, keep, None

    def list(self) -> Sequence[tuple[str, Any]]:
        samples: dict[str, tuple] = {}
        sidecars: dict[str, dict[str, tuple[int, int]]] = {}
        end = 0
        try:
            with tarfile.open(self.path, "r:") as archive:
                for member in archive:
                    end = member.offset_data + member.size
                    folder, name = os.path.split(member.name)
                    stem, dot, extension = name.partition(".")
                    if not member.isfile() or member.issparse() or not stem or not dot:
                        continue
                    key, place = os.path.join(folder, stem), (member.offset_data, member.size)
                    if "." + extension.lower() in IMAGE_SUFFIXES:
                        samples.setdefault(key, place)
                    elif extension in self.keep:
                        sidecars.setdefault(key, {})[extension] = place
        except tarfile.TarError as error:  # one bad shard of many: its images count as one that cannot be read
            samples = {"": f"no uncompressed tar file ({error})"}
        if end > os.path.getsize(self.path):
            logger.warning(f"{self.path} was cut off: what came after its {len(samples)} images is missing.")
        self.size = len(samples)
        return [(f"{self.path}/{key}".rstrip("/"), (place, sidecars.get(key, {}))) for key, place in samples.items()]

    def read(self, key: tuple) -> tuple[Any, dict[str, Any]]:
        place, sidecars = key
        if isinstance(place, str):
            raise ValueError(place)
        kept = dict.fromkeys(self.keep)
        kept |= {name: _read_part(self.path, *where).decode(errors="replace") for name, where in sidecars.items()}
        return _read_part(self.path, *place), kept


@lru_cache(maxsize=8)
def _open_file(path: str):
    return open(path, "rb", buffering=0)


def _read_part(path: str, offset: int, size: int) -> bytes:
    if size > limits.MAX_VALUE_BYTES:
        raise ValueError(f"{size:,} bytes are more than the {limits.MAX_VALUE_BYTES:,} that are read")
    return os.pread(_open_file(path).fileno(), size, offset)


@lru_cache(maxsize=2)
def _row_group(path: str, index: int, columns: tuple[str, ...]):
    file = _parquet_file(path)
    group = file.metadata.row_group(index)
    parts = map(group.column, range(group.num_columns))
    size = sum(part.total_uncompressed_size for part in parts if part.path_in_schema.split(".")[0] in columns)
    if size > limits.MAX_ROW_GROUP_BYTES:
        raise ValueError(
            f"row group {index} has {size:,} bytes, more than the {limits.MAX_ROW_GROUP_BYTES:,} that are read: write the file "
            "anew with smaller row groups"
        )
    return file.read_row_group(index, columns=list(columns))


def _parquet_file(path: str):
    return _open_parquet(path, os.getpid())  # a worker must not share its parent's


@lru_cache(maxsize=8)
def _open_parquet(path: str, process: int):
    import pyarrow.parquet as pq

    schema = pq.ParquetFile(path).schema
    leaves = map(schema.column, range(len(schema)))
    # A value that rows share is kept once: of its own for each row, it would make gigabytes of a file of some hundred bytes
    shared = [leaf.path for leaf in leaves if leaf.physical_type == "BYTE_ARRAY" and not leaf.max_repetition_level]
    return pq.ParquetFile(path, read_dictionary=shared)


@lru_cache(maxsize=8)
def _row_group_starts(path: str) -> list[int]:
    metadata, starts = _parquet_file(path).metadata, [0]
    for i in range(metadata.num_row_groups):
        starts.append(starts[-1] + metadata.row_group(i).num_rows)
    return starts


def _parquet_row(path: str, row: int, columns: tuple[str, ...]) -> dict[str, Any]:
    starts = _row_group_starts(path)
    group = bisect_right(starts, row) - 1
    return _row_group(path, group, columns).slice(row - starts[group], 1).to_pylist()[0]


def _encoded(value: Any) -> Any:
    """The bytes or the path of an image as `datasets` stores it; anything else as it is."""
    if isinstance(value, dict) and {"bytes", "path"} >= set(value):
        return value.get("bytes") if value.get("bytes") is not None else value.get("path")
    return value


def _allowed(image: Any, roots: Sequence[str]) -> Any:
    if isinstance(image, str) and "://" not in image:
        limits.check_inside(image, roots)
    return image


def open_images(
    images: Any,
    *,
    shard_size: int = 1024,
    image_column: str | None = None,
    id_column: str | None = None,
    image_root: str | os.PathLike | None = None,
    split: str | None = None,
    keep: Sequence[str] = (),
) -> list[ImageShard]:
    """
    Finds images and cuts them into shards.

    Args:
        images:
            What to look at, or a list of such: an image file, a folder (searched through), a glob, a CSV, TSV or JSONL
            table with a column of paths, a Parquet file with images or paths, a WebDataset tar (also
            `shard-{000..099}.tar`), the id of a data set on the Hub or a folder written by `save_to_disk`, a
            `datasets.Dataset`, or images themselves (PIL, arrays).
        shard_size (`int`): images a shard, except that a tar file is one.
        image_column, id_column (`str`, *optional*): of tables and data sets. By default the image column is found by
            its type or name, and the id is the path, or `<table>/<row>`.
        image_root (`str`, *optional*): folder that the paths in tables and data sets, and the links in folders, may lead
            into. By default the table's own folder, or the folder itself: what others have written opens no other file.
        split (`str`, *optional*): of a data set on the Hub.
        keep (`Sequence[str]`): columns, or file extensions within a tar, whose values go along with the image.

    Returns:
        `list[ImageShard]`: in a fixed order.

    Example:

    ```python
    >>> from PIL import Image
    >>> from modeling_coca.inference import open_images

    >>> shards = open_images([Image.new("RGB", (8, 8))] * 5, shard_size=2)
    >>> [shard.size for shard in shards]
    [2, 2, 1]
    ```
    """
    options = {"image_column": image_column, "id_column": id_column, "split": split, "keep": list(keep)}
    options["image_root"] = None if image_root is None else os.fspath(image_root)
    items = [images] if isinstance(images, (str, os.PathLike)) or _is_dataset(images) else images
    if not isinstance(items, Sequence):
        items = [items]
    shards: list[ImageShard] = []
    rows: list[tuple[str, Any, dict[str, Any]]] = []
    for number, item in enumerate(items):
        if _is_dataset(item):
            shards += _dataset_shards(item, "row", shard_size, options, ["/"])
        elif not isinstance(item, (str, os.PathLike)):
            rows.append((str(number), item, {}))
        else:
            for found in _expand(os.fspath(item), options["image_root"]):
                suffix = Path(found).suffix.lower()
                if os.path.isfile(found) and suffix not in {*TABLE_SUFFIXES, ".parquet", ".tar"}:
                    rows.append((found, found, {}))  # whatever its suffix: it was asked for by name
                else:
                    shards += _open_table(found, suffix, shard_size, options)
    if rows and keep:
        raise ValueError(f"`keep` {keep[0]!r}: image files have no columns; tables, data sets and tar shards have.")
    shards += [RowShard(rows[i : i + shard_size]) for i in range(0, len(rows), shard_size)]
    if not shards:
        raise ValueError(f"There are no images in {images!r}.")
    return shards


def _is_dataset(value: Any) -> bool:
    return hasattr(value, "select_columns") and hasattr(value, "features")


def _expand(item: str, image_root: str | None) -> Iterator[str]:
    """A glob, a folder or `{000..099}` to the files it stands for; anything else as it is."""
    if match := re.search(r"\{(\d+)\.\.(\d+)\}", item):
        first, last = match.groups()
        for number in range(int(first), int(last) + 1):
            yield from _expand(item.replace(match.group(), str(number).zfill(len(first))), image_root)
    elif not os.path.exists(item) and glob.has_magic(item):
        found = sorted(glob.glob(item, recursive=True))
        if not found:
            raise FileNotFoundError(f"No file matches {item}.")
        for path in found:
            yield from _expand(path, image_root)
    elif os.path.isdir(item) and not _is_saved_dataset(item):
        yield from _walk(item, image_root)
    else:
        yield item


def _is_saved_dataset(folder: str) -> bool:
    """Whether `datasets` has written it, by `save_to_disk`."""
    return any(os.path.isfile(os.path.join(folder, name)) for name in ("dataset_dict.json", "state.json"))


def _walk(folder: str, image_root: str | None) -> list[str]:
    """The images below a folder; if there are none, its tar shards or Parquet files."""
    found: dict[str, list[str]] = {"image": [], ".tar": [], ".parquet": []}
    roots, entered, left_out = [image_root or root_of(folder)], set(), []

    def is_allowed(path: str) -> bool:
        if not os.path.islink(path):
            return True
        target = os.path.realpath(path)
        if not limits.is_inside(target, roots):
            left_out.append(path)
        elif os.path.isdir(target) and target not in entered:  # once, as links can go round in circles
            entered.add(target)
            return True
        return os.path.isfile(target) and limits.is_inside(target, roots)

    for path, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(n for n in folders if not n.startswith(".") and is_allowed(os.path.join(path, n)))
        for name in sorted(names):
            suffix = os.path.splitext(name)[1].lower()
            kind = "image" if suffix in IMAGE_SUFFIXES else suffix
            if kind in found and not name.startswith(".") and is_allowed(os.path.join(path, name)):
                found[kind].append(os.path.join(path, name))
    hint = ""
    if left_out:
        hint = f"{len(left_out)} links lead out of {roots[0]} and are left out, such as {left_out[0]}: name the folder that "
        hint += "they may lead into by `image_root`."
    files = next((files for files in found.values() if files), None)
    if files is None:
        raise ValueError(f"There are no images, tar shards or Parquet files in {folder}. {hint}".strip())
    if hint:
        logger.warning(hint)
    return files


def root_of(folder: str) -> str:
    """What the links in a folder may lead into: the folder itself; of a repository in the Hub's cache all of it, as its files are links into a folder beside it."""
    for parent in Path(os.path.realpath(folder)).parents:
        if parent.name == "snapshots" and (parent.parent / "blobs").is_dir():
            return str(parent.parent)
    return folder


def _open_table(source: str, suffix: str, shard_size: int, options: dict[str, Any]) -> list[ImageShard]:
    if suffix == ".tar":
        _require_file(source)
        return [TarShard(source, options["keep"])]
    if suffix == ".parquet":
        _require_file(source)
        return _parquet_shards(source, shard_size, options)
    if suffix in TABLE_SUFFIXES:
        _require_file(source)
        rows = _table_rows(source, suffix, options)
        roots = [options["image_root"] or os.path.dirname(source) or "."]
        _allowed(rows[0][1], roots)  # where even the first leads elsewhere, it is said before work begins
        return [RowShard(rows[i : i + shard_size], roots) for i in range(0, len(rows), shard_size)]
    saved = os.path.isdir(source)
    if not saved and (suffix in IMAGE_SUFFIXES or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source)):
        _require_file(source)
    from datasets import DatasetDict, config, load_dataset, load_from_disk
    from huggingface_hub.constants import HF_HUB_CACHE

    if saved:
        dataset, roots = load_from_disk(source), [source]
    else:
        roots = [str(config.HF_DATASETS_CACHE), HF_HUB_CACHE]
        try:
            dataset = load_dataset(source)
        except Exception as error:  # the Hub's, the network's, the loader's: many kinds
            raise ValueError(
                f"{source} is neither a file or folder here nor a data set that loads from the Hub ({error})."
            ) from error
    roots = [*filter(None, [options["image_root"]]), *roots]
    if isinstance(dataset, DatasetDict):
        split = options["split"] or (next(iter(dataset)) if len(dataset) == 1 else None)
        if split not in dataset:
            given = "has several splits" if split is None else f"has no split {split!r}"
            raise ValueError(f"{source} {given}: choose one by `split`, of {', '.join(dataset)}.")
        return _dataset_shards(dataset[split], split, shard_size, options, roots)
    return _dataset_shards(dataset, "row", shard_size, options, roots)


def _require_file(path: str) -> None:
    if not os.path.isfile(path):
        raise FileNotFoundError(f"There is no file or folder {path}.")


def _dataset_shards(
    dataset, name: str, shard_size: int, options: dict[str, Any], roots: Sequence[str]
) -> list[ImageShard]:
    import datasets

    images = [column for column, feature in dataset.features.items() if isinstance(feature, datasets.Image)]
    column = _choose_column(images, dataset.column_names, options["image_column"], name)
    keep, id_column = options["keep"], options["id_column"]
    _check_columns([*keep, *filter(None, [id_column])], dataset.column_names, name)
    dataset = dataset.with_format(None).select_columns(list(dict.fromkeys([column, *keep, *filter(None, [id_column])])))
    if isinstance(dataset.features[column], datasets.Image):
        dataset = dataset.cast_column(column, datasets.Image(decode=False))
    return [
        DatasetShard(dataset, name, start, min(start + shard_size, len(dataset)), column, id_column, keep, roots)
        for start in range(0, len(dataset), shard_size)
    ]


def _parquet_shards(path: str, shard_size: int, options: dict[str, Any]) -> list[ImageShard]:
    import pyarrow as pa

    try:
        schema, num_rows = _parquet_file(path).schema_arrow, _row_group_starts(path)[-1]
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path} is no Parquet file ({error}).") from error
    types = {
        field.name: field.type.value_type if pa.types.is_dictionary(field.type) else field.type for field in schema
    }
    of_images = [
        name
        for name, kind in types.items()
        if pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or (pa.types.is_struct(kind) and {"bytes", "path"} & {child.name for child in kind})
    ]
    column = _choose_column(of_images, schema.names, options["image_column"], path)
    keep, id_column = options["keep"], options["id_column"]
    _check_columns([*keep, *filter(None, [id_column])], schema.names, path)
    roots = [options["image_root"] or os.path.dirname(path) or "."]
    return [
        ParquetShard(path, start, min(start + shard_size, num_rows), column, id_column, keep, roots)
        for start in range(0, num_rows, shard_size)
    ]


def _table_rows(path: str, suffix: str, options: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            if suffix == ".jsonl":
                rows = [json.loads(line) for line in file if line.strip()]
            else:
                rows = list(csv.DictReader(file, delimiter="\t" if suffix == ".tsv" else ","))
    except (ValueError, RecursionError, csv.Error) as error:  # no JSON, no UTF-8, no CSV
        raise ValueError(f"{path} cannot be read as a table: {error}.") from error
    for row in rows if suffix != ".jsonl" else []:
        row.pop(None, None)  # cells beyond the header's
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} must hold one JSON object a line.")
    if not rows:
        raise ValueError(f"{path} has no rows below its header.")
    column = _choose_column([], list(rows[0]), options["image_column"], path)
    keep, id_column = options["keep"], options["id_column"]
    _check_columns([*keep, *filter(None, [id_column])], list(rows[0]), path)
    folder = os.path.dirname(path)
    found = []
    for number, row in enumerate(rows, 1):
        if not row.get(column):
            raise ValueError(f"{path}: row {number} has no image in column {column!r}.")
        if not isinstance(row[column], str):
            raise ValueError(f"{path}: row {number} has no path in column {column!r}, but {row[column]!r}.")
        image = os.path.join(folder, row[column])
        found.append((str(row[id_column]) if id_column else image, image, {name: row.get(name) for name in keep}))
    return found


def _choose_column(of_images: list[str], names: list[str], chosen: str | None, where: str) -> str:
    """The column that was asked for, else the only one of images, else the first that has one of the usual names."""
    if chosen is not None:
        _check_columns([chosen], names, where)
        return chosen
    if len(of_images) == 1:
        return of_images[0]
    usual = [name for name in _IMAGE_COLUMNS if name in (of_images or names)]
    if not usual:
        raise ValueError(f"{where}: name the column of the images by `image_column`, of {', '.join(names)}.")
    return usual[0]


def _check_columns(columns: list[str], names: list[str], where: str) -> None:
    for column in columns:
        if column not in names:
            raise ValueError(f"{where} has no column {column!r}, only {', '.join(names)}.")


__all__ = [
    "IMAGE_SUFFIXES",
    "DatasetShard",
    "ImageShard",
    "ParquetShard",
    "RowShard",
    "TarShard",
    "open_images",
    "root_of",
]
