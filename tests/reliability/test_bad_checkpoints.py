"""Damaged, foreign and hostile checkpoints: an error that names the file or the tensor and what to do, or the right model."""

import json
import os
import pickle
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from modeling_coca import CocaConfig, CocaForConditionalGeneration, CocaModel
from modeling_coca.conversion import convert, open_checkpoint
from modeling_coca.conversion.open_clip import to_open_clip

SIZES = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
CONFIG = {
    "vision_config": {**SIZES, "image_size": 32, "patch_size": 8},
    "text_config": {
        **SIZES,
        "num_multimodal_layers": 1,
        "vocab_size": 99,
        "bos_token_id": 97,
        "eos_token_id": 98,
        "max_position_embeddings": 17,
        "shifted_cls_mask": True,
    },
    "projection_dim": 32,
    "pooler_type": "shared",
    "num_query_tokens": 3,
}
HEAD = "lm_head.weight"


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return CocaForConditionalGeneration(CocaConfig(**CONFIG)).eval()


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    """Ours, whole and in shards, and open_clip's, as folders."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("whole", "shards", "open_clip")}
    model.save_pretrained(folders["whole"])
    model.save_pretrained(folders["shards"], max_shard_size="100KB")
    model_cfg, state_dict = to_open_clip(model)
    (folders["open_clip"] / "open_clip_config.json").write_text(json.dumps({"model_cfg": model_cfg}))
    save_file(state_dict, folders["open_clip"] / "open_clip_model.safetensors")
    return folders


@pytest.fixture
def copy(saved, tmp_path):
    """`copy("whole")`: a folder to spoil, and its only weight file or index."""

    def make(name):
        folder = tmp_path / name
        shutil.copytree(saved[name], folder)
        files = {"whole": "model.safetensors", "shards": "model.safetensors.index.json"}
        return folder, folder / files.get(name, "open_clip_model.safetensors")

    return make


class Canary:
    """Pickled, it makes a folder when it is opened."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def flipped(content, position, mask=0xFF):
    return content[:position] + bytes([content[position] ^ mask]) + content[position + 1 :]


BYTES = {
    "empty": lambda content: b"",
    "length_alone": lambda content: content[:8],
    "cut_in_the_header": lambda content: content[:200],
    "cut_in_the_middle": lambda content: content[: len(content) // 2],
    "last_bytes_missing": lambda content: content[:-4],
    "bytes_behind": lambda content: content + bytes(16),
    "length_of_exabytes": lambda content: struct.pack("<Q", 2**62) + content[8:],
    "length_of_nothing": lambda content: struct.pack("<Q", 0) + content[8:],
    "length_flipped": lambda content: flipped(content, 1),
    "brace_flipped": lambda content: flipped(content, 8),
    "no_utf8": lambda content: flipped(content, 30, 0x80),
    "zeros": lambda content: bytes(len(content)),
    "text": lambda content: b"<html>503 Service Unavailable</html>" * 20,
    "git_lfs_pointer": lambda content: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n",
    "shape_in_the_header": lambda content: content.replace(b'"shape":[32', b'"shape":[33', 1),
    "type_in_the_header": lambda content: content.replace(b'"dtype":"F32"', b'"dtype":"X32"', 1),
    "offsets_in_the_header": lambda content: content.replace(b'"data_offsets":[0', b'"data_offsets":[9', 1),
}


@pytest.mark.parametrize("spoil", BYTES.values(), ids=BYTES)
@pytest.mark.parametrize("kind", ["whole", "open_clip"])
def test_damaged_safetensors(kind, spoil, copy):
    folder, path = copy(kind)
    spoilt = spoil(path.read_bytes())
    assert spoilt != path.read_bytes()
    path.write_bytes(spoilt)
    with pytest.raises(ValueError, match=rf"{path.name}.*([Dd]ownload it again|git lfs pull)"):
        CocaForConditionalGeneration.from_pretrained(folder)


@pytest.mark.parametrize("number", [1, 2])
def test_a_damaged_shard_is_named(number, copy):
    folder, _ = copy("shards")
    shard = sorted(folder.glob("model-*.safetensors"))[number]
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(ValueError, match=rf"{shard.name}.*[Dd]ownload it again"):
        CocaForConditionalGeneration.from_pretrained(folder)


def test_a_missing_shard_is_named(copy):
    folder, _ = copy("shards")
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=rf"names \d+ files, of which these are missing.*{shard.name}"):
        CocaForConditionalGeneration.from_pretrained(folder)


