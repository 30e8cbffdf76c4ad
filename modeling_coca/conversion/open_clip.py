"""open_clip's CoCa checkpoints to ours and back.

Three steps, each usable alone:

1. `config_from_open_clip` reads the `model_cfg` of an `open_clip_config.json`, names the quirks of open_clip's models
   as fields of `CocaConfig`, and refuses by name what `CocaConfig` cannot say;
2. `TABLE` maps the tensors. It is the only place that knows names, and serves both directions;
3. `from_open_clip` / `to_open_clip` apply it, and refuse a state dict that does not fit before there is a model.

Written for open_clip 2.x to 4.x, whose CoCa models share names and shapes.
"""

import copy
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..configuration_coca import CocaConfig
from ..modeling_coca import CocaForConditionalGeneration
from .family import Conversion, Family
from .sources import CONFIG_FILES, WEIGHT_FILES, Weights, read_json
from .table import (
    SCALAR,
    SPLIT,
    TRANSPOSE,
    Entry,
    Row,
    Shapes,
    heads_of,
    layers_of,
    square_grid,
    write_out,
)

# ---------------------------------------------------------------------------------------------------------------------
# 1. Names
# ---------------------------------------------------------------------------------------------------------------------


def _layer(open_clip: str, ours: str, attention: str = "self_attn") -> list[Row]:
    return [
        Row(f"{open_clip}.ln_1.{{leaf}}", f"{ours}.layer_norm1.{{leaf}}"),
        Row(f"{open_clip}.attn.in_proj_{{leaf}}", f"{ours}.{attention}.{{qkv}}_proj.{{leaf}}", SPLIT),
        Row(f"{open_clip}.attn.out_proj.{{leaf}}", f"{ours}.{attention}.out_proj.{{leaf}}"),
        Row(f"{open_clip}.ls_1.gamma", f"{ours}.layer_scale1.gamma"),
        Row(f"{open_clip}.ln_2.{{leaf}}", f"{ours}.layer_norm2.{{leaf}}"),
        Row(f"{open_clip}.mlp.c_fc.{{leaf}}", f"{ours}.mlp.fc1.{{leaf}}"),
        Row(f"{open_clip}.mlp.c_proj.{{leaf}}", f"{ours}.mlp.fc2.{{leaf}}"),
        Row(f"{open_clip}.ls_2.gamma", f"{ours}.layer_scale2.gamma"),
    ]


def _pooler(open_clip: str, ours: str) -> list[Row]:
    return [
        Row(f"{open_clip}.query", f"{ours}.query"),
        Row(f"{open_clip}.ln_q.{{leaf}}", f"{ours}.layer_norm_q.{{leaf}}"),
        Row(f"{open_clip}.ln_k.{{leaf}}", f"{ours}.layer_norm_k.{{leaf}}"),
        Row(f"{open_clip}.attn.in_proj_weight", f"{ours}.attn.{{qkv}}_proj.weight", SPLIT, when="packed pooler"),
        Row(f"{open_clip}.attn.{{qkv}}_proj_weight", f"{ours}.attn.{{qkv}}_proj.weight", when="separate pooler"),
        Row(f"{open_clip}.attn.in_proj_bias", f"{ours}.attn.{{qkv}}_proj.bias", SPLIT),
        Row(f"{open_clip}.attn.out_proj.{{leaf}}", f"{ours}.attn.out_proj.{{leaf}}"),
    ]


def text_tower() -> list[Row]:
    """Text tower and decoder, which CONCH shares."""
    return [
        Row("text.token_embedding.weight", "model.text_model.embed_tokens.weight"),
        Row("text.positional_embedding", "model.text_model.embed_positions.weight"),
        Row("text.cls_emb", "model.text_model.class_embedding"),
        *_layer("text.transformer.resblocks.{i}", "model.text_model.layers.{i}"),
        Row("text.ln_final.{leaf}", "model.text_model.final_layer_norm.{leaf}"),
        Row("text.text_projection", "model.text_projection.weight", TRANSPOSE, when="bare projection"),
        Row("text.text_projection.{leaf}", "model.text_projection.{leaf}", when="linear projection"),
        *_layer("text_decoder.resblocks.{i}", "text_decoder.layers.{i}.self_block"),
        *_layer("text_decoder.cross_attn.{i}", "text_decoder.layers.{i}.cross_block", attention="cross_attn"),
        Row("text_decoder.cross_attn.{i}.ln_1_kv.{leaf}", "text_decoder.layers.{i}.cross_block.layer_norm_kv.{leaf}"),
        Row("text_decoder.ln_final.{leaf}", "text_decoder.final_layer_norm.{leaf}"),
        Row("text_decoder.text_projection", "lm_head.weight", TRANSPOSE),
    ]


