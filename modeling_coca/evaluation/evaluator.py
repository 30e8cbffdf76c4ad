"""What all evaluators share: running a model over a data set, alone or within a training."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, ProcessorMixin, TrainerCallback
from transformers.utils import logging

from ..loss_coca import data_group

logger = logging.get_logger(__name__)


class CocaEvaluator(TrainerCallback):
    """
    A callable that runs a model over a data set and returns a flat dict of floats.

    It is a callback, too: after `trainer.add_callback(evaluator)` each evaluation of a `Trainer` has its figures, as
    `eval_*`, for `metric_for_best_model` and in `state.log_history`. [`CocaTrainer`] sends them to TensorBoard and the
    like as well. There each process takes its share of the batches, and all get the figures of the whole set, which are those
    of one process.

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
        self._group = self._fsdp_root = None  # for the time of a call
        if not len(dataset):
            raise ValueError("`dataset` is empty: there is nothing to evaluate.")
        if name:
            self.primary_metric = f"{name}_{self.primary_metric}"

    def compute(self, model: PreTrainedModel) -> dict[str, float]:
        """Figures by name; the model is in evaluation mode and needs no gradients."""
        raise NotImplementedError

    def __call__(self, model: nn.Module, show_progress: bool = True, shared: bool = False) -> dict[str, float]:
        """
        Args:
            model (`nn.Module`):
                The model, bare or in DDP, FSDP2, DeepSpeed, PEFT or `torch.compile`. Its modes are restored afterwards.
            show_progress (`bool`): show progress bars, unless they are switched off in transformers.
            shared (`bool`):
                Divide the batches among the processes of `torch.distributed`, all of which must call this together. By default
                a process computes all of it. With sharded weights all processes must call this in either case, and they write
                texts together, each the same: a layer runs when all run it.

        Returns:
            `dict[str, float]`: figures by name.
        """
        if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
            raise ValueError("Evaluators do not run under FSDP1: set `fsdp_version: 2` in accelerate's config.")
        training = [module for module in model.modules() if module.training]
        model.eval()
        self._show_progress = show_progress
        inner = unwrap(model)
        self._group = data_group(inner) if shared else None
        self._fsdp_root = next(iter(_fsdp_modules(model)), None)
        try:
            with torch.no_grad():
                figures = self.compute(inner)
        finally:
            for module in training:
                module.training = True
            for module in _fsdp_modules(model):  # some keep their weights whole for a backward pass to come
                module.reshard()
            self._group = self._fsdp_root = None
        prefix = f"{self.name}_" if self.name else ""
        return {prefix + key: float(value) for key, value in figures.items()}

    def on_evaluate(self, args, state, control, model=None, metrics=None, **kwargs):
        if metrics is None or f"eval_{self.primary_metric}" in metrics:  # `CocaTrainer` has asked before it logged
            return
        figures = {f"eval_{key}": v for key, v in self(model, state.is_local_process_zero, shared=True).items()}
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
        """`pixel_values` or `image_hidden_states` of this process's batches, see `batches`, on the model's device."""
        dataset = self.dataset if dataset is None else dataset
        loader = DataLoader(
            dataset,
            batch_sampler=self.batches(len(dataset)),
            num_workers=self.num_workers,
            collate_fn=self._prepare_images,
        )
        for batch in self.progress(loader, description):
            yield {name: value.to(model.device, model.dtype) for name, value in batch.items()}

    def batches(self, rows: int) -> list[range]:
        """
        Numbers of the rows of this process's batches: of all, or every so many-th in a shared evaluation.

        All processes have equally many batches, as their layers may have to run together: some take the last one, too, which
        `gather` leaves out.
        """
        batches = [range(start, min(start + self.batch_size, rows)) for start in range(0, rows, self.batch_size)]
        if self._group is None:
            return batches
        rank, processes = dist.get_rank(self._group), dist.get_world_size(self._group)
        return [batches[min(i + rank, len(batches) - 1)] for i in range(0, len(batches), processes)]

    def gather(self, parts: Sequence[torch.Tensor] | Sequence[list[str]], rows: int) -> torch.Tensor | list[str]:
        """What all processes have made of their batches, in order: tensors `(rows, ...)`, or texts."""
        is_tensor = isinstance(parts[0], torch.Tensor)
        if self._group is None:
            return torch.cat(parts) if is_tensor else [text for texts in parts for text in texts]
        processes = dist.get_world_size(self._group)
        if is_tensor:  # only the last batch of all is short, so that what fills it up comes last
            part = torch.stack([_fill(part, self.batch_size) for part in parts])
            gathered = [torch.empty_like(part) for _ in range(processes)]
            dist.all_gather(gathered, part, group=self._group)
            return torch.stack(gathered, dim=1).flatten(0, 2)[:rows]
        gathered = [None] * processes
        dist.all_gather_object(gathered, list(parts), group=self._group)
        return [text for batches in zip(*gathered, strict=True) for texts in batches for text in texts][:rows]

    def as_forward(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """
        A function that runs the model otherwise than by calling it, so that it finds its weights whole under FSDP2, too, which
        gathers those outside of the layers when the outermost module is called.
        """
        root = self._fsdp_root
        if root is None:
            return function
        from torch.distributed.fsdp import register_fsdp_forward_method

        root.evaluator_function = function
        register_fsdp_forward_method(root, "evaluator_function")
        registered = root.evaluator_function
        del root.evaluator_function
        return registered

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
        dataset = self.dataset if dataset is None else dataset
        encode = self.as_forward(lambda **batch: model.base_model.get_image_features(**batch).pooler_output)
        embeds = [encode(**batch) for batch in self.image_batches(model, "Images", dataset)]
        return F.normalize(self.gather(embeds, len(dataset)).float(), dim=-1)

    def encode_texts(self, model: PreTrainedModel, texts: Sequence[str]) -> torch.Tensor:
        """L2-normalised embeddings (texts, projection_dim) in fp32."""
        tokenizer = self.processor.tokenizer
        encode = self.as_forward(lambda **batch: model.base_model.get_text_features(**batch).pooler_output)
        embeds: list[torch.Tensor] = []
        for numbers in self.progress(self.batches(len(texts)), "Texts"):
            batch = [texts[i] for i in numbers]
            inputs = tokenizer(batch, padding=True, truncation=self.truncation, return_tensors="pt").to(model.device)
            embeds.append(encode(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]))
        return F.normalize(self.gather(embeds, len(texts)).float(), dim=-1)

    def generate(
        self, model: PreTrainedModel, description: str, prompts: Sequence[str] | None = None, **kwargs: Any
    ) -> list[str]:
        """What the model writes for each image, after its prompt if there are prompts; those are not part of it."""
        if not hasattr(model, "text_decoder"):
            raise ValueError(
                f"{type(self).__name__} needs a model that writes, a CocaForConditionalGeneration, not "
                f"{type(model).__name__}."
            )
        if _is_sharded(model):
            # Texts end after different numbers of steps, and each step needs all processes
            self._group = None
        generate = self.as_forward(model.generate)
        parts: list[list[str]] = []
        batches = self.batches(len(self.dataset))
        for numbers, batch in zip(batches, self.image_batches(model, description), strict=True):
            if prompts is not None:
                some = self._prompt([prompts[i] for i in numbers])
                batch.update({name: value.to(model.device) for name, value in some.items()})
            prompt_length = batch["input_ids"].shape[1] if prompts is not None else 0
            sequences = generate(**batch, **kwargs)
            texts = self.processor.tokenizer.batch_decode(sequences[:, prompt_length:], skip_special_tokens=True)
            parts.append([text.strip() for text in texts])
        return self.gather(parts, len(self.dataset))

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


def _fill(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    return torch.cat([tensor, tensor.new_zeros(rows - len(tensor), *tensor.shape[1:])])


def _fsdp_modules(model: nn.Module) -> list[nn.Module]:
    """The modules that FSDP2 has sharded, the outermost one first."""
    if not dist.is_available():
        return []
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def _is_sharded(model: nn.Module) -> bool:
    """Whether layers gather their weights from other processes, by FSDP2 or ZeRO-3."""
    return bool(_fsdp_modules(model)) or any(hasattr(parameter, "ds_id") for parameter in model.parameters())


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
