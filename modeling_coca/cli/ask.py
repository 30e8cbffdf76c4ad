"""`coca ask`: a question about an image."""

from typing import Annotated

import typer

from .options import OUTPUT, WRITING, AsJson, BatchSize, Device, Dtype, FastDecode, Model, NumWorkers
from .output import plain, report_failures


def ask(
    images: Annotated[
        list[str], typer.Argument(metavar="IMAGES...", help="Image files, folders or globs.", show_default=False)
    ],
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="The question, in quotes.", show_default=False)],
    model: Model,
    num_beams: Annotated[
        int,
        typer.Option(
            "--num_beams", min=1, help="Beam search: answers that are tried side by side.", rich_help_panel=WRITING
        ),
    ] = 1,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            "--max_new_tokens",
            min=1,
            help="Longest answer, in tokens; by default what the model can do.",
            rich_help_panel=WRITING,
        ),
    ] = None,
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
    from modeling_coca.inference.journal import to_json

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
    if done is None:
        return
    if output is not None:
        failed, total = done["failed"], done["images"]
        print(to_json(done) if as_json else f"{total - len(failed)} answers in {output}")
    else:
        failed, total = [(row["id"], row["error"]) for row in done if "error" in row], len(done)
        for row in done:
            if as_json:
                print(to_json({**row, "question": question}))
            elif "error" not in row:
                answer = plain(row["answer"])
                print(answer if total == 1 else f"{plain(row['id'])}\t{answer}")
    report_failures(failed, total)
