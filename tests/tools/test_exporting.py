"""Exported parts give what the model gives, at batches and lengths that they were not exported with."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers.exporters import ExportedModel

from modeling_coca import CocaForConditionalGeneration, CocaModel
from modeling_coca.exporting import export

pytest.importorskip("onnxscript", reason="onnxscript is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")


@pytest.fixture(scope="module")
def pixel_values(processor, images):
    return processor(images=images, return_tensors="pt")["pixel_values"]


@pytest.fixture(scope="module")
def reference(folder):
    return CocaForConditionalGeneration.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def onnx_folder(reference, pixel_values, tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx")
    export(reference, pixel_values[:1]).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def run(onnx_folder):
    """`run("image_encoder", pixel_values=...)`: outputs by name, by onnxruntime and numpy alone."""
    sessions = {
        name: onnxruntime.InferenceSession(onnx_folder / f"{name}.onnx", providers=["CPUExecutionProvider"])
        for name in ("image_encoder", "text_encoder", "text_decoder")
    }

    def call(part, **inputs):
        session = sessions[part]
        outputs = session.run(None, {name: np.asarray(value) for name, value in inputs.items()})
        return dict(zip((output.name for output in session.get_outputs()), outputs, strict=True))

    return call


def empty_cache(config, batch_size):
    text = config.text_config
    heads = text.num_attention_heads
    return torch.zeros(2 * text.num_hidden_layers, batch_size, heads, 0, text.hidden_size // heads)


@torch.no_grad()
def test_onnx_encoders(run, reference, processor, pixel_values):
    features = reference.get_image_features(pixel_values)
    np.testing.assert_allclose(
        run("image_encoder", pixel_values=pixel_values)["image_embeds"], features.image_embeds, atol=1e-5
    )
    for texts in (["a red square"], ["green", "a photo of a blue square.", "what is it?"], [""]):
        for padding_side in ("left", "right"):
            tokens = processor(text=texts, padding_side=padding_side, return_tensors="pt")
            expected = F.normalize(reference.get_text_features(**tokens).pooler_output, dim=-1)
            np.testing.assert_allclose(run("text_encoder", **tokens)["text_embeds"], expected, atol=1e-5)


@torch.no_grad()
def test_onnx_decoder_writes_as_generate_does(run, reference, pixel_values):
    config = reference.config.text_config
    image_cache = run("image_encoder", pixel_values=pixel_values)["image_cache"]
    ids, cache = np.full((3, 1), config.bos_token_id), empty_cache(reference.config, 3)
    tokens = reference.get_image_features(pixel_values).pooler_output
    for _ in range(9):
        step = run(
            "text_decoder",
            input_ids=ids[:, -1:],
            attention_mask=np.ones_like(ids),
            image_cache=image_cache,
            text_cache=cache,
        )
        expected = reference(torch.tensor(ids), encoder_hidden_states=tokens).logits[:, -1:]
        np.testing.assert_allclose(step["logits"], expected, atol=1e-4)
        cache = step["next_text_cache"]
        ids = np.concatenate([ids, step["logits"].argmax(-1)], axis=1)
    generated = reference.generate(pixel_values, do_sample=False, min_new_tokens=9, max_new_tokens=9)
    free = reference.generate(pixel_values, do_sample=False, max_new_tokens=9)
    for ours, forced, theirs in zip(ids.tolist(), generated.tolist(), free.tolist(), strict=True):
        length = (theirs.index(config.eos_token_id) + 1) if config.eos_token_id in theirs else len(theirs)
        assert ours[:length] == theirs[:length]
        assert length < len(theirs) or ours == forced


@torch.no_grad()
def test_onnx_decoder_takes_prompts(run, reference, processor, pixel_values):
    tokens = processor(text=["green", "a photo of a blue square."], padding_side="left", return_tensors="pt")
    image_cache = run("image_encoder", pixel_values=pixel_values[:2])["image_cache"]
    step = run("text_decoder", **tokens, image_cache=image_cache, text_cache=empty_cache(reference.config, 2))
    logits = reference(**tokens, pixel_values=pixel_values[:2]).logits
    real = tokens["attention_mask"].bool()
    np.testing.assert_allclose(step["logits"][real], logits[real], atol=1e-4)
    # the rest of the prompt after a part of it
    parts = [{name: value[:, i:j] for name, value in tokens.items()} for i, j in ((0, 3), (3, None))]
    first = run("text_decoder", **parts[0], image_cache=image_cache, text_cache=empty_cache(reference.config, 2))
    parts[1]["attention_mask"] = tokens["attention_mask"]
    second = run("text_decoder", **parts[1], image_cache=image_cache, text_cache=first["next_text_cache"])
    np.testing.assert_allclose(second["logits"], logits[:, 3:], atol=1e-4)
    np.testing.assert_allclose(second["next_text_cache"], step["next_text_cache"], atol=1e-5)


@torch.no_grad()
def test_a_saved_export_opens_again(onnx_folder, reference, pixel_values):
    exported = ExportedModel.from_pretrained(onnx_folder)
    assert exported.config.text_config.to_dict() == reference.config.text_config.to_dict()
    image = exported.runners["image_encoder"](pixel_values=pixel_values)
    torch.testing.assert_close(
        image["image_embeds"], reference.get_image_features(pixel_values).image_embeds, atol=1e-5, rtol=0
    )


@torch.no_grad()
def test_torch_export_of_a_model_with_the_shifted_mask(tiny_config):
    torch.manual_seed(1)
    model = CocaForConditionalGeneration(
        tiny_config(text_config={"shifted_cls_mask": True}, pooler_type="shared")
    ).eval()
    pixel_values = torch.randn(3, 3, 32, 32)
    runners = export(model, pixel_values, "dynamo").runners
    image, features = runners["image_encoder"](pixel_values=pixel_values), model.get_image_features(pixel_values)
    torch.testing.assert_close(image["image_embeds"], features.image_embeds, atol=1e-5, rtol=0)
    ids = torch.tensor(
        [[0, 0, 0, 1, 7, 0, 9, 4], [0, 0, 0, 1, 5, 6, 0, 8], [0, 0, 0, 1, 8, 9, 10, 11]]
    )  # 0 is "!" inside
    mask = (torch.arange(8) > 2).long().expand_as(ids).contiguous()
    text = runners["text_encoder"](input_ids=ids, attention_mask=mask)["text_embeds"]
    expected = F.normalize(model.get_text_features(ids, mask).pooler_output, dim=-1)
    torch.testing.assert_close(text, expected, atol=1e-5, rtol=0)

    logits = model(ids, attention_mask=mask, encoder_hidden_states=features.pooler_output).logits
    after_pad_id = F.pad(mask * (ids == 0), (1, -1))
    assert not torch.equal(mask * (1 - after_pad_id), mask)
    cache, start = empty_cache(model.config, 3), 0
    for end in (4, 5, 6, 7, 8):
        step = runners["text_decoder"](
            input_ids=ids[:, start:end].contiguous(),
            attention_mask=mask[:, :end].contiguous(),
            text_attention_mask=(mask * (1 - after_pad_id))[:, :end].contiguous(),
            image_cache=image["image_cache"],
            text_cache=cache,
        )
        torch.testing.assert_close(step["logits"][:, -1], logits[:, end - 1], atol=1e-4, rtol=0)
        cache, start = step["next_text_cache"], end


def test_the_dual_encoder_alone(dual, pixel_values):
    exported = export(dual, pixel_values, "dynamo")
    assert set(exported.components) == {"image_encoder", "text_encoder"}
    with torch.no_grad():
        outputs = exported.runners["image_encoder"](pixel_values=pixel_values)
        assert set(outputs) == {"image_embeds"}
        torch.testing.assert_close(outputs["image_embeds"], dual(pixel_values=pixel_values).image_embeds)


def test_a_model_in_training_mode_is_refused(tiny_config):
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        export(CocaModel(tiny_config()).train(), torch.zeros(1, 3, 32, 32))
