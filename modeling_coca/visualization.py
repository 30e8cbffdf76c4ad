"""Where CoCa looks: attention maps of the poolers, and of each word over the image, as arrays and as pictures.

A word reaches the image in two steps: the decoder's cross-attention goes from the word to image tokens, and the caption
pooler's attention from image tokens to the encoder's patches. Their product is the word's map (as attention rollout
follows attention through layers, arXiv 2005.00928). Such maps show what the decoder could see there, not why it wrote
the word.
"""

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from .modeling_coca import CocaDecoderModel, CocaModel
from .processing_coca import CocaProcessor

_eager_lock = threading.Lock()

# From cold to hot, of even steps in lightness, so that it also reads in grey and by the colour-blind
_HEAT_LEVELS = (0.0, 0.25, 0.5, 0.75, 1.0)
_HEAT_COLOURS = ((20, 14, 80), (110, 30, 130), (205, 60, 95), (250, 140, 45), (252, 250, 130))


@dataclass
class AttentionMaps:
    """
    Attention over the image, averaged over heads (and, for tokens, over the decoder's layers): shares of 1, less what falls on
    tokens that are no place in the image, such as a class token.

    Args:
        embedding (`(B, h, w)`, *optional*): of the image embedding; `None` for layouts where no pooler query makes it.
        queries (`(B, Q, h, w)`, *optional*): of each image token that the decoder gets; `None` without poolers.
        tokens (`(B, T, h, w)`, *optional*): as each token of `input_ids` was predicted, so that the first one has none: zeros.
            For a [`CocaForVisualQuestionAnswering`], as each token of the question was read.
    """

    embedding: torch.Tensor | None
    queries: torch.Tensor | None
    tokens: torch.Tensor | None


@dataclass
class WordMaps:
    """
    A text over an image.

    Args:
        words (`list[str]`): the text's words.
        maps (`np.ndarray` of shape `(words, h, w)`): attention of each, see [`AttentionMaps`].
        image (`PIL.Image.Image`): the image as the model saw it, resized and cropped.
        text (`str`): the text.
    """

    words: list[str]
    maps: np.ndarray
    image: Image.Image
    text: str

    def draw(self, **kwargs) -> Image.Image:
        """A picture with one panel a word, see [`draw_maps`]."""
        return draw_maps(self.image, self.maps, self.words, **kwargs)


@contextmanager
def _eager_attention(model: torch.nn.Module) -> Iterator[None]:
    """Poolers and text stacks give their attention weights; the image encoder stays as it is."""
    config = model.config
    with _eager_lock:  # another thread must not switch back in between
        before = {"": config._attn_implementation, "text_config": config.text_config._attn_implementation}
        model.set_attn_implementation({"": "eager", "text_config": "eager"})
        try:
            yield
        finally:
            model.set_attn_implementation(before)