def test_the_single_file_counts_where_an_index_was_left_behind(copy, saved, model):
    folder, index = copy("shards")
    for shard in folder.glob("model-*.safetensors"):
        shard.unlink()
    shutil.copy(saved["whole"] / "model.safetensors", folder)
    assert index.is_file()
    assert_equal(CocaForConditionalGeneration.from_pretrained(folder), model)


INDICES = {
    "no_json": ("{", "is no JSON"),
    "deep": ("[" * 100_000, "is no JSON"),
    "a_list": ("[]", "must hold a JSON object"),
    "without_map": ("{}", "`weight_map`"),
    "map_is_a_list": ('{"weight_map": ["model-00001-of-00002.safetensors"]}', "`weight_map`"),
    "numbers_for_files": ('{"weight_map": {"a": 5}}', "`weight_map`"),
    "empty_map": ('{"weight_map": {}}', "names 0 files"),
    "file_above": ('{"weight_map": {"a": "../model.safetensors"}}', "files outside its folder"),
    "file_below": ('{"weight_map": {"a": "x/../../model.safetensors"}}', "files outside its folder"),
    "absolute": ('{"weight_map": {"a": "ABOVE/model.safetensors"}}', "files outside its folder"),
    "folder": ('{"weight_map": {"a": ".."}}', "missing|outside"),
}


@pytest.mark.parametrize(("content", "message"), INDICES.values(), ids=INDICES)
def test_spoilt_indices(content, message, copy, saved):
    folder, index = copy("shards")
    shutil.copy(saved["whole"] / "model.safetensors", folder.parent)  # what the index should not reach
    index.write_text(content.replace("ABOVE", str(folder.parent)))
    for path in (folder, index):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            open_checkpoint(path)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        CocaForConditionalGeneration.from_pretrained(folder)


# ------------------------------------------------------------------------------------------------------------ tensors


def rewrite(path, change):
    state_dict = load_file(path)
    change(state_dict)
    save_file(state_dict, path, metadata={"format": "pt"})


def assert_equal(loaded, model):
    for (name, ours), theirs in zip(loaded.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_weights_that_are_no_numbers(value, dtype, copy):
    folder, path = copy("whole")

    def change(state_dict):
        state_dict |= {name: tensor.to(dtype) for name, tensor in state_dict.items()}
        state_dict[HEAD][5, 7] = value

    rewrite(path, change)
    with pytest.raises(ValueError, match=rf"no numbers, in 1 tensors: {HEAD}.*earlier checkpoint"):
        CocaForConditionalGeneration.from_pretrained(folder, dtype=dtype)


def test_weights_of_another_library_that_are_no_numbers(copy):
    folder, path = copy("open_clip")
    rewrite(path, lambda state_dict: state_dict["text_decoder.text_projection"].fill_(float("nan")))
    with pytest.raises(ValueError, match=f"no numbers, in 1 tensors: {HEAD}"):
        CocaForConditionalGeneration.from_pretrained(folder)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, "mixed"], ids=str)
def test_weights_of_another_type_are_cast(dtype, copy, model):
    folder, path = copy("whole")
    types = [torch.float16, torch.float64] if dtype == "mixed" else [dtype]

    def change(state_dict):
        for i, name in enumerate(sorted(state_dict)):
            state_dict[name] = state_dict[name].to(types[i % len(types)])

    rewrite(path, change)
    loaded = CocaForConditionalGeneration.from_pretrained(folder)
    assert loaded.dtype == torch.float32
    for (name, ours), theirs in zip(loaded.state_dict().items(), model.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-2, msg=name)


def test_a_tensor_of_another_shape(copy):
    folder, path = copy("whole")
    rewrite(path, lambda state_dict: state_dict.update({HEAD: torch.ones(3, 3)}))
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        CocaForConditionalGeneration.from_pretrained(folder)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "net.student."])
def test_tensors_of_another_name_leave_no_random_model(prefix, copy):
    folder, path = copy("whole")
    save_file({prefix + name: x for name, x in load_file(path).items()}, path, metadata={"format": "pt"})
    for model_class in (CocaForConditionalGeneration, CocaModel, AutoModelForImageTextToText):
        with pytest.raises(ValueError, match=rf"has none of the \d+ tensors of Coca\w+, but others: \['{prefix}"):
            model_class.from_pretrained(folder)