# fmt: off
TABLE = [
    Row("logit_scale", "model.logit_scale", SCALAR),
    Row("logit_bias", "model.logit_bias", SCALAR),
    # image
    Row("visual.class_embedding", "model.vision_model.embeddings.class_embedding"),
    Row("visual.conv1.weight", "model.vision_model.embeddings.patch_embedding.weight"),
    Row("visual.positional_embedding", "model.vision_model.embeddings.position_embedding.weight"),
    Row("visual.ln_pre.{leaf}", "model.vision_model.pre_layernorm.{leaf}"),
    *_layer("visual.transformer.resblocks.{i}", "model.vision_model.layers.{i}"),
    *_pooler("visual.attn_pool", "model.image_pooler.caption_pooler"),
    *_pooler("visual.attn_pool_contrastive", "model.image_pooler.contrastive_pooler"),
    Row("visual.ln_post.{leaf}", "model.image_pooler.layer_norm.{leaf}"),
    Row("visual.ln_post.{leaf}", "model.image_pooler.caption_pooler.layer_norm_out.{leaf}"),  # attentional_pool: true
    Row("visual.proj", "model.visual_projection.weight", TRANSPOSE),
    *text_tower(),
]
# fmt: on


def _ways_of_storing(config: CocaConfig) -> set[str]:
    # nn.MultiheadAttention packs q, k and v if keys and values have the width of the queries
    packed = config.vision_config.hidden_size == config.projection_dim
    return {
        "packed pooler" if packed else "separate pooler",
        "linear projection" if config.text_projection_bias else "bare projection",
    }


def name_entries(model: CocaForConditionalGeneration) -> list[Entry]:
    """`TABLE` written out for the tensors that `model` has.

    Args:
        model: May be on the meta device: only names are read.

    Returns:
        One entry for each tensor of open_clip's state dict, in the order of the table.
    """
    return write_out(TABLE, model.state_dict(), _ways_of_storing(model.config), "open_clip")


# ---------------------------------------------------------------------------------------------------------------------
# 2. Config
# ---------------------------------------------------------------------------------------------------------------------

_SECTIONS = ("vision_cfg", "text_cfg", "multimodal_cfg")

# Values that open_clip uses for what a config does not mention (those that are read here)
_DEFAULTS = {
    "": {
        "quick_gelu": False,
        "pad_id": 0,
        "init_logit_scale": math.log(1 / 0.07),
        "init_logit_bias": None,
    },
    "vision_cfg": {
        "layers": 12,
        "width": 768,
        "head_width": 64,
        "mlp_ratio": 4.0,
        "patch_size": 16,
        "image_size": 224,
        "ls_init_value": None,
        "patch_dropout": 0.0,
        "attentional_pool": False,
        "attn_pooler_queries": 256,
        "attn_pooler_heads": 8,
        "no_ln_pre": False,
        "pos_embed_type": "learnable",
        "final_ln_after_pool": False,
        "pool_type": "tok",
        "act_kwargs": None,
    },
    "text_cfg": {
        "context_length": 77,
        "vocab_size": 49408,
        "width": 512,
        "heads": 8,
        "layers": 12,
        "mlp_ratio": 4.0,
        "ls_init_value": None,
        "embed_cls": False,
        "pad_id": 0,
        "eos_id": 2,
        "pool_type": "argmax",
        "proj_bias": False,
    },
    "multimodal_cfg": {
        "width": 512,
        "heads": 8,
        "layers": 12,
        "ls_init_value": None,
    },
}

_OTHER_BLOCK = "it makes other layers than those of CoCa's released models"
_LAYER_NORM = "all LayerNorms of this package's CoCa have an epsilon of 1e-5 and an affine map"
_SCALES = ("qk_norm", "scaled_cosine_attn", "scale_heads", "scale_attn_inner", "scale_attn", "scale_fc")
_NO_LAYER_NORM_CHANGE = (None, {}, {"eps": 1e-5})

# Keys that are understood only at the value(s) given here, and why
_ONLY: dict[str, dict[str, tuple[tuple, str]]] = {
    "vision_cfg": {
        "timm_model_name": (
            (None, ""),
            "it is a timm image tower with names of its own; give CocaConfig a timm_wrapper vision_config instead",
        ),
        "norm_kwargs": (_NO_LAYER_NORM_CHANGE, _LAYER_NORM),
        "block_type": ((None, "default"), _OTHER_BLOCK),
        **dict.fromkeys(_SCALES, ((False, None), _OTHER_BLOCK)),
    },
    "text_cfg": {
        "hf_model_name": (
            (None, ""),
            "it is a Hugging Face text tower, which is bidirectional (coca_roberta-ViT-B-32): its token states have "
            "seen the words that the decoder must predict, so the captioning loss is void and nothing can be generated",
        ),
        "no_causal_mask": (
            (False, None),
            "a bidirectional text tower shows the decoder the words that it must predict",
        ),
        "proj_type": (("linear",), "this package always projects the text embedding"),
        "act_kwargs": ((None, {}, {"approximate": "none"}), "open_clip's decoder would keep another activation"),
        "norm_kwargs": (_NO_LAYER_NORM_CHANGE, _LAYER_NORM),
        "block_type": ((None, "default"), _OTHER_BLOCK),
        **dict.fromkeys(_SCALES, ((False, None), _OTHER_BLOCK)),
    },
}

