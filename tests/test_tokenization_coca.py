import copy
import json
import logging
import pickle
import random

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

import modeling_coca  # noqa: F401  (registers the Auto classes)
from modeling_coca import tokenization_coca
from modeling_coca.tokenization_coca import CocaTokenizer, clean_text

CORPUS = ["a photo of a red fox", "two blue whales!", "the man's red hat", "빨간 여우가 뛴다", "파란 고래 🐳"] * 8

# Pieces that the random texts of the parity test are glued from, and texts by themselves.
PIECES = [
    *[
        "a",
        "Ab",
        "the",
        "DOG",
        "x9",
        "9",
        "2026",
        "é",
        "e\u0301",
        "ñ",
        "ß",
        "ẞ",
        "İ",
        "ı",
        "Σ",
        "ς",
        "ΟΔΟΣ",
        "K",
        "ſ",
        "ŉ",
        "Ǆ",
    ],
    *[
        "!",
        "!!",
        "!!!",
        "#",
        "_",
        "-",
        "--",
        ".",
        ",",
        "?",
        "'",
        "'s",
        "'S",
        "'ll",
        "'ſ",
        "’s",
        "“",
        "”",
        "…",
        "&",
        "<",
        ">",
    ],
    *["&amp;", "&amp;amp;", "&lt;b&gt;", "&#39;", "&eacute;", "&nbsp;", "&#xD800;", "&#1;", "&copy"],
    *["Ã©", "â€™", "â€œ", "Ã¼", "ï»¿", "ﬁ", "ﬄ", "Ａ", "！", "ｶﾞ", "㈱", "①", "½", "²", "१२", "٣", "ⅷ"],
    *["한국어", "가", "\u1100\u1161", "각", "日本語", "中文", "ไทย", "עברית", "ﷺ", "𝔘", "हिन्दी"],
    *["😀", "👍🏽", "👨‍👩‍👧", "🏳️‍🌈", "🇰🇷", "☃", "©", "€", "\u200d", "\ufe0f"],
    *[
        " ",
        "  ",
        "\t",
        "\n",
        "\r\n",
        "\u00a0",
        "\u3000",
        "\u2028",
        "\u200b",
        "\x85",
        "\x1c",
        "\x0b",
        "\x00",
        "\x7f",
        "\ufeff",
        "\x1b[1m",
    ],
    *["\ud800", "\udc00", "\ud83d\ude00", "\ufffd", "\U0010ffff", "\u202e"],
    *["<start_of_text>", "<end_of_text>", "<END_OF_TEXT>", "<|endoftext|>", "<|startoftext|>", "</w>", "Ġ", "<pad>"],
]
TEXTS = [
    *[
        "",
        " ",
        "hello!",
        "!",
        "!__init__",
        "!@#$%^&*()",
        "wow!!! so #cool",
        "it's we'll I'D don't",
        "a  b\tc\nd",
        "MiXeD CaSe",
        "x" * 400,
    ],
    *[
        "a photo of a cat " * 30,
        "1234567890 " * 20,
        "한" * 90,
        "!" * 300,
        "👨‍👩‍👧‍👦" * 20,
        "tom &amp;amp; jerry",
        "<b>e&#x301;</b>",
        "l’hôtel “Ritz”",
    ],
    *[
        "a<start_of_text>b",
        "!<end_of_text>",
        "(<end_of_text>)",
        "<start_of_text><end_of_text>!<end_of_text> <start_of_text>",
        "<<end_of_text>>",
    ],
]


@pytest.fixture(scope="module")
def small():
    """A vocabulary of its own, `<pad>` included."""
    return CocaTokenizer().train_new_from_iterator(CORPUS, vocab_size=500)


@pytest.fixture(scope="module")
def clip_like(small):
    """CLIP's layout in small: bytes first (`"!"` is 0), special tokens last, no pad token of its own."""
    model = json.loads(small.backend_tokenizer.to_str())["model"]
    tokens = [*tokenization_coca._BYTE_SYMBOLS, *(symbol + "</w>" for symbol in tokenization_coca._BYTE_SYMBOLS)]
    tokens += ["".join(merge) for merge in model["merges"]] + ["<start_of_text>", "<end_of_text>"]
    return CocaTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=model["merges"])


