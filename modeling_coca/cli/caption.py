"""`coca caption`: what is in these images?"""

from typing import Annotated

import typer

from .options import (
    OUTPUT,
    WRITING,
    AsJson,
    BatchSize,
    Device,
    Dtype,
    FastDecode,
    IdColumn,
    ImageColumn,
    ImageRoot,
    Images,
    MaxNewTokens,
    Model,
    NumBeams,
    NumWorkers,
    Overwrite,
    Split,
)
from .output import plain, report


def caption(
    images: Images,
    model: Model,
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            help="Where captions go: a .jsonl or .parquet file, or a folder for several files. "
            "Without it they are printed.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    output_format: Annotated[
        str,
        typer.Option("--format", help="Of the files in a folder: jsonl or parquet.", rich_help_panel=OUTPUT),
    ] = "jsonl",
    embeddings: Annotated[
        bool,
        typer.Option(
            "--embeddings",
            help="Store the image's embedding too, which costs nothing more. `coca index` reads it.",
            rich_help_panel=OUTPUT,
        ),
    ] = False,
    keep: Annotated[
        list[str] | None,
        typer.Option(
            help="Copy this column, or this file of a tar sample (txt, json). Can be given several times.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    shard_size: Annotated[
        int | None,
        typer.Option(
            "--shard_size",
            min=1,
            help="Images for each file of an output folder, and that a process takes at a time; by default 1024, or "
            "fewer where some processes would have nothing to do.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    prompt: Annotated[
        str | None,
        typer.Option(help="How every caption begins, such as 'a photo of'.", rich_help_panel=WRITING),
    ] = None,
    num_beams: NumBeams = 1,
    max_new_tokens: MaxNewTokens = None,
    best_of: Annotated[
        int,
        typer.Option(
            "--best_of",
            min=1,
            help="Write this many captions per image, and keep the one that fits the image best by the contrastive "
            "score. They are sampled, unless --num_beams is at least as many.",
            rich_help_panel=WRITING,
        ),
    ] = 1,
    num_captions: Annotated[
        int,
        typer.Option("--num_captions", min=1, help="Keep this many of them, different ones.", rich_help_panel=WRITING),
    ] = 1,
    do_sample: Annotated[
        bool,
        typer.Option("--do_sample", help="Draw captions at random, likely ones more often.", rich_help_panel=WRITING),
    ] = False,
    temperature: Annotated[
        float | None, typer.Option(help="Of sampling: below 1 plays safe.", rich_help_panel=WRITING)
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            "--top_p",
            help="Of sampling: only the likeliest tokens that make up this share.",
            rich_help_panel=WRITING,
        ),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option("--top_k", help="Of sampling: only this many of the likeliest tokens.", rich_help_panel=WRITING),
    ] = None,
    repetition_penalty: Annotated[
        float | None,
        typer.Option("--repetition_penalty", help="Above 1 keeps words from being repeated.", rich_help_panel=WRITING),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of sampling.", rich_help_panel=WRITING)] = 0,
    split: Split = None,
    image_column: ImageColumn = None,
    id_column: IdColumn = None,
    image_root: ImageRoot = None,
    batch_size: BatchSize = 32,
    num_workers: NumWorkers = None,
    fast_decode: FastDecode = False,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """
    Write a caption for every image.

    Each image gets its caption, the caption's log-probability, and the contrastive score, from -1 to 1, that says how
    well the two fit. With --output the work can be interrupted at any time: the same command goes on where it was, and
    a finished output has every image once. `accelerate launch -m modeling_coca.cli caption ...` shares it out.

    - `coca caption cat.jpg --model outputs/quickstart`
    - `coca caption photos/ --model outputs/quickstart --output captions.jsonl --num_beams 3`
    - `coca caption 'shards/{000..099}.tar' -m my/model -o captions/ --format parquet --embeddings`
    """
    from modeling_coca.inference import caption_images

    done = caption_images(
        images,
        output,
        model=model,
        batch_size=batch_size,
        num_workers=num_workers,
        fast_decode=fast_decode,
        device=device,
        dtype=dtype,
        source_kwargs={
            "shard_size": shard_size,
            "split": split,
            "image_column": image_column,
            "id_column": id_column,
            "image_root": image_root,
            "keep": keep,
        },
        output_format=output_format,
        overwrite=overwrite,
        seed=seed,
        prompt=prompt,
        best_of=best_of,
        num_captions=num_captions,
        embeddings=embeddings,
        num_beams=num_beams,
        max_new_tokens=max_new_tokens,
        do_sample=do_sample or None,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        repetition_penalty=repetition_penalty,
    )

    def lines(row: dict) -> list[str]:
        return [
            f"{plain(row['id'])}\t{plain(each['caption'])}\t{each['score']:.3f}" for each in row.get("captions", [row])
        ]

    report(done, output, as_json, "images captioned", lines)
