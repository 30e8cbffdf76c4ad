"""LoRA adapters of PEFT: trained by `CocaTrainer`, saved, opened, merged."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
import transformers
from packaging.version import Version
from transformers import Trainer
from transformers.integrations.peft import MIN_PEFT_VERSION

from modeling_coca import CocaForConditionalGeneration, CocaModel
from modeling_coca.training import CocaDataCollator, CocaTrainer, freeze

peft = pytest.importorskip("peft", reason="peft is not installed")

LORA = {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]}


@pytest.fixture
def arguments(arguments):
    return functools.partial(arguments, max_steps=8)


@pytest.fixture
def batch(processor, rows):
    return CocaDataCollator(processor)(rows)


@pytest.fixture
def adapted(model):
    """A model with adapters that do something from the start."""
    return peft.get_peft_model(model, peft.LoraConfig(**LORA, init_lora_weights=False)).eval()


@torch.no_grad()
def answers(model, batch):
    """All that a model gives for a batch."""
    outputs = model(**batch, logits_to_keep=0)
    ids = model.generate(pixel_values=batch["pixel_values"], do_sample=False, max_new_tokens=6)
    return {
        **{name: outputs[name] for name in ("loss", "contrastive_loss", "caption_loss", "logits")},
        "image_embeds": outputs.image_embeds,
        "text_embeds": outputs.text_embeds,
        "ids": F.pad(ids, (0, 7 - ids.shape[1])),
    }


def test_train_save_open_merge(folder, arguments, batch, processor, rows, tmp_path):
    base = CocaForConditionalGeneration.from_pretrained(folder)
    before = copy.deepcopy(base.state_dict())
    model = peft.get_peft_model(base, peft.LoraConfig(**LORA))
    trainer = CocaTrainer(model, arguments(), CocaDataCollator(processor), train_dataset=rows, eval_dataset=rows)
    assert trainer.label_names == ["labels"]
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    for name in ("loss", "contrastive_loss", "caption_loss"):
        assert logs[-1][name] < logs[0][name] - 0.1
    assert logs[0]["temperature"] == logs[-1]["temperature"] == pytest.approx(0.07, abs=1e-6)
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(
        metrics["eval_contrastive_loss"] + 2 * metrics["eval_caption_loss"], abs=1e-4
    )
    for name, value in model.get_base_model().state_dict().items():
        if "lora_" not in name:
            assert torch.equal(value, before[name.replace(".base_layer", "")])

    model.eval()
    expected = answers(model, batch)
    trainer.save_model(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    opened = peft.PeftModel.from_pretrained(
        CocaForConditionalGeneration.from_pretrained(folder), tmp_path / "adapter"
    ).eval()
    torch.testing.assert_close(answers(opened, batch), expected, atol=1e-5, rtol=0)
    by_transformers = CocaForConditionalGeneration.from_pretrained(tmp_path / "adapter").eval()
    torch.testing.assert_close(answers(by_transformers, batch), expected, atol=1e-5, rtol=0)

    merged = opened.merge_and_unload()
    assert type(merged) is CocaForConditionalGeneration
    torch.testing.assert_close(answers(merged, batch), expected, atol=1e-4, rtol=0)
    merged.save_pretrained(tmp_path / "merged")
    again = CocaForConditionalGeneration.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(answers(again, batch), answers(merged, batch), atol=0, rtol=0)


def test_adapters_off_are_the_model(adapted, batch, folder):
    plain = answers(CocaForConditionalGeneration.from_pretrained(folder).eval(), batch)
    assert (answers(adapted, batch)["logits"] - plain["logits"]).abs().max() > 0.01
    with adapted.disable_adapter():
        torch.testing.assert_close(answers(adapted, batch), plain, atol=1e-6, rtol=0)


def test_an_adapter_on_the_output_layer_counts_in_the_loss(model, batch):
    config = peft.LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).eval()
    outputs = adapted(**batch, logits_to_keep=0)
    expected = F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    torch.testing.assert_close(outputs.caption_loss, expected, atol=1e-5, rtol=0)
    outputs.caption_loss.backward()
    assert all(p.grad.abs().sum() > 0 for n, p in adapted.named_parameters() if "lora_" in n)


def test_a_frozen_part_keeps_its_adapters_as_they_are(adapted, arguments, processor, rows):
    counts = freeze(adapted, "vision_model", "text_decoder.layers.0")
    assert counts.trainable == sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    before = {name: p.detach().clone() for name, p in adapted.named_parameters()}
    CocaTrainer(adapted, arguments(max_steps=2), CocaDataCollator(processor), train_dataset=rows).train()
    changed = {name for name, p in adapted.named_parameters() if not torch.equal(p, before[name])}
    lora = {name for name in before if "lora_" in name}
    frozen = {name for name in lora if ".vision_model." in name or ".text_decoder.layers.0." in name}
    assert frozen
    assert changed == lora - frozen
    assert not adapted.get_base_model().model.vision_model.training


def test_the_dual_encoder(dual, folder, arguments, processor, rows, tmp_path):
    model = peft.get_peft_model(dual, peft.LoraConfig(**LORA, task_type="FEATURE_EXTRACTION"))
    collator = CocaDataCollator(processor, return_loss=True)
    trainer = Trainer(model, arguments(), collator, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.1
    assert trainer.evaluate(rows)["eval_loss"] < losses[0]
    model.eval().save_pretrained(tmp_path)
    inputs = collator(rows)
    with torch.no_grad():
        expected = model(**inputs).logits_per_image
        opened = peft.AutoPeftModelForFeatureExtraction.from_pretrained(tmp_path).eval()
        assert isinstance(opened.get_base_model(), CocaModel)
        torch.testing.assert_close(opened(**inputs).logits_per_image, expected, atol=1e-5, rtol=0)
        merged = opened.merge_and_unload()
        torch.testing.assert_close(merged(**inputs).logits_per_image, expected, atol=1e-4, rtol=0)
        torch.testing.assert_close(
            merged.get_image_features(inputs["pixel_values"]).pooler_output,
            model.get_image_features(inputs["pixel_values"]).pooler_output,
            atol=1e-5,
            rtol=0,
        )


def test_gradients_with_checkpointed_activations(adapted, batch):
    adapted(**batch).loss.backward()
    expected = {name: p.grad.clone() for name, p in adapted.named_parameters() if p.requires_grad}
    adapted.zero_grad()
    adapted.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    adapted.train()
    adapted(**batch).loss.backward()
    for name, p in adapted.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, expected[name], atol=1e-5, rtol=1e-4)


@pytest.mark.skipif(
    Version(peft.__version__) < Version(MIN_PEFT_VERSION),
    reason=f"transformers {transformers.__version__} wants PEFT {MIN_PEFT_VERSION} for adapters of its own",
)
def test_several_adapters_by_transformers_own_methods(model, batch):
    plain = answers(model, batch)
    for i, name in enumerate(("one", "two")):
        torch.manual_seed(i)
        model.add_adapter(peft.LoraConfig(**LORA, init_lora_weights=False), name)
    found = {}
    for name in ("one", "two"):
        model.set_adapter(name)
        found[name] = answers(model, batch)["logits"]
    assert (found["one"] - found["two"]).abs().max() > 0.01
    model.disable_adapters()
    torch.testing.assert_close(answers(model, batch), plain, atol=1e-6, rtol=0)