@pytest.fixture(scope="module")
def clip():
    pytest.importorskip("open_clip")
    return CocaTokenizer.from_open_clip_bpe()


def test_ids_equal_open_clips_on_tricky_texts(clip):
    reference = pytest.importorskip("open_clip").tokenizer.SimpleTokenizer(context_length=76)
    rng = random.Random(0)
    texts = TEXTS + PIECES + ["".join(rng.choices(PIECES, k=rng.randint(2, 9))) for _ in range(600)]
    texts += [text.encode().decode("latin-1") for text in ("déjà vu", "한국", "“quoted”")]
    ours = clip(texts, padding="max_length", truncation=True)["input_ids"]
    different = [text for text, ids in zip(texts, ours, strict=False) if ids != reference(text)[0].tolist()]
    assert len(texts) > 700
    assert different == []


def test_clip_vocabulary_and_its_special_ids(clip):
    assert len(clip) == clip.vocab_size == 49408
    assert (clip.bos_token_id, clip.eos_token_id, clip.pad_token_id, clip.model_max_length) == (49406, 49407, 0, 76)
    assert clip.all_special_ids == [49406, 49407]
    assert clip("hello!")["input_ids"] == [49406, 3306, 256, 49407]
    assert clip("!__init__", add_special_tokens=False)["input_ids"][0] == 0
    assert clip.decode(clip("hello! !__init__")["input_ids"], skip_special_tokens=True) == "hello! !__ init __"


def test_from_open_clip_bpe_refuses_other_files(tmp_path, monkeypatch):
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    with pytest.raises(ValueError, match="is not CLIP's merges file"):
        CocaTokenizer.from_open_clip_bpe(tmp_path / "merges.txt")
    monkeypatch.setattr(tokenization_coca.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install open_clip_torch"):
        CocaTokenizer.from_open_clip_bpe()


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("  Fish &amp;amp; CHIPS\n", "fish & chips"),
        ("l’hÃ´tel", "l'hôtel"),
        ("ﬁne", "fine"),
        ("ＡＢＣ", "abc"),
        ("ΟΔΟΣ", "οδος"),
        ("a\x00b\u3000\u2028c", "ab c"),
        ("\ud83d\ude00 \ud800", "😀 \ufffd"),
        ("", ""),
    ],
)
def test_clean_text(text, cleaned):
    pytest.importorskip("ftfy")
    assert clean_text(text) == cleaned


def test_every_entry_cleans(small):
    want = small("red & blue")["input_ids"]
    raw = "  RED &amp;amp;\tBlue "
    assert want[1:-1] == small.convert_tokens_to_ids(small.tokenize(raw))
    assert small.encode(raw) == want
    assert small([raw, raw])["input_ids"] == [want, want]
    assert small(text_target=raw)["input_ids"] == want
    assert small(["RED", "&amp;", "Blue"], is_split_into_words=True)["input_ids"] == want
    assert small([["RED", "&amp;"], ["Blue"]], is_split_into_words=True)["input_ids"][0] == small("red &")["input_ids"]
    pair = small(raw, "THE hat")["input_ids"]
    assert pair == small([(raw, "THE hat")])["input_ids"][0] == small("red & blue", "the hat")["input_ids"]


def test_without_ftfy_it_warns_once_and_goes_on(small, monkeypatch):
    warnings = []
    monkeypatch.setattr(tokenization_coca, "ftfy", None)
    monkeypatch.setattr(tokenization_coca.logger, "warning_once", warnings.append)
    assert clean_text("Plain ASCII, it's fine!") == "plain ascii, it's fine!"
    assert warnings == []
    assert clean_text("e\u0301 l’Été\x00 “q” &amp; \ud83d\ude00\ud800") == 'é l\'été "q" & 😀\ufffd'
    assert "pip install ftfy" in warnings[0]
    assert small.decode(small("고래 \ud800 \x00")["input_ids"], skip_special_tokens=True) == "고래 \ufffd"


