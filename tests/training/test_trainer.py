import copy
import errno
import functools
import json
import logging
import math
import operator
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Trainer

from modeling_coca import CocaForConditionalGeneration, CocaImageProcessorPil, CocaModel, CocaProcessor, CocaTokenizer
from modeling_coca.evaluation import RetrievalEvaluator
from modeling_coca.training import ClampLogitScaleCallback, CocaDataCollator, CocaTrainer, freeze, last_checkpoint

COLORS = {"red": (255, 0, 0), "blue": (0, 0, 255), "green": (0, 255, 0), "white": (255, 255, 255)}


@pytest.fixture(scope="module")
def dataset():
    rows = [(name, Image.fromarray(np.full((32, 32, 3), color, np.uint8))) for name, color in COLORS.items()] * 3
    captions = [[f"a {name} square", f"{name} square of number {i}"] for i, (name, _) in enumerate(rows)]
    return datasets.Dataset.from_dict(
        {"image": [image for _, image in rows], "text": captions},
        features=datasets.Features({"image": datasets.Image(), "text": datasets.List(datasets.Value("string"))}),
    )


@pytest.fixture(scope="module")
def processor(dataset):
    tokenizer = CocaTokenizer(model_max_length=16).train_new_from_iterator(
        functools.reduce(operator.iadd, dataset["text"], []), vocab_size=512
    )
    return CocaProcessor(CocaImageProcessorPil(size={"shortest_edge": 32}, crop_size=32), tokenizer)


@pytest.fixture
def model(tiny_config):
    torch.manual_seed(0)
    return CocaForConditionalGeneration(tiny_config())


def logs_of(trainer, key="loss"):
    return [entry for entry in trainer.state.log_history if key in entry]


def test_plain_trainer_trains_both_losses(model, arguments, dataset, processor):
    before = copy.deepcopy(model.state_dict())
    rows = dataset.select(range(4))
    args = arguments(max_steps=6, learning_rate=1e-3)
    trainer = Trainer(model, args, CocaDataCollator(processor, caption_choice="first"), rows)
    trainer.train()
    losses = [entry["loss"] for entry in logs_of(trainer)]
    assert len(losses) == 6
    assert losses[-1] < losses[0] - 0.1
    for name in ("lm_head.weight", "model.text_projection.weight", "model.image_pooler.contrastive_pooler.query"):
        assert not torch.equal(before[name], model.state_dict()[name])
    assert set(trainer.evaluate(dataset)) >= {"eval_loss"}


def test_plain_trainer_trains_and_evaluates_the_dual_encoder(tiny_config, arguments, dataset, processor):
    dual = CocaModel(tiny_config())
    collator = CocaDataCollator(processor, caption_choice="first", return_loss=True)
    trainer = Trainer(dual, arguments(max_steps=8, learning_rate=1e-3), collator, dataset.select(range(4)))
    trainer.train()
    losses = [entry["loss"] for entry in logs_of(trainer)]
    assert losses[-1] < losses[0] - 0.1
    assert trainer.evaluate(dataset)["eval_loss"] > 0


@pytest.mark.parametrize("accumulation", [1, 3])
def test_both_losses_are_logged_as_recomputed_by_hand(model, arguments, dataset, processor, accumulation):
    seen = []

    class Recorder(CocaDataCollator):
        def __call__(self, rows):
            seen.append(super().__call__(rows))
            return seen[-1]

    start = copy.deepcopy(model)
    # 12 rows in batches of 2 are 6 micro-batches, all of which are collated in order; learning rate 0 keeps the weights
    trainer = CocaTrainer(
        model,
        arguments(
            per_device_train_batch_size=2,
            gradient_accumulation_steps=accumulation,
            max_steps=6 // accumulation,
            logging_steps=2,
            learning_rate=0.0,
        ),
        Recorder(processor),
        train_dataset=dataset,
    )
    trainer.train()
    start.eval()  # no dropout in this configuration
    with torch.no_grad():
        outputs = [start(**batch) for batch in seen[:6]]
    per_log = 2 * accumulation
    logs = logs_of(trainer)
    assert len(logs) == 6 // per_log
    for i, entry in enumerate(logs):
        some = outputs[i * per_log : (i + 1) * per_log]
        contrastive = np.mean([o.contrastive_loss.item() for o in some])
        caption = np.mean([o.caption_loss.item() for o in some])
        assert entry["contrastive_loss"] == pytest.approx(contrastive, abs=1e-5)
        assert entry["caption_loss"] == pytest.approx(caption, abs=1e-5)
        assert entry["loss"] == pytest.approx(contrastive + 2 * caption, abs=1e-4)
        assert entry["temperature"] == pytest.approx(0.07, abs=1e-6)
        assert entry["samples_per_second"] > 0
        assert entry["learning_rate"] == 0


