"""Rows of a data set -> a batch for both losses."""

import random
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from transformers import ProcessorMixin

from ..evaluation.evaluator import missing_column, stack_arrays
from ..loss_coca import IGNORE_INDEX


@dataclass
class CocaDataCollator:
    """
    Makes a batch from rows that hold an image and a caption, or an image, a question and an answer.

    Use it with the raw columns of a `datasets` set, i.e. with `remove_unused_columns=False` in `TrainingArguments`
    ([`CocaTrainer`] sets it). Images may be augmented by `dataset.set_transform`: leave PIL images in the image column,
    or put finished tensors under `"pixel_values"`, which are then only stacked.

    Args:
        processor ([`CocaProcessor`]):
            Its image processor and tokenizer are used.
        image_column (`str`, defaults to `"image"`), text_column (`str`, defaults to `"text"`):
            Columns of the image and of the caption. A caption may be a list of captions, of which one is taken.
        prefix_column (`str`, *optional*):
            Column of a text before the caption that is given and not learned, such as a question. The sequence is then
            `[BOS] prefix text [EOS]`, and only `text [EOS]` has labels. The prefix has the same tokens that it has as a
            prompt of `generate`. A row without one (`None`) is a plain caption, so both can be mixed.
        contrast_prefixed (`bool`, defaults to `False`):
            Let rows with a prefix into the contrastive loss. A question with its answer describes no whole image, so by
            default they stay out (`contrastive_mask`).
        image_hidden_states_column (`str`, *optional*):
            Column of features of a frozen image encoder, `(tokens, width)` each, to take instead of images.
        caption_choice (`"random"` or `"first"`, defaults to `"random"`):
            Which one of several captions. [`CocaTrainer`] evaluates with the first.
        seed (`int`, defaults to 0):
            Of the choice, once [`~CocaDataCollator.set_epoch`] has been called.
        truncation (`bool`, defaults to `False`):
            Cut texts that are longer than the tokenizer's `model_max_length`; otherwise they are an error. Of a prefix
            and a text the prefix is cut.
        pad_to_multiple_of (`int`, *optional*):
            Texts are padded on the right to the longest of the batch, or to the next multiple of this.
        return_loss (`bool`, defaults to `False`):
            For [`CocaModel`], which has no labels: put `return_loss=True` into the batch instead of them.

    Example:

    ```python
    >>> import numpy as np
    >>> from PIL import Image
    >>> from modeling_coca import CocaImageProcessorPil, CocaProcessor, CocaTokenizer
    >>> from modeling_coca.training import CocaDataCollator

    >>> tokenizer = CocaTokenizer().train_new_from_iterator(["what is it? a red square"], vocab_size=500)
    >>> processor = CocaProcessor(CocaImageProcessorPil(size={"shortest_edge": 32}, crop_size=32), tokenizer)
    >>> red = Image.fromarray(np.full((40, 40, 3), (255, 0, 0), np.uint8))
    >>> rows = [{"image": red, "text": ["a red square", "red"]}, {"image": red, "text": "it"}]
    >>> batch = CocaDataCollator(processor, caption_choice="first")(rows)
    >>> batch["pixel_values"].shape, tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)
    (torch.Size([2, 3, 32, 32]), ['a red square', 'it'])
    >>> batch["labels"][1].tolist() == batch["input_ids"][1, :3].tolist() + [-100, -100]
    True

    >>> # a question is a prefix without loss
    >>> row = {"image": red, "question": "what is it?", "text": "red"}
    >>> batch = CocaDataCollator(processor, prefix_column="question")([row])
    >>> batch["labels"][0].tolist() == [-100] * 5 + tokenizer("red")["input_ids"][1:]
    True
    ```
    """

    processor: ProcessorMixin
    image_column: str = "image"
    text_column: str = "text"
    prefix_column: str | None = None
    contrast_prefixed: bool = False
    image_hidden_states_column: str | None = None
    caption_choice: Literal["random", "first"] = "random"
    seed: int = 0
    truncation: bool = False
    pad_to_multiple_of: int | None = None
    return_loss: bool = False
    # In shared memory, as persistent workers hold a copy of the collator
    _epoch: torch.Tensor = field(default_factory=lambda: torch.tensor([-1]).share_memory_(), init=False, repr=False)

    def __post_init__(self):
        if self.caption_choice not in ("random", "first"):
            raise ValueError(f'`caption_choice` must be "random" or "first", got {self.caption_choice!r}.')

    def set_epoch(self, epoch: int) -> None:
        """
        Makes the random choice of a caption depend on the epoch, the seed and the captions alone, so that neither the
        number of workers nor an interruption changes it. [`CocaTrainer`] calls it; without a call Python's generator
        chooses.
        """
        self._epoch[0] = epoch

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        if not rows:
            raise ValueError("There are no rows to make a batch of: `rows` is empty.")
        batch = self._images(rows)
        texts = [self._caption(row) for row in rows]
        if self.prefix_column is None:
            return {**batch, **self._tokens(texts, [None] * len(rows))}
        prefixes = [self._prefix(row) for row in rows]
        if not self.contrast_prefixed and not self.return_loss:
            batch["contrastive_mask"] = torch.tensor([prefix is None for prefix in prefixes])
        return {**batch, **self._tokens(texts, prefixes)}

    def _images(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        if self.image_hidden_states_column is not None:
            column = self.image_hidden_states_column
            features = [_value_of(row, column, "image_hidden_states_column") for row in rows]
            return {"image_hidden_states": _stack(features, column)}
        if "pixel_values" in rows[0]:
            values = [_value_of(row, "pixel_values", "image_column") for row in rows]
            return {"pixel_values": _stack(values, "pixel_values")}
        images = [_value_of(row, self.image_column, "image_column") for row in rows]
        return {"pixel_values": self.processor.image_processor(images, return_tensors="pt")["pixel_values"]}

    def _caption(self, row: Mapping[str, Any]) -> str:
        captions = _value_of(row, self.text_column, "text_column")
        if isinstance(captions, str):
            return captions
        given = captions
        captions = (
            [] if isinstance(captions, (bytes, Mapping)) or not isinstance(captions, Iterable) else list(captions)
        )
        if not captions or not all(isinstance(caption, str) for caption in captions):
            raise ValueError(
                f"Column {self.text_column!r} (`text_column`) must hold a caption or a list of captions, got "
                f"{given!r}: filter such rows out."
            )
        if self.caption_choice == "first":
            return captions[0]
        epoch = int(self._epoch)
        if epoch < 0:
            return random.choice(captions)
        return captions[zlib.crc32(repr((self.seed, epoch, captions)).encode()) % len(captions)]

    def _prefix(self, row: Mapping[str, Any]) -> str | None:
        prefix = _value_of(row, self.prefix_column, "prefix_column", optional=True)
        if prefix is not None and not isinstance(prefix, str):
            raise ValueError(
                f"Column {self.prefix_column!r} (`prefix_column`) must hold texts, got {type(prefix).__name__}."
            )
        return prefix or None

    def _tokens(self, texts: list[str], prefixes: list[str | None]) -> dict[str, Any]:
        tokenizer = self.processor.tokenizer
        sequences = tokenizer(texts, truncation=self.truncation)["input_ids"]
        prefix_lengths = [0] * len(texts)
        for i, (prefix, text) in enumerate(zip(prefixes, texts, strict=True)):
            if prefix is not None:
                prefix_ids, text_ids = self._join(prefix, text)
                sequences[i], prefix_lengths[i] = prefix_ids + text_ids, len(prefix_ids)
        lengths = torch.tensor([[len(sequence)] for sequence in sequences])  # [B, 1]
        padded = longest = int(lengths.max())
        if self.pad_to_multiple_of:
            padded = -(-longest // self.pad_to_multiple_of) * self.pad_to_multiple_of
            padded = max(min(padded, tokenizer.model_max_length), longest)
        columns = torch.arange(padded)
        is_token = columns < lengths  # [B, T]
        input_ids = torch.full(is_token.shape, tokenizer.pad_token_id or 0)
        input_ids[is_token] = torch.tensor([token for sequence in sequences for token in sequence])
        batch = {"input_ids": input_ids, "attention_mask": is_token.long()}
        if self.return_loss:
            return {**batch, "return_loss": True}
        is_label = is_token & (columns >= torch.tensor(prefix_lengths)[:, None])
        return {**batch, "labels": input_ids.masked_fill(~is_label, IGNORE_INDEX)}

    def _join(self, prefix: str, text: str) -> tuple[list[int], list[int]]:
        """`[BOS] prefix` and `text [EOS]`, each tokenized by itself: generation goes on from the prefix alone."""
        tokenizer = self.processor.tokenizer
        eos, limit = tokenizer.eos_token_id, tokenizer.model_max_length
        prefix_ids = tokenizer(prefix, truncation=self.truncation)["input_ids"]
        if prefix_ids and prefix_ids[-1] == eos:
            prefix_ids = prefix_ids[:-1]
        text_ids = tokenizer(text, add_special_tokens=False, truncation=self.truncation)["input_ids"] + [eos]
        length = len(prefix_ids) + len(text_ids)
        if length <= limit:
            return prefix_ids, text_ids
        if not self.truncation:
            raise ValueError(
                f"{prefix!r} ({self.prefix_column!r}) and {text!r} ({self.text_column!r}) have {length} tokens, "
                f"and the limit is {limit} (`model_max_length`). Shorten them, or cut the first by `truncation=True`."
            )
        if len(text_ids) > limit - 1:
            text_ids = [*text_ids[: limit - 2], eos]
        return prefix_ids[: limit - len(text_ids)], text_ids


def _stack(values: Sequence[Any], column: str) -> torch.Tensor:
    try:
        return stack_arrays(values)
    except (ValueError, TypeError, RuntimeError) as error:
        shapes = sorted({str(tuple(getattr(value, "shape", ()))) for value in values})
        raise ValueError(
            f"Column {column!r} must hold arrays of numbers of one shape, got the shapes {', '.join(shapes)} ({error})."
        ) from error


def _value_of(row: Mapping[str, Any], column: str, field_name: str, optional: bool = False) -> Any:
    if column not in row:
        error = missing_column(column, field_name, row)
        raise ValueError(f"{error} If `Trainer` has dropped it: set `remove_unused_columns=False` in its arguments.")
    if row[column] is None and not optional:
        raise ValueError(f"A row has no value in column {column!r} (`{field_name}`): filter such rows out.")
    return row[column]


__all__ = ["CocaDataCollator"]
