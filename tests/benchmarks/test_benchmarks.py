"""The benchmarks run, on a small model: they compare outputs before they time, and leave JSON. No figure is checked here."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
CFG = {
    "embed_dim": 32,
    "vision_cfg": {
        "image_size": 32,
        "layers": 1,
        "width": 64,
        "patch_size": 16,
        "attentional_pool": True,
        "attn_pooler_heads": 4,
        "output_tokens": True,
    },
    "text_cfg": {
        "context_length": 24,
        "vocab_size": 49408,
        "layers": 1,
        "heads": 2,
        "width": 32,
        "embed_cls": True,
        "output_tokens": True,
    },
    "multimodal_cfg": {
        "context_length": 24,
        "vocab_size": 49408,
        "width": 32,
        "heads": 2,
        "layers": 1,
        "attn_pooler_heads": 4,
    },
    "custom_text": True,
}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs a script's `main` in this process, and gives what it wrote."""
    pytest.importorskip("open_clip")
    monkeypatch.syspath_prepend(BENCHMARKS)
    config = tmp_path / "model.json"
    config.write_text(json.dumps(CFG))
    threads = torch.get_num_threads()

    def run_main(name: str, *options: str) -> dict:
        output = tmp_path / f"{name}.json"
        module = __import__(name)
        module.main(["--model", str(config), "--rounds", "1", "--output", str(output), *options])
        return json.loads(output.read_text())

    yield run_main
    torch.set_num_threads(threads)
    for name in [
        name for name, module in sys.modules.items() if str(BENCHMARKS) in (getattr(module, "__file__", None) or "")
    ]:
        del sys.modules[name]


def check(result: dict, number: int) -> None:
    assert result["machine"]["torch"] == torch.__version__
    assert len(result["rows"]) == number
    for row in result["rows"].values():
        figures = [row["ours"]["median_s"], row["open_clip"]["median_s"], row["ours"]["ratio"]["median"]]
        assert all(math.isfinite(figure) and figure > 0 for figure in figures)


def test_generation(run):
    result = run("generation", "--batch_sizes", "1", "3", "--num_beams", "1", "3", "--new_tokens", "4")
    check(result, 3)
    assert all(row["equal_tokens"] == 1 for row in result["rows"].values())


def test_encoding(run):
    check(run("encoding", "--batch_sizes", "1", "3"), 4)


@pytest.mark.slow
def test_loading(run):
    result = run("loading")
    check(result, 4)
    assert all(figure > 50 for row in result["rows"].values() for figure in row["peak_mb"].values())


def test_folder(run):
    result = run("folder", "--images", "5", "--batch_size", "2", "--new_tokens", "4")
    check(result, 1)
    assert all(row["same_captions"] == 1 for row in result["rows"].values())


def test_training(run):
    sizes = ["--batch_size", "3", "--caption_tokens", "6", "--large_batch_size", "6", "--chunk_size", "2"]
    result = run("training", *sizes)
    check(result, 1)
    row = result["rows"]["step"]
    for kind in ("peak_bytes", "loss_path_peak_bytes"):
        assert 0 < row[kind]["ours"] < row[kind]["open_clip"]
    chunks = row["chunks"]
    assert chunks["chunks"]["loss"] == pytest.approx(chunks["whole"]["loss"], rel=1e-5)
    assert chunks["one chunk alone"]["loss"] != pytest.approx(chunks["whole"]["loss"], rel=1e-3)


def test_utilization(run, monkeypatch):
    sizes = ["--caption_batch_sizes", "2", "--new_tokens", "3", "--batch_size", "4", "--caption_tokens", "6"]
    result = run("utilization", *sizes, "--large_batch_size", "8", "--chunk_size", "2")
    assert len(result["rows"]) == 3
    assert all(math.isfinite(value) and value > 0 for row in result["rows"].values() for value in row.values())
    # The output layer alone: forward, and backward to its inputs and to its weights, for five tokens
    assert result["flops_per_pair"] > 3 * 2 * 5 * 32 * 49408
    assert result["flops_per_pair"] < 1.5 * 3 * 2 * 5 * 32 * 49408


@pytest.mark.slow
def test_growth(run, tmp_path):
    picture = tmp_path / "growth.png"
    sizes = ["--batch_sizes", "1", "2", "--num_beams", "1", "2", "--train_batch_sizes", "2", "4", "--chunk_size", "2"]
    losses = ["--vocabularies", "4096", "65536", "--texts", "8", "64", "--new_tokens", "3", "--picture", str(picture)]
    curves = run("growth", *sizes, *losses)["curves"]
    assert picture.stat().st_size > 10_000
    over_vocabulary = curves["Captioning loss over the vocabulary"]["lines"]
    assert over_vocabulary["ours"][-1] < over_vocabulary["logits of all tokens"][-1]
    assert all(math.isfinite(value) for curve in curves.values() for line in curve["lines"].values() for value in line)
