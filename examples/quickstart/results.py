"""What a trained model does with held-out pictures: its scores, and the examples that the page shows."""

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset, DatasetDict
from emoji_data import TONES
from page import (
    SPLITS,
    Caption,
    Hit,
    PageResults,
    Question,
    Search,
    ZeroShot,
    score_rows,
)

from modeling_coca import CocaForConditionalGeneration, CocaProcessor
from modeling_coca.evaluation import CocaEvaluator, bleu4, recall_at_k
from modeling_coca.training import FrozenFeatures

BATCH_SIZE = 128


def evaluator_of(processor: CocaProcessor, dataset: Dataset, features: FrozenFeatures | None) -> CocaEvaluator:
    """Runs a model over the pictures, or over their plain views' features where these are at hand."""
    rows = dataset if features is None else [{"features": views[0]} for views in features]
    column = None if features is None else "features"
    return CocaEvaluator(processor, rows, image_hidden_states_column=column, batch_size=BATCH_SIZE)


def other_tones(caption: str, tone: str) -> list[str]:
    """The caption with each of the five skin tones instead of its own."""
    return [caption.replace(f"{tone} skin tone", f"{other} skin tone") for other in TONES]


@torch.inference_mode()
def class_embeddings(
    model: CocaForConditionalGeneration, evaluator: CocaEvaluator, train: Dataset
) -> tuple[list[str], torch.Tensor]:
    """Groups, each described by words alone: the mean over its name and the names of its members in training."""
    members: dict[str, set[str]] = {}
    for group, caption in zip(train["group"], train["caption"], strict=True):
        members.setdefault(group, {group.replace("&", "and")}).add(caption)
    groups = sorted(members)
    embeds = [evaluator.encode_texts(model, sorted(members[group])).mean(dim=0) for group in groups]
    return groups, F.normalize(torch.stack(embeds), dim=-1)


@torch.inference_mode()
def evaluate_split(
    model: CocaForConditionalGeneration,
    evaluator: CocaEvaluator,
    dataset: Dataset,
    all_captions: dict[str, int],
    candidates: torch.Tensor,
    classes: tuple[list[str], torch.Tensor] | None,
) -> tuple[dict[str, float], dict]:
    """
    Scores of a split, and the captions and embeddings behind them. Embedding and caption come from one pass.

    `all_captions` gives each caption's row in `candidates`, their embeddings.
    """
    processor = evaluator.processor
    embeds, captions = [], []
    for inputs in evaluator.image_batches(model, "Captions"):
        image = model.get_image_features(**inputs)
        embeds.append(image.image_embeds)
        ids = model.generate(encoder_hidden_states=image.pooler_output, do_sample=False)
        captions += processor.batch_decode(ids, skip_special_tokens=True)
    embeds, captions = torch.cat(embeds), [caption.strip() for caption in captions]
    truths = list(dataset["caption"])
    # As the tokenizer writes them, which does not tell typographic quotes, say, from straight ones
    written = processor.batch_decode(processor.tokenizer(truths)["input_ids"], skip_special_tokens=True)
    captions = [t if c == w else c for c, t, w in zip(captions, truths, written, strict=True)]

    rows = [all_captions[truth] for truth in truths]
    pictures_of: dict[str, list[int]] = {}
    for i, truth in enumerate(truths):
        pictures_of.setdefault(truth, []).append(i)
    scores = {
        "caption_exact": float(np.mean([c == t for c, t in zip(captions, truths, strict=True)])),
        "bleu4": bleu4([caption.split() for caption in captions], [[truth.split()] for truth in truths]),
        "i2t_r1_all": recall_at_k(embeds, candidates, [[row] for row in rows], ks=(1,))[1],
        "t2i_r1_all": recall_at_k(candidates[rows], embeds, [pictures_of[truth] for truth in truths], ks=(1,))[1],
    }
    outputs = {"captions": captions, "embeds": embeds}
    if classes is not None:
        groups, group_embeds = classes
        probabilities = (model.model.logit_scale.exp() * (embeds @ group_embeds.T)).softmax(dim=-1)
        predicted = [groups[i] for i in probabilities.argmax(dim=-1).tolist()]
        scores["zero_shot_group"] = float(np.mean([p == g for p, g in zip(predicted, dataset["group"], strict=True)]))
        outputs["groups"] = groups, probabilities
    tones = dataset["tones"] if "tones" in dataset.features else []
    toned = [(i, tone[0]) for i, tone in enumerate(tones) if len(tone) == 1]
    if toned:
        variants = [text for i, tone in toned for text in other_tones(truths[i], tone)]
        choices = evaluator.encode_texts(model, variants).view(len(toned), len(TONES), -1)
        best = torch.einsum("ntd,nd->nt", choices, embeds[[i for i, _ in toned]]).argmax(dim=-1).tolist()
        scores["tone"] = float(np.mean([TONES[k] == tone for k, (_, tone) in zip(best, toned, strict=True)]))
    return scores, outputs


