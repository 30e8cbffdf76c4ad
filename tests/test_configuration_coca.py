"""`CocaConfig`, `CocaVisionConfig`, `CocaTextConfig`: defaults, sizes, validation, and the way to disk and back."""

import math

import pytest
from transformers import AutoConfig, ViTConfig

from modeling_coca.configuration_coca import CocaConfig, CocaTextConfig, CocaVisionConfig

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL_TEXT = {
    **SMALL,
    "num_hidden_layers": 4,
    "num_multimodal_layers": 2,
    "vocab_size": 99,
    "bos_token_id": 97,
    "eos_token_id": 98,
    "max_position_embeddings": 17,
}

VISION_CONFIGS = {
    "own": {**SMALL, "image_size": [36, 54], "patch_size": 18, "patch_dropout": 0.5, "layer_scale_init_value": 0.1},
    "vit": {**SMALL, "model_type": "vit", "image_size": 32, "patch_size": 8},
    "clip_vision": {**SMALL, "model_type": "clip_vision_model", "image_size": 32, "patch_size": 8},
    "timm_wrapper": {"model_type": "timm_wrapper", "architecture": "resnet10t"},
}


def small_config(**kwargs) -> CocaConfig:
    return CocaConfig(
        **{"vision_config": VISION_CONFIGS["own"], "text_config": SMALL_TEXT, "projection_dim": 16, **kwargs}
    )


# ----------------------------------------------------------------------------------------------------------- defaults


def test_defaults_are_the_paper_base_model():
    config = CocaConfig()
    assert type(config.vision_config) is CocaVisionConfig
    assert type(config.text_config) is CocaTextConfig
    assert (config.vision_config.image_size, config.vision_config.patch_size) == (288, 18)
    assert (config.text_config.num_unimodal_layers, config.text_config.num_multimodal_layers) == (12, 12)
    assert (config.pooler_type, config.num_query_tokens, config.image_layer_norm) == ("cascade", 256, "pooler")
    assert (config.contrastive_loss_weight, config.caption_loss_weight) == (1.0, 2.0)
    assert config.tie_word_embeddings is False
    assert config.is_encoder_decoder is False


@pytest.mark.parametrize(
    ("kwargs", "scale", "bias"),
    [
        pytest.param({}, math.log(1 / 0.07), None, id="softmax"),
        pytest.param({"contrastive_loss": "sigmoid"}, math.log(10), -10.0, id="sigmoid"),
        pytest.param({"logit_scale_init_value": 1.5, "logit_bias_init_value": -3.0}, 1.5, -3.0, id="softmax-given"),
        pytest.param(
            {"contrastive_loss": "sigmoid", "logit_scale_init_value": 1.5, "logit_bias_init_value": -3.0},
            1.5,
            -3.0,
            id="sigmoid-given",
        ),
    ],
)
def test_temperature_and_bias_follow_the_loss(kwargs, scale, bias):
    config = small_config(**kwargs)
    assert config.logit_scale_init_value == scale
    assert config.logit_bias_init_value == bias


def test_widths_are_filled_in_from_the_text_config():
    config = small_config()
    assert config.pooler_hidden_size == 32
    assert config.text_config.multimodal_intermediate_size == 64
    config = small_config(pooler_hidden_size=48, text_config={**SMALL_TEXT, "multimodal_intermediate_size": 80})
    assert config.pooler_hidden_size == 48
    assert config.text_config.multimodal_intermediate_size == 80


# -------------------------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    ("image_size", "patch_size", "grid"),
    [
        pytest.param(288, 18, (16, 16), id="square"),
        pytest.param([36, 54], 18, (2, 3), id="list"),
        pytest.param((54, 36), 18, (3, 2), id="tuple"),
        pytest.param(40, 18, (2, 2), id="cut_down_to_whole_patches"),
    ],
)
def test_grid_size(image_size, patch_size, grid):
    assert CocaVisionConfig(image_size=image_size, patch_size=patch_size).grid_size == grid


@pytest.mark.parametrize(("use_cls_token", "length"), [(True, 16), (False, 17)], ids=["cls", "no_cls"])
def test_max_text_length_leaves_a_row_for_cls(use_cls_token, length):
    config = CocaTextConfig(**SMALL_TEXT, use_cls_token=use_cls_token)
    assert config.max_text_length == length


def test_num_hidden_layers_counts_both_stacks():
    assert CocaTextConfig(num_hidden_layers=8, num_multimodal_layers=3).num_unimodal_layers == 5
    assert CocaTextConfig(num_hidden_layers=3, num_multimodal_layers=3).num_unimodal_layers == 0


def test_generation_reads_the_text_config():
    config = small_config()
    assert config.get_text_config(decoder=True) is config.text_config
    assert (config.text_config.bos_token_id, config.text_config.eos_token_id, config.text_config.pad_token_id) == (
        97,
        98,
        0,
    )


