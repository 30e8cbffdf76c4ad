"""An index of image embeddings: rows and embeddings in a `datasets.Dataset`, neighbours by FAISS."""

import json
import math
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, ProcessorMixin
from transformers.utils import logging

from modeling_coca.inference import CocaEmbedder, ImageLoader, RowShard, embed_images, load_for_inference
from modeling_coca.inference.limits import is_inside
from modeling_coca.saving import told_if_full, write_file

logger = logging.get_logger(__name__)

EXACT_UP_TO, HNSW_UP_TO = 100_000, 2_000_000  # rows; see benchmarks/index.py
KINDS = ("exact", "hnsw", "ivfpq")
_HNSW_LINKS, _HNSW_EF_BUILD, _HNSW_EF_SEARCH = 32, 80, 128
_PROBES, _CANDIDATES = 32, 10  # of IVF-PQ: lists to look at, and candidates for each hit asked for
_RESERVED = ("id", "embedding")
_ROWS_AT_A_TIME = 10_000


@dataclass(frozen=True)
class SearchHit:
    """
    Args:
        id (`str`): of the image.
        score (`float`): cosine of query and image.
        metadata (`dict`): the image's other columns.
        log_prob (`float`, *optional*): of the query as a caption of the image, after re-ranking.
    """

    id: str
    score: float
    metadata: dict[str, Any] = field(default_factory=dict)
    log_prob: float | None = None


def choose_kind(num_rows: int) -> tuple[str, str]:
    """
    The kind of index for a number of images, and why.

    Example:

    ```python
    >>> from modeling_coca.retrieval import choose_kind

    >>> choose_kind(500)
    ('exact', 'compares the query with each of 500 images: nothing is missed, and up to 100,000 it takes tens of milliseconds at most')
    ```
    """
    if num_rows <= EXACT_UP_TO:
        return "exact", (
            f"compares the query with each of {num_rows:,} images: nothing is missed, and up to {EXACT_UP_TO:,} it takes "
            "tens of milliseconds at most"
        )
    if num_rows <= HNSW_UP_TO:
        return "hnsw", (
            f"a graph of neighbours, as comparing with each of {num_rows:,} images takes long: it looks at a few thousand, "
            "and finds nearly all; it needs the embeddings in memory"
        )
    return "ivfpq", (
        f"{num_rows:,} embeddings are too many to keep in memory: each is squeezed to a byte for every four numbers, in "
        f"lists of which {_PROBES} are looked at; the best candidates are compared exactly, from disk"
    )


