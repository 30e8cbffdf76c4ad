"""Pictures with captions and questions, as rows of training."""

import torch
from datasets import Dataset, DatasetDict
from emoji_data import load_emoji
from torch.utils.data import Dataset as TorchDataset

from modeling_coca.training import FrozenFeatures, load_data


def load_pairs(
    dataset_name: str | None, cache_dir: str, image_column: str = "image", text_column: str = "text", seed: int = 0
) -> DatasetDict:
    """The emoji, or a set of pictures and captions of one's own, with the columns `image` and `caption`."""
    if dataset_name is None:
        return load_emoji(cache_dir)
    data = load_data(dataset_name, image_column=image_column)
    if set(data) == {"train"}:
        data = data["train"].train_test_split(test_size=0.05, seed=seed)
    for name, column in {"image_column": image_column, "text_column": text_column}.items():
        if column not in data["train"].features:
            columns = ", ".join(data["train"].features)
            raise ValueError(f"{dataset_name} has no column {column!r}, only {columns}: set `--{name}`.")

    def first_caption(row: dict) -> dict:
        caption = row[text_column]
        return {"caption": " ".join((caption if isinstance(caption, str) else caption[0]).split())}

    data = data.map(first_caption, desc="captions")
    return data.rename_column(image_column, "image") if image_column != "image" else data


def questions_of(dataset: Dataset) -> list[list[dict[str, str]]]:
    """For each picture its questions with their answers, if the set has any."""
    return list(dataset["qa"]) if "qa" in dataset.features else [[] for _ in range(len(dataset))]


class Rows(TorchDataset):
    """Training rows: a view of the picture, and its caption, or at times a question about it with the answer."""

    def __init__(self, dataset, features: FrozenFeatures | None, question_share: float):
        self.images = None if features is not None else dataset["image"]
        self.features = features
        self.captions, self.questions = list(dataset["caption"]), questions_of(dataset)
        self.question_share = question_share

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, index: int) -> dict:
        row = {"question": "", "text": self.captions[index]}
        if self.questions[index] and torch.rand(()) < self.question_share:
            pick = self.questions[index][int(torch.randint(len(self.questions[index]), ()))]
            row = {"question": pick["question"], "text": pick["answer"]}
        if self.features is None:
            return {"image": self.images[index], **row}
        return {"features": self.features[index][int(torch.randint(self.features.views, ()))], **row}
