"""`convert` and `convert_to_open_clip`: every layout in, the same bits out, and nothing left where something is wrong."""

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModelForImageTextToText, GenerationConfig

from modeling_coca import CocaConfig, CocaForConditionalGeneration, CocaModel, CocaProcessor, CocaTokenizer
from modeling_coca.conversion import checking, convert, convert_to_open_clip, open_checkpoint, to_open_clip
from modeling_coca.conversion.convert import write_safetensors
from modeling_coca.conversion.sources import WEIGHT_FILES, Weights, open_weights


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]):
    assert set(actual) == set(expected)
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor.reshape(actual[name].shape)), name


# ------------------------------------------------------------------------------------------------------------- layouts

LAYOUTS = {
    "safetensors": {"file": "open_clip_model.safetensors"},
    "bin": {},
    "Apple's": {"file": "mobileclip2_coca_dfn2b_s13b_context77.pt", "config_file": "config.json"},
    "training, DDP": {"file": "epoch_3.pt", "prefix": "module.", "extra": {"epoch": 3, "optimizer": {"state": {}}}},
    "training, compiled": {"file": "epoch_3.pt", "prefix": "module._orig_mod.", "extra": {"epoch": 3}},
    "Lightning": {"file": "last.ckpt", "prefix": "model.", "extra": {"pytorch-lightning_version": "2.5"}},
    "float16": {"dtype": torch.float16},
    "bfloat16": {"file": "open_clip_model.safetensors", "dtype": torch.bfloat16},
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts_convert_and_go_back_to_the_bit(checkpoint, sample, tmp_path, layout):
    source, given = checkpoint(**layout), sample("open_clip_default")
    dtype = layout.get("dtype", torch.float32)
    found = convert(source, tmp_path / "ours")
    assert found.dtype == dtype
    model, loading = CocaForConditionalGeneration.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    assert model.dtype == dtype
    expected = {name: tensor.to(dtype) for name, tensor in given.state_dict.items()}
    assert_same(to_open_clip(model)[1], expected)

    model_cfg, _ = convert_to_open_clip(tmp_path / "ours", tmp_path / "theirs")
    assert model_cfg == given.config
    assert_same(load_file(tmp_path / "theirs" / "open_clip_model.safetensors"), expected)
    again = convert(tmp_path / "theirs", tmp_path / "again")
    assert again.their_config == given.config
    for path in (tmp_path / "ours", tmp_path / "again"):
        assert sorted(entry.name for entry in path.iterdir()) == [
            *("README.md", "config.json", "generation_config.json", "model.safetensors", "preprocessor_config.json"),
        ]
    assert_same(load_file(tmp_path / "again" / "model.safetensors"), load_file(tmp_path / "ours" / "model.safetensors"))


def test_pickles_of_old_pytorch_are_read_once(checkpoint, sample, tmp_path, monkeypatch):
    from modeling_coca.conversion import sources

    source = checkpoint()
    given = sample("open_clip_default").state_dict
    torch.save(given, source / "open_clip_pytorch_model.bin", _use_new_zipfile_serialization=False)
    opened = []
    monkeypatch.setattr(sources, "open_weights", lambda path: opened.append(path) or open_weights(path))
    convert(source, tmp_path / "out")
    assert len(opened) == 1
    assert_same(to_open_clip(CocaForConditionalGeneration.from_pretrained(tmp_path / "out"))[1], given)


def test_a_file_alone_with_a_config_of_its_name(sample, tmp_path):
    given = sample("open_clip_default")
    torch.save(given.state_dict, tmp_path / "mine.pt")
    (tmp_path / "mine.json").write_text(json.dumps({"model_cfg": given.config}))
    assert open_checkpoint(tmp_path / "mine.pt").their_config == given.config
    (tmp_path / "mine.json").rename(tmp_path / "elsewhere.json")
    found = open_checkpoint(tmp_path / "mine.pt", config=tmp_path / "elsewhere.json")
    assert found.their_config == given.config


def test_shards_in_and_out(checkpoint, sample, tmp_path):
    given, source = sample("open_clip_default"), checkpoint(config_file="open_clip_config.json")
    names = sorted(given.state_dict)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in halves.items():
        save_file({name: given.state_dict[name] for name in part}, source / file)
    weight_map = {name: file for file, part in halves.items() for name in part}
    (source / "open_clip_pytorch_model.bin").unlink()
    index = source / "open_clip_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))

    for source_path in (source, index):
        convert(source_path, tmp_path / "ours", max_shard_size="200KB")
        files = sorted(path.name for path in (tmp_path / "ours").glob("*.safetensors"))
        assert len(files) > 2 and files[0].startswith("model-00001-of-")
        model = CocaForConditionalGeneration.from_pretrained(tmp_path / "ours")
        assert_same(to_open_clip(model)[1], given.state_dict)
        convert_to_open_clip(tmp_path / "ours", tmp_path / "theirs")
        assert_same(load_file(tmp_path / "theirs" / "open_clip_model.safetensors"), given.state_dict)
        shutil.rmtree(tmp_path / "ours")
        shutil.rmtree(tmp_path / "theirs")

    (source / "b.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"missing: \['b\.safetensors'\]"):
        open_checkpoint(source)


def test_a_repository_of_the_hub(checkpoint, tmp_path, monkeypatch):
    """From the cache, where a repository lies as a folder of one commit."""
    commit = "0" * 40
    repository = tmp_path / "cache" / "models--laion--mscoco_finetuned_CoCa-ViT-B-32-laion2B-s13B-b90k"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(checkpoint(), repository / "snapshots" / commit)
    name = "laion/mscoco_finetuned_CoCa-ViT-B-32-laion2B-s13B-b90k"
    found = open_checkpoint(name, cache_dir=tmp_path / "cache", local_files_only=True)
    assert found.checkpoint.repository == name
    assert "0.79 %" in found.warnings[0] and "laion/CoCa-ViT-B-32-laion2B-s13B-b90k" in found.warnings[0]

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    found = convert(name, tmp_path / "out", command="coca convert this")
    card = (tmp_path / "out" / "README.md").read_text()
    for part in (
        "license: mit\n",
        "pipeline_tag: image-text-to-text\n",
        f"base_model: {name}\n",
        "coca convert this",
        "0.79 %",
        "Six beams",
        'model="out"',
    ):
        assert part in card
    generation = GenerationConfig.from_pretrained(tmp_path / "out")
    # This one's context has 16 tokens
    assert (generation.num_beams, generation.min_length, generation.max_length) == (6, 5, 16)
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (318, 319, 0)

    with pytest.raises(
        FileNotFoundError, match="nobody/nothing is no file or folder here, and the Hub did not give it"
    ):
        open_checkpoint("nobody/nothing")


def wide_model() -> CocaForConditionalGeneration:
    """With heads of 64 channels, as all public ones: its config can be read off its tensors."""
    torch.manual_seed(0)
    config = CocaConfig(
        vision_config={
            "hidden_size": 128,
            "intermediate_size": 512,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 16,
        },
        text_config={
            "vocab_size": 49408,
            "hidden_size": 64,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_multimodal_layers": 1,
            "num_attention_heads": 1,
            "shifted_cls_mask": True,
        },
        projection_dim=64,
        pooler_type="shared",
        num_query_tokens=255,
    )
    return CocaForConditionalGeneration(config).eval()


def test_without_a_config_the_tensors_tell_it(tmp_path):
    """LAION's repositories of B/32 and L/14 hold one .bin and nothing else."""
    model = wide_model()
    model_cfg, state_dict = to_open_clip(model)
    folder = tmp_path / "CoCa-ViT-L-14-laion2B-s13B-b90k"
    folder.mkdir()
    torch.save(state_dict, folder / "open_clip_pytorch_model.bin")
    found = open_checkpoint(folder)
    assert "taken for granted: heads of 64 channels" in dict(found.describe())["config"]
    assert found.recipe.hub_config == "coca-vit-l-14"
    expected = {key: value for key, value in model.config.to_dict().items() if key not in ("dtype", "architectures")}
    inferred = found.config.to_dict()
    assert {key: inferred[key] for key in expected} == expected | {
        "logit_scale_init_value": inferred["logit_scale_init_value"]
    }
    assert model_cfg["text_cfg"]["context_length"] == found.their_config["text_cfg"]["context_length"] == 76
    assert_same(dict(found.load().state_dict()), dict(model.state_dict()))

    torch.save({k: x for k, x in state_dict.items() if "conv1" not in k}, folder / "open_clip_pytorch_model.bin")
    with pytest.raises(ValueError, match=r"do not tell it: 'visual\.conv1\.weight' is missing.*--config"):
        open_checkpoint(folder)


def test_mixed_types_are_written_as_the_widest(checkpoint, sample, tmp_path):
    def mix(state_dict):
        return {name: x.half() if x.ndim > 1 else x for name, x in state_dict.items()}

    source, state_dict = checkpoint(change=mix), mix(sample("open_clip_default").state_dict)
    found = convert(source, tmp_path / "out")
    assert found.dtype == torch.float32 and "of 2 types" in found.warnings[0]
    model = CocaForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert_same(to_open_clip(model)[1], {name: x.float() for name, x in state_dict.items()})
    convert(source, tmp_path / "half", dtype=torch.float16)
    assert CocaForConditionalGeneration.from_pretrained(tmp_path / "half").dtype == torch.float16


# ---------------------------------------------------------------------------------------------- processor and tokenizer


@pytest.fixture(scope="module")
def clip_vocabulary():
    """open_clip's file of merges, or its absence."""
    pytest.importorskip("open_clip")
    return CocaTokenizer.from_open_clip_bpe()


@pytest.fixture
def wide_folder(tmp_path):
    model_cfg, state_dict = to_open_clip(wide_model())
    folder = tmp_path / "wide"
    folder.mkdir()
    save_file(state_dict, folder / "open_clip_model.safetensors")
    preprocess_cfg = {
        "mean": [0.1, 0.2, 0.3],
        "std": [0.4, 0.5, 0.6],
        "interpolation": "bilinear",
        "resize_mode": "squash",
    }
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg})
    )
    return folder


