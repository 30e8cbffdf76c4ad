"""Averages of weights: between two models (WiSE-FT), and along a training (EMA)."""

import copy
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers import PreTrainedModel, TrainerCallback
from transformers.utils import logging

from ..saving import new_file

logger = logging.get_logger(__name__)

_EMA_FILE = "ema.safetensors"


def interpolate(original: PreTrainedModel, finetuned: PreTrainedModel, alpha: float) -> PreTrainedModel:
    """
    Weights between those of a model and of the same model after fine-tuning, `(1 - alpha) * original + alpha *
    finetuned` (WiSE-FT, arXiv 2109.01903): often as good on the new data, with most of what the old model knew.

    Try several values of `alpha` on held-out data of both; no training is needed. It works as far as fine-tuning has
    stayed near its start: with a small learning rate and the same tokenizer.

    Args:
        original (`PreTrainedModel`): the model before, left as it is.
        finetuned (`PreTrainedModel`): the model after, left as it is. Merge adapters of PEFT into it beforehand.
        alpha (`float`): 0 is the original, 1 the fine-tuned model.

    Returns:
        `PreTrainedModel`: a new model with the fine-tuned one's config.

    Raises:
        ValueError: the two have different parameters.

    Example:

    ```python
    >>> import copy
    >>> import torch
    >>> from modeling_coca import CocaModel, CocaConfig
    >>> from modeling_coca.training import interpolate

    >>> small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    >>> config = CocaConfig(
    ...     vision_config={**small, "image_size": 36},
    ...     text_config={**small, "num_multimodal_layers": 1, "vocab_size": 9, "bos_token_id": 1, "eos_token_id": 2},
    ...     num_query_tokens=4, projection_dim=8,
    ... )
    >>> before = CocaModel(config)
    >>> after = copy.deepcopy(before)
    >>> _ = torch.nn.init.constant_(after.logit_scale, 4.0)
    >>> between = interpolate(before, after, 0.5)
    >>> round(between.logit_scale.item(), 3)  # half way between ln(1 / 0.07) and 4
    3.33
    ```
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"`alpha` must lie in [0, 1], got {alpha}.")
    before, after = original.state_dict(), finetuned.state_dict()
    if different := sorted(set(before) ^ set(after)):
        raise ValueError(
            f"The two models have different parameters, such as {different[0]!r}: `interpolate` takes a model and the same "
            "model after fine-tuning, with PEFT's adapters merged by `merge_and_unload()`."
        )
    if reshaped := [name for name in before if before[name].shape != after[name].shape]:
        raise ValueError(
            f"{reshaped[0]!r} has shape {tuple(before[reshaped[0]].shape)} before and {tuple(after[reshaped[0]].shape)} "
            "after: `interpolate` takes a model and the same model after fine-tuning."
        )
    model = copy.deepcopy(finetuned)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if value.is_floating_point():  # from `after`, as a shared tensor comes twice here
                value.copy_(torch.lerp(before[name].to(after[name]), after[name], alpha))
    return model


class EmaCallback(TrainerCallback):
    """
    Keeps an exponential moving average of the trained parameters, and puts it into the model when training ends.
    Evaluations in between see the raw weights. Checkpoints hold the average, so that a resumed training goes on with it.

    Args:
        decay (`float`, defaults to 0.999):
            Share of the old average that is kept at each optimiser step, `min(decay, (1 + step) / (10 + step))`, so that
            the start is soon forgotten.

    Example:

    ```python
    >>> from modeling_coca.training import EmaCallback

    >>> trainer.add_callback(EmaCallback(0.999))  # doctest: +SKIP
    ```
    """

    def __init__(self, decay: float = 0.999):
        if not 0 <= decay < 1:
            raise ValueError(f"`decay` must lie in [0, 1), got {decay}.")
        self.decay = decay
        self._averages: dict[str, torch.Tensor] = {}

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if args.load_best_model_at_end:
            raise ValueError(
                "`EmaCallback` ends with the average of the weights and `load_best_model_at_end` with those of a checkpoint: "
                "leave out one of the two."
            )
        parameters = _trained(model)
        if any(hasattr(p, "ds_id") or hasattr(p, "full_tensor") for p in parameters.values()):
            raise ValueError("`EmaCallback` needs whole parameters: it works with DDP, not with FSDP or ZeRO-3.")
        saved = Path(args.output_dir) / f"checkpoint-{state.global_step}" / _EMA_FILE
        if state.global_step and saved.is_file():
            loaded = load_file(saved)
            self._averages = {name: loaded[name].to(p.device) for name, p in parameters.items()}
        else:
            if state.global_step:
                logger.warning(f"There is no {saved}: the moving average starts anew.")
            self._averages = {name: p.detach().clone() for name, p in parameters.items()}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        decay = min(self.decay, (1 + state.global_step) / (10 + state.global_step))
        current = [p.detach() for p in _trained(model).values()]
        get_ema_multi_avg_fn(decay)(list(self._averages.values()), current, state.global_step)

    def on_save(self, args, state, control, **kwargs):
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir() and not (folder / _EMA_FILE).exists():
            self.save(folder)

    def save(self, folder: Path) -> None:
        """Into a checkpoint. [`CocaTrainer`] calls it before the checkpoint counts as complete."""
        with new_file(folder / _EMA_FILE) as temporary:
            save_file({name: value.contiguous() for name, value in self._averages.items()}, temporary)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        with torch.no_grad():
            for name, parameter in _trained(model).items():
                parameter.copy_(self._averages[name])


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


__all__ = ["EmaCallback", "interpolate"]