def test_a_short_last_step_of_an_epoch_is_weighted_as_the_loss_is(model, arguments, dataset, processor):
    options = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 3, "max_steps": 2, "logging_steps": 2}
    trainer = CocaTrainer(model, arguments(**options), CocaDataCollator(processor), train_dataset=dataset)
    trainer.train()  # 4 micro-batches: 3 and 1
    (entry,) = logs_of(trainer)
    assert entry["loss"] == pytest.approx(entry["contrastive_loss"] + 2 * entry["caption_loss"], abs=1e-4)


def test_evaluation_logs_both_losses_and_takes_the_first_caption(model, arguments, dataset, processor):
    trainer = CocaTrainer(
        model, arguments(per_device_eval_batch_size=5), CocaDataCollator(processor), eval_dataset=dataset
    )
    metrics = trainer.evaluate()
    assert trainer.data_collator.caption_choice == "random"
    collator = CocaDataCollator(processor, caption_choice="first")
    sums = np.zeros(2)
    with torch.no_grad():
        for rows in (range(5), range(5, 10), range(10, 12)):
            outputs = model(**collator([dataset[i] for i in rows]))
            sums += len(rows) * np.array([outputs.contrastive_loss.item(), outputs.caption_loss.item()])
    contrastive, caption = sums / 12
    assert metrics["eval_contrastive_loss"] == pytest.approx(contrastive, abs=1e-5)
    assert metrics["eval_caption_loss"] == pytest.approx(caption, abs=1e-5)
    assert metrics["eval_loss"] == pytest.approx(contrastive + 2 * caption, abs=1e-4)
    assert trainer.evaluate() == pytest.approx(
        {**metrics, **{k: v for k, v in trainer.state.log_history[-1].items() if "second" in k or "time" in k}},
        abs=1e-6,
    )
    assert "test_caption_loss" in trainer.predict(dataset).metrics


def test_only_training_drops_a_last_short_batch(model, arguments, dataset, processor):
    options = {"per_device_train_batch_size": 5, "per_device_eval_batch_size": 5, "dataloader_drop_last": True}
    args = arguments(**options, dataloader_persistent_workers=True, dataloader_num_workers=1)
    collator = CocaDataCollator(processor, return_loss=False)
    trainer = CocaTrainer(model, args, collator, train_dataset=dataset, eval_dataset=dataset)
    counts = {
        name: [len(batch["pixel_values"]) for batch in loader]
        for name, loader in (
            ("train", trainer.get_train_dataloader()),
            ("evaluation", trainer.get_eval_dataloader()),
            ("test", trainer.get_test_dataloader(dataset)),
        )
    }
    assert counts == {"train": [5, 5], "evaluation": [5, 5, 2], "test": [5, 5, 2]}
    assert args.dataloader_drop_last
    args = arguments(per_device_eval_batch_size=5)
    expected = CocaTrainer(model, args, collator, eval_dataset=dataset).evaluate()
    assert trainer.evaluate()["eval_caption_loss"] == expected["eval_caption_loss"]


@pytest.mark.parametrize(
    ("rows", "drop_last", "weight", "warns"),
    [
        (12, False, 1.0, True),  # 5 on each of two processes
        (10, False, 1.0, False),
        (12, True, 1.0, False),
        (12, False, 0.0, False),
    ],
)
def test_several_processes_are_told_of_batches_that_are_filled_up(
    tiny_config, arguments, dataset, processor, monkeypatch, caplog, rows, drop_last, weight, warns
):
    args = arguments(per_device_train_batch_size=5, dataloader_drop_last=drop_last)
    trainer = CocaTrainer(
        CocaForConditionalGeneration(tiny_config(contrastive_loss_weight=weight)),
        args,
        CocaDataCollator(processor),
        train_dataset=dataset.select(range(rows)),
    )
    monkeypatch.setattr(type(args), "world_size", 2)
    monkeypatch.setattr(Trainer, "train", lambda self, *args: None)
    monkeypatch.setattr(logging.getLogger("modeling_coca.training.trainer"), "propagate", True)
    trainer.train()
    assert ("batches of 10, so the last one" in caplog.text) == warns


