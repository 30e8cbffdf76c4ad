"""Model cards: what they say, and that their examples run."""

import re
import sys

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from transformers import TrainingArguments

import modeling_coca
from modeling_coca.evaluation import CaptioningEvaluator, RetrievalEvaluator
from modeling_coca.hub import export_to_folder, model_card, training_card
from modeling_coca.hub.model_card import parameters_by_part
from modeling_coca.training import CocaDataCollator, CocaTrainer, freeze

TASKS = {
    "CocaForConditionalGeneration": "image-text-to-text",
    "CocaForImageClassification": "image-classification",
    "CocaForVisualQuestionAnswering": "visual-question-answering",
    "CocaModel": "zero-shot-image-classification",
    "CocaTextModel": "feature-extraction",
    "CocaVisionModel": "image-feature-extraction",
}


def build(name, config):
    parts = {"CocaTextModel": config.text_config, "CocaVisionModel": config.vision_config}
    return getattr(modeling_coca, name)(parts.get(name, config))


# -------------------------------------------------------------------------------------------- a card of any model


@pytest.mark.parametrize("name", TASKS)
def test_the_example_of_a_card_runs(name, config, processor, tmp_path, monkeypatch, capsys):
    model = build(name, config())
    export_to_folder(model, processor, tmp_path / "fox", model_card(model, "fox"))
    Image.new("RGB", (40, 30), "red").save(tmp_path / "image.png")
    card = ModelCard.load(tmp_path / "fox" / "README.md")
    assert card.data.pipeline_tag == TASKS[name] and card.data.library_name == "transformers"
    (code,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    assert code.startswith("import modeling_coca\n")
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    exec(compile(code, "card", "exec"), {})
    assert len(capsys.readouterr().out.splitlines()) == code.count("print(") > 0


def test_a_card_that_comes_with_code_asks_for_trust(config, processor, tmp_path):
    model = build("CocaForConditionalGeneration", config())
    folder = export_to_folder(model, processor, tmp_path / "fox")
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert "import modeling_coca" not in code and code.count('model="fox", trust_remote_code=True') == 2


def test_sizes_in_a_card(config):
    model = build("CocaForConditionalGeneration", config())
    counts = parameters_by_part(model)
    assert sum(counts.values()) == 2 * counts["all"] == 2 * sum(p.numel() for p in model.parameters())
    assert counts["output embedding"] == model.lm_head.weight.numel()
    card = model_card(model, "fox", license="mit", tags=["foxes"], notes=["It likes grapes."])
    assert f"| all | {counts['all']:,} |" in card.text
    assert "| image | 32 × 32 pixels in patches of 8: 16 tokens and a class token |" in card.text
    assert "\nIt likes grapes.\n" in card.text
    assert card.data.license == "mit" and card.data.tags[0] == "coca" and card.data.tags[-1] == "foxes"


def test_tied_parameters_are_counted_once(config):
    model = build("CocaForConditionalGeneration", config(tie_word_embeddings=True))
    counts = parameters_by_part(model)
    assert "output embedding" not in counts
    assert counts["all"] == sum(p.numel() for p in model.parameters()) == sum(counts.values()) - counts["all"]


# --------------------------------------------------------------------------------------------------- a training's card


@pytest.fixture(scope="module")
def rows():
    datasets = pytest.importorskip("datasets")
    colours = ["red", "green", "blue", "white"]
    rows = [{"image": Image.new("RGB", (32, 32), colour), "text": f"a {colour} fox"} for colour in colours]

    def split(name, **info):
        info = datasets.DatasetInfo(**{"builder_name": "fox_pictures", "config_name": "small", **info})
        return datasets.Dataset.from_list(rows, info=info, split=name)

    return split


@pytest.fixture(scope="module")
def trainer(config, processor, rows, tmp_path_factory):
    torch.manual_seed(0)
    model = build("CocaForConditionalGeneration", config(caption_loss_weight=1.5))
    freeze(model, "vision_model")
    validation = rows("validation")
    trainer = CocaTrainer(
        model=model,
        args=TrainingArguments(
            str(tmp_path_factory.mktemp("training") / "coca-fox"),
            per_device_train_batch_size=4,
            max_steps=4,
            eval_strategy="steps",
            eval_steps=2,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=False,
        ),
        data_collator=CocaDataCollator(processor, text_column="text"),
        train_dataset=rows("train"),
        eval_dataset=validation,
        callbacks=[
            CaptioningEvaluator(processor, validation, generation_kwargs={"max_new_tokens": 3}),
            RetrievalEvaluator(processor, validation, ks=(1,)),
        ],
    )
    trainer.train()
    return trainer


def test_the_figures_of_the_last_evaluation_are_the_index(trainer):
    card = training_card(trainer, license="mit", language="en")
    log = [record for record in trainer.state.log_history if "eval_loss" in record][-1]
    results = {result.metric_name: result for result in card.data.eval_results}
    expected = {"caption_exact", "bleu4", "cider_d", "rouge_l", "i2t_r1", "t2i_r1", "mean_recall"}
    assert results.keys() == expected
    assert {name: result.metric_value for name, result in results.items()} == {
        name: log[f"eval_{name}"] for name in expected
    }
    kinds = {name: (results[name].task_type, results[name].metric_type) for name in ("bleu4", "i2t_r1")}
    assert kinds == {"bleu4": ("image-to-text", "bleu"), "i2t_r1": ("image-text-retrieval", "recall")}
    one = results["bleu4"]
    assert (one.dataset_type, one.dataset_config, one.dataset_split) == ("fox_pictures", "small", "validation")
    assert card.data.datasets == ["fox_pictures"] and card.data.license == "mit" and card.data.language == "en"
    assert card.data.model_name == "coca-fox" and "generated_from_trainer" in card.data.tags
    # and it is read back from the file as it was written
    again = ModelCard(card.content)
    assert again.data.to_dict() == card.data.to_dict()


def test_a_training_card_tells_data_settings_and_results(trainer):
    text = training_card(trainer).text
    assert "| training | fox_pictures small | train | 4 |" in text
    assert "| evaluation | fox_pictures small | validation | 4 |" in text
    for line in ("learning_rate | 5e-05", "caption_loss_weight | 1.5", "steps | 4", f"torch | {torch.__version__}"):
        assert f"| {line} |" in text
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    assert f"| trained | {trained:,} |" in text and trained < trainer.model.num_parameters()
    table = text[text.index("## Results") :].split("\n\n")[1].splitlines()
    assert table[0].startswith("| step | epoch | training loss | loss |") and "| bleu4 |" in table[0]
    assert [row.split("|")[1].strip() for row in table[2:]] == ["2", "4"]
    assert f"| optimizer | {trainer.args.optim.value}, betas 0.9 and 0.999, weight decay 0.0 |" in text
    assert "It starts from" not in text


def test_a_data_set_of_the_hub_is_told_by_its_repository(trainer, rows, monkeypatch):
    files = {"hf://datasets/someone/foxes@0123/validation.parquet": {"num_bytes": 9}}
    validation = rows("validation", builder_name="parquet", config_name="default", download_checksums=files)
    monkeypatch.setattr(trainer, "eval_dataset", validation)
    card = training_card(trainer)
    assert card.data.datasets == ["someone/foxes"]
    assert "| evaluation | someone/foxes | validation | 4 |" in card.text


def test_the_command_is_told_without_secrets_and_places(trainer, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        sys,
        "orig_argv",
        [
            *("/opt/python", f"{tmp_path}/train.py", "--hub_token", "hf_1", "--api-key=hf_2"),
            *("--push_to_hub_token=hf_3", "--max_new_tokens", "30", "--note", "two words"),
        ],
    )
    text = training_card(trainer).text
    assert (
        "\npython train.py --hub_token ... --api-key=... --push_to_hub_token=... --max_new_tokens 30 --note 'two words'\n"
        in text
    )
    assert "hf_" not in text
    monkeypatch.delattr(sys.modules["__main__"], "__file__")
    assert "## Command" not in training_card(trainer).text


def test_the_trainer_writes_its_card(trainer, tmp_path):
    trainer.create_model_card(
        model_name="fox", finetuned_from="someone/coca", dataset="Foxes", dataset_tags="someone/foxes"
    )
    card = ModelCard.load(f"{trainer.args.output_dir}/README.md")
    assert card.data.base_model == "someone/coca" and card.data.datasets == ["someone/foxes"]
    assert "starts from [someone/coca](https://huggingface.co/someone/coca)" in card.text
    assert {result.dataset_name for result in card.data.eval_results} == {"Foxes"}
    trainer.model.config._name_or_path = str(tmp_path)
    assert "It starts from another checkpoint, which is not on the Hub." in training_card(trainer).text
    # it goes with the exported model
    folder = export_to_folder(trainer.model, trainer.data_collator.processor, tmp_path / "fox", card)
    assert ModelCard.load(folder / "README.md").data.to_dict() == card.data.to_dict()


def test_a_training_without_evaluation_has_no_index(config, processor, rows, tmp_path):
    args = TrainingArguments(str(tmp_path), max_steps=1, report_to=[], disable_tqdm=True, save_strategy="no")
    trainer = CocaTrainer(
        build("CocaForConditionalGeneration", config()),
        args,
        CocaDataCollator(processor),
        train_dataset=list(rows("train")),
    )
    trainer.train()
    card = training_card(trainer)
    assert card.data.eval_results is None and card.data.datasets is None
    assert "## Results" not in card.text and "| training | list |  | 4 |" in card.text
