"""Precisions and places of the weights: `from_pretrained(dtype=..., device_map=...)`."""

import pytest
import torch
import torch.nn.functional as F

from modeling_coca import (
    CocaForConditionalGeneration,
    CocaForImageClassification,
    CocaForVisualQuestionAnswering,
    CocaModel,
    CocaTextModel,
    CocaVisionModel,
)

pytest.importorskip("accelerate", reason="accelerate is not installed")
import accelerate

TEXTS = ["a red square", "green", "a photo of a blue square."]


@pytest.fixture(scope="module")
def inputs(processor, images):
    batch = processor(images=images, text=TEXTS, return_tensors="pt")
    return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


def arguments(model, inputs):
    """Those of the inputs that a model takes, with labels of its kind."""
    texts = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    pixels = {"pixel_values": inputs["pixel_values"]}
    labels = torch.tensor([0, 1, 1])
    return {
        CocaForConditionalGeneration: {**texts, **pixels, "labels": inputs["labels"], "logits_to_keep": 0},
        CocaForImageClassification: {**pixels, "labels": labels},
        CocaForVisualQuestionAnswering: {**texts, **pixels, "labels": labels},
        CocaModel: {**texts, **pixels, "return_loss": True},
        CocaTextModel: texts,
        CocaVisionModel: pixels,
    }[type(model)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("model_class", "field"),
    [
        (CocaForConditionalGeneration, "logits"),
        (CocaForImageClassification, "logits"),
        (CocaForVisualQuestionAnswering, "logits"),
        (CocaModel, "image_embeds"),
        (CocaModel, "text_embeds"),
        (CocaTextModel, "pooler_output"),
        (CocaVisionModel, "last_hidden_state"),
    ],
)
def test_half_precision(folder, inputs, tmp_path, model_class, field, dtype):
    torch.manual_seed(0)
    if model_class in (CocaTextModel, CocaVisionModel):
        dual = CocaModel.from_pretrained(folder)
        saved = dual.text_model if model_class is CocaTextModel else dual.vision_model
    else:
        saved = model_class.from_pretrained(folder)  # what is new in a class gets weights here
    saved.save_pretrained(tmp_path)
    full, half = model_class.from_pretrained(tmp_path).eval(), model_class.from_pretrained(tmp_path, dtype=dtype).eval()
    assert {p.dtype for p in half.parameters()} == {dtype}
    expected, outputs = full(**arguments(full, inputs)), half(**arguments(half, inputs))
    real = slice(None)
    if field == "logits" and model_class is CocaForConditionalGeneration:
        real = inputs["attention_mask"].bool()
    assert outputs[field].dtype == dtype
    cosine = F.cosine_similarity(outputs[field][real].float(), expected[field][real], dim=-1)
    assert cosine.min() > 0.999
    if outputs.get("loss") is not None:
        assert outputs.loss.isfinite()
        assert outputs.loss.item() == pytest.approx(expected.loss.item(), rel=0.02)
        outputs.loss.backward()
        expected.loss.backward()
        # Together they point in the same direction; each by itself may be small
        gradients = [
            torch.cat([p.grad.float().flatten() for p in model.parameters() if p.grad is not None])
            for model in (half, full)
        ]
        assert gradients[0].isfinite().all()
        assert F.cosine_similarity(*gradients, dim=0) > 0.99
    half.save_pretrained(tmp_path / "half")
    assert model_class.from_pretrained(tmp_path / "half", dtype="auto").dtype == dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"do_sample": True}, {"cache_implementation": "static"}], ids=str
)
def test_generation_in_half_precision(folder, inputs, dtype, options):
    model = CocaForConditionalGeneration.from_pretrained(folder, dtype=dtype).eval()
    prompt = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    for texts in ({}, prompt):
        outputs = model.generate(
            pixel_values=inputs["pixel_values"],
            **texts,
            max_new_tokens=4,
            return_dict_in_generate=True,
            output_scores=True,
            disable_compile=True,
            **options,
        )
        assert all(not scores.isnan().any() for scores in outputs.scores)
        assert len(outputs.sequences) == 3


def check_equal(model, full, inputs):
    """All ways into a model whose weights are elsewhere."""
    texts = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    pixels = inputs["pixel_values"]
    outputs, expected = model(**inputs, logits_to_keep=0), full(**inputs, logits_to_keep=0)
    for name in ("loss", "contrastive_loss", "caption_loss", "logits", "image_embeds", "text_embeds"):
        torch.testing.assert_close(outputs[name], expected[name], atol=1e-6, rtol=1e-5)
    for options in ({}, {"num_beams": 2}):
        options |= {"max_new_tokens": 5, "do_sample": False}
        assert torch.equal(model.generate(pixels, **options), full.generate(pixels, **options))
        assert torch.equal(
            model.generate(pixel_values=pixels, **texts, **options),
            full.generate(pixel_values=pixels, **texts, **options),
        )
    torch.testing.assert_close(
        model.get_image_features(pixels).image_embeds, full.get_image_features(pixels).image_embeds
    )
    torch.testing.assert_close(
        model.get_text_features(**texts).pooler_output, full.get_text_features(**texts).pooler_output
    )
    torch.testing.assert_close(
        model.model(**texts, pixel_values=pixels).logits_per_image,
        full.model(**texts, pixel_values=pixels).logits_per_image,
    )


@torch.no_grad()
@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}], ids=str)
def test_a_device_map_of_one_device(folder, model, inputs, device_map):
    mapped = CocaForConditionalGeneration.from_pretrained(folder, device_map=device_map).eval()
    check_equal(mapped, model, inputs)


@torch.no_grad()
def test_a_model_larger_than_the_memory_goes_to_disk_in_whole_layers(folder, model, inputs, tmp_path):
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    mapped = CocaForConditionalGeneration.from_pretrained(
        folder, device_map="auto", max_memory={"cpu": size // 3}, offload_folder=tmp_path
    ).eval()
    places = mapped.hf_device_map
    assert set(places.values()) == {"cpu", "disk"}
    assert any(p.is_meta for p in mapped.parameters())
    for name, module in mapped.named_modules():
        if type(module).__name__ in mapped._no_split_modules:
            assert not any(place.startswith(f"{name}.") for place in places)
    check_equal(mapped, model, inputs)


@torch.no_grad()
def test_parts_by_hand_on_disk(folder, model, inputs, tmp_path):
    """All weights but the temperature."""
    parts = ("vision_model", "image_pooler", "text_model", "visual_projection", "text_projection")
    device_map = {f"model.{part}": "disk" for part in parts} | {"text_decoder": "disk", "lm_head": "disk"}
    device_map["model.logit_scale"] = "cpu"
    mapped = CocaForConditionalGeneration.from_pretrained(folder, device_map=device_map, offload_folder=tmp_path).eval()
    assert {name for name, p in mapped.named_parameters() if not p.is_meta} == {"model.logit_scale"}
    check_equal(mapped, model, inputs)


@torch.no_grad()
def test_weights_that_come_for_each_layer(dual, inputs):
    """What accelerate does to a model on the CPU that computes elsewhere."""
    arguments = {name: inputs[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    expected = dual(**arguments).logits_per_image
    accelerate.cpu_offload(dual, execution_device="cpu")
    assert all(p.is_meta for p in dual.parameters())
    torch.testing.assert_close(dual(**arguments).logits_per_image, expected)
