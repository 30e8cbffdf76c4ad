"""`coca ask`: a question about an image."""

from typing import Annotated

import typer

from .options import OUTPUT, AsJson, BatchSize, Device, Dtype, FastDecode, MaxNewTokens, Model, NumBeams, NumWorkers
from .output import plain, report


def ask(
    images: Annotated[
        list[str], typer.Argument(metavar="IMAGES...", help="Image files, folders or globs.", show_default=False)
    ],
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="The question, in quotes.", show_default=False)],
    model: Model,
    num_beams: NumBeams = 1,
    max_new_tokens: MaxNewTokens = None,
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            help="A .jsonl or .parquet file for the answers. Without it they are printed.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    as_json: AsJson = False,
    batch_size: BatchSize = 32,
    num_workers: NumWorkers = None,
    fast_decode: FastDecode = False,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """
    Ask a question about an image, or about each of many.

    The model goes on writing after the question. It can answer the kind of questions that it was trained with.

    - `coca ask apple.png "what color is it?" --model outputs/quickstart`
    - `coca ask photos/ "is this a man or a woman?" --output answers.jsonl`
    """
    from modeling_coca.inference import ask_images

    done = ask_images(
        images,
        question,
        output,
        model=model,
        num_beams=num_beams,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        num_workers=num_workers,
        fast_decode=fast_decode,
        device=device,
        dtype=dtype,
    )
    if output is None:
        done = [{**row, "question": question} for row in done]
    single = output is None and len(done) == 1
    report(
        done,
        output,
        as_json,
        "answers",
        lambda row: [plain(row["answer"]) if single else f"{plain(row['id'])}\t{plain(row['answer'])}"],
    )
