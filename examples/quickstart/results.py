"""What a trained model does with held-out pictures: its scores, and the examples that the page shows."""

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset, DatasetDict
from emoji_data import TONES
from page import (
    EMOJI_CREDITS,
    Caption,
    Hit,
    PageResults,
    Question,
    Search,
    ZeroShot,
    score_rows,
)
from sacrebleu import corpus_bleu

from modeling_coca import CocaForConditionalGeneration, CocaProcessor

BATCH_SIZE = 128
FREE_QUERIES = ("a fruit", "a red heart", "a building", "an animal face")


def _batches(dataset: Dataset, features: np.ndarray | None, processor: CocaProcessor):
    """Inputs of the image side, from the cached features where there are any."""
    for start in range(0, len(dataset), BATCH_SIZE):
        rows = slice(start, start + BATCH_SIZE)
        if features is None:
            yield dict(processor.image_processor(dataset[rows]["image"], return_tensors="pt"))
        else:
            yield {"image_hidden_states": torch.from_numpy(features[rows, 0].astype(np.float32))}


@torch.inference_mode()
def text_embeddings(model: CocaForConditionalGeneration, processor: CocaProcessor, texts: list[str]) -> torch.Tensor:
    """(N,) texts -> (N, D), L2-normalised."""
    parts = []
    for start in range(0, len(texts), 256):
        inputs = processor.tokenizer(texts[start : start + 256], padding=True, return_tensors="pt")
        parts.append(model.get_text_features(inputs["input_ids"], inputs["attention_mask"]).pooler_output)
    return F.normalize(torch.cat(parts), dim=-1)


def other_tones(caption: str, tone: str) -> list[str]:
    """The caption with each of the five skin tones instead of its own."""
    return [caption.replace(f"{tone} skin tone", f"{other} skin tone") for other in TONES]


def class_embeddings(model, processor, dataset: Dataset) -> tuple[list[str], torch.Tensor]:
    """Each group's embedding by words alone: the mean over its name and the names of its subgroups."""
    groups = sorted(set(dataset["group"]))
    pairs = sorted(set(zip(dataset["group"], dataset["subgroup"], strict=True)))
    embeds = []
    for group in groups:
        words = [group.replace("&", "and")] + [sub.replace("&", "and") for g, sub in pairs if g == group]
        embeds.append(text_embeddings(model, processor, words).mean(dim=0))
    return groups, F.normalize(torch.stack(embeds), dim=-1)


@torch.inference_mode()
def evaluate_split(
    model: CocaForConditionalGeneration,
    processor: CocaProcessor,
    dataset: Dataset,
    features: np.ndarray | None,
    all_captions: list[str],
) -> tuple[dict[str, float], dict]:
    """Scores of a split, and the captions and embeddings behind them. Embedding and caption come from one pass."""
    embeds, captions = [], []
    for inputs in _batches(dataset, features, processor):
        image = model.get_image_features(**inputs)
        embeds.append(image.image_embeds)
        ids = model.generate(encoder_hidden_states=image.pooler_output, do_sample=False)
        captions += processor.batch_decode(ids, skip_special_tokens=True)
    embeds, captions = torch.cat(embeds), [caption.strip() for caption in captions]
    truths = list(dataset["caption"])

    index = {caption: i for i, caption in enumerate(all_captions)}
    candidates = text_embeddings(model, processor, all_captions)
    nearest = (embeds @ candidates.T).argmax(dim=-1).tolist()
    own = text_embeddings(model, processor, truths)
    found = (own @ embeds.T).argmax(dim=-1).tolist()
    scores = {
        "caption_exact": float(np.mean([c == t for c, t in zip(captions, truths, strict=True)])),
        "bleu4": corpus_bleu(captions, [truths], tokenize="none").score / 100,
        "i2t_r1_all": float(np.mean([n == index[t] for n, t in zip(nearest, truths, strict=True)])),
        "t2i_r1_all": float(np.mean([truths[f] == t for f, t in zip(found, truths, strict=True)])),
    }
    groups, group_embeds = class_embeddings(model, processor, dataset)
    group_scores = embeds @ group_embeds.T
    predicted = group_scores.argmax(dim=-1).tolist()
    scores["zero_shot_group"] = float(
        np.mean([groups[p] == g for p, g in zip(predicted, dataset["group"], strict=True)])
    )
    toned = [i for i, tones in enumerate(dataset["tones"]) if len(tones) == 1]
    if toned:
        right = []
        for i in toned:
            tone = dataset["tones"][i][0]
            choices = text_embeddings(model, processor, other_tones(truths[i], tone))
            right.append(TONES[int((choices @ embeds[i]).argmax())] == tone)
        scores["tone"] = float(np.mean(right))
    probabilities = (model.model.logit_scale.exp() * group_scores).softmax(dim=-1)
    return scores, {"captions": captions, "embeds": embeds, "groups": groups, "group_probabilities": probabilities}


