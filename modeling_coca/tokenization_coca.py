"""CoCa's tokenizer: CLIP's lower-cased byte-level BPE behind open_clip's text cleaning."""

import gzip
import html
import importlib.util
import json
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import CLIPTokenizer
from transformers.tokenization_utils_base import TruncationStrategy
from transformers.utils import logging

try:
    import ftfy
except ImportError:  # remote code on a machine without it: `clean_text` says so and goes on
    ftfy = None

logger = logging.get_logger(__name__)

_END_OF_WORD = "</w>"
_PAD_TOKEN = "<pad>"
_DEFAULT_SPECIALS = {"bos_token": "<start_of_text>", "eos_token": "<end_of_text>"}
_CLIP_VOCAB_SIZE = 49408
_CLIP_BPE_FILE = "bpe_simple_vocab_16e6.txt.gz"


def _byte_symbols() -> list[str]:
    """The 256 printable stand-ins for bytes of byte-level BPE, in the order of CLIP's ids (`"!"` is 0)."""
    ranges = (("!", "~"), ("¡", "¬"), ("®", "ÿ"))
    printable = [chr(byte) for first, last in ranges for byte in range(ord(first), ord(last) + 1)]
    return printable + [chr(256 + i) for i in range(256 - len(printable))]


_BYTE_SYMBOLS = _byte_symbols()
_TEXT_SYMBOLS = frozenset(symbol + suffix for symbol in _BYTE_SYMBOLS for suffix in ("", _END_OF_WORD))
# What ftfy leaves alone at many times the cost (for each line): most captions, and ASCII over several lines.
_PLAIN = re.compile(r"[\t\n\r -%'-~]*")  # no "&", which starts an HTML entity
_STRAIGHT_QUOTES = str.maketrans("‘’‛“”„‟", "'''" + '"' * 4)
# What decoding attaches to the word before it: closing punctuation, and the contractions that BPE splits off.
_ATTACHED = re.compile(r" (?=(?:[.,!?)]+|'(?:s|t|re|ve|m|ll|d)[.,!?]*)(?: |$))|(?<=\() ")
# What it joins on both sides: digits, which BPE takes one by one, ordinals, and words with a hyphen or an apostrophe.
_JOINED = re.compile(r"(?<=\d) (?=\d|(?:st|nd|rd|th)\b)|(?<=\w) (?=[-'] \w)|(?<=\w [-']) (?=\w)")


def _is_text_symbol(token: str | AddedToken | None) -> bool:
    """Whether `token` is one byte of text (`"!"`, `"!</w>"`): such a token can lend its id, but must not become special."""
    return token is not None and str(token) in _TEXT_SYMBOLS


def _is_symbol(char: str) -> bool:
    """Whether the pre-tokenizer puts `char` into a run of symbols: neither white space nor letter nor number."""
    return not char.isspace() and unicodedata.category(char)[0] not in "LN"


def clean_text(text: str) -> str:
    """Cleans a text as open_clip does before BPE.

    ftfy repairs mojibake, curly quotes, ligatures, full-width forms and control characters; HTML entities are resolved
    twice; runs of white space become one space; everything is lower-cased by Python's rules. Without ftfy a text is only
    NFC-normalised, its quotes straightened and control characters dropped, so other repairs show in the ids.

    Args:
        text: Any string, lone surrogates and NUL included.

    Returns:
        The cleaned text, possibly empty.

    Example:

    ```python
    >>> from modeling_coca.tokenization_coca import clean_text

    >>> clean_text("  Fish &amp;amp; CHIPS\\n")
    'fish & chips'
    ```
    """
    if _PLAIN.fullmatch(text) is None:
        text = _fix_unicode(text) if ftfy is None else ftfy.fix_text(text)
        text = html.unescape(html.unescape(text))
    return " ".join(text.split()).lower()


