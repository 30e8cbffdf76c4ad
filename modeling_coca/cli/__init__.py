"""The `coca` command: one file a verb, each a function whose arguments are the command's."""

from .main import main

__all__ = ["main"]
