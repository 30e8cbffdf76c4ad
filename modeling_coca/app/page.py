"""The page: what it looks like, what its buttons do, and how it is served."""

import functools
import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from transformers import PreTrainedModel, ProcessorMixin
from transformers.utils import logging

from modeling_coca import CocaConfig, CocaForConditionalGeneration, CocaModel
from modeling_coca.inference import ask_images, classify_images, load_for_inference
from modeling_coca.inference.classification import DEFAULT_TEMPLATES
from modeling_coca.retrieval import CocaIndex
from modeling_coca.visualization import word_maps

from .pictures import bound_uploads, thumbnail
from .rendering import header, names_of, note, search_hits, word_panels

logger = logging.get_logger(__name__)

MAX_CHARACTERS, MAX_LABELS = 2000, 100
NUM_HITS = 12
KEPT_FOR, LOOKED_AFTER_EVERY = 3000, 300  # seconds, of uploads: they are gone within the hour
STYLE = Path(__file__).with_name("style.css")
FONTS = {  # gradio brings these along, so that the page needs no other server; its semibold files lack letters
    "font": [gr.themes.LocalFont("IBM Plex Sans", (400, 700)), "system-ui", "sans-serif"],
    "font_mono": [gr.themes.LocalFont("IBM Plex Mono", (400, 700)), "monospace"],
}
# gradio's buttons with pictures have no name to be read out
NAME_EXAMPLE = "(name, i) => document.querySelectorAll('.coca-side .gallery-item')[i]?.setAttribute('aria-label', name)"
NO_INDEX = """
No folder can be searched yet. Index one, once, and start the page with it:

```bash
coca index photos/ --model MODEL --output photos.index
coca app --model MODEL --index photos.index
```
"""


def _in_words(function: Callable) -> Callable:
    """What a user can mend is told in the browser; anything else is logged here, and not shown to strangers."""

    @functools.wraps(function)
    def call(*args):
        try:
            return function(*args)
        except gr.Error:
            raise
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from error
        except Exception as error:
            logger.exception(f"{function.__name__} failed.")
            raise gr.Error(
                "Something went wrong here, not with what you sent. The server's log says what.", print_exception=False
            ) from error

    return call


class _Verbs:
    """What the buttons do. One model, one call at a time: gradio's queue sees to that."""

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin, index: CocaIndex | None = None):
        self.loaded = {"model": model, "processor": processor}
        self.tokenizer = processor.tokenizer
        self.index = index
        self.names = {} if index is None else names_of(index.ids)

    def caption(self, picture: Image.Image | None) -> tuple[str, str]:
        """Picture -> caption, and its words over the picture as HTML."""
        maps = word_maps(**self.loaded, image=_given(picture), do_sample=False)
        if not maps.words:
            return "", note("The model wrote nothing about this picture.")
        return maps.text, note("Bright is where the model looked as it wrote the word.") + word_panels(maps)

    def ask(self, picture: Image.Image | None, question: str) -> tuple[str, str]:
        """Picture and question -> answer, and how likely it is."""
        image, question = _given(picture), self._text(question, "question")
        row = ask_images([image], question, **self.loaded)[0]
        if not row["answer"]:
            return "", note("The model has no answer to this.")
        return row["answer"], note(f"The model gives this answer a probability of {math.exp(row['log_prob']):.0%}.")

    def classify(self, picture: Image.Image | None, labels: str, sentence: str) -> dict[str, float]:
        """Picture, labels joined by commas or line ends, sentence with {} -> probabilities."""
        image = _given(picture)
        names = list(dict.fromkeys(name.strip() for name in (labels or "").replace("\n", ",").split(",")))
        names = [name for name in names if name]
        if len(names) < 2:
            raise ValueError("Write at least two labels, with commas between them.")
        if len(names) > MAX_LABELS:
            raise ValueError(f"These are {len(names)} labels. Leave some out: {MAX_LABELS} are the most.")
        sentence = self._text(sentence or "{}", "sentence")
        if "{}" not in sentence:
            raise ValueError("Write {} in the sentence, where the label goes.")
        for name in names:
            self._text(sentence.replace("{}", name), f"label “{name[:40]}”")
        row = classify_images(
            [image],
            classes=names,
            classifier_kwargs={"templates": [sentence], "top_k": len(names)},
            **self.loaded,
        )[0]
        return {label["label"]: label["score"] for label in row["labels"]}

    def search(self, text: str, picture: Image.Image | None, both: bool) -> str:
        """Words, picture, whether to join them -> pictures of the index as HTML."""
        text = self._text(text, "search") if (text or "").strip() else None
        image = picture if text is None or both else None
        if text is None and image is None:
            raise ValueError("Write what to look for, or choose a picture to find others like it.")
        if both and image is None:
            raise ValueError("Choose a picture first, or take the tick away to search by words alone.")
        hits = self.index.search(text, image=image, k=NUM_HITS)
        return search_hits((hit, self.names[hit.id], thumbnail(hit.id, self.index.image_root)) for hit in hits)

    def _text(self, text: str, what: str) -> str:
        """Not empty, and within what the model reads."""
        text = (text or "").strip()
        if not text:
            raise ValueError(f"The {what} is empty: write it first.")
        if len(text) > MAX_CHARACTERS:
            raise ValueError(f"The {what} has {len(text)} characters. Shorten it: {MAX_CHARACTERS} are the most.")
        length, limit = len(self.tokenizer(text, verbose=False)["input_ids"]), self.tokenizer.model_max_length
        if length > limit:
            raise ValueError(
                f"The {what} is too long for this model: it has {length} tokens, which are words or pieces of words, and "
                f"{limit} are the most. Shorten it."
            )
        return text