@torch.inference_mode()
def answer_questions(
    model: CocaForConditionalGeneration,
    processor: CocaProcessor,
    dataset: Dataset,
    questions_of_rows: list[list[dict]],
    features: FrozenFeatures | None,
) -> list[dict]:
    """Each picture's first question that is not about the artist, answered from the question as prefix."""
    picks = []
    for i, pairs in enumerate(questions_of_rows):
        pairs = [pair for pair in pairs if "style" not in pair["question"]]
        picks += [(i, pairs[i % len(pairs)])] if pairs else []
    if not picks:
        return []
    rows = [i for i, _ in picks]
    evaluator = evaluator_of(processor, dataset.select(rows), None if features is None else features.select(rows))
    texts = evaluator.generate(model, "Answers", [pair["question"] for _, pair in picks], do_sample=False)
    return [
        {"row": i, "question": pair["question"], "answer": text, "truth": pair["answer"]}
        for (i, pair), text in zip(picks, texts, strict=True)
    ]


@torch.inference_mode()
def embed_queries(
    model: CocaForConditionalGeneration, evaluator: CocaEvaluator, dataset: Dataset, free: tuple[str, ...] = ()
) -> dict[str, torch.Tensor]:
    """Texts to search for: captions of held-out pictures, spread over the split, and free words."""
    captions = list(dataset["caption"])
    texts = [captions[i] for i in spaced(6 - len(free) // 2, len(captions) - 1)] + list(free)
    return dict(zip(texts, evaluator.encode_texts(model, texts), strict=True))


def spaced(count: int, total: int) -> list[int]:
    """Indices spread evenly over a split, so that nobody chose them."""
    return np.linspace(0, total - 1, min(count, total)).astype(int).tolist()


def build_page(
    metrics: dict,
    outputs: dict[str, dict],
    answers: list[dict],
    queries: dict[str, torch.Tensor],
    train_embeds: torch.Tensor,
    data: DatasetDict,
    credits: tuple[str, ...],
) -> PageResults:
    """What the page shows: searches for and with the first held-out split, and pictures spread over the first two."""
    first = next(iter(outputs))
    gallery, embeds = data[first], outputs[first]["embeds"]
    names = list(gallery["caption"])
    train, train_names = data["train"], list(data["train"]["caption"])

    def caption(split: str, i: int) -> Caption:
        row = data[split][i]
        return Caption(row["image"], outputs[split]["captions"][i], row["caption"], row.get("style", split))

    def hits(dataset: Dataset, captions: list[str], scores: torch.Tensor, wanted: str) -> list[Hit]:
        best = scores.topk(min(5, len(scores))).indices.tolist()
        return [Hit(dataset[i]["image"], captions[i], captions[i] == wanted) for i in best]

    text_searches = [
        Search(query, hits(gallery, names, embeds @ embedding, query)) for query, embedding in queries.items()
    ]
    image_searches = [
        Search(Hit(gallery[i]["image"], names[i]), hits(train, train_names, train_embeds @ embeds[i], names[i]))
        for i in spaced(6, len(gallery))
    ]
    zero_shot = []
    if "groups" in outputs[first]:
        groups, probabilities = outputs[first]["groups"]
        for i in spaced(8, len(gallery)):
            best = probabilities[i].topk(min(4, len(groups)))
            likeliest = [(groups[k], p) for p, k in zip(best.values.tolist(), best.indices.tolist(), strict=True)]
            zero_shot.append(ZeroShot(gallery[i]["image"], gallery[i]["group"], likeliest))
    questions = [
        Question(gallery[answer["row"]]["image"], answer["question"], answer["answer"], answer["truth"])
        for answer in (answers[i] for i in spaced(12, len(answers)))
    ]
    wrong = [i for i, name in enumerate(names) if outputs[first]["captions"][i] != name]
    facts = [(f"{metrics['train_seconds']:.0f} s", "training")]
    facts += [
        (f"{metrics[split]['caption_exact']:.0%}", f"captions right, word for word: {SPLITS.get(split, split)}")
        for split in list(outputs)[:2]
    ]
    if answers:
        facts.append((f"{metrics[first]['answer_exact']:.0%}", "questions answered right"))
    return PageResults(
        title="What a small CoCa learned in a few minutes",
        summary=(
            f"{metrics['trainable_parameters'] / 1e6:.1f} million trainable parameters, {len(data['train']):,} pictures with "
            "captions. Everything below is about pictures that it has not seen."
        ),
        facts=facts,
        hero=[gallery[i]["image"] for i in spaced(14, len(gallery))],
        scores=score_rows(metrics) if credits else score_rows(metrics, references=None),
        captions=[caption(split, i) for split in list(outputs)[:2] for i in spaced(12, len(data[split]))],
        text_searches=text_searches,
        image_searches=image_searches,
        zero_shot=zero_shot,
        questions=questions,
        failures=[caption(first, wrong[i]) for i in spaced(8, len(wrong))] if wrong else [],
        notes=[
            f"Pictures are spread evenly over each split, not chosen. Search by words looks among the {len(gallery)} pictures "
            "of the first split; search by picture takes them as queries and looks among the training pictures.",
            "Classes are given by words alone: the name of a group, and the names of its members known from training.",
        ],
        credits=credits,
    )