def test_a_loss_that_is_switched_off_is_not_logged(tiny_config, arguments, dataset, processor):
    model = CocaForConditionalGeneration(tiny_config(contrastive_loss_weight=0))
    trainer = CocaTrainer(model, arguments(max_steps=1), CocaDataCollator(processor), train_dataset=dataset)
    trainer.train()
    (entry,) = logs_of(trainer)
    assert "contrastive_loss" not in entry
    assert entry["loss"] == pytest.approx(2 * entry["caption_loss"], abs=1e-4)


def test_four_micro_batches_of_one_are_a_batch_of_four_for_the_caption_loss(tiny_config, arguments, dataset, processor):
    # Captions of equal length, so that the mean of the means is the mean over tokens
    rows = dataset.select(range(4)).map(lambda row: {"text": row["text"][:1]})
    collator = CocaDataCollator(processor)
    assert collator([rows[i] for i in range(4)])["attention_mask"].all()
    weights = []
    for batch_size, accumulation in ((4, 1), (1, 4)):
        torch.manual_seed(0)
        model = CocaForConditionalGeneration(tiny_config(contrastive_loss_weight=0))
        options = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulation}
        # SGD: Adam would magnify the rounding of gradients that are 0
        args = arguments(**options, optim="sgd", learning_rate=0.1, max_grad_norm=0)
        trainer = CocaTrainer(model, args, collator, train_dataset=rows)
        trainer.train()
        weights.append((model.state_dict(), [entry["caption_loss"] for entry in logs_of(trainer)]))
    (one, one_losses), (four, four_losses) = weights
    assert one_losses == pytest.approx(four_losses, abs=1e-5)
    assert one_losses[-1] < one_losses[0]
    for name in one:
        assert torch.allclose(one[name], four[name], atol=1e-5), name


