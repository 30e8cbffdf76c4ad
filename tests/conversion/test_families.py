"""Each family's table and config against numbers of its own library; what is refused, and how.

The fixtures hold random weights, inputs and outputs of CONCH (mahmoodlab/CONCH) and torchmultimodal (facebookresearch/multimodal).
"""

import json

import pytest
import torch
import torch.nn.functional as F

from modeling_coca import CocaConfig, CocaForConditionalGeneration, CocaModel
from modeling_coca.conversion import open_checkpoint
from modeling_coca.conversion.conch import config_from_conch
from modeling_coca.conversion.conch import infer_model_cfg as infer_conch
from modeling_coca.conversion.families import FAMILIES, OwnLayoutError, detect
from modeling_coca.conversion.open_clip import infer_model_cfg, to_open_clip
from modeling_coca.conversion.recipes import RECIPES, find_recipe
from modeling_coca.conversion.table import collapse, write_out
from modeling_coca.conversion.torchmultimodal import config_from_torchmultimodal, infer_arguments

OTHERS = ["conch", "torchmultimodal_cascade", "torchmultimodal_shared"]


@torch.no_grad()
@pytest.mark.parametrize("name", OTHERS)
def test_numbers_are_those_of_the_library(checkpoint, sample, name):
    found = open_checkpoint(checkpoint(name, config_file="config.json"))
    model, tensors = found.load(), sample(name).tensors
    assert type(model) is CocaForConditionalGeneration
    images, texts = tensors["in.images"], tensors["in.texts"]
    image = F.normalize(model.model.get_image_features(images).pooler_output, dim=-1)
    text = F.normalize(model.model.get_text_features(texts).pooler_output, dim=-1)
    logits = model(input_ids=texts, pixel_values=images).logits
    real = texts != 0
    assert (image - tensors["out.image"]).abs().max() <= 1e-6
    assert (text - tensors["out.text"]).abs().max() <= 1e-6
    assert (logits - tensors["out.logits"])[real].abs().max() <= 1e-5
    # Short texts need no padding
    lengths = real.sum(dim=1)
    assert lengths.min() < texts.shape[1]
    short = texts[:1, : lengths[0]]
    text = F.normalize(model.model.get_text_features(short).pooler_output, dim=-1)
    assert (text - tensors["out.text"][:1]).abs().max() <= 1e-6


@pytest.mark.parametrize("name", OTHERS)
def test_generation_with_and_without_a_cache(checkpoint, sample, name):
    model = open_checkpoint(checkpoint(name, config_file="config.json")).load()
    images = sample(name).tensors["in.images"]
    cached = model.generate(images, max_length=8, min_length=8, do_sample=False)
    assert torch.equal(cached, model.generate(images, max_length=8, min_length=8, do_sample=False, use_cache=False))


def test_tensors_tell_the_config(sample):
    """Of models with heads of 64 channels, as all public ones have."""

    def shapes(config, family):
        with torch.device("meta"):
            parameters = CocaForConditionalGeneration(config).state_dict()
        entries = write_out(family.table, parameters, family.ways(config))
        return {e.theirs: tuple(e.transform.to_theirs(*(parameters[name] for name in e.ours)).shape) for e in entries}

    families = {family.name: family for family in FAMILIES}
    config = sample("conch").config
    stack = {**config["multimodal_cfg"], "width": 128, "heads": 2}
    text = {**config["text_cfg"], "width": 128, "heads": 2}
    vision = {**config["vision_cfg"], "width": 192, "num_heads": 3}
    config = {**config, "embed_dim_caption": 128, "text_cfg": text, "multimodal_cfg": stack, "vision_cfg": vision}
    assert infer_conch(shapes(config_from_conch(config), families["CONCH"])) == config

    for name in OTHERS[1:]:
        config = sample(name).config | {"text_n_head": 1, "fusion_n_head": 1, "vision_n_head": 3, "pooler_n_head": 8}
        config |= dict.fromkeys(("text_hidden_dim", "text_output_dim", "pooler_output_embed_dim"), 64)
        config |= {"pooler_input_embed_dim": 192}
        inferred = infer_arguments(shapes(config_from_torchmultimodal(config), families["torchmultimodal"]))
        assert config.items() <= inferred.items()

    narrow = {key: tuple(x.shape) for key, x in sample("conch").state_dict.items()}
    with pytest.raises(ValueError, match=r"heads of the text tower \(width 16\).*--config"):
        infer_conch(narrow)