# Keys that change nothing in the network: in what form open_clip returns things, tokenizers, initial weights, and
# fields that its CoCa never reads
_IGNORED = {
    "": {"embed_dim", *_SECTIONS, "custom_text", "nonscalar_logit_scale", "cast_dtype"},
    "vision_cfg": {
        "output_tokens",
        "timm_model_pretrained",
        "timm_pool",
        "timm_proj",
        "timm_proj_bias",
        "timm_drop",
        "timm_drop_path",
    },
    "text_cfg": {
        "output_tokens",
        "final_ln_after_pool",
        "hf_tokenizer_name",
        "tokenizer_mode",
        "tokenizer_kwargs",
        "hf_tokenizer_kwargs",
        "hf_model_pretrained",
        "hf_proj_type",
        "hf_pooler_type",
    },
}
# The decoder's section may hold all keys of a text tower; its MLP ratio is 4 and its context is the text's anyway
_IGNORED["multimodal_cfg"] = {
    *("dim_head", "n_queries", "attn_pooler_heads", "latent_dim"),
    *_DEFAULTS["text_cfg"],
    *_ONLY["text_cfg"],
    *_IGNORED["text_cfg"],
}


def _unsupported(key: str, value: Any, why: str) -> ValueError:
    return ValueError(f"open_clip config: `{key}` = {value!r} is not supported: {why}.")


def _read(model_cfg: Mapping, section: str) -> dict[str, Any]:
    """The keys of a section that matter, defaults filled in; unknown or unsupported ones raise."""
    given = model_cfg.get(section) if section else model_cfg
    if not isinstance(given, Mapping):
        why = "this is not the config of a CoCa model" if section == "multimodal_cfg" else "it must be an object"
        raise ValueError(f"open_clip config: `{section or 'model_cfg'}` is missing or no mapping: {why}.")
    defaults, ignored, only = _DEFAULTS[section], _IGNORED[section], _ONLY.get(section, {})
    for key, value in given.items():
        name = f"{section}.{key}" if section else key
        if key in only and value not in only[key][0]:
            raise _unsupported(name, value, only[key][1])
        if key not in only and key not in defaults and key not in ignored:
            raise _unsupported(name, value, "this key is not known")
    values = {**defaults, **{key: value for key, value in given.items() if key in defaults}}
    for key, value in values.items():
        _check_value(f"{section}.{key}" if section else key, value, defaults[key])
    return values


# Keys that hold integers, and the least that makes sense
_LEAST = {
    **dict.fromkeys(("width", "head_width", "patch_size", "image_size", "attn_pooler_queries", "attn_pooler_heads"), 1),
    **dict.fromkeys(("embed_dim", "heads", "context_length", "vocab_size"), 1),
    **dict.fromkeys(("layers", "pad_id", "eos_id"), 0),
}
_NUMBERS = ("mlp_ratio", "ls_init_value", "patch_dropout", "init_logit_scale", "init_logit_bias")
_LISTS = ("vision_cfg.layers", "vision_cfg.patch_size", "vision_cfg.image_size")


def _check_value(name: str, value: Any, default: Any) -> None:
    key = name.rpartition(".")[2]
    if key in _LEAST:
        values = value if name in _LISTS and isinstance(value, (list, tuple)) else [value]
        if not all(type(one) is int and one >= _LEAST[key] for one in values):
            raise _unsupported(name, value, f"it must be a whole number of at least {_LEAST[key]}")
    elif key in _NUMBERS:
        is_number = type(value) in (int, float) and math.isfinite(value)
        if not is_number and not (value is None and default is None):
            raise _unsupported(name, value, "it must be a finite number")
    elif isinstance(default, bool) and key != "attentional_pool" and not isinstance(value, bool | None):
        raise _unsupported(name, value, "it must be true or false")


