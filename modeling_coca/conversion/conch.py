"""CONCH's checkpoints (github.com/mahmoodlab/CONCH): a timm ViT, two parallel poolers of different widths, open_clip's text
tower. The released weights have no decoder, so what comes out is a dual encoder (`CocaModel`)."""

from ..configuration_coca import CocaConfig
from .family import Family
from .open_clip import text_tower
from .table import (
    COPY,
    LEADING_1,
    LEADING_1_1,
    SCALAR,
    SPLIT,
    TRANSPOSE,
    Row,
    Shapes,
    heads_of,
    layers_of,
    square_grid,
)


def _pooler(conch: str, ours: str, way: str) -> list[Row]:
    return [
        Row(f"visual.attn_pool_{conch}.query", f"{ours}.query"),
        Row(f"visual.attn_pool_{conch}.ln_q.{{leaf}}", f"{ours}.layer_norm_q.{{leaf}}"),
        Row(f"visual.attn_pool_{conch}.ln_k.{{leaf}}", f"{ours}.layer_norm_k.{{leaf}}"),
        Row(
            f"visual.attn_pool_{conch}.attn.in_proj_weight", f"{ours}.attn.{{qkv}}_proj.weight", SPLIT, f"packed {way}"
        ),
        Row(
            f"visual.attn_pool_{conch}.attn.{{qkv}}_proj_weight",
            f"{ours}.attn.{{qkv}}_proj.weight",
            COPY,
            f"separate {way}",
        ),
        Row(f"visual.attn_pool_{conch}.attn.in_proj_bias", f"{ours}.attn.{{qkv}}_proj.bias", SPLIT),
        Row(f"visual.attn_pool_{conch}.attn.out_proj.{{leaf}}", f"{ours}.attn.out_proj.{{leaf}}"),
        Row(f"visual.ln_{conch}.{{leaf}}", f"{ours}.layer_norm_out.{{leaf}}"),
    ]


# fmt: off
TABLE = [
    Row("logit_scale", "model.logit_scale", SCALAR),
    # image
    Row("visual.trunk.cls_token", "model.vision_model.embeddings.class_embedding", LEADING_1_1),
    Row("visual.trunk.pos_embed", "model.vision_model.embeddings.position_embedding.weight", LEADING_1),
    Row("visual.trunk.patch_embed.proj.{leaf}", "model.vision_model.embeddings.patch_embedding.{leaf}"),
    Row("visual.trunk.blocks.{i}.norm1.{leaf}", "model.vision_model.layers.{i}.layer_norm1.{leaf}"),
    Row("visual.trunk.blocks.{i}.attn.qkv.{leaf}", "model.vision_model.layers.{i}.self_attn.{qkv}_proj.{leaf}", SPLIT),
    Row("visual.trunk.blocks.{i}.attn.proj.{leaf}", "model.vision_model.layers.{i}.self_attn.out_proj.{leaf}"),
    Row("visual.trunk.blocks.{i}.norm2.{leaf}", "model.vision_model.layers.{i}.layer_norm2.{leaf}"),
    Row("visual.trunk.blocks.{i}.mlp.fc1.{leaf}", "model.vision_model.layers.{i}.mlp.fc1.{leaf}"),
    Row("visual.trunk.blocks.{i}.mlp.fc2.{leaf}", "model.vision_model.layers.{i}.mlp.fc2.{leaf}"),
    Row("visual.trunk.norm.{leaf}", "model.vision_model.post_layernorm.{leaf}"),
    *_pooler("contrast", "model.image_pooler.contrastive_pooler", "contrastive pooler"),
    *_pooler("caption", "model.image_pooler.caption_pooler", "caption pooler"),
    Row("visual.proj_contrast", "model.visual_projection.weight", TRANSPOSE),
    # text, and a decoder for weights of one's own
    *text_tower(),
]
# fmt: on

_DEFAULTS = {
    "vision_cfg": {
        "layers": 12,
        "width": 768,
        "num_heads": 12,
        "mlp_ratio": 4,
        "patch_size": 16,
        "image_size": 224,
        "n_queries_caption": 256,
    },
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12},
    "multimodal_cfg": {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12},
}


