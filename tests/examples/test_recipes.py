"""Each training script, from its command line to the saved model, on a handful of real pictures."""

import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import datasets
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from modeling_coca import (
    CocaForConditionalGeneration,
    CocaForImageClassification,
    CocaForVisualQuestionAnswering,
    CocaProcessor,
    CocaVisionConfig,
    CocaVisionModel,
)
from modeling_coca.cli.main import app

ROOT = Path(__file__).parents[2]
EMOJI = ROOT / "tests" / "fixtures" / "emoji"
TINY = ROOT / "hub_configs" / "coca-tiny"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def arguments(out, *more, steps=3):
    shared = ["--dataset_name", EMOJI, "--output_dir", out, "--max_steps", steps, "--per_device_train_batch_size", 8]
    shared += ["--report_to", "none", "--disable_tqdm", "True", "--save_strategy", "no", "--use_cpu", "True"]
    return [str(argument) for argument in (*shared, *more)]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A model that `pretrain.py` has made."""
    out = tmp_path_factory.mktemp("pretrained")
    more = ["--config_name", TINY, "--vocab_size", 400, "--max_text_length", 32, "--image_size", 32]
    more += ["--zoom", "0.9", "1.1", "--shift", "0.05", "--flip", "True"]
    figures = script("pretrain").main(arguments(out, *more, steps=4))
    return out, figures


def test_pretrain(pretrained):
    out, figures = pretrained
    assert figures["train_loss"] > 0 and 0 <= figures["eval_i2t_r1"] <= 1 and "eval_bleu4" in figures
    assert json.loads((out / "all_results.json").read_text())["eval_loss"] == figures["eval_loss"]
    model, processor = CocaForConditionalGeneration.from_pretrained(out), CocaProcessor.from_pretrained(out)
    assert model.config.text_config.vocab_size == len(processor.tokenizer) <= 400
    assert model.config.vision_config.image_size == processor.image_processor.crop_size["height"] == 32
    image = Image.open(next(EMOJI.glob("test/*.png")))
    assert model.generate(**processor(images=[image], return_tensors="pt"), max_new_tokens=3).shape[0] == 1


def test_pretrain_resumes_and_averages_weights(tmp_path):
    more = ["--config_name", TINY, "--vocab_size", 400, "--max_text_length", 32, "--ema_decay", "0.9"]
    more += ["--save_strategy", "steps", "--save_steps", 2, "--logging_steps", 1]
    whole = tmp_path / "whole"
    script("pretrain").main(arguments(whole, *more, steps=4))
    again = tmp_path / "again"
    shutil.copytree(whole, again)
    resumed = ["--resume_from_checkpoint", again / "checkpoint-2"]
    script("pretrain").main(arguments(again, *more, *resumed, steps=4))
    first, second = (CocaForConditionalGeneration.from_pretrained(path).state_dict() for path in (whole, again))
    last = CocaForConditionalGeneration.from_pretrained(whole / "checkpoint-4").state_dict()
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=0, atol=1e-6)
    assert any(not torch.equal(value, last[name]) for name, value in first.items())


def test_streams_of_shards_are_pretrained_on(tmp_path):
    rows = [json.loads(line) for line in (EMOJI / "train" / "metadata.jsonl").read_text().splitlines()]
    for shard in range(2):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as tar:
            for i, row in enumerate(rows[shard::2]):
                png = (EMOJI / "train" / row["file_name"]).read_bytes() if i else b"broken"
                for name, content in ((f"{shard}{i}.png", png), (f"{shard}{i}.txt", row["text"][0].encode())):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    out = tmp_path / "out"
    files = [str(tmp_path / "0.tar"), str(tmp_path / "1.tar")]
    more = ["--config_name", TINY, "--vocab_size", 400, "--max_text_length", 32, "--train_files", *files, "--streaming"]
    more += ["--image_column", "png", "--text_column", "txt", "--dataloader_num_workers", 2]
    args = arguments(out, *more)
    figures = script("pretrain").main(args[2:])
    assert figures["skipped_images"] == 2 and figures["train_loss"] > 0


@pytest.mark.parametrize("options", [[], ["--lora_rank", "2"], ["--alpha", "0.5"], ["--freeze", "vision_model"]])
def test_finetune_captioning(options, pretrained, tmp_path):
    if "--lora_rank" in options:
        pytest.importorskip("peft")
    out = tmp_path / "out"
    more = ["--model_name_or_path", pretrained[0], "--caption_templates", "{}", "a drawing of {}", *options]
    if "--freeze" in options:
        more += ["--feature_cache", tmp_path / "features", "--feature_views", 2, "--rotate", 5]
    figures = script("finetune_captioning").main(arguments(out, *more))
    assert 0 <= figures["eval_bleu4"] <= 1 and 0 <= figures["eval_i2t_r1"] <= 1
    before, after = (CocaForConditionalGeneration.from_pretrained(f).state_dict() for f in (pretrained[0], out))
    changed = {name.split(".")[1] for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys() and "layers" in changed
    assert ("vision_model" in changed) == (options in ([], ["--alpha", "0.5"]))


@pytest.mark.parametrize("form", ["generate", "classify"])
def test_finetune_vqa(form, pretrained, tmp_path):
    # batches of evaluation that do not divide the eight rows: none may be left out
    more = ["--model_name_or_path", pretrained[0], "--form", form, "--learning_rate", "1e-2"]
    more += ["--per_device_eval_batch_size", 5]
    figures = script("finetune_vqa").main(arguments(tmp_path, *more, steps=12))
    assert figures["eval_answer_accuracy"] in [count / 8 for count in range(9)]
    if form == "classify":
        model = CocaForVisualQuestionAnswering.from_pretrained(tmp_path)
        assert sorted(model.config.id2label.values()) == [
            "animals nature",
            "food drink",
            "objects",
            "travel places",
        ]


def test_finetune_image_classification(pretrained, tmp_path):
    more = ["--model_name_or_path", pretrained[0], "--feature_cache", tmp_path / "features"]
    figures = script("finetune_image_classification").main(arguments(tmp_path / "out", *more))
    assert figures["eval_accuracy_top5"] == 1  # of four classes
    model = CocaForImageClassification.from_pretrained(tmp_path / "out")
    assert model.config.label2id["objects"] == 2
    before = CocaForConditionalGeneration.from_pretrained(pretrained[0]).model.vision_model.state_dict()
    for name, value in model.vision_model.state_dict().items():
        assert torch.equal(value, before[name])


def test_finetune_retrieval(pretrained, tmp_path):
    more = ["--model_name_or_path", pretrained[0], "--contrastive_chunk_size", 4]
    figures = script("finetune_retrieval").main(arguments(tmp_path, *more))
    assert "eval_contrastive_loss" in figures and "eval_caption_loss" not in figures and "eval_t2i_r10" in figures
    before, after = (CocaForConditionalGeneration.from_pretrained(f).state_dict() for f in (pretrained[0], tmp_path))
    for name in before:
        if name.startswith(("text_decoder.", "lm_head.")):
            assert torch.equal(before[name], after[name])
    assert not torch.equal(before["model.text_projection.weight"], after["model.text_projection.weight"])


def test_train_frozen_encoder(pretrained, tmp_path):
    encoder = CocaVisionModel(
        CocaVisionConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=32,
            patch_size=8,
        )
    )
    encoder.save_pretrained(tmp_path / "encoder")
    CocaProcessor.from_pretrained(pretrained[0]).image_processor.save_pretrained(tmp_path / "encoder")
    more = ["--vision_model", tmp_path / "encoder", "--config_name", TINY, "--vocab_size", 400]
    more += [
        "--max_text_length",
        32,
        "--feature_cache",
        tmp_path / "features",
        "--feature_views",
        2,
        "--zoom",
        0.9,
        1.1,
    ]
    script("train_frozen_encoder").main(arguments(tmp_path / "out", *more))
    model = CocaForConditionalGeneration.from_pretrained(tmp_path / "out")
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, model.model.vision_model.state_dict()[name])


@pytest.mark.parametrize("has_captions", [True, False])
def test_from_an_open_clip_checkpoint_to_ones_own_pictures(has_captions, tmp_path):
    """The commands that docs/training.md begins with, on pictures with captions, or sorted into a folder a class."""
    open_clip = pytest.importorskip("open_clip.coca_model")
    small = {"width": 32, "heads": 2, "layers": 1}
    model_cfg = {
        "embed_dim": 32,
        "vision_cfg": {
            **{"image_size": 32, "patch_size": 8, "width": 32, "head_width": 16, "layers": 1},
            **{"attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},
        },
        "text_cfg": {**small, "context_length": 76, "vocab_size": 49408, "embed_cls": True, "output_tokens": True},
        "multimodal_cfg": {**small, "context_length": 76, "vocab_size": 49408, "attn_pooler_heads": 2},
    }
    source = tmp_path / "source"
    source.mkdir()
    preprocess_cfg = {"mean": [0.48, 0.46, 0.41], "std": [0.27, 0.26, 0.28]}
    (source / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": {**model_cfg, "custom_text": True}, "preprocess_cfg": preprocess_cfg})
    )
    theirs = open_clip.CoCa(**model_cfg)
    torch.nn.init.normal_(theirs.text_decoder.text_projection, std=0.1)  # open_clip leaves what the memory held
    torch.save(theirs.state_dict(), source / "open_clip_pytorch_model.bin")
    pictures = tmp_path / "pictures"
    rows = [json.loads(line) for line in (EMOJI / "train" / "metadata.jsonl").read_text().splitlines()]
    for i, row in enumerate(rows):
        folder = pictures if has_captions else pictures / ("tumor", "normal")[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(EMOJI / "train" / row["file_name"], folder)
    if has_captions:
        lines = [f"{row['file_name']},{row['text'][0]}" for row in rows]
        (pictures / "metadata.csv").write_text("\n".join(["file_name,text", *lines]))

    def coca(*arguments):
        result = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output

    coca("convert", source, tmp_path / "start")
    more = ["--model_name_or_path", tmp_path / "start", "--freeze", "vision_model", "--eval_share", "0.2"]
    if not has_captions:
        more += ["--text_column", "label", "--caption_templates", "a histology image of {} tissue."]
    tuned = tmp_path / "tuned"
    figures = script("finetune_captioning").main([*arguments(tuned, *more)[2:], "--dataset_name", str(pictures)])
    assert figures["train_loss"] > 0 and "eval_cider_d" in figures and "eval_i2t_r1" in figures
    assert coca("caption", pictures, "-m", tuned).count(".png") == len(rows)
    coca("index", pictures, "-o", tmp_path / "pictures.index", "-m", tuned)
    assert coca("search", tmp_path / "pictures.index", "normal tissue", "-m", tuned, "-k", 2).count(".png") == 2


def test_it_runs_as_a_command_and_wrong_arguments_are_named(tmp_path):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    command = [sys.executable, str(ROOT / "examples" / "pretrain.py"), "--config_name", str(TINY)]
    command += arguments(tmp_path / "out", "--text_column", "caption")
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert "There is no column 'caption' (`--text_column`), only 'image', 'text'" in result.stderr


def test_scripts_stay_short():
    scripts = list((ROOT / "examples").glob("*.py"))
    assert len(scripts) >= 7
    for path in scripts:
        assert len(path.read_text().splitlines()) < 250, path
