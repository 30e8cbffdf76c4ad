from pathlib import Path

import datasets
import pytest
import torch
from PIL import Image

from modeling_coca import CocaForConditionalGeneration, CocaImageProcessorPil, CocaProcessor, CocaTokenizer
from modeling_coca.training.recipe import (
    DataArguments,
    ModelArguments,
    load_model,
    load_splits,
    parse_arguments,
    prepare_rows,
    texts_of,
)

EMOJI = Path(__file__).parents[1] / "fixtures" / "emoji"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")


def parse(tmp_path, *args, **defaults):
    shared = ["--output_dir", tmp_path / "out", "--use_cpu", "True", "--report_to", "none"]
    return parse_arguments(
        DataArguments, ModelArguments, args=[str(argument) for argument in (*shared, *args)], **defaults
    )


def test_defaults_are_cocas_then_the_scripts_then_the_command_lines(tmp_path):
    data, model, training = parse(tmp_path, "--weight_decay", 0.3, learning_rate=5e-4, caption_loss_weight=0.0)
    assert (
        training.adam_beta2 == 0.98
        and training.lr_scheduler_type == "cosine"
        and training.optim.startswith("adamw_torch")
    )
    assert training.weight_decay == 0.3 and training.learning_rate == 5e-4 and model.caption_loss_weight == 0
    assert not training.dataloader_drop_last  # it would drop rows of evaluations, too
    assert not data.augmentation().is_active


def test_early_stopping_asks_for_what_it_needs(tmp_path):
    with pytest.raises(ValueError, match="add `--eval_strategy epoch"):
        parse(tmp_path, "--early_stopping_patience", 2)
    more = ["--eval_strategy", "epoch", "--save_strategy", "epoch", "--load_best_model_at_end", True]
    assert parse(tmp_path, "--early_stopping_patience", 2, *more)[1].early_stopping_patience == 2


def test_splits(tmp_path):
    data, _, training = parse(tmp_path, "--dataset_name", EMOJI, "--max_train_samples", 5, "--max_eval_samples", 3)
    splits = load_splits(data, training, text_column="text")
    assert (len(splits.train), len(splits.evaluation), len(splits.skipped)) == (5, 3, 0)
    only_train = str(EMOJI / "train")
    for share, sizes in ((0.25, (12, 4)), (0, (16, None))):
        data, _, training = parse(tmp_path, "--dataset_name", only_train, "--eval_share", share)
        train, evaluation, _ = load_splits(data, training)
        assert (len(train), evaluation if evaluation is None else len(evaluation)) == sizes


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "`--dataset_name` or `--train_files`"),
        (["--dataset_name", EMOJI, "--eval_split", "dev"], r"no split 'dev' \(`--eval_split`\), only train, test"),
        (["--dataset_name", EMOJI, "--streaming", "True"], "give `--max_steps`"),
    ],
)
def test_wrong_arguments_are_named(args, message, tmp_path):
    data, _, training = parse(tmp_path, *args)
    with pytest.raises(ValueError, match=message):
        load_splits(data, training)


def test_class_labels_become_texts(tmp_path):
    rows = datasets.load_dataset(str(EMOJI))["train"].class_encode_column("label")
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(tmp_path / "saved")
    data, _, training = parse(tmp_path, "--dataset_name", tmp_path / "saved", "--text_column", "label")
    splits = load_splits(data, training, text_column="label")
    assert set(splits.train["label"]) == {"animals & nature", "food & drink", "objects", "travel & places"}
    assert texts_of(splits.train, "label", "question") == sorted(
        [*set(splits.train["label"]), "which category is this?"]
    )
    assert len(texts_of(splits.train, "text")) == 32  # lists of two


def test_features_need_an_encoder_that_stays(tmp_path, tiny_config):
    args = ["--dataset_name", EMOJI, "--feature_cache", tmp_path / "features"]
    data, arguments, training = parse(tmp_path, *args)
    model = CocaForConditionalGeneration(tiny_config())
    with pytest.raises(ValueError, match="add `--freeze vision_model`"):
        prepare_rows(load_splits(data, training), data, training, model.model.vision_model, None)
    with pytest.raises(ValueError, match="--model_name_or_path"):
        load_model(arguments)


def test_the_config_is_changed_as_asked_and_nothing_else(tmp_path, tiny_config):
    saved = CocaForConditionalGeneration(tiny_config())
    saved.save_pretrained(tmp_path / "model")
    tokenizer = CocaTokenizer(model_max_length=16).train_new_from_iterator(["a red square"], vocab_size=400)
    CocaProcessor(CocaImageProcessorPil(size=32), tokenizer).save_pretrained(tmp_path / "model")
    more = ["--model_name_or_path", tmp_path / "model", "--dropout", 0.25, "--contrastive_loss_weight", 0]
    more += ["--image_size", 24]
    _, arguments, _ = parse(tmp_path, *more, "--freeze", "vision_model", "--attn_implementation", "eager")
    model, processor = load_model(arguments)
    assert processor(images=[Image.new("RGB", (50, 40))], return_tensors="pt")["pixel_values"].shape == (1, 3, 24, 24)
    changed = {**saved.config.to_dict(), "contrastive_loss_weight": 0, "_name_or_path": str(tmp_path / "model")}
    changed["text_config"]["dropout"] = 0.25
    ours = model.config.to_dict()
    for name in ("text_config", "vision_config"):
        assert {**ours.pop(name), "dtype": None} == {**changed.pop(name), "dtype": None}
    assert {**ours, "dtype": None} == {**changed, "dtype": None}
    assert not any(parameter.requires_grad for parameter in model.model.vision_model.parameters())
    for name, value in saved.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)
