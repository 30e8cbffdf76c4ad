"""Data sets with what goes wrong in them: an error that names the file, the column or the argument, or the rows that are good."""

import io
import os

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from transformers import TrainingArguments

from modeling_coca import CocaForConditionalGeneration, CocaProcessor
from modeling_coca.inference import open_images
from modeling_coca.training import (
    CocaDataCollator,
    CocaTrainer,
    FeatureDataset,
    FrozenFeatures,
    SkippedImages,
    compute_features,
    load_data,
)
from modeling_coca.training.recipe import DataArguments, Splits, load_splits, run


def png(color="red", size=(20, 20)):
    content = io.BytesIO()
    Image.new("RGB", size, color).save(content, "PNG")
    return content.getvalue()


@pytest.fixture
def folder(tmp_path):
    for name in ("0.png", "1.png"):
        (tmp_path / name).write_bytes(png())
    return tmp_path


def parquet(**columns):
    content = io.BytesIO()
    pq.write_table(pa.table(columns), content)
    return content.getvalue()


GOOD = parquet(image=[png()] * 3, text=["a", "b", "c"])

# name: what the file holds, what `load_data` says, what `open_images` says; a number is that of good rows
FILES = {
    "empty.csv": (b"", "cannot be read", "no rows"),
    "header.csv": (b"image,text\n", "cannot be read|no data|null", "no rows"),
    "other_columns.csv": (b"picture,text\n0.png,a\n", "no column 'image'", "name the column of the images"),
    "open_quote.csv": (b'image,text\n0.png,"a\n1.png,b\n', "cannot be read", 1),
    "latin1.csv": ("image,text\n0.png,café\n".encode("latin-1"), "cannot be read.*utf-8", "cannot be read.*utf-8"),
    "utf16.csv": ("image,text\n0.png,a\n".encode("utf-16"), "cannot be read.*utf-8", "cannot be read.*utf-8"),
    "byte_order_mark.csv": ("\ufeffimage,text\n0.png,a\n".encode(), 1, 1),
    "zero_byte.csv": (b"image,text\n0.png,a\0b\n", 1, 1),
    "numbers.csv": (b"image,text\n5,6\n7,8\n", "`image_column`.*holds Value\\('int64'\\)", 2),
    "files_missing.csv": (b"image,text\nx.png,a\n", "Not one image of 'train'.*x.png", 1),
    "one_missing.csv": (b"image,text\nx.png,a\n0.png,b\n", 1, 2),
    "cell_missing.csv": (b"image,text\n,a\n0.png,b\n", 1, "row 1 has no image"),
    "huge_cell.csv": (b"image,text\n0.png," + b"a" * 200_000 + b"\n", 1, "cannot be read as a table.*field"),
    "empty.jsonl": (b"", "no table in JSON", "no rows"),
    "null.jsonl": (b"null\n", "no table in JSON", "one JSON object a line"),
    "numbers.jsonl": (b"5\n6\n", "no table in JSON", "one JSON object a line"),
    "lists.jsonl": (b"[1, 2]\n", "no column 'image'|cannot be read", "one JSON object a line"),
    "null_behind.jsonl": (b'{"image": "0.png", "text": "a"}\nnull\n', 1, "one JSON object a line"),
    "cut_off.jsonl": (b'{"image": "0.png", "text": "a"}\n{"image": "1.p', "cannot be read", "cannot be read as a table"),
    "deep.jsonl": (b"[" * 100_000, "cannot be read", "cannot be read as a table"),
    "column_missing.jsonl": (b'{"image": "0.png", "text": "a"}\n{"text": "b"}\n', 1, "row 2 has no image"),
    "objects_among_paths.jsonl": (
        b'{"image": "0.png", "text": "a"}\n{"image": {"a": 1}, "text": "b"}\n',
        "`image_column`.*holds Json",
        "row 2 has no path",
    ),
    "texts_of_two_types.jsonl": (b'{"image": "0.png", "text": "a"}\n{"image": "1.png", "text": 5}\n', 2, 2),
    "empty.parquet": (b"", "cannot be read", "no Parquet file"),
    "random.parquet": (bytes(range(256)) * 4, "cannot be read", "no Parquet file"),
    "magic_alone.parquet": (b"PAR1" + bytes(50) + b"PAR1", "cannot be read", "no Parquet file"),
    "cut_off.parquet": (GOOD[:-20], "cannot be read", "no Parquet file"),
    "zeroed.parquet": (GOOD[:20] + bytes(30) + GOOD[50:], "cannot be read", 0),
    "no_rows.parquet": (parquet(image=pa.array([], pa.binary()), text=pa.array([], pa.string())), "cannot be read", "no images"),
    "numbers.parquet": (parquet(image=[1.5, 2.5], text=["a", "b"]), "`image_column`.*holds Value\\('double|float64'\\)", 0),
    "nulls.parquet": (parquet(image=pa.array([None, png()], pa.binary()), text=["a", None]), 1, 1),
    "empty.tar": (b"", "cannot be read", 0),
    "random.tar": (bytes(range(256)) * 8, "cannot be read", 0),
    "zeros.tar": (bytes(10240), "cannot be read", 0),
}  # fmt: skip


