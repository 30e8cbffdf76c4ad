"""The metrics themselves, against numbers worked out by hand and those of the COCO evaluation's own code."""

import math
import random

import pytest
import torch

from modeling_coca.evaluation import (
    bleu4,
    caption_metrics,
    cider_d,
    classification_accuracy,
    normalize_answer,
    rank_of_best,
    recall_at_k,
    rouge_l,
    tokenize_caption,
    vqa_accuracy,
)

# ------------------------------------------------------------------------------------------------------- retrieval


def test_rank_of_best_positive():
    scores = torch.tensor([[0.9, 0.5, 0.7, 0.1]] * 4)
    assert rank_of_best(scores, [[0], [3], [1, 2], [0, 1, 2, 3]]).tolist() == [1, 4, 2, 1]


def test_ties_and_nans_count_against_the_query():
    assert rank_of_best(torch.zeros(1, 5), [[2]]).tolist() == [5]
    assert rank_of_best(torch.zeros(1, 5), [[2, 3]]).tolist() == [4]
    assert rank_of_best(torch.tensor([[0.0, torch.nan, 1.0]]), [[2]]).tolist() == [2]
    assert rank_of_best(torch.full((1, 4), torch.nan), [[0]]).tolist() == [4]


def test_queries_without_a_positive():
    assert rank_of_best(torch.zeros(2, 3), [[], [1]]).tolist() == [4, 3]
    images = torch.eye(3)
    # the second has no text: it is left out, not counted as a miss
    assert recall_at_k(images, torch.eye(3)[:2], [[0], [], [1]], ks=(1,)) == {1: 0.5}
    assert math.isnan(recall_at_k(images, torch.eye(3), [[], [], []], ks=(1,))[1])
    with pytest.raises(ValueError, match="3 queries"):
        recall_at_k(images, torch.eye(3), [[0]])


def test_one_image_and_one_text():
    assert recall_at_k(torch.ones(1, 2), torch.ones(1, 2), [[0]]) == {1: 1.0, 5: 1.0, 10: 1.0}


@pytest.mark.parametrize("chunk_size", [1, 3, 7, 1000])
def test_chunks_change_nothing(chunk_size):
    queries, candidates = torch.randn(20, 8), torch.randn(50, 8)
    positives = [[i, i + 20] for i in range(20)]
    scores = queries @ candidates.T
    best = torch.maximum(scores[range(20), range(20)], scores[range(20), range(20, 40)])
    ranks = 1 + (scores > best[:, None]).sum(1)
    expected = {k: (ranks <= k).double().mean().item() for k in (1, 5, 10)}
    assert 0 < expected[10] < 1
    assert recall_at_k(queries, candidates, positives, chunk_size=chunk_size) == expected


# -------------------------------------------------------------------------------------------------- classification


def test_accuracy_of_classes():
    scores = torch.tensor([[3.0, 2, 1], [3, 2, 1], [1, 2, 3], [1, 1, 1]])
    accuracy, per_class = classification_accuracy(scores, torch.tensor([0, 1, 2, 0]), ks=(1, 2, 5))
    assert accuracy == {1: 0.5, 2: 0.75, 5: 1.0}  # the last row is a tie of all
    assert per_class.tolist() == [0.5, 0.0, 1.0]
    with pytest.raises(ValueError, match="3 classes"):
        classification_accuracy(scores, torch.tensor([0, 1, 2, 3]))


# -------------------------------------------------------------------------------------------------------- captions

CAPTIONS = [
    ("a man rides a horse on the beach", ["a man riding a horse on the beach", "a person rides a brown horse"]),
    (
        "two dogs play with a ball",
        ["two dogs playing with a red ball in the park", "dogs play with a ball", "two puppies"],
    ),
    ("a red fire hydrant on the side of the road", ["a red fire hydrant sitting on the side of a road"]),
    ("cat", ["a black cat sleeps on a sofa", "cat on a couch"]),
    ("a train at a station at a station", ["a train stops at a station", "the train is at the station"]),
]


def test_captions_score_as_in_pycocoevalcap():
    # pycocoevalcap 1.2: Bleu(4), Cider(), Rouge() on these texts
    tokens = [caption.split() for caption, _ in CAPTIONS]
    references = [[text.split() for text in texts] for _, texts in CAPTIONS]
    assert bleu4(tokens, references) == pytest.approx(0.525840753, abs=1e-6)
    assert cider_d(tokens, references) == pytest.approx(3.182933909, abs=1e-6)
    assert rouge_l(tokens, references) == pytest.approx(0.748641490, abs=1e-6)


def test_captions_score_as_pycocoevalcap_scores_them():
    """Against the package itself, where it is installed; its other metrics need Java and are left out."""
    pytest.importorskip("pycocoevalcap")
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    generator = random.Random(0)
    words = sorted({word for caption, refs in CAPTIONS for text in (caption, *refs) for word in text.split()})

    def text(start):
        return " ".join(generator.choice(words) if generator.random() < 0.3 else word for word in start.split())

    chosen = [generator.choice(CAPTIONS) for _ in range(60)]
    candidates = {i: [text(caption)] for i, (caption, _) in enumerate(chosen)}
    references = {i: [text(ref) for ref in refs] for i, (_, refs) in enumerate(chosen)}
    tokens = [candidates[i][0].split() for i in range(60)]
    ref_tokens = [[ref.split() for ref in references[i]] for i in range(60)]
    theirs = Bleu(4).compute_score(references, candidates, verbose=0)[0][3]
    assert bleu4(tokens, ref_tokens) == pytest.approx(theirs, abs=1e-6)
    assert cider_d(tokens, ref_tokens) == pytest.approx(Cider().compute_score(references, candidates)[0], abs=1e-6)
    assert rouge_l(tokens, ref_tokens) == pytest.approx(Rouge().compute_score(references, candidates)[0], abs=1e-6)


