"""A page in the browser for one model: captions with maps, answers, labels, search. Needs gradio (`modeling_coca[app]`)."""

from .page import build_page, launch_app

__all__ = ["build_page", "launch_app"]
