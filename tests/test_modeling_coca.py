"""The network: equal to plain formulas in every layout, and to itself whatever the padding, the attention or the input."""

import copy
import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel, AutoModelForVisualQuestionAnswering

from modeling_coca.configuration_coca import CocaConfig
from modeling_coca.generation_coca import CACHE_NAME
from modeling_coca.modeling_coca import (
    CocaAttentionalPooler,
    CocaForConditionalGeneration,
    CocaForImageClassification,
    CocaForVisualQuestionAnswering,
    CocaModel,
    CocaTextModel,
    CocaVisionModel,
)

BOS, EOS, PAD = 57, 58, 0
# All widths differ, and so do the numbers of layers, tokens and heads: a mixed up one cannot fit
VISION = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": [8, 12],
    "patch_size": 4,
}
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_multimodal_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 61,
    "max_position_embeddings": 11,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
}
NUM_PATCHES, NUM_QUERIES, PROJECTION = 6, 3, 16
CONTEXT = TEXT["max_position_embeddings"] - 1

# Texts of different lengths; one with a token of the padding's id inside, one that fills the context
TEXTS = [
    [BOS, 7, EOS],
    [BOS, 9, 10, 11, 12, EOS],
    [BOS, 3, PAD, 5, EOS],
    [BOS, 21, 22, 23, 24, 25, 26, 27, 28, EOS],
]

LAYOUTS = [
    pytest.param(pooler_type, norm, pooling, id=f"{pooler_type}-{norm}-{pooling}")
    for pooler_type in ("cascade", "parallel", "shared", "none")
    for norm in ("pooler", "encoder", "embedding")
    for pooling in ("first", "mean")
    if pooling == "first" or pooler_type in ("shared", "none")
]
TEXT_QUIRKS = [
    pytest.param({"cls_position": position, "shifted_cls_mask": shifted}, id=f"{position}-{name}")
    for position in ("last", "next")
    for shifted, name in ((False, "correct_mask"), (True, "shifted_mask"))
]


def build_config(vision=None, text=None, **kwargs) -> CocaConfig:
    vision = VISION if vision is None else vision
    vision = vision if "model_type" in vision else {**VISION, **vision}
    return CocaConfig(
        vision_config=vision,
        text_config={**TEXT, **(text or {})},
        **{
            "projection_dim": PROJECTION,
            "num_query_tokens": NUM_QUERIES,
            "pooler_hidden_size": 40,
            "num_pooler_attention_heads": 5,
            **kwargs,
        },
    )


def build(cls=CocaForConditionalGeneration, vision=None, text=None, **kwargs):
    """A model whose biases and norms are no zeros and ones, so that a forgotten one shows."""
    torch.manual_seed(0)
    model = cls(build_config(vision, text, **kwargs)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def images(count: int) -> torch.Tensor:
    return torch.randn(count, 3, 8, 12, generator=torch.Generator().manual_seed(1))


def pad(texts, length=None, side="right") -> tuple[torch.Tensor, torch.Tensor]:
    length = length or max(map(len, texts))
    fill = [[PAD] * (length - len(text)) for text in texts]
    masks = [[1] * len(text) for text in texts]
    if side == "right":
        ids = [text + more for text, more in zip(texts, fill, strict=True)]
        masks = [mask + [0] * len(more) for mask, more in zip(masks, fill, strict=True)]
    else:
        ids = [more + text for text, more in zip(texts, fill, strict=True)]
        masks = [[0] * len(more) + mask for mask, more in zip(masks, fill, strict=True)]
    return torch.tensor(ids), torch.tensor(masks)


def labels_of(ids, mask):
    return ids.masked_fill(mask == 0, -100)


def count_calls(*modules: nn.Module) -> list[list[tuple[int, ...]]]:
    """For each module a list that gets the shape of the first input of each call."""
    calls = []
    for module in modules:
        seen = []

        def record(_, args, kwargs, seen=seen):
            first = next(x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor))
            seen.append(tuple(first.shape))

        module.register_forward_pre_hook(record, with_kwargs=True)
        calls.append(seen)
    return calls


def grads(model) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def train_step(model, ids, mask, pixel_values, **kwargs):
    model.zero_grad()
    outputs = model(
        input_ids=ids, attention_mask=mask, pixel_values=pixel_values, labels=labels_of(ids, mask), **kwargs
    )
    outputs.loss.backward()
    return outputs


# ----------------------------------------------------------------------------- the whole network in plain formulas


def norm(layer: nn.LayerNorm, x):
    return F.layer_norm(x, x.shape[-1:], layer.weight, layer.bias, layer.eps)


def attend(attention, x, context, num_heads, hidden=None):
    """Attention of one example, `x` (T, D) over `context` (S, E); `hidden` (T, S) marks keys that are not seen."""

    def heads(projection, states):
        return F.linear(states, projection.weight, projection.bias).unflatten(-1, (num_heads, -1)).transpose(0, 1)

    query, key, value = heads(attention.q_proj, x), heads(attention.k_proj, context), heads(attention.v_proj, context)
    scores = query @ key.transpose(1, 2) / math.sqrt(query.shape[-1])
    if hidden is not None:
        scores = scores.masked_fill(hidden, -torch.inf)
    output = (scores.softmax(-1) @ value).transpose(0, 1).flatten(1)
    return F.linear(output, attention.out_proj.weight, attention.out_proj.bias)


def mlp(module, x):
    return F.linear(F.gelu(F.linear(x, module.fc1.weight, module.fc1.bias)), module.fc2.weight, module.fc2.bias)


def scale(module, x):
    return x * module.gamma if hasattr(module, "gamma") else x


def self_layer(layer, x, num_heads, hidden=None):
    normed = norm(layer.layer_norm1, x)
    x = x + scale(layer.layer_scale1, attend(layer.self_attn, normed, normed, num_heads, hidden))
    return x + scale(layer.layer_scale2, mlp(layer.mlp, norm(layer.layer_norm2, x)))


def plain_vision(model: CocaVisionModel, image):
    """(3, H, W) -> (N, D)"""
    config, embeddings = model.config, model.embeddings
    size = config.patch_size
    patches = [
        image[:, y : y + size, x : x + size].flatten()
        for y in range(0, image.shape[1], size)
        for x in range(0, image.shape[2], size)
    ]
    tokens = F.linear(torch.stack(patches), embeddings.patch_embedding.weight.flatten(1))
    if config.use_class_token:
        tokens = torch.cat([embeddings.class_embedding[None], tokens])
    tokens = tokens + embeddings.position_embedding.weight
    if config.use_pre_layernorm:
        tokens = norm(model.pre_layernorm, tokens)
    for layer in model.layers:
        tokens = self_layer(layer, tokens, config.num_attention_heads)
    return tokens


def plain_pooler(pooler: CocaAttentionalPooler, tokens, num_heads, normed):
    pooled = attend(pooler.attn, norm(pooler.layer_norm_q, pooler.query), norm(pooler.layer_norm_k, tokens), num_heads)
    return norm(pooler.layer_norm_out, pooled) if normed else pooled


def plain_image(model: CocaModel, image):
    """(3, H, W) -> the projected embedding and the image tokens."""
    config, parts = model.config, model.image_pooler
    heads, position = config.num_pooler_attention_heads, config.image_layer_norm
    tokens = plain_vision(model.vision_model, image)
    if position == "encoder" or (config.pooler_type == "none" and position == "pooler"):
        tokens = norm(parts.layer_norm, tokens)
    if config.pooler_type == "none":
        first, tokens = tokens[0], tokens[int(config.vision_config.use_class_token) :]
        vector = first if config.image_pooling == "first" else tokens.mean(0)
    elif config.pooler_type == "shared":
        pooled = plain_pooler(parts.caption_pooler, tokens, heads, position == "pooler")
        first, tokens = pooled[0], pooled[1:]
        vector = first if config.image_pooling == "first" else tokens.mean(0)
    else:
        pooled = plain_pooler(parts.caption_pooler, tokens, heads, position == "pooler")
        context = pooled if config.pooler_type == "cascade" else tokens
        vector = plain_pooler(parts.contrastive_pooler, context, heads, position == "pooler")[0]
        tokens = pooled
    if position == "embedding":
        vector = norm(parts.layer_norm, vector)
    return F.linear(vector, model.visual_projection.weight), tokens


def plain_text(model: CocaTextModel, text: list[int]):
    """
    Token ids -> the text embedding before projection, and the token states for the decoder.

    Padded to the context with [CLS] behind it, exactly as open_clip does it, the wasteful way.
    """
    config = model.config
    length, context = len(text), config.max_text_length
    ids = torch.tensor(text + [PAD] * (context - length))
    tokens = F.embedding(ids, model.embed_tokens.weight)
    if config.use_cls_token:
        tokens = torch.cat([tokens, model.class_embedding[None]])
    rows = torch.arange(len(tokens))
    if config.use_cls_token and config.cls_position == "next":
        rows[-1] = length
    tokens = tokens + model.embed_positions.weight[rows]
    hidden = torch.ones(len(tokens), len(tokens), dtype=torch.bool).triu(1)
    for column in range(len(tokens)):
        if config.shifted_cls_mask:  # open_clip: column j is hidden where the token before it is padding
            hidden[:, column] |= column > 0 and bool(ids[column - 1] == PAD)
        else:
            hidden[:, column] |= length <= column < context
    for layer in model.layers:
        tokens = self_layer(layer, tokens, config.num_attention_heads, hidden)
    if config.use_cls_token:
        return norm(model.final_layer_norm, tokens[-1]), tokens[:length]
    tokens = norm(model.final_layer_norm, tokens[:length])
    return tokens[text.index(EOS) if EOS in text else -1], tokens


def plain_logits(model: CocaForConditionalGeneration, states, image_tokens):
    config = model.config.text_config
    causal = torch.ones(len(states), len(states), dtype=torch.bool).triu(1)
    for layer in model.text_decoder.layers:
        states = self_layer(layer.self_block, states, config.num_attention_heads, causal)
        block = layer.cross_block
        attended = attend(
            block.cross_attn,
            norm(block.layer_norm1, states),
            norm(block.layer_norm_kv, image_tokens),
            config.num_attention_heads,
        )
        states = states + scale(block.layer_scale1, attended)
        states = states + scale(block.layer_scale2, mlp(block.mlp, norm(block.layer_norm2, states)))
    return F.linear(norm(model.text_decoder.final_layer_norm, states), model.lm_head.weight)


def plain_contrastive_loss(similarity):
    pairs = torch.arange(len(similarity))
    return (F.cross_entropy(similarity, pairs) + F.cross_entropy(similarity.t(), pairs)) / 2


