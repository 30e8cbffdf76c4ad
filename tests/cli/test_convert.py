"""`coca convert` as a command: what it prints, and that an error costs a line and leaves nothing."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from typer.testing import CliRunner

from modeling_coca import CocaForConditionalGeneration
from modeling_coca.cli.main import app, main
from modeling_coca.conversion import to_open_clip

FIXTURE = "open_clip_default.safetensors"


@pytest.fixture
def source(request, tmp_path):
    with safe_open(request.config.rootpath / "tests" / "fixtures" / FIXTURE, framework="pt") as file:
        names = [name for name in file.keys() if name.startswith("sd.")]
        torch.save(
            {"state_dict": {f"module.{name[3:]}": file.get_tensor(name) for name in names}}, tmp_path / "epoch_3.pt"
        )
        (tmp_path / "config.json").write_text(file.metadata()["config"])
    return tmp_path / "epoch_3.pt"


def run(*arguments):
    return CliRunner().invoke(app, ["convert", *map(str, arguments)])


def test_there_and_back(source, tmp_path):
    result = run(source, tmp_path / "ours")
    assert result.exit_code == 0, result.output
    for line in (
        "family     open_clip's CoCa",
        "weights    epoch_3.pt: 129 tensors, 0.17 M parameters, float32",
        "config     config.json",
        "image      32 x 32 pixels in patches of 8, 2 layers of width 48, 3 heads",
        "pooler     shared, 9 + 1 queries of width 32, 4 heads",
        "text       16 tokens of 320, 2 + 2 layers of width 32, 4 heads",
        "quirks     [CLS] sees one padding token (`shifted_cls_mask`)",
        "warning: There is no tokenizer beside the weights",
        f'CocaForConditionalGeneration.from_pretrained("{tmp_path / "ours"}")',
    ):
        assert line in result.output
    assert f"coca convert {source} {tmp_path / 'ours'}" in (tmp_path / "ours" / "README.md").read_text()

    result = run(tmp_path / "ours", tmp_path / "theirs", "--to", "open_clip")
    assert result.exit_code == 0, result.output
    assert f"local-dir:{tmp_path / 'theirs'}" in result.output
    written = json.loads((tmp_path / "theirs" / "open_clip_config.json").read_text())
    assert written["model_cfg"] == json.loads((tmp_path / "config.json").read_text())
    with safe_open(tmp_path / "theirs" / "open_clip_model.safetensors", framework="pt") as file:
        state_dict = to_open_clip(CocaForConditionalGeneration.from_pretrained(tmp_path / "ours"))[1]
        assert all(torch.equal(file.get_tensor(name), tensor) for name, tensor in state_dict.items())


def test_check(source, tmp_path):
    pytest.importorskip("open_clip")
    result = run(source, tmp_path / "ours", "--check")
    assert result.exit_code == 0, result.output
    lines = result.output.split("largest difference to the source in its own library:\n")[1].splitlines()
    assert [line.split("  ")[1] for line in lines[:5]] == [
        *("pixels", "image embeddings", "text embeddings", "logits", "greedy tokens")
    ]
    assert "3 pictures" in result.output and "MORE THAN" not in result.output


def test_a_check_that_fails_keeps_nothing(source, tmp_path, monkeypatch):
    from modeling_coca.conversion import checking

    wrong = checking.Difference("logits", 0.5, 1e-4, "largest 3.0")
    monkeypatch.setattr(checking, "check", lambda *args: [wrong])
    result = run(source, tmp_path / "ours", "--check")
    assert "logits             5.0e-01  (largest 3.0)  MORE THAN 1.0e-04" in result.output
    assert "logits differ from those of" in str(result.exception)
    assert not (tmp_path / "ours").exists()


def test_pictures_of_ones_own(source, tmp_path):
    pytest.importorskip("open_clip")
    from PIL import Image

    Image.linear_gradient("L").convert("RGB").save(tmp_path / "picture.png")
    result = run(source, tmp_path / "ours", "--check", "--images", tmp_path / "picture.png", "--dtype", "float16")
    assert result.exit_code == 0, result.output
    assert "1 pictures" in result.output
    assert CocaForConditionalGeneration.from_pretrained(tmp_path / "ours").dtype == torch.float16


def test_options(source, tmp_path):
    config = tmp_path / "config.json"
    config.rename(tmp_path / "elsewhere.json")
    result = run(source, tmp_path / "ours", "--config", tmp_path / "elsewhere.json", "--max-shard-size", "200KB")
    assert result.exit_code == 0, result.output
    assert len(list((tmp_path / "ours").glob("model-*.safetensors"))) > 2
    assert "heads of the image tower" in str(run(source, tmp_path / "without").exception)
    result = run(source, tmp_path / "ours", "--config", tmp_path / "elsewhere.json")
    assert isinstance(result.exception, FileExistsError)
    result = run(source, tmp_path / "ours", "--config", tmp_path / "elsewhere.json", "--overwrite")
    assert result.exit_code == 0, result.output
    result = run(tmp_path / "ours", tmp_path / "theirs", "--to", "open_clip", "--check")
    assert "--check and --to open_clip do not go together" in str(result.exception)
    assert run(source, tmp_path / "x", "--dtype", "int8").exit_code == 2


def test_errors_take_a_line(source, tmp_path, monkeypatch, capsys):
    source.write_bytes(source.read_bytes()[:1000])
    monkeypatch.setattr(sys, "argv", ["coca", "convert", str(source), str(tmp_path / "ours")])
    with pytest.raises(SystemExit) as error:
        main()
    assert str(error.value).startswith("coca: ") and "cut off" in str(error.value)
    assert not (tmp_path / "ours").exists()


def test_help_is_quick():
    script = "import sys, modeling_coca.cli; sys.exit('modeling_coca.conversion' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
    assert "--check" in run("--help").output
