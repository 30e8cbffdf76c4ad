"""Texts as people have them: empty, huge, in every script, with bytes and tokens that were not meant as such."""

import time

import numpy as np
import pytest
import torch

from modeling_coca import CocaImageProcessorPil, CocaProcessor, CocaTokenizer

CORPUS = ["a photo of a red fox", "two blue whales!", "the man's red hat", "빨간 여우가 뛴다", "ثعلب أحمر", "🐳"] * 8
BOS, EOS, PAD = "<start_of_text>", "<end_of_text>", "<pad>"
MEGABYTE = 2**20


@pytest.fixture(scope="module")
def tokenizer():
    return CocaTokenizer(model_max_length=16).train_new_from_iterator(CORPUS, vocab_size=700)


@pytest.fixture(scope="module")
def processor(tokenizer):
    return CocaProcessor(CocaImageProcessorPil(size=32), tokenizer)


# name: the text, and a plain one that must give the same ids
SAME_AS = {
    "empty": ("", []),
    "white space only": (" \t\r\n\v\f ", []),
    "NUL only": ("\0\0", []),
    "NUL within": ("a red\0 fox", "a red fox"),
    "control characters": ("a\x01 red\x1b fox\x7f", "a red fox"),
    "a terminal's colours": ("a \x1b[31mred\x1b[0m fox", "a red fox"),
    "line ends of all systems": ("a\r\nred\rfox\n", "a red fox"),
    "lines and tabs": ("a\n\n\tred\n fox", "a red fox"),
    "line and paragraph separators": ("a\u2028red\u2029fox", "a red fox"),
    "no-break space": ("a\u00a0red\u00a0fox", "a red fox"),
    "a lone high surrogate": ("a \ud800", "a \ufffd"),
    "a lone low surrogate": ("a \udfff", "a \ufffd"),
    "a surrogate pair": ("\ud83d\udc33", "🐳"),
    "surrogates in the wrong order": ("\udc33\ud83d", "\ufffd\ufffd"),
    "a surrogate as an entity": ("&#xD800;", "\ufffd"),
    "NUL as an entity": ("&#0;", "\ufffd"),
    "an entity out of Unicode": ("&#x110000;", "\ufffd"),
    "entities, escaped twice": ("red &amp;amp; blue", "red & blue"),
    "a byte order mark": ("\ufeffa red fox", "a red fox"),
    "full width": ("ａ ｒｅｄ ｆｏｘ", "a red fox"),
    "ligature": ("ﬁve", "five"),
    "curly quotes": ("the man’s “red” hat", 'the man\'s "red" hat'),
    "mojibake": ("Ã©tÃ©", "été"),
    "capitals": ("A RED FOX", "a red fox"),
    "capital eszett": ("GROẞ", "groß"),
    "decomposed accents": ("e\u0301te\u0301", "été"),
    "a numpy string": (np.str_("a red fox"), "a red fox"),
}


@pytest.mark.parametrize("name", SAME_AS)
def test_cleaning_gives_the_ids_of_the_plain_text(name, tokenizer, processor):
    text, plain = SAME_AS[name]
    ids = tokenizer(text)["input_ids"]
    if plain == []:
        assert ids == [tokenizer.bos_token_id, tokenizer.eos_token_id]
    else:
        words = tokenizer.convert_tokens_to_ids(tokenizer.tokenize(plain))
        assert ids == [tokenizer.bos_token_id, *words, tokenizer.eos_token_id]
        assert tokenizer.unk_token_id not in words
    assert processor(text=text, return_tensors="pt")["input_ids"].tolist() == [ids]


