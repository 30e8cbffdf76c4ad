"""What the verbs print."""

import re

import typer

# Controls of the terminal, and marks that turn the direction of a line around
_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def plain(text: str) -> str:
    """A text on one line that only shows: file names and captions can hold commands to the terminal."""
    return _CONTROLS.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def report_failures(failed: list, total: int, shown: int = 20) -> None:
    """Unreadable images on stderr, with reasons. If no image at all could be read, that is an error."""
    for name, reason in failed[:shown]:
        typer.echo(f"unreadable: {plain(name)}: {plain(reason)}", err=True)
    if len(failed) > shown:
        typer.echo(f"... and {len(failed) - shown} more", err=True)
    if total and len(failed) == total:
        raise ValueError(f"none of the {total} images could be read.")
