"""Puts the verbs together. A verb's module imports nothing heavy until its function runs, so `coca --help` is quick."""

import re
import sys

import typer

from .app import app as page
from .ask import ask
from .caption import caption
from .classify import classify
from .convert import convert
from .export import export
from .index import index
from .output import plain
from .search import search

# On CPUs PyTorch, oneDNN and Python's threads have no exception of their own for it
_OUT_OF_MEMORY = re.compile(
    r"can(?:no|')t allocate memory|out of memory|not enough memory|can't start new thread|could not create a primitive|bad_alloc",
    re.IGNORECASE,
)

app = typer.Typer(
    name="coca",
    help="Contrastive Captioners: caption, search and classify images, answer questions, convert checkpoints.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    # --num_beams as in transformers' scripts, and --num-beams as elsewhere
    context_settings={"token_normalize_func": lambda name: name.replace("-", "_")},
)


@app.callback()
def options() -> None:
    """Keeps `coca VERB` the form of the command, however many verbs there are."""


app.command("app")(page)
app.command()(ask)
app.command()(caption)
app.command()(classify)
app.command()(convert)
app.command()(export)
app.command()(index)
app.command()(search)


def main() -> None:
    """Entry point of the console script. Errors that a user can act on are told in one line, with exit code 1."""
    try:
        app(prog_name="coca")
    except ModuleNotFoundError as error:
        sys.exit(f"coca: {error}: run `pip install {error.name}`." if error.name else f"coca: {error}")
    except (ImportError, OSError, ValueError) as error:
        sys.exit("\n".join(map(plain, f"coca: {error}".splitlines())))
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not _OUT_OF_MEMORY.search(str(error)):
            raise
        reason = plain(next(iter(str(error).splitlines()), ""))
        sys.exit(f"coca: out of memory: use a smaller --batch_size or fewer --num_workers. {reason}".strip())
