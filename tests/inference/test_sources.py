"""Every kind of source gives the same images, in order, with ids and kept columns; what cannot be read says why."""

import io
import json
import logging
import os
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, DatasetDict, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

from modeling_coca import CocaProcessor
from modeling_coca.inference import ImageLoader, open_images
from modeling_coca.inference.loading import open_image


@pytest.fixture(scope="module")
def processor(model_folder):
    return CocaProcessor.from_pretrained(model_folder)


@pytest.fixture(scope="module")
def paths(photos):
    return sorted(str(path) for path in photos.rglob("*.*"))


@pytest.fixture(scope="module")
def pixels(processor, paths):
    """What the processor makes of the files themselves."""
    return processor(images=paths, return_tensors="pt")["pixel_values"]


def write_tar(path, members):
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def make_source(kind, paths, folder):
    """One source of each kind, with the files' numbers as captions; what to pass and the options of `open_images`."""
    contents = [open(path, "rb").read() for path in paths]
    captions = [f"number {i}" for i in range(len(paths))]
    if kind == "csv":
        lines = ["file_name,caption", *(f"{path},{caption}" for path, caption in zip(paths, captions, strict=True))]
        (folder / "list.csv").write_text("\n".join(lines))
        return folder / "list.csv", {"image_root": os.path.commonpath(paths)}
    if kind == "jsonl":
        rows = [json.dumps({"path": path, "caption": c}) for path, c in zip(paths, captions, strict=True)]
        (folder / "list.jsonl").write_text("\n".join(rows))
        return folder / "list.jsonl", {"image_root": os.path.commonpath(paths)}
    if kind == "parquet of bytes":
        pq.write_table(pa.table({"jpg": contents, "caption": captions}), folder / "set.parquet", row_group_size=5)
        return folder / "set.parquet", {"shard_size": 3}
    if kind == "parquet of paths":
        pq.write_table(pa.table({"where": paths, "caption": captions}), folder / "set.parquet")
        options = {"image_column": "where", "id_column": "where", "image_root": os.path.commonpath(paths)}
        return str(folder / "set.parquet"), options
    if kind == "tar":
        for number, part in enumerate((slice(0, 7), slice(7, None))):
            members = []
            for name, data, caption in zip(paths[part], contents[part], captions[part], strict=True):
                members += [(name.rsplit("/")[-1], data), (name.rsplit("/")[-1][:2] + ".caption", caption.encode())]
            write_tar(folder / f"shard-{number:03d}.tar", members)
        return str(folder / "shard-{000..001}.tar"), {}
    images = [{"bytes": data, "path": None} for data in contents]
    features = Features({"picture": ImageFeature(), "caption": Value("string")})
    dataset = Dataset.from_dict({"picture": images, "caption": captions}, features=features)
    if kind == "dataset":
        return dataset, {"shard_size": 5}
    DatasetDict({"train": dataset.select(range(2)), "test": dataset}).save_to_disk(folder / "saved")
    return folder / "saved", {"split": "test"}


KINDS = ["csv", "jsonl", "parquet of bytes", "parquet of paths", "tar", "dataset", "saved dataset"]


@pytest.mark.parametrize("kind", KINDS)
def test_sources_give_the_same_images(kind, paths, pixels, processor, tmp_path):
    source, options = make_source(kind, paths, tmp_path)
    shards = open_images(source, keep=["caption"], **options)
    batches = list(ImageLoader(shards, processor.image_processor, batch_size=4))
    assert torch.equal(torch.cat([batch.pixel_values for batch in batches]), pixels)
    assert [kept["caption"] for batch in batches for kept in batch.kept] == [f"number {i}" for i in range(12)]
    ids = [ref.id for batch in batches for ref in batch.refs]
    assert len(set(ids)) == 12
    if kind in ("csv", "jsonl", "parquet of paths"):
        assert ids == paths
    assert not any(batch.errors for batch in batches)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_workers_take_shards_of_their_own_and_lose_nothing(num_workers, photos, paths, pixels, processor):
    shards = open_images(photos, shard_size=5)
    seen, shards_in_turn = {}, []
    for batch in ImageLoader(shards, processor.image_processor, batch_size=2, num_workers=num_workers):
        shards_in_turn.append(batch.refs[0].shard)
        for ref, row in zip(batch.refs, batch.pixel_values, strict=True):
            seen[ref.id] = row
    assert shards_in_turn == ([0, 0, 0, 1, 1, 2] if num_workers == 0 else [0, 1, 0, 1, 0, 1, 2])
    assert sorted(seen) == paths
    assert all(torch.equal(seen[path], row) for path, row in zip(paths, pixels, strict=True))


def test_files_globs_and_images_in_memory(photos, paths, pixels, processor):
    def load(images):
        batches = list(ImageLoader(open_images(images), processor.image_processor))
        return [ref.id for batch in batches for ref in batch.refs], torch.cat([b.pixel_values for b in batches])

    ids, _ = load(f"{photos}/*.png")
    assert ids == [path for path in paths if path.endswith(".png") and "more" not in path]
    ids, values = load([paths[3], str(photos / "more")])
    assert ids == [paths[3], *paths[10:]] and torch.equal(values, pixels[[3, 10, 11]])
    ids, values = load([Image.open(path).convert("RGB") for path in paths[:2]])
    assert ids == ["0", "1"] and torch.equal(values, pixels[:2])
    array = np.asarray(Image.open(paths[0]))
    ids, values = load([array])
    assert torch.equal(values, processor(images=[array], return_tensors="pt")["pixel_values"])


