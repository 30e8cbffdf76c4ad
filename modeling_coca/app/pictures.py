"""Pictures that come in from the browser, bounded, and pictures that go out to it."""

import base64
import io
from pathlib import Path

import gradio as gr
from gradio.data_classes import ImageData
from PIL import Image, ImageOps

from modeling_coca.inference.limits import check_inside
from modeling_coca.inference.loading import open_image, reason_of

# What browsers and cameras make. Pillow knows many more, some of which start other programs; old ones know no AVIF.
Image.init()
FORMATS = [name for name in ("AVIF", "BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP") if name in Image.OPEN]


def bound_uploads(component: gr.Image, max_pixels: int) -> gr.Image:
    """
    Has an image component give what was uploaded as an upright RGB `PIL.Image`, or an error in words. The name of the file
    is not used.

    The instance is changed, as gradio writes a file next to the source of a subclass.
    """
    move = component.async_move_resource_to_block_cache

    async def move_upload(path: str | Path | None) -> str | None:
        if "://" in str(path):  # gradio would fetch it
            raise gr.Error("Upload the picture itself, not its address.", print_exception=False)
        return await move(path)

    def preprocess(payload: ImageData | None) -> Image.Image | None:
        if payload is None:
            return None
        if payload.path is None:  # a data URL, which no bound on files holds for
            raise gr.Error("Upload the picture as a file.", print_exception=False)
        try:
            return open_upload(payload.path, max_pixels)
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from None

    component.async_move_resource_to_block_cache, component.preprocess = move_upload, preprocess
    return component


def open_upload(path: str | Path, max_pixels: int) -> Image.Image:
    """
    Args:
        path: of an image file.
        max_pixels (`int`): width times height.

    Raises:
        `ValueError`: in words for whoever uploaded it.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > max_pixels:
                raise ValueError(
                    f"This picture has {image.width} × {image.height} pixels. Make it smaller: "
                    f"{max_pixels / 1e6:g} million pixels in all are the most that this page takes."
                )
            return ImageOps.exif_transpose(image).convert("RGB")
    except Image.UnidentifiedImageError:
        raise ValueError(
            "This file is no picture that can be read. Use a JPEG, PNG, WebP, GIF, AVIF, BMP or TIFF file."
        ) from None
    except Image.DecompressionBombError:  # Pillow's own bound
        raise ValueError("This picture has far too many pixels. Make it smaller.") from None
    except (OSError, SyntaxError, EOFError) as error:  # Pillow's decoders raise all of these
        raise ValueError(f"This picture is damaged: {reason_of(error)}.") from None


def thumbnail(path: str, root: str, size: int = 360) -> Image.Image | None:
    """A small copy of one of the server's own images, or `None` where there is none in the folder `root` that can be read."""
    try:
        check_inside(path, [root])
        image = open_image(path, at_least=2 * size)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None
    image.thumbnail((size, size), Image.Resampling.LANCZOS)
    return image


def data_url(image: Image.Image) -> str:
    """An image within the page itself, so that no file of it need be served."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


__all__ = ["bound_uploads", "data_url", "open_upload", "thumbnail"]