def config_from_open_clip(model_cfg: dict) -> CocaConfig:
    """The `CocaConfig` that computes what open_clip computes from `model_cfg`.

    Args:
        model_cfg: As in `open_clip_config.json` or open_clip's `model_configs/*.json`.

    Returns:
        A `CocaConfig`. It remembers `model_cfg` in `open_clip_model_cfg`, for `to_open_clip`.

    Raises:
        ValueError: A key or value cannot be expressed. The message names it.
    """
    top = _read(model_cfg, "")
    vision, text, decoder = (_read(model_cfg, section) for section in _SECTIONS)
    if "embed_dim" not in model_cfg:
        raise ValueError("open_clip config: `embed_dim` is missing.")
    embed_dim = model_cfg["embed_dim"]
    _check_value("embed_dim", embed_dim, None)

    if isinstance(vision["layers"], (list, tuple)):
        raise _unsupported("vision_cfg.layers", vision["layers"], "it is a ResNet; CoCa's pooler needs a ViT")
    patch_size = vision["patch_size"]
    if isinstance(patch_size, (list, tuple)):
        if len(set(patch_size)) != 1:
            raise _unsupported("vision_cfg.patch_size", patch_size, "patches are square")
        patch_size = patch_size[0]
    if vision["pos_embed_type"] not in ("learnable", "sin_cos_2d"):
        raise _unsupported("vision_cfg.pos_embed_type", vision["pos_embed_type"], 'use "learnable" or "sin_cos_2d"')
    if top["pad_id"] != text["pad_id"]:
        raise _unsupported("pad_id", top["pad_id"], f"it differs from text_cfg.pad_id = {text['pad_id']}")

    # The text tower's states go into the decoder as they are, and one key/value cache serves both stacks
    for key in ("width", "heads"):
        if decoder[key] != text[key]:
            why = f"it differs from text_cfg.{key} = {text[key]}, and both stacks share one {key} here"
            raise _unsupported(f"multimodal_cfg.{key}", decoder[key], why)

    activation = "quick_gelu" if top["quick_gelu"] else "gelu"
    vision_activation = activation
    if vision["act_kwargs"]:
        if vision["act_kwargs"] == {"approximate": "tanh"} and not top["quick_gelu"]:
            vision_activation = "gelu_pytorch_tanh"
        elif vision["act_kwargs"] != {"approximate": "none"} or top["quick_gelu"]:
            raise _unsupported("vision_cfg.act_kwargs", vision["act_kwargs"], "use GELU, GELU (tanh) or quick_gelu")

    # LayerScale is one switch for both text stacks; where open_clip has it in one, the other is filled with ones
    text_layer_scale = decoder["ls_init_value"] if text["ls_init_value"] is None else text["ls_init_value"]

    def to_float(value: float | None) -> float | None:
        return None if value is None else float(value)

    bos, eos = (49406, 49407) if text["vocab_size"] >= 49408 else (text["vocab_size"] - 2, text["vocab_size"] - 1)
    use_cls_token = text["embed_cls"]
    if not use_cls_token:  # with a [CLS], open_clip reads no pool_type
        if text["pool_type"] == "eos":
            eos = text["eos_id"]
        elif text["pool_type"] != "argmax":  # the largest id of a text, which is EOS
            why = 'without `embed_cls` the text embedding is read at EOS: "argmax" or "eos"'
            raise _unsupported("text_cfg.pool_type", text["pool_type"], why)

    config = CocaConfig(
        vision_config={
            "model_type": "coca_vision_model",
            "hidden_size": vision["width"],
            "intermediate_size": int(vision["width"] * vision["mlp_ratio"]),
            "num_hidden_layers": vision["layers"],
            "num_attention_heads": vision["width"] // vision["head_width"],
            "image_size": vision["image_size"],
            "patch_size": patch_size,
            "hidden_act": vision_activation,
            "patch_dropout": vision["patch_dropout"],
            "use_pre_layernorm": not vision["no_ln_pre"],
            "layer_scale_init_value": to_float(vision["ls_init_value"]),
        },
        text_config={
            "vocab_size": text["vocab_size"],
            "hidden_size": text["width"],
            "intermediate_size": int(text["width"] * text["mlp_ratio"]),
            "multimodal_intermediate_size": 4 * text["width"],
            "num_hidden_layers": text["layers"] + decoder["layers"],
            "num_multimodal_layers": decoder["layers"],
            "num_attention_heads": text["heads"],
            "max_position_embeddings": text["context_length"] + int(use_cls_token),
            "hidden_act": activation,
            "layer_scale_init_value": to_float(text_layer_scale),
            "use_cls_token": use_cls_token,
            "cls_position": "last",  # all released weights were trained on texts padded to the full length
            "shifted_cls_mask": use_cls_token,  # the only mask that an open_clip config can reach
            "bos_token_id": bos,
            "eos_token_id": eos,
            "pad_token_id": text["pad_id"],
        },
        projection_dim=embed_dim,
        logit_scale_init_value=to_float(top["init_logit_scale"]),
        logit_bias_init_value=to_float(top["init_logit_bias"]),
        text_projection_bias=text["proj_bias"],
        **_pooling_from_open_clip(vision, embed_dim, text["width"]),
    )
    config.open_clip_model_cfg = copy.deepcopy(dict(model_cfg))
    return config