def test_missing_and_extra_tensors_are_reported(copy):
    folder, path = copy("whole")

    def change(state_dict):
        del state_dict[HEAD]
        state_dict["of_somebody"] = torch.ones(2)

    rewrite(path, change)
    loaded, info = CocaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert (list(info["missing_keys"]), list(info["unexpected_keys"])) == ([HEAD], ["of_somebody"])
    assert loaded.lm_head.weight.isfinite().all() and loaded.lm_head.weight.std() > 0


# ------------------------------------------------------------------------------------------------------------ pickles


def as_pickle(path, content, by_torch=True):
    path.with_suffix(".safetensors").unlink(missing_ok=True)
    if by_torch:
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))


@pytest.mark.parametrize("by_torch", [True, False], ids=["torch.save", "pickle"])
@pytest.mark.parametrize("kind", ["whole", "open_clip"])
@pytest.mark.parametrize("whole_file", [True, False], ids=["alone", "among_tensors"])
def test_code_in_pickles_does_not_run(kind, by_torch, whole_file, copy, tmp_path):
    folder, path = copy(kind)
    canary = Canary(tmp_path / "canary")
    content = canary if whole_file else {**load_file(path), "more": canary}
    path.unlink()
    path = folder / ("pytorch_model.bin" if kind == "whole" else "open_clip_pytorch_model.bin")
    as_pickle(path, content, by_torch)
    for load in (CocaForConditionalGeneration.from_pretrained, open_checkpoint):
        with pytest.raises(ValueError, match=rf"{path.name}.*(is refused|cannot be read)"):
            load(folder)
    with pytest.raises(ValueError, match=path.name):
        convert(folder, tmp_path / "out")
    assert not canary.path.exists() and not (tmp_path / "out").exists()
    torch.load(path, weights_only=False) if by_torch else pickle.loads(path.read_bytes())
    assert canary.path.exists()  # it would have


PICKLES = {
    "a_list": ([1, 2], "holds a list and no state dict"),
    "no_tensors": ({"epoch": 3}, "holds no tensors"),
    "a_tensor": (torch.ones(3), "holds a Tensor and no state dict"),
    "a_number": (5, "holds a int and no state dict"),
    "a_state_dict_of_numbers": ({"state_dict": {"a": 1}}, "holds no tensors"),
}


@pytest.mark.parametrize(("content", "message"), PICKLES.values(), ids=PICKLES)
def test_pickles_of_other_things(content, message, copy):
    folder, path = copy("open_clip")
    path.unlink()
    as_pickle(folder / "open_clip_pytorch_model.bin", content)
    with pytest.raises(ValueError, match=message):
        open_checkpoint(folder)


