"""torchmultimodal's CoCa (`coca_vit`, `CoCaForPretraining`), of which everybody trains their own: no weights were released."""

import math
import re
from collections.abc import Mapping

import torch

from ..configuration_coca import CocaConfig
from .family import Family
from .table import LEADING_1, LEADING_1_1, SCALAR, SPLIT, Row, Shapes, heads_of, layers_of, square_grid, strip_wrappers


def _mlp(theirs: str, ours: str) -> list[Row]:
    return [
        Row(f"{theirs}.model.0.{{leaf}}", f"{ours}.fc1.{{leaf}}"),
        Row(f"{theirs}.model.2.{{leaf}}", f"{ours}.fc2.{{leaf}}"),
    ]


def _attention(theirs: str, ours: str) -> list[Row]:
    return [
        Row(f"{theirs}.{{qkv}}_proj.{{leaf}}", f"{ours}.{{qkv}}_proj.{{leaf}}"),
        Row(f"{theirs}.output_proj.{{leaf}}", f"{ours}.out_proj.{{leaf}}"),
    ]


def _pooler(theirs: str, ours: str, way: str) -> list[Row]:
    return [
        Row(f"{theirs}.query", f"{ours}.query", when=way),
        Row(f"{theirs}.ln_q.{{leaf}}", f"{ours}.layer_norm_q.{{leaf}}", when=way),
        Row(f"{theirs}.ln_k.{{leaf}}", f"{ours}.layer_norm_k.{{leaf}}", when=way),
        *(row._replace(when=way) for row in _attention(f"{theirs}.attn", f"{ours}.attn")),
        Row(f"{theirs}.ln_post.{{leaf}}", f"{ours}.layer_norm_out.{{leaf}}", when=way),
    ]


_VISION = ("vision_encoder.encoder.layer.{i}", "model.vision_model.layers.{i}")
_TEXT = ("text_decoder.transformer_decoder.layer.{i}", "model.text_model.layers.{i}")
_FUSION = ("multimodal_decoder.transformer_decoder.layer.{i}", "text_decoder.layers.{i}")
_POOLERS = "model.image_pooler"