def test_the_processor_prepares_what_open_clip_prepares(clip_vocabulary, wide_folder, tmp_path):
    import open_clip

    convert(wide_folder, tmp_path / "out")
    processor = CocaProcessor.from_pretrained(tmp_path / "out")
    assert processor.tokenizer.model_max_length == 76
    texts = ["A cat's hat!", "two  DOGS & a café"]
    ids = processor.tokenizer(texts, padding="max_length", return_tensors="pt")["input_ids"]
    assert torch.equal(ids, open_clip.tokenizer.SimpleTokenizer(context_length=76)(texts))

    _, _, transform = open_clip.create_model_and_transforms(f"local-dir:{wide_folder}")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8))
    pixels = processor(images=[image], return_tensors="pt")["pixel_values"][0]
    assert torch.equal(pixels, transform(image))

    convert_to_open_clip(tmp_path / "out", tmp_path / "back")
    back, source = (
        json.loads((folder / "open_clip_config.json").read_text()) for folder in (tmp_path / "back", wide_folder)
    )
    assert back["model_cfg"] == source["model_cfg"]
    assert back["preprocess_cfg"].items() >= source["preprocess_cfg"].items()
    theirs, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'back'}")
    ours = CocaModel.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        expected = theirs.eval().encode_image(pixels[None])
        assert (ours(pixel_values=pixels[None]).image_embeds - expected).abs().max() <= 1e-6


