"""Image and text embeddings for search and classification."""

import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, ProcessorMixin

from .loading import load_for_inference
from .mapping import map_images


class CocaEmbedder:
    """
    L2-normalised embeddings in fp32, by the dual encoder alone.

    Args:
        model ([`CocaModel`] or [`CocaForConditionalGeneration`]), processor ([`CocaProcessor`]).
    """

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin):
        self.model, self.processor = model, processor

    @torch.inference_mode()
    def images(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) -> (B, projection_dim)."""
        model = self.model
        pixel_values = pixel_values.to(model.device, model.dtype, non_blocking=True)
        return F.normalize(model.base_model.get_image_features(pixel_values).pooler_output.float(), dim=-1)

    @torch.inference_mode()
    def texts(self, texts: Sequence[str], batch_size: int = 256) -> torch.Tensor:
        """-> (texts, projection_dim)."""
        embeds = []
        for start in range(0, len(texts), batch_size):
            batch = list(texts[start : start + batch_size])
            inputs = self.processor.tokenizer(batch, padding=True, return_tensors="pt").to(self.model.device)
            outputs = self.model.base_model.get_text_features(inputs["input_ids"], inputs["attention_mask"])
            embeds.append(F.normalize(outputs.pooler_output.float(), dim=-1))
        return torch.cat(embeds)

    def __call__(self, pixel_values: torch.Tensor) -> list[dict[str, Any]]:
        return [{"embedding": row} for row in self.images(pixel_values).cpu().numpy()]


def embed_images(
    images: Any,
    output: str | os.PathLike | None = None,
    *,
    model: str | os.PathLike | PreTrainedModel,
    processor: ProcessorMixin | None = None,
    device: str | None = None,
    dtype: str | None = None,
    **kwargs: Any,
) -> list[dict[str, Any]] | dict[str, Any] | None:
    """
    Embeds all images of a source; like [`caption_images`] it can be resumed and shared.

    Args:
        model, processor, device, dtype: see [`load_for_inference`].
        images, output and the rest, returns: see [`map_images`]. Rows have an `embedding`.

    Example:

    ```python
    >>> from modeling_coca.inference import embed_images

    >>> rows = embed_images("photos", model="outputs/quickstart")  # doctest: +SKIP
    >>> rows[0]["embedding"].shape  # doctest: +SKIP
    (128,)
    ```
    """

    def load() -> tuple[CocaEmbedder, ProcessorMixin]:
        from modeling_coca import CocaModel

        loaded = load_for_inference(model, CocaModel, processor, device, dtype)
        return CocaEmbedder(*loaded), loaded[1]

    return map_images(
        images, output, load, {"model": str(getattr(model, "name_or_path", model))}, description="Embeddings", **kwargs
    )


__all__ = ["CocaEmbedder", "embed_images"]
