"""CoCa as graphs that run without this package: for ONNX Runtime, or what else transformers' exporters write."""

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.export import Dim
from transformers.cache_utils import DynamicCache

from .generation_coca import CocaCache
from .modeling_coca import CocaForConditionalGeneration, CocaModel

if TYPE_CHECKING:
    from transformers.exporters import ExportedModel


def export(
    model: CocaModel | CocaForConditionalGeneration,
    pixel_values: torch.Tensor,
    export_format: str = "onnx",
    **config: Any,
) -> "ExportedModel":
    """
    Exports a model's parts with the exporters of transformers:

    | part | inputs | outputs |
    |---|---|---|
    | `image_encoder` | `pixel_values` (B, channels, height, width) | `image_embeds` (B, projection_dim), `image_cache` (2 M, B, heads, Q, D / heads) |
    | `text_encoder` | `input_ids`, `attention_mask` (B, T) | `text_embeds` (B, projection_dim) |
    | `text_decoder` | `input_ids` (B, T), `attention_mask` (B, P + T), `text_cache` (2 L, B, heads, P, D / heads), `image_cache` | `logits` (B, T, vocabulary), `next_text_cache` (2 L, B, heads, P + T, D / heads) |

    Embeddings are L2-normalised. The caches hold keys and values of each layer: of the image, computed once, for the M layers
    that attend to it, and of the P tokens before for all L layers, where P may be 0. Batches and lengths are free, the image
    size is not. A model with `shifted_cls_mask` also takes a `text_attention_mask`, which is the `attention_mask` but for
    a 0 after each token that has the padding's id ("!"). Programs of `torch.export` want an `attention_mask` of at least 4
    columns: pad a shorter prompt on the left.

    Args:
        model ([`CocaForConditionalGeneration`], or [`CocaModel`], which has no decoder): in evaluation mode.
        pixel_values (`(B, channels, height, width)`): some images as the processor gives them, for their size.
        export_format (`str`, defaults to `"onnx"`): `"onnx"`, `"dynamo"` (`torch.export`), or another that transformers knows.
        **config: further fields of the format's config in `transformers.exporters`, such as `quantizer`.

    Returns:
        `transformers.exporters.ExportedModel`: `save_pretrained` writes a file for each part, `runners[part](**inputs)` runs
        it on tensors.

    Example:

    ```python
    >>> import numpy as np
    >>> import onnxruntime
    >>> from modeling_coca.exporting import export

    >>> export(model.eval(), pixel_values).save_pretrained("coca-onnx")  # doctest: +SKIP
    >>> parts = ("image_encoder", "text_decoder")
    >>> encoder, decoder = (onnxruntime.InferenceSession(f"coca-onnx/{part}.onnx") for part in parts)  # doctest: +SKIP
    >>> embedding, image_cache = encoder.run(None, {"pixel_values": pixel_values.numpy()})  # doctest: +SKIP
    >>> ids = np.full((len(pixel_values), 1), bos_token_id)  # doctest: +SKIP
    >>> cache = np.zeros((2 * L, len(pixel_values), heads, 0, width // heads), np.float32)  # doctest: +SKIP
    >>> while not (ids == eos_token_id).any(1).all():  # doctest: +SKIP
    ...     inputs = {"input_ids": ids[:, -1:], "attention_mask": np.ones_like(ids)}
    ...     logits, cache = decoder.run(None, {**inputs, "text_cache": cache, "image_cache": image_cache})
    ...     ids = np.concatenate([ids, logits[:, -1:].argmax(-1)], axis=1)
    ```
    """
    from transformers.exporters import AutoExportConfig, AutoHfExporter, ExportedModel

    if model.training:
        raise ValueError("The model is in training mode, with dropout: call `model.eval()` before it is exported.")
    text_config, batch, length, seen = model.config.text_config, 2, 2, 3
    ids, mask = torch.ones(2, batch, seen + length, dtype=torch.long, device=model.device)
    free = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    pixels = pixel_values[:1].to(model.device, model.dtype).repeat(batch, 1, 1, 1)
    parts = {
        "image_encoder": (_ImageEncoder(model), {"pixel_values": pixels}, {"pixel_values": {0: Dim.DYNAMIC}}),
        "text_encoder": (
            _TextEncoder(model),
            {"input_ids": ids, "attention_mask": mask},
            {"input_ids": free, "attention_mask": free},
        ),
    }
    if isinstance(model, CocaForConditionalGeneration):
        with torch.no_grad():
            image_cache = parts["image_encoder"][0](pixels)["image_cache"]
        heads = text_config.num_attention_heads
        shape = (2 * text_config.num_hidden_layers, batch, heads, seen, text_config.hidden_size // heads)
        masks = ["attention_mask", "text_attention_mask"] if text_config.shifted_cls_mask else ["attention_mask"]
        parts["text_decoder"] = (
            _TextDecoder(model),
            {
                "input_ids": ids[:, :length].contiguous(),
                **{name: mask.clone() for name in masks},  # one tensor under two names would become one input
                "image_cache": image_cache,
                "text_cache": image_cache.new_zeros(shape),
            },
            {
                **dict.fromkeys(["input_ids", *masks], free),
                "image_cache": {1: Dim.DYNAMIC},
                "text_cache": {1: Dim.DYNAMIC, 3: Dim.DYNAMIC},
            },
        )
    components = {}
    for name, (part, inputs, dynamic_shapes) in parts.items():
        export_config = AutoExportConfig.from_dict(
            {"export_format": export_format, "dynamic_shapes": dynamic_shapes, **config}
        )
        exporter = AutoHfExporter.from_config(export_config)
        components[name] = exporter.export(part.eval(), inputs, export_config).components["model"]
    return ExportedModel(components, export_format, model.config, getattr(model, "generation_config", None))


class _ImageEncoder(nn.Module):
    def __init__(self, model: CocaModel | CocaForConditionalGeneration):
        super().__init__()
        self.dual = getattr(model, "model", model)
        self.text_decoder = getattr(model, "text_decoder", None)

    def forward(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        embedding, tokens, _ = self.dual.encode_image(pixel_values, need_tokens=self.text_decoder is not None)
        outputs = {"image_embeds": F.normalize(embedding, dim=-1)}
        if self.text_decoder is not None:
            cache = DynamicCache()
            for i, layer in enumerate(self.text_decoder.layers):
                block = layer.cross_block
                cache.update(*block.cross_attn._keys_and_values(block.layer_norm_kv(tokens), None), i)
            outputs["image_cache"] = _stack(cache)
        return outputs


class _TextEncoder(nn.Module):
    def __init__(self, model: CocaModel | CocaForConditionalGeneration):
        super().__init__()
        self.dual = getattr(model, "model", model)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        embedding = self.dual.get_text_features(input_ids, attention_mask).pooler_output
        return {"text_embeds": F.normalize(embedding, dim=-1)}


class _TextDecoder(nn.Module):
    def __init__(self, model: CocaForConditionalGeneration):
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        image_cache: torch.Tensor,
        text_cache: torch.Tensor,
        **masks: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        cache = CocaCache(_unstack(text_cache), _unstack(image_cache))
        new = text_cache.shape[3] + torch.arange(input_ids.shape[1], device=input_ids.device)
        position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0).index_select(1, new)
        outputs = self.model(
            input_ids, attention_mask=attention_mask, position_ids=position_ids, past_key_values=cache, **masks
        )
        return {"logits": outputs.logits, "next_text_cache": _stack(cache.self_attention_cache)}


def _stack(cache: DynamicCache) -> torch.Tensor:
    return torch.stack([states for layer in cache.layers for states in (layer.keys, layer.values)])


def _unstack(states: torch.Tensor) -> DynamicCache:
    cache = DynamicCache()
    for i in range(states.shape[0] // 2):
        cache.update(states[2 * i], states[2 * i + 1], i)
    return cache