def test_photos_stand_upright(processor, tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    image.save(tmp_path / "turned.png", exif=exif)
    (batch,) = ImageLoader(open_images(tmp_path), processor.image_processor)
    upright = processor(images=[image.transpose(Image.Transpose.ROTATE_270)], return_tensors="pt")["pixel_values"]
    assert torch.equal(batch.pixel_values, upright)
    assert torch.equal(
        batch.pixel_values, processor(images=str(tmp_path / "turned.png"), return_tensors="pt")["pixel_values"]
    )


def test_large_jpegs_can_be_decoded_at_a_fraction_of_their_size(processor, tmp_path):
    smooth = np.random.default_rng(0).integers(0, 256, (8, 10, 3), dtype=np.uint8)
    photo = Image.fromarray(smooth).resize((1000, 800), Image.Resampling.BICUBIC)
    photo.save(tmp_path / "a.jpg", quality=95)
    photo.save(tmp_path / "b.png")
    size = max(dict(processor.image_processor.size).values())
    assert open_image(str(tmp_path / "a.jpg"), 2 * size).size == (125, 100)  # an eighth, as 2 * 32 pixels fit in
    assert open_image(str(tmp_path / "a.jpg"), 150).size == (250, 200)
    assert open_image(str(tmp_path / "b.png"), 2 * size).size == (1000, 800)
    (plain,), (fast,) = (
        ImageLoader(open_images(tmp_path / "a.jpg"), processor.image_processor, fast_decode=fast)
        for fast in (False, True)
    )
    difference = (plain.pixel_values - fast.pixel_values).abs()
    assert 0 < difference.max() < 0.15 and difference.mean() < 0.02  # of values from -1.8 to 2.2


def test_unreadable_images_have_a_reason_and_the_others_go_on(photos, paths, pixels, processor, tmp_path):
    (tmp_path / "cut.jpg").write_bytes(open(paths[1], "rb").read()[:200])
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty.png").write_bytes(b"")
    bad = [tmp_path / "cut.jpg", tmp_path / "text.png", tmp_path / "empty.png", tmp_path / "gone.png", "http://x/y.jpg"]
    (tmp_path / "list.csv").write_text("\n".join(["path", paths[0], *map(str, bad), paths[2]]))
    shards = open_images(tmp_path / "list.csv", image_root=tmp_path.parent)
    (batch,) = ImageLoader(shards, processor.image_processor)
    assert [ref.id for ref in batch.refs] == [paths[0], paths[2]] and torch.equal(batch.pixel_values, pixels[[0, 2]])
    reasons = {ref.id.rsplit("/")[-1]: reason for ref, reason in batch.errors}
    assert "truncated" in reasons["cut.jpg"].lower()
    assert reasons["text.png"] == reasons["empty.png"] == "no image format that Pillow knows"
    assert "No such file" in reasons["gone.png"]
    assert "download it first" in reasons["y.jpg"]
    odd = [np.zeros((0, 3, 3), dtype=np.uint8), np.full((4, 4, 3), 300), np.zeros((9, 9, 3), dtype=np.uint8), "none"]
    (batch,) = ImageLoader(open_images([odd[0], odd[1], odd[2]]), processor.image_processor)
    assert [ref.id for ref in batch.refs] == ["2"] and [ref.id for ref, _ in batch.errors] == ["0", "1"]
    assert "from 0 to 255" in batch.errors[1][1]


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("nowhere/at.all.png", {}, "no file or folder nowhere/at.all.png"),
        ("nowhere/*.png", {}, "No file matches"),
        ("{tmp}/empty", {}, "no images, tar shards or Parquet files"),
        ("{tmp}/list.csv", {"image_column": "picture"}, "no column 'picture', only where, caption"),
        ("{tmp}/list.csv", {}, "name the column of the images by `image_column`, of where, caption"),
        ("{tmp}/hole.csv", {}, "row 2 has no image"),
        ("{tmp}/saved", {}, "has several splits: choose one by `split`, of train, test"),
        ("{tmp}/saved", {"split": "dev"}, "has no split 'dev'"),
        ("{tmp}/bad.parquet", {}, "is no Parquet file"),
        ([], {}, "no images in"),
    ],
)
def test_errors_say_what_to_do(source, options, message, paths, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "list.csv").write_text("where,caption\na.png,b")
    (tmp_path / "hole.csv").write_text("path,x\na.png,1\n,2")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 but not really PAR1")
    make_source("saved dataset", paths, tmp_path)
    source = source.format(tmp=tmp_path) if isinstance(source, str) else source
    with pytest.raises((OSError, ValueError), match=message):
        open_images(source, **options)


def test_bad_tars_cost_their_own_images_only(paths, pixels, processor, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    source, _ = make_source("tar", paths, tmp_path)
    data = (tmp_path / "shard-000.tar").read_bytes()
    (tmp_path / "shard-000.tar").write_bytes(data[: len(data) // 2])
    (tmp_path / "shard-002.tar").write_bytes(b"no tar" * 200)
    shards = open_images(source.replace("001", "002"))
    batches = list(ImageLoader(shards, processor.image_processor))
    assert "shard-000.tar was cut off" in caplog.text
    assert torch.equal(torch.cat([batch.pixel_values for batch in batches])[-5:], pixels[-5:])
    failed = {ref.id.rsplit("/")[-1]: reason for batch in batches for ref, reason in batch.errors}
    assert len(failed) == 2 and "no uncompressed tar file" in failed["shard-002.tar"]
