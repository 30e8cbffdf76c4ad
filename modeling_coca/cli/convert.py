"""`coca convert`: other people's checkpoints to transformers, and back to open_clip."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Layout(StrEnum):
    transformers = "transformers"
    open_clip = "open_clip"


class DType(StrEnum):
    auto = "auto"
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


def convert(
    source: Annotated[
        str,
        typer.Argument(
            help="A folder, a weight file (.safetensors, .bin, .pt) or a repository of the Hub.", show_default=False
        ),
    ],
    out: Annotated[Path, typer.Argument(help="The folder to write.", show_default=False)],
    to: Annotated[Layout, typer.Option(help="open_clip: SOURCE is a model of this package.")] = Layout.transformers,
    check: Annotated[
        bool,
        typer.Option("--check", help="Rebuild SOURCE with its own library and compare all outputs before OUT is kept."),
    ] = False,
    images: Annotated[
        Path | None,
        typer.Option(help="Pictures for --check: a file or a folder. By default three of the package.", exists=True),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            help="JSON of the arguments that build SOURCE in its own library, where there is none beside the weights.",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            help="Tokenizer to write: a folder, a tokenizer.json or a bpe_simple_vocab_16e6.txt.gz. By default CLIP's."
        ),
    ] = None,
    dtype: Annotated[DType, typer.Option(help="Of the weights written; auto keeps that of SOURCE.")] = DType.auto,
    max_shard_size: Annotated[str, typer.Option(help="Of one weight file.")] = "5GB",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a repository.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it holds a model.")] = False,
) -> None:
    """Convert a CoCa checkpoint of open_clip (LAION's, Apple's, your own), CONCH or torchmultimodal.

    Pickles are opened with weights_only=True and in no other way. Nothing is left in OUT if anything goes wrong.

    coca convert laion/CoCa-ViT-L-14-laion2B-s13B-b90k coca-l-14 --check

    coca convert logs/epoch_32.pt my-coca

    coca convert my-coca for-open-clip --to open_clip
    """
    import shlex
    import sys

    from transformers.utils import logging

    from modeling_coca import conversion

    logging.enable_progress_bar()
    if to is Layout.open_clip:
        given = {"--check": check, "--config": config, "--tokenizer": tokenizer, "--revision": revision}
        if unfit := [option for option, value in given.items() if value]:
            raise ValueError(
                f"{', '.join(unfit)} and --to open_clip do not go together: they are about sources to convert here."
            )
        _, notes = conversion.convert_to_open_clip(source, out, overwrite=overwrite)
        _warn(notes)
        print(f'{out}: open it with open_clip.create_model_and_transforms("local-dir:{out}")')
        return

    import torch

    def run_check(found, folder):
        from modeling_coca.conversion import checking

        differences = checking.check(found, folder, images)
        print("largest difference to the source in its own library:")
        for difference in differences:
            mark = "" if difference.is_fine else f"  MORE THAN {difference.allowed:.1e}"
            print(f"  {difference.what:<18} {difference.largest:.1e}  ({difference.note}){mark}")
        wrong = [difference.what for difference in differences if not difference.is_fine]
        if wrong:
            raise ValueError(
                f"{', '.join(wrong)} differ from those of {source} in {found.family.package}: nothing was kept."
            )

    command = shlex.join(["coca", *sys.argv[1:]]) if sys.argv[1:2] == ["convert"] else None
    found = conversion.convert(
        source,
        out,
        config=config,
        tokenizer=tokenizer,
        dtype=None if dtype is DType.auto else getattr(torch, dtype),
        max_shard_size=max_shard_size,
        revision=revision,
        overwrite=overwrite,
        command=command or f"coca convert {shlex.quote(source)} {shlex.quote(str(out))}",
        report=lambda found: _report(source, found),
        check=run_check if check else None,
    )
    _warn(found.warnings)
    classes = "CocaForConditionalGeneration" if found.conversion.has_decoder else "CocaModel"
    print(f'{out}: open it with {classes}.from_pretrained("{out}")')


def _report(source: str, found) -> None:
    print(f"found in {source}:")
    for word, phrase in found.describe():
        print(f"  {word:<10} {phrase}")


def _warn(notes: list[str]) -> None:
    for note in notes:
        typer.secho(f"warning: {note}", err=True, fg=typer.colors.YELLOW)
