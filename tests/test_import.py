"""`import modeling_coca`: what it brings in, how long it takes, and what the Auto classes know afterwards."""

import ast
import json
import logging
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
from PIL import Image
from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer, pipeline

import modeling_coca
from modeling_coca import (
    CocaForConditionalGeneration,
    CocaImageProcessor,
    CocaImageProcessorPil,
    CocaModel,
    CocaProcessor,
    CocaTokenizer,
)

AUTO_MODELS = [
    ("AutoModel", None, "CocaModel"),
    ("AutoModel", "vision_config", "CocaVisionModel"),
    ("AutoModel", "text_config", "CocaTextModel"),
    ("AutoModelForImageClassification", None, "CocaForImageClassification"),
    ("AutoModelForImageTextToText", None, "CocaForConditionalGeneration"),
    ("AutoModelForMultimodalLM", None, "CocaForConditionalGeneration"),
    ("AutoModelForVisualQuestionAnswering", None, "CocaForVisualQuestionAnswering"),
    ("AutoModelForZeroShotImageClassification", None, "CocaModel"),
]

# Prints the class names that every Auto class finds, given the path of a config
LOOK_UP = """
import json, sys
import transformers
from transformers import AutoConfig, AutoImageProcessor, AutoProcessor, AutoTokenizer
config = AutoConfig.from_pretrained(sys.argv[1])
names = []
for auto_class, part, _ in json.loads(sys.argv[2]):
    part_config = getattr(config, part) if part else config
    names.append(getattr(transformers, auto_class)._model_mapping[type(part_config)].__name__)
names.append(transformers.models.auto.tokenization_auto.TOKENIZER_MAPPING[type(config)].__name__)
names.append(transformers.models.auto.processing_auto.PROCESSOR_MAPPING[type(config)].__name__)
names.append(AutoImageProcessor.from_pretrained(sys.argv[1], backend="pil").__class__.__name__)
names.append(AutoImageProcessor.from_pretrained(sys.argv[1], backend="torchvision").__class__.__name__)
print(json.dumps(names))
"""
FOUND = [name for _, _, name in AUTO_MODELS] + [
    "CocaTokenizer",
    "CocaProcessor",
    "CocaImageProcessorPil",
    "CocaImageProcessor",
]


def run_python(code: str, *args: str) -> str:
    """Runs `code` in a new process and returns the last line that it printed."""
    result = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip().splitlines()[-1] if result.stdout.strip() else ""


def look_up(tiny_config, tmp_path, before: str) -> list[str]:
    tiny_config().save_pretrained(tmp_path)
    (tmp_path / "processor_config.json").write_text(
        json.dumps({"image_processor": {"image_processor_type": "CocaImageProcessor"}})
    )
    return json.loads(run_python(before + LOOK_UP, str(tmp_path), json.dumps(AUTO_MODELS)))


def test_import_leaves_heavy_modules_alone():
    loaded = json.loads(run_python("import json, sys, modeling_coca; print(json.dumps(sorted(sys.modules)))"))
    heavy = {"accelerate", "datasets", "faiss", "open_clip", "pandas", "scipy", "sklearn", "timm", "torchvision"}
    heavy.add("transformers.pipelines")  # half of the modules of transformers
    assert heavy.isdisjoint(loaded)
    # the network, text and image modules come with the first name that needs them
    assert [name for name in loaded if name.startswith("modeling_coca")] == [
        "modeling_coca",
        "modeling_coca.configuration_coca",
    ]


def processor_seconds(code: str) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run_python(code)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.slow
def test_import_takes_no_longer_than_importing_clip():
    clip = min(processor_seconds("from transformers import CLIPModel") for _ in range(3))
    coca = min(processor_seconds("import modeling_coca") for _ in range(3))
    print(f"from transformers import CLIPModel {clip:.2f} s, import modeling_coca {coca:.2f} s")
    assert coca <= clip


def test_public_names_load_and_others_raise():
    for name in modeling_coca.__all__:
        assert getattr(modeling_coca, name) is not None
    assert set(modeling_coca.__all__) <= set(dir(modeling_coca))
    assert modeling_coca.CocaModel is CocaModel
    with pytest.raises(AttributeError, match="no attribute 'CocaMissing'"):
        _ = modeling_coca.CocaMissing


