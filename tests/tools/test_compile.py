"""`torch.compile` of both encoders: one graph for all batches and lengths, without breaks."""

import shutil

import pytest
import torch
from packaging.version import Version

pytestmark = pytest.mark.skipif(
    Version(torch.__version__) < Version("2.7"), reason="PyTorch 2.6 cannot compile what transformers wraps models in"
)
TEXTS = ["green", "what is it?", "a red square", "a photo of a blue square."]


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def compile_once(function):
    """Compiled for all shapes; a second graph is an error, and so is a break in the first."""
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=True)
    return torch._dynamo.config.patch(error_on_recompile=True)(compiled)


@torch.no_grad()
def test_texts_of_any_length_share_a_graph(dual, processor):
    encode = compile_once(dual.get_text_features)
    lengths = set()
    for texts in (TEXTS[:2], TEXTS[2:], TEXTS, TEXTS[1:]):
        tokens = processor(text=texts, return_tensors="pt")
        lengths.add(tokens["input_ids"].shape)
        torch.testing.assert_close(
            encode(**tokens).pooler_output, dual.get_text_features(**tokens).pooler_output, atol=1e-5, rtol=0
        )
    assert len(lengths) == 4
    with pytest.raises(torch._dynamo.exc.RecompileError):  # the check can fail
        encode(**tokens, output_hidden_states=True)


@torch.no_grad()
def test_batches_of_images_share_a_graph(model):
    encode = compile_once(model.get_image_features)
    for batch_size in (2, 3, 5):
        pixel_values = torch.randn(batch_size, 3, 32, 32)
        torch.testing.assert_close(
            encode(pixel_values).pooler_output, model.get_image_features(pixel_values).pooler_output, atol=1e-5, rtol=0
        )


def test_a_compiled_training_step(model, processor, rows):
    """Both losses and their gradients; the loss selects the tokens that have a label, which breaks a graph."""
    batch = processor(images=[row["image"] for row in rows], text=[row["text"] for row in rows], return_tensors="pt")
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    model(**batch).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    torch.compile(model, backend="aot_eager")(**batch).loss.backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], atol=1e-5, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@torch.no_grad()
def test_machine_code(model, processor, images):
    """Inductor, the backend that `torch.compile` has by default."""
    batch = processor(images=images, text=TEXTS[:3], return_tensors="pt")
    expected = model.get_image_features(batch["pixel_values"]).image_embeds
    options = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8, "cache_implementation": "static"}
    ids = model.generate(batch["pixel_values"], **options)
    encode = torch.compile(model.get_image_features, fullgraph=True)
    torch.testing.assert_close(encode(batch["pixel_values"]).image_embeds, expected, atol=1e-5, rtol=0)
    model.forward = torch.compile(model.forward, fullgraph=True)
    assert torch.equal(model.generate(batch["pixel_values"], **options), ids)