def infer_model_cfg(shapes: Shapes) -> dict:
    """The `model_cfg` of a checkpoint that comes without one, such as LAION's B/32 and L/14.

    Args:
        shapes: Of all tensors, by open_clip's names.

    Returns:
        What `config_from_open_clip` takes. What leaves no trace in the tensors is as in all released models: heads of 64
        channels, 8 in the pooler, exact GELU, the first query as embedding.

    Raises:
        ValueError: The tensors leave it open.
    """
    width, _, patch_size, _ = shapes["visual.conv1.weight"]
    grid = square_grid(shapes["visual.positional_embedding"][0] - 1, "The image tower")
    vision_cfg = {
        "image_size": grid * patch_size,
        "layers": layers_of(shapes, "visual.transformer.resblocks"),
        "width": width,
        "patch_size": patch_size,
    }
    heads_of(width, "the image tower")
    if "visual.attn_pool_contrastive.query" in shapes:
        raise ValueError(
            'With two poolers the tensors do not tell "cascade" from "parallel": give the config (`--config`).'
        )
    if "visual.attn_pool.query" in shapes:
        queries = shapes["visual.attn_pool.query"][0]
        vision_cfg |= {"attentional_pool": True, "attn_pooler_queries": queries, "attn_pooler_heads": 8}
    vision_cfg |= {"no_ln_pre": "visual.ln_pre.weight" not in shapes, "output_tokens": True}

    vocab_size, text_width = shapes["text.token_embedding.weight"]
    embed_cls = "text.cls_emb" in shapes
    stack = {
        "context_length": shapes["text.positional_embedding"][0] - int(embed_cls),
        "vocab_size": vocab_size,
        "width": text_width,
        "heads": heads_of(text_width, "the text tower"),
    }
    text_cfg = {
        **stack,
        "layers": layers_of(shapes, "text.transformer.resblocks"),
        "embed_cls": embed_cls,
        "proj_bias": "text.text_projection.bias" in shapes,
        "output_tokens": True,
    }
    multimodal_cfg = {**stack, "layers": layers_of(shapes, "text_decoder.resblocks")}
    for section, blocks, size in (
        (vision_cfg, "visual.transformer.resblocks", width),
        (text_cfg, "text.transformer.resblocks", text_width),
        (multimodal_cfg, "text_decoder.resblocks", text_width),
    ):
        if f"{blocks}.0.ls_1.gamma" in shapes:
            section["ls_init_value"] = 1.0  # where training began; the values come from the file
        mlp_size = shapes[f"{blocks}.0.mlp.c_fc.weight"][0]
        if section is not multimodal_cfg:
            section["mlp_ratio"] = _mlp_ratio(mlp_size, size)
    model_cfg = {
        "embed_dim": shapes["visual.proj"][1],
        "vision_cfg": vision_cfg,
        "text_cfg": text_cfg,
        "multimodal_cfg": multimodal_cfg,
        "custom_text": True,
    }
    if "logit_bias" in shapes:
        model_cfg["init_logit_bias"] = -10.0
    return model_cfg


def _pooling_from_open_clip(vision: dict[str, Any], embed_dim: int, text_width: int) -> dict[str, Any]:
    """The fields of `CocaConfig` that say how the encoder's tokens are pooled."""
    layout, queries = vision["attentional_pool"] or False, vision["attn_pooler_queries"]
    if layout in ("parallel", "cascade"):
        if vision["width"] != embed_dim:
            why = f"with attentional_pool={layout!r} open_clip can only run a width of embed_dim ({embed_dim})"
            raise _unsupported("vision_cfg.width", vision["width"], why)
        pooling = {"pooler_type": layout, "num_query_tokens": queries, "image_layer_norm": "encoder"}
    elif not isinstance(layout, bool):
        raise _unsupported("vision_cfg.attentional_pool", layout, 'use true, false, "parallel" or "cascade"')
    elif vision["pool_type"] not in ("tok", "avg"):
        why = 'one vector an image is needed: "tok" or "avg"'
        raise _unsupported("vision_cfg.pool_type", vision["pool_type"], why)
    else:
        pooling = {"image_pooling": "first" if vision["pool_type"] == "tok" else "mean"}
        if layout:  # `final_ln_after_pool` is not read then; the released models
            pooling |= {"pooler_type": "shared", "num_query_tokens": queries - 1, "image_layer_norm": "pooler"}
        else:
            norm = "embedding" if vision["final_ln_after_pool"] else "encoder"
            pooling |= {"pooler_type": "none", "image_layer_norm": norm}
    token_width = embed_dim if layout else vision["width"]
    if token_width != text_width:
        key = "embed_dim" if layout else "vision_cfg.width"
        why = f"image tokens of this width enter a decoder of width {text_width}, which open_clip cannot run either"
        raise _unsupported(key, token_width, why)
    if layout:
        pooling |= {"pooler_hidden_size": embed_dim, "num_pooler_attention_heads": vision["attn_pooler_heads"]}
    return pooling


