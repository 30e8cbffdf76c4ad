"""Model cards: what a model is, how it was trained, how good it is, and how to use it."""

import json
import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import torch
import transformers
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedModel, Trainer
from transformers.modelcard import extract_hyperparameters_from_trainer

from ..evaluation.evaluator import unwrap
from ..training.freezing import count_parameters

TEMPLATE = Path(__file__).with_name("card_template.md")
DESCRIPTION = "A [CoCa](https://arxiv.org/abs/2205.01917) (Contrastive Captioners), a model of images and texts."
TAGS = ("coca", "image-captioning", "zero-shot-image-classification")

# class -> task tag of the Hub, and code that uses it
USES = {
    "CocaForConditionalGeneration": (
        "image-text-to-text",
        'captioner = pipeline("image-captioning", model={folder}{trust})\nprint(captioner("image.png"))\n'
        'vqa = pipeline("coca-vqa", model={folder}{trust})\nprint(vqa("image.png", "what is this?"))',
    ),
    "CocaForVisualQuestionAnswering": (
        "visual-question-answering",
        'vqa = pipeline("coca-vqa", model={folder}{trust})\nprint(vqa("image.png", "what is this?", top_k=3))',
    ),
    "CocaForImageClassification": (
        "image-classification",
        'classifier = pipeline("image-classification", model={folder}{trust})\nprint(classifier("image.png"))',
    ),
    "CocaModel": (
        "zero-shot-image-classification",
        'classifier = pipeline("zero-shot-image-classification", model={folder}{trust})\n'
        'print(classifier("image.png", candidate_labels=["a cat", "a dog"]))',
    ),
    "CocaVisionModel": (
        "image-feature-extraction",
        'extract = pipeline("image-feature-extraction", model={folder}{trust})\nprint(len(extract("image.png")[0]))',
    ),
    "CocaTextModel": (
        "feature-extraction",
        'extract = pipeline("feature-extraction", model={folder}{trust})\nprint(len(extract("a cat")[0]))',
    ),
}

# beginning or end of a figure's name -> what it measures, as the Hub calls tasks and metrics
FIGURES = [
    (("i2t_", "t2i_", "mean_recall"), "image-text-retrieval", "recall"),
    (("zero_shot",), "zero-shot-image-classification", "accuracy"),
    (("answer_accuracy", "vqa_accuracy"), "visual-question-answering", "accuracy"),
    (("bleu",), "image-to-text", "bleu"),
    (("rouge",), "image-to-text", "rouge"),
    (("cider",), "image-to-text", "cider"),
    (("caption_exact",), "image-to-text", "exact_match"),
    (("accuracy",), None, "accuracy"),
]
NO_FIGURES = ("runtime", "samples_per_second", "steps_per_second", "epoch", "step")
SECRET = re.compile(r"^--?(\w+[-_])?(token|api[-_]key|secret|password)$")
HUB_DATASET = re.compile(r"hf://datasets/([^@]+)@")
# What `datasets` calls sets that were read from files
FILE_FORMATS = ("arrow", "csv", "generator", "imagefolder", "json", "pandas", "parquet", "text", "webdataset")


def cell(value: Any) -> str:
    """A value as Markdown on one line that ends no table cell and opens no tag: names of classes and data sets are data."""
    return " ".join(str(value).split()).replace("|", "\\|").replace("<", "&lt;")


