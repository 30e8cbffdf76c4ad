"""Configs with a field of the wrong type, out of range, misspelt or at odds with another: an error that names the field.

The cases are made from the fields of the classes, so that a new field has them, too.
"""

import dataclasses
import json
import types
import typing

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, BertConfig
from transformers.configuration_utils import PreTrainedConfig

from modeling_coca import CocaConfig, CocaForConditionalGeneration, CocaModel, CocaTextConfig, CocaVisionConfig

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = {**SIZES, "image_size": 32, "patch_size": 8}
TEXT = {
    **SIZES,
    "num_multimodal_layers": 1,
    "vocab_size": 99,
    "bos_token_id": 97,
    "eos_token_id": 98,
    "max_position_embeddings": 9,
}
COCA = {"vision_config": VISION, "text_config": TEXT, "projection_dim": 16, "num_query_tokens": 3}
GIVEN = {CocaVisionConfig: VISION, CocaTextConfig: TEXT, CocaConfig: COCA}

ERRORS = (ValueError, StrictDataclassError)  # the second is what typed fields raise


def build(config_class, **changes):
    return config_class(**{**GIVEN[config_class], **changes})


def own_fields(config_class):
    """Name -> type of the fields that are not transformers'."""
    inherited = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    return {field.name: field.type for field in dataclasses.fields(config_class) if field.name not in inherited}


