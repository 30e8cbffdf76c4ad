"""Conversion from and to open_clip: numbers of 14 small random open_clip models, names, and errors.

The files hold weights, inputs and what open_clip 3.3.0 (and the 4.2 development version, for generation) computed.
"""

import copy
import json
import math
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file

from modeling_coca.configuration_coca import CocaConfig
from modeling_coca.conversion.open_clip import (
    _mlp_ratio,
    config_from_open_clip,
    from_open_clip,
    load_open_clip_folder,
    name_entries,
    read_open_clip_folder,
    to_open_clip,
)
from modeling_coca.modeling_coca import CocaForConditionalGeneration, CocaModel

SHARED = Path(__file__).parents[2].parent / "shared"
FIXTURES = Path(__file__).parents[1] / "fixtures"
# The two in the repository come first: tests of errors and files take the first one
FILES = {path.stem.removeprefix("open_clip_"): path for path in sorted(FIXTURES.glob("open_clip_*.safetensors"))}
FILES |= {path.stem: path for path in sorted((SHARED / "vectors").glob("*.safetensors")) if path.stem not in FILES}


class Vector(NamedTuple):
    """One open_clip model: what goes in and what comes out."""

    name: str
    model_cfg: dict
    state_dict: dict[str, torch.Tensor]
    tensors: dict[str, torch.Tensor]
    metadata: dict[str, Any]

    def __getitem__(self, key: str) -> torch.Tensor:
        return self.tensors[key]

    def __contains__(self, key: str) -> bool:
        return key in self.tensors

    @property
    def has_interior_pad(self) -> torch.Tensor:
        """(B,): rows with the padding id inside the text, where it is a real token ("!")."""
        pad = self["in.texts"] == 0
        return (pad[:, :-1] & ~pad[:, 1:]).any(dim=1)


@lru_cache
def load_vector(name: str) -> Vector:
    with safe_open(FILES[name], framework="pt") as file:
        metadata = {key: json.loads(value) for key, value in file.metadata().items()}
        names = file.keys()
        tensors = {name: file.get_tensor(name) for name in names}
    state_dict = {key[3:]: value for key, value in tensors.items() if key.startswith("sd.")}
    tensors = {key: value for key, value in tensors.items() if not key.startswith("sd.")}
    return Vector(name, metadata["config"], state_dict, tensors, metadata)


@lru_cache
def load_model(name: str) -> CocaForConditionalGeneration:
    vector = load_vector(name)
    return from_open_clip(vector.model_cfg, vector.state_dict)


@pytest.fixture(params=FILES)
def vector(request) -> Vector:
    return load_vector(request.param)


@pytest.fixture
def model(vector) -> CocaForConditionalGeneration:
    """Shared between tests: not to be changed."""
    return load_model(vector.name)


@pytest.fixture
def default() -> Vector:
    return load_vector("default")


def changed(model_cfg: dict, key: str, value: Any) -> dict:
    """A copy with `section.key` (or `key`) set."""
    model_cfg = copy.deepcopy(model_cfg)
    section, _, key = key.rpartition(".")
    (model_cfg[section] if section else model_cfg)[key] = value
    return model_cfg


def assert_close(actual: torch.Tensor, expected: torch.Tensor, atol: float):
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max().item() <= atol


def labels_of(vector: Vector) -> torch.Tensor:
    texts = vector["in.texts"]
    return texts.masked_fill(texts == 0, -100)


# ------------------------------------------------------------------------------------------------------------ numbers


@torch.no_grad()
def test_image_features_are_those_of_open_clip(vector, model):
    # open_clip's "parallel" and "cascade" leave an axis of length 1, which its own loss cannot take
    expected = {key: vector[f"out.{key}"] for key in ("image_features", "image_features_raw")}
    assert all(x.ndim == 2 for x in expected.values())
    features = model.get_image_features(vector["in.images"])
    assert_close(features.image_embeds, expected["image_features"], 1e-5)
    assert_close(features.pooler_output, vector["out.image_embs"], 1e-5)
    raw = model.model.get_image_features(vector["in.images"]).pooler_output
    assert_close(raw, expected["image_features_raw"], 1e-5)


