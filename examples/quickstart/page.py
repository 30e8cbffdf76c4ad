"""The quickstart's result as one HTML file: pictures are inlined, nothing is loaded from elsewhere, no scripts.

`write_page(path, PageResults(...))` renders `page.html.jinja`, which lies beside this file. A section without entries
is left out, so a page can be made of whatever a run has to show.
"""

from __future__ import annotations

import base64
import difflib
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image


@dataclass(frozen=True)
class Score:
    """One row of the score table.

    Attributes:
        metric: What is measured, for people.
        split: Name of the split.
        value: In [0, 1].
        references: What others reach, by their name; shown beside `value`.
    """

    metric: str
    split: str
    value: float
    references: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Caption:
    """A held-out picture, what the model says and what is true. `note` is shown small, such as the split or style."""

    image: Image.Image
    generated: str
    truth: str
    note: str = ""

    @property
    def correct(self) -> bool:
        return self.generated == self.truth

    @property
    def words(self) -> list[tuple[str, bool]]:
        """The generated words, each with whether it agrees with the truth."""
        generated, truth = self.generated.split(), self.truth.split()
        blocks = difflib.SequenceMatcher(a=generated, b=truth, autojunk=False).get_matching_blocks()
        agreeing = {i for block in blocks for i in range(block.a, block.a + block.size)}
        return [(word, i in agreeing) for i, word in enumerate(generated)]


@dataclass(frozen=True)
class Hit:
    """A picture that a search found; `correct` draws a frame around it."""

    image: Image.Image
    caption: str
    correct: bool = False


@dataclass(frozen=True)
class Search:
    """A search by words (`query` is a text) or by picture (`query` is a `Hit`)."""

    query: str | Hit
    hits: Sequence[Hit]


@dataclass(frozen=True)
class ZeroShot:
    """A picture, the true class, and the likeliest classes with their probabilities, best first."""

    image: Image.Image
    truth: str
    classes: Sequence[tuple[str, float]]


@dataclass(frozen=True)
class Question:
    """A question about a picture, the model's answer and the true one."""

    image: Image.Image
    question: str
    answer: str
    truth: str

    @property
    def correct(self) -> bool:
        return self.answer == self.truth


@dataclass(frozen=True)
class PageResults:
    """All that the page shows.

    Attributes:
        title: Headline.
        summary: One or two sentences under the headline: what was trained, on what.
        facts: (value, what it is) pairs, such as `("336 s", "training on 2 CPU cores")`.
        hero: Pictures in the header.
        scores: Rows of the score table; see `score_rows`.
        captions: Held-out pictures with generated captions.
        text_searches: Searches by words.
        image_searches: Searches by picture.
        zero_shot: Classified pictures.
        questions: Answered questions.
        failures: Captions that are wrong, picked to show how.
        notes: Sentences that close the score section: what falls short, how it was measured.
        credits: Lines of the footer.
    """

    title: str
    summary: str
    facts: Sequence[tuple[str, str]] = ()
    hero: Sequence[Image.Image] = ()
    scores: Sequence[Score] = ()
    captions: Sequence[Caption] = ()
    text_searches: Sequence[Search] = ()
    image_searches: Sequence[Search] = ()
    zero_shot: Sequence[ZeroShot] = ()
    questions: Sequence[Question] = ()
    failures: Sequence[Caption] = ()
    notes: Sequence[str] = ()
    credits: Sequence[str] = ()


SPLITS = {
    "test_style": "new drawing",
    "test_comp": "new combination",
    "validation": "validation",
}
METRICS = {
    "caption_exact": "Caption right, word for word",
    "bleu4": "Caption, BLEU-4",
    "i2t_r1_all": "Picture finds its caption among all",
    "t2i_r1_all": "Caption finds its picture",
    "i2i_r1": "Picture finds the same thing by another artist",
    "zero_shot_group": "Class, zero-shot among nine",
    "tone": "Skin tone, five ways",
}
# Measured on the same splits. "nearest" copies the caption of the most similar training picture, by raw pixels or by
# the features of the frozen encoder; open_clip's CoCa (5.5 M parameters, 64 px) trained from scratch for 340 s.
REFERENCE_SCORES: dict[tuple[str, str], dict[str, float]] = {
    ("test_style", "caption_exact"): {"nearest, pixels": 0.200, "nearest, features": 0.328, "open_clip": 0.026},
    ("test_comp", "caption_exact"): {"nearest, pixels": 0.0, "nearest, features": 0.0, "open_clip": 0.158},
    ("validation", "caption_exact"): {"nearest, features": 0.160},
    ("test_style", "bleu4"): {"open_clip": 0.06},
    ("test_comp", "bleu4"): {"open_clip": 0.52},
    ("test_style", "i2t_r1_all"): {"open_clip": 0.174},
    ("test_comp", "i2t_r1_all"): {"open_clip": 0.269},
    ("test_style", "i2i_r1"): {"nearest, pixels": 0.200, "nearest, features": 0.328},
    ("test_style", "zero_shot_group"): {"open_clip": 0.429},
    ("test_comp", "tone"): {"nearest, pixels": 0.128, "open_clip": 0.767},
}
EMOJI_CREDITS = (
    "Twemoji © X Corp and contributors, CC-BY 4.0 (https://creativecommons.org/licenses/by/4.0/); resized here",
    "Noto Emoji © Google, Apache-2.0",
    "Fluent Emoji © Microsoft, MIT",
    "Emoji names: CLDR © Unicode, Inc., by way of emojibase-data (MIT)",
    "Frozen image encoder: EfficientNet-Lite0 with ImageNet weights, Apache-2.0",
)


def score_rows(metrics: Mapping[str, object], references: Mapping | None = REFERENCE_SCORES) -> list[Score]:
    """Table rows of `metrics.json`: `{split: {metric: value}}`. Metrics without a label are skipped."""
    rows = []
    for metric, label in METRICS.items():
        for split, scores in metrics.items():
            if isinstance(scores, Mapping) and metric in scores:
                reference = (references or {}).get((split, metric), {})
                rows.append(Score(label, SPLITS.get(split, split), scores[metric], reference))
    return rows


def data_uri(image: Image.Image) -> str:
    """The picture as a PNG in a `data:` address."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def picture(image: Image.Image, text: str = "") -> Markup:
    """An `<img>` of the picture, described by `text`."""
    return Markup('<img src="{}" alt="{}" width="{}" height="{}">').format(data_uri(image), text, *image.size)


def write_page(path: str | os.PathLike[str], results: PageResults) -> Path:
    """Writes the page to `path`, and returns the path."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["picture"] = picture
    references = list(dict.fromkeys(name for score in results.scores for name in score.references))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    html = environment.get_template("page.html.jinja").render(page=results, references=references)
    path.write_text(html, encoding="utf-8")
    return path
