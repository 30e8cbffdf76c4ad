"""Image features of a frozen encoder, computed once, on as many CPU cores as there are, and kept in one file.

Why it is fast: each core works alone on small batches (no barrier to wait at, activations stay in the cache), pictures
are decoded on the same threads, convolutions are channels-last, and batch norms are folded into them.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
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
from encoder import IMAGE_MEAN, IMAGE_STD, encode, optimize_for_cpu
from PIL import Image
from tqdm.auto import tqdm
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Augmentation:
    """How far a view may stray from the picture. There is no flip (some captions say "facing right"), and colours stay
    (captions name them, and skin tones).

    Attributes:
        scale: Smallest and largest zoom.
        shift: Largest move along each axis, in picture widths.
        rotate: Largest rotation, in degrees.
    """

    scale: tuple[float, float] = (0.85, 1.1)
    shift: float = 0.06
    rotate: float = 8.0


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


# Features


def compute_features(
    dataset: Dataset,
    vision_model: PreTrainedModel,
    image_size: int,
    views: int,
    seed: int,
    out_path: str | os.PathLike[str],
    feature_layers: list[int] | None = None,
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
        feature_layers: See `CocaConfig.vision_feature_layers`.
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
        "settings": [image_size, feature_layers, views, seed if views > 1 else None, list(image_mean), list(image_std)],
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
        return (pixels - mean) / std

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
        tokens = encode(model, pixel_values.to(vision_model.device), feature_layers).to("cpu", torch.float16).numpy()
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
            example = torch.zeros(1, 3, image_size, image_size, device=vision_model.device)
            shape = encode(model, example, feature_layers).shape[1:]
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
