"""Trains a tiny model on rows in a fixed order, under whichever engine it was started by, and saves what came out.

Started by the tests as `python`, `torchrun` and `accelerate launch`. Takes the arguments of `TrainingArguments`, and:
"""

import faulthandler
import json
import os
import signal
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from transformers import HfArgumentParser, TrainerCallback, TrainingArguments
from transformers.distributed.configuration_utils import DistributedConfig

from modeling_coca import CocaConfig, CocaForConditionalGeneration, CocaProcessor
from modeling_coca.evaluation import CaptioningEvaluator, RetrievalEvaluator
from modeling_coca.training import CocaTrainer

TINY_CONFIG = Path(__file__).parents[2] / "hub_configs" / "coca-tiny" / "config.json"
EMOJI = Path(__file__).parents[1] / "fixtures" / "emoji" / "test"


@dataclass
class Options:
    changes: str = "{}"  # of the model's config, as JSON
    num_rows: int = 24
    contrastive_chunk_size: int | None = None
    kill_at_step: int | None = None  # SIGKILL to each process, as a power cut would
    processor: str | None = None  # a folder: captions and embeddings are evaluated, too
    fsdp_size: int | None = None  # sharded by transformers when it is loaded


class Kill(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def make_rows(count):
    generator = torch.Generator().manual_seed(1)
    rows = []
    for i in range(count):
        input_ids = torch.randint(3, 500, (9,), generator=generator)
        length = 4 + i % 6
        labels = input_ids.clone()
        input_ids[length:], labels[length:] = 0, -100
        rows.append(
            {
                "input_ids": input_ids,
                "attention_mask": (torch.arange(9) < length).long(),
                "labels": labels,
                "pixel_values": torch.randn(3, 32, 32, generator=generator),
            }
        )
    return rows


def evaluators(folder):
    """Over three batches of eight pictures, of which two processes have two and one."""
    rows = [json.loads(line) for line in (EMOJI / "metadata.jsonl").read_text().splitlines()]
    rows = [{"image": Image.open(EMOJI / row["file_name"]), "text": row["text"]} for row in rows]
    processor, shared = CocaProcessor.from_pretrained(folder), {"batch_size": 3, "truncation": True}
    return [
        RetrievalEvaluator(processor, rows, **shared),
        CaptioningEvaluator(processor, rows, generation_kwargs={"max_new_tokens": 6}, **shared),
    ]


def engine_of(trainer):
    accelerator = trainer.accelerator
    if trainer.is_deepspeed_enabled:
        return f"zero{accelerator.deepspeed_config['zero_optimization']['stage']}"
    if trainer.is_fsdp_enabled:
        return "fsdp2" if accelerator.is_fsdp2 else "fsdp1"
    if trainer.is_distributed_loading_by_transformers:
        return "distributed_config"
    return type(trainer.model_wrapped).__name__


def main():
    options, args = HfArgumentParser((Options, TrainingArguments)).parse_args_into_dataclasses()
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(540, exit=True)  # before the test gives up
    # A deprecated call of ours, below the libraries' own, is an error
    warnings.filterwarnings("error", category=FutureWarning, module="modeling_coca")
    fields = json.loads(TINY_CONFIG.read_text())
    for name, value in json.loads(options.changes).items():
        fields[name] = {**fields[name], **value} if isinstance(value, dict) else value
    torch.manual_seed(0)
    model = CocaForConditionalGeneration(CocaConfig(**fields))
    if options.fsdp_size:
        start = Path(args.output_dir) / "start"
        with args.main_process_first():
            model.save_pretrained(start)  # by the main process alone
        distributed = DistributedConfig(fsdp_size=options.fsdp_size)
        model = CocaForConditionalGeneration.from_pretrained(start, distributed_config=distributed)
    some = evaluators(options.processor) if options.processor else []
    rows = make_rows(options.num_rows)
    trainer = CocaTrainer(
        model,
        args,
        train_dataset=rows,
        eval_dataset=rows[:7],
        contrastive_chunk_size=options.contrastive_chunk_size,
        callbacks=[*some, *([Kill(options.kill_at_step)] if options.kill_at_step else [])],
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    if trainer.is_world_process_zero():
        result = {
            "log": [entry for entry in trainer.state.log_history if "loss" in entry],
            "evaluations": [entry for entry in trainer.state.log_history if "eval_loss" in entry],
            "captions": some[1].predictions if some else None,
            "processes": args.world_size,
            "engine": engine_of(trainer),
        }
        Path(args.output_dir, "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    sys.exit(main())