def is_of(value, hint) -> bool:
    """Whether a value is of a field's type, as far as these configs use types."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return value in args and type(value) is not bool
    if origin in (typing.Union, types.UnionType):
        return any(is_of(value, arg) for arg in args)
    if origin in (list, tuple):
        return isinstance(value, origin) and all(is_of(item, args[0]) for item in value)
    if hint is type(None):
        return value is None
    return isinstance(value, hint) and (hint is bool or type(value) is not bool)


def wrong_types():
    values = ["words", b"bytes", 1.5, True, ["words"], [[1]], {"a": 1}, object()]
    for config_class in GIVEN:
        for name, hint in own_fields(config_class).items():
            for value in values:
                if not is_of(value, hint):
                    yield pytest.param(
                        config_class, name, value, id=f"{config_class.__name__}-{name}-{type(value).__name__}"
                    )


@pytest.mark.parametrize(("config_class", "name", "value"), list(wrong_types()))
def test_a_value_of_the_wrong_type(config_class, name, value):
    with pytest.raises(ERRORS, match=rf"[`']{name}\b"):
        build(config_class, **{name: value})


def numbers_out_of_range():
    """Every field that takes a number, with values that no number of it can have."""
    for config_class in GIVEN:
        for name, hint in own_fields(config_class).items():
            takes = [value for value in (1, 1.5) if is_of(value, hint)]
            if not takes:
                continue
            bad = [float("nan"), float("inf"), -float("inf")] if 1.5 in takes else [-1]
            if name not in ("logit_scale_init_value", "logit_bias_init_value", "layer_scale_init_value", "image_size"):
                bad.append(-0.5 if 1.5 in takes else -(10**9))
            for value in bad:
                yield pytest.param(config_class, name, value, id=f"{config_class.__name__}-{name}={value}")


@pytest.mark.parametrize(("config_class", "name", "value"), list(numbers_out_of_range()))
def test_a_number_out_of_range(config_class, name, value):
    with pytest.raises(ERRORS, match=rf"[`']{name}\b"):
        build(config_class, **{name: value})


def misspelt():
    for config_class in GIVEN:
        for name in own_fields(config_class):
            if len(name) > 7:
                yield pytest.param(
                    config_class, name, name[:4] + name[5:], id=f"{config_class.__name__}-{name[:4]}{name[5:]}"
                )


@pytest.mark.parametrize(("config_class", "name", "typo"), list(misspelt()))
def test_a_misspelt_field(config_class, name, typo):
    """transformers keeps what it does not know as an attribute, and the model would come out with the default."""
    with pytest.raises(ERRORS, match=rf"no field `{typo}`: do you mean `{name}`\?"):
        build(config_class, **{typo: getattr(build(config_class), name)})


def test_attributes_that_resemble_no_field_are_kept_as_in_transformers():
    config = build(CocaConfig, notes="mine", torch_dtype="float32", num_labels=3)
    assert (config.notes, config.dtype, config.num_labels) == ("mine", torch.float32, 3)
    assert CocaConfig.from_dict(config.to_dict()).notes == "mine"


AT_ODDS = [
    # config class, changes, the field that the message names, and the fix
    (CocaVisionConfig, {"hidden_size": 33}, "hidden_size", "multiple of `num_attention_heads`"),
    (CocaVisionConfig, {"num_attention_heads": 5}, "num_attention_heads", "change one of the two"),
    (CocaVisionConfig, {"image_size": 7}, "image_size", "at least one patch"),
    (CocaVisionConfig, {"image_size": [64, 7]}, "image_size", "at least one patch"),
    (CocaVisionConfig, {"image_size": []}, "image_size", r"\[height, width\]"),
    (CocaVisionConfig, {"image_size": [-32, -32]}, "image_size", "at least one patch"),
    (CocaVisionConfig, {"patch_size": 33}, "patch_size", "at least one patch"),
    (CocaVisionConfig, {"patch_dropout": 1.0}, "patch_dropout", "probability"),
    (CocaVisionConfig, {"layer_norm_eps": 0.0}, "layer_norm_eps", "more than 0"),
    (CocaVisionConfig, {"hidden_act": "gleu"}, "hidden_act", "choose one of gelu"),
    (CocaTextConfig, {"hidden_act": ""}, "hidden_act", "choose one of gelu"),
    (CocaTextConfig, {"hidden_size": 30, "num_attention_heads": 4}, "hidden_size", "multiple of"),
    (CocaTextConfig, {"num_multimodal_layers": 3}, "num_multimodal_layers", "counts the unimodal and the multimodal"),
    (CocaTextConfig, {"num_multimodal_layers": 0}, "num_multimodal_layers", "at least 1"),
    (CocaTextConfig, {"num_hidden_layers": 0}, "num_hidden_layers", "together"),
    (CocaTextConfig, {"bos_token_id": 99}, "bos_token_id", "give the tokenizer's"),
    (CocaTextConfig, {"bos_token_id": -1}, "bos_token_id", "vocab_size"),
    (CocaTextConfig, {"eos_token_id": 500}, "eos_token_id", "vocab_size"),
    (CocaTextConfig, {"eos_token_id": [98, 99]}, "eos_token_id", "vocab_size"),
    (CocaTextConfig, {"eos_token_id": []}, "eos_token_id", "vocab_size"),
    (CocaTextConfig, {"pad_token_id": -100}, "pad_token_id", "vocab_size"),
    (CocaTextConfig, {"vocab_size": 98}, "eos_token_id", "vocab_size"),
    (CocaTextConfig, {"shifted_cls_mask": True, "use_cls_token": False}, "shifted_cls_mask", "use_cls_token=True"),
    (CocaTextConfig, {"shifted_cls_mask": True, "pad_token_id": None}, "shifted_cls_mask", "pad_token_id"),
    (CocaTextConfig, {"max_position_embeddings": 2}, "max_position_embeddings", "no room"),
    (CocaConfig, {"pooler_hidden_size": 30}, "pooler_hidden_size", "num_pooler_attention_heads"),
    (CocaConfig, {"contrastive_pooler_hidden_size": 20}, "contrastive_pooler_hidden_size", "change one of the two"),
    (CocaConfig, {"num_pooler_attention_heads": 7}, "num_pooler_attention_heads", "change one of the two"),
    (CocaConfig, {"image_pooling": "mean"}, "image_pooling", '"shared" or "none"'),
    (
        CocaConfig,
        {"pooler_type": "none", "vision_config": {**VISION, "use_class_token": False}},
        "image_pooling",
        "mean",
    ),
    (CocaConfig, {"contrastive_loss_weight": 0, "caption_loss_weight": 0}, "caption_loss_weight", "nothing would"),
    (CocaConfig, {"contrastive_loss": "infonce"}, "contrastive_loss", "softmax"),
    (CocaConfig, {"pooler_type": "attention"}, "pooler_type", "cascade"),
    (CocaConfig, {"logit_scale_init_value": 100.0}, "logit_scale_init_value", "a logarithm"),
    (CocaConfig, {"text_config": {**TEXT, "model_type": "bert"}}, "text_config", "coca_text_model"),
    (CocaConfig, {"text_config": BertConfig()}, "text_config", "coca_text_model"),
    (CocaConfig, {"text_config": CocaVisionConfig(**VISION)}, "text_config", "coca_text_model"),
    (CocaConfig, {"vision_config": CocaTextConfig(**TEXT)}, "vision_config", "of a vision model"),
    (CocaConfig, {"vision_config": {"model_type": "coca"}}, "vision_config", "of a vision model"),
    (CocaConfig, {"vision_config": {"model_type": "clip_vision"}}, "clip_vision", "Should contain one of"),
    (CocaConfig, {"vision_config": {**VISION, "num_attention_heads": 5}}, "num_attention_heads", "multiple of"),
    (CocaConfig, {"text_config": {**TEXT, "dropout": 1.0}}, "dropout", "probability"),
    (CocaConfig, {"dtype": "float99"}, "dtype", "float32, bfloat16"),
    (CocaConfig, {"id2label": ["cat"]}, "id2label", "must be a dict"),
]


@pytest.mark.parametrize(
    ("config_class", "changes", "field", "fix"),
    [pytest.param(*case, id=f"{case[0].__name__}-{'-'.join(case[1])}-{i}") for i, case in enumerate(AT_ODDS)],
)
def test_fields_at_odds(config_class, changes, field, fix):
    with pytest.raises(ERRORS, match=rf"\b{field}\b") as raised:
        build(config_class, **changes)
    assert fix.replace("\\", "") in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision_feature_layers": [9]}, "`vision_feature_layers`.*has 3 hidden states"),
        ({"vision_feature_layers": [-9]}, "`vision_feature_layers`.*has 3 hidden states"),
        ({"vision_config": {"model_type": "bert", **SIZES}}, "`vision_config`.*bert.*pixel_values"),
    ],
    ids=["layer_too_late", "layer_too_early", "text_encoder_for_images"],
)
def test_what_only_the_model_can_tell(changes, message):
    with pytest.raises(ValueError, match=message):
        CocaForConditionalGeneration(build(CocaConfig, **changes))


UNUSUAL = [
    ({"pooler_type": "none", "num_query_tokens": 1}, {}, {}),  # not used then
    ({"pooler_type": "none", "image_pooling": "mean"}, {"use_class_token": False}, {}),
    ({"pooler_type": "shared", "image_pooling": "mean"}, {}, {}),
    ({"pooler_type": "none", "image_layer_norm": "embedding"}, {"hidden_size": 48, "num_attention_heads": 3}, {}),
    ({"pooler_type": "parallel", "contrastive_pooler_hidden_size": 24}, {}, {}),
    ({}, {"image_size": 35}, {}),  # cut down to whole patches
    ({}, {"image_size": [16, 40]}, {}),
    ({}, {"num_hidden_layers": 0}, {}),
    ({}, {}, {"num_multimodal_layers": 2}),  # without unimodal layers
    ({}, {}, {"eos_token_id": None}),
    ({}, {}, {"pad_token_id": None}),
    ({}, {}, {"eos_token_id": [96, 98]}),
    ({"contrastive_loss_weight": 0}, {}, {}),
    ({"caption_loss_weight": 0}, {}, {}),
    ({"logit_scale_init_value": 80.0}, {}, {}),
    ({"vision_feature_layers": []}, {}, {}),
]


@pytest.mark.parametrize(("coca", "vision", "text"), UNUSUAL, ids=range(len(UNUSUAL)))
def test_unusual_configs_compute(coca, vision, text):
    config = build(CocaConfig, vision_config={**VISION, **vision}, text_config={**TEXT, **text}, **coca)
    size = config.vision_config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    ids = torch.tensor([[97, 5, 6, 98], [97, 7, 8, 98]])
    model = CocaForConditionalGeneration(config)
    model(pixel_values=torch.randn(2, 3, height, width), input_ids=ids, labels=ids).loss.backward()
    grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert grads and all(grad.isfinite().all() for grad in grads)


def test_ids_of_clip_in_another_vocabulary_are_warned_of(caplog):
    config = CocaTextConfig(**{**SIZES, "num_multimodal_layers": 1, "vocab_size": 99})
    assert (config.bos_token_id, config.eos_token_id) == (49406, 49407)


FILES = [
    ("", "not a valid JSON"),
    ("{", "not a valid JSON"),
    ('{"model_type": "coca"}\0', "not a valid JSON"),
    ("null", "no JSON object|model_type"),
    ("3", "no JSON object|model_type"),
    ('"coca"', "no JSON object|model_type"),
    ("[]", "model_type"),
    ("{}", "model_type"),
    ('{"model_type": "bert"}', 'a `model_type` "coca"'),
    ('{"model_type": 5}', 'a `model_type` "coca"'),
    ('{"a":' * 5000, "no JSON object|not a valid JSON"),
    ('{"model_type": "coca", "projection_dim": NaN}', "projection_dim"),
    ('{"model_type": "coca", "projection_dim": "512"}', "projection_dim"),
    ('{"model_type": "coca", "text_config": []}', "text_config"),
    ('{"model_type": "coca", "vision_config": {"model_type": 5}}', "Unrecognized model type"),
    ('{"model_type": "coca", "dtype": "float99"}', "dtype"),
]


@pytest.mark.parametrize(("content", "message"), FILES, ids=[content[:45] for content, _ in FILES])
def test_files(content, message, tmp_path):
    (tmp_path / "config.json").write_text(content)
    for load in (CocaConfig.from_pretrained, CocaModel.from_pretrained):
        with pytest.raises((OSError, *ERRORS), match=message):
            load(tmp_path)


# ------------------------------------------------------------------------------------------------------- round trips

width = st.sampled_from([8, 16, 24])


@st.composite
def configs(draw):
    """Any config that is valid: fields are drawn, and only what fits together is kept."""
    layers = draw(st.integers(1, 3))
    text = {
        "hidden_size": draw(width),
        "intermediate_size": draw(st.integers(1, 40)),
        "multimodal_intermediate_size": draw(st.none() | st.integers(1, 40)),
        "multimodal_layer_type": draw(st.sampled_from(["two_mlps", "one_mlp"])),
        "num_hidden_layers": layers,
        "num_multimodal_layers": draw(st.integers(1, layers)),
        "num_attention_heads": draw(st.sampled_from([1, 2, 4])),
        "vocab_size": draw(st.integers(3, 10**6)),
        "max_position_embeddings": draw(st.integers(3, 600)),
        "bos_token_id": draw(st.none() | st.integers(0, 2)),
        "eos_token_id": draw(st.integers(0, 2) | st.lists(st.integers(0, 2), min_size=1)),
        "pad_token_id": draw(st.none() | st.integers(0, 2)),
        "use_cls_token": draw(st.booleans()),
        "cls_position": draw(st.sampled_from(["last", "next"])),
        "dropout": draw(st.floats(0, 0.9)),
        "layer_norm_eps": draw(st.floats(1e-12, 1e-2)),
        "layer_scale_init_value": draw(st.none() | st.floats(-1, 1)),
    }
    vision = {
        "hidden_size": draw(width),
        "num_attention_heads": draw(st.sampled_from([1, 2, 4])),
        "image_size": draw(st.integers(8, 64) | st.lists(st.integers(8, 64), min_size=2, max_size=2)),
        "patch_size": draw(st.integers(1, 8)),
        "hidden_act": draw(st.sampled_from(["gelu", "quick_gelu", "relu", "silu"])),
        "patch_dropout": draw(st.floats(0, 0.99)),
    }
    pooler_type = draw(st.sampled_from(["cascade", "parallel", "shared", "none"]))
    return CocaConfig(
        text_config=text,
        vision_config=vision,
        pooler_type=pooler_type,
        image_pooling=draw(st.sampled_from(["first", "mean"])) if pooler_type in ("shared", "none") else "first",
        num_query_tokens=draw(st.integers(1, 300)),
        num_pooler_attention_heads=draw(st.sampled_from([1, 2, 4, 8])),
        projection_dim=draw(st.integers(1, 2048)),
        contrastive_loss=draw(st.sampled_from(["softmax", "sigmoid"])),
        contrastive_loss_weight=draw(st.floats(0, 10)),
        caption_loss_weight=draw(st.integers(1, 10)),
        logit_scale_init_value=draw(st.none() | st.floats(-80, 80)),
        vision_feature_layers=draw(st.none() | st.lists(st.integers(-3, 3), max_size=3)),
        notes=draw(st.none() | st.text(max_size=20) | st.dictionaries(st.text(max_size=5), st.integers(), max_size=3)),
    )


@settings(max_examples=25, deadline=None, derandomize=True)
@given(config=configs())
def test_configs_come_back_from_disk(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("config")
    config.save_pretrained(folder)
    text = (folder / "config.json").read_text()
    for loaded in (
        CocaConfig.from_pretrained(folder),
        AutoConfig.from_pretrained(folder),
        CocaConfig(**json.loads(text)),
    ):
        assert type(loaded) is CocaConfig
        loaded.save_pretrained(folder)
        assert (folder / "config.json").read_text() == text
