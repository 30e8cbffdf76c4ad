"""Each folder of hub_configs/ loads, builds, has the published size, and is what build.py writes."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, GenerationConfig

from modeling_coca import CocaConfig, CocaForConditionalGeneration, CocaImageProcessorPil

FOLDER = Path(__file__).parents[1] / "hub_configs"
_spec = importlib.util.spec_from_file_location("hub_configs_build", FOLDER / "build.py")
build = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(build)

NAMES = sorted(build.MODELS)
OPEN_CLIP = {
    "coca-vit-b-32": "coca_ViT-B-32",
    "coca-vit-b-32-mscoco": "coca_ViT-B-32",
    "coca-vit-l-14": "coca_ViT-L-14",
    "coca-vit-l-14-mscoco": "coca_ViT-L-14",
    "mobileclip2-coca-context77": "coca_ViT-L-14",
    "open-clip-coca-base": "coca_base",
}


def meta_model(name: str) -> CocaForConditionalGeneration:
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(FOLDER / name))


def test_every_folder_is_in_the_table_and_in_the_readme():
    assert sorted(path.name for path in FOLDER.iterdir() if (path / "config.json").exists()) == NAMES
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert all(f"]({name})" in readme for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_files_are_what_build_writes(name):
    for file, content in build.render(name).items():
        assert (FOLDER / name / file).read_text(encoding="utf-8") == content, "run `python hub_configs/build.py`"


@pytest.mark.parametrize("name", NAMES)
def test_loads_builds_and_survives_saving(name, tmp_path):
    config = AutoConfig.from_pretrained(FOLDER / name)
    assert type(config) is CocaConfig
    config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).to_diff_dict() == config.to_diff_dict()
    # a misspelt field would be accepted silently, as an attribute
    fields = json.loads((FOLDER / name / "config.json").read_text())
    for section, defaults in (
        (fields, CocaConfig()),
        (fields["vision_config"], CocaConfig().vision_config),
        (fields["text_config"], CocaConfig().text_config),
    ):
        assert set(section) <= set(defaults.to_dict())

    model = meta_model(name)
    assert type(model) is CocaForConditionalGeneration
    assert model.get_input_embeddings().weight is not model.get_output_embeddings().weight
    generation = GenerationConfig.from_pretrained(FOLDER / name)
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (
        config.text_config.bos_token_id,
        config.text_config.eos_token_id,
        config.text_config.pad_token_id,
    )


@pytest.mark.parametrize("name", NAMES)
def test_images_are_prepared_at_the_size_of_the_model(name):
    config = AutoConfig.from_pretrained(FOLDER / name)
    processor = AutoImageProcessor.from_pretrained(FOLDER / name, backend="pil")
    assert type(processor) is CocaImageProcessorPil
    pixel_values = processor(torch.zeros(3, 40, 70, dtype=torch.uint8), return_tensors="pt")["pixel_values"]
    assert pixel_values.shape == (1, 3, config.vision_config.image_size, config.vision_config.image_size)


# The paper's numbers leave out poolers and projections. With the published widths and vocabulary the text stacks of the
# largest are 1.18B, not 1.1B as published.
@pytest.mark.parametrize(
    ("name", "published", "tolerance"),
    [("coca-base", 383e6, 0.001), ("coca-large", 787e6, 0.001), ("coca-2b", 2.1e9, 0.05)],
)
def test_paper_models_have_the_published_size(name, published, tolerance):
    counts = build.parameters_by_part(meta_model(name))
    count = counts["all"] - counts["poolers"] - counts["projections and temperature"]
    assert abs(count / published - 1) < tolerance


@pytest.mark.parametrize(("name", "published"), [("coca-base", 86e6), ("coca-large", 303e6), ("coca-2b", 1.0e9)])
def test_paper_encoders_have_the_published_size(name, published):
    count = build.parameters_by_part(meta_model(name))["image encoder"]
    assert abs(count / published - 1) < 0.015


# open_clip's own count of its models, in millions
@pytest.mark.parametrize(
    ("name", "published", "decimals"),
    [("coca-vit-b-32", 253.56, 2), ("coca-vit-l-14", 638.45, 2), ("open-clip-coca-base", 440.3, 1)],
)
def test_open_clip_models_have_the_published_size(name, published, decimals):
    assert round(build.parameters_by_part(meta_model(name))["all"] / 1e6, decimals) == published


@pytest.mark.parametrize("name", OPEN_CLIP)
def test_open_clip_models_are_what_the_conversion_makes_of_open_clips_config(name):
    open_clip = pytest.importorskip("open_clip")
    from modeling_coca.conversion import config_from_open_clip

    config = config_from_open_clip(open_clip.get_model_config(OPEN_CLIP[name]))
    assert config.open_clip_model_cfg
    del config.open_clip_model_cfg
    expected = AutoConfig.from_pretrained(FOLDER / name)
    expected.architectures = config.architectures
    if config.pooler_type == "none":  # fields that have no effect then
        expected.num_query_tokens = config.num_query_tokens
    assert json.loads(config.to_json_string()) == json.loads(expected.to_json_string())


def test_frozen_encoder_model_is_the_one_described():
    config = AutoConfig.from_pretrained(FOLDER / "coca-frozen-vit-large")
    model = meta_model("coca-frozen-vit-large")
    assert config.vision_config.grid_size == (16, 16)
    assert model.model.image_pooler.caption_pooler.query.shape == (257, 512)
    assert model.model.image_pooler.caption_pooler.attn.k_proj.in_features == 1024
    assert model.get_input_embeddings().weight.shape == (20000, 512)
    assert config.text_config.max_text_length == 400


@pytest.mark.parametrize("name", NAMES)
def test_generation_settings_are_those_of_the_released_weights(name):
    recipe = build.MODELS[name].recipe
    generation = GenerationConfig.from_pretrained(FOLDER / name)
    generation.validate(strict=True)
    settings = {} if recipe is None else recipe.generation
    assert {key: getattr(generation, key) for key in settings} == settings
    text = AutoConfig.from_pretrained(FOLDER / name).text_config
    assert settings.get("max_length", 0) <= text.max_text_length
    card = (FOLDER / name / "README.md").read_text(encoding="utf-8")
    assert f"license: {recipe.license if recipe else 'apache-2.0'}\n" in card


def test_every_released_family_has_a_folder():
    released = {model.recipe.hub_config for model in build.MODELS.values() if model.recipe}
    assert released == set(build.RELEASED)
    assert {name for name in NAMES if build.MODELS[name].recipe} == released


def test_conch_is_what_the_conversion_makes_of_its_config():
    from modeling_coca.conversion.conch import config_from_conch

    stack = {"context_length": 128, "vocab_size": 32007, "width": 768, "heads": 12, "layers": 12}
    config = config_from_conch(
        {
            "embed_dim": 512,
            "embed_dim_caption": 768,
            "vision_cfg": {
                "image_size": 448,
                "patch_size": 16,
                "attentional_pool_caption": True,
                "attentional_pool_contrast": True,
                "n_queries_caption": 256,
            },
            "text_cfg": {**stack, "embed_cls": True},
            "multimodal_cfg": stack,
        }
    )
    expected = AutoConfig.from_pretrained(FOLDER / "conch-vit-b-16")
    expected.architectures = config.architectures
    assert json.loads(config.to_json_string()) == json.loads(expected.to_json_string())
