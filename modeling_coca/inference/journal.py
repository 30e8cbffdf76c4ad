"""Output that survives a `kill -9`: every image has one row, whoever was killed whenever, and however many processes run.

Beside the output lies a hidden folder until all is done. Each shard has a journal there, to which each batch appends its
rows as one line; a batch whose line was cut off is computed again, as a whole, so that its figures come out the same. A
shard that is complete becomes a part of the output: written under a temporary name, renamed, and noted as done. Whoever
completes the last shard joins the parts.
"""

import base64
import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from transformers.utils import logging

from ..saving import new_file, told_if_full, write_file

logger = logging.get_logger(__name__)

FORMATS = {".jsonl": "jsonl", ".parquet": "parquet"}
_PLACE, _EMBEDDING = "_position", "embedding"


class Journal:
    """
    Rows of a job, by shard and place within the shard.

    Args:
        output (`str` or `Path`): a `.jsonl` or `.parquet` file, or a folder, which gets a file for each shard.
        settings (`dict`): what the rows depend on. A job that is taken up again must have the same.
        num_shards (`int`): shards of the whole job.
        process, num_processes (`int`): this process' turn; it takes shards `process`, `process + num_processes`, ...
        output_format (`str`): `"jsonl"` or `"parquet"`, of the files in a folder.
        overwrite (`bool`): throw away what is there.
    """

    def __init__(
        self,
        output: str | os.PathLike,
        settings: dict[str, Any],
        num_shards: int,
        process: int = 0,
        num_processes: int = 1,
        output_format: str = "jsonl",
        overwrite: bool = False,
    ):
        self.output = Path(output)
        self.is_folder = self.output.suffix not in FORMATS
        self.format = output_format if self.is_folder else FORMATS[self.output.suffix]
        if self.format not in FORMATS.values():
            raise ValueError(f"`output_format` must be jsonl or parquet, not {self.format!r}.")
        self.work = _work_folder(self.output)
        self.parts = self.output if self.is_folder else self.work
        self.num_shards = num_shards
        self.mine = range(process, num_shards, num_processes)
        self._files: dict[int, Any] = {}
        self._missing: dict[int, int] = {}
        if overwrite and num_processes > 1:
            raise ValueError(f"Delete {self.output} first: several processes cannot `overwrite` it without each other.")
        if overwrite:
            self._clear()
        if not self.is_complete():
            self._set_up(json.loads(json.dumps({**settings, "shards": num_shards, "format": self.format})))
        if self.is_complete():
            if process == 0:
                self._tidy()
                raise FileExistsError(
                    f"{self.output} is there, and complete. Choose another output, or `overwrite` it."
                )
            self.mine = range(0)  # the others were faster, and nothing was left to do here

    def is_complete(self) -> bool:
        return (self.work / "complete").exists() if self.is_folder else self.output.exists()

    def _refuse_links(self) -> None:
        """An unfinished output that came from elsewhere must not have this process write into other files."""
        inside = self.work.iterdir() if self.parts == self.work else [*self.work.iterdir(), *self.parts.iterdir()]
        for path in (self.work, *inside):
            if path.is_symlink():
                raise ValueError(f"{path} is a link: delete it, or choose another output than {self.output}.")

    def _clear(self) -> None:
        """Each part after its note: where this is cut off, what is left is a job that is not complete."""
        if self.is_folder and self.work.is_dir():
            (self.work / "complete").unlink(missing_ok=True)
            for path in self.parts.glob("part-*"):
                self._note(int(path.stem.removeprefix("part-"))).unlink(missing_ok=True)
                path.unlink()
        if self.work.is_dir():
            _throw_away(self.work)
        if not self.is_folder:
            self.output.unlink(missing_ok=True)

    def _tidy(self) -> None:
        """Removes what a complete output does not need, at once or after a kill: what is half removed is nowhere read."""
        if not self.is_folder:
            _throw_away(self.work)
        elif not self.work.is_symlink():
            for path in self.work.iterdir():
                if path.name not in ("complete", "lock", "settings.json"):
                    path.unlink(missing_ok=True)

    def _lock(self) -> IO:
        """Lets one process on at a time, until the file is closed: the process ends, however it ends."""
        lock = open(self.work / "lock", "w")
        fcntl.flock(lock, fcntl.LOCK_EX)
        return lock

    def _set_up(self, settings: dict[str, Any]) -> None:
        path = self.work / "settings.json"
        self.work.mkdir(parents=True, exist_ok=True)
        try:
            self._refuse_links()
            with self._lock():
                if self.is_complete():  # by now
                    return
                if not path.exists():
                    write_file(path, json.dumps(settings, indent=2))
                begun = json.loads(path.read_text())
        except FileNotFoundError:  # thrown away by who has completed it
            if self.is_complete():
                return
            raise
        for name in settings:
            if begun.get(name) != settings[name]:
                raise ValueError(
                    f"{self.output} was begun with another `{name}` ({begun.get(name)!r}, now {settings[name]!r}). "
                    "Go on with the old one, or `overwrite` to begin anew."
                )

    # ------------------------------------------------------------------------------------------------------ shards

    def is_done(self, shard: int) -> bool:
        return self._note(shard).exists()

    def _note(self, shard: int) -> Path:
        return self.work / f"done-{shard:06d}.json"

    def _part(self, shard: int) -> Path:
        return self.parts / f"part-{shard:06d}.{self.format}"

    def begin(self, shard: int, size: int) -> set[int]:
        """Opens the journal of a shard; the places within it that have their row already."""
        path = self.work / f"shard-{shard:06d}.jsonl"
        file = open(path, "a+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OSError(f"Another process is writing to {self.output}.") from None
        file.seek(0)
        places, end = set(), 0
        for line in file:
            if not line.endswith(b"\n"):
                break
            if (found := _places(line)) is None or not places.isdisjoint(found) or not found <= set(range(size)):
                logger.warning(f"{path} is damaged: its images from byte {end:,} on are done again.")
                break
            places |= found
            end += len(line)
        file.truncate(end)
        self._files[shard], self._missing[shard] = file, size - len(places)
        if not self._missing[shard]:
            self._finish(shard)
        return places

    def write(self, shard: int, rows: Sequence[tuple[int, dict[str, Any]]]) -> None:
        """Appends rows, with their places; the embedding of a row is an array."""
        batch = []
        for place, row in rows:
            if row.get(_EMBEDDING) is not None:
                row = {**row, _EMBEDDING: base64.b64encode(row[_EMBEDDING].astype("<f4").tobytes()).decode()}
            batch.append({_PLACE: place, **row})
        file = self._files[shard]
        with told_if_full(file.name):
            try:
                file.write((json.dumps(batch, ensure_ascii=False) + "\n").encode())
                file.flush()
            except OSError:
                # Closing it would try again. The half line is cut off when the work is taken up
                self._files.pop(shard).raw.close()
                raise
        self._missing[shard] -= len(rows)
        if not self._missing[shard]:
            self._finish(shard)

    def _finish(self, shard: int) -> None:
        """Journal -> part of the output. Repeated where it was cut off."""
        file = self._files.pop(shard)
        file.seek(0)
        rows = sorted((row for line in file for row in json.loads(line)), key=lambda row: row[_PLACE])
        failed = [[row["id"], row["error"]] for row in rows if row.get("error")]
        for row in rows:
            del row[_PLACE]
            if row.get(_EMBEDDING):
                row[_EMBEDDING] = np.frombuffer(base64.b64decode(row[_EMBEDDING]), "<f4")
        with new_file(self._part(shard)) as temporary:
            if self.format == "parquet":
                _write_parquet(temporary, rows)
            else:
                with open(temporary, "w", encoding="utf-8") as part:
                    for row in rows:
                        part.write(to_json(row) + "\n")
        write_file(self._note(shard), json.dumps({"images": len(rows), "failed": failed}))
        os.unlink(file.name)
        file.close()

    # --------------------------------------------------------------------------------------------------------- end

    def release(self) -> None:
        """Lets go of the journals, also those that an error left incomplete: a traceback would hold on to their locks."""
        for file in self._files.values():
            file.close()
        self._files.clear()

    def close(self) -> dict[str, Any] | None:
        """Joins the parts if all are there. Returns the numbers of the whole job, or `None` while others still work."""
        self.release()
        if not all(map(self.is_done, range(self.num_shards))):
            return None
        try:
            lock = self._lock()
        except FileNotFoundError:  # another process has joined them, and removed the rest
            return None
        with lock:
            if self.is_complete():
                return None
            notes = [json.loads(self._note(shard).read_text()) for shard in range(self.num_shards)]
            failed = [failure for note in notes for failure in note["failed"]]
            if self.is_folder:
                write_file(self.work / "complete", "")
            else:
                with new_file(self.output) as temporary:
                    _join([self._part(shard) for shard in range(self.num_shards)], temporary, self.format)
            self._tidy()
        return {"output": str(self.output), "images": sum(note["images"] for note in notes), "failed": failed}


def _places(line: bytes) -> set[int] | None:
    """The places of the rows of a batch, or `None` if a damaged disk left none of them."""
    try:
        rows = json.loads(line)
        places = [row[_PLACE] for row in rows if isinstance(row["id"], str)]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    is_fine = len(places) == len(rows) == len(set(map(repr, places))) and all(type(place) is int for place in places)
    return set(places) if is_fine else None


def _work_folder(output: Path) -> Path:
    return output.with_name(f".{output.name}.coca") if output.suffix in FORMATS else output / ".coca"


def _throw_away(work: Path) -> None:
    """The hidden folder; renamed before, as nobody should take up a job of which a part is gone."""
    trash = work.with_name(f"{work.name}.trash")
    shutil.rmtree(trash, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):  # an earlier call came so far
        os.rename(work, trash)
    shutil.rmtree(trash, ignore_errors=True)


def discard(output: str | os.PathLike) -> None:
    """Removes a file that is complete and of no use any more, and before it what a kill has left of its making."""
    output = Path(output)
    if output.is_file():
        _throw_away(_work_folder(output))
        output.unlink()


def begun_settings(output: str | os.PathLike) -> dict[str, Any]:
    """The settings of a job that is not complete yet; empty if there is none."""
    path = _work_folder(Path(output)) / "settings.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def to_json(row: dict[str, Any]) -> str:
    """A row as a line of JSON. Embeddings are rounded to six decimals there."""
    if row.get(_EMBEDDING) is not None:
        row = {**row, _EMBEDDING: np.round(row[_EMBEDDING].astype(np.float64), 6).tolist()}
    return json.dumps(row, ensure_ascii=False)


def _write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    # Given, as a part may have no value in a column
    caption = {"caption": pa.string(), "log_prob": pa.float32(), "num_tokens": pa.int32(), "score": pa.float32()}
    label = {"label": pa.string(), "score": pa.float32()}
    types = {"id": pa.string(), "answer": pa.string(), **caption, **label, "error": pa.string()}
    types |= {
        "labels": pa.list_(pa.struct(label)),
        "captions": pa.list_(pa.struct(caption)),
        _EMBEDDING: pa.list_(pa.float32()),
    }
    names = list(dict.fromkeys([*(name for row in rows for name in row), "error"]))
    columns = {name: pa.array([row.get(name) for row in rows], type=types.get(name)) for name in names}
    pq.write_table(pa.table(columns), path)


def _join(parts: Sequence[Path], target: Path, output_format: str) -> None:
    if output_format == "jsonl":
        with open(target, "wb") as joined:
            for part in parts:
                with open(part, "rb") as file:
                    shutil.copyfileobj(file, joined)
        return
    import pyarrow as pa
    import pyarrow.parquet as pq

    # Columns without a value in a part have no type there
    schema = pa.unify_schemas([pq.read_schema(part) for part in parts], promote_options="permissive")
    with pq.ParquetWriter(target, schema) as writer:
        for part in parts:
            writer.write_table(_conform(pq.read_table(part), schema))


def _conform(table, schema):
    import pyarrow as pa

    columns = [
        table[field.name].cast(field.type) if field.name in table.column_names else pa.nulls(len(table), field.type)
        for field in schema
    ]
    return pa.table(columns, schema=schema)


def read_rows(path: str | os.PathLike) -> Iterator[dict[str, Any]]:
    """The rows of a finished output, in the order of the images."""
    path = Path(path)
    for part in sorted(path.glob("part-*")) if path.is_dir() else [path]:
        if part.suffix == ".parquet":
            import pyarrow.parquet as pq

            for batch in pq.ParquetFile(part).iter_batches(1024):
                yield from batch.to_pylist()
        else:
            with open(part, encoding="utf-8") as file:
                yield from map(json.loads, file)
