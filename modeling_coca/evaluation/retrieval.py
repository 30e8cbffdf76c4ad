"""Retrieval: the right text for an image, and the right image for a text, among all of them."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from .evaluator import CocaEvaluator

logger = logging.get_logger(__name__)


def rank_of_best(scores: torch.Tensor, positives: Sequence[Collection[int]]) -> torch.Tensor:
    """
    The rank, from 1, of each query's best positive candidate among the negative ones.

    A tie counts against the query: whoever gives all candidates the same score finds nothing.

    Args:
        scores (`torch.Tensor` of shape `(queries, candidates)`): higher is better.
        positives (`Sequence[Collection[int]]`): for each query the indices of its right candidates.

    Returns:
        `torch.LongTensor` of shape `(queries,)`: `candidates + 1` where a query has no positive.

    Example:

    ```python
    >>> import torch
    >>> from modeling_coca.evaluation import rank_of_best

    >>> rank_of_best(torch.tensor([[0.1, 0.9, 0.5], [0.3, 0.3, 0.2]]), [[2, 0], [1]]).tolist()
    [2, 2]
    ```
    """
    if len(positives) != len(scores):
        raise ValueError(f"There are {len(scores)} rows of `scores` for {len(positives)} queries in `positives`.")
    rows = [row for row, columns in enumerate(positives) for _ in columns]
    columns = [column for columns in positives for column in columns]
    is_positive = torch.zeros_like(scores, dtype=torch.bool)
    is_positive[rows, columns] = True
    best = scores.masked_fill(~is_positive, -torch.inf).amax(dim=1, keepdim=True)
    # Not `>=`: a score that is not a number must count against the query as well
    not_beaten = ~(scores < best) & ~is_positive
    ranks = 1 + not_beaten.sum(dim=1)
    return ranks.masked_fill(~is_positive.any(dim=1), scores.shape[1] + 1)


def recall_at_k(
    query_embeds: torch.Tensor,
    candidate_embeds: torch.Tensor,
    positives: Sequence[Collection[int]],
    ks: Sequence[int] = (1, 5, 10),
    chunk_size: int = 1024,
) -> dict[int, float]:
    """
    Share of the queries that find a right candidate among their `k` nearest.

    Args:
        query_embeds (`torch.Tensor` of shape `(queries, D)`), candidate_embeds (`torch.Tensor` of shape `(candidates,
        D)`):
            Embeddings, compared by their dot product.
        positives (`Sequence[Collection[int]]`):
            For each query the indices of its right candidates. Queries without any are left out.
        ks (`Sequence[int]`): see above.
        chunk_size (`int`): queries whose scores are in memory at a time.

    Returns:
        `dict[int, float]`: recall for each `k`; not a number where no query has a right candidate.

    Example:

    ```python
    >>> import torch
    >>> from modeling_coca.evaluation import recall_at_k

    >>> texts = torch.eye(3)
    >>> images = torch.tensor([[1.0, 0.2, 0.0], [0.9, 0.8, 0.1]])
    >>> recall_at_k(images, texts, positives=[[0], [1, 2]], ks=(1, 2))
    {1: 0.5, 2: 1.0}
    ```
    """
    if len(positives) != len(query_embeds):
        raise ValueError(f"There are {len(query_embeds)} queries, but `positives` of {len(positives)}.")
    kept = [i for i, columns in enumerate(positives) if len(columns)]
    ranks = []
    for start in range(0, len(kept), chunk_size):
        some = kept[start : start + chunk_size]
        ranks.append(rank_of_best(query_embeds[some] @ candidate_embeds.T, [positives[i] for i in some]))
    if not ranks:
        return dict.fromkeys(ks, float("nan"))
    all_ranks = torch.cat(ranks)
    return {k: (all_ranks <= k).double().mean().item() for k in ks}


class RetrievalEvaluator(CocaEvaluator):
    """
    Recall at k from image to text (`i2t_r1`, ...) and from text to image (`t2i_r1`, ...), and `mean_recall`, the mean
    of these.

    An image may have several captions: finding one of them is right. Equal captions are one text, which may belong to
    several images: each of them is right for it. So both directions average over what is different.

    Args:
        processor, dataset and the rest: see [`CocaEvaluator`].
        text_column (`str`, defaults to `"text"`):
            Column of the captions, a text or a list of texts. Images without one are candidates only.
        ks (`Sequence[int]`, defaults to `(1, 5, 10)`): numbers of candidates that are looked at.
        extra_texts (`Sequence[str]`, *optional*):
            More texts to find the right one among, such as the captions of the training set: `i2t_r1_all`, ...
        extra_images (*optional*):
            More images, a set with the columns of `dataset`, to find the right one among: `t2i_r1_all`, ... Those that
            have the caption asked for are right, too.
        chunk_size (`int`, defaults to 1024): queries whose scores are in memory at a time.

    Example:

    ```python
    >>> from modeling_coca.evaluation import RetrievalEvaluator

    >>> evaluator = RetrievalEvaluator(processor, dataset["test"], text_column="caption")  # doctest: +SKIP
    >>> evaluator(model)["i2t_r1"]  # doctest: +SKIP
    0.43
    >>> trainer.add_callback(evaluator)  # with each evaluation of a training  # doctest: +SKIP
    ```
    """

    primary_metric = "mean_recall"

    def __init__(
        self,
        processor,
        dataset,
        *,
        text_column: str = "text",
        ks: Sequence[int] = (1, 5, 10),
        extra_texts: Sequence[str] | None = None,
        extra_images: Sequence[Mapping[str, Any]] | None = None,
        chunk_size: int = 1024,
        **kwargs,
    ):
        super().__init__(processor, dataset, **kwargs)
        self.text_column = text_column
        self.ks = tuple(ks)
        self.extra_texts = extra_texts
        self.extra_images = extra_images
        self.chunk_size = chunk_size

    def compute(self, model: PreTrainedModel) -> dict[str, float]:
        captions = [_as_list(value) for value in self.column(self.text_column, "text_column")]
        index: dict[str, int] = {}
        text_ids = [_unique([index.setdefault(text, len(index)) for text in texts]) for texts in captions]
        num_texts = len(index)
        if not num_texts:
            raise ValueError(f"Column {self.text_column!r} (`text_column`) holds no caption.")
        if empty := sum(not ids for ids in text_ids):
            logger.warning(f"{empty} of {len(text_ids)} images have no caption: they only serve as candidates.")
        for text in self.extra_texts or ():
            index.setdefault(text, len(index))

        image_embeds = self.encode_images(model)
        all_text_embeds = self.encode_texts(model, list(index))
        text_embeds = all_text_embeds[:num_texts]
        figures = {
            **self._recall("i2t", "", image_embeds, text_embeds, text_ids),
            **self._recall("t2i", "", text_embeds, image_embeds, _invert(text_ids, num_texts)),
        }
        figures["mean_recall"] = sum(figures.values()) / len(figures)
        if self.extra_texts is not None:
            figures.update(self._recall("i2t", "_all", image_embeds, all_text_embeds, text_ids))
        if self.extra_images is not None:
            extra = self.column(self.text_column, "text_column", self.extra_images)
            extra_ids = [_unique([index[text] for text in _as_list(value) if text in index]) for value in extra]
            all_ids = text_ids + [[i for i in ids if i < num_texts] for ids in extra_ids]
            all_image_embeds = torch.cat([image_embeds, self.encode_images(model, self.extra_images)])
            figures.update(self._recall("t2i", "_all", text_embeds, all_image_embeds, _invert(all_ids, num_texts)))
        return figures

    def _recall(
        self, direction: str, suffix: str, queries: torch.Tensor, candidates: torch.Tensor, positives: list[list[int]]
    ) -> dict[str, float]:
        recalls = recall_at_k(queries, candidates, positives, self.ks, self.chunk_size)
        return {f"{direction}_r{k}{suffix}": recall for k, recall in recalls.items()}


def _as_list(captions: str | Sequence[str] | None) -> list[str]:
    if captions is None:
        return []
    return [captions] if isinstance(captions, str) else [caption for caption in captions if caption is not None]


def _unique(ids: list[int]) -> list[int]:
    return list(dict.fromkeys(ids))


def _invert(ids_of_rows: list[list[int]], num_ids: int) -> list[list[int]]:
    """For each id the rows that have it."""
    rows: list[list[int]] = [[] for _ in range(num_ids)]
    for row, ids in enumerate(ids_of_rows):
        for i in ids:
            rows[i].append(row)
    return rows


__all__ = ["RetrievalEvaluator", "rank_of_best", "recall_at_k"]