def test_padding_with_a_text_token_keeps_it_text(clip_like):
    tokenizer = clip_like
    assert tokenizer.pad_token == "!" and tokenizer.pad_token_id == 0
    assert tokenizer.all_special_tokens == ["<start_of_text>", "<end_of_text>"]
    batch = tokenizer(["!#", "a red fox!"], padding=True, return_tensors="pt")
    assert batch["input_ids"][0, 1] == 0 and batch["attention_mask"][0, :4].all()
    padding = batch["input_ids"].shape[1] - 4
    assert batch["input_ids"][0, 4:].tolist() == [0] * padding and not batch["attention_mask"][0, 4:].any()
    assert tokenizer.decode(batch["input_ids"], skip_special_tokens=True) == ["!#", "a red fox!"]
    left = tokenizer(["!#", "a red fox!"], padding=True, padding_side="left")
    assert left["input_ids"][0] == [0] * padding + batch["input_ids"][0, :4].tolist()
    assert tokenizer.batch_decode(left["input_ids"], skip_special_tokens=True) == ["!#", "a red fox!"]
    # Not padding: no special token beside it.
    ids = tokenizer("!#", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "!#"
    assert tokenizer.decode(0) == tokenizer.decode([0], skip_special_tokens=True) == "!"
    assert tokenizer.pad({"input_ids": [[7, 8], [9]]})["input_ids"] == [[7, 8], [9, 0]]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert tokenizer.decode(np.array([[0, bos, *ids, eos, 0]]), skip_special_tokens=True) == ["!#"]
    assert tokenizer.decode(torch.tensor([*ids, eos, 0, 0]), skip_special_tokens=True) == "!#"


@pytest.mark.parametrize("set_pad", [{"pad_token": "!"}, {"pad_token_id": 0}])
def test_pad_token_set_by_hand_stays_text(clip_like, set_pad):
    tokenizer = copy.deepcopy(clip_like)
    want = tokenizer("wow! !!#")["input_ids"]
    for name, value in set_pad.items():
        setattr(tokenizer, name, value)
    tokenizer.add_special_tokens({"pad_token": "!"})
    assert tokenizer("wow! !!#")["input_ids"] == want
    assert 0 not in tokenizer.all_special_ids and len(tokenizer) == len(clip_like)


def test_saved_copied_and_pickled_tokenizers_are_equal(clip_like, small, tmp_path):
    for name, tokenizer in (("clip", clip_like), ("small", small)):
        text = ["hi! !# <pad> 고래", "a"]
        # The state of this call must not become the loaded tokenizer's default.
        want = tokenizer(text, padding=True, padding_side="left", truncation=True, max_length=8)
        tokenizer.save_pretrained(tmp_path / name)
        others = [CocaTokenizer.from_pretrained(tmp_path / name), AutoTokenizer.from_pretrained(tmp_path / name)]
        others += [copy.deepcopy(tokenizer), pickle.loads(pickle.dumps(tokenizer))]
        for other in others:
            assert type(other) is CocaTokenizer
            assert other(text, padding=True, padding_side="left", truncation=True, max_length=8) == want
            assert other.padding_side == "right" and other.model_max_length == 76
            assert other.special_tokens_map == tokenizer.special_tokens_map
            assert other.all_special_ids == tokenizer.all_special_ids and len(other) == len(tokenizer)
            assert other.decode(other("it's red!")["input_ids"], skip_special_tokens=True) == "it's red!"


def test_vocab_and_merges_files(clip_like, tmp_path):
    model = json.loads(clip_like.backend_tokenizer.to_str())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(merge) for merge in model["merges"]))
    want = clip_like("# a red fox! !#")["input_ids"]
    paths = {"vocab": str(tmp_path / "vocab.json"), "merges": str(tmp_path / "merges.txt")}
    for tokenizer in (CocaTokenizer(**paths), CocaTokenizer.from_pretrained(tmp_path)):
        assert tokenizer("# a red fox! !#")["input_ids"] == want
        assert tokenizer.pad_token_id == 0 and 0 not in tokenizer.all_special_ids


