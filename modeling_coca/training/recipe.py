"""What the training scripts in `examples/` share: arguments, data, model and the run around `CocaTrainer`."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import torch
from transformers import (
    AutoConfig,
    EarlyStoppingCallback,
    HfArgumentParser,
    PreTrainedModel,
    ProcessorMixin,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

from ..configuration_coca import CocaConfig
from ..evaluation.evaluator import missing_column
from ..image_processing_pil_coca import CocaImageProcessorPil
from ..modeling_coca import CocaForConditionalGeneration
from ..processing_coca import CocaProcessor
from ..saving import new_files, write_file
from ..tokenization_coca import CocaTokenizer
from .averaging import EmaCallback
from .data import ImageAugmentation, SkippedImages, augment, load_data
from .features import FeatureDataset, compute_features
from .freezing import count_parameters, freeze
from .trainer import last_checkpoint

logger = logging.get_logger(__name__)

_EVAL_SPLITS = ("validation", "valid", "val", "dev", "test")
_FEATURES = "image_hidden_states"


@dataclass
class DataArguments:
    """Where the data are, and what is made of them."""

    dataset_name: str | None = field(
        default=None, metadata={"help": "A data set of the Hub, a folder (imagefolder, save_to_disk) or a file."}
    )
    dataset_config_name: str | None = None
    train_files: list[str] | None = field(
        default=None, metadata={"help": "Files or patterns instead: parquet, csv, tsv, json, WebDataset tar."}
    )
    eval_files: list[str] | None = None
    streaming: bool = field(default=False, metadata={"help": "Read training data on the way (needs --max_steps)."})
    train_split: str = "train"
    eval_split: str | None = field(
        default=None, metadata={"help": f"By default the first of {', '.join(_EVAL_SPLITS)}."}
    )
    eval_share: float = field(
        default=0.05,
        metadata={"help": "Share of the training rows to evaluate on where there is no such split; 0 for none."},
    )
    image_column: str = "image"
    image_root: str | None = field(
        default=None, metadata={"help": "Folder that paths in the data may lead into, by default the data's own."}
    )
    text_column: str = field(default="text", metadata={"help": "Caption, list of captions, or class label."})
    max_train_samples: int | None = None
    max_eval_samples: int | None = None
    num_proc: int | None = field(default=None, metadata={"help": "Processes that look through the images."})
    caption_templates: list[str] | None = field(
        default=None, metadata={"help": "Sentences with {} for the caption, one at random, as 'a photo of a {}.'."}
    )
    split_sentences: bool = field(default=False, metadata={"help": "At times only one sentence of a long caption."})
    zoom: list[float] = field(default_factory=lambda: [1.0, 1.0], metadata={"help": "Random zoom, from and to."})
    shift: float = field(default=0.0, metadata={"help": "Random shift, in image widths."})
    rotate: float = field(default=0.0, metadata={"help": "Random rotation, in degrees."})
    flip: bool = field(default=False, metadata={"help": "Mirror half of the images."})
    color: float = field(default=0.0, metadata={"help": "Random change of brightness, contrast and saturation."})
    feature_cache: str | None = field(
        default=None, metadata={"help": "Folder: encode images once with the frozen encoder, and train from that."}
    )
    feature_views: int = field(default=1, metadata={"help": "Augmented views of an image in the feature cache."})

    def augmentation(self, size: int | None = None) -> ImageAugmentation:
        return ImageAugmentation(tuple(self.zoom), self.shift, self.rotate, self.flip, self.color, size=size)


@dataclass
class ModelArguments:
    """Which model, and which of its parts are trained how."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "A CoCa of the Hub, or its folder."})
    attn_implementation: str | None = field(
        default=None, metadata={"help": "eager, sdpa, ... On CPUs eager is quicker for texts of a dozen tokens."}
    )
    image_size: int | None = field(
        default=None,
        metadata={"help": "Side of the images in pixels, for encoders that take any; by default the model's."},
    )
    freeze: list[str] | None = field(default=None, metadata={"help": "Parts to leave as they are, e.g. vision_model."})
    contrastive_loss_weight: float | None = field(default=None, metadata={"help": "By default the model's own."})
    caption_loss_weight: float | None = field(default=None, metadata={"help": "By default the model's own."})
    dropout: float | None = field(default=None, metadata={"help": "Of the text layers, by default the model's own."})
    ema_decay: float | None = field(
        default=None, metadata={"help": "End with a moving average of the weights, e.g. .999."}
    )
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "Stop after so many evaluations without a better --metric_for_best_model."}
    )