def assert_equals_plain_formulas(model: CocaForConditionalGeneration, texts=TEXTS):
    ids, mask = pad(texts)
    pixel_values = images(len(texts))
    with torch.no_grad():
        features = model.get_image_features(pixel_values)
        image_embeddings = model.model.get_image_features(pixel_values).pooler_output
        text_embeddings = model.get_text_features(ids, mask).pooler_output
        outputs = model(ids, pixel_values, mask, labels=labels_of(ids, mask), logits_to_keep=0)
        captions, tokens_of = 0.0, []
        for row, text in enumerate(texts):
            embedding, tokens = plain_image(model.model, pixel_values[row])
            torch.testing.assert_close(features.pooler_output[row], tokens, rtol=1e-4, atol=2e-5)
            torch.testing.assert_close(image_embeddings[row], embedding, rtol=1e-4, atol=2e-5)
            torch.testing.assert_close(features.image_embeds[row], F.normalize(embedding, dim=-1), rtol=1e-4, atol=2e-5)
            vector, states = plain_text(model.model.text_model, text)
            projection = model.model.text_projection
            vector = F.linear(vector, projection.weight, projection.bias)
            torch.testing.assert_close(text_embeddings[row], vector, rtol=1e-4, atol=2e-5)
            logits = plain_logits(model, states, tokens)
            torch.testing.assert_close(outputs.logits[row, : len(text)], logits, rtol=1e-4, atol=5e-5)
            captions += F.cross_entropy(logits[:-1], torch.tensor(text[1:]), reduction="sum")
            tokens_of.append(len(text) - 1)
        similarity = model.model.logit_scale.exp() * outputs.image_embeds @ outputs.text_embeds.t()
    torch.testing.assert_close(outputs.caption_loss, captions / sum(tokens_of), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(outputs.contrastive_loss, plain_contrastive_loss(similarity), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(outputs.loss, outputs.contrastive_loss + 2 * outputs.caption_loss)


@pytest.mark.parametrize(("pooler_type", "norm_position", "pooling"), LAYOUTS)
def test_layouts_equal_plain_formulas(pooler_type, norm_position, pooling):
    model = build(pooler_type=pooler_type, image_layer_norm=norm_position, image_pooling=pooling)
    assert_equals_plain_formulas(model, TEXTS[:2])


@pytest.mark.parametrize("quirks", TEXT_QUIRKS)
def test_text_quirks_equal_plain_formulas(quirks):
    assert_equals_plain_formulas(build(text=quirks))


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"vision": {"use_pre_layernorm": False}}, id="no_pre_layernorm"),
        pytest.param({"vision": {"use_class_token": False}}, id="no_class_token"),
        pytest.param(
            {"vision": {"use_class_token": False}, "pooler_type": "none", "image_pooling": "mean"},
            id="no_class_token-no_pooler",
        ),
        pytest.param(
            {"vision": {"layer_scale_init_value": 0.3}, "text": {"layer_scale_init_value": 0.2}}, id="layer_scale"
        ),
        pytest.param({"text": {"multimodal_intermediate_size": 36}}, id="multimodal_intermediate_size"),
        pytest.param({"text": {"num_multimodal_layers": 5}}, id="no_unimodal_layers"),
        pytest.param({"text": {"use_cls_token": False}}, id="no_cls_token"),
        pytest.param({"text_projection_bias": True}, id="text_projection_bias"),
    ],
)
def test_options_equal_plain_formulas(changes):
    assert_equals_plain_formulas(build(**changes))


# ------------------------------------------------------------------------------------------------ shapes and gradients


@pytest.mark.parametrize(("pooler_type", "norm_position", "pooling"), LAYOUTS)
def test_every_parameter_learns(pooler_type, norm_position, pooling):
    model = build(pooler_type=pooler_type, image_layer_norm=norm_position, image_pooling=pooling).train()
    ids, mask = pad(TEXTS[:2])
    train_step(model, ids, mask, images(2))
    for name, grad in grads(model).items():
        assert grad is not None, name
        assert grad.isfinite().all(), name
        # A bias on the keys shifts all scores of a query alike
        assert "k_proj.bias" in name or grad.abs().max() > 1e-9, name


@pytest.mark.parametrize(
    ("pooler_type", "num_tokens", "width"),
    [
        ("cascade", NUM_QUERIES, 40),
        ("parallel", NUM_QUERIES, 40),
        ("shared", NUM_QUERIES, 40),
        ("none", NUM_PATCHES, 24),
    ],
)
def test_shapes(pooler_type, num_tokens, width):
    model = build(pooler_type=pooler_type)
    ids, mask = pad(TEXTS[:2])
    length = ids.shape[1]
    features = model.get_image_features(images(2))
    assert features.last_hidden_state.shape == (2, NUM_PATCHES + 1, 24)
    assert features.pooler_output.shape == (2, num_tokens, width)
    assert features.image_embeds.shape == (2, PROJECTION)
    torch.testing.assert_close(features.image_embeds.norm(dim=-1), torch.ones(2))
    text = model.get_text_features(ids, mask)
    assert (text.last_hidden_state.shape, text.pooler_output.shape) == ((2, length, 32), (2, PROJECTION))
    outputs = model(input_ids=ids, pixel_values=images(2), attention_mask=mask)
    assert outputs.logits.shape == (2, length, TEXT["vocab_size"])
    assert outputs.encoder_hidden_states.shape == (2, num_tokens, width)
    assert outputs.loss is None
    assert outputs.image_embeds is None


def test_number_of_poolers():
    def queries(pooler_type):
        pooler = build(CocaModel, pooler_type=pooler_type).image_pooler
        return {name: tuple(p.shape) for name, p in pooler.named_parameters() if name.endswith("query")}

    both = {"caption_pooler.query": (NUM_QUERIES, 40), "contrastive_pooler.query": (1, 40)}
    assert queries("cascade") == both
    assert queries("parallel") == both
    assert queries("shared") == {"caption_pooler.query": (NUM_QUERIES + 1, 40)}
    assert queries("none") == {}


# ------------------------------------------------------------------------------------------- attention implementations


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("quirks", [TEXT_QUIRKS[0], TEXT_QUIRKS[1]])
def test_eager_equals_sdpa(quirks, side):
    model = build(text=quirks)
    ids, mask = pad(TEXTS, side=side)
    results = {}
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        outputs = train_step(model, ids, mask, images(4), logits_to_keep=0)
        results[implementation] = {
            "embeds": (outputs.image_embeds, outputs.text_embeds),
            "logits": outputs.logits[mask.bool()],
            "losses": (outputs.loss, outputs.contrastive_loss, outputs.caption_loss),
            "grads": {name: grad.clone() for name, grad in grads(model).items()},
        }
    torch.testing.assert_close(results["eager"], results["sdpa"], rtol=1e-4, atol=2e-5)