def test_bos_and_eos_that_are_not_in_the_vocabulary(clip_like, tmp_path, caplog):
    model = json.loads(clip_like.backend_tokenizer.to_str())["model"]
    other = {
        token.replace("_of_", "-"): index for token, index in model["vocab"].items()
    }  # as another file spells them
    with pytest.raises(ValueError, match="bos_token='<start_of_text>' is not in the vocabulary"):
        CocaTokenizer(vocab=other, merges=model["merges"])
    with pytest.raises(ValueError, match="bos_token=None is not in the vocabulary"):
        CocaTokenizer(vocab=model["vocab"], merges=model["merges"], bos_token=None)

    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        tokenizer = CocaTokenizer(vocab=model["vocab"], merges=model["merges"], bos_token="<BOS>")
        (record,) = caplog.records
        size = len(model["vocab"])
        assert f"resize_token_embeddings({size + 1})" in record.getMessage()
        assert "text_config.bos_token_id" in record.getMessage()
        ids = tokenizer("a <BOS> fox")["input_ids"]
        assert ids[0] == tokenizer.bos_token_id == size and ids.count(size) == 2 and ids[-1] == clip_like.eos_token_id
        caplog.clear()
        tokenizer.save_pretrained(tmp_path)
        assert CocaTokenizer.from_pretrained(tmp_path)("a <BOS> fox")["input_ids"] == ids
        assert caplog.records == []
    finally:
        logger.removeHandler(caplog.handler)


def test_special_tokens_with_capitals(small, tmp_path):
    tokenizer = copy.deepcopy(small)
    tokenizer.add_special_tokens({"extra_special_tokens": ["[IMG]", "[IMG]2"]})
    one, two = tokenizer.convert_tokens_to_ids(["[IMG]", "[IMG]2"])
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    fox = small("A  fox", add_special_tokens=False)["input_ids"]
    tokenizer.save_pretrained(tmp_path)
    for each in (tokenizer, CocaTokenizer.from_pretrained(tmp_path), pickle.loads(pickle.dumps(tokenizer))):
        assert each("[IMG]A  Fox[IMG]2 [IMG]")["input_ids"] == [bos, one, *fox, two, one, eos]
        assert each(["[img]", "<END_OF_TEXT>"])["input_ids"] == small(["[img]", "<END_OF_TEXT>"])["input_ids"]


def test_what_is_saved_does_not_depend_on_the_last_call(small, tmp_path):
    tokenizer = copy.deepcopy(small)
    tokenizer.save_pretrained(tmp_path / "fresh")
    ids = tokenizer(["fox", "a fox and a dog"], padding=True, truncation=True, max_length=4)["input_ids"]
    tokenizer.save_pretrained(tmp_path / "used")
    assert tokenizer(["fox", "a fox and a dog"], padding=True, truncation=True, max_length=4)["input_ids"] == ids
    fresh, used = ((tmp_path / name / "tokenizer.json").read_text() for name in ("fresh", "used"))
    assert fresh == used


def test_too_long_text_is_an_error_unless_truncated(clip_like):
    text = "fox " * 100
    for call in (clip_like, clip_like.encode):
        with pytest.raises(ValueError, match=r"102 tokens.*limit is 76.*'fox fox.*truncation=True"):
            call(text)
    with pytest.raises(ValueError, match=r"102 tokens.*limit is 76"):
        clip_like(["a", text], padding=True, return_tensors="pt")
    with pytest.raises(ValueError, match=r"102 tokens.*limit is 76"):
        clip_like(text, padding="max_length")
    cut = clip_like(["a", text], truncation=True, padding="max_length", return_tensors="pt")
    assert cut["input_ids"].shape == (2, 76)
    assert cut["input_ids"][1, -1] == clip_like.eos_token_id and cut["attention_mask"].sum(1).tolist() == [3, 76]
    assert len(clip_like(text, truncation=True, max_length=20)["input_ids"]) == 20
    assert len(clip_like.tokenize(text)) == 100
    assert len(clip_like(text, verbose=False)["input_ids"]) == 102
    assert len(clip_like("fox " * 74)["input_ids"]) == 76


