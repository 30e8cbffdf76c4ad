"""Training with `transformers.Trainer`: data, collator, trainer, frozen parts and their features, averages of weights.

`modeling_coca.training.recipe` holds what the scripts in `examples/` share.
"""

import importlib
from typing import Any

from .averaging import EmaCallback, interpolate
from .data_collator import CocaDataCollator
from .freezing import ParameterCount, count_parameters, freeze, freeze_unused, unfreeze
from .trainer import ClampLogitScaleCallback, CocaTrainer, last_checkpoint

# These need `datasets`, which the rest does without
_WITH_DATASETS = {
    "FeatureDataset": "features",
    "FrozenFeatures": "features",
    "ImageAugmentation": "data",
    "SkippedImages": "data",
    "augment": "data",
    "caption_variants": "data",
    "compute_features": "features",
    "load_data": "data",
}

__all__ = [
    "ClampLogitScaleCallback",
    "CocaDataCollator",
    "CocaTrainer",
    "EmaCallback",
    "FeatureDataset",
    "FrozenFeatures",
    "ImageAugmentation",
    "ParameterCount",
    "SkippedImages",
    "augment",
    "caption_variants",
    "compute_features",
    "count_parameters",
    "freeze",
    "freeze_unused",
    "interpolate",
    "last_checkpoint",
    "load_data",
    "unfreeze",
]


def __getattr__(name: str) -> Any:
    if name not in _WITH_DATASETS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_WITH_DATASETS[name]}", __name__), name)