def test_cider_d_by_hand():
    # Of 2 images; only the unigrams of the second have a weight of ln 2. Same length, so no penalty.
    predictions, references = [["x"], ["b"]], [[["x"]], [["b", "c"]]]
    # x: cosine 1 for n = 1, 0 for others. b: min(w, w) w / (w sqrt(2) w) with a length 1 apart: exp(-1/72)
    first = 10 * 1 / 4
    second = 10 * math.exp(-1 / 72) / math.sqrt(2) / 4
    assert cider_d(predictions, references) == pytest.approx((first + second) / 2, abs=1e-12)


def test_rouge_l_by_hand():
    # longest common subsequence "a c d": precision 3/4, recall 3/3
    expected = (1 + 1.44) * 0.75 / (1 + 1.44 * 0.75)
    assert rouge_l(["a b c d".split()], [["a c d".split()]]) == pytest.approx(expected, abs=1e-12)
    # the best precision and the best recall may come from two references
    assert rouge_l([["a", "b"]], [[["a"], ["a", "b", "c", "d"]]]) == pytest.approx(1.0, abs=1e-12)


def test_bleu4_by_hand():
    tokens = "the cat sat on the mat".split()
    assert bleu4([tokens], [[tokens]]) == pytest.approx(1.0, abs=1e-12)
    # precisions 5/6, 3/5, 2/4, 1/3, no brevity penalty
    reference = "the cat sat on a mat".split()
    expected = (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25
    assert bleu4([tokens], [[reference]]) == pytest.approx(expected, abs=1e-9)
    # too short: exp(1 - 8/6) of 1
    assert bleu4([tokens], [[[*tokens, "of", "mine"]]]) == pytest.approx(math.exp(1 - 8 / 6), abs=1e-9)


def test_empty_captions_score_nothing():
    metrics = caption_metrics(["", "a fox"], ["a red fox", ["..."]])
    assert metrics == {"caption_exact": 0.0, "bleu4": 0.0, "cider_d": 0.0, "rouge_l": 0.0}
    for predictions, references in (([], []), (["a"], []), (["a"], [[]])):
        with pytest.raises(ValueError, match="references"):
            caption_metrics(predictions, references)


def test_perfect_captions():
    texts = ["a red fox runs fast", "two blue birds sing loudly"]
    metrics = caption_metrics([text.upper() + " !" for text in texts], texts)
    assert metrics["caption_exact"] == metrics["rouge_l"] == 1.0
    assert metrics["bleu4"] == pytest.approx(1.0, abs=1e-12)
    assert metrics["cider_d"] == pytest.approx(10.0, abs=1e-12)


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("A man's dog isn't sure.", "a man 's dog is n't sure"),
        ("He can't, won't and shouldn't go!", "he ca n't wo n't and should n't go"),
        ("\"Quoted\" text, it said: 'hello'", "quoted text it said hello"),
        ("a 3.5-inch t-shirt costs $5.00 and 10%", "a 3.5-inch t-shirt costs $ 5.00 and 10 %"),
        ("A black-and-white photo -- of a cat...", "a black-and-white photo of a cat"),
        ("U.S. Army at 5 p.m. near St. Louis Ave.", "u.s. army at 5 p.m. near st. louis ave."),
        ("Let’s go; it’s late", "let 's go it 's late"),
        ("1,000 sheep & 2 cows", "1,000 sheep & 2 cows"),
        ("I cannot, they'd've", "i can not they 'd 've"),
        ("half–dash and em—dash", "half dash and em dash"),
        ("person: light skin tone", "person light skin tone"),
        ("한국어 문장 입니다", "한국어 문장 입니다"),
        ("...", ""),
    ],
)
def test_tokens_are_those_of_the_stanford_tokenizer(text, tokens):
    # expected: pycocoevalcap's PTBTokenizer (stanford-corenlp-3.4.1)
    assert tokenize_caption(text) == tokens.split()


# --------------------------------------------------------------------------------------------------------- answers


def test_answers_are_normalised():
    assert normalize_answer(" The TWO red-ish dogs! ") == "2 red ish dogs"
    assert normalize_answer("don't") == normalize_answer("dont") == "dont"
    assert normalize_answer("1,000.5") == "1000.5"
    assert normalize_answer("none") == "0"
    assert normalize_answer("") == ""


def test_vqa_accuracy_by_hand():
    assert vqa_accuracy("Yes.", ["yes"]) == 1.0
    assert vqa_accuracy("no", ["yes"]) == 0.0
    for count, expected in ((0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)):
        assert vqa_accuracy("red", ["a red"] * count + ["blue"] * (10 - count)) == pytest.approx(expected, abs=1e-12)
