import io
import json
import os
import shutil
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from modeling_coca.training import (
    CocaDataCollator,
    ImageAugmentation,
    SkippedImages,
    augment,
    caption_variants,
    load_data,
)

EMOJI = Path(__file__).parents[1] / "fixtures" / "emoji"
ROWS = [json.loads(line) for line in (EMOJI / "train" / "metadata.jsonl").read_text().splitlines()]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")


@pytest.fixture
def folder(tmp_path):
    """The training pictures, one cut short and one that is no picture."""
    out = tmp_path / "pictures"
    shutil.copytree(EMOJI / "train", out)
    broken = out / ROWS[3]["file_name"]
    broken.write_bytes(broken.read_bytes()[:300])
    (out / ROWS[5]["file_name"]).write_bytes(b"<html>not found</html>")
    return out


def first_captions(rows):
    return [row["text"][0] for row in rows]


READABLE = first_captions(row for i, row in enumerate(ROWS) if i not in (3, 5))


def test_imagefolder():
    data = load_data(EMOJI)
    assert {split: len(rows) for split, rows in data.items()} == {"train": 16, "test": 8}
    row = data["train"][0]
    assert row["image"].size == (64, 64) and isinstance(row["text"], list)
    texts = {row["text"][0]: row["file_name"] for row in ROWS}
    for row in data["train"]:
        expected = Image.open(EMOJI / "train" / texts[row["text"][0]]).convert("RGB")
        np.testing.assert_array_equal(np.array(row["image"].convert("RGB")), np.array(expected))


def test_unreadable_images_are_left_out_counted_and_listed(folder, tmp_path):
    path = tmp_path / "out" / "skipped.jsonl"
    skipped = SkippedImages(path)
    data = load_data(folder, skipped=skipped)
    assert first_captions(data["train"]) == READABLE
    assert len(skipped) == 2
    listed = [json.loads(line) for line in path.read_text().splitlines()]
    assert listed == skipped.entries()
    assert [entry["image"].split("/")[-1] for entry in listed] == [ROWS[3]["file_name"], ROWS[5]["file_name"]]
    assert listed[0]["error"].startswith("OSError") and "UnidentifiedImageError" in listed[1]["error"]
    resumed = SkippedImages(path, resume=True)
    resumed.add(**listed[0])
    assert resumed.entries() == listed and len(path.read_text().splitlines()) == 2
    assert len(SkippedImages(path)) == 0
    with pytest.raises(ValueError, match="Not one image of 'train' \\(2 rows\\)"):
        load_data(data_files={"train": _csv(folder, [3, 5])}, image_column="picture")


def _csv(folder, indices, name="some.csv", separator=","):
    path = folder / name
    lines = [separator.join(["picture", "text"])]
    lines += [separator.join([ROWS[i]["file_name"], ROWS[i]["text"][0]]) for i in indices]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


@pytest.mark.parametrize(("name", "separator"), [("all.csv", ","), ("all.tsv", "\t")])
@pytest.mark.parametrize("streaming", [False, True])
def test_tables_of_paths_are_relative_to_their_folder(folder, name, separator, streaming):
    path = _csv(folder, range(16), name, separator)
    skipped = SkippedImages()
    options = {"image_column": "picture", "streaming": streaming, "shuffle_buffer": 0}
    rows = list(load_data(path, skipped=skipped, **options)["train"])
    assert [row["text"] for row in rows] == READABLE and len(skipped) == 2
    assert all(row["picture"].size == (64, 64) for row in rows)


@pytest.mark.parametrize("streaming", [False, True])
def test_parquet_and_json_and_saved_sets(folder, tmp_path, streaming):
    cells = [{"bytes": (folder / row["file_name"]).read_bytes(), "path": row["file_name"]} for row in ROWS]
    rows = datasets.Dataset.from_dict(
        {"image": cells, "text": [row["text"] for row in ROWS]},
        features=datasets.Features({"image": datasets.Image(), "text": datasets.List(datasets.Value("string"))}),
    )
    rows.to_parquet(tmp_path / "all.parquet")
    raw = rows.cast_column("image", datasets.Image(decode=False)).map(lambda row: {"image": row["image"]["bytes"]})
    raw.to_parquet(tmp_path / "raw.parquet")  # bytes alone, as other programs write them
    lines = [json.dumps({"image": row["file_name"], "text": row["text"]}) for row in ROWS]
    (folder / "all.jsonl").write_text("\n".join(lines))
    for path in (tmp_path / "all.parquet", tmp_path / "raw.parquet", folder / "all.jsonl"):
        skipped = SkippedImages()
        found = list(load_data(path, streaming=streaming, shuffle_buffer=0, skipped=skipped)["train"])
        assert first_captions(found) == READABLE and len(skipped) == 2
        assert found[0]["image"].size == (64, 64)
    rows.save_to_disk(tmp_path / "saved")
    if streaming:
        with pytest.raises(ValueError, match="leave out `streaming`"):
            load_data(tmp_path / "saved", streaming=True)
    else:
        assert first_captions(load_data(tmp_path / "saved")["train"]) == READABLE