# fmt: off
TABLE = [
    Row("logit_scale", "model.logit_scale", SCALAR),
    # image
    Row("vision_encoder.embeddings.cls_token", "model.vision_model.embeddings.class_embedding", LEADING_1_1),
    Row("vision_encoder.embeddings.position_embeddings", "model.vision_model.embeddings.position_embedding.weight", LEADING_1),
    Row("vision_encoder.embeddings.conv_projection.{leaf}", "model.vision_model.embeddings.patch_embedding.{leaf}"),
    Row(f"{_VISION[0]}.attention.input_proj.{{leaf}}", f"{_VISION[1]}.self_attn.{{qkv}}_proj.{{leaf}}", SPLIT),
    Row(f"{_VISION[0]}.attention.output_proj.{{leaf}}", f"{_VISION[1]}.self_attn.out_proj.{{leaf}}"),
    Row(f"{_VISION[0]}.attention_layernorm.{{leaf}}", f"{_VISION[1]}.layer_norm1.{{leaf}}"),
    Row(f"{_VISION[0]}.feedforward_layernorm.{{leaf}}", f"{_VISION[1]}.layer_norm2.{{leaf}}"),
    *_mlp(f"{_VISION[0]}.feedforward", f"{_VISION[1]}.mlp"),
    Row("vision_encoder.encoder.final_layer_norm.{leaf}", "model.vision_model.post_layernorm.{leaf}"),
    *_pooler("vision_pooler", f"{_POOLERS}.caption_pooler", "shared"),
    *_pooler("vision_pooler.poolers.0", f"{_POOLERS}.caption_pooler", "cascade"),
    *_pooler("vision_pooler.poolers.1", f"{_POOLERS}.contrastive_pooler", "cascade"),
    Row("vision_proj.weight", "model.visual_projection.weight"),
    # text
    Row("text_decoder.embeddings.token_embeddings.weight", "model.text_model.embed_tokens.weight"),
    Row("text_decoder.embeddings.position_embeddings", "model.text_model.embed_positions.weight"),
    Row("text_decoder.embeddings.cls_embedding", "model.text_model.class_embedding"),
    *_attention(f"{_TEXT[0]}.attention", f"{_TEXT[1]}.self_attn"),
    Row(f"{_TEXT[0]}.attention_layernorm.{{leaf}}", f"{_TEXT[1]}.layer_norm1.{{leaf}}"),
    Row(f"{_TEXT[0]}.feedforward_layernorm.{{leaf}}", f"{_TEXT[1]}.layer_norm2.{{leaf}}"),
    *_mlp(f"{_TEXT[0]}.feedforward", f"{_TEXT[1]}.mlp"),
    Row("text_decoder.ln_final.{leaf}", "model.text_model.final_layer_norm.{leaf}"),
    Row("text_decoder.text_projection.weight", "model.text_projection.weight"),
    # decoder
    *_attention(f"{_FUSION[0]}.attention", f"{_FUSION[1]}.self_block.self_attn"),
    Row(f"{_FUSION[0]}.attention_layernorm.{{leaf}}", f"{_FUSION[1]}.self_block.layer_norm1.{{leaf}}"),
    *_attention(f"{_FUSION[0]}.cross_attention", f"{_FUSION[1]}.cross_block.cross_attn"),
    Row(f"{_FUSION[0]}.cross_attention_layernorm.{{leaf}}", f"{_FUSION[1]}.cross_block.layer_norm1.{{leaf}}"),
    Row(f"{_FUSION[0]}.feedforward_layernorm.{{leaf}}", f"{_FUSION[1]}.cross_block.layer_norm2.{{leaf}}"),
    *_mlp(f"{_FUSION[0]}.feedforward", f"{_FUSION[1]}.cross_block.mlp"),
    Row("multimodal_decoder.transformer_decoder.final_layer_norm.{leaf}", "text_decoder.final_layer_norm.{leaf}"),
    Row("multimodal_decoder.output_projection.weight", "lm_head.weight"),
]
# fmt: on


def rename(name: str) -> str:
    """Where dropout is on, a module for it stands between the layers of an MLP and shifts the second one's number."""
    return re.sub(r"(?<=\.feedforward\.model\.)3(?=\.)", "2", strip_wrappers(name))


# Arguments of `coca_vit` and their defaults, as far as they change what is computed
_DEFAULTS = {
    "image_size": 224,
    "num_channels": 3,
    "vision_layer_norm_eps": 1e-5,
    "vision_final_layer_norm_eps": None,
    "vision_norm_first": True,
    "vision_include_cls_embed": False,
    "pad_idx": 0,
    "text_embed_cls": True,
    "text_layer_norm_eps": 1e-5,
    "text_norm_first": True,
    "text_final_layer_norm_eps": 1e-5,
    "fusion_layer_norm_eps": 1e-5,
    "fusion_norm_first": True,
    "fusion_final_layer_norm_eps": 1e-5,
    "multimodal_output_projection_dim": None,
    "cascaded_pooler": True,
    "pooler_n_queries": 256,
    "pooler_layer_norm_eps": 1e-5,
}
# Without a default
_REQUIRED = (
    *("vision_patch_size", "vision_dim_feedforward", "vision_n_layer", "vision_n_head"),
    *("vocab_size", "num_text_positions", "text_hidden_dim", "text_n_layer", "text_n_head", "text_dim_feedforward"),
    *("text_output_dim", "fusion_n_layer", "fusion_n_head", "fusion_dim_feedforward"),
    *("pooler_input_embed_dim", "pooler_output_embed_dim", "pooler_n_head"),
)
# They change training alone
_IGNORED = (
    *("vision_transformer_dropout", "patch_embed_dropout_prob", "vision_drop_path_rate", "vision_patch_drop_rate"),
    *("text_dropout", "fusion_dropout"),
)


