"""Zero-shot classification: its logits against the dual encoder, its calibration against known ones, its evaluation."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from modeling_coca import CocaModel, CocaProcessor
from modeling_coca.evaluation import classification_accuracy
from modeling_coca.inference import (
    CocaClassifier,
    calibration_error,
    classify_images,
    confusion_matrix,
    draw_confusion,
    embed_images,
    evaluate_images,
    fit_calibration,
    read_classes,
)

CLASSES = ["red square", "green circle", "yellow"]


@pytest.fixture(scope="module")
def dual(model_folder):
    return CocaModel.from_pretrained(model_folder).eval(), CocaProcessor.from_pretrained(model_folder)


@pytest.fixture(scope="module")
def pixels(photos, dual):
    paths = sorted(str(path) for path in photos.rglob("*.*"))
    return dual[1](images=paths, return_tensors="pt")["pixel_values"]


def logits_of(dual, pixels, texts_of_classes):
    model, processor = dual
    with torch.no_grad():
        images = F.normalize(model.get_image_features(pixels).pooler_output, dim=-1)
        columns = []
        for texts in texts_of_classes:
            features = model.get_text_features(**processor.tokenizer(texts, padding=True, return_tensors="pt"))
            vector = F.normalize(F.normalize(features.pooler_output, dim=-1).mean(0), dim=-1)
            columns.append(model.logit_scale.exp() * images @ vector)
    return torch.stack(columns, dim=1)


def test_one_label_is_the_softmax_over_ensembles_of_templates(dual, pixels):
    templates = ["a {}.", "a photo of a {}"]
    expected = logits_of(dual, pixels, [[t.format(name) for t in templates] for name in CLASSES])
    classifier = CocaClassifier(*dual, CLASSES, templates=templates, temperature=2.0, top_k=2)
    torch.testing.assert_close(classifier.logits(pixels), expected)
    probabilities = (expected / 2).softmax(-1)
    for row, p in zip(classifier(pixels), probabilities, strict=True):
        order = p.argsort(descending=True)[:2].tolist()
        assert [label["label"] for label in row["labels"]] == [CLASSES[i] for i in order]
        assert [label["score"] for label in row["labels"]] == pytest.approx(p[order].tolist(), abs=1e-6)
        assert (row["label"], row["score"]) == tuple(row["labels"][0].values())
    described = CocaClassifier(*dual, {"warm": ["red", "yellow"], "cold": ["blue"]}, templates="a {}")
    torch.testing.assert_close(described.logits(pixels), logits_of(dual, pixels, [["a red", "a yellow"], ["a blue"]]))


def test_several_labels_are_decided_each_by_itself(dual, pixels, tiny_config):
    logits = logits_of(dual, pixels, [[f"a photo of a {name}."] for name in [*CLASSES, "thing"]])
    expected = ((logits[:, :-1] - logits[:, -1:]) / 0.5 + 0.1).sigmoid()
    classifier = CocaClassifier(*dual, CLASSES, multi_label=True, temperature=0.5, bias=0.1, threshold=0.5)
    torch.testing.assert_close(classifier.probabilities(classifier.logits(pixels)), expected)
    rows = classifier(pixels)
    for row, p in zip(rows, expected, strict=True):
        assert {label["label"] for label in row["labels"]} == {
            CLASSES[i] for i in (p >= 0.5).nonzero().flatten().tolist()
        }
    alone = CocaClassifier(*dual, CLASSES[:1], multi_label=True, temperature=0.5, bias=0.1)  # others change nothing
    torch.testing.assert_close(alone.probabilities(alone.logits(pixels)), expected[:, :1])

    config = dual[0].config.to_dict() | {"contrastive_loss": "sigmoid", "logit_bias_init_value": -3.0}
    sigmoid = CocaModel(type(dual[0].config).from_dict(config)).eval()
    classifier = CocaClassifier(sigmoid, dual[1], CLASSES, multi_label=True, templates="{}")
    with torch.no_grad():
        out = sigmoid(**dual[1].tokenizer(CLASSES, padding=True, return_tensors="pt"), pixel_values=pixels)
    torch.testing.assert_close(classifier.logits(pixels), out.logits_per_image)  # the bias is in them


def test_rows_of_a_source(photos, model_folder, dual, pixels, tmp_path):
    kwargs = {"model": model_folder, "classes": CLASSES, "num_workers": 0, "show_progress": False}
    rows = classify_images(photos, **kwargs)
    expected = CocaClassifier(*dual, CLASSES)(pixels)
    assert [row["label"] for row in rows] == [row["label"] for row in expected]
    done = classify_images(photos, tmp_path / "out.jsonl", source_kwargs={"shard_size": 5}, **kwargs)
    assert done["images"] == 12
    stored = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [(row["id"], row["label"]) for row in stored] == [(row["id"], row["label"]) for row in rows]


def test_classes_come_from_names_and_files(tmp_path):
    assert read_classes(" cat,dog , sea horse") == ["cat", "dog", "sea horse"]
    (tmp_path / "a.txt").write_text("cat\n\nsea horse, small\n")
    assert read_classes(tmp_path / "a.txt") == ["cat", "sea horse, small"]
    (tmp_path / "a.json").write_text('{"dog": ["dog", "puppy"], "cat": "kitten"}')
    assert read_classes(str(tmp_path / "a.json")) == {"dog": ["dog", "puppy"], "cat": ["kitten"]}
    (tmp_path / "b.json").write_text('["x", 3]')
    assert read_classes(tmp_path / "b.json") == ["x", "3"]
    with pytest.raises(FileNotFoundError, match="no file of classes"):
        read_classes("gone.txt")


def test_errors_name_the_field(dual, photos, model_folder):
    for kwargs, message in [
        ({"classes": ["a"]}, "`classes` must be different ones, at least two"),
        ({"classes": ["a", "a"]}, "`classes` must be different ones"),
        ({"classes": {"a": ["x"], "b": []}}, "'b' has no description"),
        ({"classes": ["a", "b"], "templates": ["a photo"]}, r"`templates` needs a '\{\}'"),
        ({"classes": ["a", "b"], "temperature": 0}, "`temperature` must be above 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            CocaClassifier(*dual, **kwargs)
    with pytest.raises(ValueError, match="are not among `classes`: 'more', 'photos0'"):
        evaluate_images(photos, model=model_folder, classes="a,b", num_workers=0)


# ------------------------------------------------------------------------------------------------------- evaluation


def test_calibration_is_found_again():
    """Labels drawn from known probabilities: the fit must give the temperature and bias that were put in."""
    random = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(20_000, 4, generator=random)
    labels = torch.multinomial((logits / 2.5).softmax(-1), 1, generator=random)[:, 0]
    temperature, bias = fit_calibration(logits, labels)
    assert temperature == pytest.approx(2.5, rel=0.03) and bias == 0
    targets = torch.bernoulli((logits / 0.7 - 1.5).sigmoid(), generator=random)
    temperature, bias = fit_calibration(logits, targets, multi_label=True)
    assert temperature == pytest.approx(0.7, rel=0.05) and bias == pytest.approx(-1.5, rel=0.05)

    def error(temperature):
        best = (logits / temperature).softmax(-1).max(-1)
        return calibration_error(best.values.numpy(), (best.indices == labels).numpy())

    assert error(2.5) < 0.02 < 0.1 < error(1.0)
    assert calibration_error(np.array([1.0, 0.0]), np.array([1, 0])) == 0


@pytest.fixture(scope="module")
def labelled(photos, tmp_path_factory):
    """24 pictures in folders named after classes."""
    folder, random = tmp_path_factory.mktemp("labelled"), np.random.default_rng(1)
    for number in range(24):
        place = folder / CLASSES[number % 3]
        place.mkdir(exist_ok=True)
        Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(place / f"{number:02d}.png")
    (folder / CLASSES[0] / "bad.png").write_text("no picture")
    return folder


def test_evaluation_by_folder_names(labelled, model_folder, dual, tmp_path):
    kwargs = {"model": model_folder, "num_workers": 0, "show_progress": False}
    figures = evaluate_images(labelled, confusion_picture=tmp_path / "confusion.png", **kwargs)
    assert figures["images"] == 24 and [name.rsplit("/")[-1] for name, _ in figures["failed"]] == ["bad.png"]
    rows = [row for row in classify_images(labelled, classes=CLASSES, **kwargs) if "error" not in row]
    names = sorted(CLASSES)
    truth = torch.tensor([names.index(row["id"].split("/")[-2]) for row in rows])
    guess = torch.tensor([names.index(row["label"]) for row in rows])
    assert figures["top1"] == pytest.approx((truth == guess).double().mean().item())
    matrix = confusion_matrix(truth, guess, 3)
    assert matrix.sum() == 24 and matrix.trace() == (truth == guess).sum()
    assert sum(number for _, _, number in figures["confusions"]) == 24 - matrix.trace()
    true, predicted, number = figures["confusions"][0]
    assert matrix[names.index(true), names.index(predicted)] == number
    accuracy, per_class = classification_accuracy(F.one_hot(guess, 3).double(), truth, ks=(1,))
    assert figures["mean_per_class"] == pytest.approx(per_class.mean().item()) and accuracy[1] == figures["top1"]
    embeds = np.stack([row["embedding"] for row in embed_images(labelled, **kwargs) if "error" not in row])
    logits = CocaClassifier(*dual, names).logits_of(torch.from_numpy(embeds))
    assert figures["temperature"] == pytest.approx(fit_calibration(logits, truth)[0], rel=1e-3)
    with Image.open(tmp_path / "confusion.png") as picture:
        assert min(picture.size) > 300 and len(picture.getcolors(100_000)) > 20
    draw_confusion(np.eye(70, dtype=int), list(map(str, range(70))), tmp_path / "large.svg")
    assert (tmp_path / "large.svg").stat().st_size > 1000


def test_evaluation_of_several_labels(labelled, model_folder, dual, tmp_path):
    files = sorted(labelled.rglob("[0-9]*.png"))
    labels = [["red square"], ["yellow", "green circle"], []]
    lines = [f"{path},{';'.join(labels[i % 3])}" for i, path in enumerate(files)]
    (tmp_path / "list.csv").write_text("\n".join(["path,tags", *lines]))
    figures = evaluate_images(
        tmp_path / "list.csv",
        model=model_folder,
        classes=CLASSES,
        label_column="tags",
        classifier_kwargs={"multi_label": True},
        source_kwargs={"image_root": labelled},
        num_workers=0,
    )
    targets = np.array([[name in labels[i % 3] for name in CLASSES] for i in range(24)])
    pixels = dual[1](images=list(map(str, files)), return_tensors="pt")["pixel_values"]
    classifier = CocaClassifier(*dual, CLASSES, multi_label=True)
    p = classifier.probabilities(classifier.logits(pixels)).numpy()
    chosen = p >= 0.5
    assert figures["precision"] == pytest.approx((chosen & targets).sum() / max(chosen.sum(), 1))
    assert figures["recall"] == pytest.approx((chosen & targets).sum() / targets.sum())
    average = []
    for column in range(3):
        ranked = targets[np.argsort(-p[:, column]), column]
        average.append(np.mean([ranked[: i + 1].mean() for i in np.flatnonzero(ranked)]))
    assert figures["mean_average_precision"] == pytest.approx(np.mean(average))
    assert figures["calibrated_error"] < 0.2 and figures["bias"] != 0
