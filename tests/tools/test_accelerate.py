"""`accelerate launch` of a training script on two processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from modeling_coca import CocaForConditionalGeneration

pytest.importorskip("accelerate", reason="accelerate is not installed")

ROOT = Path(__file__).parents[2]
EMOJI = ROOT / "tests" / "fixtures" / "emoji"


def launch(script, output_dir, batch_size, *launcher):
    arguments = {
        "model_name_or_path": output_dir.parent / "pretrained",
        "dataset_name": EMOJI,
        "output_dir": output_dir,
        "per_device_train_batch_size": batch_size,
        "per_device_eval_batch_size": 4,  # of both: a batch is the contrast of an evaluation
        "max_steps": 3,
        "optim": "sgd",  # Adam turns gradients that are 0 but for rounding into steps
        "learning_rate": 0.1,
        "seed": 0,
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "use_cpu": True,
    }
    command = [*launcher, script, *(part for name, value in arguments.items() for part in (f"--{name}", value))]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    environment["HF_DATASETS_CACHE"] = str(output_dir.parent / "datasets")
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        list(map(str, command)), env=environment, capture_output=True, text=True, timeout=600, cwd=output_dir.parent
    )
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.slow
def test_two_processes_train_as_one(config, processor, tmp_path):
    """The same rows in each step, half of them in each process, give the same weights and figures."""
    CocaForConditionalGeneration(config).save_pretrained(tmp_path / "pretrained")
    processor.save_pretrained(tmp_path / "pretrained")
    script = ROOT / "examples" / "finetune_captioning.py"
    launch(script, tmp_path / "one", 8, sys.executable)
    launch(
        script,
        tmp_path / "two",
        4,
        *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"),
        *("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"),
    )
    before, one, two = (
        CocaForConditionalGeneration.from_pretrained(tmp_path / name).state_dict()
        for name in ("pretrained", "one", "two")
    )
    assert not torch.equal(before["lm_head.weight"], one["lm_head.weight"])
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=1e-5, rtol=1e-4)
    figures, expected = (json.loads((tmp_path / name / "all_results.json").read_text()) for name in ("two", "one"))
    for name in ("train_loss", "eval_loss", "eval_contrastive_loss", "eval_caption_loss", "eval_i2t_r1", "eval_bleu4"):
        assert figures[name] == pytest.approx(expected[name], abs=1e-4), name