def _mlp_ratio(intermediate_size: int, hidden_size: int) -> float:
    ratio = intermediate_size / hidden_size
    # open_clip cuts the product down to an integer
    return ratio if int(hidden_size * ratio) == intermediate_size else math.nextafter(ratio, math.inf)


def _config_to_open_clip(config: CocaConfig) -> dict[str, Any]:
    """The inverse of `config_from_open_clip`; refuses, by field, what open_clip cannot compute."""
    vision, text = config.vision_config, config.text_config
    pooled = config.pooler_type != "none"
    two_poolers = config.pooler_type in ("cascade", "parallel")

    def need(condition: bool, field: str, value: Any, why: str):
        if not condition:
            raise ValueError(f"`{field}` = {value!r} cannot be written as an open_clip model: {why}.")

    own = vision.model_type == "coca_vision_model"
    need(own, "vision_config.model_type", vision.model_type, "only CocaVisionConfig has a counterpart")
    need(vision.use_class_token, "vision_config.use_class_token", False, "open_clip's ViT has a class token")
    need(not vision.patch_bias, "vision_config.patch_bias", True, "its projection of the patches has none there")
    need(
        not vision.use_post_layernorm, "vision_config.use_post_layernorm", True, "the poolers' norms are the last there"
    )
    need(vision.num_channels == 3, "vision_config.num_channels", vision.num_channels, "open_clip's images have 3")
    for name, part in (("vision_config", vision), ("text_config", text)):
        need(part.layer_norm_eps == 1e-5, f"{name}.layer_norm_eps", part.layer_norm_eps, "it is 1e-5 there")
    if text.use_cls_token:
        position, shifted = text.cls_position, text.shifted_cls_mask
        need(position == "last", "text_config.cls_position", position, 'it is "last" there')
        need(shifted, "text_config.shifted_cls_mask", shifted, "no open_clip config gives the correct mask")
    need(isinstance(text.eos_token_id, int), "text_config.eos_token_id", text.eos_token_id, "one id is needed")

    quick = text.hidden_act == "quick_gelu"
    need(text.hidden_act in ("gelu", "quick_gelu"), "text_config.hidden_act", text.hidden_act, "gelu or quick_gelu")
    allowed = ("quick_gelu",) if quick else ("gelu", "gelu_pytorch_tanh")
    why = f"with text_config.hidden_act = {text.hidden_act!r} it must be one of {allowed}"
    need(vision.hidden_act in allowed, "vision_config.hidden_act", vision.hidden_act, why)

    layer = text.multimodal_layer_type
    need(layer == "two_mlps", "text_config.multimodal_layer_type", layer, 'it is "two_mlps" there')
    mlp = text.multimodal_intermediate_size
    need(mlp == 4 * text.hidden_size, "text_config.multimodal_intermediate_size", mlp, "it is 4 x hidden_size there")
    width = config.pooler_hidden_size if pooled else vision.hidden_size
    if pooled:
        why = f"it equals projection_dim ({config.projection_dim}) there"
        need(width == config.projection_dim, "pooler_hidden_size", width, why)
    if two_poolers:
        contrastive = config.contrastive_pooler_hidden_size
        need(contrastive == width, "contrastive_pooler_hidden_size", contrastive, "both poolers have one width there")
        why = f"with pooler_type={config.pooler_type!r} it equals projection_dim ({config.projection_dim}) there"
        need(vision.hidden_size == config.projection_dim, "vision_config.hidden_size", vision.hidden_size, why)
    key = "pooler_hidden_size" if pooled else "vision_config.hidden_size"
    need(width == text.hidden_size, key, width, f"it equals text_config.hidden_size ({text.hidden_size}) there")
    norms = {"shared": ("pooler",), "none": ("encoder", "pooler", "embedding")}.get(config.pooler_type, ("encoder",))
    why = f"with pooler_type={config.pooler_type!r} it is one of {norms} there"
    need(config.image_layer_norm in norms, "image_layer_norm", config.image_layer_norm, why)

    vision_cfg = {
        "image_size": vision.image_size if isinstance(vision.image_size, int) else list(vision.image_size),
        "layers": vision.num_hidden_layers,
        "width": vision.hidden_size,
        "head_width": vision.hidden_size // vision.num_attention_heads,
        "patch_size": vision.patch_size,
        "mlp_ratio": _mlp_ratio(vision.intermediate_size, vision.hidden_size),
        "ls_init_value": vision.layer_scale_init_value,
        "patch_dropout": vision.patch_dropout,
        "no_ln_pre": not vision.use_pre_layernorm,
        "attentional_pool": config.pooler_type if two_poolers else pooled,
        "output_tokens": True,
    }
    if vision.hidden_act == "gelu_pytorch_tanh":
        vision_cfg["act_kwargs"] = {"approximate": "tanh"}
    if pooled:
        # The shared pooler's query 0 becomes the embedding and is not counted by `num_query_tokens`
        vision_cfg["attn_pooler_queries"] = config.num_query_tokens + int(config.pooler_type == "shared")
        vision_cfg["attn_pooler_heads"] = config.num_pooler_attention_heads
    else:
        vision_cfg["final_ln_after_pool"] = config.image_layer_norm == "embedding"
    if not two_poolers:
        vision_cfg["pool_type"] = "tok" if config.image_pooling == "first" else "avg"

    context_length = text.max_text_length
    text_cfg = {
        "context_length": context_length,
        "vocab_size": text.vocab_size,
        "width": text.hidden_size,
        "heads": text.num_attention_heads,
        "layers": text.num_unimodal_layers,
        "mlp_ratio": _mlp_ratio(text.intermediate_size, text.hidden_size),
        "ls_init_value": text.layer_scale_init_value,
        "embed_cls": text.use_cls_token,
        "pad_id": text.pad_token_id or 0,
        "proj_bias": config.text_projection_bias,
        "output_tokens": True,
    }
    if not text.use_cls_token:
        if text.eos_token_id == text.vocab_size - 1:
            text_cfg["pool_type"] = "argmax"
        else:
            text_cfg |= {"pool_type": "eos", "eos_id": text.eos_token_id}
    model_cfg = {
        "embed_dim": config.projection_dim,
        "quick_gelu": quick,
        "vision_cfg": vision_cfg,
        "text_cfg": text_cfg,
        "multimodal_cfg": {
            "context_length": context_length,
            "vocab_size": text.vocab_size,
            "width": text.hidden_size,
            "heads": text.num_attention_heads,
            "layers": text.num_multimodal_layers,
            "ls_init_value": text.layer_scale_init_value,
        },
        "custom_text": True,  # or open_clip's factory builds a CLIP
    }
    if not math.isclose(config.logit_scale_init_value, math.log(1 / 0.07), abs_tol=1e-3):
        model_cfg["init_logit_scale"] = config.logit_scale_init_value
    if config.logit_bias_init_value is not None:
        model_cfg["init_logit_bias"] = config.logit_bias_init_value
    if text_cfg["pad_id"]:
        model_cfg["pad_id"] = text_cfg["pad_id"]
    return model_cfg


