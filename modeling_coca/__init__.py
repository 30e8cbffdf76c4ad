"""CoCa (Contrastive Captioners, arXiv 2205.01917) for Hugging Face transformers.

`import modeling_coca` is all that `AutoModel`, `AutoProcessor`, `pipeline` and the rest need to know CoCa. Public names
are loaded on first use. Sub-packages are imported by name: `modeling_coca.conversion`, `modeling_coca.training`, ...
"""

import importlib
import importlib.abc
import importlib.machinery
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .configuration_coca import CocaConfig, CocaTextConfig, CocaVisionConfig
    from .image_processing_coca import CocaImageProcessor
    from .image_processing_pil_coca import CocaImageProcessorPil
    from .modeling_coca import (
        CocaForConditionalGeneration,
        CocaForImageClassification,
        CocaForVisualQuestionAnswering,
        CocaModel,
        CocaPreTrainedModel,
        CocaTextModel,
        CocaVisionModel,
    )
    from .pipeline_coca import CocaImageCaptioningPipeline, CocaVisualQuestionAnsweringPipeline
    from .processing_coca import CocaProcessor
    from .tokenization_coca import CocaTokenizer

__version__ = "0.1.0"

_MODULES = {
    "configuration_coca": ["CocaConfig", "CocaTextConfig", "CocaVisionConfig"],
    "image_processing_coca": ["CocaImageProcessor"],
    "image_processing_pil_coca": ["CocaImageProcessorPil"],
    "modeling_coca": [
        "CocaForConditionalGeneration",
        "CocaForImageClassification",
        "CocaForVisualQuestionAnswering",
        "CocaModel",
        "CocaPreTrainedModel",
        "CocaTextModel",
        "CocaVisionModel",
    ],
    "pipeline_coca": ["CocaImageCaptioningPipeline", "CocaVisualQuestionAnsweringPipeline"],
    "processing_coca": ["CocaProcessor"],
    "tokenization_coca": ["CocaTokenizer"],
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

# Auto class -> model type -> name of the class that it loads
_AUTO_MODELS = {
    "AutoModel": {"coca": "CocaModel", "coca_vision_model": "CocaVisionModel", "coca_text_model": "CocaTextModel"},
    "AutoModelForImageClassification": {"coca": "CocaForImageClassification"},
    "AutoModelForImageTextToText": {"coca": "CocaForConditionalGeneration"},
    "AutoModelForMultimodalLM": {"coca": "CocaForConditionalGeneration"},
    "AutoModelForVisualQuestionAnswering": {"coca": "CocaForVisualQuestionAnswering"},
    "AutoModelForZeroShotImageClassification": {"coca": "CocaModel"},
}
_IMAGE_PROCESSORS = {"torchvision": "CocaImageProcessor", "pil": "CocaImageProcessorPil"}

__all__ = ["__version__", *sorted(_MODULE_OF)]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _register_names() -> None:
    """Enters CoCa into the Auto classes' tables by name, as transformers does with its own models.

    The public `AutoModel.register` takes a class, so that all of the modelling code would be imported here and now, and
    `import modeling_coca` take nearly twice as long. The tables hold names and look them up, on first use, in a
    sub-module of `transformers.models`; this package stands in for one. The pipelines read the same tables to know what
    they support.
    """
    from transformers.models.auto import (
        auto_factory,
        auto_mappings,
        configuration_auto,
        modeling_auto,
        tokenization_auto,
    )

    from .configuration_coca import CocaConfig, CocaTextConfig, CocaVisionConfig

    lazy_mapping, module_names = auto_factory._LazyAutoMapping, configuration_auto.SPECIAL_MODEL_TYPE_TO_MODULE_NAME
    models = {
        auto_class: getattr(modeling_auto, auto_class)._model_mapping._model_mapping for auto_class in _AUTO_MODELS
    }
    tokenizers = tokenization_auto.TOKENIZER_MAPPING_NAMES
    processors, image_processors = auto_mappings.PROCESSOR_MAPPING_NAMES, auto_mappings.IMAGE_PROCESSOR_MAPPING_NAMES
    mappings = [
        value
        for module_name, module in list(sys.modules.items())
        if module_name.startswith("transformers.models.auto.")
        for value in vars(module).values()
        if isinstance(value, lazy_mapping)
    ]
    reverse_config_names = [mapping._reverse_config_mapping for mapping in mappings]

    # Nothing above changes anything: where transformers has renamed a table, `_register_classes` finds all as it was.
    sys.modules[f"transformers.models.{__name__}"] = sys.modules[__name__]
    for config_class in (CocaConfig, CocaTextConfig, CocaVisionConfig):
        module_names[config_class.model_type] = __name__
        configuration_auto.CONFIG_MAPPING_NAMES[config_class.model_type] = config_class.__name__
        for names in reverse_config_names:  # those that exist; later ones are built from CONFIG_MAPPING_NAMES
            names[config_class.__name__] = config_class.model_type
    for auto_class, classes in _AUTO_MODELS.items():
        models[auto_class].update(classes)
    tokenizers["coca"] = "CocaTokenizer"
    processors["coca"] = "CocaProcessor"
    image_processors["coca"] = dict(_IMAGE_PROCESSORS)


def _register_classes() -> None:
    """Registers the classes themselves, through the public API of any transformers."""
    import transformers
    from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer
    from transformers.utils import is_torchvision_available

    from . import configuration_coca

    configs = {config.model_type: config for config in map(configuration_coca.__dict__.get, configuration_coca.__all__)}
    for auto_class, classes in _AUTO_MODELS.items():
        for model_type, name in classes.items():
            getattr(transformers, auto_class).register(configs[model_type], __getattr__(name), exist_ok=True)
    AutoTokenizer.register(configs["coca"], tokenizer_class=__getattr__("CocaTokenizer"), exist_ok=True)
    AutoProcessor.register(configs["coca"], __getattr__("CocaProcessor"), exist_ok=True)
    backends = ["pil", "torchvision"] if is_torchvision_available() else ["pil"]
    image_processors = {backend: __getattr__(_IMAGE_PROCESSORS[backend]) for backend in backends}
    AutoImageProcessor.register(configs["coca"], image_processor_classes=image_processors, exist_ok=True)


class _PipelinesWatcher(importlib.abc.MetaPathFinder):
    """Imports `pipeline_coca`, which registers its tasks, after `transformers.pipelines`: that takes as long as all else."""

    def find_spec(self, name, path=None, target=None):
        if name != "transformers.pipelines":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None:
            exec_module = spec.loader.exec_module

            def exec_both(module: ModuleType) -> None:
                exec_module(module)
                importlib.import_module(".pipeline_coca", __name__)

            spec.loader.exec_module = exec_both
        return spec


try:
    _register_names()
except (AttributeError, ImportError):
    _register_classes()

if "transformers.pipelines" in sys.modules:
    importlib.import_module(".pipeline_coca", __name__)
else:
    sys.meta_path.insert(0, _PipelinesWatcher())
