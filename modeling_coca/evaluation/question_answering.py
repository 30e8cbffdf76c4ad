"""Answers to questions about images."""

import re
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel

from .evaluator import CocaEvaluator

_NUMBERS = {
    word: str(number) for number, word in enumerate("zero one two three four five six seven eight nine ten".split())
} | {"none": "0"}
_ARTICLES = {"a", "an", "the"}


def normalize_answer(answer: str) -> str:
    """
    Lower case, no punctuation, no articles, numbers up to ten as digits: the normalisation of the VQA evaluation
    (arXiv 1505.00468), with apostrophes left out of both sides instead of put into both.

    Example:

    ```python
    >>> from modeling_coca.evaluation import normalize_answer

    >>> normalize_answer(" The Two dogs! "), normalize_answer("don't"), normalize_answer("3.5")
    ('2 dogs', 'dont', '3.5')
    ```
    """
    text = re.sub(r"['’`]", "", answer.lower())
    text = re.sub(r"(?<=\d)[.,:](?=\d)|([^\w\s])", lambda match: " " if match[1] else match[0].replace(",", ""), text)
    return " ".join(_NUMBERS.get(word, word) for word in text.split() if word not in _ARTICLES)


def vqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """
    VQA v2's accuracy of one answer: right as far as three people of the others gave it, `min(count / 3, 1)`, mean over
    the choices of the others (all references but one).

    Args:
        answer (`str`): what the model says.
        references (`Sequence[str]`): what people said, usually ten of them. A single one must be matched.

    Example:

    ```python
    >>> from modeling_coca.evaluation import vqa_accuracy

    >>> round(vqa_accuracy("yes", ["yes"] * 2 + ["no"] * 8), 3)  # two of ten
    0.6
    ```
    """
    answer = normalize_answer(answer)
    equal = [normalize_answer(reference) == answer for reference in references]
    if len(equal) == 1:
        return float(equal[0])
    count = sum(equal)
    return sum(min((count - same) / 3, 1.0) for same in equal) / len(equal)


class QuestionAnsweringEvaluator(CocaEvaluator):
    """
    Lets the model go on after each question, and compares what it writes with the answer: `answer_accuracy`, the share
    of answers that are equal to a true one after [`normalize_answer`]; and `vqa_accuracy` where rows have a list of
    answers (VQA v2's rule, see [`vqa_accuracy`]). The answers are kept in `evaluator.predictions`.

    Args:
        processor, dataset and the rest: see [`CocaEvaluator`].
        question_column (`str`, defaults to `"question"`): column of the questions, one a row.
        answer_column (`str`, defaults to `"answer"`): column of the answers, a text or a list of texts.
        generation_kwargs (`dict`, *optional*): of `generate`, greedy search by default.

    Example:

    ```python
    >>> from modeling_coca.evaluation import QuestionAnsweringEvaluator

    >>> evaluator = QuestionAnsweringEvaluator(processor, dataset["test"], batch_size=256)  # doctest: +SKIP
    >>> evaluator(model)  # doctest: +SKIP
    {'answer_accuracy': 0.99}
    ```
    """

    primary_metric = "answer_accuracy"

    def __init__(
        self,
        processor,
        dataset,
        *,
        question_column: str = "question",
        answer_column: str = "answer",
        generation_kwargs: dict[str, Any] | None = None,
        **kwargs,
    ):
        super().__init__(processor, dataset, **kwargs)
        self.question_column = question_column
        self.answer_column = answer_column
        self.generation_kwargs = {"do_sample": False, **(generation_kwargs or {})}
        self.predictions: list[str] = []

    def compute(self, model: PreTrainedModel) -> dict[str, float]:
        questions = self.column(self.question_column, "question_column")
        answers = self.column(self.answer_column, "answer_column")
        several = any(not isinstance(answer, str) for answer in answers if answer is not None)
        if missing := [i for i, answer in enumerate(answers) if not answer]:
            raise ValueError(f"Rows {missing[:10]} have no answer in {self.answer_column!r} (`answer_column`).")
        references = [[answer] if isinstance(answer, str) else list(answer) for answer in answers]
        self.predictions = self.generate(model, "Answers", prompts=questions, **self.generation_kwargs)
        exact = [
            normalize_answer(prediction) in map(normalize_answer, refs)
            for prediction, refs in zip(self.predictions, references, strict=True)
        ]
        figures = {"answer_accuracy": sum(exact) / len(exact)}
        if several:
            scores = [vqa_accuracy(text, refs) for text, refs in zip(self.predictions, references, strict=True)]
            figures["vqa_accuracy"] = sum(scores) / len(scores)
        return figures


__all__ = ["QuestionAnsweringEvaluator", "normalize_answer", "vqa_accuracy"]