class Splits(NamedTuple):
    """Rows to train on, rows to evaluate on, and the images that could not be read."""

    train: Any
    evaluation: Any
    skipped: SkippedImages


def parse_arguments(*argument_classes: type, args: Sequence[str] | None = None, **defaults: Any) -> tuple[Any, ...]:
    """
    Command-line arguments as dataclasses, `TrainingArguments` last, with CoCa's defaults: AdamW with beta2 0.98 and
    weight decay 0.1, 5 % warm-up, then cosine, bf16 on GPUs that have it.

    Args:
        argument_classes (`type`): dataclasses of a script.
        args (`Sequence[str]`, *optional*): instead of the command line.
        defaults: a script's own defaults, of any of the dataclasses' fields.
    """
    parser = HfArgumentParser((*argument_classes, TrainingArguments))
    common = {
        "adam_beta2": 0.98,
        "weight_decay": 0.1,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.05,
        "bf16": torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
        "remove_unused_columns": False,
        "per_device_eval_batch_size": 64,
        "save_total_limit": 2,
        "logging_steps": 20,
    }
    parser.set_defaults(**{**common, **defaults})
    parsed = parser.parse_args_into_dataclasses(args)
    for arguments in parsed:
        if getattr(arguments, "early_stopping_patience", None) is not None:
            training = parsed[-1]
            if training.eval_strategy == "no" or not training.load_best_model_at_end:
                raise ValueError(
                    "`early_stopping_patience` compares evaluations: add `--eval_strategy epoch --save_strategy epoch "
                    "--load_best_model_at_end True --metric_for_best_model NAME --greater_is_better True`."
                )
    set_seed(parsed[-1].seed)
    return parsed


# --------------------------------------------------------------------------------------------------------------- data


def load_splits(data: DataArguments, training: TrainingArguments, **columns: str) -> Splits:
    """
    Training and evaluation rows of what the arguments name. Class labels in the text column become their names.

    Args:
        data ([`DataArguments`]), training (`TrainingArguments`): see there.
        columns (`str`): columns that must be there beside the images, by the name of the argument that names them.

    Raises:
        ValueError: there is no such split or column; it names the argument to change.
    """
    if (data.dataset_name is None) == (data.train_files is None):
        raise ValueError("Name the data by either `--dataset_name` or `--train_files`.")
    if data.streaming and training.max_steps <= 0:
        raise ValueError("A stream has no length: give `--max_steps`.")
    if not 0 <= data.eval_share < 1:
        raise ValueError(f"`--eval_share` is a share and must lie in [0, 1), got {data.eval_share}.")
    for name in ("max_train_samples", "max_eval_samples"):
        if (value := getattr(data, name)) is not None and value < 1:
            raise ValueError(f"`--{name}` must be at least 1, got {value}.")
    with training.main_process_first(local=False, desc="data"):
        skipped = SkippedImages(Path(training.output_dir) / "skipped_images.jsonl", resume=training.process_index > 0)
        options = {
            "image_column": data.image_column,
            "image_root": data.image_root,
            "num_proc": data.num_proc,
            "seed": training.seed,
            "skipped": skipped,
        }
        if data.train_files is not None:
            files = {"train": data.train_files, **({"test": data.eval_files} if data.eval_files else {})}
            found = load_data(data_files=files, streaming=data.streaming, **options)
            train_split = "train"
        else:
            found = load_data(
                data.dataset_name, config_name=data.dataset_config_name, streaming=data.streaming, **options
            )
            train_split = data.train_split
        eval_split = data.eval_split or next((split for split in _EVAL_SPLITS if split in found), None)
        for split, argument in ((train_split, "train_split"), (eval_split, "eval_split")):
            if split is not None and split not in found:
                raise ValueError(f"There is no split {split!r} (`--{argument}`), only {', '.join(found)}.")
        train = found[train_split]
        if data.streaming:  # evaluators need to know how many rows there are
            evaluation = None if eval_split is None else list(found[eval_split].take(data.max_eval_samples or 1000))
        elif eval_split is None and not data.eval_share:
            evaluation = None
        elif eval_split is None:
            if len(train) < 2:
                raise ValueError(
                    f"There are {len(train)} rows to train on, of which none can be split off to evaluate on: add rows, or "
                    "`--eval_share 0`."
                )
            parts = train.train_test_split(data.eval_share, seed=training.seed)
            train, evaluation = parts["train"], parts["test"]
        else:
            evaluation = found[eval_split]
            if data.max_eval_samples is not None:
                evaluation = evaluation.take(min(data.max_eval_samples, len(evaluation)))
        if data.max_train_samples is not None:
            train = train.take(data.max_train_samples if data.streaming else min(data.max_train_samples, len(train)))
        known = train.column_names or list(next(iter(train)))
        for argument, column in columns.items():
            if column not in known:
                raise ValueError(missing_column(column, f"--{argument}", known))
            if evaluation and column not in (names := getattr(evaluation, "column_names", None) or evaluation[0]):
                raise ValueError("Of the rows to evaluate on: " + missing_column(column, f"--{argument}", names))
        if not data.streaming:
            train, evaluation = (rows and _name_labels(rows, data.text_column) for rows in (train, evaluation))
    return Splits(train, evaluation, skipped)