def test_the_pipeline_opens_a_converted_folder(clip_vocabulary, wide_folder, tmp_path):
    from transformers import pipeline

    convert(wide_folder, tmp_path / "out")
    assert isinstance(AutoModelForImageTextToText.from_pretrained(tmp_path / "out"), CocaForConditionalGeneration)
    captioner = pipeline("image-text-to-text", str(tmp_path / "out"))
    assert isinstance(captioner(Image.new("RGB", (40, 40)), text="", max_new_tokens=3)[0]["generated_text"], str)


def test_tokenizers_of_other_vocabularies(checkpoint, wide_folder, tmp_path):
    source = checkpoint()
    found = convert(source, tmp_path / "without")
    assert found.warnings == [
        "There is no tokenizer beside the weights: pass `--tokenizer` with the one of 320 tokens that it was trained with."
    ]
    assert AutoImageProcessor.from_pretrained(tmp_path / "without").crop_size["height"] == 32

    tokenizer = CocaTokenizer().train_new_from_iterator(["a b c"], vocab_size=400)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    found = convert(wide_folder, tmp_path / "with", tokenizer=tmp_path / "tokenizer")
    processor = CocaProcessor.from_pretrained(tmp_path / "with")
    assert processor.tokenizer.get_vocab() == tokenizer.get_vocab()
    ids = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert f"BOS and EOS are taken from the tokenizer: {ids}" in found.warnings[0]
    model = CocaForConditionalGeneration.from_pretrained(tmp_path / "with")
    assert (model.generation_config.bos_token_id, model.config.text_config.eos_token_id) == ids

    with pytest.raises(ValueError, match=rf"has {len(tokenizer)} tokens, the model 320: give the one"):
        convert(source, tmp_path / "never", tokenizer=tmp_path / "tokenizer")
    with pytest.raises(FileNotFoundError, match=r"tokenizer .*nothing does not exist"):
        convert(source, tmp_path / "never", tokenizer=tmp_path / "nothing")
    assert not (tmp_path / "never").exists()


