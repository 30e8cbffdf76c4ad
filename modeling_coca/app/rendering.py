"""Results as HTML. Whatever comes from a model, a file or a user is escaped here."""

import os
from collections.abc import Iterable, Sequence
from html import escape

from PIL import Image

from modeling_coca.retrieval import SearchHit
from modeling_coca.visualization import WordMaps, draw_map

from .pictures import data_url

PANEL = 224  # pixels


def header(name: str) -> str:
    return f"<h1>{escape(name)}</h1><p>Captions, answers, labels and search, by one CoCa model.</p>"


def note(text: str) -> str:
    return f'<p class="coca-note">{escape(text)}</p>'


def word_panels(maps: WordMaps) -> str:
    """The picture under the heat map of each word."""
    height = max(1, round(PANEL * maps.image.height / maps.image.width))
    panels = []
    for word, values in zip(maps.words, maps.maps, strict=True):
        source = data_url(draw_map(maps.image, values, (PANEL, height)))
        label = escape(word)
        panels.append(
            f'<li><figure><img src="{source}" width="{PANEL}" height="{height}" alt="Where the model looked for: {label}">'
            f"<figcaption>{label}</figcaption></figure></li>"
        )
    return f'<ul class="coca-words">{"".join(panels)}</ul>'


def search_hits(hits: Iterable[tuple[SearchHit, str, Image.Image | None]]) -> str:
    """
    Args:
        hits: each with the name to show and its small picture, if there is one.
    """
    items = []
    for hit, name, picture in hits:
        caption = hit.metadata.get("caption")
        label = escape(str(caption or name))
        if picture is None:
            shown = '<div class="coca-missing">no picture to show</div>'
        else:
            shown = f'<img src="{data_url(picture)}" width="{picture.width}" height="{picture.height}" alt="{label}">'
        items.append(
            f'<li><figure>{shown}<figcaption><span title="{escape(name)}">{label}</span> '
            f'<span class="coca-score">{hit.score:.2f}</span></figcaption></figure></li>'
        )
    return f'<ol class="coca-hits">{"".join(items)}</ol>'


def names_of(ids: Sequence[str]) -> dict[str, str]:
    """Ids of images -> names without the folder that they all are in, which is nobody's business but the server's."""
    folders = {os.path.dirname(name) for name in ids}
    try:
        shared = os.path.commonpath(folders) if folders else ""
    except ValueError:  # absolute and relative ones
        return {name: os.path.basename(name) for name in ids}
    return {name: os.path.relpath(name, shared) if shared else name for name in ids}


__all__ = ["header", "names_of", "note", "search_hits", "word_panels"]