@torch.inference_mode()
def answer_questions(model, processor, dataset: Dataset, features: np.ndarray | None) -> list[dict]:
    """Each picture's first question that is not about the artist, answered from the question as prefix."""
    picks = []
    for i, pairs in enumerate(dataset["qa"]):
        pairs = [pair for pair in pairs if "style" not in pair["question"]]
        picks += [(i, pairs[i % len(pairs)])] if pairs else []
    answers = []
    for start in range(0, len(picks), BATCH_SIZE):
        part = picks[start : start + BATCH_SIZE]
        rows = [i for i, _ in part]
        questions = [pair["question"] for _, pair in part]
        subset = dataset.select(rows)
        (inputs,) = _batches(subset, None if features is None else features[rows], processor)
        prompts = processor.tokenizer(questions, padding=True, padding_side="left", return_tensors="pt")
        ids = model.generate(**prompts, **inputs, do_sample=False)
        length = prompts["input_ids"].shape[1] - 1  # generation continues before the prompt's EOS
        texts = processor.batch_decode(ids[:, length:], skip_special_tokens=True)
        answers += [
            {"row": i, "question": pair["question"], "answer": text.strip(), "truth": pair["answer"]}
            for (i, pair), text in zip(part, texts, strict=True)
        ]
    return answers


def embed_queries(model, processor, data: DatasetDict) -> dict[str, torch.Tensor]:
    """Texts to search for: names of new drawings, spread over the split, and free words."""
    names = list(data["test_style"]["caption"])
    texts = [names[i] for i in np.linspace(5, len(names) - 5, 4).astype(int)] + list(FREE_QUERIES)
    return dict(zip(texts, text_embeddings(model, processor, texts), strict=True))


def build_page(
    metrics: dict, outputs: dict[str, dict], answers: list[dict], queries: dict[str, torch.Tensor], data: DatasetDict
) -> PageResults:
    """Picks what to show: evenly spaced over each split, so that nobody chose it, and failures as they come."""

    def spaced(count: int, total: int) -> list[int]:
        return np.linspace(0, total - 1, min(count, total)).astype(int).tolist()

    style, comp = data["test_style"], data["test_comp"]

    def caption(split: str, i: int) -> Caption:
        row = data[split][i]
        return Caption(row["image"], outputs[split]["captions"][i], row["caption"], row["style"])

    captions = [caption("test_style", i) for i in spaced(12, len(style))]
    captions += [caption("test_comp", i) for i in spaced(12, len(comp))]
    wrong = [i for i in range(len(style)) if outputs["test_style"]["captions"][i] != style[i]["caption"]]
    gallery = outputs["test_style"]["embeds"]

    def hits(scores: torch.Tensor, good: list[bool], skip: int | None = None) -> list[Hit]:
        best = [i for i in scores.argsort(descending=True).tolist() if i != skip][:6]
        return [Hit(style[i]["image"], style[i]["caption"], good[i]) for i in best]

    style_captions, subgroups = list(style["caption"]), list(style["subgroup"])
    text_searches = [
        Search(query, hits(gallery @ embedding, [text == query for text in style_captions]))
        for query, embedding in queries.items()
    ]
    image_searches = []
    for i in spaced(5, len(style)):
        good = [subgroup == subgroups[i] for subgroup in subgroups]
        query = Hit(style[i]["image"], style_captions[i])
        image_searches.append(Search(query, hits(gallery @ gallery[i], good, skip=i)))
    groups, probabilities = outputs["test_style"]["groups"], outputs["test_style"]["group_probabilities"]
    zero_shot = []
    for i in spaced(8, len(style)):
        best = probabilities[i].topk(4)
        classes = [(groups[k], p) for p, k in zip(best.values.tolist(), best.indices.tolist(), strict=True)]
        zero_shot.append(ZeroShot(style[i]["image"], style[i]["group"], classes))
    questions = [
        Question(style[a["row"]]["image"], a["question"], a["answer"], a["truth"])
        for a in (answers[i] for i in spaced(12, len(answers)))
    ]
    return PageResults(
        title="What a small CoCa learned in a few minutes",
        summary=(
            f"{metrics['trainable_parameters'] / 1e6:.1f} million trainable parameters, {len(data['train']):,} drawings of "
            "emoji by three artists with their names. Everything below is about drawings that it has not seen."
        ),
        facts=[
            (f"{metrics['train_seconds']:.0f} s", "training"),
            (f"{metrics['test_style']['caption_exact']:.0%}", "captions right, word for word: new drawings"),
            (f"{metrics['test_comp']['caption_exact']:.0%}", "captions right, word for word: new combinations"),
            (f"{metrics['test_style']['answer_exact']:.0%}", "questions answered right"),
        ],
        hero=[style[i]["image"] for i in spaced(14, len(style))],
        scores=score_rows(metrics),
        captions=captions,
        text_searches=text_searches,
        image_searches=image_searches,
        zero_shot=zero_shot,
        questions=questions,
        failures=[caption("test_style", wrong[i]) for i in spaced(8, len(wrong))] if wrong else [],
        notes=[
            "Pictures are spread evenly over each split, not chosen. Searches look among the new drawings.",
            "Classes are given by words alone: the names of a group and of its subgroups.",
        ],
        credits=EMOJI_CREDITS,
    )