def code_block(language: str, code: str) -> str:
    """A fence that is longer than those within."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", code)), default=0))
    return f"{fence}{language}\n{code}\n{fence}"


def readable(count: int) -> str:
    return f"{count / 1e6:,.2f}M" if count >= 1e6 else f"{count:,}"


def parameters_by_part(model: PreTrainedModel) -> dict[str, int]:
    """
    Parameters by part, each counted once. A model on the meta device will do.

    Args:
        model (`PreTrainedModel`): any model of this package.

    Returns:
        `dict[str, int]`: `"image encoder"`, `"poolers"`, ..., those that the model has, and `"all"`.
    """
    base = getattr(model, "model", model)
    parts = {
        "image encoder": getattr(base, "vision_model", None),
        "poolers": getattr(base, "image_pooler", getattr(base, "pooler", None)),
        "unimodal text layers": getattr(base, "text_model", None),
        "multimodal text layers": getattr(model, "text_decoder", None),
        "output embedding": getattr(model, "lm_head", None),
        "classifier": getattr(model, "classifier", None),
        "projections and temperature": model,
    }
    counts, seen = {}, set()
    for part, module in parts.items():
        own = {} if module is None else {id(p): p.numel() for p in module.parameters() if id(p) not in seen}
        seen |= own.keys()
        counts[part] = sum(own.values())
    counts = {part: count for part, count in counts.items() if count}
    if len(counts) == 1:  # a tower
        counts = {}
    return {**counts, "all": sum(p.numel() for p in model.parameters())}


def describe_architecture(config: Any) -> dict[str, str]:
    """Sizes of a `CocaConfig`, for people."""
    if config.model_type != "coca":
        return {}
    vision, text = config.vision_config, config.text_config
    if vision.model_type == "coca_vision_model":
        height, width = vision.image_size if isinstance(vision.image_size, list | tuple) else [vision.image_size] * 2
        rows, columns = vision.grid_size
        rows = {
            "image": f"{height} × {width} pixels in patches of {vision.patch_size}: {rows * columns} tokens"
            + (" and a class token" if vision.use_class_token else ""),
            "image encoder": f"{vision.num_hidden_layers} layers of width {vision.hidden_size}, MLP "
            f"{vision.intermediate_size}, {vision.num_attention_heads} heads",
        }
    else:
        rows = {"image encoder": getattr(vision, "architecture", vision.model_type)}
    if config.pooler_type == "none":
        rows["poolers"] = "none: class token and patch tokens as they are"
    elif config.pooler_type == "shared":
        rows["poolers"] = (
            f"one of {config.num_query_tokens + 1} queries of width {config.pooler_hidden_size}: 1 for the embedding, "
            f"{config.num_query_tokens} for the decoder"
        )
    else:
        rows["poolers"] = (
            f"{config.pooler_type}: {config.num_query_tokens} queries for the decoder and 1 for the embedding, of width "
            f"{config.pooler_hidden_size}"
        )
    two_mlps = (
        f" (multimodal: two of {text.multimodal_intermediate_size})"
        if text.multimodal_intermediate_size != text.intermediate_size
        else ""
    )
    return {
        **rows,
        "text": f"up to {text.max_text_length} tokens of a vocabulary of {text.vocab_size:,}",
        "text layers": f"{text.num_unimodal_layers} unimodal and {text.num_multimodal_layers} multimodal of width "
        f"{text.hidden_size}, MLP {text.intermediate_size}{two_mlps}, {text.num_attention_heads} heads",
        "embedding space": f"{config.projection_dim} dimensions",
    }


def render_card(
    data: ModelCardData,
    model: PreTrainedModel,
    *,
    name: str,
    description: str,
    usage: str,
    parameters: Mapping[str, str] | None = None,
    notes: Sequence[str] = (),
    sections: Mapping[str, str] | None = None,
) -> ModelCard:
    """
    The one form of all cards.

    Args:
        data (`ModelCardData`): what the Hub reads.
        model (`PreTrainedModel`): whose sizes are shown; on the meta device it needs no memory.
        name (`str`): heading.
        description (`str`): first paragraphs.
        usage (`str`): under "Use".
        parameters (`dict[str, str]`, *optional*): more rows for the table of parameters.
        notes (`list[str]`): paragraphs after the tables.
        sections (`dict[str, str]`, *optional*): heading -> text, before "Use".
    """
    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined, autoescape=False
    )
    counts = {part: readable(count) for part, count in parameters_by_part(model).items()}
    content = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        metadata=data.to_yaml(),
        name=cell(name),
        description=description,
        architecture=[(what, cell(value)) for what, value in describe_architecture(model.config).items()],
        parameters=[*counts.items(), *(parameters or {}).items()],
        notes=notes,
        sections=list((sections or {}).items()),
        usage=usage,
    )
    return ModelCard(content.rstrip() + "\n", ignore_metadata_errors=True)


def model_card(
    model: PreTrainedModel,
    name: str,
    *,
    description: str | None = None,
    with_code: bool = False,
    notes: Sequence[str] = (),
    sections: Mapping[str, str] | None = None,
    parameters: Mapping[str, str] | None = None,
    tags: Sequence[str] = (),
    **data: Any,
) -> ModelCard:
    """
    A card for a model with weights.

    Args:
        model (`PreTrainedModel`): any model of this package.
        name (`str`): of the folder or repository that the card's example opens.
        description (`str`, *optional*): first paragraphs.
        with_code (`bool`, defaults to `False`):
            The code lies beside the weights, as [`export_to_folder`] puts it: the example opens it without the package.
        notes, sections, parameters: see [`render_card`].
        tags (`list[str]`): more tags.
        **data: of `huggingface_hub.ModelCardData`: `license`, `language`, `datasets`, `base_model`, `eval_results`, ...

    Example:

    ```python
    >>> from modeling_coca import CocaConfig, CocaModel
    >>> from modeling_coca.hub import model_card

    >>> size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
    >>> text = {**size, "num_multimodal_layers": 2, "vocab_size": 99, "bos_token_id": 1, "eos_token_id": 2}
    >>> config = CocaConfig(vision_config={**size, "image_size": 36}, text_config=text, num_query_tokens=4)
    >>> card = model_card(CocaModel(config), "my-coca", license="apache-2.0")
    >>> card.data.pipeline_tag
    'zero-shot-image-classification'
    ```
    """
    task, code = _use(model)
    trust = ", trust_remote_code=True" if with_code else ""
    imports = (
        "from transformers import pipeline\n"
        if with_code
        else "import modeling_coca\nfrom transformers import pipeline\n"
    )
    metadata = ModelCardData(
        **{
            "library_name": "transformers",
            "pipeline_tag": task,
            "tags": list(dict.fromkeys([*TAGS, *tags])),
            "model_name": name if data.get("eval_results") else None,
            **{key: value for key, value in data.items() if value is not None},
        }
    )
    return render_card(
        metadata,
        model,
        name=name,
        description=description or DESCRIPTION,
        usage=code_block("python", f"{imports}\n{code.format(folder=json.dumps(name), trust=trust)}"),
        parameters=parameters,
        notes=notes,
        sections=sections,
    )


def training_card(
    trainer: Trainer,
    *,
    model_name: str | None = None,
    language: str | None = None,
    license: str | None = None,
    tags: str | Sequence[str] | None = None,
    finetuned_from: str | None = None,
    tasks: str | Sequence[str] | None = None,
    dataset_tags: str | Sequence[str] | None = None,
    dataset: str | Sequence[str] | None = None,
    dataset_args: str | Sequence[str] | None = None,
) -> ModelCard:
    """
    The card of a trained model: data, command, hyperparameters, results after each evaluation, and the last evaluation's
    figures as `model-index`. [`CocaTrainer`] writes it with `create_model_card` and `push_to_hub`.

    Figures are those of the evaluations in the log; losses and speed are in the table, not in the index. Values of options
    whose names speak of a token, key, secret or password do not appear.

    Args:
        trainer (`Trainer`): after training, of a model of this package.
        model_name, language, license, tags, finetuned_from, tasks, dataset_tags, dataset, dataset_args:
            See `Trainer.create_model_card`. Name and data sets are found in the trainer if they can be.
    """
    model, state, args = unwrap(trainer.model), trainer.state, trainer.args
    name = model_name or Path(args.output_dir).name
    evaluated = trainer.eval_dataset if trainer.eval_dataset is not None else trainer.train_dataset
    source = _source(evaluated)
    dataset_ids = _listed(dataset_tags) or ([source["id"]] if source["id"] else [])
    start = finetuned_from or getattr(model.config, "_name_or_path", "")
    base_model = None if not start or os.path.isdir(start) else start
    description = DESCRIPTION
    if base_model is not None:
        description += f" It starts from [{base_model}](https://huggingface.co/{base_model})."
    elif start:
        description += " It starts from another checkpoint, which is not on the Hub."

    figures = _last_figures(state.log_history)
    results = [
        EvalResult(
            task_type=(_listed(tasks) or [task or _use(model)[0]])[0],
            dataset_type=(dataset_ids or ["unknown"])[0],
            dataset_name=(_listed(dataset) or dataset_ids or ["evaluation set"])[0],
            dataset_config=source["config"],
            dataset_split=source["split"],
            dataset_args={"args": _listed(dataset_args)[0]} if _listed(dataset_args) else None,
            metric_type=metric,
            metric_name=key,
            metric_value=value,
        )
        for key, (task, metric, value) in figures.items()
    ]
    sections = {"Training data": _data_table(trainer)}
    if (command := _command()) is not None:
        sections["Command"] = code_block("bash", command)
    sections["Training"] = _settings_table(trainer)
    if table := _results_table(state.log_history):
        sections["Results"] = table
    return model_card(
        model,
        name,
        description=description,
        parameters={"trained": readable(count_parameters(model).trainable)},
        sections=sections,
        tags=["generated_from_trainer", *_listed(tags)],
        language=language,
        license=license,
        base_model=base_model,
        datasets=dataset_ids or None,
        metrics=list(dict.fromkeys(metric for _, metric, _ in figures.values())) or None,
        eval_results=results or None,
    )


def _use(model: PreTrainedModel) -> tuple[str, str]:
    for parent in type(model).__mro__:
        if parent.__name__ in USES:
            return USES[parent.__name__]
    raise ValueError(f"`model` must be one of this package, got {type(model).__name__}.")


def _listed(value: str | Sequence[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])


def _source(dataset: Any) -> dict[str, str | None]:
    """Where a data set comes from, if it is one of `datasets` and says so."""
    if isinstance(dataset, Mapping):
        dataset = next(iter(dataset.values()), None)
    info = getattr(dataset, "info", None)
    downloads = [HUB_DATASET.match(url) for url in getattr(info, "download_checksums", None) or {}]
    repositories = [match[1] for match in downloads if match]
    builder = getattr(info, "builder_name", None)
    config, split = getattr(info, "config_name", None), getattr(dataset, "split", None)
    return {
        "id": repositories[0] if repositories else None if builder in FILE_FORMATS else builder,
        "config": None if config == "default" else config,
        "split": None if split is None else str(split),
    }


def _data_table(trainer: Trainer) -> str:
    lines = ["| | data set | split | rows |", "|---|---|---|---|"]
    for role, dataset in (("training", trainer.train_dataset), ("evaluation", trainer.eval_dataset)):
        for key, part in (dataset if isinstance(dataset, dict) else {"": dataset}).items():
            if part is None:
                continue
            source = _source(part)
            rows = f"{len(part):,}" if hasattr(part, "__len__") else "a stream"
            title = " ".join(filter(None, [source["id"], source["config"]])) or type(part).__name__
            row = (f"{role} {key}".strip(), title, source["split"] or "", rows)
            lines.append(f"| {' | '.join(map(cell, row))} |")
    return "\n".join(lines)


def _settings_table(trainer: Trainer) -> str:
    settings, args = extract_hyperparameters_from_trainer(trainer), trainer.args
    settings.pop("training_steps", None)  # planned; those that were done are below
    optimizer = getattr(args.optim, "value", args.optim)
    betas = f", betas {args.adam_beta1} and {args.adam_beta2}" if "adam" in optimizer else ""
    settings["optimizer"] = f"{optimizer}{betas}, weight decay {args.weight_decay}"
    config = unwrap(trainer.model).config
    for field in ("contrastive_loss", "contrastive_loss_weight", "caption_loss_weight"):
        if hasattr(config, field):
            settings[field] = getattr(config, field)
    settings["steps"] = trainer.state.global_step
    runtimes = [log["train_runtime"] for log in trainer.state.log_history if "train_runtime" in log]
    if runtimes:
        settings["seconds"] = round(runtimes[-1])
    settings["transformers"], settings["torch"] = transformers.__version__, torch.__version__
    lines = [f"| {key} | {cell(value)} |" for key, value in settings.items()]
    return "\n".join(["| | |", "|---|---|", *lines])


def _evaluations(log_history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One record a step: several data sets are evaluated, and logged, one after the other."""
    records: dict[int, dict[str, Any]] = {}
    loss = None
    for log in log_history:
        loss = log.get("loss", loss)
        figures = {key.removeprefix("eval_"): value for key, value in log.items() if key.startswith("eval_")}
        figures = {key: value for key, value in figures.items() if not key.endswith(NO_FIGURES)}
        if figures:
            start = {"step": log.get("step"), "epoch": log.get("epoch"), "training loss": loss}
            records.setdefault(log.get("step"), start).update(figures)
    return list(records.values())


