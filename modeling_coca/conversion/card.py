"""The model card of a converted checkpoint: whose it is, its licence, what was run, how to use it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..configuration_coca import CocaConfig

if TYPE_CHECKING:
    from .convert import Found


def pooler(config: CocaConfig) -> str:
    """The pooler in words."""
    width, queries = config.pooler_hidden_size, config.num_query_tokens
    if config.pooler_type == "none":
        return "none: class token and patches as they are"
    if config.pooler_type == "shared":
        queries = f"{queries} + 1"
    elif config.contrastive_pooler_hidden_size != width:
        width = f"{width} and {config.contrastive_pooler_hidden_size}"
    return f"{config.pooler_type}, {queries} queries of width {width}, {config.num_pooler_attention_heads} heads"


_SEARCH = """\
```python
import torch
from PIL import Image
from modeling_coca import CocaModel, CocaProcessor

model = CocaModel.from_pretrained("{out}").eval()
processor = CocaProcessor.from_pretrained("{out}")
inputs = processor(images=[Image.open("photo.jpg")], text=["a cat", "a dog"], return_tensors="pt")
with torch.inference_mode():
    print(model(**inputs).logits_per_image.softmax(-1))
```"""
_CAPTION = """\
```python
from PIL import Image
from modeling_coca import CocaForConditionalGeneration, CocaProcessor

model = CocaForConditionalGeneration.from_pretrained("{out}").eval()
processor = CocaProcessor.from_pretrained("{out}")
inputs = processor(images=[Image.open("photo.jpg")], return_tensors="pt")
print(processor.batch_decode(model.generate(**inputs), skip_special_tokens=True))
```"""


def render(found: Found, out: Path, command: str | None = None) -> str:
    """The card as Markdown, with the metadata that the Hub reads."""
    recipe, repository = found.recipe, found.checkpoint.repository
    has_decoder = found.conversion.has_decoder
    tags = ["coca", "zero-shot-image-classification", *(["image-captioning"] if has_decoder else [])]
    metadata = [
        "library_name: transformers",
        f"pipeline_tag: {'image-text-to-text' if has_decoder else 'zero-shot-image-classification'}",
        f"license: {recipe.license if recipe else 'unknown'}",
    ]
    if recipe and recipe.license_name:
        metadata += [f"license_name: {recipe.license_name}", f"license_link: {recipe.license_link}"]
    if repository:
        metadata.append(f"base_model: {repository}")
    metadata += ["tags:", *(f"- {tag}" for tag in tags)]

    source = (
        f"[{repository}](https://huggingface.co/{repository})"
        if repository
        else f"`{Path(found.checkpoint.name).name}`"
    )
    title = recipe.title if recipe else f"CoCa from {Path(found.checkpoint.name).name}"
    licence = (
        f"The licence of the weights is their makers': {recipe.license_name or recipe.license}."
        if recipe
        else "The licence of the weights is that of the source; write it into this card before you share them."
    )
    parts = [
        "---\n" + "\n".join(metadata) + "\n---",
        f"# {title}",
        f"{source}, converted to modeling_coca for transformers. {licence}",
        "| | |\n|---|---|\n" + "\n".join(f"| {word} | {phrase} |" for word, phrase in found.describe()),
    ]
    if command:
        parts.append(f"Converted by\n\n```bash\n{command}\n```")
    if found.warnings:
        parts.append("\n".join(f"- {warning}" for warning in found.warnings))
    if recipe:
        parts += [
            "## What for",
            recipe.use,
            *([f"Published: {recipe.published}."] if recipe.published else []),
            "## Generation",
            recipe.why,
        ]
    parts += ["## Use", (_CAPTION if has_decoder else _SEARCH).format(out=out.name)]
    return "\n\n".join(parts) + "\n"
