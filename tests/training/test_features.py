import errno
import json
import os
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import TimmWrapperConfig, TimmWrapperModel

from modeling_coca import CocaForConditionalGeneration, CocaImageProcessorPil, CocaProcessor, CocaTokenizer
from modeling_coca.evaluation import RetrievalEvaluator
from modeling_coca.modeling_coca import run_vision_model
from modeling_coca.training import (
    CocaDataCollator,
    FeatureDataset,
    ImageAugmentation,
    compute_features,
    features,
    load_data,
)

EMOJI = Path(__file__).parents[1] / "fixtures" / "emoji"
VIEWS = ImageAugmentation(zoom=(0.8, 1.2), rotate=10)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")


@pytest.fixture
def rows():
    return load_data(EMOJI)["test"]


@pytest.fixture(scope="module")
def image_processor():
    return CocaImageProcessorPil(size={"shortest_edge": 32}, crop_size=32)


@pytest.fixture
def model(tiny_config):
    return CocaForConditionalGeneration(tiny_config()).eval()


@pytest.fixture(scope="module")
def convolutions():
    """A small convolutional encoder with batch norms that have seen something."""
    torch.manual_seed(0)
    encoder = TimmWrapperModel(TimmWrapperConfig(architecture="test_efficientnet", do_pooling=False, num_labels=0))
    for module in encoder.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        encoder.train()(pixel_values=torch.randn(16, 3, 32, 32))
    return encoder.eval()


