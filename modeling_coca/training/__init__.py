"""Training with `transformers.Trainer`: collator, trainer, and freezing by name of part."""

from .data_collator import CocaDataCollator
from .freezing import ParameterCount, count_parameters, freeze, freeze_unused, unfreeze
from .trainer import ClampLogitScaleCallback, CocaTrainer

__all__ = [
    "ClampLogitScaleCallback",
    "CocaDataCollator",
    "CocaTrainer",
    "ParameterCount",
    "count_parameters",
    "freeze",
    "freeze_unused",
    "unfreeze",
]
