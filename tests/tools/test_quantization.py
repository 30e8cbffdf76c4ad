"""int8 on the CPU by `from_pretrained(quantization_config=...)`."""

import pytest
import torch
import torch.nn.functional as F
from transformers import BitsAndBytesConfig, TorchAoConfig

from modeling_coca import CocaForConditionalGeneration, CocaModel

# By default transformers keeps the last layer of a class in full precision, which is another one in each class
KEPT = ["lm_head", ".*_projection"]


def torchao_config(name):
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    return TorchAoConfig(getattr(quantization, name)(), modules_to_not_convert=KEPT)


def bitsandbytes_config():
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=KEPT)


@pytest.fixture(
    params=[
        pytest.param(lambda: torchao_config("Int8WeightOnlyConfig"), id="torchao-weights"),
        pytest.param(lambda: torchao_config("Int8DynamicActivationInt8WeightConfig"), id="torchao-dynamic"),
        pytest.param(bitsandbytes_config, id="bitsandbytes"),
    ]
)
def quantization_config(request):
    return request.param()


@pytest.fixture(scope="module")
def wide_folder(config, processor, tmp_path_factory):
    """Wide enough for most of the weights to be in what is quantised, and for blocks of 32."""
    path = tmp_path_factory.mktemp("wide")
    fields, size = config.to_dict(), {"hidden_size": 128, "intermediate_size": 512}
    fields |= {"pooler_hidden_size": 128, "projection_dim": 64}
    for name in ("vision_config", "text_config"):
        fields[name] |= size
    fields["text_config"]["multimodal_intermediate_size"] = 512
    torch.manual_seed(0)
    CocaForConditionalGeneration(type(config)(**fields)).save_pretrained(path)
    return path


@torch.no_grad()
def test_int8(wide_folder, processor, images, quantization_config, tmp_path):
    model = CocaForConditionalGeneration.from_pretrained(
        wide_folder, quantization_config=quantization_config, device_map="cpu"
    ).eval()
    full = CocaForConditionalGeneration.from_pretrained(wide_folder).eval()
    in_int8 = {name for name, p in model.named_parameters() if type(p) is not torch.nn.Parameter}
    assert in_int8 == {
        f"{name}.weight"
        for name, module in full.named_modules()
        if isinstance(module, torch.nn.Linear) and not name.endswith(("lm_head", "_projection"))
    }
    texts = ["a red square", "green", "a photo of a blue square."]
    batch = processor(images=images, text=texts, return_tensors="pt")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    outputs, expected = (m(**batch, labels=labels, logits_to_keep=0) for m in (model, full))
    for name in ("image_embeds", "text_embeds"):
        assert F.cosine_similarity(outputs[name], expected[name], dim=-1).min() > 0.999
        assert not torch.equal(outputs[name], expected[name])
    real = batch["attention_mask"].bool()
    assert F.cosine_similarity(outputs.logits[real], expected.logits[real], dim=-1).min() > 0.995
    for name in ("loss", "contrastive_loss", "caption_loss"):
        assert outputs[name].item() == pytest.approx(expected[name].item(), rel=0.02)
    # what generation does with a cache is what the model says of the whole text
    ids = model.generate(batch["pixel_values"], do_sample=False, max_new_tokens=6, min_new_tokens=6)
    logits = model(ids, pixel_values=batch["pixel_values"]).logits[:, :-1]
    chosen = logits.gather(-1, ids[:, 1:, None])[..., 0]
    eos = model.config.text_config.eos_token_id
    logits[..., eos] = -torch.inf  # by `min_new_tokens`
    assert (logits.max(-1).values - chosen).max() < 0.05  # activations are rounded by the rows that they come with
    assert model.generate(batch["pixel_values"], num_beams=2, max_new_tokens=4).shape[0] == 3

    model.save_pretrained(tmp_path)
    sizes = [sum(file.stat().st_size for file in path.glob("*.safetensors")) for path in (tmp_path, wide_folder)]
    assert sizes[0] < 0.4 * sizes[1]
    again = CocaForConditionalGeneration.from_pretrained(tmp_path, device_map="cpu").eval()
    torch.testing.assert_close(again(**batch).logits, outputs.logits, atol=1e-5, rtol=0)
    dual = CocaModel.from_pretrained(wide_folder, quantization_config=quantization_config, device_map="cpu").eval()
    torch.testing.assert_close(dual(**batch).image_embeds, outputs.image_embeds, atol=1e-5, rtol=0)
    if isinstance(quantization_config, BitsAndBytesConfig):  # torchao's file names the layers of one class
        dual = CocaModel.from_pretrained(tmp_path, device_map="cpu").eval()
        torch.testing.assert_close(dual(**batch).text_embeds, outputs.text_embeds, atol=1e-5, rtol=0)
