"""Freezing parts of a model by name."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.utils import logging

logger = logging.get_logger(__name__)

# What PEFT, DDP and torch.compile put before a name, and the "model." before the parts of `CocaModel`
_WRAPPERS = {"base_model", "model", "module", "_orig_mod"}


class ParameterCount(NamedTuple):
    """Numbers of parameters that are trained and that are not."""

    trainable: int
    frozen: int


def count_parameters(model: nn.Module) -> ParameterCount:
    """Counts parameters, each once however many modules share it."""
    counts = {True: 0, False: 0}
    for parameter in model.parameters():
        counts[parameter.requires_grad] += parameter.numel()
    return ParameterCount(counts[True], counts[False])


def freeze(model: nn.Module, *parts: str) -> ParameterCount:
    """
    Stops the training of parts of a model: no gradients, and evaluation mode for good (no dropout, fixed running
    statistics), which later calls of `model.train()` leave as it is.

    It is a property of the model in memory: call it again after `from_pretrained`. Call it before the model is given to
    DDP, FSDP or an optimizer; [`CocaTrainer`] and `Trainer` do that in `train()`.

    Args:
        model (`nn.Module`): a CoCa model, or a PEFT model around one.
        parts (`str`):
            Names of submodules or parameters: `"vision_model"`, `"image_pooler"`, `"text_model"`, `"text_decoder"`,
            `"lm_head"`, `"logit_scale"`, or with dots, as `"vision_model.layers.0"`. The `"model."` that
            [`CocaForConditionalGeneration`] has before the parts of [`CocaModel`] can be left out.

    Returns:
        [`ParameterCount`]: `trainable` and `frozen` parameters of the whole model.

    Example:

    ```python
    >>> from modeling_coca import CocaConfig, CocaForConditionalGeneration
    >>> from modeling_coca.training import freeze, unfreeze

    >>> small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    >>> model = CocaForConditionalGeneration(
    ...     CocaConfig(
    ...         vision_config={**small, "image_size": 36},
    ...         text_config={
    ...             **small, "num_multimodal_layers": 1, "vocab_size": 99, "bos_token_id": 1, "eos_token_id": 2
    ...         },
    ...         num_query_tokens=4, projection_dim=8,
    ...     )
    ... )
    >>> freeze(model, "vision_model").frozen == model.model.vision_model.num_parameters()
    True
    >>> model.train().model.vision_model.training
    False
    >>> unfreeze(model, "vision_model").frozen
    0
    ```
    """
    _refuse_ddp(model)
    for target in _find(model, parts):
        target.requires_grad_(False)
        if isinstance(target, nn.Module):
            target.eval()
            for module in target.modules():
                module.is_frozen = True
    return count_parameters(model)


def unfreeze(model: nn.Module, *parts: str) -> ParameterCount:
    """
    Undoes [`freeze`] for parts of a model. A part of a frozen part works too: the last layers of a frozen encoder, say.

    Args:
        model (`nn.Module`): see [`freeze`].
        parts (`str`): see [`freeze`].

    Returns:
        [`ParameterCount`]: `trainable` and `frozen` parameters of the whole model.
    """
    _refuse_ddp(model)
    for target in _find(model, parts):
        target.requires_grad_(True)
        if not isinstance(target, nn.Module):
            continue
        for module in target.modules():
            module.is_frozen = False
        # `eval()` of a frozen module reaches all below it, so those above may no longer count as frozen as a whole
        for module in model.modules():
            if getattr(module, "is_frozen", False) and any(child is target for child in module.modules()):
                module.is_frozen = False
        target.train(model.training)
    return count_parameters(model)


def freeze_unused(model: nn.Module, inputs: Mapping[str, Any]) -> list[str]:
    """
    Freezes the parameters that get no gradient from the loss, which DDP refuses unless it is told to look for them.

    There are such parameters when a loss weight is 0 (projections and [CLS], or the whole decoder), when features of a
    frozen encoder are given instead of images, and in encoders with a head of their own. One forward and backward pass
    tells, for any encoder and any weights.

    Args:
        model (`nn.Module`): a model whose output has a `loss`.
        inputs (`Mapping[str, Any]`): a batch of training, of any size; from `CocaDataCollator`, say.

    Returns:
        `list[str]`: names of the parameters that were frozen.

    Example:

    ```python
    >>> import torch
    >>> from modeling_coca import CocaConfig, CocaForConditionalGeneration
    >>> from modeling_coca.training import freeze_unused

    >>> small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    >>> model = CocaForConditionalGeneration(
    ...     CocaConfig(
    ...         vision_config={**small, "image_size": 36},
    ...         text_config={
    ...             **small, "num_multimodal_layers": 1, "vocab_size": 99, "bos_token_id": 1, "eos_token_id": 2
    ...         },
    ...         num_query_tokens=4, projection_dim=8, contrastive_loss_weight=0,
    ...     )
    ... )
    >>> input_ids = torch.tensor([[1, 5, 6, 2]])
    >>> batch = {"input_ids": input_ids, "labels": input_ids, "pixel_values": torch.zeros(1, 3, 36, 36)}
    >>> [name for name in freeze_unused(model, batch) if "pooler" not in name and "text_model" not in name]
    ['model.logit_scale', 'model.visual_projection.weight', 'model.text_projection.weight']
    ```
    """
    _refuse_ddp(model)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    device = next(model.parameters()).device
    inputs = {name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in inputs.items()}
    training = [module for module in model.modules() if module.training]
    model.eval()  # running statistics must not see this batch; what gets a gradient is the same
    try:
        with torch.enable_grad():
            loss = model(**inputs).loss
        if loss is None:
            raise ValueError(
                f"The model gave no loss for {', '.join(inputs)}: `inputs` need `labels` or `return_loss`."
            )
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    finally:
        for module in training:
            module.training = True
    unused = [name for name, gradient in zip(parameters, gradients, strict=True) if gradient is None]
    for name in unused:
        parameters[name].requires_grad_(False)
    if unused:
        logger.info(f"Frozen, as the loss does not depend on them: {', '.join(unused)}.")
    return unused


def _refuse_ddp(model: nn.Module) -> None:
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise ValueError("DDP fixes what is trained when it wraps a model: freeze `model.module` before that.")


def _find(model: nn.Module, parts: tuple[str, ...]) -> Iterator[nn.Module | nn.Parameter]:
    """The modules and parameters called `parts`; all are found before the first is changed."""
    found = {}
    for targets in (model.named_parameters(remove_duplicate=False), model.named_modules(remove_duplicate=False)):
        for name, target in targets:
            path = name.split(".")
            while path:  # every name that the target goes by without its wrappers
                found.setdefault(".".join(path), target)
                if path[0] not in _WRAPPERS:
                    break
                path = path[1:]
    missing = [part for part in parts if part not in found]
    if missing:
        known = [name for name in found if name and "." not in name and name not in _WRAPPERS]
        raise ValueError(
            f"{type(model).__name__} has no part {', '.join(map(repr, missing))}. It has {', '.join(known)}, and what "
            "is in them, as in 'text_model.layers.0'."
        )
    return iter([found[part] for part in parts])


__all__ = ["ParameterCount", "count_parameters", "freeze", "freeze_unused", "unfreeze"]
