"""Saving and loading each public class; folders that bring their code along, opened where the package is missing."""

import json
import os
import sys

import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from PIL import Image
from transformers import AutoConfig, AutoProcessor, AutoTokenizer, pipeline
from transformers.dynamic_module_utils import get_imports

import modeling_coca
from modeling_coca import (
    CocaForConditionalGeneration,
    CocaForImageClassification,
    CocaForVisualQuestionAnswering,
    CocaModel,
    CocaTextModel,
    CocaVisionModel,
)
from modeling_coca.hub import export_to_folder

CLASSES = [
    CocaForConditionalGeneration,
    CocaForImageClassification,
    CocaForVisualQuestionAnswering,
    CocaModel,
    CocaTextModel,
    CocaVisionModel,
]
LABELS = {"id2label": {0: "fox", 1: "owl", 2: "cat"}, "label2id": {"fox": 0, "owl": 1, "cat": 2}}
IMAGE = Image.effect_noise((40, 50), 90).convert("RGB")


def build(model_class, config, **changes):
    config = config(**changes)
    parts = {CocaTextModel: config.text_config, CocaVisionModel: config.vision_config}
    return model_class(parts.get(model_class, config)).eval()


def inputs_of(model, processor):
    inputs = processor(images=[IMAGE], text=["a fox"], return_tensors="pt")
    if "image" not in model.input_modalities:
        del inputs["pixel_values"]
    if "text" not in model.input_modalities:
        inputs = {"pixel_values": inputs["pixel_values"]}
    return dict(inputs)


def outputs_of(model, inputs):
    with torch.no_grad():
        return [value for value in model(**inputs, return_dict=True).to_tuple() if isinstance(value, torch.Tensor)]


def equal(left, right):
    """To the last bits, which depend on where in memory a file's weights lie."""
    pairs = zip(left, right, strict=True)
    return all(torch.allclose(a, b, rtol=1e-6, atol=1e-6) for a, b in pairs)


def settings(config):
    """What config.json says. A loaded config says of its parts, too, in which precision they were saved."""
    content = json.loads(config.to_json_string())
    for part in (content, *content.values()):
        if isinstance(part, dict):
            part.pop("dtype", None)
    return content


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---------------------------------------------------------------------------------- save_pretrained, from_pretrained


@pytest.mark.parametrize("max_shard_size", ["1GB", "50KB"], ids=["one file", "shards"])
@pytest.mark.parametrize("model_class", CLASSES)
def test_saved_models_load(model_class, max_shard_size, config, processor, tmp_path):
    model = build(model_class, config, **LABELS)
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    shards = len(list(tmp_path.glob("*.safetensors")))
    assert (shards > 1) == (max_shard_size == "50KB")
    loaded, report = model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert settings(loaded.config) == settings(model.config)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())
    inputs = inputs_of(model, processor)
    assert equal(outputs_of(loaded, inputs), outputs_of(model, inputs))


@pytest.mark.parametrize(
    ("auto_class", "name"),
    [
        (auto_class, name)
        for auto_class, classes in modeling_coca._AUTO_MODELS.items()
        for model_type, name in classes.items()
    ],
)
def test_auto_classes_open_exported_folders(auto_class, name, config, processor, tmp_path):
    model = build(getattr(modeling_coca, name), config, **LABELS)
    export_to_folder(model, processor, tmp_path / "model")
    loaded = getattr(transformers, auto_class).from_pretrained(tmp_path / "model")
    assert type(loaded) is type(model)  # the package's, although code lies beside
    inputs = inputs_of(model, processor)
    assert equal(outputs_of(loaded, inputs), outputs_of(model, inputs))


# ------------------------------------------------------------------------------------------------------------- export


@pytest.fixture(scope="module")
def exported(config, processor, tmp_path_factory):
    torch.manual_seed(0)
    model = build(CocaForConditionalGeneration, config)
    return export_to_folder(model, processor, tmp_path_factory.mktemp("exported") / "coca-fox")


def test_an_exported_folder_holds_code_and_where_to_find_it(exported):
    config = json.loads((exported / "config.json").read_text())
    assert config["auto_map"].keys() == {"AutoConfig", *modeling_coca._AUTO_MODELS}
    assert config["custom_pipelines"].keys() == {"image-captioning", "coca-vqa"}
    references = [*config["auto_map"].values(), *(task["impl"] for task in config["custom_pipelines"].values())]
    processor = json.loads((exported / "processor_config.json").read_text())
    references += [processor["auto_map"]["AutoProcessor"]]
    references += processor["image_processor"]["auto_map"]["AutoImageProcessor"].values()
    references += [json.loads((exported / "tokenizer_config.json").read_text())["auto_map"]["AutoTokenizer"][0]]
    for reference in references:
        module, name = reference.split(".")
        assert modeling_coca._MODULE_OF[name] == module and f"class {name}" in (exported / f"{module}.py").read_text()


