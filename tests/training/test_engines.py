"""One training script under every engine: `python`, `accelerate launch`, DeepSpeed; killed and resumed under each."""

import importlib.util
import json
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from safetensors.torch import load_file

from modeling_coca import CocaForConditionalGeneration

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "examples" / "accelerate"
SCRIPT = Path(__file__).parent / "train_rows.py"
ARGUMENTS = [
    *("--use_cpu", "--disable_tqdm=True", "--report_to=none", "--lr_scheduler_type=constant", "--logging_steps=1"),
    *("--optim=sgd", "--learning_rate=0.05", "--max_steps=3", "--save_strategy=no", "--dataloader_drop_last"),
]
PYTHON = [sys.executable]
DDP = [
    *(sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"),
    *(f"--config_file={CONFIGS / 'ddp_cpu.yaml'}", "--main_process_port=0"),
]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def run(folder, start, *arguments):
    return subprocess.run(
        [*start, str(SCRIPT), f"--output_dir={folder}", *ARGUMENTS, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )


def train(folder, start, *arguments):
    """Weights and logged losses of a run that ends well."""
    result = run(folder, start, *arguments)
    assert result.returncode == 0, result.stderr[-3000:]
    report = json.loads((folder / "result.json").read_text())
    losses = [[entry[name] for name in ("loss", "contrastive_loss", "caption_loss")] for entry in report["log"]]
    return load_file(folder / "model.safetensors"), torch.tensor(losses), report


@pytest.mark.parametrize(
    ("start", "arguments", "engine"),
    [
        (DDP, [], "DistributedDataParallel"),
        pytest.param(TORCHRUN, ["--fsdp_size=2"], "distributed_config", marks=pytest.mark.slow),
    ],
    ids=["ddp", "fsdp2"],
)
def test_two_processes_train_and_evaluate_as_one_does(tmp_path, model_folder, start, arguments, engine):
    """Two processes of 4 rows, in chunks of 2, and one of 8: the same losses and weights, and figures of these weights."""
    shared = ["--train_sampling_strategy=sequential", f"--processor={model_folder}"]
    shared += ["--eval_strategy=steps", "--eval_steps=1", "--per_device_eval_batch_size=2"]
    one, losses, report = train(tmp_path / "one", PYTHON, *shared, "--per_device_train_batch_size=8")
    assert (report["processes"], report["engine"]) == (1, "CocaForConditionalGeneration")
    arguments = [*arguments, "--per_device_train_batch_size=4", "--contrastive_chunk_size=2"]
    two, two_losses, report = train(tmp_path / "two", start, *shared, *arguments)
    assert (report["processes"], report["engine"]) == (2, engine)
    torch.testing.assert_close(two_losses, losses, rtol=1e-6, atol=1e-5)
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-6)

    model = CocaForConditionalGeneration.from_pretrained(tmp_path / "two")
    assert len(report["evaluations"]) == 3
    for evaluator in runpy.run_path(str(SCRIPT))["evaluators"](model_folder):
        for name, value in evaluator(model).items():
            assert report["evaluations"][-1][f"eval_{name}"] == value, name
    assert report["captions"] == evaluator.predictions


@pytest.mark.slow
@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("start", [PYTHON, DDP], ids=["python", "ddp"])
def test_a_killed_run_resumes_to_the_same_weights(tmp_path, start, chunk_size):
    """SIGKILL between two checkpoints; with dropout, shuffled rows and Adam, whose states must all come back."""
    arguments = [
        *("--per_device_train_batch_size=4", "--optim=adamw_torch", "--learning_rate=1e-3", "--max_steps=6"),
        *("--save_strategy=steps", "--save_steps=2"),
        '--changes={"text_config": {"dropout": 0.1}, "vision_config": {"patch_dropout": 0.25}}',
        *([f"--contrastive_chunk_size={chunk_size}"] if chunk_size else []),
    ]
    whole, losses, _ = train(tmp_path / "whole", start, *arguments)
    killed = run(tmp_path / "killed", start, *arguments, "--kill_at_step=5")
    assert killed.returncode != 0
    if start is PYTHON:
        assert killed.returncode == -signal.SIGKILL
    checkpoint = tmp_path / "killed" / "checkpoint-4"
    assert checkpoint.is_dir() and not (tmp_path / "killed" / "checkpoint-6").exists()
    resumed, resumed_losses, _ = train(tmp_path / "killed", start, *arguments, f"--resume_from_checkpoint={checkpoint}")
    torch.testing.assert_close(resumed_losses, losses, rtol=0, atol=0)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_takes_the_config(path, monkeypatch):
    """A dry run: `accelerate launch` reads every field of the file, and knows all of them."""
    parser = launch_command_parser()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    args, defaults, _ = _validate_launch_command(parser.parse_args([f"--config_file={path}", "script.py"]))
    fields = yaml.safe_load(path.read_text())
    assert args.num_processes == fields["num_processes"] and args.mixed_precision == fields["mixed_precision"]
    assert args.use_deepspeed == path.stem.startswith("zero")
    assert args.use_fsdp == path.stem.startswith("fsdp")
    assert args.multi_gpu == path.stem.startswith("ddp")
    for name, value in {**fields.get("fsdp_config", {}), **fields.get("deepspeed_config", {})}.items():
        assert str(getattr(args, name)).lower() == str(value).lower(), name
    assert defaults is not None


ZERO = """
import copy, faulthandler, sys
import deepspeed, torch
import torch.distributed as dist
from test_distributed import evaluate, evaluators, make_batch, rows_of
from modeling_coca import CocaConfig, CocaForConditionalGeneration, CocaProcessor
from train_rows import TINY_CONFIG

faulthandler.dump_traceback_later(540, exit=True)
torch.set_num_threads(1)
processor = CocaProcessor.from_pretrained(sys.argv[1])
deepspeed.init_distributed("gloo")
batch = {name: value.float() if value.is_floating_point() else value for name, value in make_batch(8).items()}
for stage in (1, 2, 3):
    for kwargs in ({}, {"contrastive_chunk_size": 3}):
        torch.manual_seed(0)
        model = CocaForConditionalGeneration(CocaConfig.from_json_file(TINY_CONFIG)).train()
        one = copy.deepcopy(model)
        one._loss_group = lambda: None
        optimizer = torch.optim.SGD(one.parameters(), lr=0.02)
        config = {
            "train_micro_batch_size_per_gpu": 4,
            "gradient_clipping": 0.0,
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        client = torch.optim.SGD(model.parameters(), lr=0.02)
        engine = deepspeed.initialize(model=model, optimizer=client, config=config)[0]
        for step in range(3):
            optimizer.zero_grad()
            expected = one(**batch).loss
            expected.backward()
            optimizer.step()
            loss = engine(**rows_of(batch, dist.get_rank(), [4, 4]), **kwargs).loss
            engine.backward(loss)
            engine.step()
            mean = loss.detach().clone()
            dist.all_reduce(mean)
            torch.testing.assert_close(mean / 2, expected.detach(), rtol=1e-4, atol=1e-4)
            if step == 1 and not kwargs:
                whole = copy.deepcopy(one)  # with the same weights to the bit
                for parameter, other in zip(whole.parameters(), model.parameters(), strict=True):
                    with deepspeed.zero.GatheredParameters([other], enabled=stage == 3):
                        parameter.data.copy_(other)
                some = evaluators(processor)
                assert evaluate(some, engine, shared=True) == evaluate(some, whole)
        if dist.get_rank() == 0:
            print("EQUAL", stage, kwargs, flush=True)
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")
def test_zero_trains_and_evaluates_as_one_process(tmp_path, model_folder):
    (tmp_path / "zero.py").write_text(ZERO)
    path = os.pathsep.join([str(ROOT), str(SCRIPT.parent), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        [*TORCHRUN, str(tmp_path / "zero.py"), str(model_folder)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("EQUAL") == 6
