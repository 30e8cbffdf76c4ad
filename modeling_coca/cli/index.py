"""`coca index`: a folder of images that can be searched."""

from pathlib import Path
from typing import Annotated

import typer

from .options import (
    IMAGES,
    OUTPUT,
    AsJson,
    BatchSize,
    Device,
    Dtype,
    FastDecode,
    IdColumn,
    ImageColumn,
    ImageRoot,
    NumWorkers,
    OptionalImages,
    Split,
)
from .output import report_failures


def index(
    output: Annotated[str, typer.Option("--output", "-o", help="Folder of the index.", show_default=False)],
    images: OptionalImages = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            envvar="COCA_MODEL",
            help="Folder of the model, or its id on the Hub. An index that is there knows its own.",
        ),
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option(help="exact, hnsw or ivfpq, by default chosen by the number of images.", rich_help_panel=OUTPUT),
    ] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(
            help="Store this column, or this file of a tar sample (txt, json), with the image. Can be given several times.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    remove: Annotated[
        list[str] | None,
        typer.Option(help="Take this image out, by its id. Can be given several times.", rich_help_panel=OUTPUT),
    ] = None,
    push_to_hub: Annotated[
        str | None,
        typer.Option(
            "--push_to_hub", help="Put the index on the Hub as this data set, private.", rich_help_panel=OUTPUT
        ),
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Throw away an index, or the unfinished work of one.", rich_help_panel=OUTPUT),
    ] = False,
    as_json: AsJson = False,
    split: Split = None,
    image_column: ImageColumn = None,
    id_column: IdColumn = None,
    image_root: ImageRoot = None,
    captions: Annotated[
        bool,
        typer.Option(
            "--captions",
            help="IMAGES is the output of `coca caption --embeddings`: take its embeddings and captions, without "
            "looking at an image again.",
            rich_help_panel=IMAGES,
        ),
    ] = False,
    batch_size: BatchSize = 64,
    num_workers: NumWorkers = None,
    fast_decode: FastDecode = False,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """
    Make a folder of images searchable, or add images to an index that is there.

    Images that the index has already are passed over, so the same command keeps it up to date. It can be interrupted
    at any time and goes on where it was. Then look for something by `coca search`.

    - `coca index photos/ --model outputs/quickstart --output photos.index`
    - `coca index captions.parquet --captions --model outputs/quickstart --output photos.index`
    - `coca index --output photos.index --remove photos/17.jpg`
    """
    import datasets

    from modeling_coca.inference import embed_images, read_rows
    from modeling_coca.inference.journal import discard, to_json
    from modeling_coca.retrieval import CocaIndex

    datasets.disable_progress_bars()  # of its own steps, which take a moment
    folder = Path(output)
    pending = folder / ".new.parquet"  # embeddings that are not in the index yet
    if (folder / "index.json").is_file() and not overwrite:
        made = CocaIndex.load(folder, model, device=device, dtype=dtype)
        if kind is not None and kind != made.kind:
            made.rebuild(kind)
    else:
        if not images:
            raise ValueError(f"There is no index {folder} yet: say which images go into it.")
        if model is None:
            raise ValueError("Say which model to use: --model, or the environment variable COCA_MODEL.")
        made = CocaIndex(model, kind=kind, device=device, dtype=dtype)
    before, failed = len(made), []
    if remove:
        made.remove(remove)
    finished = [str(pending)] if pending.is_file() and not overwrite else []  # but was not put into the index
    for name in [*finished, *(images if images and captions else [])]:
        made.add_rows(row for row in read_rows(name) if row["id"] not in made)
    if images and not captions:
        if finished:
            made.save(folder)
            discard(pending)
        folder.mkdir(parents=True, exist_ok=True)
        done = embed_images(
            images,
            pending,
            model=made.model,
            batch_size=batch_size,
            num_workers=num_workers,
            fast_decode=fast_decode,
            device=device,
            dtype=dtype,
            skip=made,
            source_kwargs={
                "split": split,
                "image_column": image_column,
                "id_column": id_column,
                "image_root": image_root,
                "keep": keep,
            },
            overwrite=overwrite,
        )
        if done is None:  # the last of several processes makes the index
            return
        failed = done["failed"]
        made.add_rows(read_rows(pending))
    added = len(made) - before + len(set(remove or ()))
    if len(made):
        made.save(folder)
    discard(pending)
    if push_to_hub:
        made.push_to_hub(push_to_hub, private=True)
    if as_json:
        print(to_json({"index": output, "images": len(made), "added": added, "kind": made.kind, "failed": failed}))
    else:
        print(f"{len(made):,} images in {output}, {added:,} of them new. {made.explain()}.")
    report_failures(failed, len(failed) + len(made))
