"""Zero-shot classification of images: classes in words, templates, calibrated probabilities, evaluation."""

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, ProcessorMixin

from .embedding import CocaEmbedder
from .loading import load_for_inference
from .mapping import map_images

DEFAULT_TEMPLATES = ("a photo of a {}.",)
NEUTRAL = "thing"  # what a class is compared with where each one is decided by itself


class CocaClassifier:
    """
    Classifies images by the texts that describe the classes.

    A class' vector is the normalised mean over its descriptions in every template (arXiv 2103.00020). Its logit is the
    cosine with the image, times the learned scale. One label an image: the softmax over the classes. Several: each class
    by itself, as a sigmoid, against the same templates with "thing" for the class, or against the learned bias of a model
    that was trained with sigmoid loss.

    Args:
        model ([`CocaModel`] or [`CocaForConditionalGeneration`]), processor ([`CocaProcessor`]).
        classes (`Sequence[str]` or `Mapping[str, Sequence[str]]`): names, or names with descriptions to use instead.
        templates (`Sequence[str]`): sentences with `{}` for the class.
        multi_label (`bool`, defaults to `False`): several labels an image, or none.
        threshold (`float`, defaults to 0.5): of the probability of a label, with `multi_label`.
        temperature (`float`, defaults to 1), bias (`float`, defaults to 0):
            Calibration: logits are divided by the one, and with `multi_label` the other is added. [`evaluate_images`]
            finds them.
        top_k (`int`, defaults to 5): labels to give, where there is one right one.

    Example:

    ```python
    >>> from modeling_coca.inference import CocaClassifier

    >>> classifier = CocaClassifier(model, processor, ["cat", "dog"])  # doctest: +SKIP
    >>> classifier(processor(images=[image], return_tensors="pt")["pixel_values"])  # doctest: +SKIP
    [{'label': 'dog', 'score': 0.97, 'labels': [{'label': 'dog', 'score': 0.97}, {'label': 'cat', 'score': 0.03}]}]
    ```
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        classes: Sequence[str] | Mapping[str, Sequence[str]],
        *,
        templates: Sequence[str] = DEFAULT_TEMPLATES,
        multi_label: bool = False,
        threshold: float = 0.5,
        temperature: float = 1.0,
        bias: float = 0.0,
        top_k: int = 5,
    ):
        templates = [templates] if isinstance(templates, str) else list(templates)
        if not templates or any("{}" not in template for template in templates):
            raise ValueError(f"Each of `templates` needs a '{{}}' where the class goes, got {templates}.")
        self.names = list(classes)
        if len(self.names) < (1 if multi_label else 2) or len(set(self.names)) < len(self.names):
            raise ValueError(f"`classes` must be different ones, at least two, got {self.names}.")
        if temperature <= 0:
            raise ValueError(f"`temperature` must be above 0, not {temperature}.")
        self.embedder = CocaEmbedder(model, processor)
        self.model, self.multi_label, self.threshold = model, multi_label, threshold
        self.temperature, self.bias, self.top_k = temperature, bias, min(top_k, len(self.names))
        descriptions = classes if isinstance(classes, Mapping) else {name: [name] for name in classes}
        if empty := [name for name, texts in descriptions.items() if not texts]:
            raise ValueError(f"`classes`: {empty[0]!r} has no description.")
        contrastive = model.base_model
        self.scale = contrastive.logit_scale.exp().item()
        self.offset = 0.0 if contrastive.logit_bias is None else contrastive.logit_bias.item()
        self.against_neutral = multi_label and contrastive.logit_bias is None
        groups = [*descriptions.values(), *([[NEUTRAL]] if self.against_neutral else [])]
        texts = [template.replace("{}", text) for group in groups for text in group for template in templates]
        means = [part.mean(0) for part in self.embedder.texts(texts).split([len(g) * len(templates) for g in groups])]
        self.vectors = F.normalize(torch.stack(means), dim=-1)  # [classes (+ 1), projection_dim]

    def logits(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) -> (B, classes), before calibration."""
        return self.logits_of(self.embedder.images(pixel_values))

    def logits_of(self, image_embeds: torch.Tensor) -> torch.Tensor:
        """Normalised image embeddings (B, projection_dim) -> (B, classes)."""
        logits = self.scale * (image_embeds @ self.vectors.T) + self.offset
        return logits[:, :-1] - logits[:, -1:] if self.against_neutral else logits

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """Calibrated, (B, classes): they sum to one, unless there may be several labels."""
        logits = logits / self.temperature
        return (logits + self.bias).sigmoid() if self.multi_label else logits.softmax(-1)

    def __call__(self, pixel_values: torch.Tensor) -> list[dict[str, Any]]:
        """Rows with `label` and `score`, the best, and `labels`, the `top_k` best, or all above the threshold."""
        probabilities = self.probabilities(self.logits(pixel_values))
        count = len(self.names) if self.multi_label else self.top_k
        best = probabilities.topk(count, dim=-1)
        rows = []
        for scores, places in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            labels = [{"label": self.names[i], "score": score} for i, score in zip(places, scores, strict=True)]
            row: dict[str, Any] = dict(labels[0])
            if self.multi_label:
                labels = [label for label in labels if label["score"] >= self.threshold]
            rows.append({**row, "labels": labels})
        return rows