# ---------------------------------------------------------------------------------------------------------------------
# 3. Models
# ---------------------------------------------------------------------------------------------------------------------


# open_clip switches LayerScale for each text stack, we for both. A factor of one changes nothing, so that is what a
# stack without it gets on the way in, and what is left out again on the way back.
_TEXT_STACKS = {"text": ("text_cfg", "model.text_model."), "text_decoder": ("multimodal_cfg", "text_decoder.")}


def _is_filled_with_ones(name: str, model_cfg: Mapping) -> bool:
    stack = name.split(".")[0]
    return (
        name.endswith(".gamma")
        and stack in _TEXT_STACKS
        and model_cfg[_TEXT_STACKS[stack][0]].get("ls_init_value") is None
    )


def _filling(name: str, model_cfg: Mapping, like: torch.Tensor) -> torch.Tensor | None:
    """The values of a tensor that a fitting file may lack, or `None`."""
    if name == "logit_bias":  # as open_clip fills it in for weights that were trained without it
        return torch.zeros(like.shape)
    return torch.ones(like.shape) if _is_filled_with_ones(name, model_cfg) else None


def _owns(names: set[str]) -> bool:
    has = {prefix: any(name.startswith(prefix) for name in names) for prefix in ("visual.", "text.", "text_decoder.")}
    return all(has.values()) and "visual.attn_pool_contrast.query" not in names


FAMILY = Family(
    name="open_clip",
    package="open_clip_torch",
    title="open_clip's CoCa (LAION's models, Apple's captioners for MobileCLIP2, and fine-tunes of them)",
    table=TABLE,
    owns=_owns,
    infer_config=infer_model_cfg,
    to_config=config_from_open_clip,
    ways=_ways_of_storing,
    fill=_filling,
    defaults=_DEFAULTS | _DEFAULTS[""],
    assumed="heads of 64 channels, 8 heads in the pooler, exact GELU",
)