def test_code_that_travels_needs_what_transformers_needs(exported):
    needed = {name for file in exported.glob("*.py") for name in get_imports(file)}
    third_party = needed - sys.stdlib_module_names
    assert third_party == {"PIL", "huggingface_hub", "numpy", "tokenizers", "torch", "transformers"}


def test_the_package_comes_before_the_code_in_the_folder(exported, tmp_path):
    model = CocaForConditionalGeneration.from_pretrained(exported)
    captioner = pipeline("image-captioning", model=str(exported))  # asks for no trust
    assert type(captioner).__module__ == "modeling_coca.pipeline_coca"
    loaded = AutoProcessor.from_pretrained(exported)
    assert type(loaded) is modeling_coca.CocaProcessor
    # and what is saved from it does not speak of code that is not there
    model.save_pretrained(tmp_path)
    loaded.save_pretrained(tmp_path)
    assert "auto_map" not in AutoConfig.from_pretrained(tmp_path).to_dict()
    assert "auto_map" not in json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert type(AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=True)) is modeling_coca.CocaTokenizer


def test_export_replaces_an_earlier_one_and_leaves_other_files(config, processor, tmp_path):
    model = build(CocaForConditionalGeneration, config)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    export_to_folder(model, processor, folder, max_shard_size="100KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    for card in (ModelCard("---\nlicense: mit\n---\n# Fox\n"), None):  # the card stays, too
        export_to_folder(model, processor, folder, card)
        assert [path.name for path in folder.glob("model*.safetensors*")] == ["model.safetensors"]
        assert (folder / "notes.txt").read_text() == "mine"
        assert (folder / "README.md").read_text().endswith("# Fox\n")
        assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_export_that_fails_leaves_the_earlier_one(config, processor, tmp_path, monkeypatch):
    folder = tmp_path / "model"
    model = build(CocaForConditionalGeneration, config)
    export_to_folder(model, processor, folder)
    before = contents(folder)
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    with monkeypatch.context() as patch:
        patch.setattr(type(processor), "save_pretrained", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            export_to_folder(model, processor, folder)
    assert contents(folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_export_says_what_is_wrong(config, processor, tmp_path):
    model = build(CocaForConditionalGeneration, config)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="`folder` must be a folder"):
        export_to_folder(model, processor, tmp_path / "file")
    size = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "image_size": 32}
    tower = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**size))
    with pytest.raises(ValueError, match="`model` must be one of this package, got CLIPVisionModel"):
        export_to_folder(tower, None, tmp_path / "tower")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_new_folders_can_be_read_by_others(exported):
    umask = os.umask(0)
    os.umask(umask)
    assert exported.stat().st_mode & 0o777 == 0o777 & ~umask


# --------------------------------------------------------------------------------------- where the package is missing