def test_is_causal_does_not_reach_the_attention():
    """Each layer knows whether it is. transformers' wrappers pass that flag on to everything inside."""
    model = build()
    ids, mask = pad(TEXTS)
    for call in (
        lambda **kwargs: model(ids, images(4), mask, **kwargs).logits,
        lambda **kwargs: model.model(ids, images(4), mask, **kwargs).logits_per_image,
        lambda **kwargs: model.model.vision_model(images(4), **kwargs).last_hidden_state,
    ):
        assert torch.equal(call(is_causal=True), call())


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("side", ["right", "left"])
def test_flex_attention_equals_sdpa(monkeypatch, side):
    """Forward only, and not compiled: on a CPU it has no backward pass, and compiling takes a minute."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    from transformers import masking_utils
    from transformers.integrations import flex_attention as integration

    monkeypatch.setattr(
        integration, "compile_friendly_flex_attention", lambda *args, training=False, **kw: flex_attention(*args, **kw)
    )
    monkeypatch.setattr(
        masking_utils, "create_block_mask", lambda *args, _compile=False, **kw: create_block_mask(*args, **kw)
    )
    model = build()
    ids, mask = pad(TEXTS, side=side)
    kwargs = {"attention_mask": mask, "labels": labels_of(ids, mask), "logits_to_keep": 0}
    with torch.no_grad():
        expected = model(ids, images(4), **kwargs)
        model.set_attn_implementation("flex_attention")
        assert model.model.image_pooler.caption_pooler.attn.config._attn_implementation == "flex_attention"
        outputs = model(ids, images(4), **kwargs)
    torch.testing.assert_close(outputs.logits[mask.bool()], expected.logits[mask.bool()], rtol=1e-4, atol=2e-5)
    for name in ("image_embeds", "text_embeds", "loss"):
        torch.testing.assert_close(outputs[name], expected[name], rtol=1e-4, atol=2e-5)


def test_each_part_may_have_its_own_attention():
    config = build_config()
    config._attn_implementation = {"": "eager", "text_config": "sdpa", "vision_config": "eager"}
    model = CocaForConditionalGeneration(config)
    assert model.model.image_pooler.caption_pooler.attn.config._attn_implementation == "eager"
    assert model.text_decoder.config._attn_implementation == "sdpa"
    assert model.model.text_model.config._attn_implementation == "sdpa"
    assert model.model.vision_model.config._attn_implementation == "eager"


# ---------------------------------------------------------------------------------------------------------- padding


@pytest.mark.parametrize("quirks", [*TEXT_QUIRKS, pytest.param({"use_cls_token": False}, id="no_cls_token")])
@pytest.mark.parametrize(
    ("length", "side"),
    [(None, "right"), (None, "left"), (CONTEXT, "right"), (CONTEXT, "left")],
    ids=["longest-right", "longest-left", "context-right", "context-left"],
)
def test_padding_changes_nothing(quirks, length, side):
    model, pixel_values = build(text=quirks), images(3)
    texts = TEXTS[:3] if length else [*TEXTS[:2], TEXTS[2] + [5, EOS]]
    ids, mask = pad(texts, length, side)
    with torch.no_grad():
        embeddings = model.get_text_features(ids, mask).pooler_output
        logits = model(ids, pixel_values, mask).logits
        both = model(ids, pixel_values, mask, labels=labels_of(ids, mask), logits_to_keep=0)
        torch.testing.assert_close(both.logits[mask.bool()], logits[mask.bool()], rtol=1e-4, atol=2e-5)
        for row, text in enumerate(texts):
            alone = torch.tensor([text])
            expected = model.get_text_features(alone).pooler_output
            torch.testing.assert_close(embeddings[row : row + 1], expected, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(
                both.text_embeds[row : row + 1], F.normalize(expected, dim=-1), rtol=1e-4, atol=1e-5
            )
            expected = model(alone, pixel_values[row : row + 1]).logits[0]
            torch.testing.assert_close(logits[row][mask[row].bool()], expected, rtol=1e-4, atol=2e-5)
            expected = model(
                alone, pixel_values[row : row + 1], labels=alone, logits_to_keep=0, return_dict=True
            ).logits[0]
            torch.testing.assert_close(both.logits[row][mask[row].bool()], expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("quirks", [*TEXT_QUIRKS, pytest.param({"use_cls_token": False}, id="no_cls_token")])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("weight", [1, 0], ids=["both_losses", "caption_only"])
def test_without_a_mask_padding_is_found(quirks, side, weight):
    """A token of the padding's id inside a text stays one."""
    model, pixel_values = build(text=quirks, contrastive_loss_weight=weight), images(4)
    ids, mask = pad(TEXTS, side=side)
    kwargs = {"labels": labels_of(ids, mask), "logits_to_keep": 0}
    with torch.no_grad():
        assert torch.equal(model.get_text_features(ids).pooler_output, model.get_text_features(ids, mask).pooler_output)
        found, given = model(ids, pixel_values, **kwargs), model(ids, pixel_values, mask, **kwargs)
        torch.testing.assert_close(found.logits[mask.bool()], given.logits[mask.bool()], rtol=1e-4, atol=2e-5)
        torch.testing.assert_close(found.loss, given.loss)
        if side == "right":  # for a causal model padding behind is out of sight anyway
            found, given = model(ids, pixel_values), model(ids, pixel_values, mask)
            torch.testing.assert_close(found.logits[mask.bool()], given.logits[mask.bool()], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("with_mask", [True, False], ids=["mask", "no_mask"])
@pytest.mark.parametrize("quirks", TEXT_QUIRKS)
def test_the_side_of_the_padding_changes_no_loss(quirks, with_mask):
    """On the left the first token stands behind padding, which predicts nothing."""
    model, pixel_values = build(text=quirks), images(4)
    losses = {}
    for side in ("right", "left"):
        ids, mask = pad(TEXTS, side=side)
        outputs = model(ids, pixel_values, mask if with_mask else None, labels=labels_of(ids, mask))
        model.zero_grad()
        outputs.loss.backward()
        losses[side] = (outputs.loss, outputs.contrastive_loss, outputs.caption_loss, grads(model))
    torch.testing.assert_close(losses["left"], losses["right"], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("quirks", TEXT_QUIRKS)
def test_padding_gets_no_gradient(quirks):
    """The states of padding reach no loss: their embedding learns only where the quirk lets [CLS] see it."""
    model = build(text=quirks)
    texts = [[BOS, 7, EOS], [BOS, 9, 10, 11, 12, EOS]]
    ids, mask = pad(texts, CONTEXT)
    train_step(model, ids, mask, images(2))
    grad = model.get_input_embeddings().weight.grad[PAD]
    assert bool((grad == 0).all()) is not quirks["shifted_cls_mask"]


def test_a_text_of_padding_only_is_no_nan():
    model = build()
    ids = torch.tensor([[BOS, 7, EOS], [PAD, PAD, PAD]])
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        assert model.get_text_features(ids).pooler_output.isfinite().all()


def test_position_ids_are_counted_along_the_mask():
    model = build()
    ids, mask = pad(TEXTS[:2], side="left")
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        given, counted = (model(ids, images(2), mask, position_ids=p).logits for p in (positions, None))
        assert torch.equal(given, counted)
        assert not torch.equal(model(ids, images(2), mask, position_ids=positions.flip(-1)).logits, counted)


def test_the_embedding_without_cls_is_read_at_the_first_eos():
    text_model = build(text={"use_cls_token": False}).model.text_model
    with torch.no_grad():
        for text, position in (([BOS, 7, EOS], 2), ([BOS, EOS, 8, EOS], 1), ([BOS, 7, 8], 2)):
            outputs = text_model(torch.tensor([text]))
            assert torch.equal(outputs.pooler_output[0], outputs.last_hidden_state[0, position])
        states = text_model(torch.tensor([[BOS, 7, EOS]])).last_hidden_state
        embeds = text_model.embed_tokens(torch.tensor([[BOS, 7, EOS]]))
        assert torch.equal(text_model(inputs_embeds=embeds).pooler_output, states[:, -1])
    assert not hasattr(text_model, "class_embedding")
    assert len(text_model.embed_positions.weight) == text_model.config.max_text_length


@pytest.mark.parametrize("eos", [None, 0, [2, EOS]], ids=["none", "zero", "list"])
def test_the_embedding_without_cls_with_any_eos(eos):
    model = build(text={"use_cls_token": False, "eos_token_id": eos, "pad_token_id": 1}).model.text_model
    text = {None: [BOS, 7, 8, 9], 0: [BOS, 7, 0, 9]}.get(eos if eos is None or eos == 0 else "", [BOS, 7, 2, 9])
    with torch.no_grad():
        outputs = model(torch.tensor([text]))
    assert torch.equal(outputs.pooler_output[0], outputs.last_hidden_state[0, 3 if eos is None else 2])


def test_inputs_embeds_equal_input_ids():
    model = build()
    ids, mask = pad(TEXTS[:2])
    embeds = model.get_input_embeddings()(ids)
    with torch.no_grad():
        labels = labels_of(ids, mask)
        by_ids = model(ids, images(2), mask, labels=labels, logits_to_keep=0)
        by_embeds = model(
            inputs_embeds=embeds, pixel_values=images(2), attention_mask=mask, labels=labels, logits_to_keep=0
        )
        assert torch.equal(by_ids.logits, by_embeds.logits)
        assert torch.equal(by_ids.loss, by_embeds.loss)
        dual = model.model
        assert torch.equal(
            dual(input_ids=ids, attention_mask=mask).text_embeds,
            dual(inputs_embeds=embeds, attention_mask=mask).text_embeds,
        )


# ------------------------------------------------------------------------------------------------------ dual encoder


def test_dual_encoder_with_both():
    model = build(CocaModel)
    ids, mask = pad(TEXTS[:3])
    with torch.no_grad():
        outputs = model(ids, images(3), mask, return_loss=True)
        image, text = model.get_image_features(images(3)), model.get_text_features(ids, mask)
    torch.testing.assert_close(outputs.image_embeds, F.normalize(image.pooler_output, dim=-1))
    torch.testing.assert_close(outputs.text_embeds, F.normalize(text.pooler_output, dim=-1))
    expected = model.logit_scale.exp() * outputs.image_embeds @ outputs.text_embeds.t()
    torch.testing.assert_close(outputs.logits_per_image, expected)
    assert torch.equal(outputs.logits_per_text, outputs.logits_per_image.t())
    torch.testing.assert_close(outputs.loss, plain_contrastive_loss(expected))
    assert "last_hidden_state" not in outputs
    assert torch.equal(outputs.vision_model_output.last_hidden_state, image.last_hidden_state)
    assert torch.equal(outputs.text_model_output.last_hidden_state, text.last_hidden_state)


@pytest.mark.parametrize(("num_images", "num_texts"), [(1, 4), (3, 1), (2, 3)])
def test_dual_encoder_with_unequal_batches(num_images, num_texts):
    model = build(CocaModel)
    ids, mask = pad(TEXTS[:num_texts])
    outputs = model(ids, images(num_images), mask)
    assert outputs.logits_per_image.shape == (num_images, num_texts)
    assert outputs.loss is None
    with pytest.raises(ValueError, match="one text for each image"):
        model(ids, images(num_images), mask, return_loss=True)


def test_dual_encoder_with_one_modality():
    """Feature extraction pipelines take `outputs[0]`."""
    model = build(CocaModel)
    ids, mask = pad(TEXTS[:2])
    with torch.no_grad():
        image, text = model(pixel_values=images(2)), model(input_ids=ids, attention_mask=mask)
        image_features, text_features = model.get_image_features(images(2)), model.get_text_features(ids, mask)
    for outputs, features in ((image, image_features), (text, text_features)):
        assert outputs[0] is outputs.last_hidden_state
        assert torch.equal(outputs[0], features.last_hidden_state)
        assert torch.equal(outputs.pooler_output, features.pooler_output)
        assert outputs.logits_per_image is None
    assert torch.equal(image.image_embeds, F.normalize(image_features.pooler_output, dim=-1))
    assert torch.equal(text.text_embeds, F.normalize(text_features.pooler_output, dim=-1))
    assert (image.text_embeds, text.image_embeds) == (None, None)
    with pytest.raises(ValueError, match="`return_loss=True`"):
        model(pixel_values=images(2), return_loss=True)


def test_dual_encoder_is_the_contrastive_half_of_the_captioner():
    model = build()
    ids, mask = pad(TEXTS[:3])
    with torch.no_grad():
        outputs = model(ids, images(3), mask, labels=labels_of(ids, mask))
        dual = model.model(ids, images(3), mask, return_loss=True)
    torch.testing.assert_close(outputs.contrastive_loss, dual.loss)
    torch.testing.assert_close(outputs.image_embeds, dual.image_embeds)
    torch.testing.assert_close(outputs.text_embeds, dual.text_embeds)


def test_sigmoid_contrast():
    model = build(CocaModel, contrastive_loss="sigmoid")
    ids, mask = pad(TEXTS[:3])
    with torch.no_grad():
        outputs = model(ids, images(3), mask, return_loss=True)
        logits = model.logit_scale.exp() * outputs.image_embeds @ outputs.text_embeds.t() + model.logit_bias
        expected = sum(-F.logsigmoid(logits[i, j] if i == j else -logits[i, j]) for i in range(3) for j in range(3))
    torch.testing.assert_close(outputs.logits_per_image, logits)
    torch.testing.assert_close(outputs.loss, expected / 3)
    fresh = CocaModel(build_config(contrastive_loss="sigmoid"))
    assert fresh.logit_scale.item() == pytest.approx(math.log(10))
    assert fresh.logit_bias.item() == -10
    assert CocaModel(build_config()).logit_bias is None
    assert CocaModel(build_config()).logit_scale.item() == pytest.approx(math.log(1 / 0.07))


@pytest.mark.parametrize("contrastive_loss_kind", ["softmax", "sigmoid"])
def test_temperature_learns_and_has_a_shape(contrastive_loss_kind):
    """FSDP2 refuses scalar parameters."""
    model = build(contrastive_loss=contrastive_loss_kind)
    ids, mask = pad(TEXTS[:3])
    train_step(model, ids, mask, images(3))
    for name, parameter in model.named_parameters():
        assert parameter.ndim > 0, name
    assert model.model.logit_scale.grad.abs().item() > 0


# ------------------------------------------------------------------------------------------------- losses and logits


@pytest.mark.parametrize("weights", [(1.0, 2.0), (0.5, 3), (0, 1.5), (2, 0)], ids=str)
def test_loss_is_the_weighted_sum(weights):
    model = build(contrastive_loss_weight=weights[0], caption_loss_weight=weights[1])
    ids, mask = pad(TEXTS)
    outputs = model(ids, images(4), mask, labels=labels_of(ids, mask))
    losses = (outputs.contrastive_loss, outputs.caption_loss)
    assert [loss is None for loss in losses] == [weight == 0 for weight in weights]
    expected = sum(weight * loss for weight, loss in zip(weights, losses, strict=True) if weight)
    assert torch.equal(outputs.loss, expected)


@pytest.mark.parametrize("pooler_type", ["cascade", "parallel", "shared", "none"])
def test_caption_weight_0_saves_the_decoder(pooler_type):
    model = build(pooler_type=pooler_type, caption_loss_weight=0)
    decoder, head = count_calls(model.text_decoder, model.lm_head)
    pooler = count_calls(model.model.image_pooler.caption_pooler)[0] if pooler_type != "none" else []
    ids, mask = pad(TEXTS[:2])
    outputs = train_step(model, ids, mask, images(2))
    assert (decoder, head) == ([], [])
    assert len(pooler) == (pooler_type in ("cascade", "shared"))  # which the contrastive half needs
    assert (outputs.caption_loss, outputs.encoder_hidden_states) == (None, None)
    assert all(parameter.grad is None for parameter in (*model.text_decoder.parameters(), model.lm_head.weight))
    assert model(ids, images(2), mask).logits is not None  # without labels the decoder is asked for


@pytest.mark.parametrize("pooler_type", ["cascade", "parallel", "shared", "none"])
def test_contrastive_weight_0_saves_its_part(pooler_type):
    model = build(pooler_type=pooler_type, contrastive_loss_weight=0)
    layer, projection = count_calls(model.model.text_model.layers[0], model.model.text_projection)
    pooler = getattr(model.model.image_pooler, "contrastive_pooler", None)
    pooler_calls = [] if pooler is None else count_calls(pooler)[0]
    ids, mask = pad(TEXTS[:2])
    outputs = train_step(model, ids, mask, images(2))
    assert (projection, pooler_calls) == ([], [])
    assert layer == [(2, ids.shape[1], 32)]  # no [CLS]
    assert (outputs.contrastive_loss, outputs.image_embeds, outputs.text_embeds) == (None, None, None)


def test_captioning_needs_no_pixels_without_contrast():
    model = build(contrastive_loss_weight=0)
    ids, mask = pad(TEXTS[:2])
    tokens = model.get_image_features(images(2)).pooler_output
    labels = labels_of(ids, mask)
    expected = model(ids, images(2), mask, labels=labels).loss
    assert torch.equal(model(ids, attention_mask=mask, encoder_hidden_states=tokens, labels=labels).loss, expected)
    model.config.contrastive_loss_weight = 1.0
    with pytest.raises(ValueError, match=r"`config.contrastive_loss_weight = 0`"):
        model(ids, attention_mask=mask, encoder_hidden_states=tokens, labels=labels)


@pytest.mark.parametrize("contrastive_weight", [0.0, 1.0], ids=["caption_only", "both"])
def test_one_pass_over_images_and_texts(contrastive_weight):
    model = build(contrastive_loss_weight=contrastive_weight)
    vision, text, caption_pooler = count_calls(
        model.model.vision_model, model.model.text_model, model.model.image_pooler.caption_pooler
    )
    ids, mask = pad(TEXTS[:2])
    train_step(model, ids, mask, images(2))
    assert (len(vision), len(text), len(caption_pooler)) == (1, 1, 1)


def test_labels_are_shifted_and_ignored():
    """A question in front has no loss, and neither has padding."""
    model = build(contrastive_loss_weight=0)
    ids, mask = pad(TEXTS[:2])
    labels = labels_of(ids, mask)
    labels[0, :2] = -100
    labels[1, :4] = -100
    with torch.no_grad():
        outputs = model(ids, images(2), mask, labels=labels)
        logits = model(ids, images(2), mask).logits
    wanted = [(row, column) for row in range(2) for column in range(1, ids.shape[1]) if labels[row, column] >= 0]
    assert len(wanted) == 3
    expected = torch.stack(
        [F.cross_entropy(logits[row, column - 1], ids[row, column]) for row, column in wanted]
    ).mean()
    torch.testing.assert_close(outputs.caption_loss, expected)


def test_output_layer_sees_labelled_tokens_only(monkeypatch):
    model = build()
    ids, mask = pad(TEXTS)
    labels = labels_of(ids, mask)
    labels[:, :2] = -100
    rows, linear = [], F.linear

    def record(inputs, weight, bias=None):
        if weight.shape == model.lm_head.weight.shape:
            rows.append(inputs.shape[:-1].numel())
        return linear(inputs, weight, bias)

    monkeypatch.setattr(F, "linear", record)
    assert model(ids, images(4), mask, labels=labels).logits is None
    assert rows == [int((labels[:, 1:] != -100).sum())]


def test_logits_to_keep():
    model = build()
    ids, mask = pad(TEXTS[:2])
    labels = labels_of(ids, mask)
    full = model(ids, images(2), mask).logits
    for keep, expected in (
        (0, full),
        (1, full[:, -1:]),
        (3, full[:, -3:]),
        (99, full),
        (torch.tensor([0, 2]), full[:, [0, 2]]),
    ):
        logits = model(ids, images(2), mask, logits_to_keep=keep).logits
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
        logits = model(ids, images(2), mask, labels=labels, logits_to_keep=keep).logits
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    assert model(ids, images(2), mask, labels=labels).logits is None


def test_shift_labels_and_num_items_in_batch_reach_the_loss():
    model = build()
    ids, mask = pad(TEXTS)
    labels = labels_of(ids, mask)
    expected = model(ids, images(4), mask, labels=labels).caption_loss
    shifted = F.pad(labels, (0, 1), value=-100)[:, 1:]
    ignored = torch.full_like(labels, -100)
    loss = model(ids, images(4), mask, labels=ignored, shift_labels=shifted).caption_loss
    assert torch.equal(loss, expected)
    count = (shifted != -100).sum()
    loss = model(ids, images(4), mask, labels=labels, num_items_in_batch=2 * count).caption_loss
    torch.testing.assert_close(loss, expected / 2)


def test_rows_that_are_no_pairs_leave_the_contrastive_loss():
    model = build()
    ids, mask = pad(TEXTS)
    labels = labels_of(ids, mask)
    pairs = torch.tensor([True, False, True, True])
    outputs = model(ids, images(4), mask, labels=labels, contrastive_mask=pairs)
    full = model(ids, images(4), mask, labels=labels)
    dual = model.model(ids[pairs], images(4)[pairs], mask[pairs], return_loss=True)
    torch.testing.assert_close(outputs.contrastive_loss, dual.loss)
    assert torch.equal(outputs.caption_loss, full.caption_loss)
    none = model(ids, images(4), mask, labels=labels, contrastive_mask=torch.zeros(4))
    assert none.contrastive_loss.item() == 0
    torch.testing.assert_close(none.loss, 2 * full.caption_loss)
    none.loss.backward()
    assert model.model.visual_projection.weight.grad.abs().max() == 0
    every = model(ids, images(4), mask, labels=labels, contrastive_mask=torch.ones(4))
    assert torch.equal(every.loss, full.loss)


def test_cache_beside_a_loss():
    """Continued, it gives what a call without cache gives. Beside the contrastive loss, whose [CLS] would stay, there is none."""
    model = build(contrastive_loss_weight=0)
    ids = torch.tensor([[BOS, 9, 10, 11]])
    with torch.no_grad():
        first = model(ids, images(1), labels=ids, use_cache=True, logits_to_keep=0)
        step = model(torch.tensor([[12]]), cache=first[CACHE_NAME])
        expected = model(torch.tensor([[BOS, 9, 10, 11, 12]]), images(1))
        torch.testing.assert_close(step.logits[:, -1], expected.logits[:, -1], rtol=1e-4, atol=1e-5)
        assert model(ids, images(1), labels=ids).get(CACHE_NAME) is None
        model.config.contrastive_loss_weight = 1.0
        assert model(ids, images(1), labels=ids, use_cache=True).get(CACHE_NAME) is None


# ------------------------------------------------------------------------------------------------------ image inputs


def test_image_hidden_states_equal_pixel_values():
    model = build()
    ids, mask = pad(TEXTS[:2])
    kwargs = {"input_ids": ids, "attention_mask": mask, "labels": labels_of(ids, mask)}
    with torch.no_grad():
        states = model.model.vision_model(images(2)).last_hidden_state
        by_pixels, by_states = model(pixel_values=images(2), **kwargs), model(image_hidden_states=states, **kwargs)
        assert torch.equal(by_pixels.loss, by_states.loss)
        assert torch.equal(by_pixels.image_embeds, by_states.image_embeds)
        dual = model.model
        assert torch.equal(dual(pixel_values=images(2)).image_embeds, dual(image_hidden_states=states).image_embeds)
        first, second = model.get_image_features(images(2)), model.get_image_features(image_hidden_states=states)
        assert torch.equal(first.pooler_output, second.pooler_output)
        by_tokens = model(ids, attention_mask=mask, encoder_hidden_states=first.pooler_output).logits
        assert torch.equal(by_tokens, model(ids, images(2), mask).logits)
        classifier = build(CocaForImageClassification)
        states = classifier.vision_model(images(2)).last_hidden_state
        assert torch.equal(classifier(images(2)).logits, classifier(image_hidden_states=states).logits)


def test_texts_of_one_image_stand_next_to_each_other():
    model = build()
    ids, mask = pad(TEXTS)
    with torch.no_grad():
        outputs = model(ids, images(2), mask)
        expected = model(ids, images(2).repeat_interleave(2, 0), mask)
    torch.testing.assert_close(outputs.logits, expected.logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pooler_type", ["cascade", "none"])
def test_other_image_sizes_interpolate_the_positions(pooler_type):
    model = build(pooler_type=pooler_type)
    vision = model.model.vision_model
    larger = torch.randn(2, 3, 16, 20)
    with pytest.raises(ValueError, match=r"`pixel_values` are 16x20 pixels.*`interpolate_pos_encoding=True`"):
        vision(larger)
    with torch.no_grad():
        states = vision(larger, interpolate_pos_encoding=True).last_hidden_state
        table = vision.embeddings.position_embedding.weight
        grid = table[1:].view(1, 2, 3, -1).permute(0, 3, 1, 2)
        resized = F.interpolate(grid, size=(4, 5), mode="bicubic", antialias=True, align_corners=False)
        resized = torch.cat([table[:1], resized.permute(0, 2, 3, 1).reshape(20, -1)])
        torch.testing.assert_close(vision.embeddings.interpolate_position_embedding(4, 5), resized)
        # a model with that table of its own gives the same
        other = copy.deepcopy(vision)
        other.config.image_size = [16, 20]
        other.embeddings.position_embedding = nn.Embedding.from_pretrained(resized)
        torch.testing.assert_close(states, other(larger).last_hidden_state)
        # same size: nothing changes, not even rounding
        assert torch.equal(vision.embeddings.interpolate_position_embedding(2, 3), table)
        assert torch.equal(
            vision(images(2), interpolate_pos_encoding=True).last_hidden_state, vision(images(2)).last_hidden_state
        )
        # the flag goes through everything that takes images
        ids, mask = pad(TEXTS[:2])
        expected = model(ids, image_hidden_states=states, attention_mask=mask, labels=labels_of(ids, mask)).loss
        flag = {"interpolate_pos_encoding": True}
        assert torch.equal(model(ids, larger, mask, labels=labels_of(ids, mask), **flag).loss, expected)
        expected = model.model(image_hidden_states=states).image_embeds
        assert torch.equal(model.model(pixel_values=larger, **flag).image_embeds, expected)
        assert torch.equal(model.get_image_features(larger, **flag).image_embeds, expected)
        classifier = build(CocaForImageClassification, pooler_type=pooler_type)
        assert classifier(larger, **flag).logits.shape == (2, 2)


def test_patch_dropout_is_for_training_only():
    model = build(CocaModel, vision={"patch_dropout": 0.5}).vision_model
    tokens = model.embeddings(images(2))
    assert torch.equal(model.embeddings(images(2)), tokens)
    assert tokens.shape[1] == NUM_PATCHES + 1
    model.train()
    kept = model.embeddings(images(2))
    assert kept.shape[1] == NUM_PATCHES // 2 + 1
    torch.testing.assert_close(kept[:, 0], tokens[:, 0])  # the class token stays
    for row in range(2):
        origins = [int((tokens[row] - token).abs().sum(-1).argmin()) for token in kept[row]]
        assert origins == sorted(set(origins))  # each a different patch, in order
        torch.testing.assert_close(tokens[row, origins], kept[row])
    assert (
        build(CocaModel, vision={"patch_dropout": 0.99}).vision_model.train()(images(1)).last_hidden_state.shape[1] == 2
    )
    without = build(CocaModel, vision={"patch_dropout": 0.5, "use_class_token": False}).vision_model.train()
    assert without(images(1)).last_hidden_state.shape[1] == NUM_PATCHES // 2


def test_dropout_is_for_training_only():
    quiet = build()
    noisy = build(text={"dropout": 0.3, "attention_dropout": 0.3}, vision={"attention_dropout": 0.3})
    ids, mask = pad(TEXTS[:2])
    kwargs = {"input_ids": ids, "pixel_values": images(2), "attention_mask": mask, "labels": labels_of(ids, mask)}
    with torch.no_grad():
        expected = quiet(**kwargs).loss
        assert torch.equal(noisy(**kwargs).loss, expected)
        noisy.train()
        assert not torch.equal(noisy(**kwargs).loss, noisy(**kwargs).loss)
        assert torch.equal(quiet.train()(**kwargs).loss, expected)


# ------------------------------------------------------------------------------------------------------------ errors


def _both_inputs(model, **kwargs):
    return model(input_ids=torch.tensor([[BOS, 5]]), **kwargs)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        pytest.param(
            lambda m: _both_inputs(m), "`pixel_values`, `image_hidden_states` or `encoder_hidden_states`", id="no_image"
        ),
        pytest.param(lambda m: m(pixel_values=images(1)), "`input_ids` or `inputs_embeds`", id="no_text"),
        pytest.param(lambda m: m.model(), "`input_ids`.*`pixel_values`", id="nothing"),
        pytest.param(lambda m: m.model.vision_model(), "`pixel_values`", id="vision-nothing"),
        pytest.param(lambda m: m.model.text_model(), "`input_ids` and `inputs_embeds`", id="text-nothing"),
        pytest.param(lambda m: m.get_image_features(), "`pixel_values` are missing", id="features-nothing"),
        pytest.param(
            lambda m: _both_inputs(m, pixel_values=images(1), encoder_hidden_states=torch.zeros(1, 3, 40)),
            "one of `pixel_values`, `encoder_hidden_states`",
            id="two_images",
        ),
        pytest.param(
            lambda m: m.model(pixel_values=images(1), image_hidden_states=torch.zeros(1, 7, 24)),
            "one of `pixel_values`, `image_hidden_states`",
            id="dual-two_images",
        ),
        pytest.param(
            lambda m: m.model.text_model(torch.tensor([[BOS]]), inputs_embeds=torch.zeros(1, 1, 32)),
            "`input_ids` and `inputs_embeds`",
            id="two_texts",
        ),
        pytest.param(
            lambda m: _both_inputs(m, pixel_values=images(1)[0]), "`pixel_values` must have shape", id="pixel_dims"
        ),
        pytest.param(
            lambda m: _both_inputs(m, pixel_values=torch.zeros(1, 1, 8, 12)),
            "`pixel_values` must have shape",
            id="channels",
        ),
        pytest.param(
            lambda m: _both_inputs(m, pixel_values=torch.zeros(1, 3, 8, 8)), "`pixel_values` are 8x8", id="image_size"
        ),
        pytest.param(
            lambda m: _both_inputs(m, image_hidden_states=torch.zeros(1, 7, 23)),
            "`image_hidden_states`.*24",
            id="encoder_width",
        ),
        pytest.param(
            lambda m: _both_inputs(m, image_hidden_states=torch.zeros(7, 24)),
            "`image_hidden_states`.*24",
            id="encoder_dims",
        ),
        pytest.param(
            lambda m: _both_inputs(m, encoder_hidden_states=torch.zeros(1, 3, 24)),
            "`encoder_hidden_states`.*40",
            id="image_token_width",
        ),
        pytest.param(
            lambda m: m(torch.full((3, 2), BOS), images(2)), "2 images for 3 texts", id="images_do_not_fit_texts"
        ),
        pytest.param(
            lambda m: m(torch.full((4, 2), BOS), images(2), labels=torch.full((4, 2), BOS)),
            "2 images for 4 texts",
            id="training_needs_pairs",
        ),
        pytest.param(
            lambda m: m(torch.full((1, CONTEXT + 1), 5), images(1)), "`input_ids` have 11 tokens.* 10", id="long_text"
        ),
        pytest.param(
            lambda m: m.get_text_features(torch.full((1, CONTEXT + 1), 5)),
            "`input_ids` have 11 tokens",
            id="long_text-dual",
        ),
    ],
)
def test_errors_name_the_input(call, message):
    with pytest.raises(ValueError, match=message):
        call(build())


@pytest.mark.parametrize("shape", [(2, 7, 23), (7, 24)], ids=["width", "dims"])
def test_classifier_errors_name_the_input(shape):
    with pytest.raises(ValueError, match="`image_hidden_states`"):
        build(CocaForImageClassification)(image_hidden_states=torch.zeros(shape))


def test_classifier_needs_an_image():
    with pytest.raises(ValueError, match="`pixel_values`"):
        build(CocaForImageClassification)()


# ----------------------------------------------------------------------------------------- what can be had besides


def test_return_dict_false_gives_the_same_in_a_tuple():
    model = build()
    ids, mask = pad(TEXTS[:2])
    dual, text, vision = model.model, model.model.text_model, model.model.vision_model
    classifier = build(CocaForImageClassification)
    calls = [
        lambda **kw: model(ids, images(2), mask, use_cache=False, **kw),
        lambda **kw: model(ids, images(2), mask, labels=labels_of(ids, mask), **kw),
        lambda **kw: model.get_image_features(images(2), **kw),
        lambda **kw: model.get_text_features(ids, mask, **kw),
        lambda **kw: dual(pixel_values=images(2), **kw),
        lambda **kw: dual.get_image_features(images(2), **kw),
        lambda **kw: text(ids, mask, **kw),
        lambda **kw: vision(images(2), **kw),
        lambda **kw: classifier(images(2), labels=torch.tensor([0, 1]), **kw),
    ]
    for call in calls:
        as_dict, as_tuple = call(), call(return_dict=False)
        assert type(as_tuple) is tuple
        assert len(as_tuple) == len(as_dict)
        for first, second in zip(as_dict.values(), as_tuple, strict=True):
            if isinstance(first, torch.Tensor):
                assert torch.equal(first, second)
    both = dual(ids, images(2), mask, return_loss=True, return_dict=False)
    assert torch.equal(both[0], dual(ids, images(2), mask, return_loss=True).loss)


@pytest.mark.parametrize("no_grad_cache", [True, False], ids=["cache", "no_cache"])
def test_config_return_dict_false(no_grad_cache):
    model = build()
    model.config.return_dict = False
    ids, mask = pad(TEXTS[:2])
    outputs = model(ids, images(2), mask, use_cache=no_grad_cache)
    assert type(outputs) is tuple
    assert torch.equal(outputs[0], model(ids, images(2), mask, return_dict=True).logits)


@pytest.mark.parametrize("with_labels", [False, True], ids=["plain", "labels"])
@pytest.mark.parametrize("unimodal", [3, 0], ids=["both_stacks", "multimodal_only"])
def test_hidden_states(with_labels, unimodal):
    model = build(text={"num_multimodal_layers": 5 - unimodal})
    ids, mask = pad(TEXTS[:2])
    kwargs = {"labels": labels_of(ids, mask)} if with_labels else {}
    with torch.no_grad():
        states = model(ids, images(2), mask, output_hidden_states=True, **kwargs).hidden_states
        assert [tuple(state.shape) for state in states] == [(2, ids.shape[1], 32)] * 6
        assert model(ids, images(2), mask, **kwargs).hidden_states is None
        text_model = model.model.text_model
        embeds = text_model.embed_tokens(ids) + text_model.embed_positions.weight[: ids.shape[1]]
        torch.testing.assert_close(states[0][mask.bool()], embeds[mask.bool()])
        for row in range(2):
            length = int(mask[row].sum())
            _, expected = plain_text(text_model, TEXTS[row])
            torch.testing.assert_close(states[unimodal][row, :length], expected, rtol=1e-4, atol=1e-5)
        # the last one is normed: what the output layer takes
        torch.testing.assert_close(model.lm_head(states[-1]), model(ids, images(2), mask).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("selected", [0, 2, 3, 5, -1, -6, [0], [1, 3], [-1, 2], [4, 5], [0, 7], [-7, 1]], ids=str)
def test_hidden_states_by_index(selected):
    model = build()
    ids, mask = pad(TEXTS[:2])
    with torch.no_grad():
        full = model(ids, images(2), mask, output_hidden_states=True).hidden_states
        chosen = model(ids, images(2), mask, output_hidden_states=selected).hidden_states
    indices = [selected] if isinstance(selected, int) else selected
    indices = {index % 6 for index in indices if -6 <= index < 6}
    assert [index for index, state in enumerate(chosen) if state is not None] == sorted(indices)
    assert len(chosen) == 6
    for index in indices:
        assert torch.equal(chosen[index], full[index])


@pytest.mark.parametrize(
    "quirks", [TEXT_QUIRKS[0], TEXT_QUIRKS[1], pytest.param({"use_cls_token": False}, id="no_cls_token")]
)
@pytest.mark.parametrize("with_labels", [False, True], ids=["plain", "labels"])
def test_attentions(quirks, with_labels):
    model = build(text=quirks)
    model.set_attn_implementation("eager")
    ids, mask = pad(TEXTS[:2])
    length = ids.shape[1]
    kwargs = {"labels": labels_of(ids, mask)} if with_labels else {}
    outputs = model(ids, images(2), mask, output_attentions=True, **kwargs)
    assert [tuple(a.shape) for a in outputs.attentions] == [(2, 4, length, length)] * 5
    assert [tuple(a.shape) for a in outputs.cross_attentions] == [(2, 4, length, NUM_QUERIES)] * 2
    for weights in (*outputs.attentions, *outputs.cross_attentions):
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
    for weights in outputs.attentions:
        assert weights.triu(1).abs().max() == 0
        assert weights[0, :, :, int(mask[0].sum()) :].abs().max() == 0  # padding
    plain = model(ids, images(2), mask, **kwargs)
    assert (plain.attentions, plain.cross_attentions) == (None, None)


def test_cross_attentions_of_several_texts_for_an_image():
    model = build()
    model.set_attn_implementation("eager")
    ids, mask = pad(TEXTS)
    shared = model(ids, images(2), mask, output_attentions=True)
    apart = model(ids, images(2).repeat_interleave(2, 0), mask, output_attentions=True)
    torch.testing.assert_close(shared.cross_attentions, apart.cross_attentions, rtol=1e-4, atol=1e-5)


def test_tower_attentions_and_hidden_states():
    model = build(CocaModel)
    model.set_attn_implementation("eager")
    ids, mask = pad(TEXTS[:2])
    outputs = model(ids, images(2), mask, output_attentions=True, output_hidden_states=True)
    vision, text = outputs.vision_model_output, outputs.text_model_output
    assert [tuple(a.shape) for a in vision.attentions] == [(2, 3, 7, 7)] * 2
    assert [tuple(h.shape) for h in vision.hidden_states] == [(2, 7, 24)] * 3
    assert torch.equal(vision.hidden_states[-1], vision.last_hidden_state)
    extended = ids.shape[1] + 1  # with [CLS]
    assert [tuple(a.shape) for a in text.attentions] == [(2, 4, extended, extended)] * 3
    assert [tuple(h.shape) for h in text.hidden_states] == [(2, extended, 32)] * 4
    features = model.get_image_features(images(2), output_hidden_states=True, output_attentions=True)
    assert torch.equal(torch.stack(features.hidden_states), torch.stack(vision.hidden_states))
    assert len(features.attentions) == 2
    model.config.vision_config.output_hidden_states = True
    assert torch.equal(
        torch.stack(model.get_image_features(images(2)).hidden_states), torch.stack(vision.hidden_states)
    )


def test_the_captioner_gives_the_image_encoders_output():
    model = build()
    model.set_attn_implementation("eager")
    ids, mask = pad(TEXTS[:2])
    expected = model.model.vision_model(images(2), output_hidden_states=True, output_attentions=True)
    plain, selected = model(ids, images(2), mask), model(ids, images(2), mask, output_hidden_states=[5])
    for outputs in (plain, selected):
        assert torch.equal(outputs.image_outputs.last_hidden_state, expected.last_hidden_state)
        assert outputs.image_outputs.hidden_states is None and outputs.image_outputs.attentions is None
    full = model(ids, images(2), mask, output_hidden_states=True, output_attentions=True).image_outputs
    for name in ("hidden_states", "attentions"):
        assert torch.equal(torch.stack(full[name]), torch.stack(expected[name]))
    model.config.vision_config.output_attentions = True
    assert len(model(ids, images(2), mask).image_outputs.attentions) == 2
    assert model(ids, attention_mask=mask, encoder_hidden_states=plain.encoder_hidden_states).image_outputs is None


def test_hidden_states_and_attentions_keep_gradients():
    model = build()
    model.set_attn_implementation("eager")
    ids, mask = pad(TEXTS[:2])
    outputs = model(ids, images(2), mask, output_hidden_states=True, output_attentions=True)
    inner = [*outputs.hidden_states, *outputs.attentions, *outputs.cross_attentions]
    for tensor in inner:
        tensor.retain_grad()
    outputs.logits.sum().backward()
    assert all(tensor.grad is not None and tensor.grad.abs().sum() > 0 for tensor in inner)


def test_vision_pooler_output():
    model = build(CocaModel).vision_model
    outputs = model(images(2))
    assert torch.equal(outputs.pooler_output, outputs.last_hidden_state[:, 0])
    outputs = build(CocaModel, vision={"use_class_token": False}).vision_model(images(2))
    torch.testing.assert_close(outputs.pooler_output, outputs.last_hidden_state.mean(1))


# ---------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("pooler_type", ["cascade", "none"])
def test_gradient_checkpointing_gives_equal_gradients(pooler_type):
    model = build(pooler_type=pooler_type).train()
    ids, mask = pad(TEXTS)
    plain = train_step(model, ids, mask, images(4)).loss
    expected = {name: grad.clone() for name, grad in grads(model).items()}
    vision, unimodal, multimodal = count_calls(
        model.model.vision_model.layers[0].mlp,
        model.model.text_model.layers[0].mlp,
        model.text_decoder.layers[0].cross_block.mlp,
    )
    model.activation_checkpointing_enable()
    loss = train_step(model, ids, mask, images(4)).loss
    assert torch.equal(loss, plain)
    torch.testing.assert_close(grads(model), expected)
    assert [len(calls) for calls in (vision, unimodal, multimodal)] == [2, 2, 2]  # forward, and again for backward


def test_gradient_checkpointing_uses_no_cache():
    model = build().train()
    ids = torch.tensor([[BOS, 7, 8, 9]])
    model.activation_checkpointing_enable()
    outputs = model(ids, images(1), use_cache=True)
    assert outputs.get(CACHE_NAME) is None
    outputs.logits.sum().backward()


def test_frozen_parts_stay_in_evaluation():
    model = build(text={"dropout": 0.5})
    model.model.vision_model.is_frozen = True
    model.model.text_model.is_frozen = True
    assert model.train() is model
    assert model.training
    assert model.text_decoder.layers[0].self_block.training
    for part in (model.model.vision_model, model.model.text_model):
        assert not any(module.training for module in part.modules())
    model.model.train()
    assert not model.model.text_model.dropout.training
    model.model.text_model.is_frozen = False
    model.train()
    assert model.model.text_model.dropout.training
    assert not model.model.vision_model.training
    model.eval()
    assert not any(module.training for module in model.modules())


def test_a_frozen_batch_norm_keeps_its_statistics():
    vision = {
        "model_type": "resnet",
        "embedding_size": 8,
        "hidden_sizes": [8, 16],
        "depths": [1, 1],
        "layer_type": "basic",
    }
    model = build(vision=vision)
    model.model.vision_model.requires_grad_(False).is_frozen = True
    model.train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    ids, mask = pad(TEXTS[:2])
    train_step(model, ids, mask, torch.randn(2, 3, 32, 32))
    assert any("running_mean" in name for name in before)
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("pooler_type", ["cascade", "none"])
def test_half_precision(dtype, pooler_type):
    model = build(pooler_type=pooler_type, text={"shifted_cls_mask": True, "layer_scale_init_value": 0.5})
    ids, mask = pad(TEXTS)
    kwargs = {"input_ids": ids, "attention_mask": mask, "pixel_values": images(4)}
    expected = train_step(model, ids, mask, images(4)).loss
    expected_embeds = model.get_image_features(images(4)).image_embeds
    model.to(dtype)
    loss = train_step(model, ids, mask, images(4)).loss
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=0.05, atol=0)
    assert all(grad.dtype == dtype and grad.isfinite().all() for grad in grads(model).values())
    features = model.get_image_features(images(4))
    assert features.image_embeds.dtype == dtype
    torch.testing.assert_close(features.image_embeds.float(), expected_embeds, rtol=0, atol=0.05)
    assert model(**kwargs).logits.dtype == dtype
    assert model.generate(pixel_values=images(2), max_new_tokens=3, num_beams=2).shape[0] == 2
    states = model.model.vision_model(images(2)).last_hidden_state.float()  # as they come from a file
    assert model.model(image_hidden_states=states).image_embeds.dtype == dtype
    classifier = build(CocaForImageClassification).to(dtype)
    assert classifier(image_hidden_states=states).logits.dtype == dtype


def test_autocast():
    model = build()
    ids, mask = pad(TEXTS)
    expected = train_step(model, ids, mask, images(4)).loss
    with torch.autocast("cpu", torch.bfloat16):
        loss = train_step(model, ids, mask, images(4)).loss
    torch.testing.assert_close(loss, expected, rtol=0.05, atol=0)
    assert all(grad.dtype == torch.float32 and grad.isfinite().all() for grad in grads(model).values())


# -------------------------------------------------------------------------------------------------- initial weights


CLASSES = [CocaForConditionalGeneration, CocaModel, CocaForImageClassification, CocaForVisualQuestionAnswering]


@pytest.fixture
def nan_memory():
    """Memory that nobody has written to is NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.usefixtures("nan_memory")
@pytest.mark.parametrize("pooler_type", ["cascade", "none"])
@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_parameter_is_initialised(cls, pooler_type):
    config = build_config(
        pooler_type=pooler_type,
        contrastive_loss="sigmoid",
        text_projection_bias=True,
        image_layer_norm="embedding",
        vision={"layer_scale_init_value": 0.1},
        text={"layer_scale_init_value": 0.2},
    )
    built = cls(config)
    loaded = cls.from_pretrained(None, config=config, state_dict={})  # made on the meta device, nothing in the file
    assert torch.empty(3).isnan().all()
    for name, parameter in built.named_parameters():
        other = loaded.get_parameter(name)
        assert parameter.isfinite().all(), name
        assert other.isfinite().all(), name
        if parameter.numel() > 1 and parameter.std() > 1e-6:  # a constant's std is not quite 0
            # drawn from the same distribution, one way or the other
            assert other.std().item() == pytest.approx(
                parameter.std().item(), rel=1.0 if parameter.numel() < 100 else 0.35
            ), name
            assert not torch.equal(parameter, other)
        else:
            assert torch.equal(parameter, other), name


def test_initial_spread():
    """The residual branches shrink with depth, as in open_clip."""
    model = CocaForConditionalGeneration(
        build_config(
            text={"hidden_size": 128, "intermediate_size": 256}, pooler_hidden_size=None, num_pooler_attention_heads=4
        )
    )
    layer = model.text_decoder.layers[0]

    def std(parameter):
        return parameter.std().item()

    assert std(layer.self_block.self_attn.q_proj.weight) == pytest.approx(128**-0.5, rel=0.05)
    assert std(layer.self_block.self_attn.out_proj.weight) == pytest.approx(128**-0.5 * 10**-0.5, rel=0.05)
    assert std(layer.cross_block.mlp.fc1.weight) == pytest.approx(256**-0.5, rel=0.05)
    assert std(layer.cross_block.mlp.fc2.weight) == pytest.approx(128**-0.5 * 10**-0.5, rel=0.05)
    assert std(model.get_input_embeddings().weight) == pytest.approx(0.02, rel=0.05)
    assert std(model.lm_head.weight) == pytest.approx(128**-0.5, rel=0.05)
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.bias is not None:
            assert module.bias.abs().max() == 0


# -------------------------------------------------------------------------------------------- embeddings of the text


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("size", [80, 40], ids=["larger", "smaller"])
def test_resize_token_embeddings(tied, size, tmp_path):
    model = build(tie_word_embeddings=tied)
    before = model.get_input_embeddings().weight.detach().clone(), model.lm_head.weight.detach().clone()
    model.resize_token_embeddings(size, mean_resizing=False)
    kept = min(size, TEXT["vocab_size"])
    for layer, weight in zip((model.get_input_embeddings(), model.lm_head), before, strict=True):
        assert layer.weight.shape == (size, 32)
        assert torch.equal(layer.weight[:kept], weight[:kept])
    assert model.get_input_embeddings() is model.model.text_model.embed_tokens
    assert (model.get_input_embeddings().weight is model.lm_head.weight) is tied
    assert model.config.text_config.vocab_size == model.lm_head.out_features == size
    ids = torch.tensor([[5, 7, size - 1]])
    outputs = model(ids, images(1), labels=ids, logits_to_keep=0)
    assert outputs.logits.shape == (1, 3, size)
    outputs.loss.backward()
    model.config.text_config.update({"bos_token_id": 5, "eos_token_id": 6})
    model.save_pretrained(tmp_path)
    loaded = CocaForConditionalGeneration.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(ids, images(1)).logits, outputs.logits, rtol=1e-4, atol=1e-5)


def test_resize_the_dual_encoder():
    model = build(CocaModel)
    model.resize_token_embeddings(70, mean_resizing=False)
    assert model.text_model.embed_tokens.weight.shape == (70, 32)
    assert model.config.text_config.vocab_size == 70


def test_tied_embeddings(tmp_path):
    torch.manual_seed(0)
    model = CocaForConditionalGeneration(build_config(tie_word_embeddings=True)).eval()
    embedding = model.get_input_embeddings().weight
    assert model.lm_head.weight is embedding
    assert embedding.std().item() == pytest.approx(0.02, rel=0.1)
    assert "lm_head.weight" not in dict(model.named_parameters())
    ids, mask = pad(TEXTS[:2])
    train_step(model, ids, mask, images(2))
    assert embedding.grad.abs().sum(-1).count_nonzero() == TEXT["vocab_size"]  # the output layer's gradient is there
    model.save_pretrained(tmp_path)
    loaded = CocaForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    assert torch.equal(loaded.lm_head.weight, embedding)
    untied = build()
    assert untied.lm_head.weight is not untied.get_input_embeddings().weight


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_fsdp_plan_names_modules_that_exist(cls):
    model = build(cls)
    modules = dict(model.named_modules())
    for rule in model.fsdp_plan:
        assert rule.replace("*", "0") in modules, rule
    layers = {name for name, module in modules.items() if re.search(r"(^|\.)layers\.\d+$", name)}
    assert layers <= set(model._expand_parallel_plan(model.fsdp_plan))


def test_set_input_embeddings():
    model = build()
    new = nn.Embedding(TEXT["vocab_size"], 32)
    model.set_input_embeddings(new)
    assert model.model.text_model.embed_tokens is new
    assert model.model.get_input_embeddings() is new
    assert model.get_output_embeddings() is model.lm_head


# -------------------------------------------------------------------------------------------------------- save, load


@pytest.mark.parametrize("pooler_type", ["cascade", "parallel", "shared", "none"])
@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_save_and_load(cls, pooler_type, tmp_path):
    model = build(cls, pooler_type=pooler_type, image_layer_norm="embedding", contrastive_loss="sigmoid")
    model.save_pretrained(tmp_path)
    loaded, info = cls.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert not loaded.training
    states, expected = loaded.state_dict(), model.state_dict()
    assert list(states) == list(expected)
    assert all(torch.equal(states[name], expected[name]) for name in expected)


@pytest.mark.parametrize("cls", [CocaVisionModel, CocaTextModel], ids=lambda cls: cls.__name__)
def test_towers_save_and_load(cls, tmp_path):
    whole = build(CocaModel)
    tower = whole.vision_model if cls is CocaVisionModel else whole.text_model
    tower.save_pretrained(tmp_path)
    loaded, info = cls.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    for name, parameter in tower.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter), name


@pytest.mark.parametrize("pooler_type", ["cascade", "none"])
def test_captioner_opens_as_dual_encoder(pooler_type, tmp_path):
    model = build(pooler_type=pooler_type)
    model.save_pretrained(tmp_path)
    dual, info = CocaModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    ids, mask = pad(TEXTS[:2])
    with torch.no_grad():
        outputs, expected = dual(ids, images(2), mask), model.model(ids, images(2), mask)
    assert torch.equal(outputs.logits_per_image, expected.logits_per_image)


def test_dual_encoder_opens_as_captioner(tmp_path):
    dual = build(CocaModel)
    dual.save_pretrained(tmp_path)
    model, info = CocaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"]
    assert all(key.startswith(("text_decoder.", "lm_head.")) for key in info["missing_keys"])
    assert not info["unexpected_keys"] and not info["mismatched_keys"]
    for name, parameter in dual.named_parameters():
        assert torch.equal(model.model.get_parameter(name), parameter), name
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("pooler_type", ["cascade", "none"])
@pytest.mark.parametrize("source", [CocaForConditionalGeneration, CocaModel], ids=lambda cls: cls.__name__)
def test_opens_as_classifier(source, pooler_type, tmp_path):
    model = build(source, pooler_type=pooler_type, image_layer_norm="embedding", contrastive_loss="sigmoid")
    model.save_pretrained(tmp_path)
    classifier, info = CocaForImageClassification.from_pretrained(tmp_path, num_labels=5, output_loading_info=True)
    assert info["missing_keys"]
    assert all(key.startswith(("pooler.", "classifier.")) for key in info["missing_keys"])
    assert not info["unexpected_keys"] and not info["mismatched_keys"]
    vision = model.base_model.vision_model
    for name, parameter in vision.named_parameters():
        assert torch.equal(classifier.vision_model.get_parameter(name), parameter), name
    assert classifier(images(2)).logits.shape == (2, 5)
    # and on
    classifier.save_pretrained(tmp_path / "classifier")
    again, info = CocaForImageClassification.from_pretrained(tmp_path / "classifier", output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(again(images(2)).logits, classifier(images(2)).logits)


# --------------------------------------------------------------------------------------------------- classification


def test_classification():
    model = build(CocaForImageClassification, num_labels=4)
    labels = torch.tensor([3, 1])
    outputs = model(images(2), labels=labels)
    pooled = [
        plain_pooler(model.pooler, plain_vision(model.vision_model, image), 5, normed=True)[0] for image in images(2)
    ]
    expected = F.linear(torch.stack(pooled), model.classifier.weight, model.classifier.bias)
    torch.testing.assert_close(outputs.logits, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(outputs.loss, F.cross_entropy(outputs.logits, labels))
    outputs.loss.backward()
    assert all(grad is not None for grad in grads(model).values())


@pytest.mark.parametrize(
    ("problem_type", "num_labels", "labels", "loss"),
    [
        ("regression", 1, torch.tensor([0.5, -1.0]), lambda x, y: F.mse_loss(x[:, 0], y)),
        (
            "multi_label_classification",
            3,
            torch.tensor([[1.0, 0, 1], [0, 0, 1]]),
            F.binary_cross_entropy_with_logits,
        ),
    ],
    ids=["regression", "multi_label"],
)
def test_other_problem_types(problem_type, num_labels, labels, loss):
    model = build(CocaForImageClassification, num_labels=num_labels, problem_type=problem_type)
    outputs = model(images(2), labels=labels)
    torch.testing.assert_close(outputs.loss, loss(outputs.logits, labels))


# ----------------------------------------------------------------------------------------------------------- videos


@pytest.mark.parametrize("pooler_type", ["cascade", "parallel", "shared", "none"])
def test_videos_equal_their_frames_by_hand(pooler_type):
    model = build(pooler_type=pooler_type)
    videos = images(6).unflatten(0, (2, 3))
    features = model.get_image_features(videos)
    for video, embedding, tokens in zip(videos, features.image_embeds, features.pooler_output, strict=True):
        frames = model.get_image_features(video)
        torch.testing.assert_close(embedding, F.normalize(frames.image_embeds.mean(0), dim=-1))
        if pooler_type == "none":
            expected = frames.pooler_output.flatten(0, 1)
        else:
            pooler = model.model.image_pooler.caption_pooler
            expected = pooler(frames.last_hidden_state.flatten(0, 1)[None])[0][0, int(pooler_type == "shared") :]
        torch.testing.assert_close(tokens, expected, rtol=1e-4, atol=1e-5)
    assert features.last_hidden_state.shape == (2, 3 * 7, 24)
    hidden = model.model.vision_model(videos.flatten(0, 1)).last_hidden_state.unflatten(0, (2, 3))
    again = model.get_image_features(image_hidden_states=hidden)
    torch.testing.assert_close(again.pooler_output, features.pooler_output)
    torch.testing.assert_close(again.image_embeds, features.image_embeds)


def test_a_still_video_is_its_image_for_the_poolers():
    model = build()
    still = images(2)[:, None].repeat(1, 4, 1, 1, 1)
    ids, mask = pad(TEXTS[:2])
    expected, found = model(ids, images(2), mask).logits, model(ids, still, mask).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    expected = model.model(ids, images(2), mask).logits_per_image
    torch.testing.assert_close(model.model(ids, still, mask).logits_per_image, expected, rtol=1e-4, atol=1e-5)


def test_videos_train_and_generate():
    model = build(num_labels=4)
    videos, (ids, mask) = images(6).unflatten(0, (2, 3)), pad(TEXTS[:2])
    outputs = train_step(model, ids, mask, videos)
    assert outputs is not None and all(grad is not None for grad in grads(model).values())
    kwargs = {"do_sample": False, "max_new_tokens": 4}
    tokens = model.get_image_features(videos).pooler_output
    captions = model.generate(encoder_hidden_states=tokens, **kwargs)
    assert torch.equal(model.generate(videos, **kwargs), captions)
    assert torch.equal(model.generate(pixel_values=videos, num_beams=3, **kwargs)[:, 0], ids[:, 0])
    guided = model.generate(pixel_values=videos, guidance_scale=2.0, **kwargs)
    null_tokens = model.get_image_features(torch.zeros_like(videos[:1])).pooler_output
    expected = model.generate(encoder_hidden_states=tokens, null_image_tokens=null_tokens, guidance_scale=2.0, **kwargs)
    assert torch.equal(guided, expected)
    answerer = build(CocaForVisualQuestionAnswering, num_labels=4)
    assert answerer(ids, videos, attention_mask=mask).logits.shape == (2, 4)


# ------------------------------------------------------------------------------------------------------- questions


@pytest.mark.parametrize(
    "quirks", [TEXT_QUIRKS[0], TEXT_QUIRKS[1], pytest.param({"use_cls_token": False}, id="no_cls")]
)
@pytest.mark.parametrize(("length", "side"), [(None, "right"), (None, "left"), (CONTEXT, "right"), (CONTEXT, "left")])
@pytest.mark.parametrize("with_mask", [True, False], ids=["mask", "no_mask"])
def test_answers_are_read_at_the_last_token_of_the_question(quirks, length, side, with_mask):
    model = build(CocaForVisualQuestionAnswering, text=quirks, num_labels=4)
    pixel_values = images(len(TEXTS))
    ids, mask = pad(TEXTS, length, side)
    logits = model(ids, pixel_values, attention_mask=mask if with_mask else None).logits
    for row, text in enumerate(TEXTS):
        tokens = model.model.encode_image(pixel_values[row, None])[1]
        states = model.model.text_model(torch.tensor([text]), torch.ones(1, len(text)), output_embedding=False)
        decoded = model.text_decoder(states.last_hidden_state, tokens).last_hidden_state
        expected = F.linear(decoded[0, -1], model.classifier.weight, model.classifier.bias)
        torch.testing.assert_close(logits[row], expected, rtol=1e-4, atol=1e-5)


def test_an_answer_hangs_on_the_question_and_on_the_image():
    model = build(CocaForVisualQuestionAnswering, num_labels=4)
    ids, mask = pad(TEXTS[:2])
    pixel_values = images(2)
    logits = model(ids, pixel_values, attention_mask=mask).logits
    assert not torch.allclose(logits, model(ids, pixel_values.flip(0), attention_mask=mask).logits, atol=1e-3)
    assert not torch.allclose(logits, model(ids.flip(0), pixel_values, attention_mask=mask.flip(0)).logits, atol=1e-3)


def test_questions_of_one_image_stand_next_to_each_other():
    model = build(CocaForVisualQuestionAnswering, num_labels=4)
    ids, mask = pad(TEXTS)
    pixel_values = images(2)
    calls = count_calls(model.model.vision_model)[0]
    outputs = model(ids, pixel_values, attention_mask=mask, labels=torch.tensor([0, 1, 2, 3]))
    assert calls == [(2, 3, 8, 12)]
    each = model(ids, pixel_values.repeat_interleave(2, dim=0), attention_mask=mask)
    torch.testing.assert_close(outputs.logits, each.logits, rtol=1e-4, atol=1e-5)
    encoder_hidden_states = model.model.encode_image(pixel_values)[1]
    again = model(ids, encoder_hidden_states=encoder_hidden_states, attention_mask=mask)
    assert torch.equal(again.logits, outputs.logits)
    embeds = model.get_input_embeddings()(ids)
    again = model(inputs_embeds=embeds, pixel_values=pixel_values, attention_mask=mask)
    assert torch.equal(again.logits, outputs.logits)


def test_answer_labels_are_ids_or_scores():
    model = build(CocaForVisualQuestionAnswering, num_labels=4)
    ids, mask = pad(TEXTS[:3])
    inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": images(3)}
    outputs = model(**inputs, labels=torch.tensor([2, -100, 0]))
    torch.testing.assert_close(outputs.loss, F.cross_entropy(outputs.logits[[0, 2]], torch.tensor([2, 0])))
    assert model(**inputs, labels=torch.full((3,), -100)).loss == 0
    scores = torch.tensor([[0, 1, 0.3, 0], [0, 0, 0, 0.9], [0, 0, 0, 0]])
    x, y = outputs.logits.double(), scores.double()
    expected = -(y * x.sigmoid().log() + (1 - y) * (1 - x.sigmoid()).log()).sum(dim=1).mean()
    loss = model(**inputs, labels=scores).loss
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    # one-hot integers are scores too
    torch.testing.assert_close(
        model(**inputs, labels=scores.round().long()).loss, model(**inputs, labels=scores.round()).loss
    )
    for labels in (torch.zeros(3), torch.zeros(3, 5), torch.zeros(2, dtype=torch.long)):
        with pytest.raises(ValueError, match=r"`labels` must be answer ids .* got torch\.\w+ of shape"):
            model(**inputs, labels=labels)


@pytest.mark.parametrize("pooler_type", ["cascade", "parallel", "shared", "none"])
def test_only_the_contrastive_half_gets_no_gradient_from_answers(pooler_type):
    model = build(CocaForVisualQuestionAnswering, num_labels=4, pooler_type=pooler_type)
    ids, mask = pad(TEXTS[:2])
    model(ids, images(2), attention_mask=mask, labels=torch.tensor([0, 3])).loss.backward()
    idle = {name for name, grad in grads(model).items() if grad is None}
    contrastive = (
        "contrastive_pooler.",
        "projection.",
        "logit_scale",
        "text_model.class_embedding",
        "text_model.final",
    )
    assert all(any(part in name for part in contrastive) for name in idle), idle
    assert model.text_decoder.layers[0].cross_block.cross_attn.k_proj.weight.grad.abs().sum() > 0


def test_answers_are_learned():
    model = build(CocaForVisualQuestionAnswering, num_labels=3).train()
    ids, mask = pad([TEXTS[0], TEXTS[1], TEXTS[0], TEXTS[1]], side="left")
    inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": images(2).repeat_interleave(2, dim=0)}
    labels = torch.tensor([0, 1, 2, 0])  # neither the image nor the question alone tells
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        model(**inputs, labels=labels).loss.backward()
        optimizer.step()
    outputs = model.eval()(**inputs, labels=labels)
    assert outputs.logits.argmax(-1).tolist() == labels.tolist()
    assert outputs.loss < 0.05


@pytest.mark.parametrize("source", [CocaForConditionalGeneration, CocaModel], ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("pooler_type", ["cascade", "none"])
def test_opens_for_question_answering(source, pooler_type, tmp_path):
    model = build(source, pooler_type=pooler_type, image_layer_norm="embedding", contrastive_loss="sigmoid")
    model.save_pretrained(tmp_path)
    answers = {0: "yes", 1: "no", 2: "red"}
    answerer, info = CocaForVisualQuestionAnswering.from_pretrained(
        tmp_path, id2label=answers, output_loading_info=True
    )
    new = ("classifier.", "text_decoder.") if source is CocaModel else ("classifier.",)
    assert {key.split(".")[0] + "." for key in info["missing_keys"]} == set(new)
    assert not info["unexpected_keys"] and not info["mismatched_keys"]
    for name, parameter in model.base_model.named_parameters():
        assert torch.equal(answerer.model.get_parameter(name), parameter), name
    if source is CocaForConditionalGeneration:
        for name, parameter in model.text_decoder.named_parameters():
            assert torch.equal(answerer.text_decoder.get_parameter(name), parameter), name
    ids, mask = pad(TEXTS[:2])
    outputs = answerer(ids, images(2), attention_mask=mask)
    assert outputs.logits.shape == (2, 3) and answerer.config.id2label == answers
    # and on, and as the dual encoder again
    answerer.save_pretrained(tmp_path / "answerer")
    again, info = AutoModelForVisualQuestionAnswering.from_pretrained(tmp_path / "answerer", output_loading_info=True)
    assert type(again) is CocaForVisualQuestionAnswering and not any(info.values()), info
    assert again.config.id2label == answers
    assert torch.equal(again(ids, images(2), attention_mask=mask).logits, outputs.logits)
    dual, info = CocaModel.from_pretrained(tmp_path / "answerer", output_loading_info=True)
    assert not any(info.values()), info
    embeds = model.base_model.get_image_features(images(2)).pooler_output
    assert torch.equal(dual.get_image_features(images(2)).pooler_output, embeds)


def test_answerer_gives_attentions_of_both_stacks():
    model = build(CocaForVisualQuestionAnswering, num_labels=4)
    model.set_attn_implementation("eager")
    ids, mask = pad(TEXTS)
    outputs = model(ids, images(4), attention_mask=mask, output_attentions=True, output_hidden_states=True)
    length = ids.shape[1]
    assert [h.shape for h in outputs.hidden_states] == [(4, length, 32)] * 6
    assert [a.shape for a in outputs.attentions] == [(4, 4, length, length)] * 5
    assert [a.shape for a in outputs.cross_attentions] == [(4, 4, length, NUM_QUERIES)] * 2
    as_tuple = model(ids, images(4), attention_mask=mask, return_dict=False)
    assert torch.equal(as_tuple[0], outputs.logits)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"pixel_values": images(2)}, "Give the questions, as exactly one of `input_ids` and `inputs_embeds`"),
        ({"input_ids": pad(TEXTS[:2])[0]}, "No image: give `pixel_values`"),
        ({"input_ids": pad(TEXTS[:3])[0], "pixel_values": images(2)}, "2 images for 3 texts"),
        (
            {"input_ids": pad(TEXTS[:2])[0], "pixel_values": images(2), "image_hidden_states": torch.zeros(2, 7, 24)},
            "Give one of `pixel_values`, `image_hidden_states`",
        ),
        ({"input_ids": pad(TEXTS[:2])[0], "encoder_hidden_states": torch.zeros(2, 3, 9)}, "encoder_hidden_states"),
    ],
)
def test_answerer_errors_name_the_input(inputs, message):
    with pytest.raises(ValueError, match=message):
        build(CocaForVisualQuestionAnswering)(**inputs)


# ------------------------------------------------------------------------------------------ other image encoders


SMALL = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3}
ENCODERS = {  # name: (config, image side, tokens, width)
    "vit": ({"model_type": "vit", "image_size": 16, "patch_size": 8, **SMALL}, 16, 5, 24),
    "clip": ({"model_type": "clip_vision_model", "image_size": 16, "patch_size": 8, **SMALL}, 16, 5, 24),
    "siglip": ({"model_type": "siglip_vision_model", "image_size": 16, "patch_size": 8, **SMALL}, 16, 4, 24),
    "dinov2": ({"model_type": "dinov2", "image_size": 16, "patch_size": 8, **SMALL}, 16, 5, 24),
    "resnet": (
        {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
        32,
        16,
        16,
    ),
    "convnext": ({"model_type": "convnext", "hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2}, 32, 16, 16),
    "swin": (
        {
            "model_type": "swin",
            "embed_dim": 8,
            "depths": [1, 1],
            "num_heads": [2, 2],
            "window_size": 2,
            "image_size": 16,
            "patch_size": 4,
        },
        16,
        4,
        16,
    ),
    "timm-resnet": ({"model_type": "timm_wrapper", "architecture": "test_resnet"}, 64, 4, 96),
    "timm-vit": ({"model_type": "timm_wrapper", "architecture": "test_vit", "model_args": {"img_size": 32}}, 32, 5, 64),
    "timm-efficientnet": ({"model_type": "timm_wrapper", "architecture": "test_efficientnet"}, 64, 4, 256),
    "timm-swin": (
        {
            "model_type": "timm_wrapper",
            "architecture": "swin_tiny_patch4_window7_224",
            "model_args": {"img_size": 32, "window_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2]},
        },
        32,
        16,
        16,
    ),
}


@pytest.mark.parametrize("pooler_type", ["cascade", "none"])
@pytest.mark.parametrize("name", ENCODERS)
def test_other_encoders(name, pooler_type, tmp_path):
    vision, side, tokens, width = ENCODERS[name]
    model = build(vision=vision, pooler_type=pooler_type, image_pooling="mean" if pooler_type == "none" else "first")
    ids, mask = pad(TEXTS[:2])
    pixel_values = torch.randn(2, 3, side, side)
    outputs = train_step(model.train(), ids, mask, pixel_values)
    assert outputs.loss.isfinite()
    trained = {name for name, grad in grads(model).items() if grad is not None and grad.abs().max() > 0}
    assert {"model.vision_model", "model.image_pooler", "model.text_model", "text_decoder", "lm_head"} <= {
        name if name.startswith("lm_head") else ".".join(name.split(".")[: 2 if name.startswith("model.") else 1])
        for name in (n.removesuffix(".weight") for n in trained)
    }
    model.eval()
    with torch.no_grad():
        features = model.get_image_features(pixel_values)
        assert features.last_hidden_state.shape[:2] == (2, tokens)
        assert features.last_hidden_state.shape[2] == width
        states = features.last_hidden_state
        again = model.get_image_features(image_hidden_states=states)
        assert torch.equal(again.pooler_output, features.pooler_output)
        # the tokens are the encoder's own, place by place
        encoder = AutoModel.from_config(model.config.vision_config)
        encoder.load_state_dict(model.model.vision_model.state_dict())
        kwargs = {"do_pooling": False} if name.startswith("timm") else {}
        own = encoder.eval()(pixel_values, **kwargs).last_hidden_state
        if own.ndim == 4:
            channels_last = own.shape[-1] == states.shape[-1] and own.shape[1] != states.shape[-1]
            own = own.flatten(1, 2) if channels_last else own.flatten(2).transpose(1, 2)
        torch.testing.assert_close(own, states)
        captions = model.generate(pixel_values=pixel_values, max_new_tokens=3, min_new_tokens=3, num_beams=2)
    assert captions.shape == (2, 4)
    if pooler_type == "cascade":
        model.save_pretrained(tmp_path)
        loaded, info = CocaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info.values()), info
        torch.testing.assert_close(loaded.get_image_features(pixel_values).image_embeds, features.image_embeds)


def test_other_encoder_gives_hidden_states():
    model = build(CocaModel, vision=ENCODERS["vit"][0])
    model.set_attn_implementation("eager")
    features = model.get_image_features(torch.randn(2, 3, 16, 16), output_hidden_states=True, output_attentions=True)
    assert [tuple(h.shape) for h in features.hidden_states] == [(2, 5, 24)] * 3
    assert [tuple(a.shape) for a in features.attentions] == [(2, 3, 5, 5)] * 2
    assert model.get_image_features(torch.randn(2, 3, 16, 16)).hidden_states is None


def test_other_encoder_as_classifier():
    model = build(CocaForImageClassification, vision=ENCODERS["resnet"][0], num_labels=3)
    outputs = model(torch.randn(2, 3, 32, 32), labels=torch.tensor([0, 2]))
    outputs.loss.backward()
    assert outputs.logits.shape == (2, 3)


FEATURE_LAYERS = {
    "coca": ({"image_size": 16, "patch_size": 8, **SMALL}, 16, [0, -2], 3 * 24),
    "vit": (ENCODERS["vit"][0], 16, [1], 2 * 24),
    "resnet": (ENCODERS["resnet"][0], 32, [0, 1], 8 + 8 + 16),
    "convnext": (ENCODERS["convnext"][0], 32, [1], 8 + 16),
    "timm-resnet": (ENCODERS["timm-resnet"][0], 64, [1, 2], 32 + 48 + 96),
    "timm-efficientnet": (ENCODERS["timm-efficientnet"][0], 64, [0, 3], 16 + 48 + 256),
}


@pytest.mark.parametrize("name", FEATURE_LAYERS)
def test_earlier_layers_are_joined_to_the_last(name):
    """Channel by channel; maps are averaged to the last one's grid."""
    vision, side, layers, width = FEATURE_LAYERS[name]
    model = build(vision=vision, vision_feature_layers=layers)
    pixel_values = torch.randn(2, 3, side, side)
    with torch.no_grad():
        features = model.get_image_features(pixel_values)
        kwargs = {"do_pooling": False} if name.startswith("timm") else {}
        own = model.model.vision_model(pixel_values, output_hidden_states=True, **kwargs)
    states = [*(own.hidden_states[layer] for layer in layers), own.last_hidden_state]
    if states[-1].ndim == 4:
        grid = states[-1].shape[-1]
        states = [
            state.unflatten(-1, (grid, -1)).unflatten(-3, (grid, -1)).mean((-3, -1)).flatten(2).transpose(1, 2)
            for state in states
        ]
    expected = torch.cat(states, dim=-1)
    assert expected.shape[-1] == width
    torch.testing.assert_close(features.last_hidden_state, expected)
    assert features.hidden_states is None
    again = model.get_image_features(image_hidden_states=expected)
    torch.testing.assert_close(again.image_embeds, features.image_embeds)
    ids, mask = pad(TEXTS[:2])
    assert train_step(model, ids, mask, pixel_values).loss.isfinite()
    assert model.generate(pixel_values=pixel_values, max_new_tokens=2).shape[0] == 2
    classifier = build(CocaForImageClassification, vision=vision, vision_feature_layers=layers)
    assert classifier(pixel_values).logits.isfinite().all()


def test_feature_layers_that_do_not_fit():
    with pytest.raises(ValueError, match=r"`vision_feature_layers` \[9\]"):
        build(vision_feature_layers=[9])
    swin = build(vision=ENCODERS["swin"][0])
    swin.config.vision_feature_layers = [0]
    with pytest.raises(ValueError, match="`vision_feature_layers`"):
        swin.get_image_features(torch.randn(1, 3, 16, 16))
    with pytest.raises(ValueError, match="`hidden_size`"):
        build(vision={"model_type": "efficientnet"})
