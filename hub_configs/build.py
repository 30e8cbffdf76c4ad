"""Writes the folders beside this file, one for each model size: `python hub_configs/build.py`.

All that tells one size from another stands in `MODELS`. The card has the form of all cards, that of `modeling_coca.hub`.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from huggingface_hub import ModelCardData
from transformers import AutoConfig, AutoModelForImageTextToText

import modeling_coca
from modeling_coca.conversion.recipes import RECIPES, Recipe
from modeling_coca.hub.model_card import TAGS, parameters_by_part, readable, render_card

FOLDER = Path(__file__).parent

# CLIP's byte-level BPE; a vocabulary that CocaTokenizer learns has <pad>, BOS and EOS as ids 0, 1 and 2
CLIP_IDS = {"bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 0}
LEARNED_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


@dataclass
class HubModel:
    """
    Args:
        origin: Whose model this is, in a sentence or two for the card.
        config: Arguments of `CocaConfig`.
        notes: What a user should know, one paragraph each: choices made here, differences from the original.
        published: Its parameters as the source gives them, for the card and the test.
        recipe: Of released weights: licence, use, and how their makers generate.
    """

    origin: str
    config: dict
    notes: list[str] = field(default_factory=list)
    published: str | None = None
    recipe: Recipe | None = None


def vit(hidden_size: int, num_hidden_layers: int, num_attention_heads: int, **kwargs) -> dict:
    return {
        "model_type": "coca_vision_model",
        "hidden_size": hidden_size,
        "intermediate_size": 4 * hidden_size,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": num_attention_heads,
        **kwargs,
    }


def text(hidden_size: int, num_unimodal_layers: int, num_multimodal_layers: int, num_attention_heads: int, **kwargs):
    return {
        "model_type": "coca_text_model",
        "hidden_size": hidden_size,
        "intermediate_size": 4 * hidden_size,
        "num_hidden_layers": num_unimodal_layers + num_multimodal_layers,
        "num_multimodal_layers": num_multimodal_layers,
        "num_attention_heads": num_attention_heads,
        **kwargs,
    }


def paper_model(name: str, published: str, vision_config: dict, text_config: dict, published_gap: str = "") -> HubModel:
    vision_config |= {"image_size": 288, "patch_size": 18, "use_class_token": False, "use_pre_layernorm": False}
    return HubModel(
        origin=f"{name} of the paper [CoCa: Contrastive Captioners are Image-Text Foundation Models]"
        "(https://arxiv.org/abs/2205.01917). Its weights were never released.",
        config={
            "vision_config": vision_config,
            "text_config": {
                **text_config,
                "multimodal_intermediate_size": text_config["intermediate_size"] // 2,
                "vocab_size": 64000,
                "max_position_embeddings": 77,
                **LEARNED_IDS,
            },
            "projection_dim": text_config["hidden_size"],
            "pooler_type": "cascade",
            "num_query_tokens": 256,
            "num_pooler_attention_heads": text_config["num_attention_heads"],
            "image_layer_norm": "encoder",
        },
        published=published,
        notes=[
            "The image side is 256 patches without a class token, then the cascade of a 256-query and a one-query "
            "pooler. Input and output embeddings of the 64,000 tokens are not tied, and as many layers are unimodal as "
            "multimodal: with these two the paper's sizes come out.",
            "A multimodal layer has two MLPs here, after its self-attention and after its cross-attention, as in "
            "open_clip. The paper's sizes have room for one, so both are half as wide "
            "(`multimodal_intermediate_size`). The published numbers come out without the poolers and projections"
            f"{published_gap}.",
            "Chosen here, as nothing to the contrary is known: the width of the embedding space, the heads of the "
            "poolers, 76 text tokens, and the ids of the special tokens.",
        ],
    )


RELEASED = {recipe.hub_config: recipe for recipe in RECIPES}


def open_clip_model(
    name: str,
    published: str,
    image_size: int,
    released: str | None = None,
    positions: int = 77,
    note: str = "",
    **config,
) -> HubModel:
    """Args: name: of the config in open_clip; released: of the weights' recipe; positions: text tokens and [CLS]."""
    config["text_config"] |= {"max_position_embeddings": positions, "shifted_cls_mask": True, **CLIP_IDS}
    config["vision_config"] |= {"image_size": image_size}
    recipe = RELEASED.get(released)
    weights = (
        f"The config of {recipe.title}; `coca convert` brings the weights."
        if recipe
        else "No weights of it were released."
    )
    return HubModel(
        origin=f"`{name}` of [open_clip](https://github.com/mlfoundations/open_clip). {weights}",
        config=config,
        published=published,
        recipe=recipe,
        notes=[
            "open_clip trained with a padding mask that is off by one (`shifted_cls_mask`). Keep it for open_clip's "
            "weights, and set it to `false` to train from scratch.",
            *([note] if note else []),
        ],
    )