@pytest.fixture
def shards(folder, tmp_path):
    """Four WebDataset shards."""
    for shard in range(4):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as tar:
            for i in range(shard, 16, 4):
                contents = {"png": (folder / ROWS[i]["file_name"]).read_bytes(), "txt": ROWS[i]["text"][0].encode()}
                for ending, content in contents.items():
                    member = tarfile.TarInfo(f"sample{i}.{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return str(tmp_path / "*.tar")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_shards_are_streamed_by_several_workers(shards, tmp_path, num_workers):
    skipped = SkippedImages(tmp_path / "skipped.jsonl")
    rows = load_data(data_files={"train": shards}, image_column="png", streaming=True, skipped=skipped)["train"]
    seen = []
    for epoch in range(2):
        rows.set_epoch(epoch)
        loader = DataLoader(rows, batch_size=2, num_workers=num_workers, collate_fn=list)
        seen.append([row["txt"] for batch in loader for row in batch])
        assert sorted(seen[-1]) == sorted(READABLE)  # each once, whoever reads it
    assert seen[0] != seen[1]  # shuffled anew
    assert sorted(entry["image"] for entry in skipped.entries()) == ["sample3.png", "sample5.png"]


def test_what_cannot_be_loaded_is_said(folder, tmp_path):
    with pytest.raises(ValueError, match="either `name`"):
        load_data()
    with pytest.raises(ValueError, match="one type of"):
        load_data(data_files={"train": ["a.csv", "b.parquet"]})
    with pytest.raises(ValueError, match=r"no column 'picture' \(`image_column`\), only 'image'"):
        load_data(folder, image_column="picture")


# Augmentation


def test_nothing_is_changed_by_default():
    assert not ImageAugmentation().is_active
    image = Image.open(EMOJI / "train" / ROWS[0]["file_name"]).convert("RGB")
    np.testing.assert_array_equal(np.array(ImageAugmentation()(image)), np.array(image))
    rows = [{"image": image}]
    assert augment(rows, ImageAugmentation()) is rows


def test_views_move_and_colour_as_far_as_they_may():
    x = np.tile(np.linspace(0, 255, 64, dtype=np.uint8)[None, :, None], (48, 1, 3))
    image = Image.fromarray(x)
    mirrored = [np.array(ImageAugmentation(flip=True)(image, np.random.default_rng(seed))) for seed in range(8)]
    assert all((view == x).all() or (view == x[:, ::-1]).all() for view in mirrored)
    assert any((view == x).all() for view in mirrored) and any((view == x[:, ::-1]).all() for view in mirrored)
    zoomed = np.array(ImageAugmentation(zoom=(2, 2))(image, np.random.default_rng(0)), dtype=float)
    assert abs(zoomed[24, 0].mean() - 64) < 4 and abs(zoomed[24, -1].mean() - 191) < 4  # the middle half
    wide = np.array(ImageAugmentation(zoom=(0.5, 0.5), fill=(1, 2, 3))(image, np.random.default_rng(0)))
    assert tuple(wide[0, 0]) == (1, 2, 3) and abs(int(wide[24, 32, 0]) - 128) < 6
    square = ImageAugmentation(rotate=90)(Image.new("RGB", (9, 9), "red"), np.random.default_rng(1))
    assert square.size == (9, 9) and square.getpixel((4, 4)) == (255, 0, 0)
    gray = Image.new("RGB", (8, 8), (100, 100, 100))
    values = [ImageAugmentation(color=0.2)(gray, np.random.default_rng(seed)).getpixel((0, 0))[0] for seed in range(50)]
    assert 80 <= min(values) < 85 < 115 < max(values) <= 120
    assert ImageAugmentation(size=32)(image).size == (43, 32)
    for wrong in ({"zoom": (1.2, 1.0)}, {"color": 1.5}, {"shift": -1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            ImageAugmentation(**wrong)


def test_views_differ_at_each_read_and_by_seed():
    rows = augment(load_data(EMOJI)["train"], ImageAugmentation(rotate=20))
    torch.manual_seed(0)
    first, second = np.array(rows[0]["image"]), np.array(rows[0]["image"])
    torch.manual_seed(0)
    assert (first != second).any() and (np.array(rows[0]["image"]) == first).all()


def test_captions_are_varied_for_training():
    templates = ["a photo of {}", "{}"]
    rows = augment(load_data(EMOJI)["train"].select(range(2)), templates=templates)
    caption = rows[0]["text"]
    assert len(caption) == 4 and caption[0] == f"a photo of {ROWS[0]['text'][0]}"
    collator = CocaDataCollator.__new__(CocaDataCollator)
    collator.text_column, collator.caption_choice, collator.seed = "text", "random", 0
    collator._epoch = torch.tensor([-1])
    chosen = set()
    for epoch in range(20):
        collator.set_epoch(epoch)
        chosen.add(collator._caption(rows[0]))
    assert chosen == set(caption)
    assert caption_variants(["One. Two! Three?", "four"], sentences=True) == [
        *("One. Two! Three?", "One.", "Two!", "Three?"),
        "four",
    ]
    with pytest.raises(ValueError, match=r"needs a '\{\}'"):
        caption_variants("a", ["no place"])


def test_processes_share_one_list(tmp_path):
    skipped = SkippedImages(tmp_path / "list.jsonl")
    children = []
    for _ in range(2):
        pid = os.fork()
        if not pid:
            skipped.add("train", "a.png", "OSError")
            os._exit(0)
        children.append(pid)
    for pid in children:
        os.waitpid(pid, 0)
    assert len(skipped) == 1 and skipped.entries() == [{"split": "train", "image": "a.png", "error": "OSError"}]
