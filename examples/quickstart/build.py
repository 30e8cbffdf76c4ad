"""The quickstart's processor and model: a small CoCa on a frozen encoder, or from scratch."""

from collections.abc import Sequence

from datasets import Dataset
from pairs import questions_of
from transformers import PreTrainedModel

from modeling_coca import (
    CocaConfig,
    CocaForConditionalGeneration,
    CocaImageProcessorPil,
    CocaProcessor,
    CocaTokenizer,
)
from modeling_coca.training import freeze


def build_processor(
    dataset: Dataset, image_size: int, mean: Sequence[float], std: Sequence[float], max_text_length: int
) -> CocaProcessor:
    """A tokenizer of the training texts' own words, and an image processor with the encoder's normalisation."""
    texts = set(dataset["caption"])
    for questions in questions_of(dataset):
        texts.update(text for pair in questions for text in pair.values())
    tokenizer = CocaTokenizer(model_max_length=max_text_length).train_new_from_iterator(sorted(texts), vocab_size=3000)
    image_processor = CocaImageProcessorPil(
        size={"shortest_edge": image_size},
        crop_size={"height": image_size, "width": image_size},
        image_mean=list(mean),
        image_std=list(std),
    )
    return CocaProcessor(image_processor, tokenizer)


def build_model(
    tokenizer: CocaTokenizer,
    encoder: PreTrainedModel | None,
    image_size: int,
    feature_layers: list[int] | None,
    width: int,
    layers: int,
    dropout: float,
) -> CocaForConditionalGeneration:
    if encoder is None:
        vision_config = {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 6}
        vision_config |= {"image_size": image_size, "patch_size": 16}
    else:
        vision_config = encoder.config
    config = CocaConfig(
        vision_config=vision_config,
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_hidden_layers": 2 * layers,
            "num_multimodal_layers": layers,
            "num_attention_heads": 4,
            "max_position_embeddings": tokenizer.model_max_length + 1,
            "dropout": dropout,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_feature_layers=None if encoder is None else feature_layers,
        num_query_tokens=16,
        num_pooler_attention_heads=4,
        projection_dim=128,
    )
    # Eager: for texts of a dozen tokens half of a step would go to the backward pass of the fused CPU attention
    model = CocaForConditionalGeneration._from_config(config, attn_implementation="eager")
    if encoder is not None:
        model.model.vision_model.load_state_dict(encoder.state_dict())
        freeze(model, "vision_model")
    return model