@torch.no_grad()
def test_text_features_are_those_of_open_clip(vector, model):
    outputs = model.model.get_text_features(vector["in.texts"])
    assert_close(F.normalize(outputs.pooler_output, dim=-1), vector["out.text_features"], 1e-5)
    # States of padding are arbitrary: the decoder's loss never reads what is computed from them
    is_token = vector["in.texts"] != 0
    assert_close(outputs.last_hidden_state[is_token], vector["out.text_embs"][is_token], 1e-5)


@torch.no_grad()
def test_texts_need_no_padding_to_the_full_length(vector, model):
    """[CLS] takes the last position row and sees one padding token whatever the padding."""
    lengths = vector["in.texts"].ne(0).long().mul(torch.arange(1, vector["in.texts"].shape[1] + 1)).amax(dim=1)
    assert lengths.min() < lengths.max()
    for row, length in enumerate(lengths.tolist()):
        texts = vector["in.texts"][row : row + 1, :length]
        features = model.model.get_text_features(texts).pooler_output
        assert_close(F.normalize(features, dim=-1), vector["out.text_features"][row : row + 1], 1e-5)
        if not vector.has_interior_pad[row]:
            logits = model(input_ids=texts, pixel_values=vector["in.images"][row : row + 1]).logits
            assert_close(logits[:, :-1], vector["out.logits"][row : row + 1, : length - 1], 1e-4)


@torch.no_grad()
def test_short_texts_with_cls_right_after_them(vector):
    """open_clip puts [CLS] into row L if it is given texts of L ids: the same as a model whose table ends there."""
    if "out.text_features_short" not in vector:
        pytest.skip("without embed_cls open_clip's release only takes texts of the full length")
    length = vector["in.texts_short"].shape[1]
    state_dict = dict(vector.state_dict)
    state_dict["text.positional_embedding"] = state_dict["text.positional_embedding"][: length + 1]
    model = from_open_clip(changed(vector.model_cfg, "text_cfg.context_length", length), state_dict)
    features = model.model.get_text_features(vector["in.texts_short"]).pooler_output
    assert_close(F.normalize(features, dim=-1), vector["out.text_features_short"], 1e-5)


@torch.no_grad()
def test_logits_are_those_of_open_clip(vector, model):
    valid = vector["out.logits_valid"]
    assert valid.any(dim=1).all()

    logits = model(input_ids=vector["in.texts"], pixel_values=vector["in.images"]).logits
    assert logits.shape[1] == vector["in.texts"].shape[1]
    rows = valid & ~vector.has_interior_pad[:, None]
    assert_close(logits[:, :-1][rows], vector["out.logits"][rows], 1e-4)

    logits = model(
        input_ids=vector["in.texts"], pixel_values=vector["in.images"], labels=labels_of(vector), logits_to_keep=0
    ).logits
    assert_close(logits[:, :-1][valid], vector["out.logits"][valid], 1e-4)


@torch.no_grad()
def test_logits_after_a_padding_id_inside_a_text(vector, model):
    """The padding id inside a text hides the token after it (open_clip 3 and later), also without labels."""
    rows = vector["out.logits_valid"] & vector.has_interior_pad[:, None]
    assert rows.any()
    logits = model(input_ids=vector["in.texts"], pixel_values=vector["in.images"]).logits
    assert_close(logits[:, :-1][rows], vector["out.logits"][rows], 1e-4)


def test_losses_and_gradients_are_those_of_open_clip(vector):
    model = from_open_clip(vector.model_cfg, vector.state_dict)
    outputs = model(input_ids=vector["in.texts"], pixel_values=vector["in.images"], labels=labels_of(vector))
    outputs.loss.backward()

    weights = vector.metadata["loss"]
    config = model.config
    assert (config.contrastive_loss_weight, config.caption_loss_weight) == (
        weights["clip_loss_weight"],
        weights["caption_loss_weight"],
    )
    assert outputs.contrastive_loss.item() == pytest.approx(vector["out.contrastive_loss"].item(), rel=1e-4)
    weighted = config.caption_loss_weight * outputs.caption_loss.item()
    assert weighted == pytest.approx(vector["out.caption_loss_weighted"].item(), rel=1e-4)
    assert outputs.loss.item() == pytest.approx(vector["out.loss"].item(), rel=1e-4)

    gradients = {
        entry.theirs: entry.transform.to_theirs(*(model.get_parameter(name).grad for name in entry.ours))
        for entry in name_entries(model)
    }
    names = vector.metadata["grad_norm_names"]
    # open_clip freezes its sin-cos table, and its loss leaves the bias out (to a softmax it is a constant)
    assert set(gradients) - set(names) <= {"visual.positional_embedding", "logit_bias"}
    norms = torch.stack([gradients[name].norm() for name in names])
    torch.testing.assert_close(norms, vector["out.grad_norms"], rtol=1e-4, atol=0)
    elementwise = [key for key in vector.tensors if key.startswith("grad.")]
    assert len(elementwise) >= 8
    for key in elementwise:
        expected = vector[key]
        actual = gradients[key.removeprefix("grad.")].reshape(expected.shape)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


