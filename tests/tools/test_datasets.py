"""The processor in `datasets`' map, transform and stream, from memory and from disk."""

import datasets
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import TrainingArguments

from modeling_coca.training import CocaDataCollator, CocaTrainer


@pytest.fixture(scope="module")
def dataset(rows):
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    return datasets.Dataset.from_list(rows * 3, features=features)


@pytest.fixture
def expected(dataset, processor):
    return processor(
        images=list(dataset["image"]), text=list(dataset["text"]), padding="max_length", return_tensors="pt"
    )


@pytest.fixture
def prepare(processor):
    def prepare(batch):
        return processor(images=batch["image"], text=batch["text"], padding="max_length", return_tensors="pt")

    return prepare


def check_equal(batches, expected):
    found = {name: torch.cat([torch.as_tensor(batch[name]) for batch in batches]) for name in expected}
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=0, rtol=0)


@pytest.mark.parametrize("num_proc", [None, 2])
def test_map(dataset, prepare, expected, num_proc):
    """The processor travels to other processes, and results come back from Arrow files unchanged."""
    mapped = dataset.map(prepare, batched=True, batch_size=5, num_proc=num_proc, remove_columns=dataset.column_names)
    check_equal([mapped.with_format("torch")[:]], expected)
    again = dataset.map(prepare, batched=True, batch_size=5, num_proc=num_proc, remove_columns=dataset.column_names)
    assert again._fingerprint == mapped._fingerprint  # found in the cache, as the processor has one fingerprint


def test_transform(dataset, prepare, expected):
    loader = DataLoader(dataset.with_transform(prepare), batch_size=5, num_workers=0)
    check_equal(list(loader), expected)


def test_stream(dataset, prepare, expected, tmp_path):
    dataset.to_parquet(tmp_path / "train.parquet")
    stream = datasets.load_dataset("parquet", data_files=str(tmp_path / "train.parquet"), split="train", streaming=True)
    mapped = stream.map(prepare, batched=True, batch_size=5, remove_columns=["image", "text"]).with_format("torch")
    check_equal(list(DataLoader(mapped, batch_size=4)), expected)


def test_webdataset_stream(dataset, processor, expected, tmp_path):
    """Image-text pairs in a tar file, as large collections come, with the collator of training."""
    webdataset = pytest.importorskip("webdataset", reason="webdataset is not installed")
    with webdataset.TarWriter(str(tmp_path / "pairs.tar")) as tar:
        for i, row in enumerate(dataset):
            tar.write({"__key__": f"{i:04}", "png": row["image"], "txt": row["text"]})
    stream = datasets.load_dataset(
        "webdataset", data_files=str(tmp_path / "pairs.tar"), split="train", streaming=True
    ).rename_columns({"png": "image", "txt": "text"})
    batches = list(DataLoader(stream, batch_size=12, collate_fn=CocaDataCollator(processor)))
    assert len(batches) == 1
    torch.testing.assert_close(batches[0]["pixel_values"], expected["pixel_values"], atol=0, rtol=0)
    texts = processor.batch_decode(batches[0]["input_ids"], skip_special_tokens=True)
    assert texts == list(dataset["text"])


def test_training_on_a_stream(dataset, model, processor, tmp_path):
    """The same steps as from memory."""

    def losses(rows):
        torch.manual_seed(0)
        args = TrainingArguments(
            str(tmp_path / "run"),
            per_device_train_batch_size=4,
            max_steps=3,
            learning_rate=0.0,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            train_sampling_strategy="sequential",
        )
        trainer = CocaTrainer(model, args, CocaDataCollator(processor), train_dataset=rows)
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    found, expected = losses(dataset.to_iterable_dataset(num_shards=2)), losses(dataset)
    assert len(found) == 3
    np.testing.assert_allclose(found, expected, atol=1e-5)