def coca_vit_b_32(released: str) -> HubModel:
    return open_clip_model(
        "coca_ViT-B-32",
        "253.56M",
        224,
        released,
        vision_config=vit(768, 12, 12, patch_size=32),
        text_config=text(512, 12, 12, 8),
        projection_dim=512,
        pooler_type="shared",
        num_query_tokens=255,
    )


def coca_vit_l_14(released: str, **kwargs) -> HubModel:
    return open_clip_model(
        "coca_ViT-L-14",
        "638.45M" if "positions" not in kwargs else None,
        224,
        released,
        **kwargs,
        vision_config=vit(1024, 24, 16, patch_size=14),
        text_config=text(768, 12, 12, 12),
        projection_dim=768,
        pooler_type="shared",
        num_query_tokens=255,
    )


def apple_captioner(positions: int) -> HubModel:
    return coca_vit_l_14(
        f"mobileclip2-coca-context{positions}",
        positions=positions,
        note=f"That the number in the repositories' names, {positions}, counts [CLS] is read from Apple's README, which opens those "
        "of 77 with open_clip's own `coca_ViT-L-14`. `coca convert` takes the length from the file.",
    )


MODELS = {
    "coca-base": paper_model("CoCa-Base", "383M", vit(768, 12, 12), text(768, 12, 12, 12)),
    "coca-large": paper_model("CoCa-Large", "787M", vit(1024, 24, 16), text(1024, 12, 12, 16)),
    "coca-2b": paper_model(
        "CoCa",
        "2.1B",
        vit(1408, 40, 16, intermediate_size=6144),
        text(1408, 18, 18, 16),
        published_gap=" to within 4 % (the text stacks, published as 1.1B, come out at 1.18B)",
    ),
    "coca-vit-b-32": coca_vit_b_32("coca-vit-b-32"),
    "coca-vit-b-32-mscoco": coca_vit_b_32("coca-vit-b-32-mscoco"),
    "coca-vit-l-14": coca_vit_l_14("coca-vit-l-14"),
    "coca-vit-l-14-mscoco": coca_vit_l_14("coca-vit-l-14-mscoco"),
    **{f"mobileclip2-coca-context{positions}": apple_captioner(positions) for positions in (77, 128, 256)},
    "conch-vit-b-16": HubModel(
        origin="[CONCH](https://github.com/mahmoodlab/CONCH), a CoCa for pathology. Its decoder was not released: `coca convert` makes a "
        "`CocaModel` of the weights, and `CocaForConditionalGeneration.from_pretrained` puts a new decoder on it to train.",
        config={
            "vision_config": {
                **vit(768, 12, 12, image_size=448, patch_size=16),
                "layer_norm_eps": 1e-6,
                "patch_bias": True,
                "use_pre_layernorm": False,
                "use_post_layernorm": True,
            },
            "text_config": text(
                768, 12, 12, 12, vocab_size=32007, max_position_embeddings=128, shifted_cls_mask=True, **LEARNED_IDS
            ),
            "projection_dim": 512,
            "pooler_type": "parallel",
            "num_query_tokens": 256,
            "contrastive_pooler_hidden_size": 512,
        },
        recipe=RELEASED["conch-vit-b-16"],
        notes=["The poolers are of different widths, 768 for the decoder and 512 for the embedding."],
    ),
    "open-clip-coca-base": open_clip_model(
        "coca_base",
        "440.3M",
        288,
        vision_config=vit(768, 12, 12, patch_size=18),
        text_config=text(768, 12, 12, 12, vocab_size=64000),
        projection_dim=512,
        pooler_type="none",
        image_layer_norm="encoder",
    ),
    "coca-frozen-vit-large": HubModel(
        origin="A CoCa on a frozen image encoder: a ViT of width 1024 gives the image tokens, and only poolers and "
        "text stacks, of width 512, are trained. The layout is that of "
        "[lucidrains' CoCa-pytorch](https://github.com/lucidrains/CoCa-pytorch).",
        config={
            "vision_config": vit(1024, 24, 16, image_size=288, patch_size=18),
            "text_config": text(512, 6, 6, 8, vocab_size=20000, max_position_embeddings=401, **LEARNED_IDS),
            "projection_dim": 512,
            "pooler_type": "shared",
            "num_query_tokens": 256,
        },
        notes=[
            "One pooler has 257 queries: query 0 gives the image embedding, the other 256 go to the decoder. A text "
            "holds up to 400 tokens.",
            "Put any pretrained encoder in the place of `vision_config` and freeze it: "
            "`from modeling_coca.training import freeze; freeze(model, ['vision_model'])`.",
        ],
    ),
    "coca-tiny": HubModel(
        origin="A CoCa that fits in a unit test. It has the paper's layout.",
        config={
            "vision_config": vit(32, 2, 4, image_size=32, patch_size=8),
            "text_config": text(32, 2, 2, 4, vocab_size=512, max_position_embeddings=17, **LEARNED_IDS),
            "projection_dim": 24,
            "pooler_type": "cascade",
            "num_query_tokens": 6,
            "num_pooler_attention_heads": 4,
        },
    ),
}


