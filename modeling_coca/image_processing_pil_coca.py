"""CoCa's image processor on PIL: open_clip's evaluation transform bit for bit. Also what both backends share."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import (
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
    ChannelDimension,
    PILImageResampling,
    SizeDict,
    infer_channel_dimension_format,
    load_image,
)
from transformers.processing_utils import ImagesKwargs, Unpack
from transformers.utils import TensorType, logging

logger = logging.get_logger(__name__)

_RESIZE_MODES = ("shortest", "longest", "squash")
_MAX_RESIZED_PIXELS = 2**26  # 270 MB in PIL; only an image a thousand times as long as wide gets there


class CocaImageProcessorKwargs(ImagesKwargs, total=False):
    """
    resize_mode (`str`, *optional*, defaults to `"shortest"`):
        open_clip's: `"shortest"` resizes to cover `size`, keeping the aspect ratio (the crop removes the rest),
        `"longest"` to fit inside `size` (the crop pads the rest), `"squash"` to `size` exactly.
    fill_color (`int`, *optional*, defaults to 0):
        What the crop pads with, from 0 to 255, before normalisation.
    """

    resize_mode: str | None
    fill_color: int | None


def to_eight_bits(image: Image.Image) -> Image.Image:
    """Brings greyscale of more than 8 bits to 8; images of other modes stay as they are.

    16 bits are scaled, 65535 to 255. PIL's `convert`, and with it open_clip, makes white of all that is above 255.

    Raises:
        ValueError: 32-bit values, which have no agreed scale, are not from 0 to 255.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):  # the latter before Pillow 11
        return Image.fromarray(((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8))
    if image.mode in ("I", "F") and 0 not in image.size:
        values = np.asarray(image)
        low, high = float(values.min()), float(values.max())
        if not (0 <= low and high <= 255) or (image.mode == "F" and 0 < high <= 1):
            raise ValueError(
                f"values of an image of mode {image.mode!r} must be from 0 to 255, but these are from {low:g} to {high:g}: "
                "scale them and convert the image to 'L'."
            )
    return image


def load_rgb(source: Any, timeout: float | None = None) -> Image.Image:
    """Opens a path, URL or base64 string, as RGB and upright by its EXIF tag; does the same to a PIL image.

    transformers' `load_image`, which clips greyscale of 16 bits: here that is scaled, except from a URL or base64.

    Args:
        source: What to open.
        timeout: Seconds to wait for a URL.

    Raises:
        ValueError: with the name of the image, and the reason.
    """
    if isinstance(source, Image.Image):
        return to_eight_bits(ImageOps.exif_transpose(source)).convert("RGB")
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(f"expected a path, a URL, a base64 string or a PIL image, not {type(source).__name__}.")
    source = os.fspath(source)
    is_file = os.path.isfile(source)
    try:
        if not is_file:
            return load_image(source, timeout=timeout)
        with Image.open(source) as image:
            return load_rgb(image)
    except Exception as error:
        name = source if len(source) <= 200 else f"{source[:200]}..."
        reason = f"{error.__class__.__name__}: {error}".rstrip(".") if is_file else error.__class__.__name__
        hint = (
            "" if is_file else " A string must be a path, a URL or a base64 image; a text is to be passed as `text=`."
        )
        raise ValueError(f"The image {name!r} cannot be loaded ({reason}).{hint}") from error


def resized_size(height: int, width: int, size: SizeDict, resize_mode: str) -> tuple[int, int]:
    """Computes the size that an image has after resizing and before the crop.

    Args:
        height: Height of the image.
        width: Width of the image.
        size: The target: `height` and `width`, or `shortest_edge` for a square one.
        resize_mode: `"shortest"`, `"longest"` or `"squash"`.

    Returns:
        `(height, width)`, each at least 1.
    """
    edge = size.shortest_edge
    target_height, target_width = (edge, edge) if edge else (size.height, size.width)
    if resize_mode == "squash":
        return target_height, target_width
    # torchvision's rounding for a square target, open_clip's own for any other.
    if resize_mode == "shortest" and target_height == target_width:
        if width <= height:
            new_height, new_width = int(target_width * height / width), target_width
        else:
            new_height, new_width = target_height, int(target_height * width / height)
    else:
        ratios = height / target_height, width / target_width
        ratio = min(ratios) if resize_mode == "shortest" else max(ratios)
        new_height, new_width = max(1, round(height / ratio)), max(1, round(width / ratio))
    if new_height * new_width > _MAX_RESIZED_PIXELS:
        raise ValueError(
            f"an image of {width} x {height} pixels is too elongated for resize_mode={resize_mode!r}: it would become "
            f"{new_width} x {new_height}. Crop it first, or use resize_mode='longest'."
        )
    return new_height, new_width


def crop_box(length: int, target: int) -> tuple[int, int, int]:
    """Computes the centre crop along one axis.

    Args:
        length: Length of the image.
        target: Length of the crop.

    Returns:
        Padding before, padding after, and the crop's start in the padded image. An odd margin is halved to the even
        side, as by torchvision; transformers' own crop rounds down, one pixel away on every fourth margin.
    """
    before, after = max(0, target - length) // 2, (max(0, target - length) + 1) // 2
    return before, after, round((length + before + after - target) / 2)


def resize_and_crop(
    image: Image.Image,
    size: SizeDict | None,
    crop_size: SizeDict | None,
    resample: int,
    resize_mode: str,
    fill_color: int,
) -> Image.Image:
    """Resizes and centre-crops in the image's own mode, before any conversion, as open_clip does.

    PIL resizes palette and 1-bit images by nearest neighbour and premultiplies alpha, so the order shows.

    Args:
        image: An image of any mode.
        size: The target of the resize, `None` for no resize.
        crop_size: `height` and `width` of the crop, `None` for no crop.
        resample: PIL's filter.
        resize_mode: See [`CocaImageProcessorKwargs`].
        fill_color: Pads what is smaller than the crop.
    """
    if size is not None:
        height, width = resized_size(image.height, image.width, size, resize_mode)
        image = image.resize((width, height), resample)
    if crop_size is not None:
        top, bottom, y = crop_box(image.height, crop_size.height)
        left, right, x = crop_box(image.width, crop_size.width)
        if top or bottom or left or right:
            fill = (fill_color,) * len(image.getbands())
            palette = image.getpalette() if image.mode == "P" else None
            image = ImageOps.expand(image, (left, top, right, bottom), fill if len(fill) > 1 else fill_color)
            if palette is not None:
                image.putpalette(palette)
        image = image.crop((x, y, x + crop_size.width, y + crop_size.height))
    return image


class CocaImageProcessorMixin:
    """What CoCa's two image processors share: defaults, checks of the input, open_clip's settings."""

    valid_kwargs = CocaImageProcessorKwargs
    resample = PILImageResampling.BICUBIC
    image_mean = OPENAI_CLIP_MEAN
    image_std = OPENAI_CLIP_STD
    size = {"shortest_edge": 224}
    default_to_square = False
    crop_size = {"height": 224, "width": 224}
    do_resize = True
    do_center_crop = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True
    resize_mode = "shortest"
    fill_color = 0

    def __init__(self, **kwargs: Unpack[CocaImageProcessorKwargs]):
        super().__init__(**self._crop_to_size(kwargs))

    @classmethod
    def from_open_clip(cls, preprocess_cfg: dict[str, Any], **kwargs: Unpack[CocaImageProcessorKwargs]):
        """Builds the image processor for open_clip's `preprocess_cfg`.

        Args:
            preprocess_cfg: With any of `size`, `mean`, `std`, `interpolation`, `resize_mode`, `fill_color`, `mode`.
            kwargs: Overrides.

        Example:

        ```python
        >>> processor = CocaImageProcessorPil.from_open_clip({"size": 288, "resize_mode": "longest"})
        >>> dict(processor.crop_size)
        {'height': 288, 'width': 288}
        ```
        """
        config = {name: value for name, value in preprocess_cfg.items() if value is not None}
        size = config.get("size", 224)
        height, width = (size, size) if isinstance(size, int) else (size[-2], size[-1])
        settings = {
            "size": {"height": height, "width": width},
            "crop_size": {"height": height, "width": width},
            "resize_mode": config.get("resize_mode", "shortest"),
            "fill_color": config.get("fill_color", 0),
        }
        if height == width and settings["resize_mode"] == "shortest":
            settings["size"] = {"shortest_edge": height}
        # "random" is for training only, and open_clip's non-square "shortest" is bicubic whatever the setting.
        always_bicubic = height != width and settings["resize_mode"] == "shortest"
        if config.get("interpolation") == "bilinear" and not always_bicubic:
            settings["resample"] = PILImageResampling.BILINEAR
        for name, setting in (("mean", "image_mean"), ("std", "image_std")):
            if name in config:
                value = config[name]
                settings[setting] = list(value) if isinstance(value, Sequence) else [value] * 3
        return cls(**{**settings, **kwargs})

    def preprocess(self, images, *args, **kwargs: Unpack[CocaImageProcessorKwargs]) -> BatchFeature:
        """Prepares an image or a batch of images.

        Args:
            images: A PIL image, an array or tensor of shape `[H, W]`, `[H, W, C]` or `[C, H, W]` with values from 0 to
                255, a path, a URL, or a (nested) list of these; or an array or tensor with a leading batch axis. Of an
                animation the frame it stands at, the first of a file. Greyscale of 16 bits is scaled to 8.
            kwargs: Any setting, for this call. `crop_size` follows `size` if the two are equal in this processor.

        Returns:
            `pixel_values` of shape `[B, 3, H, W]` with `return_tensors="pt"`, else a list of `[3, H, W]`.
        """
        if self._edges(self.size) == self._edges(self.crop_size):
            kwargs = self._crop_to_size(kwargs)
        return super().preprocess(images, *args, **kwargs)

    @staticmethod
    def _edges(size: Any) -> tuple[int, int] | None:
        """Height and width that a `size` in any of its notations asks for."""
        if isinstance(size, SizeDict):
            size = dict(size)
        if isinstance(size, dict):
            size = size.get("shortest_edge") or (size.get("height"), size.get("width"))
        if isinstance(size, int):
            return size, size
        return tuple(size) if isinstance(size, (list, tuple)) and len(size) == 2 and None not in size else None

    def _crop_to_size(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Adds the `crop_size` that goes with a `size` given alone, so that `size=288` gives 288 x 288 pixels."""
        if kwargs.get("size") is not None and kwargs.get("crop_size") is None:
            if (edges := self._edges(kwargs["size"])) is not None:
                kwargs = {**kwargs, "crop_size": {"height": edges[0], "width": edges[1]}}
        return kwargs

    def _standardize_kwargs(self, **kwargs) -> dict[str, Any]:
        kwargs = super()._standardize_kwargs(**kwargs)
        if kwargs.get("resize_mode") not in _RESIZE_MODES:
            raise ValueError(f"resize_mode={kwargs.get('resize_mode')!r} is not one of {', '.join(_RESIZE_MODES)}.")
        for name, keys in (("size", ({"shortest_edge"}, {"height", "width"})), ("crop_size", ({"height", "width"},))):
            given = dict(kwargs[name] or {})
            if given and (set(given) not in keys or min(given.values()) < 1):
                allowed = " or ".join(" and ".join(map(repr, sorted(names))) for names in keys)
                raise ValueError(f"{name}={given} must hold {allowed}, positive.")
        if not 0 <= (kwargs.get("fill_color") or 0) <= 255:
            raise ValueError(f"fill_color={kwargs['fill_color']} must be from 0 to 255.")
        if isinstance(kwargs.get("resample"), int) and kwargs["resample"] not in list(PILImageResampling):
            raise ValueError(
                f"resample={kwargs['resample']} is none of PIL's filters, which are 0 to 5 (3 is bicubic)."
            )
        if kwargs.get("input_data_format") not in (None, *ChannelDimension):
            formats = " or ".join(repr(name.value) for name in ChannelDimension)
            raise ValueError(f"input_data_format={kwargs['input_data_format']!r} must be {formats}.")
        for name in ("image_mean", "image_std"):
            values = kwargs.get(name)
            if isinstance(values, tuple) and (len(values) != 3 and kwargs.get("do_convert_rgb")):
                raise ValueError(f"{name}={values} must have one value for each of the 3 channels.")
        deviations = kwargs.get("image_std")
        if deviations is not None and not np.all(np.asarray(deviations) > 0):
            raise ValueError(f"image_std={deviations} must be positive.")
        return kwargs

    def fetch_images(self, image_url_or_urls):
        """Loads paths and URLs, upright by their EXIF tag and as RGB; leaves images as they are.

        A PIL image is never turned, as in open_clip: call `ImageOps.exif_transpose` on a photo first if it needs it.
        """
        if isinstance(image_url_or_urls, (list, tuple)):
            return [self.fetch_images(item) for item in image_url_or_urls]
        if isinstance(image_url_or_urls, (str, os.PathLike)):
            return load_rgb(image_url_or_urls)
        return image_url_or_urls

    def _prepare_images_structure(self, images, expected_ndims: int = 3) -> list:
        """Flattens images, nested lists of images and batches into one list."""

        def flatten(item) -> list:
            if isinstance(item, (list, tuple)):
                return [image for part in item for image in flatten(part)]
            if isinstance(item, (np.ndarray, torch.Tensor)) and item.ndim == expected_ndims + 1:
                return list(item)
            return [item]

        images = flatten(self.fetch_images(images))
        if not images:
            raise ValueError("images is empty: pass at least one image.")
        return images

    def _prepare_image_like_inputs(self, images, *args, expected_ndims: int = 3, **kwargs) -> list:
        prepared = []
        for index, image in enumerate(self._prepare_images_structure(images, expected_ndims)):
            try:
                image = _checked(image, **{name: kwargs.get(name) for name in _SCALING})
                prepared.append(self.process_image(image, *args, **kwargs))
            except (TypeError, ValueError) as error:
                kind = TypeError if isinstance(error, TypeError) else ValueError
                raise kind(f"images[{index}]: {error}") from error
        return prepared


_SCALING = ("do_rescale", "rescale_factor", "do_normalize")


def _checked(image: Any, do_rescale: bool | None, rescale_factor: float | None, do_normalize: bool | None) -> Any:
    """The image, of at most 8 bits if it is PIL's. Refuses what would become garbage in `pixel_values`."""
    if isinstance(image, Image.Image):
        if 0 in image.size:
            raise ValueError(f"the image is empty ({image.width} x {image.height} pixels).")
        try:
            image.load()
        except Exception as error:  # PIL's decoders report bad files by many exceptions
            what = "" if isinstance(error, ValueError) else "the file is corrupt or truncated: "
            raise ValueError(f"{what}{error}") from error
        _warn_of_scale(0, 255, False, do_rescale, rescale_factor, do_normalize)
        return to_eight_bits(image)
    if not isinstance(image, (np.ndarray, torch.Tensor)):
        hint = ": open it by `PIL.Image.open(io.BytesIO(...))`" if isinstance(image, bytes) else ""
        raise TypeError(f"expected a PIL image, an array, a tensor, a path or a URL, not {type(image).__name__}{hint}.")
    if image.ndim not in (2, 3) or 0 in image.shape:
        raise ValueError(f"the shape {tuple(image.shape)} is not [H, W], [H, W, C] or [C, H, W] with pixels in it.")
    try:
        if isinstance(image, torch.Tensor):
            image = image.detach()
            floating = image.is_floating_point()
            values = image if floating or image.dtype == torch.uint8 else image.to(torch.int64)  # uint16 has no min()
            low, high = (float(value) for value in values.aminmax())  # NaN if there is one
        elif np.issubdtype(image.dtype, np.complexfloating):
            raise TypeError("its values are complex")
        else:
            floating = np.issubdtype(image.dtype, np.floating)
            low, high = float(image.min()), float(image.max())
    except (RuntimeError, TypeError) as error:  # objects, strings, float8, sparse or meta tensors
        reason = str(error).splitlines()[0].split(". ")[0]
        raise TypeError(
            f"an image of {image.dtype} values cannot be read ({reason}): make it uint8 or float32."
        ) from error
    if floating and not (np.isfinite(low) and np.isfinite(high)):
        raise ValueError("the image has values that are NaN or infinite.")
    if not floating and (low < 0 or high > 255):
        raise ValueError(f"integer values must be from 0 to 255, but these are from {low:.0f} to {high:.0f}.")
    is_mask = image.dtype in (bool, torch.bool)
    _warn_of_scale(low, 255 if is_mask else high, floating, do_rescale, rescale_factor, do_normalize)
    return image


def _warn_of_scale(
    low: float,
    high: float,
    floating: bool,
    do_rescale: bool | None,
    rescale_factor: float | None,
    do_normalize: bool | None,
) -> None:
    """Says so, once, where values do not look like what the settings take them for; near-black images pass for both."""
    if do_rescale:
        # Resized images go beyond 0 and 255 a little, normalised ones are within a few units of 0
        is_8_bit = -64 < low and high < 320 and not (low < 0 and high < 8) and not 0 < high <= 1
        if floating and rescale_factor == 1 / 255 and not is_8_bit:
            logger.warning_once(
                "An image of floats is about to be divided by 255, but its values are not from 0 to 255. Pass "
                "`do_rescale=False` if they are from 0 to 1, and `do_normalize=False` too if they are normalised."
            )
    elif do_normalize and not (-1 < low and high < 2):
        logger.warning_once(
            "With `do_rescale=False` an image must have values from 0 to 1 to be normalised, and this one has not. Leave "
            "`do_rescale` on, or pass `do_normalize=False` too."
        )


def to_channels_first(array: Any, input_data_format: str | ChannelDimension | None) -> Any:
    """Brings an array or tensor to `[C, H, W]`, C being 1, 3 or 4."""
    if array.ndim == 2:
        return array[None]
    if input_data_format is None:
        try:
            input_data_format = infer_channel_dimension_format(array, num_channels=(1, 3, 4))
        except ValueError:
            raise ValueError(f"the shape {tuple(array.shape)} has no axis of 1, 3 or 4 channels.") from None
    if input_data_format == ChannelDimension.LAST:
        array = array.permute(2, 0, 1) if isinstance(array, torch.Tensor) else np.moveaxis(array, -1, 0)
    if array.shape[0] not in (1, 3, 4):
        raise ValueError(
            f"input_data_format={str(input_data_format)!r} makes {array.shape[0]} channels, not 1, 3 or 4."
        )
    return array


class CocaImageProcessorPil(CocaImageProcessorMixin, PilBackend):
    """Resizes, crops and normalises images with PIL and NumPy, equal to open_clip's evaluation transform in every bit.

    The image is resized to `size` in its own mode, cropped at the centre to `crop_size`, made RGB (alpha is dropped),
    scaled to [0, 1] and normalised. `size=288` alone sets both sizes; `size={"height": 224, "width": 336}` is a target
    that is not square. Arrays of 8 bits are treated as the PIL image they make; arrays of floats are resized as
    floats, neither rounded nor clipped. EXIF orientation is not applied to PIL images, as in open_clip. Unlike there,
    greyscale of 16 bits is scaled to 8, not clipped to white.

    Example:

    ```python
    >>> import numpy as np
    >>> from PIL import Image
    >>> from modeling_coca import CocaImageProcessorPil

    >>> processor = CocaImageProcessorPil(size=288)
    >>> image = Image.fromarray(np.zeros((427, 640, 3), dtype=np.uint8))
    >>> processor([image, image], return_tensors="pt")["pixel_values"].shape  # [B, C, H, W]
    torch.Size([2, 3, 288, 288])
    ```
    """

    def process_image(
        self,
        image: Any,
        do_convert_rgb: bool | None = None,
        input_data_format: str | ChannelDimension | None = None,
        do_resize: bool | None = None,
        size: SizeDict | None = None,
        do_center_crop: bool | None = None,
        crop_size: SizeDict | None = None,
        resample: int | None = None,
        resize_mode: str = "shortest",
        fill_color: int = 0,
        **kwargs,
    ) -> np.ndarray:
        """Does everything up to the conversion to RGB, which must come after the resize; returns `[C, H, W]`."""
        geometry = {
            "size": size if do_resize else None,
            "crop_size": crop_size if do_center_crop else None,
            "resample": resample,
            "resize_mode": resize_mode,
            "fill_color": fill_color or 0,
        }
        if isinstance(image, torch.Tensor):
            image = image.detach().cpu()
            image = (image.float() if image.dtype == torch.bfloat16 else image).numpy()
        if isinstance(image, np.ndarray):
            image = to_channels_first(image, input_data_format)
            if np.issubdtype(image.dtype, np.floating):
                planes = [Image.fromarray(plane) for plane in image[:3].astype(np.float32)]
                array = np.stack([np.asarray(resize_and_crop(plane, **geometry)) for plane in planes])
                return np.repeat(array, 3, axis=0) if do_convert_rgb and len(array) == 1 else array
            image = image.astype(np.uint8) * (255 if image.dtype == bool else 1)
            image = Image.fromarray(image[0] if len(image) == 1 else np.ascontiguousarray(np.moveaxis(image, 0, -1)))
        image = resize_and_crop(image, **geometry)
        array = np.array(image.convert("RGB") if do_convert_rgb else image)
        return array[None] if array.ndim == 2 else np.moveaxis(array, -1, 0)

    def rescale(self, image: np.ndarray, scale: float, **kwargs) -> np.ndarray:
        """Scales pixels in float32; by 1/255 through a division, as multiplying is one rounding away from open_clip."""
        image = image.astype(np.float32)
        return image / np.float32(255) if scale == 1 / 255 else image * np.float32(scale)

    def normalize(self, image: np.ndarray, mean, std, **kwargs) -> np.ndarray:
        """Subtracts `mean` and divides by `std`, per channel, in float32."""
        mean, std = (np.asarray(value, dtype=np.float32).reshape(-1, 1, 1) for value in (mean, std))
        return (image.astype(np.float32) - mean) / std

    def _preprocess(
        self,
        images: list[np.ndarray],
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: float | list[float] | None,
        image_std: float | list[float] | None,
        do_pad: bool | None = None,
        pad_size: SizeDict | None = None,
        return_tensors: str | TensorType | None = None,
        **kwargs,
    ) -> BatchFeature:
        processed = []
        for image in images:
            if do_rescale:
                image = self.rescale(image, rescale_factor)
            if do_normalize:
                image = self.normalize(image, image_mean, image_std)
            processed.append(image)
        if do_pad:
            processed = self.pad(processed, pad_size=pad_size)
        return BatchFeature(data={"pixel_values": processed}, tensor_type=return_tensors)


__all__ = ["CocaImageProcessorPil"]