# --------------------------------------------------------------------------------------------------------- generation


def generation_arguments(vector: Vector) -> dict[str, Any]:
    arguments = vector.metadata["gen"]
    return {
        "max_length": arguments["seq_len"],
        "min_length": arguments["min_seq_len"],
        "eos_token_id": arguments["eos_token_id"],
        "pad_token_id": arguments["pad_token_id"],
        "do_sample": False,
    }


def prompt(vector: Vector) -> dict[str, torch.Tensor]:
    """The prompts are the beginnings of the texts of images 2 and 3."""
    return {"pixel_values": vector["in.images"][2:4], "input_ids": vector["in.prompt"]}


def test_greedy_captions_are_those_of_open_clip(vector, model):
    if "out.greedy_tokens" not in vector:
        pytest.skip("without embed_cls open_clip's release only takes texts of the full length: it cannot generate")
    arguments = generation_arguments(vector)
    assert torch.equal(model.generate(vector["in.images"], **arguments), vector["out.greedy_tokens"])
    assert torch.equal(model.generate(**prompt(vector), **arguments), vector["out.greedy_prompt_tokens"])
    # The release's own mode forces EOS into the last place
    forced = model.generate(vector["in.images"], **arguments, forced_eos_token_id=arguments["eos_token_id"])
    assert torch.equal(forced, vector["out.topk1_legacy"])


def test_beam_search_captions_are_those_of_open_clip(vector, model):
    """Those of its 4.x versions: the release adds raw logits up (`out.beam_legacy_*`), which no `generate` does."""
    # Both fill up with EOS: to transformers' beam search a padding id of 0 is none
    calls = {"out.beam_head_g1": {"pixel_values": vector["in.images"]}, "out.beam_head_prompt": prompt(vector)}
    for key, inputs in calls.items():
        assert torch.equal(model.generate(**inputs, **generation_arguments(vector), num_beams=6), vector[key])


def test_generation_defaults_come_from_the_config(vector, model):
    generation = model.generation_config
    assert generation.bos_token_id == vector.metadata["gen"]["sot_token_id"]
    assert generation.eos_token_id == vector.metadata["gen"]["eos_token_id"]
    assert generation.pad_token_id == 0
    context_length = vector.model_cfg["text_cfg"]["context_length"]
    assert model.generate(vector["in.images"], min_length=context_length).shape == (5, context_length)


# ----------------------------------------------------------------------------------------------------------- both ways


def assert_same_state_dict(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]):
    assert set(actual) == set(expected)
    for name, tensor in expected.items():
        assert actual[name].shape == tensor.shape, name
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name


def test_round_trip_is_equal_to_the_bit(vector, model):
    model_cfg, state_dict = to_open_clip(model)
    assert model_cfg == vector.model_cfg
    assert_same_state_dict(state_dict, vector.state_dict)
    assert all(tensor.is_contiguous() for tensor in state_dict.values())


def test_round_trip_through_a_saved_model(vector, model, tmp_path):
    model.save_pretrained(tmp_path)
    reloaded, loading = CocaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    model_cfg, state_dict = to_open_clip(reloaded)
    assert model_cfg == vector.model_cfg
    assert_same_state_dict(state_dict, vector.state_dict)
    dual = CocaModel.from_pretrained(tmp_path)
    features = dual.get_image_features(vector["in.images"]).pooler_output
    assert_close(features, vector["out.image_features_raw"], 1e-5)