@pytest.mark.parametrize(("name", "expected"), [(name, case[1]) for name, case in FILES.items()])
@pytest.mark.parametrize("streaming", [False, True], ids=["loaded", "streamed"])
def test_files_to_train_on(name, expected, streaming, folder, monkeypatch):
    (folder / name).write_bytes(FILES[name][0])
    column = "png" if name.endswith(".tar") else "image"

    def load():
        rows = load_data(data_files={"train": str(folder / name)}, image_column=column, streaming=streaming)["train"]
        rows = list(rows)
        if not rows:  # a stream warns of each image and ends
            raise ValueError("Not one image of 'train': " + name.replace("files_missing.csv", "x.png"))
        return rows

    if isinstance(expected, int):
        rows = load()
        assert len(rows) == expected and all(isinstance(row["image"], Image.Image) for row in rows)
    else:
        # What is behind the beginning of a stream comes up as Arrow says it
        late = streaming and name in ("zeroed.parquet", "no_rows.parquet")
        with pytest.raises(
            (OSError, ValueError) if late else ValueError, match="Corrupt|BatchSize" if late else expected
        ):
            load()


@pytest.mark.parametrize(("name", "expected"), [(name, case[2]) for name, case in FILES.items()])
def test_files_to_caption(name, expected, folder):
    (folder / name).write_bytes(FILES[name][0])

    def read():
        found = []
        for shard in open_images(str(folder / name)):
            for _, key in shard.list():
                try:
                    found.append(shard.read(key)[0])
                except (ValueError, OSError):  # a row with the reason
                    continue
        return found

    if isinstance(expected, int):
        assert len([image for image in read() if isinstance(image, (str, bytes)) and image]) == expected
    else:
        with pytest.raises(ValueError, match=expected):
            read()


def test_nothing_to_load(tmp_path):
    for name, files in ((None, None), ("x.csv", {"train": "y.csv"})):
        with pytest.raises(ValueError, match="either `name`"):
            load_data(name, data_files=files)
    with pytest.raises(FileNotFoundError, match="No file matches"):
        load_data(data_files={"train": str(tmp_path / "*.csv")})
    with pytest.raises(ValueError, match="of one type of"):
        load_data(data_files={"train": ["a.csv", "b.parquet"]})
    with pytest.raises(FileNotFoundError):
        load_data(str(tmp_path))


def test_the_list_of_skipped_images_survives_a_kill(tmp_path):
    path = tmp_path / "skipped.jsonl"
    path.write_text('{"split": "train", "image": "x", "error": "y"}\n[]\n5\n{"split": "train", "ima')
    skipped = SkippedImages(path, resume=True)
    assert len(skipped) == 1
    skipped.add("train", "z", "w")
    assert {entry["image"] for entry in skipped.entries()} >= {"x"}


# ------------------------------------------------------------------------------------------------------------ recipe

ARGUMENTS = {
    "share_of_all": ({"eval_share": 1.0}, r"`--eval_share`.*\[0, 1\)"),
    "share_below_0": ({"eval_share": -0.1}, r"`--eval_share`.*\[0, 1\)"),
    "no_samples": ({"max_train_samples": 0}, "`--max_train_samples` must be at least 1"),
    "no_samples_to_evaluate": ({"max_eval_samples": -1}, "`--max_eval_samples` must be at least 1"),
    "unknown_text_column": ({"text_column": "caption"}, "no column 'caption' .`--text_column`"),
    "unknown_image_column": ({"image_column": "photo"}, "no column 'photo' .`image_column`"),
    "unknown_split": ({"eval_split": "dev"}, "no split 'dev' .`--eval_split`., only train"),
    "both_sources": ({"dataset_name": "x"}, "either `--dataset_name` or `--train_files`"),
    "no_source": ({"train_files": None}, "either `--dataset_name` or `--train_files`"),
    "stream_without_end": ({"streaming": True}, "give `--max_steps`"),
    "one_row": ({"train_files": ["one.csv"]}, "`--eval_share 0`"),
    "other_columns_to_evaluate": ({"eval_files": ["other.csv"]}, "cannot be read|'text' .`--text_column`"),
}


