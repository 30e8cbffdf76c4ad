"""The contrastive step in chunks: losses and gradients of the whole batch, in the memory of a chunk."""

import copy
import runpy
from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainingArguments

import modeling_coca.modeling_coca as modeling
from modeling_coca import CocaForConditionalGeneration, CocaModel
from modeling_coca.training import CocaTrainer, freeze

ROWS = 8
PeakMemory = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "peak_memory.py"))["PeakMemory"]


@pytest.fixture
def batch():
    """Captions of different lengths, padded on the right, with a prefix that has no loss in one row."""
    torch.manual_seed(1)
    lengths = torch.tensor([[4], [9], [6], [5], [9], [7], [3], [8]])
    input_ids = torch.randint(3, 500, (ROWS, 9))
    attention_mask = (torch.arange(9) < lengths).long()
    labels = input_ids.masked_fill(attention_mask == 0, -100)
    labels[1, :5] = -100
    pixel_values = torch.randn(ROWS, 3, 32, 32)
    return {
        "input_ids": input_ids.masked_fill(attention_mask == 0, 0),
        "attention_mask": attention_mask,
        "labels": labels,
        "pixel_values": pixel_values.double(),
    }


def step(model, batch, **kwargs):
    """Losses and gradients of a step, in fp64 but for autocast, so that only real differences are left."""
    model.train().zero_grad()
    outputs = model(**batch, **kwargs)
    outputs.loss.backward()
    losses = [x for x in (outputs.loss, outputs.contrastive_loss, outputs.caption_loss) if x is not None]
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return torch.stack(losses).detach(), grads