def test_conchs_tokenizer_is_a_json(checkpoint, sample, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    backend = Tokenizer(models.WordLevel({"<pad>": 0, "<start_of_text>": 1, "<end_of_text>": 2, "tumor": 3}, "<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(["<pad>", "<start_of_text>", "<end_of_text>"])
    backend.save(str(tmp_path / "conch_byte_level_bpe_uncased.json"))
    source = checkpoint("conch", config_file="config.json")
    convert(source, tmp_path / "out", tokenizer=tmp_path / "conch_byte_level_bpe_uncased.json")
    processor = CocaProcessor.from_pretrained(tmp_path / "out")
    assert processor.tokenizer.model_max_length == 11
    inputs = processor(text=["tumor tumor", "tumor"], return_tensors="pt")
    assert inputs["input_ids"].tolist() == [[3, 3], [0, 3]]
    model = CocaModel.from_pretrained(tmp_path / "out").eval()
    assert model(**inputs).text_embeds.shape == (2, 8)


# ---------------------------------------------------------------------------------------------------------------- files


def test_what_is_wrong_leaves_nothing_behind(checkpoint, tmp_path):
    source, out = checkpoint(), tmp_path / "place" / "out"
    for failing in ("report", "check"):
        with pytest.raises(RuntimeError, match="no"):
            convert(source, out, **{failing: lambda *args: (_ for _ in ()).throw(RuntimeError("no"))})
        assert not out.parent.exists() or not list(out.parent.iterdir())
    convert(source, out)
    with pytest.raises(FileExistsError, match="--overwrite"):
        convert(source, out)
    before = (out / "config.json").stat().st_mtime_ns
    with pytest.raises(RuntimeError, match="no"):
        convert(source, out, overwrite=True, check=lambda *args: (_ for _ in ()).throw(RuntimeError("no")))
    assert (out / "config.json").stat().st_mtime_ns == before
    convert(source, out, overwrite=True)
    assert (out / "config.json").stat().st_mtime_ns > before
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert out.stat().st_mode & 0o777 == source.stat().st_mode & 0o777

    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "love.txt").write_text("dear")
    with pytest.raises(FileExistsError, match="it holds no model"):
        convert(source, tmp_path / "letters", overwrite=True)
    with pytest.raises(FileExistsError):
        convert_to_open_clip(out, tmp_path / "letters")


def test_write_safetensors_is_read_by_safetensors(tmp_path):
    torch.manual_seed(0)
    tensors = {
        "half": torch.randn(3, 5).half(),
        "brain": torch.randn(7).bfloat16(),
        "scalar": torch.tensor(2.5),
        "transposed": torch.randn(4, 6).t(),
        "empty": torch.zeros(0, 3),
        "double": torch.randn(2, 2).double(),
    }
    specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    write_safetensors(tmp_path / "a.safetensors", specs, tensors.__getitem__)
    assert_same(load_file(tmp_path / "a.safetensors"), tensors)
    with pytest.raises(ValueError, match=r"half is torch\.float16 \(3, 5\) and was announced as torch\.float32"):
        write_safetensors(tmp_path / "b.safetensors", {"half": (torch.float32, (3, 5))}, tensors.__getitem__)


MEASURE = """
import json, resource, sys, torch
from safetensors.torch import save_file
from modeling_coca import CocaConfig, CocaForConditionalGeneration
from modeling_coca.conversion import convert, to_open_clip
step, file = sys.argv[1:]
if step == "make":
    size = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 8}
    text = {"num_multimodal_layers": 8, "shifted_cls_mask": True, "vocab_size": 1000, "bos_token_id": 998, "eos_token_id": 999}
    config = CocaConfig(
        vision_config={**size, "image_size": 32, "patch_size": 16}, text_config={**size, **text}, pooler_type="shared"
    )
    with torch.device("meta"):
        model_cfg, state_dict = to_open_clip(CocaForConditionalGeneration(config))
    state_dict = {name: torch.zeros(x.shape) for name, x in state_dict.items()}
    json.dump(model_cfg, open("open_clip_config.json", "w"))
    (save_file if file.endswith("safetensors") else torch.save)(state_dict, file)
else:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    convert(".", "out")
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of resident memory from Linux")
@pytest.mark.parametrize(
    "file", ["open_clip_pytorch_model.bin", pytest.param("open_clip_model.safetensors", marks=pytest.mark.slow)]
)
def test_memory_does_not_hold_the_checkpoint(tmp_path, file):
    """Peak of resident memory, which counts what is mapped of the files, above that of the imported libraries."""
    for step in ("make", "convert"):
        run = subprocess.run(
            [sys.executable, "-c", MEASURE, step, file],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, run.stderr
    size = (tmp_path / file).stat().st_size
    assert size > 400e6
    assert Weights([tmp_path / "out" / "model.safetensors"]).num_bytes == pytest.approx(size, rel=0.01)
    assert int(run.stdout.split()[-1]) < size  # one copy would be as much, and the mapped source again


# --------------------------------------------------------------------------------------------------------------- errors


def test_files_that_are_cut_off(checkpoint):
    for folder, name in enumerate(("open_clip_model.safetensors", "open_clip_pytorch_model.bin")):
        source = checkpoint(file=name, folder=str(folder))
        path = source / name
        for size in (path.stat().st_size // 2, 100, 4, 0):
            path.write_bytes(path.read_bytes()[:size])
            with pytest.raises(ValueError, match=f"{name}.*cut off"):
                open_checkpoint(source)


def test_pointers_of_git_lfs(checkpoint):
    source = checkpoint()
    (source / "open_clip_pytorch_model.bin").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    )
    with pytest.raises(ValueError, match="git lfs pull"):
        open_checkpoint(source)


class Payload:
    """Would create a file if it were unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_that_need_code_are_refused(checkpoint, sample, tmp_path, zipped):
    source, victim = checkpoint(), tmp_path / "victim"
    content = {"state_dict": sample("open_clip_default").state_dict, "hook": Payload(victim)}
    path = source / "open_clip_pytorch_model.bin"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"refused: more than tensors.*\(io\.open\).*save_file"):
        convert(source, tmp_path / "out")
    assert not victim.exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [b"<html>404</html>" * 9, bytes(100), b"", b"PK\x03\x04" + bytes(60)])