@pytest.mark.parametrize("share", [0.02, 0.5, 0.9, 0.999])
def test_cut_pickles(share, copy):
    folder, path = copy("open_clip")
    state_dict = load_file(path)
    path.unlink()
    path = folder / "open_clip_pytorch_model.bin"
    torch.save(state_dict, path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(ValueError, match=rf"{path.name}.*[Dd]ownload it again"):
        open_checkpoint(folder)


# ------------------------------------------------------------------------------------------ other libraries' checkpoints


FOREIGN = {
    "missing": (lambda x: x.pop("visual.proj"), r"1 missing:\n  visual\.proj"),
    "extra": (lambda x: x.update(strange=torch.ones(2)), r"1 unexpected:\n  strange"),
    "another_shape": (
        lambda x: x.update({"visual.proj": torch.ones(2, 2)}),
        r"1 of another shape:\n  visual\.proj is \(2, 2\)",
    ),
    "twice": (
        lambda x: x.update({"module.visual.proj": x["visual.proj"].clone()}),
        r"1 twice:\n  (module\.)?visual\.proj",
    ),
    "a_layer_less": (
        lambda x: [x.pop(name) for name in list(x) if name.startswith("text.transformer.resblocks.0.")],
        r"12 missing:\n",
    ),
    "of_clip": (
        lambda x: [x.pop(name) for name in list(x) if name.startswith("text_decoder.")],
        "This is a CLIP.*no decoder",
    ),
    "of_nothing": (lambda x: (x.clear(), x.update(a=torch.ones(1))), "the checkpoint of no CoCa that is known"),
}


@pytest.mark.parametrize(("change", "message"), FOREIGN.values(), ids=FOREIGN)
def test_tensors_that_do_not_fit(change, message, copy, tmp_path):
    folder, path = copy("open_clip")
    rewrite(path, change)
    with pytest.raises(ValueError, match=message):
        CocaForConditionalGeneration.from_pretrained(folder)
    with pytest.raises(ValueError, match=message):
        convert(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def with_cfg(**changes):
    """Changes of `model_cfg`; a name with two underscores is of a section."""

    def change(config):
        for name, value in changes.items():
            section, _, key = name.rpartition("__")
            place = config["model_cfg"][section] if section else config["model_cfg"]
            place.pop(key, None) if value is ... else place.update({key: value})
        return config

    return change


CONFIGS = {
    "no_json": (lambda config: "{", "open_clip_config.json is no JSON"),
    "a_list": (lambda config: [], "must hold a JSON object"),
    "empty": (lambda config: {}, "no config of open_clip"),
    "cfg_is_a_list": (lambda config: {"model_cfg": []}, "no config of open_clip"),
    "section_is_a_list": (with_cfg(vision_cfg=[]), "`vision_cfg` is missing or no mapping"),
    "section_missing": (with_cfg(multimodal_cfg=...), "`multimodal_cfg` is missing"),
    "embed_dim_missing": (with_cfg(embed_dim=...), "`embed_dim` is missing"),
    "embed_dim_text": (with_cfg(embed_dim="many"), "`embed_dim` = 'many'"),
    "embed_dim_null": (with_cfg(embed_dim=None), "`embed_dim` = None"),
    "width_text": (with_cfg(vision_cfg__width="wide"), "`vision_cfg.width` = 'wide'"),
    "width_zero": (with_cfg(vision_cfg__width=0), "`vision_cfg.width` = 0"),
    "width_list": (with_cfg(text_cfg__width=[32]), r"`text_cfg.width` = \[32\]"),
    "head_width_zero": (with_cfg(vision_cfg__head_width=0), "`vision_cfg.head_width` = 0"),
    "layers_text": (with_cfg(text_cfg__layers="2"), "`text_cfg.layers` = '2'"),
    "layers_negative": (with_cfg(text_cfg__layers=-1), "`text_cfg.layers` = -1"),
    "layers_fraction": (with_cfg(multimodal_cfg__layers=1.5), "`multimodal_cfg.layers` = 1.5"),
    "heads_null": (with_cfg(text_cfg__heads=None, multimodal_cfg__heads=None), "`text_cfg.heads` = None"),
    "patch_of_three": (with_cfg(vision_cfg__patch_size=[8, 8, 9]), "patches are square"),
    "patch_text": (with_cfg(vision_cfg__patch_size="8"), "`vision_cfg.patch_size` = '8'"),
    "image_size_text": (with_cfg(vision_cfg__image_size="32"), "`vision_cfg.image_size` = '32'"),
    "mlp_ratio_text": (with_cfg(vision_cfg__mlp_ratio="4"), "`vision_cfg.mlp_ratio` = '4'"),
    "vocabulary_text": (with_cfg(text_cfg__vocab_size="99"), "`text_cfg.vocab_size` = '99'"),
    "context_null": (with_cfg(text_cfg__context_length=None), "`text_cfg.context_length` = None"),
    "scale_text": (with_cfg(init_logit_scale="hot"), "`init_logit_scale` = 'hot'"),
    "unknown_key": (with_cfg(vision_cfg__wdith=32), "`vision_cfg.wdith`.*not known"),
    "unhashable_pooler": (with_cfg(vision_cfg__attentional_pool={"a": 1}), "attentional_pool"),
}


@pytest.mark.parametrize(("change", "message"), CONFIGS.values(), ids=CONFIGS)
def test_configs_of_open_clip(change, message, copy):
    folder, _ = copy("open_clip")
    path = folder / "open_clip_config.json"
    content = change(json.loads(path.read_text()))
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=message):
        open_checkpoint(folder)