class CocaIndex:
    """
    Images that can be searched by text, by image, or by both.

    Rows (`id`, `embedding` and any other columns) are a `datasets.Dataset`, memory-mapped from disk; the neighbours of a
    query are found by FAISS, exactly where there are few images and by HNSW or IVF-PQ where there are many
    ([`choose_kind`]). Rows are added to the structure that is there, and removed ones are passed over, so neither
    builds it anew; [`~CocaIndex.rebuild`] does.

    Args:
        model (`str`, folder, or model): see [`load_for_inference`]; loaded with the first query that needs it.
        processor ([`CocaProcessor`], *optional*): needed beside a model that is loaded already.
        kind (`str`, *optional*): `"exact"`, `"hnsw"` or `"ivfpq"`, by default chosen by size.
        device, dtype (`str`, *optional*): see [`load_for_inference`].
        image_root (`str`, *optional*): folder that ids lead into when images are read again, to re-rank them. By default
            anywhere, and with an index from the Hub into the working folder.

    Example:

    ```python
    >>> from modeling_coca.retrieval import CocaIndex

    >>> index = CocaIndex.from_images("photos", model="outputs/quickstart")  # doctest: +SKIP
    >>> [hit.id for hit in index.search("two dogs running", k=5)]  # doctest: +SKIP
    ['photos/17.jpg', 'photos/4.jpg', 'photos/81.jpg', 'photos/80.jpg', 'photos/3.jpg']
    >>> index.save("photos.index")  # doctest: +SKIP
    >>> CocaIndex.load("photos.index").search(image="dog.jpg")  # doctest: +SKIP
    ```
    """

    def __init__(
        self,
        model: str | os.PathLike | PreTrainedModel | None = None,
        processor: ProcessorMixin | None = None,
        *,
        kind: str | None = None,
        device: str | None = None,
        dtype: str | None = None,
        image_root: str | os.PathLike | None = None,
    ):
        if kind is not None and kind not in KINDS:
            raise ValueError(f"`kind` must be one of {', '.join(KINDS)}, not {kind!r}.")
        _import_faiss()
        self.model, self.processor, self.device, self.dtype = model, processor, device, dtype
        self.chosen_kind = kind
        self.image_root = os.fspath(image_root or "/")
        self.kind: str | None = None
        self.dataset: Any = None
        self._faiss: Any = None  # a datasets.search.FaissIndex
        self._rows: dict[str, int] = {}  # of the ids that are not removed
        self._removed: set[int] = set()
        self._embedder: CocaEmbedder | None = None

    @classmethod
    def from_images(
        cls,
        images: Any,
        model: str | os.PathLike | PreTrainedModel,
        processor: ProcessorMixin | None = None,
        *,
        kind: str | None = None,
        device: str | None = None,
        dtype: str | None = None,
        **kwargs: Any,
    ) -> "CocaIndex":
        """
        Embeds images and indexes them. Unreadable ones are left out, with a warning.

        Args:
            images: see [`~modeling_coca.inference.open_images`].
            model, processor, kind, device, dtype: see [`CocaIndex`].
            **kwargs: see [`~modeling_coca.inference.map_images`], e.g. `batch_size`, and `source_kwargs={"keep": [...]}`
                for columns to keep as metadata.
        """
        index = cls(model, processor, kind=kind, device=device, dtype=dtype)
        index.add_images(images, **kwargs)
        return index

    # -------------------------------------------------------------------------------------------------------- rows

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, name: str) -> bool:
        return name in self._rows

    def __repr__(self) -> str:
        return f"CocaIndex({len(self):,} images, {self.kind or 'empty'})"

    @property
    def ids(self) -> list[str]:
        return list(self._rows)

    def explain(self) -> str:
        """Which kind of index this is, and why."""
        suited, why = choose_kind(len(self))
        if self.kind is None:
            return "empty"
        if self.kind == suited:
            return f"{self.kind}: {why}"
        reason = "as asked for" if self.chosen_kind == self.kind else "as it was built; `rebuild()` changes that"
        return f"{self.kind}, {reason}. {suited} would suit {len(self):,} images: {why}"

    def add_images(self, images: Any, **kwargs: Any) -> list[tuple[str, str]]:
        """
        Embeds images and adds those that are not in the index yet.

        Args:
            images, **kwargs: see [`~CocaIndex.from_images`].

        Returns:
            `list[tuple[str, str]]`: ids of images that could not be read, and the reasons.
        """
        embedder = self.embedder
        rows = embed_images(
            images, model=embedder.model, processor=embedder.processor, skip=self._rows.keys(), **kwargs
        )
        self.add_rows(rows)
        failed = [(row["id"], row["error"]) for row in rows if "error" in row]
        if failed:
            logger.warning(f"{len(failed)} images could not be read, such as {failed[0][0]}: {failed[0][1]}.")
        return failed

    def add_rows(self, rows: Iterable[Mapping[str, Any]]) -> int:
        """
        Adds rows with `id`, `embedding` and metadata, such as those of `coca caption --embeddings`. Rows with an `error`
        are passed over. Returns the number of rows added.
        """
        some: list[Mapping[str, Any]] = []
        before = len(self)

        def flush() -> None:
            if some:
                names = [name for name in some[0] if name not in (*_RESERVED, "error", "captions")]
                metadata = {name: [row.get(name) for row in some] for name in names}
                self.add(
                    np.stack([np.asarray(row["embedding"]) for row in some]), [row["id"] for row in some], metadata
                )
                some.clear()

        for row in rows:
            if row.get("error"):
                continue
            if row.get("embedding") is None:
                raise ValueError(f"Row {row.get('id')!r} has no `embedding`: `coca caption --embeddings` writes them.")
            some.append(row)
            if len(some) == _ROWS_AT_A_TIME:
                flush()
        flush()
        return len(self) - before

    def add(
        self, embeddings: np.ndarray, ids: Sequence[str], metadata: Mapping[str, Sequence[Any]] | None = None
    ) -> None:
        """
        Adds embeddings.

        Args:
            embeddings (`np.ndarray` of shape `(N, D)`): they are normalised here.
            ids (`Sequence[str]`): their names, none of which is in the index.
            metadata (`Mapping[str, Sequence]`, *optional*): columns of N values.
        """
        from datasets import Dataset, Features, List, Value, concatenate_datasets

        embeddings = np.array(embeddings, dtype=np.float32)
        ids, metadata = [str(name) for name in ids], dict(metadata or {})
        if embeddings.ndim != 2 or len(embeddings) != len(ids):
            raise ValueError(f"`embeddings` of shape {embeddings.shape} need {len(ids)} rows, one for each of `ids`.")
        if self.dataset is not None and embeddings.shape[1] != self.embedding_size:
            raise ValueError(
                f"`embeddings` have {embeddings.shape[1]} numbers, those in the index {self.embedding_size}: they are "
                "another model's."
            )
        for name, values in metadata.items():
            if name in _RESERVED or len(values) != len(ids):
                raise ValueError(
                    f"`metadata` {name!r} must have {len(ids)} values, and not be called `id` or `embedding`."
                )
        if twice := sorted({name for name in ids if name in self._rows} | _repeated(ids)):
            raise ValueError(f"There are images of the same name already, such as {twice[0]!r}: `remove` them first.")
        norms = np.linalg.norm(embeddings, axis=1, keepdims=True)
        if not np.isfinite(norms).all() or (norms == 0).any():
            raise ValueError("`embeddings` have rows of zeros, or values that are not finite.")
        if not ids:
            return
        embeddings /= norms
        size = embeddings.shape[1]
        features = Dataset.from_dict(metadata).features if metadata else {}  # found by their values
        features = {"id": Value("string"), "embedding": List(Value("float32"), length=size), **features}
        new = Dataset.from_dict({"id": ids, "embedding": embeddings, **metadata}, features=Features(features))
        start = 0 if self.dataset is None else len(self.dataset)
        self.dataset = new if self.dataset is None else concatenate_datasets([self.dataset, new])
        self._rows.update(zip(ids, range(start, start + len(ids)), strict=True))
        if self._faiss is not None:
            self._faiss.faiss_index.add(embeddings)
            suited = choose_kind(len(self))[0]
            if self.chosen_kind is None and suited != self.kind:
                logger.warning(f"The index has grown to {len(self):,} images: `rebuild()` would make it {suited}.")

    def remove(self, ids: str | Iterable[str]) -> None:
        """Takes images out: searches pass over them, and [`~CocaIndex.rebuild`] frees their place."""
        ids = [ids] if isinstance(ids, str) else list(ids)
        if missing := [name for name in ids if name not in self._rows]:
            raise ValueError(f"There is no image {missing[0]!r} in the index.")
        self._removed.update(self._rows.pop(name) for name in dict.fromkeys(ids))

    @property
    def embedding_size(self) -> int:
        return self.dataset.features["embedding"].length

    # --------------------------------------------------------------------------------------------------- structure

    def rebuild(self, kind: str | None = None) -> None:
        """
        Builds the structure anew, of the kind that suits the number of images now, without the removed ones.

        Args:
            kind (`str`, *optional*): another kind than the index was made with.
        """
        if kind is not None and kind not in KINDS:
            raise ValueError(f"`kind` must be one of {', '.join(KINDS)}, not {kind!r}.")
        self.chosen_kind = kind or self.chosen_kind
        if self._removed:
            self.dataset = self.dataset.select(sorted(self._rows.values()))
            self._rows = {name: row for row, name in enumerate(self.dataset["id"])}
            self._removed = set()
        self._faiss = None
        if len(self):
            self._build()

    def _build(self) -> None:
        from datasets.search import FaissIndex

        faiss = _import_faiss()
        size, num_rows = self.embedding_size, len(self.dataset)
        self.kind = self.chosen_kind or choose_kind(len(self))[0]
        if self.kind == "exact":
            index = faiss.IndexFlatIP(size)
        elif self.kind == "hnsw":
            index = faiss.IndexHNSWFlat(size, _HNSW_LINKS, faiss.METRIC_INNER_PRODUCT)
            index.hnsw.efConstruction = _HNSW_EF_BUILD
        else:
            lists = max(1, min(round(2 * math.sqrt(num_rows)), num_rows // 39))
            pieces = next(n for n in range(max(1, size // 4), 0, -1) if size % n == 0)
            if num_rows < 9984:
                raise ValueError(f"`kind` 'ivfpq' learns from at least 9984 images, and there are {num_rows}.")
            index = faiss.index_factory(size, f"IVF{lists},PQ{pieces}", faiss.METRIC_INNER_PRODUCT)
            sample = np.random.default_rng(0).choice(num_rows, min(num_rows, max(64 * lists, 2**16)), replace=False)
            index.do_polysemous_training = False  # orders codes for a search that is not used here, and takes long
            index.train(self._embeddings(np.sort(sample)))
        self._faiss = FaissIndex(custom_index=index)
        starts = range(0, num_rows, _ROWS_AT_A_TIME)  # from the mapped file, a part at a time
        for start in logging.tqdm(starts, desc="Index", leave=False, disable=num_rows <= EXACT_UP_TO):
            index.add(self._embeddings(np.arange(start, min(start + _ROWS_AT_A_TIME, num_rows))))

    def _embeddings(self, rows: np.ndarray) -> np.ndarray:
        if not len(rows):
            return np.zeros((0, self.embedding_size), np.float32)
        columns = self.dataset.with_format("numpy", columns=["embedding"])
        contiguous = int(rows[-1]) - int(rows[0]) == len(rows) - 1
        selected = columns[int(rows[0]) : int(rows[-1]) + 1] if contiguous else columns[rows]
        return np.ascontiguousarray(selected["embedding"], dtype=np.float32)

    def search_embeddings(self, queries: np.ndarray, k: int = 10) -> tuple[np.ndarray, np.ndarray]:
        """
        The nearest rows to query embeddings.

        Args:
            queries (`np.ndarray` of shape `(Q, D)`): L2-normalised.
            k (`int`): rows for each.

        Returns:
            scores and row numbers, `(Q, k)` each, best first; where there are fewer rows the rest is -inf and -1.
        """
        faiss = _import_faiss()
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        if k < 1:
            raise ValueError(f"`k` must be at least 1, not {k}.")
        if not len(self):
            return np.full((len(queries), k), -np.inf, np.float32), np.full((len(queries), k), -1)
        if self._faiss is None:
            self._build()
        parameters: dict[str, Any] = {}
        if self._removed:
            removed = np.fromiter(self._removed, np.int64, len(self._removed))
            parameters["sel"] = faiss.IDSelectorNot(faiss.IDSelectorBatch(removed))
        wanted = k if self.kind != "ivfpq" else max(_CANDIDATES * k, 100)
        if self.kind == "hnsw":
            parameters = faiss.SearchParametersHNSW(efSearch=max(_HNSW_EF_SEARCH, 2 * k), **parameters)
        elif self.kind == "ivfpq":
            parameters = faiss.SearchParametersIVF(nprobe=_PROBES, **parameters)
        else:
            parameters = faiss.SearchParameters(**parameters)
        scores, rows = self._faiss.faiss_index.search(queries, wanted, params=parameters)
        if self.kind == "ivfpq":
            found, places = np.unique(rows[rows >= 0], return_inverse=True)
            exact = np.full(rows.shape, -np.inf, np.float32)
            vectors = self._embeddings(found)[places]
            exact[rows >= 0] = (vectors * np.repeat(queries, (rows >= 0).sum(1), axis=0)).sum(1)
            order = np.argsort(-exact, axis=1, kind="stable")[:, :k]
            scores, rows = np.take_along_axis(exact, order, 1), np.take_along_axis(rows, order, 1)
        return np.where(rows >= 0, scores, -np.inf), rows

    # ------------------------------------------------------------------------------------------------------ search

    @property
    def embedder(self) -> CocaEmbedder:
        """The model, loaded when it is first asked for."""
        if self._embedder is None:
            if self.model is None:
                raise ValueError("The index has no model: pass `model`.")
            from modeling_coca import CocaModel

            loaded = load_for_inference(self.model, CocaModel, self.processor, self.device, self.dtype)
            if self.dataset is not None and loaded[0].config.projection_dim != self.embedding_size:
                raise ValueError(
                    f"The embeddings of `model` have {loaded[0].config.projection_dim} numbers, those in the index "
                    f"{self.embedding_size}: it was made by another model."
                )
            self._embedder = CocaEmbedder(*loaded)
        return self._embedder

    def search(
        self,
        text: str | None = None,
        *,
        image: Any = None,
        k: int = 10,
        text_weight: float = 0.5,
        rerank: int = 0,
    ) -> list[SearchHit]:
        """
        The images nearest to a text, to an image, or to both.

        Args:
            text (`str`, *optional*), image (path or PIL image, *optional*): what to look for; with both, the weighted mean
                of their embeddings is the query: an image, changed by words.
            k (`int`, defaults to 10): images to find.
            text_weight (`float`, defaults to 0.5): of the text, where there is an image, too.
            rerank (`int`, defaults to 0):
                Sort this many of the nearest by the likelihood of the text as their caption, which minds the order of words
                and details that one vector cannot. It reads those images and runs the decoder on each.

        Returns:
            `list[SearchHit]`: best first.
        """
        if text is None and image is None:
            raise ValueError("Give `text`, `image`, or both.")
        if rerank and (text is None or rerank < k):
            raise ValueError(f"`rerank` needs `text`, and to be at least `k` ({k}).")
        parts = []
        if text is not None:
            parts.append(self.embedder.texts([text]) * (text_weight if image is not None else 1))
        if image is not None:
            pixels = self.embedder.processor(images=[image], return_tensors="pt")["pixel_values"]
            parts.append(self.embedder.images(pixels) * (1 - text_weight if text is not None else 1))
        query = torch.nn.functional.normalize(sum(parts), dim=-1).cpu().numpy()
        scores, places = self.search_embeddings(query, max(k, rerank))
        found = places[0][places[0] >= 0]
        # From Arrow, which decodes no pictures: a path among them could lead anywhere
        rows = self.dataset.remove_columns("embedding").with_format("arrow")
        columns = rows[found].to_pydict() if len(found) else {"id": []}
        names = columns.pop("id")
        hits = [
            SearchHit(name, float(scores[0][i]), {column: values[i] for column, values in columns.items()})
            for i, name in enumerate(names)
        ]
        return self._rerank(text, hits)[:k] if rerank else hits

    def _rerank(self, text: str, hits: list[SearchHit]) -> list[SearchHit]:
        """By log p(text | image); images that cannot be read come last."""
        from modeling_coca import CocaForConditionalGeneration

        embedder = self.embedder
        if not hasattr(embedder.model, "text_decoder"):
            name = self.model if not isinstance(self.model, PreTrainedModel) else None
            if name is None:
                raise ValueError("`rerank` needs a model that writes: a CocaForConditionalGeneration.")
            loaded = load_for_inference(name, CocaForConditionalGeneration, embedder.processor, self.device, self.dtype)
            self._embedder = embedder = CocaEmbedder(*loaded)
        model, processor = embedder.model, embedder.processor
        inputs = processor.tokenizer([text], return_tensors="pt").to(model.device)
        log_probs: dict[str, float] = {}
        files = RowShard([(hit.id, hit.id, {}) for hit in hits], [self.image_root])
        for batch in ImageLoader([files], processor.image_processor, batch_size=32):
            if len(batch.errors) == min(32, len(hits)):
                raise ValueError(f"`rerank` reads images by their ids, and {hits[0].id} cannot be read.")
            for ref, reason in batch.errors:
                logger.warning(f"{ref.id} cannot be re-ranked: {reason}.")
            if batch.refs:
                pixels = batch.pixel_values.to(model.device, model.dtype)
                scores = model.score_captions(inputs["input_ids"], pixels, inputs["attention_mask"])[:, 0]
                log_probs |= {ref.id: score for ref, score in zip(batch.refs, scores.tolist(), strict=True)}
        ranked = [SearchHit(hit.id, hit.score, hit.metadata, log_probs.get(hit.id)) for hit in hits]
        return sorted(ranked, key=lambda hit: -math.inf if hit.log_prob is None else hit.log_prob, reverse=True)

    # ----------------------------------------------------------------------------------------------------- storage

    def save(self, folder: str | os.PathLike) -> None:
        """
        Writes the index into a folder. Whoever reads it meanwhile sees the old one or the new one, and nothing in between:
        the data go to a new folder inside, and then one small file that names it is replaced.
        """
        if self.dataset is None:
            raise ValueError("The index is empty: there is nothing to save.")
        folder = Path(folder)
        # Data without the file that names them are of a first save that was killed
        others = [path for path in folder.glob("[!.]*") if not re.fullmatch(r"data-[0-9a-f]{12}", path.name)]
        if others and not (folder / "index.json").is_file():
            raise ValueError(f"{folder} holds other things than an index: choose another folder.")
        if self._faiss is None:
            self._build()
        data = folder / f"data-{uuid.uuid4().hex[:12]}"
        try:
            with told_if_full(folder):
                self.dataset.save_to_disk(data)
                _import_faiss().write_index(self._faiss.faiss_index, str(data / "index.faiss"))
                np.save(data / "removed.npy", np.array(sorted(self._removed), dtype=np.int64))
            write_file(folder / "index.json", json.dumps({"data": data.name, **self._settings()}, indent=2))
        except BaseException:
            shutil.rmtree(data, ignore_errors=True)
            raise
        for old in folder.glob("data-*"):  # those of killed processes, too
            if old != data:
                shutil.rmtree(old)

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike,
        model: str | os.PathLike | PreTrainedModel | None = None,
        processor: ProcessorMixin | None = None,
        *,
        device: str | None = None,
        dtype: str | None = None,
        image_root: str | os.PathLike | None = None,
    ) -> "CocaIndex":
        """
        Opens an index: from a folder, or from the Hub, where it was put by [`~CocaIndex.push_to_hub`].

        Args:
            folder: folder, or id of a data set on the Hub.
            model (*optional*): by default the one that made the index, by its name.
            processor, device, dtype, image_root: see [`CocaIndex`].

        Raises:
            ValueError: its parts do not belong together.
        """
        from datasets import load_dataset, load_from_disk
        from datasets.search import FaissIndex

        from_hub = not os.path.isdir(folder)
        if from_hub:
            from huggingface_hub import snapshot_download

            name = os.fspath(folder)
            if name.startswith((".", "/", "~")) or name.count("/") > 1:
                raise FileNotFoundError(f"There is no index {name}.")
            folder = Path(snapshot_download(name, repo_type="dataset", allow_patterns=["data/*.parquet", "index/*"]))
            image_root = image_root or "."
            settings_file = folder / "index" / "index.json"
        else:
            folder = Path(folder)
            settings_file = folder / "index.json"
        if not settings_file.is_file():
            raise FileNotFoundError(f"{folder} is no index: there is no {settings_file.name} in it.")
        settings = json.loads(settings_file.read_text())
        index = cls(
            model or settings["model"],
            processor,
            kind=settings["chosen_kind"],
            device=device,
            dtype=dtype,
            image_root=image_root,
        )
        index.kind = settings["kind"]
        if from_hub:
            files = sorted(map(str, folder.glob("data/*.parquet")))
            index.dataset = load_dataset("parquet", data_files=files, split="train")
            index._faiss = FaissIndex.load(folder / "index" / "index.faiss")
        else:
            data = folder / settings["data"]
            if not is_inside(data, [folder]):
                raise ValueError(f"{settings_file} names {settings['data']!r}, which is no folder beside it.")
            index.dataset = load_from_disk(data)
            index._faiss = FaissIndex.load(data / "index.faiss")
            index._removed = set(np.load(data / "removed.npy", allow_pickle=False).tolist())
        index._check(settings_file)
        index._rows = {name: row for row, name in enumerate(index.dataset["id"]) if row not in index._removed}
        return index

    def _check(self, settings_file: Path) -> None:
        """Whether FAISS' structure, which is read by native code and gives row numbers, is that of the rows."""
        faiss = _import_faiss()
        structure = self._faiss.faiss_index
        classes = {"exact": faiss.IndexFlat, "hnsw": faiss.IndexHNSWFlat, "ivfpq": faiss.IndexIVFPQ}
        found = type(structure).__name__, structure.ntotal, structure.d, structure.metric_type
        rows = len(self.dataset), self.embedding_size, faiss.METRIC_INNER_PRODUCT
        if not isinstance(structure, classes.get(self.kind, ())) or found[1:] != rows:
            raise ValueError(
                f"{settings_file} says {self.kind} of {rows[0]} rows of {rows[1]} numbers, and the file of FAISS beside it has a "
                f"{found[0]} of {found[1]} rows of {found[2]} numbers: make the index anew."
            )

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, token: str | None = None) -> None:
        """
        Puts the index on the Hub, in one commit: `load_dataset(repo_id)` gives its rows, and [`~CocaIndex.load`] the index.

        Args:
            repo_id (`str`): `name` or `organisation/name`, of a data set.
            private, token: see `huggingface_hub.HfApi.create_repo`.
        """
        from huggingface_hub import HfApi

        from ..hub.model_card import cell

        if self.dataset is None:
            raise ValueError("The index is empty: there is nothing to push.")
        if self._removed or self._faiss is None:
            self.rebuild()
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as scratch:
            parts = max(1, math.ceil(self.dataset.data.nbytes / _BYTES_A_FILE))
            for part in range(parts):
                rows = self.dataset.shard(parts, part, contiguous=True)
                rows.to_parquet(os.path.join(scratch, "data", f"train-{part:05d}-of-{parts:05d}.parquet"))
            os.mkdir(os.path.join(scratch, "index"))
            self._faiss.save(os.path.join(scratch, "index", "index.faiss"))
            Path(scratch, "index", "index.json").write_text(json.dumps(self._settings(), indent=2))
            settings = {name: cell(value) for name, value in self._settings().items()}
            Path(scratch, "README.md").write_text(_CARD.format(number=len(self), repo_id=repo_id, **settings))
            api.upload_folder(
                repo_id=repo_id,
                folder_path=scratch,
                repo_type="dataset",
                commit_message=f"Index of {len(self):,} images",
                delete_patterns=["data/*"],
            )

    def _settings(self) -> dict[str, Any]:
        model = getattr(self.model, "name_or_path", self.model)
        return {
            "kind": self.kind,
            "chosen_kind": self.chosen_kind,
            "model": None if model is None else os.fspath(model),
        }


_BYTES_A_FILE = 500_000_000
_CARD = """\
---
configs:
- config_name: default
  data_files: data/*.parquet
library_name: modeling_coca
---

# Index of {number:,} images

Image embeddings of the CoCa model `{model}`, and a FAISS index ({kind}) of them.

```python
from modeling_coca.retrieval import CocaIndex

index = CocaIndex.load("{repo_id}")
index.search("two dogs running", k=5)
```
"""


def _repeated(ids: Sequence[str]) -> set[str]:
    seen: set[str] = set()
    return {name for name in ids if name in seen or seen.add(name)}


def _import_faiss():
    try:
        import faiss
    except ImportError as error:
        raise ImportError("The index searches with FAISS: run `pip install faiss-cpu datasets`.") from error
    return faiss


__all__ = ["CocaIndex", "SearchHit", "choose_kind"]