@pytest.mark.parametrize(("changes", "message"), ARGUMENTS.values(), ids=ARGUMENTS)
def test_arguments(changes, message, folder, monkeypatch):
    (folder / "ok.csv").write_text("image,text\n0.png,a\n1.png,b\n")
    (folder / "one.csv").write_text("image,text\n0.png,a\n")
    (folder / "other.csv").write_text("image,caption\n0.png,a\n")
    monkeypatch.chdir(folder)
    data = DataArguments(**{"train_files": ["ok.csv"], **changes})
    with pytest.raises((ValueError, FileNotFoundError), match=f"(?s){message}"):
        load_splits(data, TrainingArguments("out", report_to=[], use_cpu=True), text_column=data.text_column)


# ---------------------------------------------------------------------------------------------------------- collator


@pytest.fixture(scope="module")
def processor(model_folder):
    return CocaProcessor.from_pretrained(model_folder, backend="pil")


RED = Image.new("RGB", (40, 40), "red")
ROWS = {
    "none": ([], "`rows` is empty"),
    "text_none": ([{"image": RED, "text": None}], "no value in column 'text'.*filter"),
    "text_number": ([{"image": RED, "text": 5}], "`text_column`.*got 5: filter"),
    "text_nan": ([{"image": RED, "text": float("nan")}], "`text_column`.*got nan"),
    "text_bytes": ([{"image": RED, "text": b"red"}], "`text_column`.*got b'red'"),
    "text_object": ([{"image": RED, "text": {"en": "red"}}], "`text_column`.*got {'en'"),
    "texts_none": ([{"image": RED, "text": []}], r"`text_column`.*got \[\]"),
    "texts_with_a_number": ([{"image": RED, "text": ["red", 5]}], r"`text_column`.*got \['red', 5\]"),
    "text_column": ([{"image": RED, "caption": "red"}], "no column 'text' .`text_column`., only 'image', 'caption'"),
    "text_column_of_one": ([{"image": RED, "text": "a"}, {"image": RED}], "no column 'text'"),
    "image_column": ([{"text": "red"}], "no column 'image' .`image_column`"),
    "image_none": ([{"image": None, "text": "red"}], "no value in column 'image'"),
    "image_number": ([{"image": 5, "text": "red"}], "image"),
    "pixels_of_two_sizes": (
        [{"pixel_values": torch.ones(3, 4, 4), "text": "a"}, {"pixel_values": torch.ones(3, 5, 4), "text": "a"}],
        r"'pixel_values'.*\(3, 4, 4\), \(3, 5, 4\)",
    ),
    "pixels_of_one": ([{"pixel_values": torch.ones(3, 4, 4), "text": "a"}, {"image": RED, "text": "a"}], "'pixel_values'"),
    "pixels_text": ([{"pixel_values": "x", "text": "a"}], "'pixel_values' must hold arrays of numbers"),
}  # fmt: skip


@pytest.mark.parametrize(("rows", "message"), ROWS.values(), ids=ROWS)
def test_rows(rows, message, processor):
    with pytest.raises((ValueError, TypeError), match=message):
        CocaDataCollator(processor)(rows)


FEATURES = {
    "two_shapes": ([np.ones((2, 3)), np.ones((3, 3))], r"'f' must hold arrays.*\(2, 3\), \(3, 3\)"),
    "none": ([None], "no value in column 'f'"),
    "text": (["x"], "'f' must hold arrays of numbers"),
    "ragged": ([[[1], [1, 2]]], "'f' must hold arrays of numbers"),
}


@pytest.mark.parametrize(("values", "message"), FEATURES.values(), ids=FEATURES)
def test_features_in_rows(values, message, processor):
    collator = CocaDataCollator(processor, image_hidden_states_column="f")
    with pytest.raises(ValueError, match=message):
        collator([{"f": value, "text": "a"} for value in values])