def test_files_that_are_no_weights(tmp_path, content):
    (tmp_path / "a.bin").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.bin .*bytes\) (cannot be read: it is cut off|is cut off)"):
        open_weights(tmp_path / "a.bin")


def test_old_pickles_that_are_cut_off(sample, tmp_path):
    path = tmp_path / "a.bin"
    torch.save(sample("open_clip_default").state_dict, path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    for size in (4, 40, 2000, len(whole) - 100):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"a\.bin"):
            open_weights(path)


def test_files_without_weights(tmp_path):
    for content, message in (
        ({"epoch": 3}, r"holds no tensors: its keys are \['epoch'\]"),
        ([torch.ones(1)], "holds a list and no state dict"),
    ):
        torch.save(content, tmp_path / "a.pt")
        with pytest.raises(ValueError, match=message):
            open_weights(tmp_path / "a.pt")


def test_folders_without_or_with_several_weights(checkpoint, tmp_path):
    source = checkpoint(file="epoch_1.pt")
    shutil.copy(source / "epoch_1.pt", source / "epoch_2.pt")
    with pytest.raises(
        FileNotFoundError, match=r"several weight files, name one of them: \['epoch_1\.pt', 'epoch_2\.pt'\]"
    ):
        open_checkpoint(source)
    assert open_checkpoint(source / "epoch_2.pt").their_config
    for path in source.glob("*.pt"):
        path.unlink()
    (source / "optimizer.bin").write_bytes(b"")
    with pytest.raises(
        FileNotFoundError, match=rf"holds no weights: one of {WEIGHT_FILES[0]}.*it holds \['open_clip_config"
    ):
        open_checkpoint(source)
    for name in ("./nothing", "/no/where/at/all", "nothing.pt", str(tmp_path / "none")):
        with pytest.raises(FileNotFoundError, match="does not exist"):
            open_checkpoint(name)


def test_wrong_json(checkpoint, sample, tmp_path):
    source = checkpoint()
    path = source / "open_clip_config.json"
    path.write_text('{"model_cfg": {\n  "embed_dim": 32,,\n}}')
    with pytest.raises(ValueError, match=r"open_clip_config\.json is no JSON: .*line 2"):
        open_checkpoint(source)
    path.write_text("[1, 2]")
    with pytest.raises(ValueError, match="must hold a JSON object, not a list"):
        open_checkpoint(source)
    path.write_text('{"hidden_size": 3}')
    with pytest.raises(ValueError, match=r"no config of open_clip: its keys are \['hidden_size'\].*--config"):
        open_checkpoint(source)
    found = open_checkpoint(source, config=sample("open_clip_default").config)
    assert found.config_origin == "as given"