def test_features_are_those_of_the_encoder_and_written_once(rows, image_processor, model, tmp_path, monkeypatch):
    path = tmp_path / "cache" / "test.npy"
    encoder, threads = model.model.vision_model, torch.get_num_threads()
    found = compute_features(rows, encoder, image_processor, path)
    pixel_values = image_processor(rows["image"][:], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = run_vision_model(encoder, pixel_values).last_hidden_state
    assert len(found) == 8 and found.array.shape == (8, 1, 17, 32) and found.array.dtype == np.float16
    for row in range(8):
        torch.testing.assert_close(torch.tensor(found[row][0]).float(), expected[row], rtol=1e-3, atol=1e-3)
    assert isinstance(found.array, np.memmap) and torch.get_num_threads() == threads
    assert sorted(file.name for file in path.parent.iterdir()) == ["test.npy", "test.npy.json"]

    with monkeypatch.context() as patch:
        patch.setattr(features, "_encode", None)  # would be called if anything were computed
        compute_features(rows, encoder, image_processor, path)
    with torch.no_grad():
        encoder.layers[0].mlp.fc1.bias.add_(1.0)  # other weights
    assert (compute_features(rows, encoder, image_processor, path)[0] != found[0]).any()


def test_equal_images_are_encoded_once(rows, image_processor, model, tmp_path):
    twice = datasets.concatenate_datasets([rows, rows.select([5, 0])])
    found = compute_features(twice, model.model.vision_model, image_processor, tmp_path / "a.npy")
    assert found.array.shape[0] == 8 and found.image_of_row.tolist() == [*range(8), 5, 0]
    np.testing.assert_array_equal(found[8], found[5])


def test_views_depend_on_seed_image_and_number(rows, image_processor, model, tmp_path):
    options = {"views": 3, "augmentation": VIEWS}
    encoder = model.model.vision_model
    plain = compute_features(rows, encoder, image_processor, tmp_path / "plain.npy").array
    first = compute_features(rows, encoder, image_processor, tmp_path / "a.npy", **options).array
    again = compute_features(rows, encoder, image_processor, tmp_path / "b.npy", batch_size=5, **options).array
    other = compute_features(rows, encoder, image_processor, tmp_path / "c.npy", seed=1, **options).array
    np.testing.assert_allclose(first, again, atol=2e-3)
    np.testing.assert_allclose(first[:, 0], plain[:, 0], atol=2e-3)
    np.testing.assert_allclose(first[:, 0], other[:, 0], atol=2e-3)
    assert abs(first[:, 1] - first[:, 2]).max() > 0.1 and abs(first[:, 1] - other[:, 1]).max() > 0.1
    with pytest.raises(ValueError, match="`augmentation` changes nothing"):
        compute_features(rows, encoder, image_processor, tmp_path / "d.npy", views=2)


def test_an_interruption_is_gone_on_from(rows, image_processor, model, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "_CHUNK", 1)
    path, calls = tmp_path / "a.npy", []
    encode = features._encode

    def interrupted(model, pixel_values, layers=None):
        calls.append(len(pixel_values))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return encode(model, pixel_values, layers)

    monkeypatch.setattr(features, "_encode", interrupted)
    encoder = model.model.vision_model
    with pytest.raises(KeyboardInterrupt):
        compute_features(rows, encoder, image_processor, path, batch_size=2)
    assert calls == [2] * 4  # one to see the shape, two batches, and the one that failed
    assert not path.exists() and json.loads((tmp_path / "a.npy.progress").read_text())["done"] == 4
    found = compute_features(rows, encoder, image_processor, path, batch_size=2)
    assert sum(calls[4:]) == 4  # the other half
    assert sorted(file.name for file in tmp_path.glob("a.npy*")) == ["a.npy", "a.npy.json"]
    monkeypatch.setattr(features, "_encode", encode)
    whole = compute_features(rows, encoder, image_processor, tmp_path / "b.npy", batch_size=2)
    np.testing.assert_array_equal(found.array, whole.array)


@pytest.mark.parametrize("step", ["unlink", "replace"])
def test_features_that_are_complete_survive_a_kill_at_the_end(
    step, rows, image_processor, model, tmp_path, monkeypatch
):
    """Other features lie there: their key must not come to the new ones, and the new ones not be computed again."""
    path, encoder = tmp_path / "a.npy", model.model.vision_model
    compute_features(rows, encoder, image_processor, path)
    with torch.no_grad():
        encoder.layers[0].mlp.fc1.bias.add_(1.0)
    module, name = (Path, "unlink") if step == "unlink" else (features.os, "replace")
    original = getattr(module, name)

    def killed(first, *args, **kwargs):
        if Path(first).name == ("a.npy.json" if step == "unlink" else "a.npy.unfinished"):
            if step == "replace":
                original(first, *args, **kwargs)
            raise KeyboardInterrupt
        return original(first, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(module, name, killed)
        with pytest.raises(KeyboardInterrupt):
            compute_features(rows, encoder, image_processor, path)
    monkeypatch.setattr(features, "_encode", None)  # would be called if anything were computed
    found = compute_features(rows, encoder, image_processor, path)
    monkeypatch.undo()
    expected = compute_features(rows, encoder, image_processor, tmp_path / "b.npy")
    np.testing.assert_array_equal(found.array, expected.array)
    assert sorted(file.name for file in tmp_path.glob("a.npy*")) == ["a.npy", "a.npy.json"]


@pytest.mark.parametrize("step", ["posix_fallocate", "open_memmap"])
def test_a_full_disk_is_found_before_anything_is_computed(step, rows, image_processor, model, tmp_path, monkeypatch):
    """A page of a mapped file without room for it would end the process by a signal."""

    def fail(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os if step == "posix_fallocate" else np.lib.format, step, fail)
    with pytest.raises(OSError, match=r"^The disk is full: .*a\.npy could not be written"):
        compute_features(rows, model.model.vision_model, image_processor, tmp_path / "a.npy")
    assert not list(tmp_path.glob("a.npy*"))


def test_a_failure_at_the_start_leaves_nothing(rows, image_processor, model, tmp_path):
    def fail(*_, **__):
        raise OSError("no space left")

    fail.to_json_string = image_processor.to_json_string
    with pytest.raises(OSError, match="no space left"):
        compute_features(rows, model.model.vision_model, fail, tmp_path / "a.npy")
    assert not list(tmp_path.glob("a.npy*"))


def test_batch_norms_are_folded(rows, image_processor, convolutions, tmp_path):
    pixel_values = image_processor(rows["image"][:], return_tensors="pt")["pixel_values"]
    fast = features._optimize_for_cpu(convolutions, pixel_values[:2])
    assert fast is not convolutions and not any(isinstance(m, torch.nn.BatchNorm2d) for m in fast.modules())
    assert any(isinstance(m, torch.nn.BatchNorm2d) for m in convolutions.modules())
    found = compute_features(rows, convolutions, image_processor, tmp_path / "a.npy", feature_layers=[0, 1])
    with torch.no_grad():
        expected = run_vision_model(convolutions, pixel_values, feature_layers=[0, 1]).last_hidden_state
    for row in range(8):
        error = (torch.tensor(found[row][0]).float() - expected[row]).abs().max()
        assert error < 2e-3 * expected.abs().max()


def test_a_batch_of_features_gives_the_loss_of_its_images(rows, image_processor, model, tmp_path):
    tokenizer = CocaTokenizer(model_max_length=16).train_new_from_iterator(
        [text for texts in rows["text"] for text in texts], vocab_size=512
    )
    processor = CocaProcessor(image_processor, tokenizer)
    found = compute_features(rows, model.model.vision_model, image_processor, tmp_path / "a.npy")
    cached = FeatureDataset(rows, found)
    assert len(cached) == 8 and "image" not in cached[0] and "image_hidden_states" in cached.column_names
    with pytest.raises(IndexError):
        cached[8]
    options = {"caption_choice": "first", "truncation": True}
    from_images = CocaDataCollator(processor, **options)(list(rows))
    column = {"image_hidden_states_column": "image_hidden_states"}
    loader = DataLoader(  # workers open the file by themselves
        cached, batch_size=8, collate_fn=CocaDataCollator(processor, **options, **column), num_workers=1
    )
    (from_features,) = loader
    assert torch.equal(from_features["labels"], from_images["labels"])
    with torch.no_grad():
        from_features["image_hidden_states"] = from_features["image_hidden_states"].float()
        expected, actual = model(**from_images), model(**from_features)
    torch.testing.assert_close(actual.loss, expected.loss, rtol=1e-3, atol=0)
    plain = RetrievalEvaluator(processor, rows, truncation=True)(model)
    assert RetrievalEvaluator(processor, cached, truncation=True, **column)(model) == pytest.approx(plain, abs=0.2)


def test_training_takes_any_view_and_evaluation_the_plain_one(rows, image_processor, model, tmp_path):
    found = compute_features(
        rows, model.model.vision_model, image_processor, tmp_path / "a.npy", views=3, augmentation=VIEWS
    )
    plain, train = FeatureDataset(rows, found), FeatureDataset(rows, found, random_view=True)
    assert all((plain[2]["image_hidden_states"] == found[2][0]).all() for _ in range(5))
    seen = {train[2]["image_hidden_states"].tobytes() for _ in range(30)}
    assert seen == {view.tobytes() for view in found[2]}
    with pytest.raises(ValueError, match="features of 8 rows for 3 rows"):
        FeatureDataset(rows.select(range(3)), found)
