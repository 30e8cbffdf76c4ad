"""Bulk work on images with a trained model: what the `coca` command does, as functions.

Sources of images, their loading by workers, and captions in an output that can be resumed.
"""

from .captioning import CocaCaptioner, ask_images, caption_images
from .classification import (
    CocaClassifier,
    calibration_error,
    classify_images,
    confusion_matrix,
    draw_confusion,
    evaluate_images,
    fit_calibration,
    read_classes,
)
from .embedding import CocaEmbedder, embed_images
from .journal import read_rows
from .loading import ImageBatch, ImageLoader, ImageRef, load_for_inference
from .mapping import map_images
from .sources import ImageShard, RowShard, open_images

__all__ = [
    "CocaCaptioner",
    "CocaClassifier",
    "CocaEmbedder",
    "ImageBatch",
    "ImageLoader",
    "ImageRef",
    "ImageShard",
    "RowShard",
    "ask_images",
    "calibration_error",
    "caption_images",
    "classify_images",
    "confusion_matrix",
    "draw_confusion",
    "embed_images",
    "evaluate_images",
    "fit_calibration",
    "load_for_inference",
    "map_images",
    "open_images",
    "read_classes",
    "read_rows",
]
