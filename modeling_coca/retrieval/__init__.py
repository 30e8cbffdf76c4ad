"""Search among images by text, by image, or by both."""

from .index import CocaIndex, SearchHit, choose_kind

__all__ = ["CocaIndex", "SearchHit", "choose_kind"]