def infer_arguments(shapes: Shapes) -> dict:
    """The arguments of `coca_vit` from the tensors of the model that it built."""
    vision, text, fusion = (layers.removesuffix(".{i}") for layers, _ in (_VISION, _TEXT, _FUSION))
    width, channels, patch_size, _ = shapes["vision_encoder.embeddings.conv_projection.weight"]
    has_class_token = "vision_encoder.embeddings.cls_token" in shapes
    positions = shapes["vision_encoder.embeddings.position_embeddings"][1] - int(has_class_token)
    vocab_size, text_width = shapes["text_decoder.embeddings.token_embeddings.weight"]
    cascade = "vision_pooler.poolers.0.query" in shapes
    queries, pooler_width = shapes["vision_pooler.poolers.0.query" if cascade else "vision_pooler.query"]
    arguments = {
        "vision_patch_size": patch_size,
        "vision_dim_feedforward": shapes[f"{vision}.0.feedforward.model.0.weight"][0],
        "vision_n_layer": layers_of(shapes, vision),
        "vision_n_head": heads_of(width, "the image tower"),
        "vocab_size": vocab_size,
        "num_text_positions": shapes["text_decoder.embeddings.position_embeddings"][0],
        "text_hidden_dim": text_width,
        "text_n_layer": layers_of(shapes, text),
        "text_n_head": heads_of(text_width, "the text tower"),
        "text_dim_feedforward": shapes[f"{text}.0.feedforward.model.0.weight"][0],
        "text_output_dim": shapes["text_decoder.text_projection.weight"][0],
        "fusion_n_layer": layers_of(shapes, fusion),
        "fusion_n_head": heads_of(pooler_width, "the decoder"),
        "fusion_dim_feedforward": shapes[f"{fusion}.0.feedforward.model.0.weight"][0],
        "multimodal_output_projection_dim": vocab_size,
        "pooler_input_embed_dim": width,
        "pooler_output_embed_dim": pooler_width,
        "pooler_n_head": 8,
        "image_size": square_grid(positions, "The image tower") * patch_size,
        "num_channels": channels,
        "vision_include_cls_embed": has_class_token,
        "text_embed_cls": "text_decoder.embeddings.cls_embedding" in shapes,
        "cascaded_pooler": cascade,
        "pooler_n_queries": queries - int(not cascade),
    }
    if "vision_encoder.encoder.final_layer_norm.weight" in shapes:
        arguments["vision_final_layer_norm_eps"] = 1e-5
    return arguments


