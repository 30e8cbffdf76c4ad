"""transformers' own pipelines, on a tiny model."""

import logging

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import pipeline

from modeling_coca import (
    CocaForConditionalGeneration,
    CocaForImageClassification,
    CocaImageProcessorPil,
    CocaModel,
    CocaProcessor,
    CocaTokenizer,
)

TEXTS = ["a red square", "a green square", "what is it?", "a photo of a blue square."]


@pytest.fixture(scope="module")
def folder(tiny_config, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tokenizer = CocaTokenizer(model_max_length=20).train_new_from_iterator(TEXTS, vocab_size=450)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = tiny_config(text_config={"vocab_size": len(tokenizer), "max_position_embeddings": 21, **ids})
    torch.manual_seed(0)
    CocaForConditionalGeneration(config).save_pretrained(path)
    CocaProcessor(CocaImageProcessorPil(size=config.vision_config.image_size), tokenizer).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def model(folder):
    return CocaForConditionalGeneration.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def processor(folder):
    return CocaProcessor.from_pretrained(folder)


@pytest.fixture
def images():
    noise = np.random.default_rng(0).integers(0, 256, (2, 40, 50, 3), dtype=np.uint8)
    return [Image.fromarray(pixels) for pixels in noise]


def caption(model, processor, image, prompt=None, **kwargs):
    """The text after the prompt, without a pipeline."""
    inputs = processor(images=[image], return_tensors="pt")
    if prompt is not None:
        inputs |= processor.tokenizer([prompt], return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=6, do_sample=False, **kwargs)
    return processor.batch_decode(ids, skip_special_tokens=True)[0]


def test_captioning(folder, model, processor, images):
    captioner = pipeline("image-text-to-text", model=str(folder))
    for image in images:
        (output,) = captioner(image, text="", max_new_tokens=6, do_sample=False)
        assert output["generated_text"] == caption(model, processor, image)
    batch = captioner(images, text=["", ""], max_new_tokens=6, do_sample=False, batch_size=2)
    assert [output["generated_text"] for output in batch] == [caption(model, processor, image) for image in images]


def test_prompts(folder, model, processor, images):
    captioner = pipeline("image-text-to-text", model=str(folder))
    prompts = ["what is it?", "a photo of a"]
    outputs = captioner(images, text=prompts, max_new_tokens=6, do_sample=False)
    for output, image, prompt in zip(outputs, images, prompts, strict=True):
        assert output["generated_text"] == caption(model, processor, image, prompt)
        assert output["generated_text"].startswith(prompt)


def test_chat(folder, model, processor, images):
    captioner = pipeline("image-text-to-text", model=str(folder))
    content = [{"type": "image", "image": images[0]}, {"type": "text", "text": "what is it?"}]
    chat = [{"role": "user", "content": content}]
    (output,) = captioner(text=chat, max_new_tokens=6, do_sample=False, return_full_text=False)
    expected = caption(model, processor, images[0], "what is it?").removeprefix("what is it?")
    assert output["generated_text"].strip() == expected.strip()


def test_zero_shot_classification(folder, processor, images):
    labels = ["red", "a green square", "blue"]
    classifier = pipeline("zero-shot-image-classification", model=str(folder))
    scores = {r["label"]: r["score"] for r in classifier(images[0], labels, hypothesis_template="a photo of {}")}
    texts = processor(text=[f"a photo of {label}" for label in labels], return_tensors="pt")
    pixels = processor(images=[images[0]], return_tensors="pt")
    with torch.no_grad():
        expected = CocaModel.from_pretrained(folder).eval()(**texts, **pixels).logits_per_image.softmax(-1)[0]
    assert [scores[label] for label in labels] == pytest.approx(expected.tolist(), abs=1e-5)


def test_features(folder, processor, images):
    dual = CocaModel.from_pretrained(folder).eval()
    pixels, tokens = (
        processor(images=[images[0]], return_tensors="pt"),
        processor(text=["a red square"], return_tensors="pt"),
    )
    with torch.no_grad():
        image, text = dual.get_image_features(**pixels), dual.get_text_features(**tokens)
    extract = pipeline("image-feature-extraction", model=str(folder))
    np.testing.assert_allclose(extract(images[0]), image.last_hidden_state, atol=1e-5)
    np.testing.assert_allclose(extract(images[0], pool=True), image.pooler_output, atol=1e-5)
    np.testing.assert_allclose(
        pipeline("feature-extraction", model=str(folder))("a red square"), text.last_hidden_state, atol=1e-5
    )


def test_image_classification(tiny_config, tmp_path, images):
    config = tiny_config(id2label={0: "cat", 1: "dog"}, label2id={"cat": 0, "dog": 1})
    CocaForImageClassification(config).save_pretrained(tmp_path)
    CocaImageProcessorPil(size=config.vision_config.image_size).save_pretrained(tmp_path)
    classifier = pipeline("image-classification", model=str(tmp_path))
    outputs = classifier(images)
    assert {label["label"] for label in outputs[0]} == {"cat", "dog"}
    assert sum(label["score"] for label in outputs[0]) == pytest.approx(1, abs=1e-5)


def test_a_plain_call_logs_nothing(folder, images, caplog):
    captioner = pipeline("image-text-to-text", model=str(folder))
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        captioner(images[0], text="", max_new_tokens=3)
    finally:
        logger.removeHandler(caplog.handler)
    assert [
        r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING and "chat" not in r.getMessage()
    ] == []
