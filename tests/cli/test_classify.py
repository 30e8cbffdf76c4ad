"""`coca classify` and `coca ask`."""

import json

import pytest

from modeling_coca.cli.output import plain
from modeling_coca.inference import ask_images, caption_images, classify_images


def test_classes_are_printed(coca, photos, model_folder, tmp_path):
    args = ["classify", photos, "--classes", "red square, yellow", "--num_workers", 0]
    rows = classify_images(photos, model=model_folder, classes=["red square", "yellow"], num_workers=0)
    code, out, err = coca(*args)
    assert (code, err) == (0, "")
    assert out.splitlines() == [f"{row['id']}\t{row['label']}\t{row['score']:.3f}" for row in rows]
    (tmp_path / "templates.txt").write_text("a {}\na photo of a {}\n")
    _, out, _ = coca(*args, "--templates", tmp_path / "templates.txt", "--multi_label", "--threshold", 0, "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert [len(row["labels"]) for row in rows] == [2] * 12 and sum(row["score"] for row in rows) != 12
    code, out, _ = coca(*args, "-o", tmp_path / "out.parquet")
    assert code == 0 and out == f"12 images classified in {tmp_path}/out.parquet\n"


def test_evaluation_prints_figures_and_draws(coca, photos, tmp_path):
    picture = tmp_path / "confusion.png"
    code, out, _ = coca("classify", photos, "--evaluate", "--confusion", picture, "--num_workers", 0)
    assert code == 0 and picture.stat().st_size > 1000
    figures = {line.split()[0]: line.split()[-1] for line in out.splitlines()}
    assert figures["images"] == "12" and 0 <= float(figures["top1"]) <= 1
    code, out, _ = coca("classify", photos, "--evaluate", "--num_workers", 0, "--json")
    assert json.loads(out)["images"] == 12


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["{good}"], 1, "Say which classes there are"),
        (["{good}", "--classes", "one"], 1, "at least two"),
        (["{good}", "--classes", "gone.txt"], 1, "There is no file of classes gone.txt"),
        (["{good}", "--classes", "a,b", "--template", "photo"], 1, "`templates` needs a '{{}}'"),
        (["{good}", "--evaluate", "--label_column", "group"], 1, "image files have no columns"),
        (["{good}", "--classes", "a,b", "--threshold", "2"], 2, "--threshold"),
    ],
)
def test_errors_take_one_line(args, code, message, coca, photos):
    result = coca("classify", *[arg.format(good=photos / "00.png") for arg in args])
    assert result[0] == code and message.format() in result[2] and "Traceback" not in result[2]


def test_questions_are_answered_by_what_comes_after_them(coca, photos, model_folder, tmp_path):
    question = "what is it?"
    whole = caption_images(photos, model=model_folder, prompt=question, num_workers=0)
    rows = ask_images(photos, question, model=model_folder, num_workers=0)
    for row, caption in zip(rows, whole, strict=True):
        assert set(row) == {"id", "answer", "log_prob", "num_tokens"} and row["log_prob"] == caption["log_prob"]
        assert caption["caption"].endswith(row["answer"]) and not row["answer"].startswith("what")
    code, out, _ = coca("ask", photos / "00.png", question)
    assert code == 0 and out == plain(rows[0]["answer"]) + "\n"
    _, out, _ = coca("ask", photos / "00.png", photos / "01.jpg", question, "--json")
    answers = [json.loads(line) for line in out.splitlines()]
    assert [row["answer"] for row in answers] == [row["answer"] for row in rows[:2]]
    assert answers[0]["question"] == question
    code, out, _ = coca("ask", photos, question, "-o", tmp_path / "answers.jsonl", "--num_workers", 0)
    assert code == 0 and out == f"12 answers in {tmp_path}/answers.jsonl\n"
    assert coca("ask", photos / "00.png", " ") == (1, "", "coca: The `question` is empty.")
    code, _, err = coca("ask", photos / "00.png", "what " * 30)
    assert code == 1 and err.startswith("coca: A text has")