def _given(picture: Image.Image | None) -> Image.Image:
    if picture is None:
        raise ValueError("Choose a picture first.")
    return picture


def build_page(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    index: CocaIndex | None = None,
    *,
    examples: Sequence[str | os.PathLike] = (),
    max_pixels: int = 50_000_000,
) -> gr.Blocks:
    """
    The page, to be put into a larger one or served in another way; [`launch_app`] serves it with all bounds set.

    Args:
        model ([`CocaForConditionalGeneration`] or [`CocaModel`], which can neither write nor answer).
        processor ([`CocaProcessor`]): the model's.
        index ([`CocaIndex`], *optional*): images to search.
        examples (`Sequence[str]`): image files to offer; whoever sees the page can see them.
        max_pixels (`int`): width times height of a picture that is taken.

    Returns:
        `gradio.Blocks`
    """
    verbs = _Verbs(model, processor, index)
    name = os.path.basename(str(model.name_or_path).rstrip("/\\")) or "CoCa"
    results: list[Any] = []  # about the picture
    answers: list[Any] = []  # events that make them

    def on(triggers: list[Any], function: Callable, inputs: list[Any], outputs: list[Any]) -> Any:
        """Old results go first: if this fails, they must not look like its own."""
        cleared = gr.on(triggers, **_clear(outputs))
        return cleared.then(
            _in_words(function),
            inputs,
            outputs,
            api_name=function.__name__,
            show_progress_on=outputs[0],
            concurrency_id="model",
            concurrency_limit=1,
        )

    with gr.Blocks(
        title=f"{name} · CoCa", analytics_enabled=False, delete_cache=(LOOKED_AFTER_EVERY, KEPT_FOR)
    ) as page:
        gr.HTML(header(name), elem_classes="coca-header")
        with gr.Row(elem_classes="coca-body"):
            with gr.Column(scale=2, min_width=300, elem_classes="coca-side"):
                picture = gr.Image(
                    label="Picture",
                    show_label=False,
                    sources=["upload", "clipboard"],
                    buttons=[],
                    height=320,
                    placeholder="Drop a picture here, or choose one",
                    elem_id="coca-picture",
                )
                bound_uploads(picture, max_pixels)
                if examples:
                    gr.Examples(
                        [[os.fspath(file)] for file in examples],
                        picture,
                        label="Or take one of these",
                        examples_per_page=len(examples),
                    )
                    names = json.dumps([f"Example: {Path(file).stem}" for file in examples])
                    page.load(None, js=f"() => {{ {names}.forEach({NAME_EXAMPLE}) }}", api_visibility="private")
            with gr.Column(scale=3, min_width=300, elem_classes="coca-main"), gr.Tabs():
                if isinstance(model, CocaForConditionalGeneration):
                    with gr.Tab("Caption", id="caption"):
                        button = gr.Button("Write a caption", variant="primary")
                        text = _answer(
                            "Caption", "The caption will be here, with what the model looked at for each word."
                        )
                        below = gr.HTML(label="Maps", elem_classes="coca-result")
                        answers.append(on([button.click], verbs.caption, [picture], [text, below]))
                        results += [text, below]
                    with gr.Tab("Ask", id="ask"):
                        question = gr.Textbox(
                            label="Question",
                            placeholder="what color is it?",
                            max_lines=4,
                            max_length=MAX_CHARACTERS,
                            elem_id="question",
                        )
                        button = gr.Button("Ask", variant="primary")
                        text = _answer(
                            "Answer",
                            "The answer will be here. A model knows the kinds of questions it was trained with.",
                        )
                        below = gr.HTML(label="Probability", elem_classes="coca-result")
                        answers.append(
                            on([button.click, question.submit], verbs.ask, [picture, question], [text, below])
                        )
                        results += [text, below]
                with gr.Tab("Classify", id="classify"):
                    labels = gr.Textbox(
                        label="Labels",
                        info="Your own, with commas between them.",
                        placeholder="cat, dog, horse",
                        max_lines=6,
                        max_length=MAX_CHARACTERS,
                        elem_id="labels",
                    )
                    sentence = gr.Textbox(
                        DEFAULT_TEMPLATES[0],
                        label="Sentence",
                        info="What the model compares with the picture; {} stands for the label.",
                        max_lines=2,
                        max_length=MAX_CHARACTERS,
                        elem_id="sentence",
                    )
                    button = gr.Button("Classify", variant="primary")
                    chart = gr.Label(
                        label="Labels by probability", show_heading=False, show_label=False, elem_classes="coca-chart"
                    )
                    triggers = [button.click, labels.submit, sentence.submit]
                    answers.append(on(triggers, verbs.classify, [picture, labels, sentence], [chart]))
                    results.append(chart)
                with gr.Tab("Search", id="search"):
                    if index is None:
                        gr.Markdown(NO_INDEX, elem_classes="coca-empty")
                    else:
                        words = gr.Textbox(
                            label=f"Search {len(index):,} pictures",
                            info="Leave it empty to find pictures like yours.",
                            placeholder="two dogs running",
                            max_lines=4,
                            max_length=MAX_CHARACTERS,
                            elem_id="words",
                        )
                        both = gr.Checkbox(label="Words and picture together", elem_id="both")
                        button = gr.Button("Search", variant="primary")
                        found = gr.HTML(label="Found", elem_classes="coca-result")
                        on([button.click, words.submit], verbs.search, [words, picture, both], [found])
        gr.HTML(
            '<p class="coca-note">A picture that you choose is used on this server only, and deleted within the hour.</p>',
            elem_classes="coca-footer",
        )
        # Of another picture nothing is said yet, and what is being said of the last one is not wanted any more
        picture.change(**_clear(results), cancels=answers)
    return page


