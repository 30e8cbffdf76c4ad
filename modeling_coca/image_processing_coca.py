"""CoCa's image processor on torchvision: tensors on any device."""

from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import ChannelDimension, SizeDict
from transformers.processing_utils import Unpack
from transformers.utils import TensorType, is_torchvision_available, requires_backends

from .image_processing_pil_coca import (
    CocaImageProcessorKwargs,
    CocaImageProcessorMixin,
    crop_box,
    resize_and_crop,
    resized_size,
    to_channels_first,
)

if is_torchvision_available():
    from torchvision.transforms.v2 import functional as tvF


class CocaImageProcessor(CocaImageProcessorMixin, TorchvisionBackend):
    """Resizes, crops and normalises images; the default backend, with the settings of `CocaImageProcessorPil`.

    PIL images are resized and cropped by PIL, so they come out as with open_clip's transform, exactly. Arrays and
    tensors go through torchvision, on `device` if one is given: several times faster, and one 8-bit step (0.015
    normalised) away from PIL on photographs. `AutoImageProcessor.from_pretrained(path, backend="pil")` loads the other
    class from the same files.

    Example:

    ```python
    >>> import torch
    >>> from modeling_coca import CocaImageProcessor

    >>> processor = CocaImageProcessor(size=64)
    >>> images = torch.randint(0, 256, (4, 3, 80, 100), dtype=torch.uint8)
    >>> processor(images, return_tensors="pt")["pixel_values"].shape  # [B, C, H, W]
    torch.Size([4, 3, 64, 64])
    ```
    """

    def __init__(self, **kwargs: Unpack[CocaImageProcessorKwargs]):
        requires_backends(self, ["torchvision"])
        super().__init__(**kwargs)

    def process_image(
        self,
        image: Any,
        do_convert_rgb: bool | None = None,
        input_data_format: str | ChannelDimension | None = None,
        device: "str | torch.device | None" = None,
        do_resize: bool | None = None,
        size: SizeDict | None = None,
        do_center_crop: bool | None = None,
        crop_size: SizeDict | None = None,
        resample: Any = None,
        resize_mode: str = "shortest",
        fill_color: int = 0,
        **kwargs,
    ) -> torch.Tensor:
        """Does everything up to the conversion to RGB, which must come after the resize; returns `[C, H, W]`."""
        size = size if do_resize else None
        crop_size = crop_size if do_center_crop else None
        fill_color = fill_color or 0
        if isinstance(image, np.ndarray):
            image = torch.from_numpy(image if image.flags.c_contiguous and image.flags.writeable else image.copy())
        if isinstance(image, torch.Tensor):
            image = to_channels_first(image, input_data_format)
            if image.dtype == torch.bool:
                image = image.to(torch.uint8) * 255
            elif not image.is_floating_point():
                image = image.to(torch.uint8)
            elif image.shape[0] == 4:
                image = image[:3]  # alpha is dropped, as by PIL
            if image.shape[0] == 4:  # colours under alpha must be weighted by it while resizing, which PIL does
                image = Image.fromarray(image.permute(1, 2, 0).cpu().contiguous().numpy())
        if isinstance(image, Image.Image):
            image = resize_and_crop(image, size, crop_size, resample, resize_mode, fill_color)
            size = crop_size = None
            array = np.array(image.convert("RGB") if do_convert_rgb and image.mode != "L" else image)
            image = torch.from_numpy(array[None] if array.ndim == 2 else np.moveaxis(array, -1, 0))
        if device is not None:
            image = image.to(device)
        if size is not None:
            height, width = resized_size(*image.shape[-2:], size, resize_mode)
            image = self.resize(image, SizeDict(height=height, width=width), resample=resample)
        if crop_size is not None:
            image = self.center_crop(image, crop_size, fill_color=fill_color)
        return image.expand(3, -1, -1) if do_convert_rgb and image.shape[0] == 1 else image

    def center_crop(self, image: torch.Tensor, size: SizeDict, fill_color: int = 0, **kwargs) -> torch.Tensor:
        """Crops `[..., H, W]` at the centre, padding what is smaller, with open_clip's rounding of odd margins."""
        top, bottom, y = crop_box(image.shape[-2], size.height)
        left, right, x = crop_box(image.shape[-1], size.width)
        if top or bottom or left or right:
            image = tvF.pad(image, [left, top, right, bottom], fill=fill_color)
        return image[..., y : y + size.height, x : x + size.width]

    def rescale_and_normalize(
        self,
        images: torch.Tensor,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: float | list[float],
        image_std: float | list[float],
    ) -> torch.Tensor:
        """Scales and normalises `[..., C, H, W]` in float32, step by step as open_clip does; the base class fuses them."""
        images = images.float()
        if do_rescale:
            images = images / 255 if rescale_factor == 1 / 255 else images * rescale_factor
        return self.normalize(images, image_mean, image_std) if do_normalize else images

    def _preprocess(
        self,
        images: list[torch.Tensor],
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
        # One operation for the batch: after the crop images are of one shape, unless the caller turned the crop off.
        if len({image.shape for image in images}) == 1:
            images = [torch.stack(images)]
        settings = (do_rescale, rescale_factor, do_normalize, image_mean, image_std)
        images = [self.rescale_and_normalize(image, *settings) for image in images]
        if images[0].ndim == 4:
            images = list(images[0])
        if do_pad:
            images = self.pad(images, pad_size=pad_size)
        return BatchFeature(data={"pixel_values": images}, tensor_type=return_tensors)


__all__ = ["CocaImageProcessor"]