USAGE = """\
```python
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText

import modeling_coca  # tells the Auto classes about CoCa

config = AutoConfig.from_pretrained("hub_configs/{name}")
model = AutoModelForImageTextToText.from_config(config)  # random weights
image_processor = AutoImageProcessor.from_pretrained("hub_configs/{name}")
```"""


def meta_model(config: modeling_coca.CocaConfig) -> modeling_coca.CocaForConditionalGeneration:
    """Without memory for its parameters."""
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config)


def render(name: str) -> dict[str, str]:
    """File name -> content, of one folder."""
    model = MODELS[name]
    config = modeling_coca.CocaConfig(**model.config)
    image_size = config.vision_config.image_size
    ids = {key: getattr(config.text_config, key) for key in CLIP_IDS}
    files = {
        "config.json": {"architectures": ["CocaForConditionalGeneration"], "model_type": "coca", **model.config},
        "generation_config.json": {**ids, **(model.recipe.generation if model.recipe else {})},
        "processor_config.json": {
            "image_processor": {
                "crop_size": {"height": image_size, "width": image_size},
                "image_processor_type": "CocaImageProcessor",
                "size": {"shortest_edge": image_size},
            },
            "processor_class": "CocaProcessor",
        },
    }
    data = ModelCardData(
        library_name="transformers",
        license=model.recipe.license if model.recipe else "apache-2.0",
        license_name=model.recipe.license_name if model.recipe else None,
        license_link=model.recipe.license_link if model.recipe else None,
        pipeline_tag="image-text-to-text",
        tags=list(TAGS),
    )
    sections = {}
    if model.recipe:
        published = f"Published: {model.recipe.published}." if model.recipe.published else ""
        sections["The released weights"] = "\n\n".join(filter(None, [model.recipe.use, model.recipe.why, published]))
    card = render_card(
        data,
        meta_model(config),
        name=name,
        description=f"{model.origin}\n\nThese files describe a model. They hold no weights and no vocabulary.",
        usage=USAGE.format(name=name),
        parameters={"published": model.published} if model.published else None,
        notes=model.notes,
        sections=sections,
    )
    return {
        **{file: json.dumps(content, indent=2) + "\n" for file, content in files.items()},
        "README.md": card.content,
    }


def main():
    for name in MODELS:
        (FOLDER / name).mkdir(exist_ok=True)
        for file, content in render(name).items():
            (FOLDER / name / file).write_text(content, encoding="utf-8")
        print(name, readable(parameters_by_part(meta_model(AutoConfig.from_pretrained(FOLDER / name)))["all"]))


if __name__ == "__main__":
    main()
