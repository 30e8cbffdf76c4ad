import copy

import pytest
import torch
from transformers import TrainingArguments

from modeling_coca import CocaForConditionalGeneration
from modeling_coca.training import CocaTrainer, EmaCallback, interpolate


@pytest.fixture
def model(tiny_config):
    return CocaForConditionalGeneration(tiny_config())


@pytest.mark.parametrize("tied", [False, True])
def test_weights_lie_between(tiny_config, tied):
    before = CocaForConditionalGeneration(tiny_config(tie_word_embeddings=tied))
    after = copy.deepcopy(before)
    with torch.no_grad():
        for parameter in after.parameters():
            parameter.add_(1.0)
    kept = copy.deepcopy(after.state_dict())
    between = interpolate(before, after, 0.25)
    for name, value in between.state_dict().items():
        torch.testing.assert_close(value, before.state_dict()[name] + 0.25)
        assert torch.equal(after.state_dict()[name], kept[name])
    for alpha, model in ((0.0, before), (1.0, after)):
        for name, value in interpolate(before, after, alpha).state_dict().items():
            torch.testing.assert_close(value, model.state_dict()[name])
    assert (between.lm_head.weight is between.model.text_model.embed_tokens.weight) == tied


def test_models_that_do_not_belong_together(tiny_config, model):
    with pytest.raises(ValueError, match=r"\[0, 1\], got 1.5"):
        interpolate(model, model, 1.5)
    with pytest.raises(ValueError, match=r"embed_tokens.weight' has shape \(512, 32\)"):
        interpolate(model, CocaForConditionalGeneration(tiny_config(text_config={"vocab_size": 99})), 0.5)
    with pytest.raises(ValueError, match="different parameters, such as"):
        interpolate(model, model.model, 0.5)


def rows():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 500, (8, 6), generator=generator)
    pixels = torch.randn(8, 3, 32, 32, generator=generator)
    return [{"input_ids": i, "labels": i, "pixel_values": p} for i, p in zip(ids, pixels, strict=True)]


def trainer_of(model, folder, decay, **changes):
    fields = {"max_steps": 4, "learning_rate": 1e-2, "per_device_train_batch_size": 4, "use_cpu": True}
    fields |= {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", **changes}
    return CocaTrainer(
        model,
        TrainingArguments(str(folder), **fields),
        torch.utils.data.default_collate,
        train_dataset=rows(),
        eval_dataset=rows(),
        callbacks=[EmaCallback(decay)],
    )


def test_training_ends_with_the_average_of_its_steps(model, tmp_path):
    steps = [copy.deepcopy(model.state_dict())]
    trainer = trainer_of(model, tmp_path, 0.5)

    class Recorder(EmaCallback):
        def on_train_begin(self, *args, **kwargs):
            pass

        on_train_end = on_save = on_train_begin

        def on_step_end(self, args, state, control, model=None, **kwargs):
            steps.append(copy.deepcopy(model.state_dict()))

    trainer.add_callback(Recorder())
    trainer.train()
    decays = [min(0.5, (1 + step) / (10 + step)) for step in range(1, 5)]
    name = "lm_head.weight"
    expected = steps[0][name]
    for decay, step in zip(decays, steps[1:], strict=True):
        expected = decay * expected + (1 - decay) * step[name]
    torch.testing.assert_close(model.state_dict()[name], expected)
    assert not torch.equal(expected, steps[-1][name])


def test_frozen_parameters_and_wrong_settings(model, tmp_path):
    model.model.vision_model.requires_grad_(False)
    before = copy.deepcopy(model.model.vision_model.state_dict())
    trainer_of(model, tmp_path, 0.9).train()
    for name, value in model.model.vision_model.state_dict().items():
        assert torch.equal(value, before[name])
    with pytest.raises(ValueError, match="decay"):
        EmaCallback(1.0)
    changes = {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps"}
    with pytest.raises(ValueError, match="leave out one of the two"):
        trainer_of(model, tmp_path, 0.9, **changes).train()


def test_a_checkpoint_that_counts_as_complete_has_its_average(model, tmp_path, monkeypatch):
    """Older checkpoints are deleted when the new one is complete: a kill after that must not cost the average."""
    rotated = []

    def rotate(**kwargs):
        found = {path.name for path in (tmp_path / "checkpoint-2").iterdir()}
        rotated.append({"ema.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json"} <= found)

    monkeypatch.setattr("transformers.trainer.rotate_checkpoints", rotate)
    trainer_of(model, tmp_path, 0.5, max_steps=2, save_strategy="steps", save_steps=2, save_total_limit=1).train()
    assert rotated == [True]