def test_a_written_config_builds_the_same_model_in_open_clip(vector):
    """Also without the memory of the config that a converted model came from."""
    open_clip_coca = pytest.importorskip("open_clip.coca_model")
    model = from_open_clip(vector.model_cfg, vector.state_dict)
    del model.config.open_clip_model_cfg
    model_cfg, state_dict = to_open_clip(model)
    again = config_from_open_clip(model_cfg)
    del again.open_clip_model_cfg
    assert again.to_dict() | {"logit_scale_init_value": 0} == model.config.to_dict() | {"logit_scale_init_value": 0}
    assert model_cfg.pop("custom_text") is True
    theirs = open_clip_coca.CoCa(**model_cfg).eval()
    theirs.load_state_dict({key: x.reshape(theirs.state_dict()[key].shape) for key, x in state_dict.items()})
    with torch.no_grad():
        assert_close(theirs.encode_image(vector["in.images"]).flatten(1), vector["out.image_features"], 1e-5)
        assert_close(theirs.encode_text(vector["in.texts"]), vector["out.text_features"], 1e-5)


def test_a_changed_model_is_not_written_with_its_old_config(default):
    model = from_open_clip(default.model_cfg, default.state_dict)
    model.resize_token_embeddings(330)
    model_cfg, state_dict = to_open_clip(model)
    assert model_cfg["text_cfg"]["vocab_size"] == 330
    assert state_dict["text.token_embedding.weight"].shape == (330, 32)
    assert state_dict["text_decoder.text_projection"].shape == (32, 330)


@pytest.mark.parametrize("section", ["text_cfg", "multimodal_cfg"])
def test_layer_scale_in_one_text_stack_only(default, section):
    pytest.importorskip("open_clip")
    from open_clip.coca_model import CoCa

    torch.manual_seed(0)
    model_cfg = changed(default.model_cfg, f"{section}.ls_init_value", 0.4)
    theirs = CoCa(**model_cfg).eval()
    theirs.load_state_dict(default.state_dict, strict=False)
    for name, parameter in theirs.named_parameters():
        if name.endswith("gamma"):
            torch.nn.init.uniform_(parameter)
    model = from_open_clip(model_cfg, theirs.state_dict())
    other = model.text_decoder if section == "text_cfg" else model.model.text_model
    filled = [parameter for name, parameter in other.named_parameters() if name.endswith("gamma")]
    assert len(filled) == (8 if section == "text_cfg" else 4)
    assert all(parameter.eq(1).all() for parameter in filled)
    with torch.no_grad():
        expected = theirs(default["in.images"], default["in.texts"])
        outputs = model(
            input_ids=default["in.texts"],
            pixel_values=default["in.images"],
            labels=labels_of(default),
            logits_to_keep=0,
        )
    valid = default["out.logits_valid"]
    assert_close(outputs.text_embeds, expected["text_features"], 1e-5)
    assert_close(outputs.logits[:, :-1][valid], expected["logits"][valid], 1e-4)

    back_cfg, state_dict = to_open_clip(model)
    assert back_cfg == model_cfg
    assert_same_state_dict(state_dict, theirs.state_dict())
    # ... but not if the other stack's factors have been trained since
    torch.nn.init.constant_(filled[0], 0.9)
    back_cfg, state_dict = to_open_clip(model)
    assert back_cfg["text_cfg"]["ls_init_value"] == back_cfg["multimodal_cfg"]["ls_init_value"] == 0.4
    CoCa(**back_cfg).load_state_dict(state_dict)


# --------------------------------------------------------------------------------------------------------- named models


@pytest.mark.parametrize("name", ["coca_ViT-B-32", "coca_ViT-L-14", "coca_base"])
def test_names_and_shapes_of_the_named_models(name):
    open_clip = pytest.importorskip("open_clip")
    model_cfg = open_clip.get_model_config(name)
    config = config_from_open_clip(model_cfg)
    with torch.device("meta"):
        ours = CocaForConditionalGeneration(config)
        theirs = open_clip.coca_model.CoCa(**{key: x for key, x in model_cfg.items() if key != "custom_text"})
    back_cfg, state_dict = to_open_clip(ours)
    assert back_cfg == model_cfg
    expected = {key: x.shape for key, x in theirs.state_dict().items()}
    assert {key: x.shape for key, x in state_dict.items()} == expected

    parameters = {"coca_ViT-B-32": 253.6, "coca_ViT-L-14": 638.5, "coca_base": 440.3}[name]
    assert round(ours.num_parameters() / 1e6, 1) == parameters
    entries = {"coca_ViT-B-32": 629, "coca_ViT-L-14": 773, "coca_base": 618}[name]
    assert len(state_dict) == entries