def _name_labels(rows: datasets.Dataset, column: str) -> datasets.Dataset:
    """Class labels as texts."""
    feature = rows.features.get(column)
    if not isinstance(feature, datasets.ClassLabel):
        return rows
    names = [feature.names[label] for label in rows[column][:]]
    return rows.remove_columns([column]).add_column(column, names)


class Prepared(NamedTuple):
    """Rows as the trainer and the evaluators take them, and the name of the column that holds the image."""

    train: Any
    evaluation: Any
    image_columns: dict[str, str]


def prepare_rows(
    splits: Splits,
    data: DataArguments,
    training: TrainingArguments,
    vision_model: PreTrainedModel,
    image_processor: Any,
    feature_layers: Sequence[int] | None = None,
) -> Prepared:
    """
    Augmentation as the arguments say, on the way; or, with `--feature_cache`, features of the frozen encoder, computed
    once for several views of each image.

    Args:
        splits ([`Splits`]), data ([`DataArguments`]), training (`TrainingArguments`): see there.
        vision_model (`PreTrainedModel`): the model's image encoder.
        image_processor: the model's image processor.
        feature_layers (`Sequence[int]`, *optional*): see `CocaConfig.vision_feature_layers`.

    Returns:
        [`Prepared`]: its `image_columns` go to the collator and to the evaluators, `CocaDataCollator(..., **image_columns)`.
    """
    train, evaluation, _ = splits
    image_column, text_column = data.image_column, data.text_column
    texts = {"templates": data.caption_templates or (), "sentences": data.split_sentences, "text_column": text_column}
    if data.feature_cache is None:
        train = augment(train, data.augmentation(), image_column=image_column, **texts)
        return Prepared(train, evaluation, {"image_column": image_column})
    if any(parameter.requires_grad for parameter in vision_model.parameters()):
        raise ValueError("`--feature_cache` needs an image encoder that is not trained: add `--freeze vision_model`.")
    folder = Path(data.feature_cache)
    options = {"image_column": image_column, "feature_layers": feature_layers, "seed": training.seed}
    augmentation = data.augmentation(image_side(image_processor))
    rows = []
    with training.main_process_first(local=False, desc="features"):
        for split, part in (("train", train), ("evaluation", evaluation)):
            if part is None:
                rows.append(None)
                continue
            views = data.feature_views if split == "train" else 1
            features = compute_features(
                part,
                vision_model.to(training.device),
                image_processor,
                folder / f"{split}.npy",
                views=views,
                augmentation=augmentation,
                desc=f"Features of {split}",
                **options,
            )
            part = augment(part, **texts) if split == "train" else part
            rows.append(FeatureDataset(part, features, image_column, _FEATURES, random_view=split == "train"))
    return Prepared(*rows, {"image_hidden_states_column": _FEATURES})


def image_side(image_processor: Any) -> int:
    """The shorter side, in pixels, of what an image processor makes."""
    size = image_processor.crop_size or image_processor.size
    return min(size[name] for name in ("height", "width", "shortest_edge") if size.get(name))


def texts_of(rows: Any, *columns: str, limit: int = 1_000_000) -> list[str]:
    """
    The different texts of some columns, each of which may hold lists: to train a tokenizer on.

    Args:
        rows: a data set, or a stream of which the first `limit` rows are read.
        columns (`str`): names of columns.
        limit (`int`): rows that are looked at.
    """
    if isinstance(rows, datasets.Dataset):
        rows = rows.with_format(None).select_columns(list(columns))
    texts: dict[str, None] = {}
    for row in rows.take(limit) if hasattr(rows, "take") and not isinstance(rows, datasets.Dataset) else rows:
        for column in columns:
            value = row[column]
            texts.update(dict.fromkeys([value] if isinstance(value, str) else value or ()))
    return sorted(texts)