# name: the text, and how it reads after a round trip
ROUND_TRIPS = {
    "right to left": ("ثعلب أحمر", "ثعلب أحمر"),
    "both directions": ("a fox ثعلب", "a fox ثعلب"),
    "direction marks": ("a \u202efox\u202c", "a \u202e fox \u202c"),
    "hangul": ("빨간 여우가 뛴다", "빨간 여우가 뛴다"),
    "unseen script": ("ᚠᛟᚲᛋ", "ᚠᛟᚲᛋ"),
    "emoji of several characters": ("👩🏽‍🚀", "👩🏽‍🚀"),
    "flag": ("🇯🇵", "🇯🇵"),
    "beyond the basic plane": ("𝒳 𐍈", "𝒳 𐍈"),
    "private use": ("\ue000", "\ue000"),
    "replacement character": ("\ufffd", "\ufffd"),
    "stacked accents": ("z" + "\u0337" * 3, "z " + "\u0337" * 3),
    "digits of other scripts": ("٣", "٣"),
    "the pad token's spelling": ("a pad b", "a pad b"),
    "code": ("x[0]=f(y)", "x [ 0 ]= f ( y )"),
}


@pytest.mark.parametrize("name", ROUND_TRIPS)
def test_round_trips(name, tokenizer):
    text, reads = ROUND_TRIPS[name]
    ids = tokenizer(text)["input_ids"]
    spaces = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert spaces.replace(" ", "") == reads.replace(" ", "")
    assert tokenizer(tokenizer.decode(ids, skip_special_tokens=True))["input_ids"] == ids  # nothing is lost on the way


# name: the text; it is read as these tokens between BOS and EOS. A special token's spelling is the token, as in open_clip
SPECIALS = {
    "end within": (f"a {EOS} fox", ["a</w>", EOS, "fox"]),
    "start within": (f"{BOS} fox", [BOS, "fox"]),
    "padding within": (f"a {PAD}", ["a</w>", PAD]),
    "in capitals": ("<END_OF_TEXT>", [EOS]),
    "escaped": ("&lt;end_of_text&gt;", [EOS]),
    "glued to a word": (f"a{EOS}", ["a</w>", EOS]),
    "glued to symbols, which is none": (f"!{EOS}", ["!", "<", "end", "_", "of", "_", "text", ">"]),
    "nothing else": (EOS, [EOS]),
}


@pytest.mark.parametrize("name", SPECIALS)
def test_literal_special_tokens(name, tokenizer):
    text, tokens = SPECIALS[name]
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
    specials = [t for t in tokenizer.convert_ids_to_tokens(ids[1:-1]) if t in (BOS, EOS, PAD)]
    assert specials == [t for t in tokens if t in (BOS, EOS, PAD)]
    plain = [t.removesuffix("</w>") for t in tokens if t not in (BOS, EOS, PAD)]
    assert tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False).replace(
        " ", ""
    ) == "".join(plain)