def test_released_layout():
    """laion's B/32: one pooler with 256 queries, of which 255 become image tokens."""
    model_cfg = {
        "embed_dim": 512,
        "vision_cfg": {"image_size": 224, "layers": 12, "width": 768, "patch_size": 32, "attentional_pool": True},
        "text_cfg": {"context_length": 76, "width": 512, "heads": 8, "layers": 12, "embed_cls": True},
        "multimodal_cfg": {"context_length": 76, "width": 512, "heads": 8, "layers": 12},
    }
    config = config_from_open_clip(model_cfg)
    expected = {
        "projection_dim": 512,
        "pooler_type": "shared",
        "num_query_tokens": 255,
        "pooler_hidden_size": 512,
        "num_pooler_attention_heads": 8,
        "image_layer_norm": "pooler",
        "image_pooling": "first",
        "contrastive_loss": "softmax",
        "logit_bias_init_value": None,
        "text_projection_bias": False,
        "tie_word_embeddings": False,
    }
    assert {key: getattr(config, key) for key in expected} == expected
    assert config.logit_scale_init_value == pytest.approx(math.log(1 / 0.07))
    vision = {
        "model_type": "coca_vision_model",
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "image_size": 224,
        "patch_size": 32,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "use_class_token": True,
        "use_pre_layernorm": True,
        "layer_scale_init_value": None,
    }
    assert {key: getattr(config.vision_config, key) for key in vision} == vision
    text = {
        "vocab_size": 49408,
        "hidden_size": 512,
        "intermediate_size": 2048,
        "multimodal_intermediate_size": 2048,
        "num_hidden_layers": 24,
        "num_multimodal_layers": 12,
        "num_attention_heads": 8,
        "max_position_embeddings": 77,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "layer_scale_init_value": None,
        "use_cls_token": True,
        "cls_position": "last",
        "shifted_cls_mask": True,
        "bos_token_id": 49406,
        "eos_token_id": 49407,
        "pad_token_id": 0,
    }
    assert {key: getattr(config.text_config, key) for key in text} == text
    assert config.text_config.max_text_length == 76


def test_context_length_is_read_and_not_assumed(default):
    """Apple's captioners have 77 ids and 78 positions."""
    config = config_from_open_clip(changed(default.model_cfg, "text_cfg.context_length", 77))
    assert config.text_config.max_position_embeddings == 78
    assert config.text_config.max_text_length == 77


def test_mlp_widths_survive_the_ratio():
    """open_clip cuts width x ratio down to an integer: the ratio must not be a rounding error too small."""
    width = 1408  # ViT-g
    assert any(int(width * (size / width)) != size for size in range(1, 8 * width))
    assert all(int(width * _mlp_ratio(size, width)) == size for size in range(1, 8 * width))


