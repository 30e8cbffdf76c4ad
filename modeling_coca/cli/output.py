"""What the verbs print."""

import re
from collections.abc import Callable

import typer

# Controls of the terminal, and marks that turn the direction of a line around
_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def plain(text: str) -> str:
    """A text on one line that only shows: file names and captions can hold commands to the terminal."""
    return _CONTROLS.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def report(
    done: list[dict] | dict | None, output: str | None, as_json: bool, what: str, lines: Callable[[dict], list[str]]
) -> None:
    """
    What a job over images gave: its rows, as `lines` or as JSON, or how many of `what` are in its output.

    Args:
        done: what `map_images` returns; `None`, from a process that was not the last to end, prints nothing.
    """
    from modeling_coca.inference.journal import to_json

    if done is None:
        return
    if output is not None:
        failed, total = done["failed"], done["images"]
        print(to_json(done) if as_json else f"{total - len(failed)} {what} in {output}")
    else:
        failed, total = [(row["id"], row["error"]) for row in done if "error" in row], len(done)
        for row in done:
            if as_json:
                print(to_json(row))
            elif "error" not in row:
                print(*lines(row), sep="\n")
    report_failures(failed, total)


def report_failures(failed: list, total: int, shown: int = 20) -> None:
    """Unreadable images on stderr, with reasons. If no image at all could be read, that is an error."""
    for name, reason in failed[:shown]:
        typer.echo(f"unreadable: {plain(name)}: {plain(reason)}", err=True)
    if len(failed) > shown:
        typer.echo(f"... and {len(failed) - shown} more", err=True)
    if total and len(failed) == total:
        raise ValueError(f"none of the {total} images could be read.")