# -------------------------------------------------------------------------------------------------------------- model


def load_model(arguments: ModelArguments, model_class: type = CocaForConditionalGeneration, **changes: Any) -> tuple:
    """
    A model to fine-tune and its processor, with loss weights and frozen parts as the arguments say.

    Args:
        arguments ([`ModelArguments`]): see there.
        model_class (`type`): class of the model.
        changes: fields of the config to change.

    Returns:
        `tuple[PreTrainedModel, CocaProcessor]`
    """
    if arguments.model_name_or_path is None:
        raise ValueError("Name the model to start from: `--model_name_or_path`.")
    changes |= {
        name: value
        for name in ("contrastive_loss_weight", "caption_loss_weight")
        if (value := getattr(arguments, name)) is not None
    }
    if arguments.dropout is not None:
        changes["text_config"] = {"dropout": arguments.dropout}
    model = model_class.from_pretrained(
        arguments.model_name_or_path, attn_implementation=arguments.attn_implementation, **changes
    )
    processor = CocaProcessor.from_pretrained(arguments.model_name_or_path, backend="pil", trust_remote_code=False)
    if arguments.image_size is not None:
        processor.image_processor.size = {"shortest_edge": arguments.image_size}
        processor.image_processor.crop_size = {"height": arguments.image_size, "width": arguments.image_size}
    apply_freezing(model, arguments)
    return model, processor


def apply_freezing(model: PreTrainedModel, arguments: ModelArguments) -> None:
    counts = freeze(model, *arguments.freeze) if arguments.freeze else count_parameters(model)
    logger.warning(f"{counts.trainable / 1e6:.2f} M parameters are trained, {counts.frozen / 1e6:.2f} M are frozen.")


def new_processor(
    rows: Any,
    training: TrainingArguments,
    *columns: str,
    vocab_size: int,
    max_text_length: int,
    image_size: int,
    image_mean: Sequence[float] = (0.5, 0.5, 0.5),
    image_std: Sequence[float] = (0.5, 0.5, 0.5),
    limit: int = 1_000_000,
) -> CocaProcessor:
    """
    A processor with a tokenizer of its own, trained by `tokenizers`, and saved in the output folder at once: two trainings
    of a tokenizer may break ties differently, so the other processes and a resumed run open it from there.

    Args:
        rows: data set or stream to train the tokenizer on.
        training (`TrainingArguments`): of the run.
        columns (`str`): the columns of texts, or of lists of texts.
        vocab_size (`int`): at most so many tokens.
        max_text_length (`int`): longest text in tokens, BOS and EOS included.
        image_size (`int`): side of the images.
        image_mean, image_std (`Sequence[float]`): of the encoder's training.
        limit (`int`): rows of a stream that are looked at.
    """
    with training.main_process_first(local=False, desc="tokenizer"):
        is_saved = Path(training.output_dir, "tokenizer_config.json").is_file()  # the last of its files
        if training.process_index or (training.resume_from_checkpoint is not None and is_saved):
            return CocaProcessor.from_pretrained(training.output_dir, backend="pil")
        tokenizer = CocaTokenizer(model_max_length=max_text_length).train_new_from_iterator(
            texts_of(rows, *columns, limit=limit), vocab_size=vocab_size
        )
        image_processor = CocaImageProcessorPil(
            size={"shortest_edge": image_size},
            crop_size={"height": image_size, "width": image_size},
            image_mean=list(image_mean),
            image_std=list(image_std),
        )
        processor = CocaProcessor(image_processor, tokenizer)
        with new_files(training.output_dir) as temporary:
            processor.save_pretrained(temporary)
    return processor


