"""Evaluators: callables that take a model, return a dict of floats, and serve as callbacks of a `Trainer`.

Each metric is also a function of its own, on plain data.
"""

from .captioning import CaptioningEvaluator, bleu4, caption_metrics, cider_d, rouge_l, tokenize_caption
from .evaluator import CocaEvaluator
from .question_answering import QuestionAnsweringEvaluator, normalize_answer, vqa_accuracy
from .retrieval import RetrievalEvaluator, rank_of_best, recall_at_k
from .zero_shot import ZeroShotClassificationEvaluator, classification_accuracy

__all__ = [
    "CaptioningEvaluator",
    "CocaEvaluator",
    "QuestionAnsweringEvaluator",
    "RetrievalEvaluator",
    "ZeroShotClassificationEvaluator",
    "bleu4",
    "caption_metrics",
    "cider_d",
    "classification_accuracy",
    "normalize_answer",
    "rank_of_best",
    "recall_at_k",
    "rouge_l",
    "tokenize_caption",
    "vqa_accuracy",
]