def _clear(outputs: list[Any]) -> dict[str, Any]:
    """An event that empties components, in the browser."""
    empty = ", ".join("{}" if isinstance(output, gr.Label) else "''" for output in outputs)
    js = f"() => [{empty}]" if len(outputs) > 1 else f"() => {empty if empty != '{}' else '({})'}"
    return {"fn": None, "outputs": outputs, "js": js, "show_progress": "hidden", "api_visibility": "private"}


def _answer(label: str, placeholder: str) -> gr.Textbox:
    return gr.Textbox(
        label=label,
        show_label=False,
        placeholder=placeholder,
        interactive=False,
        lines=1,
        max_lines=8,
        buttons=["copy"],
        container=False,
        elem_classes="coca-answer",
        elem_id=f"{label.lower()}-text",
    )


class _BoundedBody:
    """Turns requests away whose body is too long, or of unknown length, before it is read."""

    def __init__(self, app: ASGIApp, limit: int):
        self.app, self.limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] not in ("GET", "HEAD", "OPTIONS"):
            length = dict(scope["headers"]).get(b"content-length", b"")
            if not length.isdigit():
                return await PlainTextResponse("Say how long the body is.", 411)(scope, receive, send)
            if int(length) > self.limit:
                return await PlainTextResponse(f"At most {self.limit} bytes are taken.", 413)(scope, receive, send)
        await self.app(scope, receive, send)