def test_roberta_text_tower_is_refused_for_what_it_does(tmp_path):
    """open_clip runs coca_roberta's forward (transformers 5.23), but its captioning loss measures nothing.

    The text tower is bidirectional, so that the state at a position knows the words after it, which the decoder is then
    asked to predict. Also, its decoder has 49408 outputs for RoBERTa's 50265 ids.
    """
    open_clip = pytest.importorskip("open_clip")
    from transformers import RobertaConfig

    model_cfg = open_clip.get_model_config("coca_roberta-ViT-B-32")
    with pytest.raises(
        ValueError, match=r"text_cfg\.hf_model_name.*bidirectional.*words that the decoder must predict"
    ):
        config_from_open_clip(model_cfg)

    # The same, small, with a local config in place of a download
    RobertaConfig(
        vocab_size=50265, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64
    ).save_pretrained(tmp_path)
    model_cfg.pop("custom_text")
    model_cfg["embed_dim"] = 16
    model_cfg["vision_cfg"] |= {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
    model_cfg["text_cfg"] |= {"hf_model_name": str(tmp_path), "hf_model_pretrained": False}
    model_cfg["multimodal_cfg"] |= {"width": 32, "heads": 4, "layers": 1}
    torch.manual_seed(0)
    model = open_clip.coca_model.CoCa(**model_cfg).eval()
    torch.nn.init.normal_(model.text_decoder.text_projection)
    images, texts = torch.randn(1, 3, 32, 32), torch.randint(5, 40000, (1, 8))
    other = texts.clone()
    other[0, 6] = 4
    with torch.no_grad():
        outputs, other_outputs = model(images, texts), model(images, other)
    assert outputs["logits"].shape == (1, 7, 49408)
    earlier = (outputs["logits"] - other_outputs["logits"])[:, :5].abs().amax(dim=-1)
    assert (earlier > 1e-3).all()


# -------------------------------------------------------------------------------------------------------------- configs


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("text_cfg.hf_model_name", "roberta-base", "bidirectional"),
        ("text_cfg.no_causal_mask", True, "must predict"),
        ("text_cfg.proj_type", "none", "always projects"),
        ("text_cfg.act_kwargs", {"approximate": "tanh"}, "decoder would keep"),
        ("text_cfg.norm_kwargs", {"eps": 1e-6}, "1e-5"),
        ("text_cfg.qk_norm", True, "other layers"),
        ("text_cfg.block_type", "custom", "other layers"),
        ("text_cfg.pool_typo", "tok", "not known"),
        ("pad_id", 1, "text_cfg.pad_id = 0"),
        ("vision_cfg.timm_model_name", "vit_base_patch16_224", "timm"),
        ("vision_cfg.layers", [2, 2, 2, 2], "ResNet"),
        ("vision_cfg.norm_kwargs", {"eps": 1e-6}, "1e-5"),
        ("vision_cfg.act_kwargs", {"approximate": "sigmoid"}, "quick_gelu"),
        ("vision_cfg.scale_fc", True, "other layers"),
        ("vision_cfg.patch_size", [8, 16], "square"),
        ("vision_cfg.pos_embed_type", "rope", "sin_cos_2d"),
        ("vision_cfg.pool_type", "none", "one vector"),
        ("vision_cfg.attentional_pool", "both", "cascade"),
        ("multimodal_cfg.width", 64, "text_cfg.width = 32"),
        ("multimodal_cfg.heads", 8, "text_cfg.heads = 4"),
        ("embed_dim", 48, "decoder of width 32"),
        ("vision_cfg.unknown", 1, "not known"),
        ("multimodal_cfg.unknown", 1, "not known"),
        ("unknown", 1, "not known"),
    ],
)
def test_unsupported_values_are_named(default, key, value, message):
    with pytest.raises(ValueError, match=f"`{key}` = .* is not supported: .*{message}"):
        config_from_open_clip(changed(default.model_cfg, key, value))


@pytest.mark.parametrize("layout", ["parallel", "cascade"])
def test_two_poolers_need_one_width(default, layout):
    """open_clip builds such a model, and fails when it runs it."""
    model_cfg = changed(default.model_cfg, "vision_cfg.attentional_pool", layout)
    with pytest.raises(ValueError, match=r"`vision_cfg\.width` = 48 .*embed_dim \(32\)"):
        config_from_open_clip(model_cfg)
    open_clip_coca = pytest.importorskip("open_clip.coca_model")
    with pytest.raises(RuntimeError, match="normalized_shape"):
        open_clip_coca.CoCa(**model_cfg).encode_image(default["in.images"])


def test_the_config_of_a_clip_model_is_refused(default):
    for key in ("multimodal_cfg", "text_cfg", "embed_dim"):
        model_cfg = copy.deepcopy(default.model_cfg)
        del model_cfg[key]
        with pytest.raises(ValueError, match=f"`{key}` is missing"):
            config_from_open_clip(model_cfg)


def test_keys_that_open_clip_never_reads_change_nothing(default):
    ignored = {
        "custom_text": True,
        "multimodal_cfg.mlp_ratio": 2,
        "multimodal_cfg.dim_head": 32,
        "multimodal_cfg.n_queries": 3,
        "multimodal_cfg.attn_pooler_heads": 2,
        "multimodal_cfg.vocab_size": 7,
        "text_cfg.pool_type": "last",  # [CLS] is read
        "text_cfg.hf_model_name": None,
        "text_cfg.final_ln_after_pool": True,
        "vision_cfg.final_ln_after_pool": True,  # with a pooler
        "vision_cfg.output_tokens": False,
    }
    expected = config_from_open_clip(default.model_cfg).to_dict()
    for key, value in ignored.items():
        config = config_from_open_clip(changed(default.model_cfg, key, value)).to_dict()
        assert config | {"open_clip_model_cfg": None} == expected | {"open_clip_model_cfg": None}


