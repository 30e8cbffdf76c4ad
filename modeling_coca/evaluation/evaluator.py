"""What all evaluators share: running a model over a data set, alone or within a training."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, ProcessorMixin, TrainerCallback
from transformers.utils import logging

logger = logging.get_logger(__name__)


class CocaEvaluator(TrainerCallback):
    """
    A callable that runs a model over a data set and returns a flat dict of floats.

    It is a callback, too: after `trainer.add_callback(evaluator)` each evaluation of a `Trainer` has its figures, as
    `eval_*`, for `metric_for_best_model` and in `state.log_history`. [`CocaTrainer`] sends them to TensorBoard and the
    like as well. With several processes each one computes all of it.

    Subclasses give `primary_metric` and write `compute`.

    Args:
        processor ([`CocaProcessor`]): its image processor and tokenizer are used.
        dataset: a map-style set of rows, e.g. a `datasets.Dataset` or a list of dicts.
        image_column (`str`, defaults to `"image"`): column of the images.
        image_hidden_states_column (`str`, *optional*):
            Column of features of a frozen image encoder, `(tokens, width)` each, to take instead of images.
        batch_size (`int`, defaults to 32): images, or texts, at a time.
        num_workers (`int`, defaults to 0): processes that load and prepare images.
        truncation (`bool`, defaults to `False`): cut texts that are too long; otherwise they are an error.
        name (`str`, *optional*): put before each figure, `f"{name}_"`, to tell two sets apart.
    """

    primary_metric: str

    def __init__(
        self,
        processor: ProcessorMixin,
        dataset: Sequence[Mapping[str, Any]],
        *,
        image_column: str = "image",
        image_hidden_states_column: str | None = None,
        batch_size: int = 32,
        num_workers: int = 0,
        truncation: bool = False,
        name: str = "",
    ):
        self.processor = processor
        self.dataset = dataset
        self.image_column = image_column
        self.image_hidden_states_column = image_hidden_states_column
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.truncation = truncation
        self.name = name
        self._show_progress = True
        if not len(dataset):
            raise ValueError("`dataset` is empty: there is nothing to evaluate.")
        if name:
            self.primary_metric = f"{name}_{self.primary_metric}"

    def compute(self, model: PreTrainedModel) -> dict[str, float]:
        """Figures by name; the model is in evaluation mode and needs no gradients."""
        raise NotImplementedError

    def __call__(self, model: nn.Module, show_progress: bool = True) -> dict[str, float]:
        """
        Args:
            model (`nn.Module`): the model, bare or in DDP, PEFT or `torch.compile`. Its modes are restored afterwards.
            show_progress (`bool`): show progress bars, unless they are switched off in transformers.

        Returns:
            `dict[str, float]`: figures by name.
        """
        training = [module for module in model.modules() if module.training]
        model.eval()
        self._show_progress = show_progress
        try:
            with torch.no_grad():
                figures = self.compute(unwrap(model))
        finally:
            for module in training:
                module.training = True
        prefix = f"{self.name}_" if self.name else ""
        return {prefix + key: float(value) for key, value in figures.items()}

    def on_evaluate(self, args, state, control, model=None, metrics=None, **kwargs):
        if metrics is None or f"eval_{self.primary_metric}" in metrics:  # `CocaTrainer` has asked before it logged
            return
        figures = {f"eval_{key}": v for key, v in self(model, state.is_local_process_zero).items()}
        metrics.update(figures)
        if state.log_history:
            state.log_history[-1].update(figures)
        logger.info(f"{type(self).__name__}: {figures}")

    # ------------------------------------------------------------------------------------------ for the subclasses

    def column(self, column: str, field_name: str, dataset: Sequence[Mapping[str, Any]] | None = None) -> list[Any]:
        """All values of a column, without decoding the images beside it."""
        dataset = self.dataset if dataset is None else dataset
        names = getattr(dataset, "column_names", None) or list(dataset[0])
        if column not in names:
            raise ValueError(missing_column(column, field_name, names))
        if hasattr(dataset, "select_columns"):
            dataset = dataset.with_format(None).select_columns([column])
        return [row[column] for row in dataset]

    def image_batches(
        self, model: PreTrainedModel, description: str, dataset: Sequence[Mapping[str, Any]] | None = None
    ) -> Iterator[dict[str, torch.Tensor]]:
        """`pixel_values` or `image_hidden_states` of `batch_size` rows at a time, on the model's device."""
        dataset = self.dataset if dataset is None else dataset
        loader = DataLoader(
            dataset, batch_size=self.batch_size, num_workers=self.num_workers, collate_fn=self._prepare_images
        )
        for batch in self.progress(loader, description):
            yield {name: value.to(model.device, model.dtype) for name, value in batch.items()}

    def _prepare_images(self, rows: list[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        field_name = "image_column" if self.image_hidden_states_column is None else "image_hidden_states_column"
        column = getattr(self, field_name)
        if column not in rows[0]:
            raise ValueError(missing_column(column, field_name, rows[0]))
        values = [row[column] for row in rows]
        if self.image_hidden_states_column is not None:
            return {"image_hidden_states": stack_arrays(values)}
        return {"pixel_values": self.processor.image_processor(values, return_tensors="pt")["pixel_values"]}

    def encode_images(self, model: PreTrainedModel, dataset: Sequence[Mapping[str, Any]] | None = None) -> torch.Tensor:
        """L2-normalised embeddings (images, projection_dim) in fp32."""
        embeds = [
            model.base_model.get_image_features(**batch).pooler_output
            for batch in self.image_batches(model, "Images", dataset)
        ]
        return F.normalize(torch.cat(embeds).float(), dim=-1)

    def encode_texts(self, model: PreTrainedModel, texts: Sequence[str]) -> torch.Tensor:
        """L2-normalised embeddings (texts, projection_dim) in fp32."""
        tokenizer = self.processor.tokenizer
        embeds: list[torch.Tensor] = []
        for start in self.progress(range(0, len(texts), self.batch_size), "Texts"):
            batch = list(texts[start : start + self.batch_size])
            inputs = tokenizer(batch, padding=True, truncation=self.truncation, return_tensors="pt").to(model.device)
            outputs = model.base_model.get_text_features(inputs["input_ids"], inputs["attention_mask"])
            embeds.append(outputs.pooler_output)
        return F.normalize(torch.cat(embeds).float(), dim=-1)

    def generate(
        self, model: PreTrainedModel, description: str, prompts: Sequence[str] | None = None, **kwargs: Any
    ) -> list[str]:
        """What the model writes for each image, after its prompt if there are prompts; those are not part of it."""
        if not hasattr(model, "text_decoder"):
            raise ValueError(
                f"{type(self).__name__} needs a model that writes, a CocaForConditionalGeneration, not "
                f"{type(model).__name__}."
            )
        texts: list[str] = []
        for batch in self.image_batches(model, description):
            if prompts is not None:
                some = prompts[len(texts) : len(texts) + self.batch_size]
                batch.update({name: value.to(model.device) for name, value in self._prompt(some).items()})
            prompt_length = batch["input_ids"].shape[1] if prompts is not None else 0
            sequences = model.generate(**batch, **kwargs)
            texts += self.processor.tokenizer.batch_decode(sequences[:, prompt_length:], skip_special_tokens=True)
        return [text.strip() for text in texts]

    def _prompt(self, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        """`[BOS] prompt` without EOS, padded on the left, so that `generate` takes it as it is."""
        tokenizer = self.processor.tokenizer
        sequences = tokenizer(list(prompts), truncation=self.truncation)["input_ids"]
        sequences = [ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] else ids for ids in sequences]
        length = max(map(len, sequences))
        pad = tokenizer.pad_token_id or 0
        return {
            "input_ids": torch.tensor([[pad] * (length - len(ids)) + ids for ids in sequences]),
            "attention_mask": torch.tensor([[0] * (length - len(ids)) + [1] * len(ids) for ids in sequences]),
        }

    def progress(self, iterable: Iterable, description: str) -> Iterable:
        """A progress bar, which `transformers.utils.logging.disable_progress_bar` switches off."""
        description = f"{self.name} {description.lower()}" if self.name else description
        return logging.tqdm(iterable, desc=description, leave=False, disable=not self._show_progress)


def stack_arrays(arrays: Sequence[Any]) -> torch.Tensor:
    """Arrays, tensors or nested lists of one shape; half precision stays, lists of numbers become fp32."""
    if isinstance(arrays[0], torch.Tensor):
        stacked = torch.stack(list(arrays))
    else:  # stacked by numpy, as torch warns of read-only arrays, such as mapped files
        stacked = torch.from_numpy(np.stack([np.asarray(array) for array in arrays]))
    return stacked.float() if stacked.dtype == torch.float64 else stacked


def missing_column(column: str, field_name: str, names: Iterable[str]) -> str:
    known = ", ".join(map(repr, names)) or "none"
    return f"There is no column {column!r} (`{field_name}`), only {known}. Name yours with `{field_name}=`."


def unwrap(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside DDP, FSDP, DeepSpeed, `torch.compile` and PEFT."""
    while True:
        for name in ("module", "_orig_mod"):
            if isinstance(getattr(model, name, None), nn.Module):
                model = getattr(model, name)
                break
        else:
            return model.get_base_model() if hasattr(model, "get_base_model") else model


__all__ = ["CocaEvaluator", "missing_column", "stack_arrays", "unwrap"]