def new_model(
    config_name: str,
    processor: CocaProcessor,
    arguments: ModelArguments,
    encoder: PreTrainedModel | None = None,
    **changes: Any,
) -> CocaForConditionalGeneration:
    """
    A model with random weights and the sizes of a config, for a processor of its own.

    Args:
        config_name (`str`): a CoCa of the Hub or a folder with a `config.json`, of which only the config is read.
        processor ([`CocaProcessor`]): sets the vocabulary, its special tokens, the longest text and the image size.
        arguments ([`ModelArguments`]): loss weights and attention.
        encoder (`PreTrainedModel`, *optional*): a pretrained image encoder to take in, with its weights.
        changes: more fields of the config.
    """
    fields = AutoConfig.from_pretrained(config_name, trust_remote_code=False).to_dict()
    tokenizer, text_config = processor.tokenizer, fields["text_config"]
    text_config |= {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": tokenizer.model_max_length + int(text_config["use_cls_token"]),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if encoder is not None:
        fields["vision_config"] = encoder.config
    else:
        fields["vision_config"]["image_size"] = processor.image_processor.crop_size["height"]
    for name in ("contrastive_loss_weight", "caption_loss_weight"):
        if getattr(arguments, name) is not None:
            fields[name] = getattr(arguments, name)
    if arguments.dropout is not None:
        text_config["dropout"] = arguments.dropout
    config = CocaConfig(**{**fields, **changes})
    model = CocaForConditionalGeneration._from_config(config, attn_implementation=arguments.attn_implementation)
    if encoder is not None:
        model.model.vision_model.load_state_dict(encoder.state_dict())
    return model


# ---------------------------------------------------------------------------------------------------------------- run


def checkpoint_of(training: TrainingArguments) -> str | None:
    """
    Where `--resume_from_checkpoint` goes on from: a folder; or, for `True`, the latest complete checkpoint, and where there
    is none yet, the start: so the same command begins a run and goes on with it.
    """
    checkpoint = training.resume_from_checkpoint
    if checkpoint is None or checkpoint.lower() != "true":
        return checkpoint
    return last_checkpoint(training.output_dir)


def callbacks_of(arguments: ModelArguments) -> list[TrainerCallback]:
    """Moving average and early stopping, as far as they are asked for."""
    callbacks: list[TrainerCallback] = []
    if arguments.ema_decay is not None:
        callbacks.append(EmaCallback(arguments.ema_decay))
    if arguments.early_stopping_patience is not None:
        callbacks.append(EarlyStoppingCallback(arguments.early_stopping_patience))
    return callbacks


def run(
    trainer: Trainer, processor: ProcessorMixin, splits: Splits, after_training: Callable[[], None] | None = None
) -> dict[str, float]:
    """
    Trains (goes on from `--resume_from_checkpoint`, a folder or `True`), saves model and processor, evaluates, and writes
    the figures to `all_results.json` in the output folder.

    Args:
        trainer (`Trainer`), processor ([`CocaProcessor`]): what is run, and what is saved with the model.
        splits ([`Splits`]): for the count of images that could not be read.
        after_training (`Callable`, *optional*): called before the model is saved, to replace `trainer.model` say.

    Returns:
        `dict[str, float]`: all figures.
    """
    args = trainer.args
    trained = trainer.train(resume_from_checkpoint=checkpoint_of(args))
    if not trainer.state.global_step:
        raise ValueError(
            "Not one step was trained, as there was not one row: see the warnings above, and name other data."
        )
    if after_training is not None:
        after_training()
    trainer.save_model()
    if trainer.is_world_process_zero():
        with new_files(args.output_dir) as temporary:
            processor.save_pretrained(temporary)

    def save(split: str, metrics: dict[str, float]) -> None:
        """As `Trainer.save_metrics`, which a kill could leave with half a file, and which reads it the next time."""
        if trainer.is_world_process_zero():
            text = json.dumps(metrics, indent=4, sort_keys=True)
            write_file(Path(args.output_dir, f"{split}_results.json"), text)

    save("train", trained.metrics)
    figures = dict(trained.metrics)
    if splits.evaluation is not None and len(splits.evaluation):
        evaluated = trainer.evaluate()
        save("eval", evaluated)
        figures |= evaluated
    if count := len(splits.skipped):
        logger.warning(f"{count} images could not be read and were left out: see {splits.skipped.path}.")
    figures["skipped_images"] = count
    save("data", {"skipped_images": count})
    save("all", figures)
    trainer.save_state()
    logger.info(json.dumps(figures))
    return figures


__all__ = [
    "DataArguments",
    "ModelArguments",
    "Prepared",
    "Splits",
    "apply_freezing",
    "callbacks_of",
    "checkpoint_of",
    "image_side",
    "load_model",
    "load_splits",
    "new_model",
    "new_processor",
    "parse_arguments",
    "prepare_rows",
    "run",
    "texts_of",
]