def launch_app(
    model: str | os.PathLike | PreTrainedModel | None = None,
    index: str | os.PathLike | CocaIndex | None = None,
    *,
    processor: ProcessorMixin | None = None,
    examples: Sequence[str | os.PathLike] = (),
    host: str | None = None,
    port: int | None = None,
    share: bool = False,
    max_queue: int = 32,
    max_file_size: int = 20 * 2**20,
    max_pixels: int = 50_000_000,
    device: str | None = None,
    dtype: str | None = None,
    **launch_kwargs: Any,
) -> gr.Blocks:
    """
    Serves the page, and returns while it is served. What `coca app` does.

    Args:
        model, processor, device, dtype: see [`load_for_inference`]; with an index by default the model that made it.
        index (*optional*): see [`CocaIndex.load`].
        examples, max_pixels: see [`build_page`].
        host (`str`, *optional*):
            Address to listen on. By default the environment's GRADIO_SERVER_NAME, which a Space sets, else 127.0.0.1:
            this computer alone. "0.0.0.0" lets in the whole network.
        port (`int`, *optional*): by default GRADIO_SERVER_PORT, else the first free one from 7860 on.
        share (`bool`, defaults to `False`): open a public address for a week, through gradio's servers.
        max_queue (`int`, defaults to 32): requests that may wait; whoever comes then is told that the page is busy.
        max_file_size (`int`, defaults to 20 MB): of an upload, in bytes.
        **launch_kwargs: of gradio's `Blocks.launch`, e.g. `auth`.

    Returns:
        `gradio.Blocks`: with `local_url`, `block_thread()` and `close()`.

    Example:

    ```python
    >>> from modeling_coca.app import launch_app

    >>> launch_app("outputs/quickstart", "photos.index").block_thread()  # doctest: +SKIP
    ```
    """
    if index is not None and not isinstance(index, CocaIndex):
        index = CocaIndex.load(index, model, processor, device=device, dtype=dtype)
    if model is None:
        if index is None or index.model is None:
            raise ValueError("Say which `model` to use.")
        model, processor = index.model, processor or index.processor
    loaded = load_for_inference(model, _class_of(model), processor, device, dtype)
    if index is not None:
        if not isinstance(index.model, PreTrainedModel):
            index.model, index.processor = loaded  # once in memory is enough
        _ = index.embedder  # tells now if the index is another model's
    page = build_page(*loaded, index, examples=examples, max_pixels=max_pixels)
    page.queue(max_size=max_queue, api_open=False, default_concurrency_limit=1)
    page.launch(
        server_name=host,
        server_port=port,
        share=share,
        quiet=True,
        prevent_thread_lock=True,
        max_file_size=max_file_size,
        app_kwargs={"middleware": [Middleware(_BoundedBody, limit=max_file_size + 2**16)]},
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        pwa=False,
        theme=_theme(),
        css_paths=STYLE,
        **launch_kwargs,
    )
    return page


def _theme() -> gr.themes.Base:
    theme = gr.themes.Base(primary_hue="teal", secondary_hue="teal", neutral_hue="zinc", radius_size="lg", **FONTS)
    return theme.set(
        color_accent="*primary_700",
        checkbox_border_radius="*radius_sm",
        checkbox_border_color="*neutral_400",
        checkbox_border_color_dark="*neutral_400",
        body_text_color_subdued="*neutral_500",  # as pale as can be read
        body_text_color_subdued_dark="*neutral_400",
        input_placeholder_color="*neutral_500",
        input_placeholder_color_dark="*neutral_400",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover_dark="*primary_600",
        button_primary_text_color="white",
        button_primary_text_color_dark="white",
    )


def _class_of(model: str | os.PathLike | PreTrainedModel) -> type[PreTrainedModel]:
    """With a decoder, unless it was saved without one: then it would have random weights."""
    if not isinstance(model, PreTrainedModel):
        try:
            saved_as = CocaConfig.from_pretrained(model).architectures
        except (OSError, ValueError):  # another library's checkpoint, or an error that loading tells better
            saved_as = None
        if saved_as and CocaForConditionalGeneration.__name__ not in saved_as:
            return CocaModel
    return CocaForConditionalGeneration


__all__ = ["build_page", "launch_app"]
