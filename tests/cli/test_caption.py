"""`coca caption`, as people, programs and launchers call it."""

import json
import os
import subprocess
import sys

import pytest

from modeling_coca.cli.output import plain as as_shown
from modeling_coca.inference import caption_images, read_rows


@pytest.fixture(scope="module")
def plain(photos, model_folder):
    return caption_images(photos, model=model_folder, num_workers=0, show_progress=False)


def test_captions_are_printed(coca, photos, plain):
    code, out, err = coca("caption", photos, "--num_workers", 0)
    assert (code, err) == (0, "")  # no bar for a handful of images
    assert out.splitlines() == [f"{row['id']}\t{as_shown(row['caption'])}\t{row['score']:.3f}" for row in plain]
    code, out, _ = coca("caption", plain[3]["id"], "--json")
    row = json.loads(out)
    assert code == 0 and row["caption"] == plain[3]["caption"]
    assert set(row) == {"id", "caption", "log_prob", "num_tokens", "score"}
    _, out, _ = coca(
        "caption", photos, "--best_of", 5, "--num-captions", 2, "--temperature", 2, "--json", "--embeddings"
    )
    rows = [json.loads(line) for line in out.splitlines()]
    assert len(rows) == 12 and max(len(row["captions"]) for row in rows) == 2 and len(rows[0]["embedding"]) == 24


def test_captions_go_to_a_file(coca, photos, plain, tmp_path):
    (tmp_path / "bad.png").write_text("no picture")
    target = tmp_path / "out.jsonl"
    code, out, err = coca("caption", photos, tmp_path / "bad.png", "-o", target, "--prompt", "a photo of")
    assert code == 0 and out == f"12 images captioned in {target}\n"
    assert f"unreadable: {tmp_path}/bad.png: no image format that Pillow knows" in err
    rows = list(read_rows(target))
    assert len(rows) == 13 and all(row["caption"].startswith("a photo of") for row in rows[:12])
    code, out, err = coca("caption", photos, "-o", target, "--json")
    assert (code, out) == (1, "") and err.startswith(f"coca: {target} is there, and complete")
    code, out, _ = coca("caption", photos, "-o", target, "--overwrite", "--json")
    assert json.loads(out) == {"output": str(target), "images": 12, "failed": []}


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["caption", "nowhere.png"], 1, "coca: There is no file or folder nowhere.png."),
        (["caption", "{bad}"], 1, "coca: none of the 1 images could be read."),
        (["caption", "{good}", "--model", "./nowhere"], 1, "coca: There is no model folder ./nowhere."),
        (["caption", "{good}", "--num_captions", "2"], 1, "coca: `num_captions` (2) must be from 1 to `best_of` (1)."),
        (["caption", "{good}", "--num_beams", "0"], 2, "--num_beams"),
        (["caption"], 2, "Missing argument 'IMAGES...'"),
    ],
)
def test_errors_take_one_line(args, code, message, coca, photos, tmp_path):
    (tmp_path / "bad.png").write_text("no picture")
    result = coca(*[arg.format(bad=tmp_path / "bad.png", good=photos / "00.png") for arg in args])
    assert result[0] == code and message in result[2] and "Traceback" not in result[2]


def test_help_explains_every_option(coca):
    _, out, _ = coca("--help")
    assert "Write a caption for every image." in out
    _, out, _ = coca("caption", "--help")
    for words in ("coca caption cat.jpg", "--num_beams", "--best_of", "interrupted at any time", "WebDataset"):
        assert words in out


def test_accelerate_launch_shares_the_images(photos, plain, model_folder, tmp_path):
    # `--multi_gpu` starts processes where there is no GPU, too; `--cpu` starts one
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2"]
    command += [
        "--num_machines=1",
        "--mixed_precision=no",
        "--dynamo_backend=no",
        "-m",
        "modeling_coca.cli",
        "caption",
        str(photos),
    ]
    command += ["--model", str(model_folder), "--output", "out", "--num_workers", "0", "--json"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1]) == {"output": "out", "images": 12, "failed": []}
    settings = json.loads((tmp_path / "out" / ".coca" / "settings.json").read_text())
    assert (settings["shard_size"], settings["shards"]) == (1, 12)  # small ones, so that both have something to do
    rows = list(read_rows(tmp_path / "out"))
    assert [(row["id"], row["caption"]) for row in rows] == [(row["id"], row["caption"]) for row in plain]


@pytest.mark.parametrize("error", [MemoryError("there was none left"), RuntimeError("Cannot allocate memory (12)")])
def test_lack_of_memory_costs_a_line(error, coca, photos, monkeypatch):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr("modeling_coca.inference.caption_images", fail)
    code, _, err = coca("caption", photos)
    assert code == 1 and err.startswith("coca: out of memory: use a smaller --batch_size") and str(error) in err