def config_from_torchmultimodal(arguments: dict) -> CocaConfig:
    """The `CocaConfig` that computes what torchmultimodal's `coca_vit(**arguments)` computes.

    Raises:
        ValueError: An argument is missing or cannot be expressed. The message names it.
    """
    missing = [key for key in _REQUIRED if key not in arguments]
    unknown = sorted(set(arguments) - {*_REQUIRED, *_DEFAULTS, *_IGNORED})
    if missing or unknown:
        raise ValueError(
            f"torchmultimodal config: it must hold the arguments of `coca_vit`. Missing: {missing}. Unknown: {unknown}."
        )
    given = {**_DEFAULTS, **arguments}

    def need(condition: bool, key: str, why: str):
        if not condition:
            raise ValueError(f"torchmultimodal config: `{key}` = {given[key]!r} is not supported: {why}.")

    for stack in ("vision", "text", "fusion"):
        need(given[f"{stack}_norm_first"], f"{stack}_norm_first", "all layers of this package are pre-norm")
    for stack in ("fusion", "pooler"):
        key, eps = f"{stack}_layer_norm_eps", given["text_layer_norm_eps"]
        need(given[key] == eps, key, f"it differs from `text_layer_norm_eps` = {eps}, and there is one for both here")
    for stack in ("text", "fusion"):
        key, eps = f"{stack}_final_layer_norm_eps", given["text_layer_norm_eps"]
        need(given[key] == eps, key, f"it differs from `text_layer_norm_eps` = {eps}, and there is one for both here")
    final_eps, eps = given["vision_final_layer_norm_eps"], given["vision_layer_norm_eps"]
    need(final_eps in (None, eps), "vision_final_layer_norm_eps", f"it differs from `vision_layer_norm_eps` = {eps}")
    need(given["fusion_n_head"] == given["text_n_head"], "fusion_n_head", f"`text_n_head` is {given['text_n_head']}")
    width = given["text_hidden_dim"]
    need(given["pooler_output_embed_dim"] == width, "pooler_output_embed_dim", f"`text_hidden_dim` is {width}")
    need(
        given["text_output_dim"] == width,
        "text_output_dim",
        f"images are projected to `pooler_output_embed_dim` = {width}",
    )
    vocab_size = given["vocab_size"]
    projected = given["multimodal_output_projection_dim"]
    need(projected == vocab_size, "multimodal_output_projection_dim", f"logits of {vocab_size} tokens are needed")

    bos, eos = (49406, 49407) if vocab_size == 49408 else (vocab_size - 2, vocab_size - 1)
    return CocaConfig(
        vision_config={
            "model_type": "coca_vision_model",
            "hidden_size": given["pooler_input_embed_dim"],
            "intermediate_size": given["vision_dim_feedforward"],
            "num_hidden_layers": given["vision_n_layer"],
            "num_attention_heads": given["vision_n_head"],
            "num_channels": given["num_channels"],
            "image_size": given["image_size"],
            "patch_size": given["vision_patch_size"],
            "layer_norm_eps": given["vision_layer_norm_eps"],
            "use_class_token": given["vision_include_cls_embed"],
            "patch_bias": True,
            "use_pre_layernorm": False,
            "use_post_layernorm": final_eps is not None,
        },
        text_config={
            "vocab_size": vocab_size,
            "hidden_size": width,
            "intermediate_size": given["text_dim_feedforward"],
            "multimodal_intermediate_size": given["fusion_dim_feedforward"],
            "multimodal_layer_type": "one_mlp",
            "num_hidden_layers": given["text_n_layer"] + given["fusion_n_layer"],
            "num_multimodal_layers": given["fusion_n_layer"],
            "num_attention_heads": given["text_n_head"],
            "layer_norm_eps": given["text_layer_norm_eps"],
            "max_position_embeddings": given["num_text_positions"],  # counts [CLS], unlike open_clip's
            "use_cls_token": given["text_embed_cls"],
            "shifted_cls_mask": given["text_embed_cls"]
            and given["pad_idx"] is not None,  # open_clip's mask, taken over
            "bos_token_id": bos,
            "eos_token_id": eos,
            "pad_token_id": given["pad_idx"],
        },
        projection_dim=width,
        pooler_type="cascade" if given["cascaded_pooler"] else "shared",
        num_query_tokens=given["pooler_n_queries"],
        pooler_hidden_size=width,
        num_pooler_attention_heads=given["pooler_n_head"],
        image_layer_norm="pooler",
    )


def _fill(name: str, arguments: Mapping, like: torch.Tensor) -> torch.Tensor | None:
    # It is in `CoCaForPretraining`'s loss; a bare `CoCaModel` has none
    return torch.full(like.shape, math.log(1 / 0.07)) if name == "logit_scale" else None


FAMILY = Family(
    name="torchmultimodal",
    package="torchmultimodal",
    title="torchmultimodal's CoCa",
    table=TABLE,
    owns=lambda names: {"vision_encoder.embeddings.conv_projection.weight", "vision_proj.weight"} <= names,
    infer_config=infer_arguments,
    to_config=config_from_torchmultimodal,
    ways=lambda config: {config.pooler_type},
    fill=_fill,
    defaults=_DEFAULTS,
    assumed="heads of 64 channels, 8 heads in the poolers, exact GELU, pre-norm layers, the ids of BOS and EOS",
    rename=rename,
)