def test_conch_without_its_decoder_is_a_dual_encoder(checkpoint, sample, tmp_path):
    """As released. `CocaForConditionalGeneration` puts a new decoder on it."""
    given = sample("conch")
    state_dict = {key: x for key, x in given.state_dict.items() if not key.startswith("text_decoder.")}
    folder = tmp_path / "conch"
    folder.mkdir()
    torch.save(state_dict, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(given.config))
    found = open_checkpoint(folder)
    model = found.load()
    assert type(model) is CocaModel
    image = model(pixel_values=given.tensors["in.images"]).image_embeds
    assert (image - given.tensors["out.image"]).abs().max() <= 1e-6
    assert dict(found.describe())["quirks"].endswith("a dual encoder comes out")
    assert found.recipe.license == "cc-by-nc-nd-4.0"

    captioner, loading = CocaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert {key.split(".")[0] for key in loading["missing_keys"]} == {"text_decoder", "lm_head"}
    assert not loading["unexpected_keys"]
    assert torch.equal(captioner.model.visual_projection.weight, model.visual_projection.weight)


def test_dropout_moves_the_second_layer_of_torchmultimodals_mlps(checkpoint, sample, tmp_path):
    given = sample("torchmultimodal_cascade")
    state_dict = {
        key.replace(".feedforward.model.2.", ".feedforward.model.3."): x for key, x in given.state_dict.items()
    }
    assert state_dict.keys() != given.state_dict.keys()
    path = tmp_path / "trained.pt"
    torch.save(state_dict, path)
    model = open_checkpoint(path, config=given.config).load()
    expected = open_checkpoint(checkpoint("torchmultimodal_cascade", config_file="config.json")).load()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))


def test_a_torchmultimodal_model_without_its_loss_has_no_temperature(sample, tmp_path):
    given = sample("torchmultimodal_shared")
    path = tmp_path / "model.pt"
    torch.save({key.removeprefix("model."): x for key, x in given.state_dict.items() if key.startswith("model.")}, path)
    found = open_checkpoint(path, config=given.config)
    assert "no temperature" in found.warnings[0]
    assert found.load().model.logit_scale.item() == pytest.approx(2.6593, abs=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_norm_first": False}, "`text_norm_first` = False .*pre-norm"),
        ({"fusion_layer_norm_eps": 1e-6}, "`fusion_layer_norm_eps`"),
        ({"vision_final_layer_norm_eps": 1e-6}, "`vision_final_layer_norm_eps`"),
        ({"fusion_n_head": 4}, "`fusion_n_head` = 4 .*`text_n_head` is 2"),
        ({"pooler_output_embed_dim": 32}, "`pooler_output_embed_dim`"),
        ({"multimodal_output_projection_dim": None}, "logits of 60 tokens"),
        ({"typo": 1}, r"Unknown: \['typo'\]"),
    ],
)
def test_torchmultimodal_arguments_that_cannot_be_expressed(sample, changes, message):
    with pytest.raises(ValueError, match=message):
        config_from_torchmultimodal({**sample("torchmultimodal_cascade").config, **changes})
    with pytest.raises(ValueError, match=r"Missing: \['vision_patch_size'"):
        config_from_torchmultimodal({})


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("vision_cfg", "attentional_pool_caption", False, "attentional_pool_caption"),
        ("text_cfg", "embed_cls", False, "embed_cls"),
        ("multimodal_cfg", "heads", 2, "multimodal_cfg.heads"),
        (None, "embed_dim_caption", 8, "embed_dim_caption"),
    ],
)
def test_conch_values_that_cannot_be_expressed(sample, section, key, value, message):
    config = json.loads(json.dumps(sample("conch").config))
    (config[section] if section else config)[key] = value
    with pytest.raises(ValueError, match=message):
        config_from_conch(config)


def test_models_of_these_layers_are_refused_by_open_clip(sample):
    for name, field in (("conch", "patch_bias"), ("torchmultimodal_cascade", "use_class_token")):
        config = (config_from_conch if name == "conch" else config_from_torchmultimodal)(sample(name).config)
        with torch.device("meta"):
            model = CocaForConditionalGeneration(config)
        with pytest.raises(ValueError, match=field):
            to_open_clip(model)


# --------------------------------------------------------------------------------------------------------- recognition


def test_a_family_owns_its_own_checkpoints_alone(sample):
    for name, owner in {
        "open_clip_default": "open_clip",
        **dict.fromkeys(OTHERS[1:], "torchmultimodal"),
        "conch": "CONCH",
    }.items():
        names = {key.removeprefix("model.") for key in sample(name).state_dict}
        assert [family.name for family in FAMILIES if family.owns(names)] == [owner]
        assert detect(sample(name).state_dict).name == owner


