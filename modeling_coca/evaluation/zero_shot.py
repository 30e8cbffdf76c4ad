"""Zero-shot classification: the class whose descriptions are nearest to the image."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from .evaluator import CocaEvaluator
from .retrieval import rank_of_best


def classification_accuracy(
    scores: torch.Tensor, labels: torch.Tensor, ks: Sequence[int] = (1, 5)
) -> tuple[dict[int, float], torch.Tensor]:
    """
    Top-k accuracies, and the top-1 accuracy of each class. A tie counts as wrong.

    Args:
        scores (`torch.Tensor` of shape `(images, classes)`): higher is better.
        labels (`torch.LongTensor` of shape `(images,)`): the true classes.
        ks (`Sequence[int]`): numbers of classes that are looked at.

    Returns:
        the accuracy for each `k`, and one for each class (classes,), not a number for classes without an image.

    Example:

    ```python
    >>> import torch
    >>> from modeling_coca.evaluation import classification_accuracy

    >>> scores = torch.tensor([[0.9, 0.1, 0.0], [0.6, 0.4, 0.1], [0.1, 0.8, 0.1]])
    >>> accuracy, per_class = classification_accuracy(scores, torch.tensor([0, 1, 1]), ks=(1, 2))
    >>> accuracy[2], per_class.tolist()
    (1.0, [1.0, 0.5, nan])
    ```
    """
    num_classes = scores.shape[1]
    if len(labels) and not (0 <= int(labels.min()) and int(labels.max()) < num_classes):
        raise ValueError(
            f"`labels` go from {int(labels.min())} to {int(labels.max())}, and there are {num_classes} classes."
        )
    ranks = rank_of_best(scores, [[label] for label in labels.tolist()])
    right = (ranks == 1).double()
    per_class = torch.zeros(num_classes, dtype=torch.double, device=scores.device)
    labels = labels.to(scores.device)
    per_class = per_class.index_add(0, labels, right) / torch.bincount(labels, minlength=num_classes)
    return {k: (ranks <= k).double().mean().item() for k in ks}, per_class


class ZeroShotClassificationEvaluator(CocaEvaluator):
    """
    Accuracy of the class whose texts are nearest to the image: `zero_shot_top1`, `zero_shot_top5` and
    `zero_shot_mean_per_class` (the mean of the classes' own accuracies, which does not favour frequent ones).

    Each class is described by every template; the normalised embeddings of the texts are averaged and normalised again
    (CLIP, arXiv 2103.00020).

    Args:
        processor, dataset and the rest: see [`CocaEvaluator`].
        label_column (`str`, defaults to `"label"`): column of class indices, or of class names.
        class_names (`Sequence[str]`, *optional*): by default those of the column, if it is a `datasets.ClassLabel`.
        templates (`Sequence[str | Callable[[str], str]]`, defaults to `("a photo of a {}.",)`):
            Sentences with `{}` for the class name, or functions of it.
        ks (`Sequence[int]`, defaults to `(1, 5)`): numbers of classes that are looked at.
        per_class (`bool`, defaults to `False`): add `zero_shot_top1/<class name>` for each class that has an image.

    Example:

    ```python
    >>> from modeling_coca.evaluation import ZeroShotClassificationEvaluator

    >>> evaluator = ZeroShotClassificationEvaluator(  # doctest: +SKIP
    ...     processor, dataset["test"], templates=["a photo of a {}.", "a drawing of a {}."]
    ... )
    >>> evaluator(model)["zero_shot_top1"]  # doctest: +SKIP
    0.63
    ```
    """

    primary_metric = "zero_shot_top1"

    def __init__(
        self,
        processor,
        dataset,
        *,
        label_column: str = "label",
        class_names: Sequence[str] | None = None,
        templates: Sequence[str | Callable[[str], str]] = ("a photo of a {}.",),
        ks: Sequence[int] = (1, 5),
        per_class: bool = False,
        **kwargs,
    ):
        super().__init__(processor, dataset, **kwargs)
        if class_names is None:
            feature = (getattr(dataset, "features", None) or {}).get(label_column)
            class_names = getattr(feature, "names", None)
            if class_names is None:
                raise ValueError(f"Column {label_column!r} (`label_column`) names no classes: pass `class_names`.")
        self.label_column = label_column
        self.class_names = list(class_names)
        self.templates = [templates] if isinstance(templates, str) else list(templates)
        if not self.templates or any(isinstance(t, str) and "{}" not in t for t in self.templates):
            raise ValueError(f"Each of `templates` needs a '{{}}' where the class name goes, got {self.templates}.")
        self.ks = tuple(dict.fromkeys((1, *ks)))
        self.per_class = per_class

    def class_embeddings(self, model: PreTrainedModel) -> torch.Tensor:
        """The classifier: one L2-normalised vector a class, (classes, projection_dim)."""
        texts = [
            template.replace("{}", name) if isinstance(template, str) else template(name)
            for name in self.class_names
            for template in self.templates
        ]
        embeds = self.encode_texts(model, texts).view(len(self.class_names), len(self.templates), -1)
        return F.normalize(embeds.mean(dim=1), dim=-1)

    def compute(self, model: PreTrainedModel) -> dict[str, float]:
        labels = self.column(self.label_column, "label_column")
        if isinstance(labels[0], str):
            index = {name: i for i, name in enumerate(self.class_names)}
            if unknown := sorted(set(labels) - set(index)):
                raise ValueError(f"Labels that are not in `class_names`: {', '.join(map(repr, unknown[:10]))}.")
            labels = [index[label] for label in labels]
        scores = self.encode_images(model) @ self.class_embeddings(model).T
        accuracy, per_class = classification_accuracy(scores, torch.tensor(labels), self.ks)
        figures = {f"zero_shot_top{k}": value for k, value in accuracy.items()}
        figures["zero_shot_mean_per_class"] = per_class.nanmean().item()
        if self.per_class:
            for name, value in zip(self.class_names, per_class.tolist(), strict=True):
                if value == value:
                    figures[f"zero_shot_top1/{name}"] = value
        return figures


__all__ = ["ZeroShotClassificationEvaluator", "classification_accuracy"]