def infer_model_cfg(shapes: Shapes) -> dict:
    """CONCH's `model_cfg` from its tensors: its repository has no config."""
    width, _, patch_size, _ = shapes["visual.trunk.patch_embed.proj.weight"]
    grid = square_grid(shapes["visual.trunk.pos_embed"][1] - 1, "The image tower")
    vocab_size, text_width = shapes["text.token_embedding.weight"]
    stack = {
        "context_length": shapes["text.positional_embedding"][0],  # [CLS] included
        "vocab_size": vocab_size,
        "width": text_width,
        "heads": heads_of(text_width, "the text tower"),
    }
    return {
        "embed_dim": shapes["visual.proj_contrast"][1],
        "embed_dim_caption": shapes["visual.attn_pool_caption.query"][1],
        "vision_cfg": {
            "image_size": grid * patch_size,
            "patch_size": patch_size,
            "layers": layers_of(shapes, "visual.trunk.blocks"),
            "width": width,
            "num_heads": heads_of(width, "the image tower"),
            "attentional_pool_caption": True,
            "attentional_pool_contrast": True,
            "attn_pooler_heads": 8,
            "n_queries_contrast": shapes["visual.attn_pool_contrast.query"][0],
            "n_queries_caption": shapes["visual.attn_pool_caption.query"][0],
            "output_tokens": True,
        },
        "text_cfg": {
            **stack,
            "layers": layers_of(shapes, "text.transformer.resblocks"),
            "embed_cls": "text.cls_emb" in shapes,
            "output_tokens": True,
        },
        # Without a decoder the size that CONCH's config gives it
        "multimodal_cfg": {**stack, "layers": layers_of(shapes, "text_decoder.resblocks") or 12},
        "custom_text": True,
    }


def config_from_conch(model_cfg: dict) -> CocaConfig:
    """The `CocaConfig` that computes what CONCH computes from `model_cfg` (its `model_configs/*.json`).

    Raises:
        ValueError: A value cannot be expressed. The message names it.
    """
    sections = ("vision_cfg", "text_cfg", "multimodal_cfg")
    vision, text, decoder = ({**_DEFAULTS[key], **model_cfg.get(key, {})} for key in sections)
    for key in ("attentional_pool_caption", "attentional_pool_contrast"):
        if not vision.get(key):
            raise ValueError(
                f"CONCH config: `vision_cfg.{key}` = {vision.get(key)!r} is not supported: it must be true."
            )
    if not text.get("embed_cls"):
        raise ValueError("CONCH config: `text_cfg.embed_cls` must be true: CONCH's text embedding is read at [CLS].")
    for key in ("width", "heads"):
        if decoder[key] != text[key]:
            raise ValueError(f"CONCH config: `multimodal_cfg.{key}` = {decoder[key]} differs from `text_cfg.{key}`.")
    if model_cfg["embed_dim_caption"] != text["width"]:
        raise ValueError(
            f"CONCH config: `embed_dim_caption` = {model_cfg['embed_dim_caption']} differs from `text_cfg.width` = "
            f"{text['width']}, which the decoder cannot take."
        )
    return CocaConfig(
        vision_config={
            "model_type": "coca_vision_model",
            "hidden_size": vision["width"],
            "intermediate_size": int(vision["width"] * vision["mlp_ratio"]),
            "num_hidden_layers": vision["layers"],
            "num_attention_heads": vision["num_heads"],
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
            "layer_norm_eps": 1e-6,  # timm's
            "patch_bias": True,
            "use_pre_layernorm": False,
            "use_post_layernorm": True,
        },
        text_config={
            "vocab_size": text["vocab_size"],
            "hidden_size": text["width"],
            "intermediate_size": 4 * text["width"],
            "num_hidden_layers": text["layers"] + decoder["layers"],
            "num_multimodal_layers": decoder["layers"],
            "num_attention_heads": text["heads"],
            "max_position_embeddings": text["context_length"],  # counts [CLS], unlike open_clip's
            "shifted_cls_mask": True,  # it was trained with the mask of open_clip's time
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
        projection_dim=model_cfg["embed_dim"],
        pooler_type="parallel",
        num_query_tokens=vision["n_queries_caption"],
        pooler_hidden_size=model_cfg["embed_dim_caption"],
        contrastive_pooler_hidden_size=model_cfg["embed_dim"],
        num_pooler_attention_heads=8,  # CONCH's builder does not pass `attn_pooler_heads` on
        image_layer_norm="pooler",
    )


def _ways_of_storing(config: CocaConfig) -> set[str]:
    # nn.MultiheadAttention packs q, k and v if keys and values have the width of the queries
    width = config.vision_config.hidden_size
    poolers = {"caption": config.pooler_hidden_size, "contrastive": config.contrastive_pooler_hidden_size}
    ways = {f"{'packed' if size == width else 'separate'} {name} pooler" for name, size in poolers.items()}
    return ways | {"bare projection"}


FAMILY = Family(
    name="CONCH",
    package="conch",
    title="CONCH of the Mahmood Lab (pathology)",
    table=TABLE,
    owns=lambda names: {"visual.trunk.patch_embed.proj.weight", "visual.attn_pool_contrast.query"} <= names,
    infer_config=infer_model_cfg,
    to_config=config_from_conch,
    ways=_ways_of_storing,
    defaults=_DEFAULTS,
    assumed="heads of 64 channels, 8 heads in the poolers",
    decoder_is_optional=True,
)