# ------------------------------------------------------------------------------------------------------ sub-configs


@pytest.mark.parametrize(
    ("name", "class_name"),
    [
        ("own", "CocaVisionConfig"),
        ("vit", "ViTConfig"),
        ("clip_vision", "CLIPVisionConfig"),
        ("timm_wrapper", "TimmWrapperConfig"),
    ],
)
def test_vision_config_is_found_by_model_type(name, class_name):
    assert type(small_config(vision_config=VISION_CONFIGS[name]).vision_config).__name__ == class_name


def test_config_objects_are_taken_as_they_are():
    vision, text = ViTConfig(**SMALL), CocaTextConfig(**SMALL_TEXT)
    config = CocaConfig(vision_config=vision, text_config=text)
    assert config.vision_config is vision
    assert config.text_config is text


def test_auto_config_knows_the_three_types():
    assert type(AutoConfig.for_model("coca", projection_dim=24)) is CocaConfig
    assert type(AutoConfig.for_model("coca_vision_model")) is CocaVisionConfig
    assert type(AutoConfig.for_model("coca_text_model")) is CocaTextConfig


def test_positional_arguments_are_refused():
    with pytest.raises(ValueError, match="keyword"):
        CocaConfig({})


# ------------------------------------------------------------------------------------------------------- to and fro


@pytest.mark.parametrize("name", VISION_CONFIGS)
def test_save_and_load(name, tmp_path):
    config = small_config(
        vision_config=VISION_CONFIGS[name],
        text_config={**SMALL_TEXT, "shifted_cls_mask": True, "cls_position": "next", "dropout": 0.1},
        pooler_type="shared",
        num_query_tokens=7,
        image_layer_norm="encoder",
        image_pooling="mean",
        contrastive_loss="sigmoid",
        contrastive_loss_weight=0.5,
        caption_loss_weight=3,
        text_projection_bias=True,
    )
    config.save_pretrained(tmp_path)
    for loaded in (CocaConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded) is CocaConfig
        assert type(loaded.vision_config) is type(config.vision_config)
        assert {**loaded.to_dict(), "_name_or_path": ""} == {**config.to_dict(), "_name_or_path": ""}
        loaded.save_pretrained(tmp_path / "again")
        assert (tmp_path / "again" / "config.json").read_text() == (tmp_path / "config.json").read_text()


def test_sub_configs_load_from_the_whole_file(tmp_path):
    config = small_config()
    config.save_pretrained(tmp_path)
    vision, text = CocaVisionConfig.from_pretrained(tmp_path), CocaTextConfig.from_pretrained(tmp_path)
    assert vision.grid_size == (2, 3)
    assert vision.patch_dropout == 0.5
    assert (text.num_hidden_layers, text.num_multimodal_layers, text.vocab_size) == (4, 2, 99)


def test_overrides_on_load(tmp_path):
    small_config().save_pretrained(tmp_path)
    config = CocaConfig.from_pretrained(
        tmp_path, contrastive_loss_weight=0.0, text_config={**SMALL_TEXT, "dropout": 0.2}
    )
    assert config.contrastive_loss_weight == 0.0
    assert config.text_config.dropout == 0.2


def test_a_value_broken_later_is_found_on_save(tmp_path):
    config = small_config()
    config.num_query_tokens = 0
    with pytest.raises(Exception, match="`num_query_tokens`"):
        config.save_pretrained(tmp_path)


# --------------------------------------------------------------------------------------------------------- validation