def read_classes(source: str | os.PathLike | Sequence[str]) -> list[str] | dict[str, list[str]]:
    """
    Classes from a file (one a line, or JSON: a list, or an object of names with lists of descriptions), or from names
    joined by commas; a sequence stays as it is.

    Example:

    ```python
    >>> from modeling_coca.inference import read_classes

    >>> read_classes("cat, dog")
    ['cat', 'dog']
    ```
    """
    if not isinstance(source, (str, os.PathLike)):
        return source if isinstance(source, Mapping) else list(source)
    source = os.fspath(source)
    if not os.path.isfile(source):
        if source.endswith((".txt", ".json")) or os.sep in source:
            raise FileNotFoundError(f"There is no file of classes {source}.")
        return [name.strip() for name in source.split(",") if name.strip()]
    text = Path(source).read_text(encoding="utf-8")
    if not source.endswith(".json"):
        return [line.strip() for line in text.splitlines() if line.strip()]
    classes = json.loads(text)
    if isinstance(classes, dict):
        return {name: [texts] if isinstance(texts, str) else list(texts) for name, texts in classes.items()}
    return [str(name) for name in classes]


def classify_images(
    images: Any,
    output: str | os.PathLike | None = None,
    *,
    model: str | os.PathLike | PreTrainedModel,
    classes: str | os.PathLike | Sequence[str] | Mapping[str, Sequence[str]],
    processor: ProcessorMixin | None = None,
    device: str | None = None,
    dtype: str | None = None,
    classifier_kwargs: dict[str, Any] | None = None,
    **kwargs: Any,
) -> list[dict[str, Any]] | dict[str, Any] | None:
    """
    Classifies all images of a source; like [`caption_images`] it can be resumed and shared.

    Args:
        model, processor, device, dtype: see [`load_for_inference`].
        classes: see [`read_classes`].
        classifier_kwargs (`dict`, *optional*): see [`CocaClassifier`].
        images, output and the rest, returns: see [`map_images`]. For the rows see [`CocaClassifier`].

    Example:

    ```python
    >>> from modeling_coca.inference import classify_images

    >>> classify_images("photos", model="outputs/quickstart", classes="cat, dog")[0]["label"]  # doctest: +SKIP
    'dog'
    ```
    """
    classes, classifier_kwargs = read_classes(classes), classifier_kwargs or {}

    def load() -> tuple[CocaClassifier, ProcessorMixin]:
        from modeling_coca import CocaModel

        loaded = load_for_inference(model, CocaModel, processor, device, dtype)
        return CocaClassifier(*loaded, classes, **classifier_kwargs), loaded[1]

    settings = {"model": str(getattr(model, "name_or_path", model)), "classes": classes, **classifier_kwargs}
    return map_images(images, output, load, settings, description="Classes", **kwargs)


# ------------------------------------------------------------------------------------------------------- evaluation


def calibration_error(probabilities: np.ndarray, right: np.ndarray, bins: int = 15) -> float:
    """
    Expected calibration error (arXiv 1706.04599): how far confidence and accuracy are apart, mean over bins of equal width.

    Args:
        probabilities (`np.ndarray`): of what was predicted.
        right (`np.ndarray` of the same shape): whether it was right.
        bins (`int`): their number.

    Example:

    ```python
    >>> import numpy as np
    >>> from modeling_coca.inference import calibration_error

    >>> calibration_error(np.array([0.9, 0.9, 0.9, 0.9]), np.array([1, 1, 1, 0]))  # 90 % sure, 75 % right
    0.15
    ```
    """
    places = np.minimum((probabilities * bins).astype(int), bins - 1)
    counts = np.bincount(places, minlength=bins)
    gaps = np.abs(np.bincount(places, probabilities - right, minlength=bins))
    return round(float(gaps.sum() / max(counts.sum(), 1)), 10)