# name: a large text, and what truncation leaves of it
HUGE = {
    "words": ("a fox " * (MEGABYTE // 24), "a fox a fox a fox a fox a fox a fox a fox"),
    "one word": ("a" * (MEGABYTE // 4), None),
    "line ends": ("\n" * MEGABYTE, ""),
    "lines": ("a fox\n" * (MEGABYTE // 24), "a fox a fox a fox a fox a fox a fox a fox"),
    "special tokens": (f"{EOS} " * (MEGABYTE // 56), None),
    "special tokens, glued to symbols": (f"!{EOS}" * (MEGABYTE // 14), None),
    "surrogates": ("\ud800" * (MEGABYTE // 12), None),
    "ampersands": ("&" * (MEGABYTE // 4), None),
    "NUL": ("\0" * MEGABYTE, ""),
}


@pytest.mark.parametrize("name", HUGE)
def test_large_texts_take_seconds(name, tokenizer):
    text, left = HUGE[name]
    start = time.process_time()
    ids = tokenizer(text, truncation=True)["input_ids"]
    assert time.process_time() - start < 6  # at most 2; more than 10 where the time is quadratic
    assert len(ids) <= 16 and ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
    if left is not None:
        assert ids == tokenizer(left)["input_ids"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "text", ["a fox " * (10 * MEGABYTE // 6), f"!{EOS}" * (10 * MEGABYTE // 14)], ids=["words", "glued"]
)
def test_ten_megabytes_are_refused_or_cut(text, tokenizer):
    with pytest.raises(ValueError, match=r"A text has \d{6,} tokens.*limit is 16.*truncation=True"):
        tokenizer(text)
    assert len(tokenizer(text, truncation=True)["input_ids"]) == 16


# name: the call, the exception, and what it says
REFUSED = {
    "too long": (lambda t: t("fox " * 99), ValueError, r"A text has 101 tokens.*limit is 16.*`truncation=True`"),
    "one of a batch too long": (lambda t: t(["a", "fox " * 99]), ValueError, "has 101 tokens.*starts with 'fox fox"),
    "None": (lambda t: t(None), ValueError, "specify either `text` or `text_target`"),
    "None in a list": (lambda t: t(["a", None]), ValueError, r"text\[1\] must be a string"),
    "NaN of a table": (lambda t: t(["a", float("nan")]), ValueError, r"text\[1\] must be a string.*float"),
    "bytes": (lambda t: t(b"a fox"), ValueError, "text must be a string.*bytes"),
    "a number": (lambda t: t(3), ValueError, "text must be a string.*int"),
    "a dict": (lambda t: t({"text": "a"}), ValueError, "text must be a string.*dict"),
    "a generator": (lambda t: t(x for x in "ab"), ValueError, "text must be a string.*generator"),
    "an array": (lambda t: t(np.array(["a", "b"])), ValueError, "text must be a string.*ndarray"),
    "an empty list": (lambda t: t([]), ValueError, "text is an empty list"),
    "pairs of unequal number": (lambda t: t(["a", "b"], ["c"]), ValueError, "batch length of `text`: 2 does not match"),
    "unequal lengths in a tensor": (
        lambda t: t(["a", "a red fox"], return_tensors="pt"),
        ValueError,
        "padding=True",
    ),
    "no room for special tokens": (
        lambda t: t("a fox", truncation=True, max_length=1),
        ValueError,
        "max_length=1 has no room for the 2 special tokens.*2 or more",
    ),
    "no room at all": (lambda t: t("a", truncation=True, max_length=0), ValueError, "max_length=0 has no room"),
    "a length below 0": (lambda t: t("a", truncation=True, max_length=-1), ValueError, "max_length=-1 has no room"),
    "a stride as long as the text": (
        lambda t: t("a b c d", truncation=True, max_length=4, stride=2, return_overflowing_tokens=True),
        ValueError,
        "stride=2 must be less than max_length=4 without 2 special",
    ),
    "an unknown padding": (lambda t: t("a", padding="longer"), ValueError, "longer is not a valid PaddingStrategy"),
    "labels decoded as they are": (
        lambda t: t.batch_decode([[3, -100]]),
        ValueError,
        "from 0 to.*-100.*`pad_token_id`",
    ),
    "an id of 41 bits": (lambda t: t.decode([2**40]), ValueError, "token_ids must be from 0 to"),
    "an id that is no number": (lambda t: t.decode([None]), TypeError, "NoneType"),
    "a word in place of ids": (lambda t: t.decode("fox"), TypeError, "str"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_text_is_refused(name, tokenizer):
    call, kind, message = REFUSED[name]
    with pytest.raises(kind, match=f"(?s){message}"):
        call(tokenizer)


def test_padding_only_is_an_embedding_like_any_other(model_folder):
    """A row that is nothing but padding: its embedding is finite, and others in the batch are the same as without it."""
    from modeling_coca import CocaModel

    model = CocaModel.from_pretrained(model_folder).eval()
    ids = torch.tensor([[1, 5, 2], [0, 0, 0]])
    mask = torch.tensor([[1, 1, 1], [0, 0, 0]])
    with torch.no_grad():
        both = model.get_text_features(ids, mask).pooler_output
        alone = model.get_text_features(ids[:1], mask[:1]).pooler_output
    assert both.isfinite().all()
    torch.testing.assert_close(both[:1], alone)
    with pytest.raises(ValueError, match="A text has"):
        CocaProcessor.from_pretrained(model_folder)(text=["<pad>" * 40])