# Opens folders with all the Auto classes, and prints the names of what came
WITHOUT_PACKAGE = """
import json, sys, warnings
import torch, transformers
from PIL import Image

transformers.utils.logging.disable_progress_bar()
captions, answers, labels, tower, data = sys.argv[1:]
expected = torch.load(data)
trust = {"trust_remote_code": True}
image = Image.open(captions + "/image.png")


def check(model, name):
    inputs, outputs = expected[name]
    with torch.no_grad():
        got = [value for value in model(**inputs, return_dict=True).to_tuple() if isinstance(value, torch.Tensor)]
    assert all(torch.allclose(a, b, rtol=1e-6, atol=1e-6) for a, b in zip(got, outputs, strict=True)), name
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    return type(model).__name__


def auto(name, folder, **kwargs):
    return getattr(transformers, name).from_pretrained(folder, **trust, **kwargs)


try:
    transformers.AutoModel.from_pretrained(captions, trust_remote_code=False)
    raise SystemExit("untrusted code was run")
except ValueError as error:
    assert "trust_remote_code=True" in str(error)

found = [
    check(auto("AutoModel", captions), "CocaModel"),
    check(auto("AutoModelForZeroShotImageClassification", captions), "CocaModel"),
    check(auto("AutoModelForImageTextToText", captions), "CocaForConditionalGeneration"),
    check(auto("AutoModelForMultimodalLM", captions), "CocaForConditionalGeneration"),
    check(auto("AutoModelForVisualQuestionAnswering", answers), "CocaForVisualQuestionAnswering"),
    check(auto("AutoModelForImageClassification", labels), "CocaForImageClassification"),
    check(auto("AutoModel", tower), "CocaVisionModel"),
]
processor = auto("AutoProcessor", captions)
for part in (
    auto("AutoConfig", captions),
    processor,
    processor.tokenizer,
    processor.image_processor,
    auto("AutoTokenizer", captions),
    auto("AutoImageProcessor", captions, backend="torchvision"),
    auto("AutoImageProcessor", captions, backend="pil"),
    auto("AutoImageProcessor", labels, backend="pil"),
):
    assert type(part).__module__.startswith("transformers_modules."), type(part)
    found.append(type(part).__name__)
inputs = processor(images=[image], text=["a fox"], return_tensors="pt")
assert all(torch.equal(inputs[name], value) for name, value in expected["inputs"].items())


def run(task, folder, *args, **kwargs):
    return transformers.pipeline(task, model=folder, **trust)(*args, **kwargs)


short = {"max_new_tokens": 4}
results = {
    "image-captioning": run("image-captioning", captions, image, **short),
    "coca-vqa": run("coca-vqa", captions, image, "a fox", **short),
    "coca-vqa from a list": run("coca-vqa", answers, image, "a fox", top_k=2),
    "image-text-to-text": run("image-text-to-text", captions, image, text="a fox", **short),
    "zero-shot": run("zero-shot-image-classification", captions, image, ["fox", "owl"]),
    "image-classification": run("image-classification", labels, image),
    "feature-extraction": run("feature-extraction", captions, "a fox"),
    "image-feature-extraction": run("image-feature-extraction", captions, image),
}

# what is trained further there, or saved by a pipeline, brings its code along, too
auto("AutoModelForImageTextToText", captions).save_pretrained("again")
processor.save_pretrained("again")
check(auto("AutoModelForImageTextToText", "again"), "CocaForConditionalGeneration")
assert auto("AutoProcessor", "again")(text=["a fox"])["input_ids"] == inputs["input_ids"].tolist()
transformers.pipeline("coca-vqa", model=answers, **trust).save_pretrained("pipe")
assert run("coca-vqa", "pipe", image, "a fox", top_k=2) == results["coca-vqa from a list"]

print(json.dumps([found, results]))
"""


def test_exported_folders_open_without_the_package(exported, config, processor, tmp_path, run_python):
    models = {
        "CocaForConditionalGeneration": CocaForConditionalGeneration.from_pretrained(exported),
        "CocaModel": CocaModel.from_pretrained(exported),
        "CocaForVisualQuestionAnswering": build(CocaForVisualQuestionAnswering, config, **LABELS),
        "CocaForImageClassification": build(CocaForImageClassification, config, **LABELS),
        "CocaVisionModel": build(CocaVisionModel, config),
    }
    folders = [
        exported,
        export_to_folder(models["CocaForVisualQuestionAnswering"], processor, tmp_path / "answers"),
        export_to_folder(models["CocaForImageClassification"], processor.image_processor, tmp_path / "labels"),
        export_to_folder(models["CocaVisionModel"], None, tmp_path / "tower"),
    ]
    expected = {
        name: (inputs_of(model, processor), outputs_of(model, inputs_of(model, processor)))
        for name, model in models.items()
    }
    expected["inputs"] = dict(processor(images=[IMAGE], text=["a fox"], return_tensors="pt"))
    torch.save(expected, tmp_path / "expected.pt")
    IMAGE.save(exported / "image.png")

    output = run_python(WITHOUT_PACKAGE, *folders, tmp_path / "expected.pt", package=False)
    found, results = json.loads(output.splitlines()[-1])
    assert found == [
        "CocaModel",
        "CocaModel",
        "CocaForConditionalGeneration",
        "CocaForConditionalGeneration",
        "CocaForVisualQuestionAnswering",
        "CocaForImageClassification",
        "CocaVisionModel",
        "CocaConfig",
        "CocaProcessor",
        "CocaTokenizer",
        "CocaImageProcessor",
        "CocaTokenizer",
        "CocaImageProcessor",
        "CocaImageProcessorPil",
        "CocaImageProcessorPil",
    ]
    short = {"max_new_tokens": 4}

    def run(task, folder, *args, **kwargs):
        return pipeline(task, model=str(folder))(*args, **kwargs)

    here = {
        "image-captioning": run("image-captioning", exported, IMAGE, **short),
        "coca-vqa": run("coca-vqa", exported, IMAGE, "a fox", **short),
        "coca-vqa from a list": run("coca-vqa", folders[1], IMAGE, "a fox", top_k=2),
        "image-text-to-text": run("image-text-to-text", exported, IMAGE, text="a fox", **short),
        "zero-shot": run("zero-shot-image-classification", exported, IMAGE, ["fox", "owl"]),
        "image-classification": run("image-classification", folders[2], IMAGE),
        "feature-extraction": run("feature-extraction", exported, "a fox"),
        "image-feature-extraction": run("image-feature-extraction", exported, IMAGE),
    }
    assert results == here