def test_type_checkers_see_the_names_that_are_loaded_lazily():
    tree = ast.parse(Path(modeling_coca.__file__).read_text(encoding="utf-8"))
    block = next(n for n in tree.body if isinstance(n, ast.If) and getattr(n.test, "id", "") == "TYPE_CHECKING")
    static = {statement.module: sorted(alias.name for alias in statement.names) for statement in block.body}
    assert static == {module: sorted(names) for module, names in modeling_coca._MODULES.items()}


@pytest.mark.parametrize(("auto_class", "part", "name"), AUTO_MODELS)
def test_auto_models_build_our_classes(tiny_config, auto_class, part, name):
    config = tiny_config()
    model = getattr(transformers, auto_class).from_config(getattr(config, part) if part else config)
    assert type(model) is getattr(modeling_coca, name)


def test_auto_classes_that_were_imported_first_know_coca_too(tiny_config, tmp_path):
    before = (
        "from transformers import AutoImageProcessor, AutoModel, AutoModelForImageTextToText, AutoProcessor, pipeline\n"
        "import modeling_coca"
    )
    assert look_up(tiny_config, tmp_path, before) == FOUND


def test_auto_classes_that_are_imported_afterwards_know_coca(tiny_config, tmp_path):
    assert look_up(tiny_config, tmp_path, "import modeling_coca") == FOUND


def test_classes_are_registered_where_transformers_has_other_tables(tiny_config, tmp_path):
    before = (
        "from transformers import AutoProcessor, pipeline\n"
        "from transformers.models.auto import auto_mappings\n"
        "del auto_mappings.PROCESSOR_MAPPING_NAMES\n"
        "import sys, modeling_coca\n"
        "assert 'modeling_coca.modeling_coca' in sys.modules\n"
        "assert 'transformers.models.modeling_coca' not in sys.modules"
    )
    assert look_up(tiny_config, tmp_path, before) == FOUND


@pytest.mark.parametrize(
    "before",
    [
        "import modeling_coca",
        "import transformers.pipelines, modeling_coca",
        "from modeling_coca import CocaImageCaptioningPipeline",
        "import modeling_coca.pipeline_coca",
    ],
)
def test_own_tasks_are_registered_whatever_is_imported_first(before):
    code = (
        "import json\n"
        "from transformers.pipelines import PIPELINE_REGISTRY\n"
        "tasks = [PIPELINE_REGISTRY.check_task(task)[1] for task in ('image-captioning', 'coca-vqa')]\n"
        "print(json.dumps([task['impl'].__name__ for task in tasks]))"
    )
    names = json.loads(run_python(f"{before}\n{code}"))
    assert names == ["CocaImageCaptioningPipeline", "CocaVisualQuestionAnsweringPipeline"]


@pytest.fixture(scope="module")
def saved_model(tiny_config, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    tokenizer = CocaTokenizer(model_max_length=16).train_new_from_iterator(
        ["a red fox", "a blue whale"], vocab_size=430
    )
    image_processor = CocaImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CocaProcessor(image_processor, tokenizer).save_pretrained(folder)
    CocaForConditionalGeneration(tiny_config()).save_pretrained(folder)
    return folder


def test_auto_processors_load_our_classes(saved_model):
    processor = AutoProcessor.from_pretrained(saved_model)
    assert (type(processor), type(processor.tokenizer)) == (CocaProcessor, CocaTokenizer)
    assert type(AutoTokenizer.from_pretrained(saved_model)) is CocaTokenizer
    assert type(AutoImageProcessor.from_pretrained(saved_model)) is CocaImageProcessor
    assert type(AutoImageProcessor.from_pretrained(saved_model, backend="pil")) is CocaImageProcessorPil


@pytest.mark.parametrize(
    ("task", "inputs"),
    [
        ("image-text-to-text", {"text": "", "max_new_tokens": 3}),
        ("zero-shot-image-classification", {"candidate_labels": ["fox", "whale"], "hypothesis_template": "a {}"}),
        ("image-feature-extraction", {}),
    ],
)
def test_pipelines_load_coca_without_complaint(saved_model, task, inputs, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    pipe = pipeline(task, model=str(saved_model))
    assert pipe.model.config.model_type == "coca"
    assert pipe(Image.new("RGB", (40, 32), "red"), **inputs)
    assert "not supported" not in caplog.text