def test_values_that_other_vectors_do_not_hold(default):
    def config(**changes):
        model_cfg = default.model_cfg
        for key, value in changes.items():
            model_cfg = changed(model_cfg, key.replace("__", "."), value)
        return config_from_open_clip(model_cfg)

    assert config(vision_cfg__act_kwargs={"approximate": "tanh"}).vision_config.hidden_act == "gelu_pytorch_tanh"
    assert config(vision_cfg__patch_dropout=0.5).vision_config.patch_dropout == 0.5
    assert config(vision_cfg__patch_size=[8, 8]).vision_config.patch_size == 8
    at_eos = config(text_cfg__embed_cls=False, text_cfg__pool_type="eos", text_cfg__eos_id=7).text_config
    assert (at_eos.eos_token_id, at_eos.max_position_embeddings, at_eos.shifted_cls_mask) == (7, 16, False)
    padded = config(text_cfg__pad_id=3, pad_id=3).text_config
    assert padded.pad_token_id == 3
    assert config(init_logit_scale=2).logit_scale_init_value == 2.0
    assert config(vision_cfg__ls_init_value=1).vision_config.layer_scale_init_value == 1.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_config.cls_position": "next"}, "cls_position"),
        ({"text_config.shifted_cls_mask": False}, "shifted_cls_mask"),
        ({"text_config.layer_norm_eps": 1e-6}, r"text_config\.layer_norm_eps"),
        ({"text_config.hidden_act": "relu"}, r"text_config\.hidden_act"),
        ({"text_config.multimodal_intermediate_size": 64}, "multimodal_intermediate_size"),
        ({"text_config.hidden_size": 48, "text_config.multimodal_intermediate_size": 192}, "pooler_hidden_size"),
        ({"vision_config.layer_norm_eps": 1e-6}, r"vision_config\.layer_norm_eps"),
        ({"vision_config.hidden_act": "quick_gelu"}, r"vision_config\.hidden_act"),
        ({"vision_config.use_class_token": False}, "use_class_token"),
        ({"vision_config.num_channels": 1}, "num_channels"),
        ({"vision_config": {"model_type": "vit"}}, r"vision_config\.model_type"),
        ({"image_layer_norm": "encoder"}, "image_layer_norm"),
        (
            {"pooler_type": "cascade", "vision_config.hidden_size": 32, "vision_config.num_attention_heads": 2},
            "image_layer_norm",
        ),
        ({"pooler_type": "cascade"}, r"vision_config\.hidden_size"),
        ({"pooler_hidden_size": 64}, "pooler_hidden_size"),
    ],
)
def test_models_that_open_clip_cannot_compute_are_refused(default, changes, message):
    values = config_from_open_clip(default.model_cfg).to_dict()
    for key, value in changes.items():
        values = changed(values, key, value)
    if "vision_config" in changes:
        values["vision_config"] = changes["vision_config"]
    with torch.device("meta"):
        model = CocaForConditionalGeneration(CocaConfig(**values))
    with pytest.raises(ValueError, match=f"`{message}`|`[a-z_]+.{message}`"):
        to_open_clip(model)


def test_a_model_without_a_decoder_is_refused(default):
    with torch.device("meta"), pytest.raises(ValueError, match="CocaModel has none"):
        to_open_clip(CocaModel(config_from_open_clip(default.model_cfg)))


# --------------------------------------------------------------------------------------------------- tensors and files


def test_wrong_tensors_are_listed_by_their_source_names(default):
    state_dict = {f"module.{name}": tensor for name, tensor in default.state_dict.items()}
    del state_dict["module.visual.proj"]
    del state_dict["module.text.transformer.resblocks.1.attn.in_proj_weight"]
    state_dict["module.text.extra"] = torch.zeros(1)
    state_dict["module.visual.attn_pool.query"] = torch.zeros(11, 32)
    with pytest.raises(ValueError, match="does not fit") as error:
        from_open_clip(default.model_cfg, state_dict)
    assert str(error.value) == (
        "The state dict does not fit the open_clip config.\n"
        "2 missing:\n"
        "  visual.proj\n"
        "  text.transformer.resblocks.1.attn.in_proj_weight\n"
        "1 unexpected:\n"
        "  module.text.extra\n"
        "1 of another shape:\n"
        "  module.visual.attn_pool.query is (11, 32), the config asks for (10, 32)"
    )


