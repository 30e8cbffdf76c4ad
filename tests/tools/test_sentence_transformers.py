"""sentence-transformers opens a CoCa folder as it is."""

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import pipeline

from modeling_coca import CocaConfig, CocaForConditionalGeneration, CocaModel

pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

TEXTS = ["a red square", "a photo of a blue square.", "what is it?", "green"]


@pytest.fixture(scope="module", params=["coca_vision_model", "timm_wrapper"])
def any_folder(request, folder, config, processor, tmp_path_factory):
    if request.param == "coca_vision_model":
        return folder
    path = tmp_path_factory.mktemp("timm")
    vision_config = {"model_type": "timm_wrapper", "architecture": "test_efficientnet", "do_pooling": False}
    CocaForConditionalGeneration(CocaConfig(**{**config.to_dict(), "vision_config": vision_config})).save_pretrained(
        path
    )
    processor.save_pretrained(path)
    return path


def test_embeddings_are_those_of_the_dual_encoder(any_folder, processor, images):
    encoder = SentenceTransformer(str(any_folder), device="cpu")
    dual = CocaModel.from_pretrained(any_folder).eval()
    with torch.no_grad():
        expected = dual(**processor(images=images, text=TEXTS, return_tensors="pt"))
    image_embeddings, text_embeddings = encoder.encode(images), encoder.encode(TEXTS)
    assert encoder.get_embedding_dimension() == dual.config.projection_dim
    assert image_embeddings.shape == (3, dual.config.projection_dim)
    assert text_embeddings.shape == (4, dual.config.projection_dim)
    cosines = encoder.similarity(image_embeddings, text_embeddings)
    torch.testing.assert_close(cosines, expected.image_embeds @ expected.text_embeds.T, atol=1e-6, rtol=0)
    torch.testing.assert_close(cosines * dual.logit_scale.exp(), expected.logits_per_image, atol=1e-4, rtol=0)
    # one at a time, hence without padding
    alone = np.stack([encoder.encode(text) for text in TEXTS])
    np.testing.assert_allclose(alone, text_embeddings, atol=1e-5)
    normalized = encoder.encode(images[0], normalize_embeddings=True)
    np.testing.assert_allclose(normalized, expected.image_embeds[0], atol=1e-6)


def test_prompts_and_too_long_texts(folder, processor, dual):
    encoder = SentenceTransformer(str(folder), device="cpu", prompts={"photo": "a photo of "})
    np.testing.assert_allclose(
        encoder.encode("a red square", prompt_name="photo"), encoder.encode("a photo of a red square"), atol=1e-6
    )
    long = "a red square " * 20  # cut to the context, as it is everywhere in sentence-transformers
    tokens = processor(text=[long], truncation=True, return_tensors="pt")
    assert tokens["input_ids"].shape[1] == encoder.max_seq_length == 20
    with torch.no_grad():
        expected = dual.get_text_features(**tokens).pooler_output[0]
    np.testing.assert_allclose(encoder.encode(long), expected, atol=1e-5)


def test_training_saving_and_opening_again(folder, rows, tmp_path):
    encoder = SentenceTransformer(str(folder), device="cpu")
    dataset = datasets.Dataset.from_list([{"anchor": row["text"], "positive": row["image"]} for row in rows])
    trainer = SentenceTransformerTrainer(
        encoder,
        SentenceTransformerTrainingArguments(
            str(tmp_path / "run"),
            per_device_train_batch_size=4,
            max_steps=8,
            learning_rate=1e-3,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        ),
        dataset,
        loss=MultipleNegativesRankingLoss(encoder),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.1
    encoder.eval()
    expected = encoder.encode([row["image"] for row in rows])
    encoder.save_pretrained(str(tmp_path / "saved"))
    again = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    np.testing.assert_allclose(again.encode([row["image"] for row in rows]), expected, atol=1e-6)
    dual = CocaModel.from_pretrained(tmp_path / "saved").eval()
    texts = encoder.encode(["a red square"])
    with torch.no_grad():
        tokens = again.tokenizer(["a red square"], return_tensors="pt")
        ours = dual(**tokens).text_embeds
    torch.testing.assert_close(ours, F.normalize(torch.tensor(texts), dim=-1), atol=1e-6, rtol=0)


def test_feature_pipelines_take_the_token_states(any_folder, processor, images):
    """Both want what sentence-transformers must not find in the output's class: token states, first of all fields."""
    dual = CocaModel.from_pretrained(any_folder).eval()
    tokens = processor(text=["a red square"], return_tensors="pt")
    pixels = processor(images=images[:1], return_tensors="pt")
    with torch.no_grad():
        text, image = dual(**tokens), dual(**pixels)
    assert next(iter(text)) == next(iter(image)) == "last_hidden_state"
    extract = pipeline("feature-extraction", model=str(any_folder))
    np.testing.assert_allclose(extract("a red square"), text.last_hidden_state, atol=1e-5)
    extract = pipeline("image-feature-extraction", model=str(any_folder))
    np.testing.assert_allclose(extract(images[0]), image.last_hidden_state, atol=1e-5)
    np.testing.assert_allclose(extract(images[0], pool=True), image.pooler_output, atol=1e-5)
