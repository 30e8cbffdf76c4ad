"""Bulk work on images with a trained model: what the `coca` command does, as functions.

Sources of images, their loading by workers, and captions in an output that can be resumed.
"""

from .captioning import CocaCaptioner, caption_images
from .journal import read_rows
from .loading import ImageBatch, ImageLoader, ImageRef, load_for_inference
from .sources import ImageShard, open_images

__all__ = [
    "CocaCaptioner",
    "ImageBatch",
    "ImageLoader",
    "ImageRef",
    "ImageShard",
    "caption_images",
    "load_for_inference",
    "open_images",
    "read_rows",
]