@pytest.mark.parametrize("text", [None, 3, ["a", None], [1], [["a", 2]]])
def test_wrong_types_are_errors(small, text):
    with pytest.raises(ValueError, match="text"):
        small(text)


def test_an_empty_batch_is_an_error(small):
    with pytest.raises(ValueError, match="empty list"):
        small([])


@pytest.mark.parametrize("text", ["", " ", "\x00", "\ud800", "\u200b"])
def test_odd_texts_do_not_crash(small, text):
    ids = small(text)["input_ids"]
    assert ids[0] == small.bos_token_id and ids[-1] == small.eos_token_id
    assert isinstance(small.decode(ids, skip_special_tokens=True), str)


@pytest.mark.parametrize(
    "text",
    [
        "medium-light skin tone",
        "the keycap 10",
        "seven o'clock",
        "a black-and-white t-shirt (large), no. 42!",
        "1st and 22nd place",
        "two-thirty",
        "(a) - b",
        "it's 3",
    ],
)
def test_decoding_joins_what_bpe_splits(small, text):
    assert small.decode(small(text)["input_ids"], skip_special_tokens=True) == text


def test_decoding_is_readable(small):
    text = "The man's hat, red! Don't we'll see? yes."
    ids = small(text)["input_ids"]
    assert small.decode(ids, skip_special_tokens=True) == text.lower()
    spaced = "the man 's hat , red ! don 't we 'll see ? yes ."
    assert small.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) == spaced
    assert small.decode([], skip_special_tokens=True) == ""
    assert small.decode([small.bos_token_id, small.eos_token_id], skip_special_tokens=True) == ""
    assert small(small.decode(ids, skip_special_tokens=True))["input_ids"] == ids


@pytest.mark.parametrize("text", ["빨간 고래 🐳", "👨‍👩‍👧 각", "日本語 ไทย", "zażółć ~ ` ^ |", "αβγ", "ｱ"])
def test_a_trained_vocabulary_knows_every_text(small, text):
    ids = small(text)["input_ids"]
    assert ids[-1] == small.eos_token_id and small.eos_token_id not in ids[:-1]
    assert small.decode(ids, skip_special_tokens=True) == clean_text(text)


def test_training(small, clip_like, tmp_path):
    assert len(small) == small.vocab_size == 500
    assert (small.pad_token, small.pad_token_id, small.bos_token_id, small.eos_token_id) == ("<pad>", 0, 1, 2)
    assert small.all_special_ids == [1, 2, 0]
    batch = small(["a", "two blue whales!"], padding=True)
    assert (
        batch["input_ids"][0][3:] == [0] * (len(batch["input_ids"][1]) - 3) and batch["attention_mask"][0][3:][0] == 0
    )

    clip_like.save_pretrained(tmp_path)
    loaded = CocaTokenizer.from_pretrained(tmp_path, padding_side="left", model_max_length=32)
    batches = (CORPUS[i : i + 8] for i in range(0, len(CORPUS), 8))
    special_tokens_map = {"<start_of_text>": "<s>"}
    new = loaded.train_new_from_iterator(
        batches, 480, new_special_tokens=["<q>"], special_tokens_map=special_tokens_map
    )
    new.save_pretrained(tmp_path / "new")
    for tokenizer in (new, CocaTokenizer.from_pretrained(tmp_path / "new")):
        assert len(tokenizer) == 480
        assert tokenizer.convert_tokens_to_ids(["<pad>", "<s>", "<end_of_text>", "<q>"]) == [0, 1, 2, 3]
        assert (tokenizer.padding_side, tokenizer.model_max_length) == ("left", 32)
        assert tokenizer("<q> fox")["input_ids"][:2] == [1, 3]
        assert tokenizer.decode(tokenizer("<q> 고래 🐳")["input_ids"], skip_special_tokens=True) == "고래 🐳"
    with pytest.raises(ValueError, match="vocab_size=100 is too small"):
        loaded.train_new_from_iterator(CORPUS, 100)