def _fix_unicode(text: str) -> str:
    """The part of `ftfy.fix_text` that tokenization cannot do without."""
    logger.warning_once(
        "ftfy is not installed: texts with accents, typographic quotes, HTML entities or other non-ASCII characters are "
        "cleaned only in part, and their token ids may differ from those the model was trained on. Run `pip install ftfy`."
    )
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    text = "".join(char for char in text if char.isspace() or unicodedata.category(char) != "Cc")
    return unicodedata.normalize("NFC", text.translate(_STRAIGHT_QUOTES))


class CocaTokenizer(CLIPTokenizer):
    """CLIP's byte-level BPE with open_clip's cleaning: the ids of `open_clip.tokenizer.SimpleTokenizer`, exactly.

    A text becomes `<start_of_text> w1 ... wn <end_of_text>`; `model_max_length` (76) counts both. The learned [CLS] of
    the text tower is no token: the model appends it. A longer text raises a `ValueError` unless `truncation=True` asks
    for open_clip's cut, which keeps `<end_of_text>` as the last id; `tokenizer.tokenize(text)`, or `verbose=False`,
    measures a text without that check. Offsets refer to the cleaned text (see `clean_text`). Decoding puts punctuation
    back to its word; `clean_up_tokenization_spaces=False` leaves open_clip's spaces ("a man 's hat .").

    **Padding.** open_clip pads with id 0, which in CLIP's vocabulary is the text token `"!"` (a `!` inside a word, as in
    `!__init__`). Here `pad_token` is `"!"` by name only: it is not a special token, so a `!` in a text keeps its own id
    and survives `skip_special_tokens=True`, while padding, the run of pad ids outside `<start_of_text>` ...
    `<end_of_text>`, is dropped by it. Always use `attention_mask`, never `input_ids != pad_token_id`. A newly trained
    vocabulary has a `<pad>` token of its own, id 0 too. A folder with OpenAI's CLIP tokenizer files names
    `<|endoftext|>` as its pad token: load it with `pad_token="!"` for open_clip's padding.

    Args:
        vocab: Token to id, or the path of a `vocab.json`. Left out, the tokenizer has no words yet: use
            [`~CocaTokenizer.train_new_from_iterator`] on it, or [`~CocaTokenizer.from_open_clip_bpe`].
        merges: The BPE merges as pairs in order, or the path of a `merges.txt`.
        bos_token: Starts each text.
        eos_token: Ends each text.
        unk_token: Required by the backend and never produced: every byte has a token.
        pad_token: `None` takes `<pad>` if the vocabulary has it or is empty, else the token with id 0.

    Example:

    ```python
    >>> from modeling_coca import CocaTokenizer

    >>> captions = ["a red fox", "a blue whale", "the fox and the whale"] * 10
    >>> tokenizer = CocaTokenizer().train_new_from_iterator(captions, vocab_size=450)
    >>> batch = tokenizer(["A red fox!", "the whale"], padding=True, return_tensors="pt")
    >>> batch["input_ids"].shape  # [B, T]
    torch.Size([2, 6])
    >>> tokenizer.decode(batch["input_ids"], skip_special_tokens=True)
    ['a red fox!', 'the whale']
    ```
    """

    # Matches special tokens such as "[IMG]", which the cleaning would turn into text
    _cased_specials: re.Pattern | None = None

    def __init__(
        self,
        vocab: str | dict[str, int] | None = None,
        merges: str | list[str] | list[tuple[str, str]] | None = None,
        unk_token: str | AddedToken = "<end_of_text>",
        bos_token: str | AddedToken = "<start_of_text>",
        eos_token: str | AddedToken = "<end_of_text>",
        pad_token: str | AddedToken | None = None,
        **kwargs,
    ):
        # Settings of the last call before saving: every call sets its own, and some of these would become defaults.
        # And where code lies beside the files (`auto_map`): what copies the code enters that anew.
        for name in ("tokenizer_padding", "tokenizer_truncation", "_json_padding", "_json_truncation", "auto_map"):
            kwargs.pop(name, None)
        if isinstance(vocab, (str, os.PathLike)):
            with open(vocab, encoding="utf-8") as file:
                vocab = json.load(file)
        if isinstance(merges, (str, os.PathLike)):
            with open(merges, encoding="utf-8") as file:
                merges = [line for line in file.read().splitlines() if line and not line.startswith("#version")]
        if merges is not None:
            merges = [tuple(merge.split()) if isinstance(merge, str) else tuple(merge) for merge in merges]
        if vocab:
            known = {*vocab, *map(str, kwargs.get("added_tokens_decoder", {}).values())}
            for name, token in (("bos_token", bos_token), ("eos_token", eos_token)):
                if str(token) in known:
                    continue
                if token is None or str(token) == _DEFAULT_SPECIALS[name]:
                    raise ValueError(
                        f"{name}={token!r} is not in the vocabulary of {len(vocab)} tokens: pass {name}= as the "
                        "vocabulary spells it (OpenAI's files have '<|startoftext|>' and '<|endoftext|>')."
                    )
                logger.warning(
                    f"{name}={str(token)!r} is not in the vocabulary of {len(vocab)} tokens, so it is added to it. A model "
                    f"needs `resize_token_embeddings({len(vocab) + 1})` or more, and its `text_config.{name}_id`."
                )
        if pad_token is None:
            first = next((token for token, index in vocab.items() if index == 0), None) if vocab else None
            pad_token = first if _is_text_symbol(first) and _PAD_TOKEN not in vocab else _PAD_TOKEN
        kwargs.setdefault("model_max_length", 76)
        kwargs.setdefault("clean_up_tokenization_spaces", True)

        super().__init__(
            vocab=vocab,
            merges=merges,
            unk_token=unk_token,
            bos_token=bos_token,
            eos_token=eos_token,
            pad_token=pad_token,
            **kwargs,
        )

        # `clean_text` has done the normalising; this one serves runtimes that read tokenizer.json without this class.
        # No NFC: open_clip composes characters before it resolves entities, so "<b>e&#769;" must stay two characters.
        self._tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
        )
        # Case is ignored as in open_clip: there "ſ" (long s) is the s of a contraction.
        self._tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(
                    Regex(
                        r"(?i:<start_of_text>|<end_of_text>|'s|'t|'re|'ve|'m|'ll|'d)"
                        r"|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
                    ),
                    behavior="removed",
                    invert=True,
                ),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        # CLIPTokenizer turns "</w>" into spaces by wrapping `decode`, and pickling or copying loses the wrapper.
        self._tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace(_END_OF_WORD, " ")])

    @classmethod
    def from_open_clip_bpe(cls, path: str | os.PathLike | None = None, **kwargs) -> "CocaTokenizer":
        """Builds CLIP's vocabulary (49408 tokens) offline, from the merges file that open_clip ships.

        Args:
            path: A `bpe_simple_vocab_16e6.txt.gz`, or the same file unpacked. Left out, it is looked up in the
                installed open_clip, which is not imported.
            kwargs: Passed to the constructor.

        Example:

        ```python
        >>> tokenizer = CocaTokenizer.from_open_clip_bpe()  # doctest: +SKIP
        >>> tokenizer("hello!")["input_ids"]  # doctest: +SKIP
        [49406, 3306, 256, 49407]
        ```
        """
        if path is None:
            spec = importlib.util.find_spec("open_clip")
            folders = list(spec.submodule_search_locations or []) if spec is not None else []
            path = next((p for p in (os.path.join(f, _CLIP_BPE_FILE) for f in folders) if os.path.isfile(p)), None)
            if path is None:
                raise FileNotFoundError(
                    f"No {_CLIP_BPE_FILE} found: run `pip install open_clip_torch`, or pass the file's path as `path`."
                )
        with (gzip.open if str(path).endswith(".gz") else open)(path, "rt", encoding="utf-8") as file:
            lines = file.read().split("\n")
        # The file holds more merges than CLIP uses; its first line is a header.
        num_merges = _CLIP_VOCAB_SIZE - 2 * len(_BYTE_SYMBOLS) - 2
        merges = [tuple(line.split()) for line in lines[1 : num_merges + 1]]
        if len(merges) != num_merges or any(len(merge) != 2 for merge in merges):
            raise ValueError(f"{path} is not CLIP's merges file: it should hold a header and {num_merges} pairs.")
        tokens = [*_BYTE_SYMBOLS, *(symbol + _END_OF_WORD for symbol in _BYTE_SYMBOLS), *map("".join, merges)]
        tokens += [str(kwargs.get("bos_token", "<start_of_text>")), str(kwargs.get("eos_token", "<end_of_text>"))]
        return cls(vocab={token: index for index, token in enumerate(tokens)}, merges=merges, **kwargs)

    @property
    def all_special_tokens(self) -> list[str]:
        """The special tokens, without a pad token that is text."""
        pad_token = self._special_tokens_map.get("pad_token")
        tokens = super().all_special_tokens
        return [token for token in tokens if token != str(pad_token)] if _is_text_symbol(pad_token) else tokens

    def _add_tokens(self, new_tokens: list[str | AddedToken], special_tokens: bool = False) -> int:
        # The base class registers every named token with the backend, which then cuts each "!" out of its word.
        if _is_text_symbol(pad_token := self._special_tokens_map.get("pad_token")):
            new_tokens = [token for token in new_tokens if str(token) != str(pad_token)]
        number = super()._add_tokens(new_tokens, special_tokens=special_tokens)
        specials = [token.content for token in self.added_tokens_decoder.values() if token.special]
        cased = sorted((token for token in specials if clean_text(token) != token), key=len, reverse=True)
        self._cased_specials = re.compile(f"({'|'.join(map(re.escape, cased))})") if cased else None
        return number

    def _save_pretrained(self, *args, **kwargs):
        # How the last call cut and padded is no part of a tokenizer, and would be written down
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        return super()._save_pretrained(*args, **kwargs)

    def _encode_plus(self, text, text_pair=None, **kwargs):
        # A marked chat is encoded piece by piece through `encode`, which cleans the pieces.
        if kwargs.get("truncation_strategy") not in (None, TruncationStrategy.DO_NOT_TRUNCATE):
            self._check_truncation(kwargs.get("max_length"), kwargs.get("stride") or 0)
        if not kwargs.get("sanitize_control_tokens"):
            text = self._clean(text, "text")
            text_pair = self._clean(text_pair, "text_pair") if text_pair is not None else None
            if isinstance(text, (list, tuple)) and not text and not kwargs.get("is_split_into_words"):
                raise ValueError("text is an empty list: pass at least one text.")
        return super()._encode_plus(text, text_pair=text_pair, **kwargs)

    def _check_truncation(self, max_length: int | None, stride: int) -> None:
        # The backend would not truncate at all, or panic, which no `except Exception` catches.
        specials = self.num_special_tokens_to_add()
        if max_length is not None and max_length < specials:
            raise ValueError(
                f"max_length={max_length} has no room for the {specials} special tokens that each text gets: truncate to "
                f"{specials} or more."
            )
        if stride and max_length is not None and stride >= max_length - specials:
            raise ValueError(
                f"stride={stride} must be less than max_length={max_length} without {specials} special tokens."
            )

    def _clean(self, text, name: str):
        """Cleans a text, or every text of a (nested) list; `name` is what errors call it."""
        if isinstance(text, str):
            if self._cased_specials is None:
                return self._split_glued_specials(clean_text(text))
            pieces = self._cased_specials.split(text)  # text, special token, text, ...
            pieces[::2] = [self._split_glued_specials(clean_text(piece)) for piece in pieces[::2]]
            return " ".join(filter(None, pieces))
        if isinstance(text, (list, tuple)):
            return type(text)(self._clean(item, f"{name}[{index}]") for index, item in enumerate(text))
        raise ValueError(f"{name} must be a string, a list of strings or a list of lists of words, not {type(text)}.")

    def _split_glued_specials(self, text: str) -> str:
        """Breaks up a literal special token that is glued to the symbols before it, as in `"!<end_of_text>"`.

        open_clip reads such a text left to right and takes `!<` as one run of symbols, so there is no special token;
        the backend would look for special tokens first. A space after the `<` does not change the split otherwise.
        """
        specials = sorted(token for token in {self.bos_token, self.eos_token} if token in text)
        if not specials:
            return text
        pattern = re.compile("|".join(map(re.escape, specials)))
        pieces, copied, start = [], 0, 0  # `start` is behind the last special token that stands
        while found := pattern.search(text, start):
            index, token = found.start(), found.group()
            cut = next((i for i, char in enumerate(token) if not _is_symbol(char)), 0)
            if cut and index > start and _is_symbol(text[index - 1]):
                pieces += [text[copied : index + cut], " "]
                copied = start = index + cut
            else:
                start = found.end()
        return "".join([*pieces, text[copied:]])

    def _convert_encoding(self, encoding, *args, verbose: bool = True, **kwargs):
        length = sum(encoding.attention_mask)
        if verbose and length > self.model_max_length:
            words = [token for token, real in zip(encoding.ids, encoding.attention_mask, strict=True) if real][:12]
            raise ValueError(
                f"A text has {length} tokens, special tokens included, but the limit is {self.model_max_length} "
                f"(`model_max_length`). It starts with {self.decode(words, skip_special_tokens=True)!r}. "
                "Shorten it, or pass `truncation=True` to cut it off."
            )
        return super()._convert_encoding(encoding, *args, verbose=verbose, **kwargs)

    def tokenize(self, text: str, pair: str | None = None, add_special_tokens: bool = False, **kwargs) -> list[str]:
        """Splits a text of any length into tokens, as strings.

        Args:
            text: The text; it is cleaned first.
            pair: A second text.
            add_special_tokens: Whether to add `bos_token` and `eos_token`.
        """
        kwargs.setdefault("verbose", False)  # The way to find out how long a text is must not fail on long ones.
        return super().tokenize(text, pair=pair, add_special_tokens=add_special_tokens, **kwargs)

    def _decode(
        self,
        token_ids: int | list[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        **kwargs,
    ) -> str:
        if skip_special_tokens and isinstance(token_ids, (list, tuple)) and _is_text_symbol(self.pad_token):
            token_ids = self._strip_padding(list(token_ids))
        # The base class refuses to clean up after BPE, for BPE that keeps the spaces of the text. CLIP's does not.
        kwargs |= {"skip_special_tokens": skip_special_tokens, "clean_up_tokenization_spaces": False}
        try:
            text = super()._decode(token_ids, **kwargs).strip()
        except OverflowError as error:
            raise ValueError(
                f"token_ids must be from 0 to {len(self) - 1}: replace the -100 of labels by `pad_token_id`."
            ) from error
        if clean_up_tokenization_spaces is None:
            clean_up_tokenization_spaces = self.clean_up_tokenization_spaces
        return self.clean_up_tokenization(text) if clean_up_tokenization_spaces else text

    @staticmethod
    def clean_up_tokenization(text: str) -> str:
        """Puts punctuation and contractions back to their words, and joins digits and hyphenated words.

        CLIP's BPE does not record white space, so this is a guess at what is common in English: "3 4" may have been two
        numbers.

        Example:

        ```python
        >>> CocaTokenizer.clean_up_tokenization("a man 's t - shirt ( red ) , size 4 2 .")
        "a man's t-shirt (red), size 42."
        ```
        """
        return _ATTACHED.sub("", _JOINED.sub("", text))

    def _strip_padding(self, ids: list[int]) -> list[int]:
        """Drops the pad ids before a leading `bos_token` and after the last `eos_token`; those in between are text."""
        pad, bos, eos = self.pad_token_id, self.bos_token_id, self.eos_token_id
        start, end = 0, len(ids)
        while start < end and ids[start] == pad:
            start += 1
        if start == end or ids[start] != bos:
            start = 0
        while end > start and ids[end - 1] == pad:
            end -= 1
        if end == start or ids[end - 1] != eos:
            end = len(ids)
        return ids[start:end]

    def train_new_from_iterator(
        self,
        text_iterator: Iterable[str] | Iterable[list[str]],
        vocab_size: int,
        length: int | None = None,
        new_special_tokens: list[str | AddedToken] | None = None,
        special_tokens_map: dict[str, str] | None = None,
        **kwargs,
    ) -> "CocaTokenizer":
        """Trains a vocabulary for another corpus or language; cleaning and special tokens stay as they are.

        The new tokenizer has `<pad>`, `bos_token` and `eos_token` as ids 0, 1 and 2, and a token for every byte, so no
        text is ever unknown to it. It keeps this tokenizer's `model_max_length`, sides and chat template.

        Args:
            text_iterator: Texts, or lists of texts.
            vocab_size: Size of the new vocabulary, special tokens included. It is reached if the corpus has that many
                pairs to merge; about 420 are taken by bytes.
            length: Number of items in `text_iterator`, for the progress bar.
            new_special_tokens: More special tokens.
            special_tokens_map: Renames special tokens, old spelling to new.
            kwargs: Passed to `tokenizers.trainers.BpeTrainer`, for example `min_frequency` or `show_progress`.

        Example:

        ```python
        >>> tokenizer = CocaTokenizer().train_new_from_iterator(["여우가 뛴다", "고래가 뛴다"], vocab_size=450)
        >>> tokenizer.decode(tokenizer("고래가 뛴다 🐳")["input_ids"], skip_special_tokens=True)
        '고래가 뛴다 🐳'
        ```
        """
        renamed = special_tokens_map or {}
        names = {name: renamed.get(token, token) for name, token in self.special_tokens_map.items()}
        pad_token = names.get("pad_token")
        if pad_token in (None, names["eos_token"]) or _is_text_symbol(pad_token):
            names["pad_token"] = _PAD_TOKEN
        extra = [renamed.get(token, token) for token in self.extra_special_tokens] + list(new_special_tokens or [])
        specials = [names["pad_token"], names["bos_token"], names["eos_token"], *names.values(), *extra]
        specials = list({str(token): token for token in specials}.values())

        backend = Tokenizer(BPE(end_of_word_suffix=_END_OF_WORD))
        backend.normalizer, backend.pre_tokenizer = self._tokenizer.normalizer, self._tokenizer.pre_tokenizer
        trainer = BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=specials,
            initial_alphabet=_BYTE_SYMBOLS,
            end_of_word_suffix=_END_OF_WORD,
            **{"show_progress": False, **kwargs},
        )
        backend.train_from_iterator(self._training_texts(text_iterator), trainer=trainer, length=length)
        model = json.loads(backend.to_str())["model"]
        if len(model["vocab"]) > vocab_size:
            raise ValueError(
                f"vocab_size={vocab_size} is too small: special tokens and bytes alone need {len(model['vocab'])}."
            )
        settings = {name: getattr(self, name) for name in ("model_max_length", "clean_up_tokenization_spaces")}
        # Saved only if chosen: a `padding_side` in the tokenizer's files would overrule the processor's.
        for name in ("padding_side", "truncation_side", "chat_template"):
            if getattr(self, name) != getattr(type(self), name, None):
                settings[name] = getattr(self, name)
        return type(self)(
            vocab=model["vocab"],
            merges=model["merges"],
            extra_special_tokens=extra or None,
            **names,
            **settings,
        )

    def _training_texts(self, text_iterator: Iterable[str] | Iterable[list[str]]) -> Iterator[str]:
        # The trainer makes "x</w>" only for symbols that it saw at the end of a word. These words end in every byte
        # that can end one: printable ASCII, and the 64 continuation bytes (as the last byte of Hangul syllables).
        yield " ".join(chr(byte) for byte in range(33, 127))
        yield " ".join(chr(0xAC00 + byte) for byte in range(64))
        for item in text_iterator:
            for text in [item] if isinstance(item, str) else item:
                yield clean_text(text)


__all__ = ["CocaTokenizer", "clean_text"]