VISION_ERRORS = [
    ({"hidden_size": 0}, "hidden_size"),
    ({"intermediate_size": 0}, "intermediate_size"),
    ({"num_attention_heads": 0}, "num_attention_heads"),
    ({"num_channels": 0}, "num_channels"),
    ({"patch_size": 0}, "patch_size"),
    ({"num_hidden_layers": -1}, "num_hidden_layers"),
    ({"hidden_size": 33}, "hidden_size"),
    ({"attention_dropout": 1.0}, "attention_dropout"),
    ({"attention_dropout": -0.1}, "attention_dropout"),
    ({"patch_dropout": 1}, "patch_dropout"),
    ({"image_size": 12}, "image_size"),
    ({"image_size": [36, 12]}, "image_size"),
    ({"image_size": [36]}, "image_size"),
    ({"image_size": [36, 36, 36]}, "image_size"),
    ({"hidden_size": "32"}, "hidden_size"),
    ({"patch_size": [18, 18]}, "patch_size"),
    ({"layer_scale_init_value": "small"}, "layer_scale_init_value"),
]
TEXT_ERRORS = [
    ({"vocab_size": 0}, "vocab_size"),
    ({"hidden_size": 0}, "hidden_size"),
    ({"intermediate_size": 0}, "intermediate_size"),
    ({"multimodal_intermediate_size": 0}, "multimodal_intermediate_size"),
    ({"num_attention_heads": 0}, "num_attention_heads"),
    ({"num_multimodal_layers": 0}, "num_multimodal_layers"),
    ({"num_multimodal_layers": 5}, "num_multimodal_layers"),
    ({"hidden_size": 33}, "hidden_size"),
    ({"attention_dropout": 1.5}, "attention_dropout"),
    ({"dropout": 1.0}, "dropout"),
    ({"max_position_embeddings": 2}, "max_position_embeddings"),
    ({"max_position_embeddings": 1, "use_cls_token": False}, "max_position_embeddings"),
    ({"shifted_cls_mask": True, "use_cls_token": False}, "shifted_cls_mask"),
    ({"shifted_cls_mask": True, "pad_token_id": None}, "shifted_cls_mask"),
    ({"cls_position": "first"}, "cls_position"),
    ({"use_cls_token": 1}, "use_cls_token"),
    ({"eos_token_id": "</s>"}, "eos_token_id"),
]
COCA_ERRORS = [
    ({"projection_dim": 0}, "projection_dim"),
    ({"num_query_tokens": 0}, "num_query_tokens"),
    ({"num_pooler_attention_heads": 0}, "num_pooler_attention_heads"),
    ({"pooler_hidden_size": 0}, "pooler_hidden_size"),
    ({"pooler_hidden_size": 33}, "pooler_hidden_size"),
    ({"num_pooler_attention_heads": 5}, "num_pooler_attention_heads"),
    ({"contrastive_loss_weight": -1}, "contrastive_loss_weight"),
    ({"caption_loss_weight": -0.5}, "caption_loss_weight"),
    ({"contrastive_loss_weight": 0, "caption_loss_weight": 0}, "contrastive_loss_weight"),
    ({"pooler_type": "mean"}, "pooler_type"),
    ({"image_layer_norm": "before"}, "image_layer_norm"),
    ({"image_pooling": "max"}, "image_pooling"),
    ({"image_pooling": "mean"}, "image_pooling"),
    ({"image_pooling": "mean", "pooler_type": "parallel"}, "image_pooling"),
    ({"contrastive_loss": "hinge"}, "contrastive_loss"),
    ({"projection_dim": 16.0}, "projection_dim"),
    ({"text_projection_bias": "no"}, "text_projection_bias"),
]


def _ids(cases):
    return ["-".join(f"{key}={value}" for key, value in kwargs.items()).replace(" ", "") for kwargs, _ in cases]


@pytest.mark.parametrize(("kwargs", "field"), VISION_ERRORS, ids=_ids(VISION_ERRORS))
def test_vision_errors_name_the_field(kwargs, field):
    with pytest.raises(Exception, match=rf"[`']{field}\b"):
        CocaVisionConfig(**{**VISION_CONFIGS["own"], **kwargs})


@pytest.mark.parametrize(("kwargs", "field"), TEXT_ERRORS, ids=_ids(TEXT_ERRORS))
def test_text_errors_name_the_field(kwargs, field):
    with pytest.raises(Exception, match=rf"[`']{field}\b"):
        CocaTextConfig(**{**SMALL_TEXT, **kwargs})


@pytest.mark.parametrize(("kwargs", "field"), COCA_ERRORS, ids=_ids(COCA_ERRORS))
def test_coca_errors_name_the_field(kwargs, field):
    with pytest.raises(Exception, match=rf"[`']{field}\b"):
        small_config(**kwargs)


def test_sub_config_errors_come_through():
    with pytest.raises(Exception, match="`num_multimodal_layers`"):
        small_config(text_config={**SMALL_TEXT, "num_multimodal_layers": 9})


@pytest.mark.parametrize(
    "kwargs",
    [
        pytest.param({"pooler_type": "none", "pooler_hidden_size": 33}, id="no_pooler_needs_no_heads"),
        pytest.param({"pooler_type": "shared", "image_pooling": "mean"}, id="shared-mean"),
        pytest.param({"pooler_type": "none", "image_pooling": "mean"}, id="none-mean"),
        pytest.param({"contrastive_loss_weight": 0}, id="caption_only"),
        pytest.param({"caption_loss_weight": 0}, id="contrastive_only"),
        pytest.param({"text_config": {**SMALL_TEXT, "eos_token_id": [96, 98]}}, id="several_eos"),
        pytest.param({"text_config": {**SMALL_TEXT, "num_multimodal_layers": 4}}, id="all_layers_multimodal"),
    ],
)
def test_unusual_but_valid(kwargs):
    config = small_config(**kwargs)
    assert CocaConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()
