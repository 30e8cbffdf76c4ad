"""A tiny model with its processor in a folder, as other tools open it."""

import numpy as np
import pytest
import torch
from PIL import Image

from modeling_coca import (
    CocaConfig,
    CocaForConditionalGeneration,
    CocaImageProcessorPil,
    CocaModel,
    CocaProcessor,
    CocaTokenizer,
)

COLORS = {"red": (255, 0, 0), "blue": (0, 0, 255), "green": (0, 255, 0), "white": (255, 255, 255)}
CAPTIONS = [f"a {color} square" for color in COLORS]
TEXTS = ["a red square", "a photo of a blue square.", "what is it?", "green"]


@pytest.fixture(scope="session")
def processor() -> CocaProcessor:
    tokenizer = CocaTokenizer(model_max_length=20).train_new_from_iterator([*CAPTIONS, *TEXTS], vocab_size=450)
    return CocaProcessor(CocaImageProcessorPil(size=32), tokenizer)


@pytest.fixture(scope="session")
def config(tiny_config, processor) -> CocaConfig:
    ids = {name: getattr(processor.tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return tiny_config(text_config={"vocab_size": len(processor.tokenizer), "max_position_embeddings": 21, **ids})


@pytest.fixture(scope="session")
def folder(config, processor, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    CocaForConditionalGeneration(config).save_pretrained(path)
    processor.save_pretrained(path)
    return path


@pytest.fixture
def model(folder) -> CocaForConditionalGeneration:
    return CocaForConditionalGeneration.from_pretrained(folder).eval()


@pytest.fixture
def dual(folder) -> CocaModel:
    return CocaModel.from_pretrained(folder).eval()


@pytest.fixture(scope="session")
def images() -> list[Image.Image]:
    """Noise, so that no two have anything in common."""
    noise = np.random.default_rng(0).integers(0, 256, (3, 40, 50, 3), dtype=np.uint8)
    return [Image.fromarray(pixels) for pixels in noise]


@pytest.fixture(scope="session")
def rows() -> list[dict]:
    """Squares of one colour with their captions."""
    return [{"image": Image.new("RGB", (32, 32), color), "text": f"a {name} square"} for name, color in COLORS.items()]
