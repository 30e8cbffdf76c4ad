"""A model, its processor, their code and a card in one folder, which `trust_remote_code=True` opens anywhere."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi, ModelCard
from transformers import PreTrainedModel, ProcessorMixin
from transformers.dynamic_module_utils import get_relative_import_files

import modeling_coca

from ..pipeline_coca import CocaImageCaptioningPipeline, CocaVisualQuestionAnsweringPipeline
from ..saving import new_folder
from .model_card import model_card

PACKAGE = Path(modeling_coca.__file__).parent
PIPELINES = {
    "image-captioning": CocaImageCaptioningPipeline,
    "coca-vqa": CocaVisualQuestionAnsweringPipeline,
}
# Of an earlier, larger model: `from_pretrained` would take them, or a user download them in vain
STALE = ("model*.safetensors", "model*.safetensors.index.json", "chat_template.jinja")


def export_to_folder(
    model: PreTrainedModel,
    processor: ProcessorMixin | Any | None,
    folder: str | os.PathLike,
    card: ModelCard | None = None,
    **kwargs: Any,
) -> Path:
    """
    Saves a model for those who do not have this package: beside what `save_pretrained` writes, the folder holds the code
    of model, processor and pipelines, and the entries by which the Auto classes and `pipeline` find it with
    `trust_remote_code=True`. Where the package is installed the folder is opened by the package's code.

    All is written beside the folder first and takes its place when it is complete. Other files in the folder stay.

    Args:
        model (`PreTrainedModel`): any model of this package.
        processor (*optional*): a [`CocaProcessor`], or only an image processor or a tokenizer.
        folder (`str` or `os.PathLike`): where to; it is made if it is not there.
        card (`ModelCard`, *optional*): the folder's README.md; without one a [`model_card`] where there is no README.md yet.
        **kwargs: of `model.save_pretrained`, e.g. `max_shard_size="2GB"`.

    Returns:
        `Path`: the folder.

    Example:

    ```python
    >>> from modeling_coca.hub import export_to_folder

    >>> export_to_folder(model, processor, "my-coca")  # doctest: +SKIP
    >>> # elsewhere, with transformers alone:
    >>> from transformers import AutoModelForImageTextToText, pipeline

    >>> model = AutoModelForImageTextToText.from_pretrained("my-coca", trust_remote_code=True)  # doctest: +SKIP
    >>> captioner = pipeline("image-captioning", model="my-coca", trust_remote_code=True)  # doctest: +SKIP
    ```
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"`folder` must be a folder, and {str(folder)!r} is a file.")
    with new_folder(folder, keep=lambda name: not any(fnmatch(name, pattern) for pattern in STALE)) as written:
        model.save_pretrained(written, **kwargs)
        modules = _add_model_entries(model, written)
        if processor is not None:
            processor.save_pretrained(written)
            modules |= _add_processor_entries(written)
        for module in modules:
            file = PACKAGE / f"{module}.py"
            for source in {str(file), *get_relative_import_files(file)}:
                shutil.copyfile(source, written / Path(source).name)
        if card is None and not (folder / "README.md").exists():
            card = model_card(model, folder.name, with_code=True)
        if card is not None:
            card.save(written / "README.md")
    return folder


def push_to_hub(
    model: PreTrainedModel,
    processor: ProcessorMixin | Any | None,
    repo_id: str,
    card: ModelCard | None = None,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Upload CoCa with its code",
    **kwargs: Any,
) -> CommitInfo:
    """
    [`export_to_folder`], and the folder to the Hugging Face Hub in one commit: a push that fails half-way leaves the
    repository as it was. Weights of an earlier push that this one does not have are deleted.

    Args:
        model, processor, card, **kwargs: see [`export_to_folder`].
        repo_id (`str`): `"name"` or `"organization/name"`; the repository is made if it is not there.
        private (`bool`, *optional*): of a new repository.
        token (`str` or `bool`, *optional*): defaults to the one of `hf auth login`.
        revision (`str`, *optional*): branch, `main` by default.
        create_pr (`bool`, defaults to `False`): open a pull request instead of committing.
        commit_message (`str`): first line of the commit.

    Returns:
        `CommitInfo`: of the new commit.
    """
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    keeps_card = card is None and api.file_exists(repo_id, "README.md", revision=revision)
    card = card or model_card(model, repo_id, with_code=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = export_to_folder(model, processor, Path(temporary) / "model", card, **kwargs)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message,
            ignore_patterns=["README.md"] if keeps_card else None,
            delete_patterns=list(STALE),
        )


def _reference(name: str) -> str:
    """`CocaModel` -> `modeling_coca.CocaModel`, the form of `auto_map`."""
    return f"{modeling_coca._MODULE_OF[name]}.{name}"


def _is_ours(instance: Any) -> bool:
    return type(instance).__name__ in modeling_coca._MODULE_OF


def _update_json(file: Path, update: Callable[[dict], None]) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    update(content)
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _add_model_entries(model: PreTrainedModel, folder: Path) -> set[str]:
    """Enters code into config.json, and returns the modules that hold it."""
    model_type = model.config.model_type
    if not _is_ours(model):
        raise ValueError(f"`model` must be one of this package, got {type(model).__name__}: save that by itself.")
    auto_map = {"AutoConfig": _reference(type(model.config).__name__)}
    for auto_class, classes in modeling_coca._AUTO_MODELS.items():
        if model_type in classes:
            auto_map[auto_class] = _reference(classes[model_type])
    tasks = {
        task: {
            "impl": _reference(pipeline_class.__name__),
            "pt": [pipeline_class.auto_classes[type(model).__name__]],
            "type": "multimodal",
        }
        for task, pipeline_class in PIPELINES.items()
        if type(model).__name__ in pipeline_class.auto_classes
    }
    _update_json(
        folder / "config.json",
        lambda config: config.update({"auto_map": auto_map, **({"custom_pipelines": tasks} if tasks else {})}),
    )
    references = [*auto_map.values(), *(task["impl"] for task in tasks.values())]
    return {reference.split(".")[0] for reference in references}


def _add_processor_entries(folder: Path) -> set[str]:
    """Enters code into the files of processor, image processor and tokenizer, and returns the modules that hold it."""
    modules: set[str] = set()

    def add(section: dict[str, Any], field: str, auto_class: str) -> None:
        name = section.get(field)
        if name not in modeling_coca._MODULE_OF:
            return
        entry: Any = _reference(name)
        if auto_class == "AutoTokenizer":
            entry = [entry, None]  # slow, fast
        elif auto_class == "AutoImageProcessor":
            entry = {backend: _reference(of_backend) for backend, of_backend in modeling_coca._IMAGE_PROCESSORS.items()}
        section.setdefault("auto_map", {})[auto_class] = entry
        modules.add(modeling_coca._MODULE_OF[name])

    def add_all(config: dict[str, Any]) -> None:
        add(config, "processor_class", "AutoProcessor")
        for section in (config, config.get("image_processor") or {}):
            add(section, "image_processor_type", "AutoImageProcessor")

    for name in ("processor_config.json", "preprocessor_config.json"):
        if (folder / name).exists():
            _update_json(folder / name, add_all)
    if (folder / "tokenizer_config.json").exists():
        _update_json(folder / "tokenizer_config.json", lambda config: add(config, "tokenizer_class", "AutoTokenizer"))
    return modules


__all__ = ["export_to_folder", "push_to_hub"]