def test_texts_that_are_too_long(processor):
    row = {"image": RED, "text": "red " * 60, "question": "what " * 60}
    for prefix in (None, "question"):
        with pytest.raises(ValueError, match="16"):
            CocaDataCollator(processor, prefix_column=prefix)([row])
        batch = CocaDataCollator(processor, prefix_column=prefix, truncation=True)([row])
        assert batch["input_ids"].shape == (1, 16)


# ------------------------------------------------------------------------------------------- features of the encoder


def test_damaged_features(folder, model_folder, processor):
    model = CocaForConditionalGeneration.from_pretrained(model_folder)
    rows = datasets.Dataset.from_dict({"image": [png(), png("blue")], "text": ["a", "b"]}).cast_column(
        "image", datasets.Image()
    )
    path = folder / "features.npy"
    compute = lambda: compute_features(rows, model.model.vision_model, processor.image_processor, path)  # noqa: E731
    expected = np.array(compute()[0])
    with pytest.raises(ValueError, match="features of 2 rows for 1 rows"):
        FeatureDataset(rows.select([0]), compute())
    for damage in (lambda: path.write_bytes(path.read_bytes()[:200]), lambda: path.write_bytes(b"")):
        damage()
        with pytest.raises(ValueError, match=r"features.npy is damaged.*delete it"):
            FrozenFeatures(path, np.array([0]))
        path.unlink()
        assert np.array_equal(compute()[0], expected)
    path.with_name("features.npy.json").write_text('{"weights": "a')  # then they are computed again
    path.with_name("features.npy.progress").write_text("[")
    assert np.array_equal(compute()[0], expected)
    with pytest.raises(ValueError, match="`dataset` is empty"):
        compute_features(rows.select([]), model.model.vision_model, processor.image_processor, folder / "none.npy")


# -------------------------------------------------------------------------------------------------------------- trainer


def dying(rows):
    for i in range(rows):
        yield {"image": RED, "text": f"a photo of {i}"}
    raise OSError("the disk went away")


def trainer_on(dataset, model_folder, processor, output, **arguments):
    return CocaTrainer(
        CocaForConditionalGeneration.from_pretrained(model_folder),
        TrainingArguments(
            output,
            use_cpu=True,
            report_to=[],
            max_steps=8,
            per_device_train_batch_size=2,
            disable_tqdm=True,
            **arguments,
        ),
        CocaDataCollator(processor),
        train_dataset=dataset,
    )


@pytest.mark.parametrize("workers", [0, 1])
def test_a_generator_that_dies_ends_the_training(workers, model_folder, processor, tmp_path):
    """With its error, and no hang, where a worker runs it, too."""
    dataset = datasets.IterableDataset.from_generator(dying, gen_kwargs={"rows": 5})
    trainer = trainer_on(dataset, model_folder, processor, tmp_path, dataloader_num_workers=workers)
    with pytest.raises(OSError, match="the disk went away"):
        trainer.train()


class DyingWorker(torch.utils.data.Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, i):
        if torch.utils.data.get_worker_info() is not None and i > 3:
            os._exit(7)  # as the kernel ends who takes too much memory
        return {"image": RED, "text": "a"}


def test_a_worker_that_is_killed_ends_the_training(model_folder, processor, tmp_path):
    trainer = trainer_on(
        DyingWorker(), model_folder, processor, tmp_path, dataloader_num_workers=1, train_sampling_strategy="sequential"
    )
    with pytest.raises(RuntimeError, match=r"worker.*exited unexpectedly"):
        trainer.train()


@pytest.mark.parametrize(
    ("dispatch", "message"), [(True, "does not contain any data"), (False, "Not one step was trained")]
)
def test_a_stream_of_nothing_is_no_training(dispatch, message, model_folder, processor, tmp_path):
    dataset = datasets.IterableDataset.from_generator(lambda: iter(()))
    trainer = trainer_on(dataset, model_folder, processor, tmp_path, accelerator_config={"dispatch_batches": dispatch})
    with pytest.raises(ValueError, match=message):
        run(trainer, processor, Splits(dataset, None, SkippedImages()))
    assert not (tmp_path / "model.safetensors").exists()


def test_an_empty_set_is_refused(model_folder, processor, tmp_path):
    with pytest.raises(ValueError, match="num_samples"):
        trainer_on(datasets.Dataset.from_dict({"image": [], "text": []}), model_folder, processor, tmp_path).train()
