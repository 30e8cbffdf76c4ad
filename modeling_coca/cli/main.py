"""Puts the verbs together. A verb's module imports nothing heavy until its function runs, so `coca --help` is quick."""

import sys

import typer

app = typer.Typer(
    name="coca",
    help="Contrastive Captioners: caption, search and classify images, answer questions, convert checkpoints.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def options() -> None:
    """Keeps `coca VERB` the form of the command, however many verbs there are."""


def main() -> None:
    """Entry point of the console script. Errors that a user can act on are told in one line, with exit code 1."""
    try:
        app()
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"coca: {error}")