def assert_equal_steps(one, other, **tolerance):
    tolerance = tolerance or {"rtol": 1e-7, "atol": 1e-10}
    torch.testing.assert_close(one[0], other[0], **tolerance)
    assert one[1].keys() == other[1].keys()
    for name in one[1]:
        torch.testing.assert_close(one[1][name], other[1][name], **tolerance, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("chunk_size", [1, 3, 4, ROWS, 100])
@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_chunks_give_the_losses_and_gradients_of_the_whole_batch(tiny_config, batch, chunk_size, kind):
    model = CocaForConditionalGeneration(tiny_config(contrastive_loss=kind)).double()
    assert_equal_steps(step(model, batch, contrastive_chunk_size=chunk_size), step(model, batch))


@pytest.mark.parametrize("pooler_type", ["parallel", "shared", "none"])
@pytest.mark.parametrize("weights", [(1, 0), (0, 2)], ids=["contrastive", "caption"])
def test_layouts_and_single_losses(tiny_config, batch, pooler_type, weights):
    contrastive, caption = weights
    config = tiny_config(pooler_type=pooler_type, contrastive_loss_weight=contrastive, caption_loss_weight=caption)
    model = CocaForConditionalGeneration(config).double()
    assert_equal_steps(step(model, batch, contrastive_chunk_size=3), step(model, batch))


def test_masks_features_and_positions_are_cut_with_the_rows(tiny_config, batch):
    model = CocaForConditionalGeneration(tiny_config()).double()
    with torch.no_grad():
        tokens = model.model.vision_model(batch.pop("pixel_values")).last_hidden_state
    batch["image_hidden_states"] = tokens
    batch["contrastive_mask"] = torch.tensor([True, False, True, True, False, False, True, True])
    # Padded on the left: what comes before the first token is no label, in a chunk as in the whole
    for name in ("input_ids", "attention_mask", "labels"):
        batch[name] = batch[name].flip(1)
    batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    assert_equal_steps(step(model, batch, contrastive_chunk_size=3), step(model, batch))
    del batch["attention_mask"], batch["position_ids"]
    assert_equal_steps(step(model, batch, contrastive_chunk_size=3), step(model, batch))


def dropout_config(tiny_config):
    return tiny_config(
        text_config={"dropout": 0.2, "attention_dropout": 0.2},
        vision_config={"attention_dropout": 0.2, "patch_dropout": 0.25},
    )


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_second_pass_drops_what_the_first_dropped(tiny_config, batch, monkeypatch, checkpointing):
    """Chunks that run once and stay in memory are the truth; the generator ends where theirs does."""
    model = CocaForConditionalGeneration(dropout_config(tiny_config)).double()
    if checkpointing:
        model.gradient_checkpointing_enable()
    torch.manual_seed(7)
    chunked, after = step(model, batch, contrastive_chunk_size=3), torch.rand(1)
    with monkeypatch.context() as patch:
        patch.setattr(modeling, "checkpoint", lambda run, *args, use_reentrant: run(*args))
        torch.manual_seed(7)
        kept, expected_after = step(model, batch, contrastive_chunk_size=3), torch.rand(1)
    assert_equal_steps(chunked, kept)
    assert torch.equal(after, expected_after)
    torch.manual_seed(8)
    other = step(model, batch, contrastive_chunk_size=3)
    assert not torch.allclose(other[0], chunked[0], rtol=1e-4)  # the dropout is there


def test_bf16(tiny_config, batch, monkeypatch):
    batch["pixel_values"] = batch["pixel_values"].float()
    model = CocaForConditionalGeneration(tiny_config())
    with torch.autocast("cpu", torch.bfloat16):
        chunked = step(model, batch, contrastive_chunk_size=3)
        whole = step(model, batch)
    assert_equal_steps(chunked, whole, rtol=0.05, atol=0.02)
    with monkeypatch.context() as patch, torch.autocast("cpu", torch.bfloat16):
        patch.setattr(modeling, "checkpoint", lambda run, *args, use_reentrant: run(*args))
        kept = step(model, batch, contrastive_chunk_size=3)
    assert_equal_steps(chunked, kept, rtol=1e-4, atol=1e-6)  # the second pass runs in the same precision


def peak_of(model, batch, **kwargs):
    model.train().zero_grad()
    with PeakMemory() as memory:
        model(**batch, **kwargs).loss.backward()
    return memory.peak


def test_memory_is_that_of_a_chunk(tiny_config, batch):
    """Eight chunks take little more than one and its gradients, and less than a third of the whole batch."""
    model = CocaForConditionalGeneration(tiny_config()).double()
    large = {name: value.repeat(8, *[1] * (value.ndim - 1)) for name, value in batch.items()}
    whole, chunked = peak_of(model, large), peak_of(model, large, contrastive_chunk_size=ROWS)
    one_chunk = peak_of(model, batch)
    assert chunked < 2 * one_chunk
    assert chunked < whole / 3


def test_evaluation_and_generation_take_it_too(tiny_config, batch):
    model = CocaForConditionalGeneration(tiny_config()).eval()
    with torch.no_grad():
        chunked, whole = model(**batch, contrastive_chunk_size=3), model(**batch)
    torch.testing.assert_close(chunked.loss, whole.loss)
    torch.testing.assert_close(chunked.image_embeds, whole.image_embeds)
    torch.testing.assert_close(chunked.text_embeds, whole.text_embeds)


def test_a_size_below_one_is_refused(tiny_config, batch):
    model = CocaForConditionalGeneration(tiny_config())
    with pytest.raises(ValueError, match="`contrastive_chunk_size` must be at least 1, got 0"):
        model(**batch, contrastive_chunk_size=0)
    with pytest.raises(ValueError, match="`contrastive_chunk_size` must be at least 1, got -1"):
        CocaTrainer(model, contrastive_chunk_size=-1)
    with pytest.raises(ValueError, match="needs a `CocaForConditionalGeneration`"):
        CocaTrainer(CocaModel(tiny_config()), contrastive_chunk_size=2)


# ------------------------------------------------------------------------------------------------------ CocaTrainer


def train(tiny_config, batch, folder, trainer_class=CocaTrainer, trainer_options=None, model=None, **changes):
    rows = [{name: value[i] for name, value in batch.items()} for i in range(ROWS)]
    torch.manual_seed(0)
    model = CocaForConditionalGeneration(tiny_config()) if model is None else model
    args = TrainingArguments(
        **{
            "output_dir": str(folder),
            "per_device_train_batch_size": ROWS,
            "max_steps": 3,
            # SGD: Adam would magnify the rounding of gradients that are 0
            "optim": "sgd",
            "learning_rate": 0.05,
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            **changes,
        }
    )
    trainer = trainer_class(model, args, train_dataset=rows, **(trainer_options or {}))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return model.state_dict(), losses


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="plain"),
        pytest.param({"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}, id="accumulation"),
        pytest.param({"gradient_checkpointing": True}, id="checkpointing"),
    ],
)
def test_trainer_trains_to_the_weights_of_the_whole_batch(tiny_config, batch, tmp_path, changes):
    options = {"contrastive_chunk_size": 3}
    chunked, chunked_losses = train(tiny_config, batch, tmp_path, trainer_options=options, **changes)
    whole, whole_losses = train(tiny_config, batch, tmp_path, trainer_class=Trainer, **changes)
    assert chunked_losses == pytest.approx(whole_losses, abs=1e-5)
    assert whole_losses[-1] < whole_losses[0]
    for name in whole:
        torch.testing.assert_close(chunked[name], whole[name], rtol=1e-4, atol=1e-5)


def test_trainer_in_bf16_with_adapters_and_frozen_parts(tiny_config, batch, tmp_path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = CocaForConditionalGeneration(tiny_config())
    freeze(model, "vision_model")
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2))
    other = copy.deepcopy(adapted)
    options = {"contrastive_chunk_size": 3}
    _, chunked = train(tiny_config, batch, tmp_path, trainer_options=options, model=adapted, bf16=True)
    _, whole = train(tiny_config, batch, tmp_path, model=other, bf16=True)
    assert chunked == pytest.approx(whole, rel=0.01)


def test_interrupted_chunked_training_gives_the_same_weights(tiny_config, batch, tmp_path):
    def run(folder, **kwargs):
        torch.manual_seed(0)
        model = CocaForConditionalGeneration(dropout_config(tiny_config))
        rows = [{name: value[i] for name, value in batch.items()} for i in range(ROWS)]
        args = TrainingArguments(
            str(tmp_path / folder),
            per_device_train_batch_size=4,
            max_steps=5,
            save_steps=3,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        )
        CocaTrainer(model, args, train_dataset=rows, contrastive_chunk_size=2).train(**kwargs)
        return model.state_dict()

    whole = run("whole")
    resumed = run("resumed", resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
