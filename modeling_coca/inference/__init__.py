"""Bulk work on images with a trained model: what the `coca` command does, as functions.

Sources of images, their loading by workers, and captions in an output that can be resumed.
"""

from .captioning import CocaCaptioner, caption_images
from .embedding import CocaEmbedder, embed_images
from .journal import read_rows
from .loading import ImageBatch, ImageLoader, ImageRef, load_for_inference
from .mapping import map_images
from .sources import ImageShard, RowShard, open_images

__all__ = [
    "CocaCaptioner",
    "CocaEmbedder",
    "ImageBatch",
    "ImageLoader",
    "ImageRef",
    "ImageShard",
    "RowShard",
    "caption_images",
    "embed_images",
    "load_for_inference",
    "map_images",
    "open_images",
    "read_rows",
]