def test_coca_trainer_and_trainer_give_the_same_weights(tiny_config, arguments, dataset, processor):
    states = []
    for trainer_class in (Trainer, CocaTrainer):
        torch.manual_seed(0)
        model = CocaForConditionalGeneration(tiny_config())
        collator = CocaDataCollator(processor, caption_choice="first")
        trainer_class(model, arguments(), collator, train_dataset=dataset).train()
        states.append(model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize(("start", "expected"), [(10.0, math.log(100)), (-3.0, 0.0), (2.0, 2.0)])
@pytest.mark.parametrize("trainer_class", [Trainer, CocaTrainer])
def test_logit_scale_is_clamped(model, arguments, dataset, processor, start, expected, trainer_class):
    with torch.no_grad():
        model.model.logit_scale.fill_(start)
    callbacks = [ClampLogitScaleCallback()] if trainer_class is Trainer else []
    args = arguments(max_steps=1, learning_rate=0.0)
    trainer_class(model, args, CocaDataCollator(processor), train_dataset=dataset, callbacks=callbacks).train()
    assert model.model.logit_scale.item() == pytest.approx(expected, abs=1e-6)


def test_weight_decay_groups(model, arguments, dataset, processor):
    trainer = CocaTrainer(model, arguments(weight_decay=0.1), CocaDataCollator(processor), train_dataset=dataset)
    decay = set(trainer.get_decay_parameter_names(model))
    names = dict(model.named_parameters())
    assert {
        "model.text_model.embed_tokens.weight",
        "lm_head.weight",
        "model.vision_model.embeddings.patch_embedding.weight",
        "model.image_pooler.caption_pooler.attn.q_proj.weight",
        "text_decoder.layers.0.cross_block.mlp.fc1.weight",
        "model.text_projection.weight",
    } <= decay
    rest = set(names) - decay
    assert {
        "model.logit_scale",
        "model.image_pooler.caption_pooler.query",
        "model.image_pooler.contrastive_pooler.query",
        "model.text_model.class_embedding",
        "model.text_model.embed_positions.weight",
        "model.vision_model.embeddings.class_embedding",
        "model.vision_model.embeddings.position_embedding.weight",
        "text_decoder.final_layer_norm.weight",
    } <= rest
    for name in rest:
        is_table = name.endswith(("query", "embed_positions.weight", "position_embedding.weight"))
        assert names[name].ndim == 1 or is_table, name
    assert all(names[name].ndim > 1 and "norm" not in name for name in decay)
    trainer.create_optimizer()
    sizes = {group["weight_decay"]: sum(p.numel() for p in group["params"]) for group in trainer.optimizer.param_groups}
    assert sizes == {0.1: sum(names[n].numel() for n in decay), 0.0: sum(names[n].numel() for n in rest)}


def test_projections_called_query_in_other_encoders_decay(tiny_config, arguments, processor):
    vision = {"model_type": "vit", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    fields = {**tiny_config().to_dict(), "vision_config": {**vision, "image_size": 32, "patch_size": 8}}
    model = CocaForConditionalGeneration(type(tiny_config())(**fields))
    trainer = CocaTrainer(model, arguments(), CocaDataCollator(processor))
    vision = {n for n in trainer.get_decay_parameter_names(model) if n.startswith("model.vision_model.")}
    matrices = {n for n, p in model.model.vision_model.named_parameters() if p.ndim > 1}
    no_decay = {"embeddings.cls_token", "embeddings.position_embeddings"}
    assert {n.removeprefix("model.vision_model.") for n in vision} == matrices - no_decay


def test_frozen_parts_stay_as_they_are(model, arguments, dataset, processor):
    freeze(model, "vision_model", "text_model")
    before = copy.deepcopy(model.state_dict())
    trainer = CocaTrainer(model, arguments(weight_decay=0.1), CocaDataCollator(processor), train_dataset=dataset)
    trainer.train()
    assert not model.model.vision_model.training
    assert model.text_decoder.training
    after = model.state_dict()
    frozen = [n for n in before if n.startswith(("model.vision_model.", "model.text_model."))]
    assert all(torch.equal(before[n], after[n]) for n in frozen)
    assert not torch.equal(before["lm_head.weight"], after["lm_head.weight"])


def test_resumed_training_gives_the_same_weights(tiny_config, arguments, dataset, processor, tmp_path):
    def train(folder, **changes):
        torch.manual_seed(0)
        model = CocaForConditionalGeneration(tiny_config(text_config={"dropout": 0.1}))
        options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 4, "output_dir": str(tmp_path / folder)}
        trainer = CocaTrainer(model, arguments(**options), CocaDataCollator(processor), train_dataset=dataset)
        trainer.train(**changes)
        return model.state_dict(), [entry["caption_loss"] for entry in logs_of(trainer)]

    whole, losses = train("whole")  # 3 steps an epoch: the checkpoint lies within one, and captions are random
    resumed, resumed_losses = train("resumed", resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert resumed_losses == pytest.approx(losses, abs=1e-6)  # those of the checkpoint are loaded with it
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_half_a_checkpoint_is_passed_over_and_written_anew(tiny_config, arguments, dataset, processor, tmp_path):
    def run(folder, resume=None):
        torch.manual_seed(1)
        args = arguments(output_dir=str(folder), max_steps=4, save_strategy="steps", save_steps=2)
        collator = CocaDataCollator(processor)
        trainer = CocaTrainer(CocaForConditionalGeneration(tiny_config()), args, collator, train_dataset=dataset)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run(tmp_path / "whole").model.state_dict()
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    half = tmp_path / "killed" / "checkpoint-4"
    for text in (None, '{"global_step": 4, '):  # before the last file, and within it
        (half / "trainer_state.json").unlink(missing_ok=True)
        (half / "optimizer.pt").unlink(missing_ok=True)
        if text is not None:
            (half / "trainer_state.json").write_text(text)
        (half / "of_the_killed_run").touch()
        assert last_checkpoint(tmp_path / "killed") == str(tmp_path / "killed" / "checkpoint-2")
        resumed = run(tmp_path / "killed", resume=True).model.state_dict()
        assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
        assert (half / "optimizer.pt").exists() and not (half / "of_the_killed_run").exists()
        assert last_checkpoint(tmp_path / "killed") == str(half)
    with pytest.raises(ValueError, match="no complete checkpoint"):
        run(tmp_path / "nothing", resume=True)
    assert last_checkpoint(tmp_path / "nowhere") is None


def test_a_full_disk_is_told_and_leaves_no_half_checkpoint(model, arguments, dataset, processor, tmp_path, monkeypatch):
    def fail(self, output_dir):
        raise OSError(errno.ENOSPC, "No space left on device")

    args = arguments(max_steps=2, save_strategy="steps", save_steps=2, output_dir=str(tmp_path / "out"))
    trainer = CocaTrainer(model, args, CocaDataCollator(processor), train_dataset=dataset)
    monkeypatch.setattr(CocaTrainer, "_save_optimizer_and_scheduler", fail)
    with pytest.raises(OSError, match=r"^The disk is full: .*/checkpoint-2 could not be written"):
        trainer.train()
    assert not (tmp_path / "out" / "checkpoint-2").exists()


def test_a_saved_model_has_whole_files_whenever_it_is_killed(
    model, arguments, dataset, processor, tmp_path, monkeypatch
):
    args = arguments(output_dir=str(tmp_path / "out"))
    trainer = CocaTrainer(model, args, CocaDataCollator(processor), train_dataset=dataset)
    trainer.save_model()
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def fail(self, folder, **kwargs):
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(CocaForConditionalGeneration, "save_pretrained", fail)
    with pytest.raises(KeyboardInterrupt):
        trainer.save_model()
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize("trainer_class", [Trainer, CocaTrainer])
def test_evaluators_are_callbacks(model, arguments, dataset, processor, trainer_class):
    evaluator = RetrievalEvaluator(processor, dataset, name="squares")
    args = arguments(
        max_steps=2,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="squares_mean_recall",
        greater_is_better=True,
    )
    collator = CocaDataCollator(processor, caption_choice="first")
    trainer = trainer_class(model, args, collator, train_dataset=dataset, eval_dataset=dataset, callbacks=[evaluator])
    trainer.train()
    entries = logs_of(trainer, "eval_squares_mean_recall")
    assert [entry["step"] for entry in entries] == [1, 2]
    assert all("eval_loss" in entry for entry in entries)
    assert trainer.state.best_metric == max(entry["eval_squares_mean_recall"] for entry in entries)
    assert evaluator(model)["squares_mean_recall"] == trainer.state.best_metric  # the best model was loaded
    assert trainer.evaluate()["eval_squares_mean_recall"] == trainer.state.best_metric


def test_a_processor_makes_the_collator_and_raw_columns_are_kept(model, arguments, dataset, processor):
    args = arguments(max_steps=1, remove_unused_columns=True)
    trainer = CocaTrainer(model, args, train_dataset=dataset, processing_class=processor)
    assert isinstance(trainer.data_collator, CocaDataCollator)
    trainer.train()
    assert len(logs_of(trainer)) == 1


def test_label_smoothing_is_refused(model, arguments, processor):
    with pytest.raises(ValueError, match="label_smoothing_factor"):
        CocaTrainer(model, arguments(label_smoothing_factor=0.1), CocaDataCollator(processor))


@pytest.mark.slow
def test_losses_of_two_processes(tmp_path):
    # In training those of the joined batch are logged, in evaluation means over the processes' batches
    script = tmp_path / "run.py"
    script.write_text(
        textwrap.dedent(
            """
            import json, sys, torch
            from transformers import TrainingArguments
            from modeling_coca import CocaConfig, CocaForConditionalGeneration
            from modeling_coca.training import CocaTrainer

            torch.set_num_threads(1)
            torch.manual_seed(0)
            model = CocaForConditionalGeneration(CocaConfig.from_json_file(sys.argv[1]))
            generator = torch.Generator().manual_seed(1)
            rows = []
            for _ in range(6):
                ids = torch.randint(3, 500, (5,), generator=generator)
                rows.append({"input_ids": ids, "labels": ids, "pixel_values": torch.randn(3, 32, 32, generator=generator)})
            args = TrainingArguments(
                sys.argv[2], per_device_train_batch_size=2, per_device_eval_batch_size=2, max_steps=1, logging_steps=1,
                learning_rate=0.0, save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True,
                train_sampling_strategy="sequential", ddp_backend="gloo",
            )
            trainer = CocaTrainer(model, args, train_dataset=rows[:4], eval_dataset=rows)
            trainer.train()
            metrics = trainer.evaluate()
            if trainer.is_world_process_zero():
                with torch.no_grad():
                    output = model(**{k: torch.stack([row[k] for row in rows[:4]]) for k in rows[0]})
                    joined = [output.contrastive_loss.item(), output.caption_loss.item()]
                print("RESULT", json.dumps([joined, trainer.state.log_history[0], metrics]))
            """
        )
    )
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    config = root / "hub_configs" / "coca-tiny" / "config.json"
    result = subprocess.run(
        [*command, str(config), str(tmp_path / "out")],
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    line = next(line for line in result.stdout.splitlines() if line.startswith("RESULT"))
    expected, entry, metrics = json.loads(line.removeprefix("RESULT"))
    assert entry["contrastive_loss"] == pytest.approx(expected[0], abs=1e-5)
    assert entry["caption_loss"] == pytest.approx(expected[1], abs=1e-5)
    assert entry["loss"] == pytest.approx(expected[0] + 2 * expected[1], abs=1e-4)
    # 6 rows on 2 processes: the last global batch is filled up, and the filling is left out
    assert metrics["eval_loss"] == pytest.approx(
        metrics["eval_contrastive_loss"] + 2 * metrics["eval_caption_loss"], abs=1e-4
    )
