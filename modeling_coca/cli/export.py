"""`coca export`: a model for those who do not have this package."""

from pathlib import Path
from typing import Annotated

import typer

from .options import OUTPUT, AsJson, Model


def export(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.", show_default=False)],
    model: Model,
    onnx: Annotated[
        bool,
        typer.Option(
            "--onnx", help="Write graphs for ONNX Runtime instead, which need neither PyTorch nor transformers."
        ),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a model that is in OUT.", rich_help_panel=OUTPUT)
    ] = False,
    as_json: AsJson = False,
) -> None:
    """
    Write a model for those who do not have this package.

    OUT gets the weights, the processor, their code and a model card: transformers opens it by trust_remote_code=True, also
    after it was uploaded. With --onnx it gets image_encoder.onnx, text_encoder.onnx, text_decoder.onnx (if the model writes)
    and the files of the processor. Nothing is left in OUT if anything goes wrong.

    - `coca export my-coca --model outputs/quickstart`
    - `coca export my-onnx --model outputs/quickstart --onnx`
    """
    import contextlib
    import sys

    import modeling_coca
    from modeling_coca.conversion.convert import check_out
    from modeling_coca.hub import export_to_folder
    from modeling_coca.inference.journal import to_json
    from modeling_coca.saving import new_folder

    check_out(out, overwrite)
    opened, processor = _open(model, onnx)
    name = type(opened).__name__
    if onnx:
        from modeling_coca.exporting import export as export_graphs

        if name not in ("CocaForConditionalGeneration", "CocaModel"):
            raise ValueError(f"{model} is a {name}: graphs are made of a CocaForConditionalGeneration or a CocaModel.")
        if processor is None:
            raise ValueError(f"{model} has no processor, which says how large its images are.")
        from PIL import Image

        pixel_values = processor(images=[Image.new("RGB", (32, 32))], return_tensors="pt")["pixel_values"]
        with new_folder(out) as folder, contextlib.redirect_stdout(sys.stderr):  # where PyTorch prints its steps
            export_graphs(opened, pixel_values).save_pretrained(folder)
            processor.save_pretrained(folder)
        how = f'onnxruntime.InferenceSession("{out}/image_encoder.onnx")'
    else:
        export_to_folder(opened, processor, out)
        auto_class = next(auto for auto, names in modeling_coca._AUTO_MODELS.items() if name in names.values())
        how = f'transformers.{auto_class}.from_pretrained("{out}", trust_remote_code=True)'
    if as_json:
        files = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
        print(
            to_json({"output": str(out), "format": "onnx" if onnx else "transformers", "class": name, "files": files})
        )
    else:
        print(f"{out}: open it with {how}")


def _open(source: str, onnx: bool):
    """The model as what it was saved as, and its processor, if it has one."""
    from transformers import AutoConfig

    import modeling_coca

    try:
        architectures = AutoConfig.from_pretrained(source, trust_remote_code=False).architectures or []
    except (OSError, ValueError):  # of another library, or nothing: `from_pretrained` says
        architectures = []
    name = next((name for name in architectures if name in modeling_coca.__all__), "CocaForConditionalGeneration")
    options = {"dtype": "float32"} if onnx else {}
    model = getattr(modeling_coca, name).from_pretrained(source, **options).eval()
    try:
        return model, modeling_coca.CocaProcessor.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError):
        typer.secho(f"warning: {source} has no processor.", err=True, fg=typer.colors.YELLOW)
        return model, None