def fit_calibration(logits: torch.Tensor, targets: torch.Tensor, multi_label: bool = False) -> tuple[float, float]:
    """
    The temperature and bias under which the targets are likeliest (temperature scaling, arXiv 1706.04599; for several
    labels, Platt scaling over all pairs of image and class).

    Args:
        logits (`torch.Tensor` of shape `(N, classes)`).
        targets (`torch.Tensor`): `(N,)` classes, or with `multi_label` `(N, classes)` of 0 and 1.
        multi_label (`bool`): see above.

    Returns:
        temperature and bias; the bias is 0 without `multi_label`.
    """
    logits = logits.double()
    log_slope = torch.zeros((), dtype=torch.double, requires_grad=True)
    bias = torch.zeros((), dtype=torch.double, requires_grad=multi_label)
    optimizer = torch.optim.LBFGS(
        [log_slope, bias] if multi_label else [log_slope], max_iter=200, line_search_fn="strong_wolfe"
    )

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        scaled = logits * log_slope.exp() + bias
        value = (
            F.binary_cross_entropy_with_logits(scaled, targets.double())
            if multi_label
            else F.cross_entropy(scaled, targets)
        )
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    return (-log_slope).exp().item(), bias.item()


def evaluate_images(
    images: Any,
    *,
    model: str | os.PathLike | PreTrainedModel,
    classes: str | os.PathLike | Sequence[str] | Mapping[str, Sequence[str]] | None = None,
    label_column: str | None = None,
    confusion_picture: str | os.PathLike | None = None,
    processor: ProcessorMixin | None = None,
    device: str | None = None,
    dtype: str | None = None,
    classifier_kwargs: dict[str, Any] | None = None,
    source_kwargs: dict[str, Any] | None = None,
    **kwargs: Any,
) -> dict[str, Any]:
    """
    Classifies labelled images and compares.

    Args:
        images: see [`open_images`].
        model, processor, device, dtype: see [`load_for_inference`].
        classes (*optional*): see [`read_classes`]; by default the labels that occur.
        label_column (`str`, *optional*):
            Column of the true labels (names; with `multi_label` a list, or names joined by ";"). Without it, the name
            of the folder that an image is in is its label.
        confusion_picture (`str`, *optional*): where to draw which classes are taken for which.
        classifier_kwargs (`dict`, *optional*): see [`CocaClassifier`].
        source_kwargs and the rest: see [`map_images`].

    Returns:
        `dict`:

        - one label an image: `top1`, `top5`, `mean_per_class`, and `confusions`, the most frequent as
          `[true, predicted, number]`; several: `mean_average_precision`, and `f1`, `precision`, `recall` at the threshold,
          over all pairs of image and class;
        - `calibration_error`, and `temperature` and `bias`, which would make it smallest, with the
          `calibrated_error` then: fitted on one half of the images and measured on the other, and the other way round;
        - `images`, and `failed`, ids of unreadable ones with reasons.
    """
    classifier_kwargs = dict(classifier_kwargs or {})
    multi_label = classifier_kwargs.get("multi_label", False)
    labels_of: list[Any] = []
    source_kwargs = {**(source_kwargs or {})}
    if label_column is not None:
        source_kwargs["keep"] = [*(source_kwargs.get("keep") or ()), label_column]

    from modeling_coca import CocaModel

    loaded = load_for_inference(model, CocaModel, processor, device, dtype)
    embedder = CocaEmbedder(*loaded)
    rows = map_images(
        images, None, lambda: (embedder, loaded[1]), {}, description="Images", source_kwargs=source_kwargs, **kwargs
    )
    failed = [(row["id"], row["error"]) for row in rows if "error" in row]
    rows = [row for row in rows if "error" not in row]
    if not rows:
        raise ValueError(f"none of the {len(failed)} images could be read.")
    for row in rows:
        label = row[label_column] if label_column is not None else os.path.basename(os.path.dirname(row["id"]))
        if multi_label and isinstance(label, str):
            label = [name.strip() for name in label.split(";") if name.strip()]
        labels_of.append(label)
    if label_column is None and not all(labels_of):
        raise ValueError("The images are not in folders that are named after classes: name a `label_column`.")
    flat = [name for label in labels_of for name in label] if multi_label else labels_of
    classes = sorted(set(flat)) if classes is None else read_classes(classes)
    classifier = CocaClassifier(*loaded, classes, **classifier_kwargs)
    place = {name: i for i, name in enumerate(classifier.names)}
    if unknown := sorted({str(name) for name in flat if name not in place}):
        raise ValueError(f"Labels that are not among `classes`: {', '.join(map(repr, unknown[:10]))}.")

    embeddings = torch.from_numpy(np.stack([row["embedding"] for row in rows])).to(classifier.vectors.device)
    logits = classifier.logits_of(embeddings).cpu()
    if multi_label:
        targets = torch.zeros(len(rows), len(place))
        for row, label in enumerate(labels_of):
            targets[row, [place[name] for name in label]] = 1
    else:
        targets = torch.tensor([place[name] for name in labels_of])
    figures = _several(classifier, logits, targets) if multi_label else _one(classifier, logits, targets)
    figures |= _calibration(classifier, logits, targets)
    if confusion_picture is not None and not multi_label:
        draw_confusion(confusion_matrix(targets, logits.argmax(-1), len(place)), classifier.names, confusion_picture)
    return {"images": len(rows), **figures, "failed": failed}


