"""`Trainer` with CoCa's two losses in the log, its temperature clamp and its weight-decay groups."""

import contextlib
import copy
import inspect
import json
import math
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_pt_utils import find_batch_size
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, has_length, sort_checkpoints
from transformers.utils import logging

from ..evaluation.evaluator import CocaEvaluator, unwrap
from ..saving import new_file, new_files, told_if_full
from .averaging import EmaCallback
from .data_collator import CocaDataCollator

logger = logging.get_logger(__name__)

# What weight decay should not pull to 0: positions, class tokens and learned queries, here and in other encoders
_NO_DECAY = re.compile(
    r"(^|[._])(pos_embed|position_embeddings?|embed_positions|class_embedding|cls_token|reg_tokens?|mask_token)(\.|$)"
    r"|\.query$"  # but not a projection, "query.weight"
)
_COMPONENTS = ("contrastive_loss", "caption_loss")


def is_complete(checkpoint: str | os.PathLike) -> bool:
    """Whether a checkpoint's last file is there and whole; its writing may have been cut off by a kill or a full disk."""
    try:
        json.loads(Path(checkpoint, TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def last_checkpoint(folder: str | os.PathLike) -> str | None:
    """
    The latest complete checkpoint of an output folder: `transformers.trainer_utils.get_last_checkpoint` takes the latest,
    and would go on from half of one.

    Args:
        folder (`str`): need not exist.

    Example:

    ```python
    >>> from modeling_coca.training import last_checkpoint

    >>> trainer.train(resume_from_checkpoint=last_checkpoint("output"))  # doctest: +SKIP
    ```
    """
    for path in reversed(sort_checkpoints(os.fspath(folder))):
        if is_complete(path):
            return path
        logger.warning(f"{path} is not complete, as the run that wrote it was killed: it is passed over.")
    return None


class ClampLogitScaleCallback(TrainerCallback):
    """
    Keeps `logit_scale` in `[0, ln(maximum)]` after each optimiser step, as open_clip does: a temperature that goes to 0
    makes training diverge. [`CocaTrainer`] has it; a plain `Trainer` takes it by
    `callbacks=[ClampLogitScaleCallback()]`.

    Args:
        maximum (`float`, defaults to 100): of `exp(logit_scale)`.
    """

    def __init__(self, maximum: float = 100.0):
        self.maximum = maximum

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        with torch.no_grad(), _logit_scales(model) as logit_scales:
            for logit_scale in logit_scales:
                logit_scale.clamp_(0, math.log(self.maximum))


class _SetEpochCallback(TrainerCallback):
    """Tells a [`CocaDataCollator`] the epoch, so that its random captions are the same after an interruption."""

    def __init__(self, data_collator: CocaDataCollator):
        self.data_collator = data_collator

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.data_collator.set_epoch(int(state.epoch or 0))


class CocaTrainer(Trainer):
    """
    `Trainer` for [`CocaForConditionalGeneration`]. What it adds:

    - **log**: `contrastive_loss`, `caption_loss` (means since the last log over all micro-batches and processes, as
      `loss` is, and without their weights: `loss` is their weighted sum), `temperature` (`exp(-logit_scale)`) and
      `samples_per_second` (images and texts of all processes, evaluations left out). Evaluation gives
      `eval_contrastive_loss` and `eval_caption_loss`;
    - **evaluators** of `modeling_coca.evaluation` among the callbacks: their figures are logged with the evaluation;
    - `logit_scale` is clamped, see [`ClampLogitScaleCallback`];
    - **weight decay** on matrices only: not on norms, biases and other vectors, the temperature, positions, class
      tokens and queries;
    - **model card** of `modeling_coca.hub.training_card`;
    - with a [`CocaDataCollator`], raw columns are kept, captions are chosen reproducibly, and evaluation takes the
      first;
    - `dataloader_drop_last` leaves no row out of an evaluation.

    A plain `Trainer` trains the same model to the same weights, but for the clamp and the decay groups.

    Under DDP, FSDP2 and ZeRO both losses, in training, are those of the joined batch of all processes: each image meets
    the texts of all of them. In evaluation they are means over batches of `per_device_eval_batch_size`.

    Args:
        model, args, data_collator, **kwargs:
            Of `Trainer`. Without a `data_collator`, a processor given as `processing_class` makes a
            [`CocaDataCollator`].
        contrastive_chunk_size (`int`, *optional*):
            Train on large batches in little memory: `per_device_train_batch_size` rows make one contrastive batch, and
            the network runs on so many of them at a time (GradCache, arXiv 2101.06983). Losses and gradients, those of
            the captioning loss too, are the whole batch's; a step runs the forward pass twice. Unlike it, gradient
            accumulation gives no image more texts to tell apart.

    Example:

    ```python
    >>> from transformers import TrainingArguments
    >>> from modeling_coca.training import CocaDataCollator, CocaTrainer, freeze

    >>> freeze(model, "vision_model")  # doctest: +SKIP
    >>> trainer = CocaTrainer(  # doctest: +SKIP
    ...     model=model,
    ...     args=TrainingArguments("output", per_device_train_batch_size=128, learning_rate=1e-3, weight_decay=0.1),
    ...     data_collator=CocaDataCollator(processor, text_column="caption"),
    ...     train_dataset=dataset["train"],
    ...     eval_dataset=dataset["validation"],
    ... )
    >>> trainer.train()  # doctest: +SKIP
    ```
    """

    def __init__(self, model=None, args=None, data_collator=None, *, contrastive_chunk_size=None, **kwargs):
        if data_collator is None and hasattr(kwargs.get("processing_class"), "image_processor"):
            data_collator = CocaDataCollator(kwargs["processing_class"])
        super().__init__(model, args, data_collator, **kwargs)
        if self.args.label_smoothing_factor:
            raise ValueError(
                "`label_smoothing_factor` makes `Trainer` compute the loss from the logits alone, without the "
                "contrastive half: leave it at 0."
            )
        if contrastive_chunk_size is not None:
            if contrastive_chunk_size < 1:
                raise ValueError(f"`contrastive_chunk_size` must be at least 1, got {contrastive_chunk_size}.")
            if not _takes(self.model, "contrastive_chunk_size"):
                raise ValueError(
                    "`contrastive_chunk_size` needs a `CocaForConditionalGeneration`. For the contrastive loss alone, set "
                    "its `config.caption_loss_weight = 0`."
                )
        self.contrastive_chunk_size = contrastive_chunk_size
        if isinstance(self.data_collator, CocaDataCollator):
            self.args.remove_unused_columns = False
            self.add_callback(_SetEpochCallback(self.data_collator))
        self.add_callback(ClampLogitScaleCallback())
        self._train_losses, self._eval_losses = _LossMeans(), _LossMeans()
        self._clock = _Clock()

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        batch_size = self.args.train_batch_size * self.args.world_size
        filled_up = has_length(self.train_dataset) and len(self.train_dataset) % batch_size != 0
        if (
            filled_up
            and self.args.world_size > 1
            and not self.args.dataloader_drop_last
            and self.is_world_process_zero()
            and _is_contrastive(self.model)
        ):
            logger.warning(
                f"{len(self.train_dataset)} rows make no whole number of batches of {batch_size}, so the last one of an epoch is "
                "filled up with rows of the first: a row may then meet its own copy in the contrastive loss. "
                "`dataloader_drop_last=True` leaves it out, and leaves evaluation whole."
            )
        self._train_losses, self._clock = _LossMeans(), _Clock()
        if isinstance(resume_from_checkpoint, bool) and resume_from_checkpoint:
            resume_from_checkpoint = last_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(f"There is no complete checkpoint in {self.args.output_dir}.")
        return super().train(resume_from_checkpoint, *args, **kwargs)

    # --------------------------------------------------------------------------------------------------- checkpoints

    def _save_checkpoint(self, model, trial):
        """`Trainer`'s writes `trainer_state.json` last, then deletes older checkpoints: all else must be there before."""
        folder = Path(self._get_output_dir(trial=trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        if self.args.should_save:
            if folder.is_dir() and not is_complete(folder):  # of a run that was killed
                shutil.rmtree(folder)
            folder.mkdir(parents=True, exist_ok=True)
        self.accelerator.wait_for_everyone()
        try:
            with told_if_full(folder):
                if self.is_world_process_zero():
                    for callback in self.callback_handler.callbacks:
                        if isinstance(callback, EmaCallback):
                            callback.save(folder)
                super()._save_checkpoint(model, trial)
        except Exception:
            if self.args.should_save and not is_complete(folder):
                shutil.rmtree(folder, ignore_errors=True)  # makes room, too
            raise

    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()  # each process has written its own

    def _save(self, output_dir=None, state_dict=None):
        """Each file is the old one or the new one."""
        output_dir = output_dir if output_dir is not None else self.args.output_dir
        if not self.args.should_save:
            super()._save(output_dir, state_dict)
            return
        with new_files(output_dir) as temporary:
            if (card := Path(output_dir, "README.md")).is_file():
                shutil.copyfile(card, temporary / card.name)  # PEFT adds to it
            super()._save(os.fspath(temporary), state_dict)

    def save_state(self):
        if self.is_world_process_zero():
            with new_file(Path(self.args.output_dir, TRAINER_STATE_NAME)) as temporary:
                self.state.save_to_json(os.fspath(temporary))

    # -------------------------------------------------------------------------------------------------- weight decay

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Names of the parameters that weight decay applies to: matrices and kernels, token embeddings included."""
        # ZeRO-3 keeps parameters flat, and their shape aside
        dimensions = {name: len(getattr(p, "ds_shape", p.shape)) for name, p in model.named_parameters()}
        names = super().get_decay_parameter_names(model)
        return [name for name in names if dimensions.get(name, 0) > 1 and not _NO_DECAY.search(name)]

    # --------------------------------------------------------------------------------------------------------- card

    def create_model_card(self, **kwargs) -> None:
        """`Trainer.create_model_card` in the form of `modeling_coca.hub.training_card`, with its arguments."""
        from ..hub import training_card

        if self.is_world_process_zero():
            training_card(self, **kwargs).save(os.path.join(self.args.output_dir, "README.md"))

    # ------------------------------------------------------------------------------------------------------- logging

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if model.training and self.contrastive_chunk_size is not None:
            inputs = {**inputs, "contrastive_chunk_size": self.contrastive_chunk_size}
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        losses = _losses_of(outputs)
        if model.training:
            self._clock.count(find_batch_size(inputs) or 0)
            # Weighted as the Trainer weighs `loss`: by micro-batches of a step, which the last of an epoch may have
            # less of
            self._train_losses.add(losses, 1 / self.current_gradient_accumulation_steps)
        else:
            self._last_losses = losses
        return (loss, outputs) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        self._last_losses = {}
        output = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys=ignore_keys)
        for name, value in self._last_losses.items():
            # As the evaluation loop does with `loss`: once an example, those that fill up the last batch left out
            values = self.gather_function(value.repeat(self.args.eval_batch_size))
            self._eval_losses.add({name: values.sum()}, values.numel(), is_sum=True)
        return output

    def evaluation_loop(self, dataloader, description, *args, metric_key_prefix="eval", **kwargs):
        self._eval_losses.pop()
        output = super().evaluation_loop(dataloader, description, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        metrics = {name: value.item() for name, value in self._eval_losses.pop().items()}
        if description == "Evaluation":
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, CocaEvaluator):
                    metrics.update(callback(self.model, self.is_local_process_zero(), shared=True))
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        return output

    def evaluate(self, *args, **kwargs):
        with self._clock.paused():
            return super().evaluate(*args, **kwargs)

    def get_eval_dataloader(self, eval_dataset=None):
        with self._for_evaluation():
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset):
        with self._for_evaluation():
            return super().get_test_dataloader(test_dataset)

    @contextlib.contextmanager
    def _for_evaluation(self) -> Iterator[None]:
        """First captions, and all rows: `dataloader_drop_last` is meant for training."""
        data_collator, drop_last = self.data_collator, self.args.dataloader_drop_last
        if isinstance(data_collator, CocaDataCollator):
            self.data_collator = copy.copy(data_collator)
            self.data_collator.caption_choice = "first"
        self.args.dataloader_drop_last = False
        try:
            yield
        finally:
            self.data_collator, self.args.dataloader_drop_last = data_collator, drop_last

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the losses, temperature and speed to what is logged in training. All processes call it together."""
        if "loss" in logs:
            sums = {name: self.accelerator.reduce(value, "mean") for name, value in self._train_losses.pop().items()}
            logs.update({name: value.item() for name, value in sums.items()})
            with _logit_scales(self.model) as logit_scales:
                for logit_scale in logit_scales:
                    logs["temperature"] = math.exp(-_whole(logit_scale.detach()).item())
            logs["samples_per_second"] = round(self._clock.pop_rate() * self.args.world_size, 3)
        super().log(logs, start_time)


def _takes(model: nn.Module, argument: str) -> bool:
    """Whether a forward in a model takes an argument."""
    return any(argument in inspect.signature(module.forward).parameters for module in model.modules())


def _is_contrastive(model: nn.Module) -> bool:
    if _takes(model, "contrastive_chunk_size"):
        return unwrap(model).config.contrastive_loss_weight > 0
    return hasattr(unwrap(model), "logit_scale")  # `CocaModel`


def _losses_of(outputs: Any) -> dict[str, torch.Tensor]:
    """Both losses of a model's output, those that it has. `DataParallel` gives one value a device."""
    if not isinstance(outputs, Mapping):
        return {}
    return {name: outputs[name].detach().float().mean() for name in _COMPONENTS if outputs.get(name) is not None}


class _LossMeans:
    """Weighted means of the losses since they were last asked for. They stay on the device until then."""

    def __init__(self):
        self.pop()

    def add(self, losses: Mapping[str, torch.Tensor], weight: float, is_sum: bool = False) -> None:
        for name, value in losses.items():
            total, weights = self._sums.get(name, (0.0, 0.0))
            self._sums[name] = (total + (value if is_sum else value * weight), weights + weight)

    def pop(self) -> dict[str, torch.Tensor]:
        means = {name: total / weights for name, (total, weights) in getattr(self, "_sums", {}).items()}
        self._sums: dict[str, tuple[torch.Tensor | float, float]] = {}
        return means


class _Clock:
    """Samples per second since it was last asked, without the time spent in `paused`."""

    def __init__(self):
        self._start, self._samples = None, 0

    def count(self, samples: int) -> None:
        if self._start is None:
            self._start = time.perf_counter()
        self._samples += samples

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        if self._start is not None:
            self._start += time.perf_counter() - began

    def pop_rate(self) -> float:
        now = time.perf_counter()
        rate = self._samples / max(now - self._start, 1e-9) if self._samples else 0.0
        self._start, self._samples = now, 0
        return rate


@contextlib.contextmanager
def _logit_scales(model: nn.Module) -> Iterator[list[nn.Parameter]]:
    """The model's `logit_scale`, whatever is wrapped around it; under ZeRO-3 gathered, and scattered again."""
    found = [parameter for name, parameter in model.named_parameters() if name.split(".")[-1] == "logit_scale"]
    if any(hasattr(parameter, "ds_id") for parameter in found):
        import deepspeed

        with deepspeed.zero.GatheredParameters(found, modifier_rank=0):
            yield found
    else:
        yield found


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor that FSDP2 has sharded."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


__all__ = ["ClampLogitScaleCallback", "CocaTrainer", "last_checkpoint"]