def test_another_context_length_is_a_shape_error(default):
    """open_clip would stretch the table, [CLS]'s row included."""
    with pytest.raises(ValueError, match=r"text\.positional_embedding is \(17, 32\), the config asks for \(78, 32\)"):
        from_open_clip(changed(default.model_cfg, "text_cfg.context_length", 77), default.state_dict)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_training_are_stripped(default, prefix):
    state_dict = {prefix + name: tensor for name, tensor in default.state_dict.items()}
    _, back = to_open_clip(from_open_clip(default.model_cfg, state_dict))
    assert_same_state_dict(back, default.state_dict)


def test_a_tensor_that_comes_twice_is_an_error(default):
    state_dict = default.state_dict | {"module.visual.proj": default.state_dict["visual.proj"]}
    with pytest.raises(ValueError, match=r"1 twice:\n  module\.visual\.proj"):
        from_open_clip(default.model_cfg, state_dict)


def test_the_model_shares_no_memory_with_its_source(default):
    model = from_open_clip(default.model_cfg, default.state_dict)
    sources = {tensor.untyped_storage().data_ptr() for tensor in default.state_dict.values()}
    parameters = [parameter.untyped_storage().data_ptr() for parameter in model.parameters()]
    assert sources.isdisjoint(parameters)
    assert len(set(parameters)) == len(parameters)
    assert all(not tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not model.training


def test_dtype(default):
    half = {name: tensor.half() for name, tensor in default.state_dict.items()}
    model = from_open_clip(default.model_cfg, half)
    assert model.dtype == torch.float32
    _, state_dict = to_open_clip(model)
    assert all(torch.equal(state_dict[name], tensor.float()) for name, tensor in half.items())
    assert from_open_clip(default.model_cfg, half, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_logit_scale_and_bias_in_either_shape(default):
    state_dict = default.state_dict | {"logit_scale": default.state_dict["logit_scale"].reshape(1)}
    model = from_open_clip(default.model_cfg, state_dict)
    assert model.model.logit_scale.shape == (1,)
    assert to_open_clip(model)[1]["logit_scale"].shape == ()

    # Weights that were trained without the bias start from 0, as in open_clip
    model_cfg = changed(default.model_cfg, "init_logit_bias", -10)
    model = from_open_clip(model_cfg, default.state_dict)
    assert model.model.logit_bias.tolist() == [0.0]
    assert model.config.logit_bias_init_value == -10
    with pytest.raises(ValueError, match=r"1 unexpected:\n  logit_bias"):
        from_open_clip(default.model_cfg, default.state_dict | {"logit_bias": torch.zeros(())})


@pytest.mark.parametrize(
    "name", ["open_clip_model.safetensors", "open_clip_pytorch_model.bin", "epoch_checkpoint", "old_pickle"]
)
def test_folders(default, tmp_path, name):
    config = {"model_cfg": default.model_cfg, "preprocess_cfg": {"interpolation": "bicubic"}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    state_dict = dict(default.state_dict)
    if name.endswith(".safetensors"):
        save_file(state_dict, tmp_path / name)
    elif name == "open_clip_pytorch_model.bin":
        torch.save(state_dict, tmp_path / name)
    else:
        checkpoint = {"epoch": 95, "state_dict": {f"module.{key}": tensor for key, tensor in state_dict.items()}}
        path = tmp_path / "open_clip_pytorch_model.bin"
        torch.save(checkpoint, path, _use_new_zipfile_serialization=name != "old_pickle")

    read_config, tensors = read_open_clip_folder(tmp_path)
    assert read_config == config
    assert len(tensors) == len(state_dict)
    model = load_open_clip_folder(tmp_path)
    assert_same_state_dict(to_open_clip(model)[1], state_dict)


def test_an_incomplete_folder_is_an_error(tmp_path):
    (tmp_path / "open_clip_config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"open_clip_pytorch_model\.bin.*it holds \['open_clip_config\.json'\]"):
        read_open_clip_folder(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        read_open_clip_folder(tmp_path / "missing")