def from_open_clip(
    model_cfg: dict, state_dict: Mapping[str, torch.Tensor], dtype: torch.dtype = torch.float32
) -> CocaForConditionalGeneration:
    """Converts an open_clip CoCa model.

    Each tensor is copied once: a lazy mapping (see `read_open_clip_folder`) is never wholly in memory, and the model shares
    no memory with `state_dict`.

    Args:
        model_cfg: open_clip's config, see `config_from_open_clip`.
        state_dict: open_clip's tensors. Prefixes of DistributedDataParallel (`module.`) and torch.compile
            (`_orig_mod.`) are stripped.
        dtype: Of the returned model, whatever the source was stored in (as open_clip does).

    Returns:
        The model in eval mode, with a generation config.

    Raises:
        ValueError: The config cannot be expressed, or tensors are missing, unexpected or of another shape: all of them
            are listed.

    Example:

    ```python
    >>> import json
    >>> from safetensors.torch import load_file
    >>> from modeling_coca.conversion.open_clip import from_open_clip

    >>> model_cfg = json.load(open("open_clip_config.json"))["model_cfg"]  # doctest: +SKIP
    >>> model = from_open_clip(model_cfg, load_file("open_clip_model.safetensors"))  # doctest: +SKIP
    >>> model.save_pretrained("coca")  # doctest: +SKIP
    ```
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
    return Conversion(FAMILY, model_cfg, shapes).load(state_dict, dtype)


def to_open_clip(model: CocaForConditionalGeneration) -> tuple[dict, dict[str, torch.Tensor]]:
    """Writes a model the way open_clip does: the inverse of `from_open_clip`, to the bit.

    Args:
        model: Must be one that open_clip can compute. Models that it cannot (another vision tower, the correct [CLS]
            mask, ...) raise a `ValueError` that names the field.

    Returns:
        `model_cfg` and `state_dict`. For a converted model `model_cfg` is the one that it came from, as long as that
        still describes the model. As with `model.state_dict()`, tensors may share memory with the model.
    """
    if not hasattr(model, "text_decoder"):
        raise ValueError(f"open_clip's CoCa has a decoder, {type(model).__name__} has none.")
    parameters = {name: tensor.detach() for name, tensor in model.named_parameters(remove_duplicate=False)}
    export = Export(model.config, parameters)
    return export.model_cfg, {name: export.tensor(name, parameters) for name in export.entries}


class Export:
    """What `to_open_clip` writes, tensor by tensor.

    Args:
        config: Of the model.
        parameters: By our names; they may come from a file as they are asked for.
    """

    def __init__(self, config: CocaConfig, parameters: Mapping[str, torch.Tensor]):
        self.model_cfg = _config_to_open_clip(config)
        source = getattr(config, "open_clip_model_cfg", None)
        if source is not None and _config_to_open_clip(config_from_open_clip(source)) == self.model_cfg:
            self.model_cfg = copy.deepcopy(source)
        layer_scale = config.text_config.layer_scale_init_value
        for section, prefix in _TEXT_STACKS.values():
            if layer_scale is not None and self.model_cfg[section].get("ls_init_value") is None:
                gammas = [name for name in parameters if name.startswith(prefix) and name.endswith(".gamma")]
                if any((parameters[name] != 1).any() for name in gammas):  # trained since
                    self.model_cfg[section]["ls_init_value"] = layer_scale
        entries = write_out(TABLE, parameters, _ways_of_storing(config), "open_clip")
        self.entries = {
            entry.theirs: entry for entry in entries if not _is_filled_with_ones(entry.theirs, self.model_cfg)
        }

    def tensor(self, name: str, parameters: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """open_clip's tensor of that name."""
        entry = self.entries[name]
        tensor = entry.transform.to_theirs(*(parameters[ours] for ours in entry.ours))
        if entry.transform is SCALAR and self.model_cfg.get("nonscalar_logit_scale"):
            tensor = tensor.reshape(1)
        return tensor.contiguous()


# ---------------------------------------------------------------------------------------------------------------------
# 4. Files
# ---------------------------------------------------------------------------------------------------------------------


def read_open_clip_folder(folder: str | Path) -> tuple[dict, Mapping[str, torch.Tensor]]:
    """Reads a model folder as open_clip and the Hub keep it.

    Args:
        folder: Holds `open_clip_config.json` and `open_clip_model.safetensors`, `open_clip_pytorch_model.bin` or one of
            open_clip's other names. Pickles are read with `weights_only=True`.

    Returns:
        The whole JSON (`model_cfg`, `preprocess_cfg`), and the tensors, mapped from disk where the format allows.
    """
    folder = Path(folder)
    path = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if not (folder / CONFIG_FILES[0]).is_file() or path is None:
        raise FileNotFoundError(
            f"{folder} must hold open_clip_config.json and one of {', '.join(WEIGHT_FILES)}; it holds "
            f"{sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else 'nothing: no such folder'}."
        )
    config = read_json(folder / CONFIG_FILES[0])
    return config if "model_cfg" in config else {"model_cfg": config}, Weights([path])


def load_open_clip_folder(folder: str | Path, dtype: torch.dtype = torch.float32) -> CocaForConditionalGeneration:
    """`from_open_clip` for a folder (see `read_open_clip_folder`)."""
    config, state_dict = read_open_clip_folder(folder)
    return from_open_clip(config["model_cfg"], state_dict, dtype=dtype)