def test_lucidrains_coca_is_refused_for_what_it_is():
    coca_pytorch = pytest.importorskip("coca_pytorch.coca_pytorch")
    model = coca_pytorch.CoCa(
        dim=16, num_tokens=32, unimodal_depth=1, multimodal_depth=1, num_img_queries=2, dim_head=8, heads=2
    )
    with pytest.raises(ValueError, match=r"CoCa-pytorch.*rotary.*one key and value head.*Nothing was written"):
        detect(model.state_dict())


def test_a_clip_is_refused_as_one():
    open_clip = pytest.importorskip("open_clip")
    from transformers import CLIPConfig
    from transformers import CLIPModel as TransformersCLIP

    vision = {"image_size": 16, "layers": 1, "width": 64, "patch_size": 8}
    text = {"context_length": 8, "vocab_size": 32, "width": 64, "heads": 1, "layers": 1}
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    for names in (
        open_clip.model.CLIP(16, vision, text).state_dict(),
        open_clip.model.CustomTextCLIP(16, vision, text).state_dict(),
        TransformersCLIP(CLIPConfig(vision_config=small, text_config=small)).state_dict(),
    ):
        with pytest.raises(ValueError, match="no decoder, so it is no CoCa"):
            detect(names)


def test_other_checkpoints_are_refused():
    with pytest.raises(ValueError, match=r"no CoCa that is known.*encoder\.layer\.\{0-2\}\.linear"):
        detect([f"encoder.layer.{i}.linear.weight" for i in range(3)])
    with torch.device("meta"):
        ours = CocaForConditionalGeneration(CocaConfig(vision_config={"num_hidden_layers": 1}))
    with pytest.raises(OwnLayoutError, match="own layout already"):
        detect(ours.state_dict())


@pytest.mark.parametrize("name", ["coca_ViT-B-32", "coca_ViT-L-14", "coca_base"])
def test_named_models_of_open_clip_are_inferred(name):
    """LAION's repositories of B/32 and L/14 hold a .bin and no config."""
    open_clip = pytest.importorskip("open_clip")
    model_cfg = open_clip.get_model_config(name)
    with torch.device("meta"):
        model = open_clip.coca_model.CoCa(**{key: value for key, value in model_cfg.items() if key != "custom_text"})
    inferred = infer_model_cfg({key: tuple(x.shape) for key, x in model.state_dict().items()})
    defaults = {"attn_pooler_queries": 256, "no_ln_pre": False, "mlp_ratio": 4.0, "proj_bias": False}
    for section, values in inferred.items():
        if isinstance(values, dict):
            assert values.items() <= {**defaults, **model_cfg[section]}.items()
        else:
            assert model_cfg[section] == values


def test_recipes_are_found_by_the_names_of_the_repositories():
    names = {
        "laion/CoCa-ViT-B-32-laion2B-s13B-b90k": "coca-vit-b-32",
        "laion/CoCa-ViT-L-14-laion2B-s13B-b90k": "coca-vit-l-14",
        "laion/mscoco_finetuned_CoCa-ViT-B-32-laion2B-s13B-b90k": "coca-vit-b-32-mscoco",
        "laion/mscoco_finetuned_CoCa-ViT-L-14-laion2B-s13B-b90k": "coca-vit-l-14-mscoco",
        "apple/mobileclip2_coca_dfn2b_s13b_context77": "mobileclip2-coca-context77",
        "apple/mobileclip2_coca_dfn2b_s13b_mscoco38k_s12m_context77": "mobileclip2-coca-context77",
        "apple/mobileclip2_coca_dfn2b_s13b_dci-short_s12m_context128": "mobileclip2-coca-context128",
        "apple/mobileclip2_coca_dfn2b_s13b_gbc10m-long_context256": "mobileclip2-coca-context256",
        "MahmoodLab/conch": "conch-vit-b-16",
    }
    assert {name: find_recipe(name).hub_config for name in names} == names
    assert {recipe.hub_config for recipe in RECIPES} == set(names.values())
    assert find_recipe("my-model", None, "epoch_3.pt", "concheck") is None


def test_layers_are_collapsed():
    assert collapse(["a.0.b", "a.1.b", "a.3.b", "c", "a.7.d"]) == [("a.{0-1,3}.b", 3), ("c", 1), ("a.7.d", 1)]
