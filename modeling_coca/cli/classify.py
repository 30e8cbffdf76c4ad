"""`coca classify`: which of these is in the image?"""

from pathlib import Path
from typing import Annotated

import typer

from .options import (
    OUTPUT,
    AsJson,
    BatchSize,
    Device,
    Dtype,
    FastDecode,
    IdColumn,
    ImageColumn,
    ImageRoot,
    Images,
    Model,
    NumWorkers,
    Overwrite,
    Split,
)
from .output import plain, report, report_failures

CLASSES, EVALUATION = "Classes", "Evaluation"


def classify(
    images: Images,
    model: Model,
    classes: Annotated[
        str | None,
        typer.Option(
            "--classes",
            "-c",
            help="Names joined by commas ('cat, dog'), or a file: one name a line, or JSON with descriptions, such as "
            '{"dog": ["dog", "puppy"]}. With --evaluate by default the labels that occur.',
            rich_help_panel=CLASSES,
        ),
    ] = None,
    template: Annotated[
        list[str] | None,
        typer.Option(
            help="Sentence with {} for the class, by default 'a photo of a {}.'. Given several times, the mean counts, "
            "which is often better.",
            rich_help_panel=CLASSES,
        ),
    ] = None,
    templates: Annotated[
        str | None, typer.Option(help="File with a template a line, instead.", rich_help_panel=CLASSES)
    ] = None,
    multi_label: Annotated[
        bool,
        typer.Option(
            "--multi_label",
            help="An image may have several labels, or none: each class is decided by itself.",
            rich_help_panel=CLASSES,
        ),
    ] = False,
    threshold: Annotated[
        float,
        typer.Option(min=0, max=1, help="With --multi_label: labels of this probability.", rich_help_panel=CLASSES),
    ] = 0.5,
    top_k: Annotated[
        int, typer.Option("--top_k", min=1, help="How many of the likeliest classes to store.", rich_help_panel=CLASSES)
    ] = 5,
    temperature: Annotated[
        float,
        typer.Option(
            help="Calibration: above 1 makes probabilities less sure. --evaluate tells the best one.",
            rich_help_panel=CLASSES,
        ),
    ] = 1.0,
    bias: Annotated[
        float,
        typer.Option(help="Calibration with --multi_label: added to the logits.", rich_help_panel=CLASSES),
    ] = 0.0,
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            help="A .jsonl or .parquet file, or a folder for several files. Without it labels are printed.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    evaluate: Annotated[
        bool,
        typer.Option(
            "--evaluate",
            help="Compare with true labels, and print how many are right.",
            rich_help_panel=EVALUATION,
        ),
    ] = False,
    label_column: Annotated[
        str | None,
        typer.Option(
            "--label_column",
            help="Column, or file of a tar sample, with the true label; by default it is the name of the image's "
            "folder. Several labels: joined by ';'.",
            rich_help_panel=EVALUATION,
        ),
    ] = None,
    confusion: Annotated[
        str | None,
        typer.Option(help="Draw which class is taken for which, into this .png file.", rich_help_panel=EVALUATION),
    ] = None,
    split: Split = None,
    image_column: ImageColumn = None,
    id_column: IdColumn = None,
    image_root: ImageRoot = None,
    batch_size: BatchSize = 64,
    num_workers: NumWorkers = None,
    fast_decode: FastDecode = False,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """
    Sort images into classes that are given in words. No training needed.

    Prints each image's likeliest class and its probability. With --evaluate and labels it says how often that is
    right, which classes are mixed up, and whether the probabilities can be trusted.

    - `coca classify photos/ --classes "cat, dog, horse" --model outputs/quickstart`
    - `coca classify photos/ --classes tags.txt --multi_label --output labels.jsonl`
    - `coca classify labelled/ --evaluate --confusion confusion.png`
    """
    from modeling_coca.inference import classify_images, evaluate_images
    from modeling_coca.inference.classification import DEFAULT_TEMPLATES
    from modeling_coca.inference.journal import to_json

    if templates is not None:
        template = [line.strip() for line in Path(templates).read_text(encoding="utf-8").splitlines() if line.strip()]
    options = {
        "templates": template or list(DEFAULT_TEMPLATES),
        "multi_label": multi_label,
        "threshold": threshold,
        "temperature": temperature,
        "bias": bias,
        "top_k": top_k,
    }
    shared = {
        "model": model,
        "classes": classes,
        "classifier_kwargs": options,
        "batch_size": batch_size,
        "num_workers": num_workers,
        "fast_decode": fast_decode,
        "device": device,
        "dtype": dtype,
        "source_kwargs": {
            "split": split,
            "image_column": image_column,
            "id_column": id_column,
            "image_root": image_root,
        },
    }
    if evaluate:
        figures = evaluate_images(images, label_column=label_column, confusion_picture=confusion, **shared)
        failed = figures["failed"]
        if as_json:
            print(to_json(figures))
        else:
            _print_figures(figures, confusion)
        report_failures(failed, figures["images"] + len(failed))
        return
    if classes is None:
        raise ValueError("Say which classes there are: --classes 'cat, dog', or a file.")
    done = classify_images(images, output, overwrite=overwrite, **shared)

    def lines(row: dict) -> list[str]:
        labels = row["labels"] if multi_label else row["labels"][:1]
        return ["\t".join([plain(row["id"]), *(f"{plain(each['label'])}\t{each['score']:.3f}" for each in labels)])]

    report(done, output, as_json, "images classified", lines)


def _print_figures(figures: dict, confusion: str | None) -> None:
    for name, value in figures.items():
        if isinstance(value, float) and (name, value) != ("bias", 0):
            print(f"{name:<24}{value:.3f}")
        elif isinstance(value, int):
            print(f"{name:<24}{value}")
    for true, predicted, number in figures.get("confusions", []):
        print(f"{number:>6} x {true!r} taken for {predicted!r}")
    if "temperature" in figures:
        bias = f" --bias {figures['bias']:.3g}" if figures["bias"] else ""
        print(f"Probabilities are calibrated best by --temperature {figures['temperature']:.3g}{bias}")
    if confusion is not None and "top1" in figures:
        print(f"Confusion matrix: {confusion}")
