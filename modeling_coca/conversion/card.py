"""What a converted checkpoint says of itself: whose it is, its licence, what was found, what was run."""

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


def render(found: Found, out: Path, command: str | None = None) -> str:
    """The card as Markdown, in the form of all cards of this package (see `modeling_coca.hub.model_card`).

    Args:
        found: The source.
        out: Folder that the card's example opens.
        command: What was run.
    """
    from ..hub.model_card import cell, code_block, model_card

    recipe, repository, name = found.recipe, found.checkpoint.repository, Path(found.checkpoint.name).name
    source = f"[{repository}](https://huggingface.co/{repository})" if repository else f"`{cell(name)}`"
    licence = (
        f"The licence of the weights is their makers': {recipe.license_name or recipe.license}."
        if recipe
        else "The licence of the weights is that of the source: write it into this card before you share them."
    )
    title = f"{recipe.title}: " if recipe else ""
    conversion = "| | |\n|---|---|\n" + "\n".join(f"| {word} | {cell(phrase)} |" for word, phrase in found.describe())
    if command:
        conversion += "\n\n" + code_block("bash", command)
    sections = {"Conversion": conversion}
    metadata = {"license": "unknown", "base_model": repository}
    if recipe:
        published = f"\n\nPublished: {recipe.published}." if recipe.published else ""
        sections |= {"What for": recipe.use + published, "Generation": recipe.why}
        metadata |= {
            "license": recipe.license,
            "license_name": recipe.license_name,
            "license_link": recipe.license_link,
        }
    card = model_card(
        found.conversion.model,
        out.name,
        description=f"{title}{source}, converted for transformers. {licence}",
        notes=found.warnings,
        sections=sections,
        **metadata,
    )
    return str(card)