def _results_table(log_history: list[dict[str, Any]]) -> str:
    evaluations = _evaluations(log_history)
    columns = list(dict.fromkeys(key for record in evaluations for key in record))
    if not columns:
        return ""

    def figure(value: Any) -> str:
        return "" if value is None else f"{value:.4g}" if isinstance(value, float) else cell(value)

    lines = [list(map(cell, columns)), ["---"] * len(columns)]
    lines += [[figure(record.get(column)) for column in columns] for record in evaluations]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _last_figures(log_history: list[dict[str, Any]]) -> dict[str, tuple[str | None, str, float]]:
    """Name -> (task, metric, value) of the last evaluation, without losses."""
    figures = {}
    for record in _evaluations(log_history)[-1:]:
        for key, value in record.items():
            if key in ("step", "epoch", "training loss") or key.endswith("loss"):
                continue
            known = ((task, metric) for parts, task, metric in FIGURES if any(part in key for part in parts))
            task, metric = next(known, (None, key))
            figures[key] = (task, metric, value)
    return figures


def _command() -> str | None:
    """The command line of this process, without secrets and without where on this machine it ran."""
    main = getattr(sys.modules.get("__main__"), "__file__", None)
    if main is None:  # a notebook or a prompt
        return None
    words, hide = [Path(sys.orig_argv[0]).name], False
    for word in sys.orig_argv[1:]:
        option, equals, _ = word.partition("=")
        is_secret = bool(SECRET.search(option))
        if hide or (is_secret and equals):
            word = f"{option}=..." if is_secret else "..."
        else:
            for place, name in ((f"{os.getcwd()}/", ""), (f"{Path.home()}/", "~/")):
                word = word.replace(place, name)
        words.append(word if word.startswith("~/") else shlex.quote(word))
        hide = is_secret and not equals
    return " ".join(words)


__all__ = [
    "cell",
    "code_block",
    "describe_architecture",
    "model_card",
    "parameters_by_part",
    "readable",
    "render_card",
    "training_card",
]
