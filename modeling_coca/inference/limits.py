"""How far files from others may go: how much memory they may take, and which other files they may name."""

import os
from collections.abc import Sequence

from PIL import Image

MAX_VALUE_BYTES = 2**28  # an encoded image, or a text beside it, in a tar shard
MAX_ROW_GROUP_BYTES = 2**32  # the columns that are read of a Parquet file's row group


def check_image(image: Image.Image) -> None:
    """
    Refuses an image by its header: one that is too large to decode, and one that Pillow would have another program draw.

    Raises:
        ValueError: with the reason.
    """
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:
        raise ValueError(
            f"{image.width} x {image.height} pixels are more than the {limit:,} of `PIL.Image.MAX_IMAGE_PIXELS`: a large "
            "JPEG can be read with `fast_decode`, another image after raising the limit"
        )
    if image.format == "EPS":
        raise ValueError("EPS is a program that Ghostscript would run: convert the image to PNG")


def check_inside(path: str | os.PathLike, roots: Sequence[str | os.PathLike]) -> None:
    """
    Refuses a path that leads out of all of some folders, by `..`, as an absolute path or by a link, and what is no plain file.

    Raises:
        ValueError: it leads elsewhere, or to a device, a pipe or the like.
    """
    if not is_inside(path, roots):
        raise ValueError(
            f"{os.fspath(path)} leads out of {os.fspath(roots[0]) if roots else 'the data'}: say by `image_root` which folder "
            "the images are in"
        )
    check_plain(path)


def is_inside(path: str | os.PathLike, roots: Sequence[str | os.PathLike]) -> bool:
    """Whether a path, with its links followed, lies below one of some folders."""
    real = os.path.realpath(path)
    return any(real.startswith(os.path.join(os.path.realpath(root), "")) for root in roots)


def check_plain(path: str | os.PathLike) -> None:
    """Refuses what is there and no file: a pipe would be waited for, a device never ends."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError(f"{os.fspath(path)} is no plain file")


__all__ = ["MAX_ROW_GROUP_BYTES", "MAX_VALUE_BYTES", "check_image", "check_inside", "check_plain", "is_inside"]
