"""`coca search`: where is something like this?"""

import dataclasses
from typing import Annotated

import typer

from .options import IMAGES, MACHINE, AsJson, Device, Dtype
from .output import plain


def search(
    index: Annotated[
        str,
        typer.Argument(help="Folder of the index that `coca index` made, or its id on the Hub.", show_default=False),
    ],
    text: Annotated[str | None, typer.Argument(help="What to look for, in words.", show_default=False)] = None,
    image: Annotated[str | None, typer.Option(help="Look for images like this one.")] = None,
    text_weight: Annotated[
        float,
        typer.Option("--text_weight", min=0, max=1, help="With both: how much the words count beside the image."),
    ] = 0.5,
    k: Annotated[int, typer.Option("--k", "-k", min=1, help="How many images to find.")] = 10,
    rerank: Annotated[
        int,
        typer.Option(
            min=0,
            help="Look at this many of the nearest again, and sort them by how likely the model would write the words as "
            "their caption. Slower, and better at details.",
        ),
    ] = 0,
    as_json: AsJson = False,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Folder or id of the model, if it has moved.", rich_help_panel=MACHINE),
    ] = None,
    image_root: Annotated[
        str | None,
        typer.Option(
            "--image_root",
            help="With --rerank: folder that the ids may lead into. By default anywhere; for an index from the Hub, into this folder.",
            rich_help_panel=IMAGES,
        ),
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """
    Find images by words, by an image, or by both.

    Prints the images that fit best, with their score: the cosine between query and image, from -1 to 1.

    - `coca search photos.index "two dogs running"`
    - `coca search photos.index --image dog.jpg -k 3`
    - `coca search photos.index "at night" --image bridge.jpg`
    """
    from modeling_coca.inference.journal import to_json
    from modeling_coca.retrieval import CocaIndex

    opened = CocaIndex.load(index, model, device=device, dtype=dtype, image_root=image_root)
    found = opened.search(text, image=image, k=k, text_weight=text_weight, rerank=rerank)
    for hit in found:
        if as_json:
            print(to_json({name: value for name, value in dataclasses.asdict(hit).items() if value is not None}))
        else:
            likelihood = "" if hit.log_prob is None else f"\t{hit.log_prob:.2f}"
            print(f"{hit.score:.3f}{likelihood}\t{plain(hit.id)}")