def _one(classifier: CocaClassifier, logits: torch.Tensor, targets: torch.Tensor) -> dict[str, Any]:
    from modeling_coca.evaluation import classification_accuracy

    accuracy, per_class = classification_accuracy(logits, targets, ks=(1, 5))
    predicted = logits.argmax(-1)
    wrong = Counter((t, p) for t, p in zip(targets.tolist(), predicted.tolist(), strict=True) if t != p)
    names = classifier.names
    return {
        "top1": accuracy[1],
        "top5": accuracy[5],
        "mean_per_class": per_class.nanmean().item(),
        "confusions": [[names[true], names[taken], number] for (true, taken), number in wrong.most_common(10)],
    }


def _several(classifier: CocaClassifier, logits: torch.Tensor, targets: torch.Tensor) -> dict[str, Any]:
    chosen = (classifier.probabilities(logits) >= classifier.threshold).float()
    hits = float((chosen * targets).sum())
    precisions = []
    for column in targets.sum(0).nonzero().flatten().tolist():
        relevant = targets[logits[:, column].argsort(descending=True), column]
        precision = relevant.cumsum(0) / torch.arange(1, len(relevant) + 1)
        precisions.append(float((precision * relevant).sum() / relevant.sum()))
    return {
        "mean_average_precision": float(np.mean(precisions)),
        "precision": hits / max(float(chosen.sum()), 1.0),
        "recall": hits / max(float(targets.sum()), 1.0),
        "f1": 2 * hits / max(float(chosen.sum() + targets.sum()), 1.0),
    }


def _calibration(classifier: CocaClassifier, logits: torch.Tensor, targets: torch.Tensor) -> dict[str, float]:
    multi_label = classifier.multi_label

    def error(logits: torch.Tensor, targets: torch.Tensor, temperature: float, bias: float) -> float:
        if multi_label:
            return calibration_error(
                (logits / temperature + bias).sigmoid().flatten().numpy(), targets.flatten().numpy()
            )
        best = (logits / temperature).softmax(-1).max(-1)
        return calibration_error(best.values.numpy(), (best.indices == targets).numpy())

    figures = {"calibration_error": error(logits, targets, classifier.temperature, classifier.bias)}
    if len(logits) < 20:
        return figures
    half = torch.randperm(len(logits), generator=torch.Generator().manual_seed(0)) % 2 == 0
    errors = [
        error(logits[part], targets[part], *fit_calibration(logits[~part], targets[~part], multi_label))
        for part in (half, ~half)
    ]
    temperature, bias = fit_calibration(logits, targets, multi_label)
    return {**figures, "calibrated_error": float(np.mean(errors)), "temperature": temperature, "bias": bias}


def confusion_matrix(targets: torch.Tensor, predicted: torch.Tensor, num_classes: int) -> np.ndarray:
    """(classes, classes): how often the class of the row was taken for that of the column."""
    pairs = torch.bincount(targets * num_classes + predicted, minlength=num_classes**2)
    return pairs.view(num_classes, num_classes).numpy()


def draw_confusion(matrix: np.ndarray, names: Sequence[str], path: str | os.PathLike) -> None:
    """
    Draws a confusion matrix: each row's shares as shades, and in a small one the numbers.

    Args:
        matrix (`np.ndarray` of shape `(classes, classes)`): see [`confusion_matrix`].
        names (`Sequence[str]`): of the classes.
        path (`str`): a `.png`, `.svg` or `.pdf` file.
    """
    from matplotlib.figure import Figure

    count = len(names)
    side = min(4 + 0.35 * count, 24)
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.add_subplot()
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="predicted", ylabel="true")
    if count <= 60:
        short = [name if len(name) <= 30 else name[:29] + "…" for name in names]
        plain = {"parse_math": False, "usetex": False}  # a name with "$" is no formula
        axes.set_xticks(range(count), short, rotation=90, **plain)
        axes.set_yticks(range(count), short, **plain)
    if count <= 25:
        for row, column in zip(*np.nonzero(matrix), strict=True):
            color = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(matrix[row, column]), ha="center", va="center", color=color, fontsize=8)
    temporary = Path(path).with_name(f".{Path(path).name}.tmp{Path(path).suffix}")
    figure.savefig(temporary, dpi=120)
    os.replace(temporary, path)


__all__ = [
    "CocaClassifier",
    "calibration_error",
    "classify_images",
    "confusion_matrix",
    "draw_confusion",
    "evaluate_images",
    "fit_calibration",
    "read_classes",
]
