"""Captions against references: exact match, BLEU-4, CIDEr-D and ROUGE-L, without Java.

On equal tokens the figures are those of `pycocoevalcap`, the COCO evaluation server's code. It is no dependency,
because its package carries 100 MB of Java for other metrics; aac-metrics, which has CIDEr-D without Java, brings audio
models along.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from transformers import PreTrainedModel

from .evaluator import CocaEvaluator

_PUNCTUATION = {"''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", "…", ";"}
_CLITIC = r"(?:n't|'(?:s|m|d|re|ve|ll))(?!\w)"
_TOKENS = re.compile(
    r"(?:mr|mrs|ms|dr|st|jr|sr|vs|etc|inc|ltd|co|corp|prof|gen|ave)\.(?!\w)"  # abbreviations keep their full stop
    r"|(?<!\w)(?:[^\W\d_]\.){2,}"  # u.s.
    r"|https?://\S+|[\w.+-]+@[\w-]+(?:\.\w+)+"
    rf"|{_CLITIC}|(?<!\w)'(?:\d0s|n'|em|til|cause|tis|twas)(?!\w)"
    r"|(?<![\w)])[-+]?\d+(?:[.,:]\d+)+(?![\w-])"
    rf"|\w+(?:[-/.']\w+)*?(?={_CLITIC})"  # do|n't
    r"|\w(?:[-/.&'’]?\w+)*"
    r"|[?!]+|\*+|\.{3}|@\w+|[^\w\s]"
)
_JOINED_WORDS = re.compile(r"\b(?:(can)(not)|(gon|wan)(na)|(gim|lem)(me)|(got)(ta))\b")


def tokenize_caption(text: str) -> list[str]:
    """
    Lower-cased words without punctuation, as the COCO evaluation's Penn Treebank tokenizer (Java) makes them.

    Emoji stay, which it drops.

    Example:

    ```python
    >>> from modeling_coca.evaluation import tokenize_caption

    >>> tokenize_caption("A man's T-shirt, isn't it?")
    ['a', 'man', "'s", 't-shirt', 'is', "n't", 'it']
    ```
    """
    text = re.sub(r'["“”–—«»]', " ", text.lower().replace("‘", "'"))
    text = re.sub(r"’(?=(?:s|m|d|re|ve|ll|t)\b|\W|$)", "'", text)
    text = _JOINED_WORDS.sub(lambda match: " ".join(filter(None, match.groups())), text)
    return [token for token in _TOKENS.findall(text) if token not in _PUNCTUATION]


def bleu4(predictions: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> float:
    """
    BLEU-4 of a corpus (Papineni et al., 2002) in `[0, 1]`, by sacrebleu, without smoothing.

    Args:
        predictions (`Sequence[Sequence[str]]`): the tokens of each caption.
        references (`Sequence[Sequence[Sequence[str]]]`): the tokens of each of its references.

    Returns:
        `float`: 0 where no four words in a row are right.
    """
    _check(predictions, references)
    # One list for each place in the lists of references; sacrebleu passes over None, and over empty texts, too
    streams = [
        [" ".join(refs[i]) or "." if i < len(refs) else None for refs in references]
        for i in range(max(map(len, references)))
    ]
    score = _import_sacrebleu().corpus_bleu(
        [" ".join(tokens) for tokens in predictions], streams, tokenize="none", smooth_method="none", force=True
    )
    return score.score / 100


def _import_sacrebleu() -> ModuleType:
    try:
        import sacrebleu
    except ImportError as error:
        raise ImportError("BLEU is computed by sacrebleu: run `pip install sacrebleu`.") from error
    return sacrebleu


def rouge_l(predictions: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> float:
    """
    ROUGE-L (Lin, 2004) in `[0, 1]`: the longest common subsequence with the references, as an F-score with beta 1.2,
    mean over captions. As in the COCO evaluation, precision and recall are each the best over the references.

    Args:
        predictions, references: see [`bleu4`].
    """
    _check(predictions, references)
    beta2 = 1.2**2
    total = 0.0
    for tokens, refs in zip(predictions, references, strict=True):
        common = [_longest_common_subsequence(tokens, ref) for ref in refs]
        precision = max(common) / max(len(tokens), 1)
        recall = max(length / max(len(ref), 1) for length, ref in zip(common, refs, strict=True))
        if precision and recall:
            total += (1 + beta2) * precision * recall / (recall + beta2 * precision)
    return total / len(predictions)


def _longest_common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    lengths = [0] * (len(second) + 1)
    for a in first:
        diagonal = 0
        for j, b in enumerate(second, 1):
            diagonal, lengths[j] = lengths[j], diagonal + 1 if a == b else max(lengths[j], lengths[j - 1])
    return lengths[-1]


def cider_d(
    predictions: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]], sigma: float = 6.0
) -> float:
    """
    CIDEr-D (Vedantam et al., arXiv 1411.5726): similarity of TF-IDF weighted n-grams, n = 1 to 4, in `[0, 10]`, mean
    over captions. Papers quote 100 times this.

    The document frequencies come from the references given here, so the figure depends on the set, and is 0 for a set
    of one image.

    Args:
        predictions, references: see [`bleu4`].
        sigma (`float`, defaults to 6): width of the penalty on a difference in length.
    """
    _check(predictions, references)
    document_frequency: Counter = Counter()
    for refs in references:
        document_frequency.update({ngram for ref in refs for ngram in _ngrams(ref)})
    log_images = math.log(len(references))

    def weigh(tokens: Sequence[str]) -> tuple[list[dict[tuple, float]], list[float]]:
        vectors: list[dict[tuple, float]] = [{} for _ in range(4)]
        for ngram, count in _ngrams(tokens).items():
            inverse = log_images - math.log(max(1.0, document_frequency[ngram]))
            vectors[len(ngram) - 1][ngram] = count * inverse
        return vectors, [math.sqrt(sum(w * w for w in vector.values())) for vector in vectors]

    total = 0.0
    for tokens, refs in zip(predictions, references, strict=True):
        vectors, norms = weigh(tokens)
        score = 0.0
        for ref in refs:
            ref_vectors, ref_norms = weigh(ref)
            # Lengths are numbers of bigrams, as in the authors' code: they differ as those of words do, down to one
            # word
            difference = max(len(tokens) - 1, 0) - max(len(ref) - 1, 0)
            penalty = math.exp(-(difference**2) / (2 * sigma**2))
            for vector, norm, ref_vector, ref_norm in zip(vectors, norms, ref_vectors, ref_norms, strict=True):
                clipped = sum(min(w, ref_vector.get(n, 0.0)) * ref_vector.get(n, 0.0) for n, w in vector.items())
                score += penalty * clipped / (norm * ref_norm) if norm and ref_norm else 0.0
        total += 10 * score / 4 / len(refs)
    return total / len(predictions)


def _ngrams(tokens: Sequence[str]) -> Counter:
    return Counter(tuple(tokens[i : i + n]) for n in range(1, 5) for i in range(len(tokens) - n + 1))


def _check(predictions: Sequence[Any], references: Sequence[Sequence[Any]]) -> None:
    if not predictions or len(predictions) != len(references):
        raise ValueError(f"There are {len(predictions)} `predictions` for {len(references)} lists of `references`.")
    if missing := [i for i, refs in enumerate(references) if not len(refs)]:
        raise ValueError(f"There are no `references` for predictions {missing[:10]}.")


def caption_metrics(predictions: Sequence[str], references: Sequence[str | Sequence[str]]) -> dict[str, float]:
    """
    All metrics of captions, given as texts.

    Args:
        predictions (`Sequence[str]`): one caption an image.
        references (`Sequence[str | Sequence[str]]`): its true captions, or the only one.

    Returns:
        `dict[str, float]`: `caption_exact` (share of captions that have the tokens of one of their references),
        `bleu4`, `rouge_l` in `[0, 1]`, `cider_d` in `[0, 10]`.

    Example:

    ```python
    >>> from modeling_coca.evaluation import caption_metrics

    >>> metrics = caption_metrics(["a red fox runs", "two cats"], [["A red fox runs.", "a fox"], "two dogs"])
    >>> metrics["caption_exact"], round(metrics["rouge_l"], 3)
    (0.5, 0.75)
    ```
    """
    tokens = [tokenize_caption(text) for text in predictions]
    all_refs = [[tokenize_caption(text) for text in ([r] if isinstance(r, str) else r)] for r in references]
    _check(tokens, all_refs)
    return {
        "caption_exact": sum(caption in refs for caption, refs in zip(tokens, all_refs, strict=True)) / len(tokens),
        "bleu4": bleu4(tokens, all_refs),
        "cider_d": cider_d(tokens, all_refs),
        "rouge_l": rouge_l(tokens, all_refs),
    }


class CaptioningEvaluator(CocaEvaluator):
    """
    Generates a caption for each image and compares it with the true ones: `caption_exact`, `bleu4`, `cider_d`,
    `rouge_l`, see [`caption_metrics`]. The captions are kept in `evaluator.predictions`.

    Args:
        processor, dataset and the rest: see [`CocaEvaluator`].
        text_column (`str`, defaults to `"text"`): column of the true captions, a text or a list of texts.
        generation_kwargs (`dict`, *optional*): of `generate`, greedy search by default.

    Example:

    ```python
    >>> from modeling_coca.evaluation import CaptioningEvaluator

    >>> evaluator = CaptioningEvaluator(processor, dataset["test"], text_column="caption")  # doctest: +SKIP
    >>> evaluator(model)["cider_d"]  # doctest: +SKIP
    1.12
    ```
    """

    primary_metric = "cider_d"

    def __init__(
        self,
        processor,
        dataset,
        *,
        text_column: str = "text",
        generation_kwargs: dict[str, Any] | None = None,
        **kwargs,
    ):
        super().__init__(processor, dataset, **kwargs)
        _import_sacrebleu()  # if it is missing, say so before the captions are made
        self.text_column = text_column
        self.generation_kwargs = {"do_sample": False, **(generation_kwargs or {})}
        self.predictions: list[str] = []

    def compute(self, model: PreTrainedModel) -> dict[str, float]:
        references = self.column(self.text_column, "text_column")
        if missing := [i for i, texts in enumerate(references) if not texts]:
            raise ValueError(f"Rows {missing[:10]} have no caption in {self.text_column!r} (`text_column`).")
        self.predictions = self.generate(model, "Captions", **self.generation_kwargs)
        return caption_metrics(self.predictions, references)


__all__ = ["CaptioningEvaluator", "bleu4", "caption_metrics", "cider_d", "rouge_l", "tokenize_caption"]