def test_a_wrong_config_is_told_what_the_tensors_say(sample, tmp_path):
    model_cfg, state_dict = to_open_clip(wide_model())
    wrong = copy.deepcopy(model_cfg)
    wrong["text_cfg"]["context_length"] = 77  # a guess from the name context77
    wrong["vision_cfg"] |= {"layers": 2, "attn_pooler_queries": 100}
    torch.save(state_dict, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="does not fit") as error:
        convert(tmp_path / "a.pt", tmp_path / "out", config=wrong)
    message = str(error.value)
    assert "text.positional_embedding is (77, 64), the config asks for (78, 64)" in message
    assert "visual.transformer.resblocks.1.attn.in_proj_weight" in message
    assert message.split("What the tensors say:\n")[1].splitlines() == [
        "  `vision_cfg.layers` should be 1, the config says 2",
        "  `vision_cfg.attn_pooler_queries` should be 256, the config says 100",
        "  `text_cfg.context_length` should be 76, the config says 77",
    ]
    assert not (tmp_path / "out").exists()


def test_models_that_open_clip_cannot_take(sample, checkpoint, tmp_path):
    convert(checkpoint("conch", config_file="config.json"), tmp_path / "conch")
    with pytest.raises(ValueError, match="patch_bias"):
        convert_to_open_clip(tmp_path / "conch", tmp_path / "out")
    with pytest.raises(ValueError, match="no saved CoCa of this package"):
        convert_to_open_clip(tmp_path / "source", tmp_path / "out")
    with (
        pytest.raises(OSError, match="own layout already")
        if False
        else pytest.raises(ValueError, match="own layout already")
    ):
        convert(tmp_path / "conch", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tied_embeddings_are_written_for_open_clip(tmp_path):
    model = wide_model()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tmp_path / "ours")
    assert "lm_head.weight" not in load_file(tmp_path / "ours" / "model.safetensors")
    convert_to_open_clip(tmp_path / "ours", tmp_path / "theirs")
    assert_same(load_file(tmp_path / "theirs" / "open_clip_model.safetensors"), to_open_clip(model)[1])


# ------------------------------------------------------------------------------------------------------------- checking


def test_pictures_come_with_the_package():
    images = checking.pictures()
    assert [image.mode for image in images] == ["RGB"] * 3
    assert all(max(image.size) == 320 and np.asarray(image).std() > 30 for image in images)


@pytest.mark.parametrize("name", ["open_clip_default", "open_clip_no_pooler"])
def test_a_conversion_agrees_with_its_source(checkpoint, tmp_path, name):
    pytest.importorskip("open_clip")
    compared = []
    convert(checkpoint(name), tmp_path / "out", check=lambda *args: compared.extend(checking.check(*args)))
    assert [difference.what for difference in compared] == [
        *("pixels", "image embeddings", "text embeddings", "logits", "greedy tokens")
    ]
    assert all(difference.is_fine for difference in compared)
    assert compared[-1].largest == 0 and "tokens" in compared[-1].note


def test_a_wrong_conversion_is_noticed(checkpoint, tmp_path):
    pytest.importorskip("open_clip")
    source = checkpoint()
    found = convert(source, tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    state_dict = load_file(path)
    state_dict["text_decoder.final_layer_norm.weight"] *= -1
    state_dict["model.visual_projection.weight"][0] += 0.1
    save_file(state_dict, path, metadata={"format": "pt"})
    compared = {difference.what: difference for difference in checking.check(found, tmp_path / "out")}
    wrong = {what for what, difference in compared.items() if not difference.is_fine}
    assert wrong == {"image embeddings", "logits", "greedy tokens"}


def test_checking_needs_the_library(checkpoint, monkeypatch):
    found = open_checkpoint(checkpoint())
    monkeypatch.setitem(sys.modules, "open_clip.coca_model", None)
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ImportError, match="install open_clip_torch"):
        checking.rebuild(found)


def test_fewer_bits_are_compared_less_strictly(checkpoint, tmp_path):
    pytest.importorskip("open_clip")
    found = convert(checkpoint(), tmp_path / "out", dtype=torch.bfloat16)
    compared = checking.check(found, Path(tmp_path / "out"))
    assert all(difference.is_fine for difference in compared)
    assert max(difference.largest for difference in compared if difference.what.endswith("embeddings")) > 1e-4