def _grid_of(model: torch.nn.Module, num_tokens: int, pixel_values: torch.Tensor) -> tuple[int, int]:
    """Rows and columns of the image encoder's tokens, which come last after any class and register tokens."""
    height, width = pixel_values.shape[-2:]
    vision_config = model.config.vision_config
    patch_size = getattr(vision_config, "patch_size", None)
    if isinstance(patch_size, int) and (height // patch_size) * (width // patch_size) <= num_tokens:
        return height // patch_size, width // patch_size
    # feature maps, of a stride that no config names
    rows = max(1, round(math.sqrt(num_tokens * height / width)))
    if num_tokens % rows:
        raise ValueError(
            f"The {num_tokens} tokens of the image encoder ({vision_config.model_type!r}) are no grid for images of "
            f"{height}x{width} pixels."
        )
    return rows, num_tokens // rows


@torch.no_grad()
def attention_maps(
    model: CocaModel | CocaDecoderModel,
    pixel_values: torch.FloatTensor,
    input_ids: torch.LongTensor | None = None,
    attention_mask: torch.Tensor | None = None,
    interpolate_pos_encoding: bool = False,
) -> AttentionMaps:
    """
    Where the poolers look, and the decoder with each token of a text: a caption that `generate` wrote, or any other.

    Args:
        model: any CoCa with poolers; for the tokens' maps one with a decoder.
        pixel_values (`(B, channels, height, width)`): images.
        input_ids (`(B, T)`, *optional*), attention_mask: a text for each image, e.g. the sequences of `generate`.
        interpolate_pos_encoding (`bool`): take images of another size than `image_size`.

    Returns:
        [`AttentionMaps`]

    Example:

    ```python
    >>> import torch
    >>> from modeling_coca import CocaConfig, CocaForConditionalGeneration
    >>> from modeling_coca.visualization import attention_maps

    >>> small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
    >>> config = CocaConfig(
    ...     vision_config={**small, "image_size": 36},
    ...     text_config={**small, "num_multimodal_layers": 2, "vocab_size": 99, "bos_token_id": 97, "eos_token_id": 98},
    ...     num_query_tokens=4, projection_dim=32,
    ... )
    >>> model = CocaForConditionalGeneration(config).eval()
    >>> pixel_values = torch.randn(1, 3, 36, 36)
    >>> maps = attention_maps(model, pixel_values, model.generate(pixel_values, max_new_tokens=5, eos_token_id=None))
    >>> maps.embedding.shape, maps.queries.shape, maps.tokens.shape
    (torch.Size([1, 2, 2]), torch.Size([1, 4, 2, 2]), torch.Size([1, 6, 2, 2]))
    ```
    """
    base = model if isinstance(model, CocaModel) else model.base_model
    pooler = base.image_pooler
    with _eager_attention(model):
        outputs = base.encode_image(
            pixel_values, need_embedding=False, need_tokens=True, interpolate_pos_encoding=interpolate_pos_encoding
        )
        image_tokens, states = outputs[1], outputs[2].last_hidden_state
        rows, columns = _grid_of(model, states.shape[1], pixel_values)
        if pooler.norm_position == "encoder":
            states = pooler.layer_norm(states)

        embedding = None
        if pooler.pooler_type == "none":  # image tokens are patches, after the class token that is none
            to_patches = torch.eye(image_tokens.shape[1], device=states.device, dtype=states.dtype)[None]
            queries = None
        else:
            pooled, weights = pooler.caption_pooler(states)
            to_patches = weights.mean(dim=1)  # [B, Q, N]
            if pooler.pooler_type == "shared":
                if pooler.pooling == "first":
                    embedding = to_patches[:, 0]
                to_patches = to_patches[:, 1:]
            elif pooler.pooler_type == "cascade":
                embedding = (pooler.contrastive_pooler(pooled)[1].mean(dim=1) @ to_patches)[:, 0]
            else:
                embedding = pooler.contrastive_pooler(states)[1].mean(dim=1)[:, 0]
            queries = to_patches

        tokens = None
        if input_ids is not None:
            if not isinstance(model, CocaDecoderModel):
                raise ValueError(f"Maps of a text need a model with a decoder, not a {type(model).__name__}.")
            cross = model(
                input_ids,
                attention_mask=attention_mask,
                encoder_hidden_states=image_tokens,
                output_attentions=True,
                return_dict=True,
            ).cross_attentions
            cross = torch.stack([layer.mean(dim=1) for layer in cross]).mean(dim=0)  # [B, T, Q]
            if hasattr(model, "lm_head"):  # the token at t was written from the state before it
                cross = torch.cat([torch.zeros_like(cross[:, :1]), cross[:, :-1]], dim=1)
            tokens = cross @ to_patches

    def to_grid(weights: torch.Tensor | None) -> torch.Tensor | None:
        return None if weights is None else weights[..., -rows * columns :].unflatten(-1, (rows, columns)).float()

    return AttentionMaps(to_grid(embedding), to_grid(queries), to_grid(tokens))


def word_maps(
    model: CocaDecoderModel, processor: CocaProcessor, image: Image.Image, text: str | None = None, **generate_kwargs
) -> WordMaps:
    """
    A caption's words over an image.

    Args:
        model ([`CocaForConditionalGeneration`] or [`CocaForVisualQuestionAnswering`]): the model.
        processor ([`CocaProcessor`]): its processor.
        image (`PIL.Image.Image`): an image.
        text (`str`, *optional*): a text about it; by default the caption that the model writes.
        **generate_kwargs: of `generate`, for that caption.

    Returns:
        [`WordMaps`]

    Example:

    ```python
    >>> from modeling_coca.visualization import word_maps

    >>> word_maps(model, processor, image).draw().save("words.png")  # doctest: +SKIP
    ```
    """
    inputs = processor(images=[image], return_tensors="pt").to(model.device)
    pixel_values = inputs["pixel_values"].to(model.dtype)
    tokenizer = processor.tokenizer
    if text is None:
        input_ids = model.generate(pixel_values=pixel_values, num_return_sequences=1, **generate_kwargs)
    else:
        # A caption may fill all of the context, which leaves no room for the end of the text; and that is no word
        input_ids = tokenizer([text], return_tensors="pt", verbose=False)["input_ids"].to(model.device)
        if input_ids[0, -1] == tokenizer.eos_token_id:
            input_ids = input_ids[:, :-1]
    maps = attention_maps(model, pixel_values, input_ids).tokens[0].cpu().numpy()

    # A token belongs to the word that it begins or goes on with, which decoding tells for any tokenizer
    words, members = [], []
    for t in range(input_ids.shape[1]):
        if int(input_ids[0, t]) in tokenizer.all_special_ids:
            continue
        words = tokenizer.decode(input_ids[0, : t + 1], skip_special_tokens=True).split()
        members.append((max(len(words) - 1, 0), t))
    grouped = [np.mean([maps[t] for word, t in members if word == i] or [maps[0]], axis=0) for i in range(len(words))]
    text = tokenizer.decode(input_ids[0], skip_special_tokens=True).strip()
    return WordMaps(words, np.stack(grouped) if words else maps[:0], _seen_image(processor, pixel_values[0]), text)


def _seen_image(processor: CocaProcessor, pixel_values: torch.Tensor) -> Image.Image:
    """(3, height, width), normalised -> picture."""
    image_processor = processor.image_processor
    mean, std = (
        pixel_values.new_tensor(x)[:, None, None] for x in (image_processor.image_mean, image_processor.image_std)
    )
    pixels = ((pixel_values * std + mean).clamp(0, 1) * 255).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def draw_map(image: Image.Image, values: np.ndarray | torch.Tensor, size: tuple[int, int] | None = None) -> Image.Image:
    """
    An image under a heat map, which has its own scale, from its smallest value to its largest.

    Args:
        image (`PIL.Image.Image`): the image as the model saw it.
        values (`(h, w)`): attention.
        size (`tuple[int, int]`, *optional*): width and height of the result, by default those of the image.

    Returns:
        `PIL.Image.Image`

    Example:

    ```python
    >>> import numpy as np
    >>> from PIL import Image
    >>> from modeling_coca.visualization import draw_map

    >>> draw_map(Image.new("RGB", (64, 64), "red"), np.random.rand(4, 4), (192, 192)).size
    (192, 192)
    ```
    """
    size = size or image.size
    picture = np.asarray(image.convert("RGB").resize(size, Image.Resampling.LANCZOS), dtype=np.float32)
    values = np.asarray(values, dtype=np.float32)
    spread = values.max() - values.min()
    values = (values - values.min()) / spread if spread > 0 else np.zeros_like(values)
    heat = np.clip(np.asarray(Image.fromarray(values).resize(size, Image.Resampling.BICUBIC)), 0, 1)
    colours = np.stack(
        [np.interp(heat, _HEAT_LEVELS, channel) for channel in zip(*_HEAT_COLOURS, strict=True)], axis=-1
    )
    opacity = 0.3 + 0.4 * heat[..., None]  # the picture shows best where little attention is
    return Image.fromarray((picture * (1 - opacity) + colours * opacity).astype(np.uint8))


def draw_maps(
    image: Image.Image,
    maps: np.ndarray | torch.Tensor,
    labels: Sequence[str],
    columns: int | None = None,
    panel_size: int = 192,
) -> Image.Image:
    """
    One panel a map: the image under a heat map, with the label below it.

    Args:
        image (`PIL.Image.Image`): the image as the model saw it.
        maps (`(panels, h, w)`): attention, see [`draw_map`].
        labels (`list[str]`): what to write below the panels.
        columns (`int`, *optional*): panels in a row; by default at most 6.
        panel_size (`int`): width of a panel in pixels.

    Returns:
        `PIL.Image.Image`

    Example:

    ```python
    >>> import numpy as np
    >>> from PIL import Image
    >>> from modeling_coca.visualization import draw_maps

    >>> draw_maps(Image.new("RGB", (64, 64), "red"), np.random.rand(3, 4, 4), ["a", "red", "fox"]).size
    (576, 220)
    ```
    """
    maps = np.asarray(maps, dtype=np.float32)
    if len(maps) != len(labels) or not len(maps):
        raise ValueError(
            f"There are {len(maps)} `maps` for {len(labels)} `labels`: give one label for each, and one at least."
        )
    columns = min(columns or 6, len(maps))
    width, height = panel_size, max(1, round(panel_size * image.height / image.width))
    label_height = 28
    rows = math.ceil(len(maps) / columns)
    canvas = Image.new("RGB", (columns * width, rows * (height + label_height)), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=16)
    narrower = min(1, min((width - 8) / max(font.getlength(label), 1) for label in labels))
    font = ImageFont.load_default(size=16 * narrower)
    for i, (values, label) in enumerate(zip(maps, labels, strict=True)):
        panel = draw_map(image, values, (width, height))
        x, y = (i % columns) * width, (i // columns) * (height + label_height)
        canvas.paste(panel, (x, y))
        draw.text((x + width / 2, y + height + label_height / 2), label, fill="black", font=font, anchor="mm")
    return canvas


__all__ = ["AttentionMaps", "WordMaps", "attention_maps", "draw_map", "draw_maps", "word_maps"]
