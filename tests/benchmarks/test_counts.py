"""What speed rests on, counted and not timed: what is computed once, and what is not computed at all.

Compiled graphs are counted in tests/test_generation_coca.py.
"""

import pytest
import torch
from torch import nn

from modeling_coca import CocaConfig, CocaForConditionalGeneration

BOS, EOS, PAD = 57, 58, 0
BEAMS, NEW_TOKENS, CONTEXT, QUERIES = 3, 5, 30, 4


@pytest.fixture(scope="module")
def model() -> CocaForConditionalGeneration:
    torch.manual_seed(0)
    config = CocaConfig(
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 8,
            "patch_size": 4,
        },
        text_config={
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 4,
            "num_multimodal_layers": 2,
            "num_attention_heads": 2,
            "vocab_size": 60,
            "max_position_embeddings": CONTEXT + 1,
            "bos_token_id": BOS,
            "eos_token_id": EOS,
            "pad_token_id": PAD,
        },
        projection_dim=8,
        num_query_tokens=QUERIES,
        num_pooler_attention_heads=2,
    )
    return CocaForConditionalGeneration(config).eval()


class Rows:
    """Rows (batch x tokens) that each named layer multiplies."""

    def __init__(self, **layers: nn.Module):
        self.seen = {name: [] for name in layers}
        self.handles = [
            layer.register_forward_pre_hook(
                lambda _, inputs, name=name: self.seen[name].append(inputs[0].shape[:-1].numel())
            )
            for name, layer in layers.items()
        ]

    def __enter__(self) -> dict[str, list[int]]:
        return self.seen

    def __exit__(self, *_) -> None:
        for handle in self.handles:
            handle.remove()


def layers_of(model: CocaForConditionalGeneration) -> dict[str, nn.Module]:
    cross = model.text_decoder.layers[1].cross_block
    return {
        "vision": model.model.vision_model.layers[0].mlp.fc1,
        "pooler": model.model.image_pooler.caption_pooler.attn.k_proj,
        "keys": cross.cross_attn.k_proj,
        "values": cross.cross_attn.v_proj,
        "unimodal": model.model.text_model.layers[0].mlp.fc1,
        "multimodal": cross.mlp.fc1,
        "head": model.lm_head,
    }


@pytest.mark.parametrize("num_beams", [1, BEAMS])
def test_generation(model, num_beams):
    images = torch.randn(2, 3, 8, 8)
    with Rows(**layers_of(model)) as rows:
        model.generate(
            images, num_beams=num_beams, do_sample=False, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS
        )
    patches = 2 * (4 + 1)
    assert rows["vision"] == [patches]  # each image once, whatever the beams
    assert rows["pooler"] == [patches]
    assert rows["keys"] == rows["values"] == [2 * QUERIES]  # once an image
    step = [2 * num_beams]  # one token of each sequence, and only its logits
    for name in ("unimodal", "multimodal", "head"):
        assert rows[name] == step * NEW_TOKENS


def test_generation_from_a_prompt_keeps_one_row_of_logits(model):
    prompt = torch.tensor([[BOS, 5, 6, 7], [BOS, 8, 9, 5]])
    with Rows(**layers_of(model)) as rows:
        model.generate(torch.randn(2, 3, 8, 8), input_ids=prompt, do_sample=False, max_new_tokens=3, min_new_tokens=3)
    assert rows["unimodal"] == rows["multimodal"] == [8, 2, 2]
    assert rows["head"] == [2, 2, 2]


def test_texts_are_not_padded_to_the_context(model):
    ids = torch.tensor([[BOS, 5, 6, EOS], [BOS, 7, EOS, PAD]])
    with Rows(**layers_of(model)) as rows:
        model.model.get_text_features(ids)
    assert rows["unimodal"] == [2 * (4 + 1)]  # [CLS]
    assert rows["multimodal"] == rows["head"] == []


def test_training_reads_each_part_once(model):
    ids = torch.tensor([[BOS, 5, 6, EOS], [BOS, 7, EOS, PAD]])
    with Rows(**layers_of(model)) as rows:
        model(ids, torch.randn(2, 3, 8, 8), labels=ids.masked_fill(ids == PAD, -100))
    assert rows["vision"] == [2 * 5]
    assert rows["unimodal"] == [2 * (4 + 1)]  # both losses from one pass over the texts
    assert rows["multimodal"] == [2 * 4]
    assert rows["head"] == []  # chunks of the loss instead, see tests/test_loss_coca.py


@pytest.mark.parametrize("weight", ["contrastive_loss_weight", "caption_loss_weight"])
def test_a_loss_without_weight_costs_nothing(model, weight, monkeypatch):
    monkeypatch.setattr(model.config, weight, 0.0)
    ids = torch.tensor([[BOS, 5, 6, EOS]])
    with Rows(**layers_of(model)) as rows:
        model(ids, torch.randn(1, 3, 8, 8), labels=ids)
    assert rows["unimodal"] == [4 if weight == "contrastive_loss_weight" else 5]
    assert rows["multimodal"] == ([4] if weight == "contrastive_loss_weight" else [])
