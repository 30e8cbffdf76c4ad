"""Arguments that several verbs share, each said once."""

from typing import Annotated

import typer

# Panels of the help text
IMAGES, WRITING, OUTPUT, MACHINE = "Images", "Writing", "Output", "Machine"

_images = typer.Argument(
    metavar="IMAGES...",
    help="Image files, folders, globs, tables of paths (.csv, .tsv, .jsonl), Parquet files, WebDataset shards "
    "(.tar, also 'shard-{000..099}.tar'), a folder saved by `datasets`, or a data set on the Hub (its id).",
    show_default=False,
)
Images = Annotated[list[str], _images]
OptionalImages = Annotated[list[str] | None, _images]
Model = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        envvar="COCA_MODEL",
        help="Folder of the model, or its id on the Hub.",
        show_default=False,
    ),
]
Split = Annotated[str | None, typer.Option(help="Of a data set: its split, such as train.", rich_help_panel=IMAGES)]
ImageColumn = Annotated[
    str | None,
    typer.Option(
        "--image_column",
        help="Of a table: the column of images or paths, by default found by type or name.",
        rich_help_panel=IMAGES,
    ),
]
IdColumn = Annotated[
    str | None,
    typer.Option(
        "--id_column",
        help="Of a table: the column to name images by, by default the path or the row's number.",
        rich_help_panel=IMAGES,
    ),
]
ImageRoot = Annotated[
    str | None,
    typer.Option(
        "--image_root",
        help="Folder that the paths in tables, and links in folders, may lead into; by default their own.",
        rich_help_panel=IMAGES,
    ),
]
BatchSize = Annotated[
    int,
    typer.Option("--batch_size", min=1, help="Images at a time: as many as memory allows.", rich_help_panel=MACHINE),
]
NumWorkers = Annotated[
    int | None,
    typer.Option(
        "--num_workers",
        min=0,
        help="Processes that decode images, by default one for each CPU core but one, up to 8.",
        rich_help_panel=MACHINE,
    ),
]
FastDecode = Annotated[
    bool,
    typer.Option(
        "--fast_decode",
        help="Decode large JPEGs at a fraction of their size: several times faster for photos of many megapixels, and "
        "nearly the same pixels.",
        rich_help_panel=MACHINE,
    ),
]
Device = Annotated[
    str | None,
    typer.Option(help="cpu, cuda, cuda:1, mps; by default an accelerator if there is one.", rich_help_panel=MACHINE),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="float32, bfloat16 or float16; by default bfloat16 on CUDA, else the model's own.",
        rich_help_panel=MACHINE,
    ),
]
NumBeams = Annotated[
    int,
    typer.Option("--num_beams", min=1, help="Beam search: texts that are tried side by side.", rich_help_panel=WRITING),
]
MaxNewTokens = Annotated[
    int | None,
    typer.Option(
        "--max_new_tokens",
        min=1,
        help="Longest text, in tokens; by default what the model can do.",
        rich_help_panel=WRITING,
    ),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Throw away an output that is there.", rich_help_panel=OUTPUT)
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.", rich_help_panel=OUTPUT)]
