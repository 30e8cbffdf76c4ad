"""CoCa: Contrastive Captioners are Image-Text Foundation Models (arXiv 2205.01917).

Shapes in comments: B batch, T text tokens, N tokens of the image encoder, Q image tokens handed to the decoder, D width.
"""

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPastAndCrossAttentions,
    BaseModelOutputWithPooling,
    BaseModelOutputWithPoolingAndCrossAttentions,
    CausalLMOutputWithCrossAttentions,
    ImageClassifierOutput,
    SequenceClassifierOutput,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_coca import CocaConfig, CocaTextConfig, CocaVisionConfig
from .generation_coca import (
    CACHE_NAME,
    CocaCache,
    CocaGenerationMixin,
    as_coca_cache,
    check_cache,
    check_image_tokens,
    check_mask,
    check_one_image_input,
    check_texts,
    hide_after_pad_id,
    is_one_of,
    real_tokens,
)
from .linear_coca import CocaLinear
from .loss_coca import IGNORE_INDEX, caption_loss, contrastive_loss, data_group, mean_count, shift

# ----------------------------------------------------------------------------------------------------------- outputs


@dataclass
class CocaTextModelOutput(BaseModelOutputWithPoolingAndCrossAttentions):
    """
    Output of the unimodal text stack.

    Args:
        last_hidden_state (`(B, T, D)`): token states, as the multimodal decoder takes them (without a final norm).
        pooler_output (`(B, D)`, *optional*): the normed state of [CLS].
        cache (`EncoderDecoderCache`, *optional*): keys and values of the tokens seen so far (before transformers 5.24:
            `past_key_values`).
    """


@dataclass
class CocaImageFeatures(BaseModelOutputWithPooling):
    """
    What one pass over an image gives to both halves of CoCa.

    Args:
        last_hidden_state (`(B, N, D)`): the image encoder's tokens.
        pooler_output (`(B, Q, D)`): image tokens for the decoder; `generate(encoder_hidden_states=...)` takes them.
        image_embeds (`(B, projection_dim)`): L2-normalised image embedding.
    """

    image_embeds: torch.FloatTensor | None = None


@dataclass
class CocaOutput(ModelOutput):
    """
    Output of [`CocaModel`].

    Args:
        loss (scalar, *optional*, with `return_loss=True`): contrastive loss, not weighted.
        logits_per_image (`(images, texts)`), logits_per_text (`(texts, images)`): scaled similarities, given both.
        text_embeds, image_embeds (`(B, projection_dim)`): L2-normalised embeddings.
        text_model_output, vision_model_output: the towers' own outputs.
    """

    loss: torch.FloatTensor | None = None
    logits_per_image: torch.FloatTensor | None = None
    logits_per_text: torch.FloatTensor | None = None
    text_embeds: torch.FloatTensor | None = None
    image_embeds: torch.FloatTensor | None = None
    text_model_output: BaseModelOutputWithPooling | None = None
    vision_model_output: BaseModelOutput | None = None

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(v.to_tuple() if isinstance(v, ModelOutput) else v for v in self.values())


@dataclass
class CocaTowerOutput(CocaOutput, BaseModelOutputWithPooling):
    """
    Output of [`CocaModel`] for one modality: token states come first, which is what feature-extraction pipelines take.

    They are no fields of [`CocaOutput`], from whose absence sentence-transformers concludes that embeddings come from
    `get_text_features` and `get_image_features`.

    Args:
        last_hidden_state (`(B, N or T, D)`): the tower's token states.
        pooler_output (`(B, projection_dim)`): its embedding before normalisation.
        hidden_states, attentions (*optional*): the tower's.
    """


@dataclass
class CocaConditionalOutput(CausalLMOutputWithCrossAttentions):
    """
    Output of [`CocaForConditionalGeneration`].

    Args:
        loss (scalar, *optional*, with `labels`):
            `contrastive_loss_weight * contrastive_loss + caption_loss_weight * caption_loss`.
        logits (`(B, T, vocabulary)`, *optional*): next-token logits. Left out where `labels` are given, see `logits_to_keep`.
        contrastive_loss, caption_loss (scalars, *optional*): both losses without their weights.
        cache (`EncoderDecoderCache`): self-attention of both stacks, and the image's keys and values (before transformers
            5.24: `past_key_values`).
        hidden_states: embeddings, unimodal and multimodal layers: `num_hidden_layers + 1` tensors `(B, T, D)`.
        attentions: self-attention of both stacks, `(B, heads, T, T)` each; unimodal ones without [CLS].
        cross_attentions: of each multimodal layer, `(B, heads, T, Q)`.
        text_embeds, image_embeds (`(B, projection_dim)`): L2-normalised, where the contrastive loss was computed.
        encoder_hidden_states (`(B, Q, D)`): image tokens that the decoder attended to, where they were made or given here.
        image_outputs: the image encoder's own output, where images were encoded here.
    """

    contrastive_loss: torch.FloatTensor | None = None
    caption_loss: torch.FloatTensor | None = None
    text_embeds: torch.FloatTensor | None = None
    image_embeds: torch.FloatTensor | None = None
    encoder_hidden_states: torch.FloatTensor | None = None
    image_outputs: BaseModelOutput | None = None

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(v.to_tuple() if isinstance(v, ModelOutput) else v for v in self.values())


@dataclass
class CocaAnswerOutput(SequenceClassifierOutput):
    """
    Output of [`CocaForVisualQuestionAnswering`].

    Args:
        loss (scalar, *optional*, with `labels`): see `labels` there.
        logits (`(B, num_labels)`): one score for each answer of `config.id2label`, before softmax or sigmoid.
        hidden_states, attentions, cross_attentions: as in [`CocaConditionalOutput`].
    """

    cross_attentions: tuple[torch.FloatTensor, ...] | None = None


# -------------------------------------------------------------------------------------------------- attention and MLP


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    weights = torch.matmul(query, key.transpose(-1, -2)) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = F.softmax(weights, dim=-1, dtype=torch.promote_types(query.dtype, torch.float32)).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class CocaAttention(nn.Module):
    """
    Multi-head attention in three uses: self-attention, causal (text) or not (image), and cross-attention with keys and values of
    another width (poolers and decoder).

    In cross-attention the queries' batch may be a multiple of the images': rows that stand next to each other (the beams of
    an image) then share one image. As no query there looks at another, they are joined into one long row.
    """

    def __init__(
        self,
        config: CocaConfig | CocaTextConfig | CocaVisionConfig,
        hidden_size: int,
        num_heads: int,
        kv_size: int | None = None,
        is_causal: bool = False,
        layer_idx: int | None = None,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.config = config
        self.head_dim = hidden_size // num_heads
        self.scaling = self.head_dim**-0.5
        self.is_cross_attention = kv_size is not None
        self.is_causal = is_causal
        self.layer_idx = layer_idx
        self.dropout = dropout
        kv_size = kv_size or hidden_size
        self.q_proj = CocaLinear(hidden_size, hidden_size)
        self.k_proj = CocaLinear(kv_size, hidden_size)
        self.v_proj = CocaLinear(kv_size, hidden_size)
        self.out_proj = CocaLinear(hidden_size, hidden_size)

    def _split_heads(self, states: torch.Tensor) -> torch.Tensor:
        return states.view(*states.shape[:2], -1, self.head_dim).transpose(1, 2)  # [B, H, T, D/H]

    def _keys_and_values(self, states: torch.Tensor | None, cache: Cache | None) -> tuple[torch.Tensor, torch.Tensor]:
        if self.is_cross_attention and states is None:
            layer = cache.cross_attention_cache.layers[self.layer_idx]
            return layer.keys, layer.values
        keys, values = self._split_heads(self.k_proj(states)), self._split_heads(self.v_proj(states))
        if cache is None:
            return keys, values
        if self.is_cross_attention:
            cache.is_updated[self.layer_idx] = True
            return cache.cross_attention_cache.update(keys, values, self.layer_idx)
        return cache.self_attention_cache.update(keys, values, self.layer_idx)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        key_value_states: torch.Tensor | None = None,
        cache: EncoderDecoderCache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`hidden_states` (B, T, D) -> output of the same shape, and weights (B, H, T, keys) with eager attention.

        Cross-attention without `key_value_states` reads the keys and values that the cache holds."""
        batch_size, length = hidden_states.shape[:2]
        queries = self.q_proj(hidden_states)
        keys, values = self._keys_and_values(key_value_states if self.is_cross_attention else hidden_states, cache)
        if self.is_cross_attention and keys.shape[0] != batch_size:
            queries = queries.reshape(keys.shape[0], -1, queries.shape[-1])

        # A caller's `is_causal` speaks of its own layer, e.g. never of cross-attention
        kwargs.pop("is_causal", None)
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attention(
            self,
            self._split_heads(queries),
            keys,
            values,
            attention_mask,
            dropout=self.dropout if self.training else 0.0,
            scaling=self.scaling,
            is_causal=self.is_causal,
            **kwargs,
        )
        output = self.out_proj(output.reshape(batch_size, length, -1).contiguous())
        if weights is not None and weights.shape[0] != batch_size:
            weights = weights.unflatten(2, (-1, length)).transpose(1, 2).flatten(0, 1)
        return output, weights


class CocaMLP(nn.Module):
    def __init__(self, config: CocaTextConfig | CocaVisionConfig, intermediate_size: int):
        super().__init__()
        self.config = config
        self.activation_fn = ACT2FN[config.hidden_act]
        self.fc1 = CocaLinear(config.hidden_size, intermediate_size)
        self.fc2 = CocaLinear(intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.activation_fn(self.fc1(hidden_states)))


class CocaLayerScale(nn.Module):
    """A learned factor for each channel of a residual branch (arXiv 2103.17239)."""

    def __init__(self, config: CocaTextConfig | CocaVisionConfig):
        super().__init__()
        self.init_value = config.layer_scale_init_value
        self.gamma = nn.Parameter(torch.full((config.hidden_size,), self.init_value))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states * self.gamma


def _layer_scale(config: CocaTextConfig | CocaVisionConfig) -> nn.Module:
    return nn.Identity() if config.layer_scale_init_value is None else CocaLayerScale(config)


class CocaLayer(GradientCheckpointingLayer):
    """Pre-norm transformer layer of all three stacks: self-attention, then an MLP, which may be left out."""

    def __init__(
        self,
        config: CocaTextConfig | CocaVisionConfig,
        is_causal: bool = False,
        layer_idx: int | None = None,
        intermediate_size: int | None = None,
        has_mlp: bool = True,
    ):
        super().__init__()
        self.has_mlp = has_mlp
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = CocaAttention(
            config,
            config.hidden_size,
            config.num_attention_heads,
            is_causal=is_causal,
            layer_idx=layer_idx,
            dropout=config.attention_dropout,
        )
        self.layer_scale1 = _layer_scale(config)
        if has_mlp:
            self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
            self.mlp = CocaMLP(config, intermediate_size or config.intermediate_size)
            self.layer_scale2 = _layer_scale(config)
        self.dropout = nn.Dropout(getattr(config, "dropout", 0.0))

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        cache: EncoderDecoderCache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        attended, _ = self.self_attn(self.layer_norm1(hidden_states), attention_mask, cache=cache, **kwargs)
        hidden_states = hidden_states + self.dropout(self.layer_scale1(attended))
        if not self.has_mlp:
            return hidden_states
        return hidden_states + self.dropout(self.layer_scale2(self.mlp(self.layer_norm2(hidden_states))))


def _tensor_parallel(attention: tuple[str, ...], mlp: tuple[str, ...]) -> dict[str, str]:
    """Tensor-parallel plan: attention is split by heads, MLPs by channels, in the modules of these names."""
    by_heads = {"q_proj": "colwise", "k_proj": "colwise", "v_proj": "colwise", "out_proj": "rowwise"}
    by_channels = {"fc1": "colwise", "fc2": "rowwise"}
    plan = {f"{module}.{name}": style for module in attention for name, style in by_heads.items()}
    return {**plan, **{f"{module}.{name}": style for module in mlp for name, style in by_channels.items()}}


# ------------------------------------------------------------------------------------------------------------- images


class CocaVisionEmbeddings(nn.Module):
    """Patches and an optional class token, with learned positions that are interpolated for other image sizes."""

    def __init__(self, config: CocaVisionConfig):
        super().__init__()
        self.config = config
        self.num_prefix_tokens = int(config.use_class_token)
        if config.use_class_token:
            self.class_embedding = nn.Parameter(torch.empty(config.hidden_size))
        self.patch_embedding = nn.Conv2d(
            config.num_channels,
            config.hidden_size,
            kernel_size=config.patch_size,
            stride=config.patch_size,
            bias=config.patch_bias,
        )
        rows, columns = config.grid_size
        self.position_embedding = nn.Embedding(rows * columns + self.num_prefix_tokens, config.hidden_size)

    def interpolate_position_embedding(
        self, height: int, width: int, device: torch.device | None = None
    ) -> torch.Tensor:
        """Positions (N, D) for a grid of `height` x `width` patches, bicubic with antialiasing as open_clip resizes them."""
        # By the layer's own forward: an offloaded weight is elsewhere before it
        positions = self.position_embedding(torch.arange(self.position_embedding.num_embeddings, device=device))
        if (height, width) == self.config.grid_size:
            return positions
        prefix, patches = positions[: self.num_prefix_tokens], positions[self.num_prefix_tokens :]
        patches = patches.T.reshape(1, -1, *self.config.grid_size).float()
        patches = F.interpolate(patches, size=(height, width), mode="bicubic", antialias=True, align_corners=False)
        return torch.cat([prefix, patches.flatten(2)[0].T.to(prefix.dtype)])

    def _drop_patches(self, embeddings: torch.Tensor) -> torch.Tensor:
        prefix, patches = embeddings[:, : self.num_prefix_tokens], embeddings[:, self.num_prefix_tokens :]
        keep = max(1, round(patches.shape[1] * (1 - self.config.patch_dropout)))
        kept = torch.rand(patches.shape[:2], device=patches.device).topk(keep, dim=1).indices.sort(dim=1).values
        return torch.cat([prefix, patches.gather(1, kept[..., None].expand(-1, -1, patches.shape[-1]))], dim=1)

    def forward(self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = False) -> torch.Tensor:
        config = self.config
        if pixel_values.ndim != 4 or pixel_values.shape[1] != config.num_channels or pixel_values.shape[0] == 0:
            raise ValueError(
                f"`pixel_values` must have shape (batch, {config.num_channels}, height, width), got "
                f"{tuple(pixel_values.shape)}."
            )
        grid = (pixel_values.shape[2] // config.patch_size, pixel_values.shape[3] // config.patch_size)
        if 0 in grid:
            raise ValueError(
                f"`pixel_values` are {pixel_values.shape[2]}x{pixel_values.shape[3]} pixels, less than one patch of "
                f"`patch_size` = {config.patch_size}."
            )
        size = config.image_size
        size = (size, size) if isinstance(size, int) else tuple(size)
        if tuple(pixel_values.shape[2:]) != size and not interpolate_pos_encoding:
            raise ValueError(
                f"`pixel_values` are {pixel_values.shape[2]}x{pixel_values.shape[3]} pixels, the model expects "
                f"`image_size` = {config.image_size}: resize the images, or pass `interpolate_pos_encoding=True`."
            )
        patches = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype))
        embeddings = patches.flatten(2).transpose(1, 2)  # [B, N, D]
        if config.use_class_token:
            class_token = self.class_embedding.expand(embeddings.shape[0], 1, -1)
            embeddings = torch.cat([class_token, embeddings], dim=1)
        embeddings = embeddings + self.interpolate_position_embedding(*grid, embeddings.device)
        if self.training and config.patch_dropout > 0:
            embeddings = self._drop_patches(embeddings)
        return embeddings


class CocaAttentionalPooler(nn.Module):
    """
    One multi-head attention layer with learned queries over a set of tokens: the paper's "natural task adapter".

    Args:
        config (`CocaConfig`): the whole model's config.
        num_queries (`int`): tokens that come out.
        kv_size (`int`): width of the tokens that go in.
        output_norm (`bool`): LayerNorm on the output.
        hidden_size (`int`, *optional*): width of what comes out, by default `config.pooler_hidden_size`.
    """

    def __init__(
        self, config: CocaConfig, num_queries: int, kv_size: int, output_norm: bool, hidden_size: int | None = None
    ):
        super().__init__()
        width, eps = hidden_size or config.pooler_hidden_size, config.text_config.layer_norm_eps
        self.query = nn.Parameter(torch.empty(num_queries, width))
        self.layer_norm_q = nn.LayerNorm(width, eps=eps)
        self.layer_norm_k = nn.LayerNorm(kv_size, eps=eps)
        self.attn = CocaAttention(config, width, config.num_pooler_attention_heads, kv_size=kv_size)
        self.layer_norm_out = nn.LayerNorm(width, eps=eps) if output_norm else nn.Identity()

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, N, `kv_size`) -> (B, queries, `hidden_size`) and the weights (B, H, queries, N) with eager attention."""
        queries = self.layer_norm_q(self.query).expand(hidden_states.shape[0], -1, -1)
        pooled, weights = self.attn(queries, key_value_states=self.layer_norm_k(hidden_states))
        return self.layer_norm_out(pooled), weights


class CocaImagePooler(nn.Module):
    """The encoder's tokens -> the vector that becomes the image embedding, and the image tokens for the decoder.

    See `CocaConfig.pooler_type` for the four layouts and where each is found.
    """

    def __init__(self, config: CocaConfig, encoder_size: int):
        super().__init__()
        self.pooler_type = config.pooler_type
        self.pooling = config.image_pooling
        vision = config.vision_config
        # The class token is no image token. Other encoders' tokens are taken as they come.
        self.num_prefix_tokens = int(vision.model_type == "coca_vision_model" and vision.use_class_token)
        has_poolers = config.pooler_type != "none"
        self.embedding_size = self.token_size = config.pooler_hidden_size if has_poolers else encoder_size

        if config.pooler_type in ("cascade", "parallel"):
            self.embedding_size = config.contrastive_pooler_hidden_size

        self.norm_position = config.image_layer_norm
        if not has_poolers and self.norm_position == "pooler":
            self.norm_position = "encoder"
        if self.norm_position != "pooler":
            size = encoder_size if self.norm_position == "encoder" else self.embedding_size
            self.layer_norm = nn.LayerNorm(size, eps=config.text_config.layer_norm_eps)

        output_norm = self.norm_position == "pooler"
        if has_poolers:
            num_queries = config.num_query_tokens + int(config.pooler_type == "shared")
            self.caption_pooler = CocaAttentionalPooler(config, num_queries, encoder_size, output_norm)
        if config.pooler_type in ("cascade", "parallel"):
            kv_size = self.token_size if config.pooler_type == "cascade" else encoder_size
            self.contrastive_pooler = CocaAttentionalPooler(config, 1, kv_size, output_norm, self.embedding_size)

    def forward(
        self, hidden_states: torch.Tensor, need_embedding: bool = True, need_tokens: bool = True
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """(B, N, encoder) -> ((B, D) or `None`, (B, Q, D) or `None`); what is not needed is not computed where possible."""
        if self.norm_position == "encoder":
            hidden_states = self.layer_norm(hidden_states)
        pooled = tokens = None
        if self.pooler_type == "parallel":
            tokens = self.caption_pooler(hidden_states)[0] if need_tokens else None
            pooled = self.contrastive_pooler(hidden_states)[0][:, 0] if need_embedding else None
        elif self.pooler_type == "cascade":
            tokens, _ = self.caption_pooler(hidden_states)
            pooled = self.contrastive_pooler(tokens)[0][:, 0] if need_embedding else None
        else:
            shared = self.pooler_type == "shared"
            all_tokens = self.caption_pooler(hidden_states)[0] if shared else hidden_states
            tokens = all_tokens[:, 1 if shared else self.num_prefix_tokens :]
            pooled = all_tokens[:, 0] if self.pooling == "first" else tokens.mean(dim=1)
        if need_embedding and self.norm_position == "embedding":
            pooled = self.layer_norm(pooled)
        return pooled if need_embedding else None, tokens if need_tokens else None


# -------------------------------------------------------------------------------------------------- pretrained models


def _check_files(folder: str | os.PathLike | None, only_indices: bool = False) -> None:
    """Raises a `ValueError` that names the weight file of `folder` that is damaged, or an index that leads elsewhere."""
    if folder is None or not os.path.isdir(folder):
        return
    try:
        from modeling_coca.conversion.sources import check_files
    except ImportError:  # this file came from the Hub
        return
    check_files(folder, only_indices)


def _check_loaded(model: nn.Module, info: Mapping | None, source: str | os.PathLike | None) -> None:
    """Refuses what transformers takes: a file of other tensors, which leaves a random model, and weights that are no numbers."""
    if source is None:
        return
    info = info or {"missing_keys": ()}  # who asks for the names looks at them
    names = {name for name, parameter in model.named_parameters()}
    if names and names <= set(info["missing_keys"]):
        raise ValueError(
            f"{source} has none of the {len(names)} tensors of {type(model).__name__}, but others: "
            f"{sorted(info['unexpected_keys'])[:3]}. Save the model's own state dict, without wrapper or prefix; a tower "
            "of a whole model is a part of it, such as `CocaModel.from_pretrained(...).text_model`."
        )
    broken = [
        name
        for name, parameter in model.named_parameters()
        if type(parameter) is nn.Parameter  # quantized and distributed ones are their makers' to check
        and parameter.device.type != "meta"
        and parameter.dtype in (torch.float32, torch.float16, torch.bfloat16)
        and not torch.isfinite(parameter.detach().sum(dtype=torch.float32))
    ]
    if broken:
        raise ValueError(
            f"{source} holds weights that are infinite or no numbers, in {len(broken)} tensors: {', '.join(broken[:3])}. Its "
            "training has diverged, or the file is damaged: take an earlier checkpoint."
        )


class CocaPreTrainedModel(PreTrainedModel):
    """Weight initialisation, loading and saving common to all CoCa models."""

    config: CocaConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    # The contrastive loss is no mean over tokens, so `Trainer` must not rescale the loss by their number
    accepts_loss_kwargs = False
    # Each part names its own: FSDP refuses a name that the model has not
    _no_split_modules = []
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        """
        As in transformers. With the package `modeling_coca` installed, checkpoints in the layout of open_clip, CONCH or
        torchmultimodal (`"laion/CoCa-ViT-L-14-laion2B-s13B-b90k"`, a folder, a weight file) open as well: they are converted
        in memory, each time. `save_pretrained` then writes this package's layout, as always.
        """
        _check_files(pretrained_model_name_or_path, only_indices=True)
        wants_info = kwargs.pop("output_loading_info", False)
        try:
            model, info = super().from_pretrained(
                pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
            )
            _check_loaded(model, None if wants_info else info, pretrained_model_name_or_path)
            return (model, info) if wants_info else model
        except OSError as error:  # no config or no weights under transformers' names
            if cls.config_class.model_type != "coca" or pretrained_model_name_or_path is None:
                raise
            try:
                from modeling_coca.conversion import open_foreign
            except ImportError:  # this file came from the Hub
                raise error from None
            found = open_foreign(pretrained_model_name_or_path, error, kwargs)
        except Exception:
            _check_files(pretrained_model_name_or_path)
            raise
        kwargs |= {"config": found.config, "state_dict": found.state_dict()}
        model, info = super().from_pretrained(None, *model_args, output_loading_info=True, **kwargs)
        _check_loaded(model, None, pretrained_model_name_or_path)
        model.name_or_path = str(pretrained_model_name_or_path)
        if model.can_generate():
            model.generation_config = found.generation_config()
        return (model, info) if wants_info else model

    def train(self, mode: bool = True):
        """Sets training mode, except in parts frozen by `modeling_coca.training.freeze`, whose dropout and running
        statistics stay as in evaluation."""
        super().train(mode)
        for module in self.modules():
            if getattr(module, "is_frozen", False) and module.training:
                module.eval()
        return self

    def _loss_group(self) -> "dist.ProcessGroup | None":
        """Processes that train on batches of their own, whose losses are joined. `None`: this one alone, or evaluation."""
        return data_group(self) if self.training else None

    def pack_linear_layers(self) -> None:
        """
        Make float32 inference on a CPU quicker (captions by 1.3 to 1.8 times), for as much memory as the weights of the
        linear layers take: each gets a copy of its weights in the order in which oneDNN reads them. Results stay equal.

        Example:

        ```python
        >>> from modeling_coca import CocaConfig, CocaForConditionalGeneration

        >>> model = CocaForConditionalGeneration(CocaConfig()).eval()
        >>> model.pack_linear_layers()
        ```
        """
        for module in self.modules():
            if isinstance(module, CocaLinear):
                module.pack()

    def post_init(self):
        if getattr(self.config, "quantization_config", None) is not None:
            for module in self.modules():
                if type(module) is CocaLinear:
                    module.__class__ = nn.Linear  # bitsandbytes replaces layers of exactly this class
        super().post_init()

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False):
        # For code outside transformers it would skip modules without parameters of their own, such as `CocaAttention`.
        # `_init_weights` here writes through `initialization`, which leaves loaded weights alone, so that is not needed.
        super()._initialize_weights(module, is_custom_code=False)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        """As open_clip starts its towers: the branches that write to the residual stream shrink with depth."""
        super()._init_weights(module)
        if isinstance(module, CocaVisionEmbeddings):
            std = module.config.hidden_size**-0.5
            if module.num_prefix_tokens:
                init.normal_(module.class_embedding, std=std)
            init.normal_(module.position_embedding.weight, std=std)
            init.normal_(module.patch_embedding.weight, std=module.config.initializer_range)
            if module.patch_embedding.bias is not None:
                init.zeros_(module.patch_embedding.bias)
        elif isinstance(module, CocaTextModel):
            init.normal_(module.embed_tokens.weight, std=module.config.initializer_range)
            init.normal_(module.embed_positions.weight, std=module.config.initializer_range / 2)
            if module.config.use_cls_token:
                init.normal_(module.class_embedding, std=module.config.initializer_range / 2)
        elif isinstance(module, CocaAttentionalPooler):
            init.normal_(module.query, std=1.0)
        elif isinstance(module, CocaAttention):
            depth = getattr(module.config, "num_hidden_layers", 1)
            for projection in (module.q_proj, module.k_proj, module.v_proj):
                init.normal_(projection.weight, std=projection.in_features**-0.5)
            init.normal_(module.out_proj.weight, std=module.out_proj.in_features**-0.5 * (2 * depth) ** -0.5)
        elif isinstance(module, CocaMLP):
            width, depth = module.config.hidden_size, module.config.num_hidden_layers
            init.normal_(module.fc1.weight, std=(2 * width) ** -0.5)
            init.normal_(module.fc2.weight, std=width**-0.5 * (2 * depth) ** -0.5)
        elif isinstance(module, CocaLayerScale):
            init.constant_(module.gamma, module.init_value)
        elif isinstance(module, CocaModel):
            init.normal_(module.visual_projection.weight, std=module.visual_projection.in_features**-0.5)
            init.normal_(module.text_projection.weight, std=module.text_projection.in_features**-0.5)
            init.constant_(module.logit_scale, module.config.logit_scale_init_value)
            if module.logit_bias is not None:
                init.constant_(module.logit_bias, module.config.logit_bias_init_value)
        elif isinstance(module, CocaForConditionalGeneration):
            init.normal_(module.lm_head.weight, std=module.lm_head.in_features**-0.5)


class CocaVisionModel(CocaPreTrainedModel):
    """
    CoCa's own image encoder: a ViT whose tokens all go on to the poolers.

    Example:

    ```python
    >>> import torch
    >>> from modeling_coca import CocaVisionConfig, CocaVisionModel

    >>> config = CocaVisionConfig(
    ...     hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, image_size=36
    ... )
    >>> CocaVisionModel(config)(torch.randn(1, 3, 36, 36)).last_hidden_state.shape
    torch.Size([1, 5, 64])
    ```
    """

    config: CocaVisionConfig
    _no_split_modules = ["CocaVisionEmbeddings", "CocaLayer"]
    _tp_plan = _tensor_parallel(("layers.*.self_attn",), ("layers.*.mlp",))
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _can_record_outputs = {"hidden_states": CocaLayer, "attentions": CocaAttention}
    _input_embed_layer = "patch_embedding"

    def __init__(self, config: CocaVisionConfig):
        super().__init__(config)
        self.embeddings = CocaVisionEmbeddings(config)
        self.pre_layernorm = (
            nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if config.use_pre_layernorm else nn.Identity()
        )
        self.layers = nn.ModuleList([CocaLayer(config) for _ in range(config.num_hidden_layers)])
        self.post_layernorm = (
            nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if config.use_post_layernorm else nn.Identity()
        )
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.patch_embedding

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.FloatTensor | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """
        Args:
            pixel_values (`torch.FloatTensor` of shape `(B, channels, height, width)`): normalised images.
            interpolate_pos_encoding (`bool`): take images of another size than `image_size`.

        Returns:
            `BaseModelOutputWithPooling`: `last_hidden_state` (B, N, D), class token first if there is one, and
            `pooler_output` (B, D): the class token, else the mean of the patches.
        """
        if pixel_values is None:
            raise ValueError("`pixel_values` are missing.")
        check_one_image_input(pixel_values=pixel_values)
        hidden_states = self.pre_layernorm(self.embeddings(pixel_values, interpolate_pos_encoding))
        for layer in self.layers:
            hidden_states = layer(hidden_states, **kwargs)
        hidden_states = self.post_layernorm(hidden_states)
        pooled = hidden_states[:, 0] if self.config.use_class_token else hidden_states.mean(dim=1)
        return BaseModelOutputWithPooling(last_hidden_state=hidden_states, pooler_output=pooled)


class CocaTextModel(CocaPreTrainedModel):
    """
    The unimodal text stack: causal, with [CLS] appended after the last token.

    [CLS] comes last, so it changes no other position and generation leaves it out.

    Example:

    ```python
    >>> import torch
    >>> from modeling_coca import CocaTextConfig, CocaTextModel

    >>> config = CocaTextConfig(
    ...     vocab_size=99, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_multimodal_layers=2,
    ...     num_attention_heads=4, bos_token_id=97, eos_token_id=98,
    ... )
    >>> outputs = CocaTextModel(config)(input_ids=torch.tensor([[97, 5, 6, 98]]))
    >>> outputs.last_hidden_state.shape, outputs.pooler_output.shape
    (torch.Size([1, 4, 64]), torch.Size([1, 64]))
    ```
    """

    config: CocaTextConfig
    _no_split_modules = ["CocaLayer"]
    _tp_plan = _tensor_parallel(("layers.*.self_attn",), ("layers.*.mlp",))
    _fsdp_plan = {"embed_tokens": "free_full_weight"}
    input_modalities = ("text",)
    _input_embed_layer = "embed_tokens"
    _can_record_outputs = {
        "hidden_states": OutputRecorder(CocaLayer, num_hidden_layers_key="num_unimodal_layers"),
        "attentions": CocaAttention,
    }

    def __init__(self, config: CocaTextConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        if config.use_cls_token:
            self.class_embedding = nn.Parameter(torch.empty(config.hidden_size))
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(
            [CocaLayer(config, is_causal=True, layer_idx=i) for i in range(config.num_unimodal_layers)]
        )
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    def _append_cls(
        self, embeds: torch.Tensor, position_ids: torch.Tensor, real: torch.Tensor, input_ids: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Adds [CLS] to the embeddings (B, T, D), positions and mask (B, T).

        With `shifted_cls_mask` there stands one padding token before it, which is what open_clip's off-by-one mask lets
        [CLS] see of the padding up to the context length. So texts need no padding of that length to give its numbers.
        """
        config, batch_size = self.config, embeds.shape[0]
        lengths = real.sum(dim=-1, keepdim=True)  # [B, 1]
        extra_embeds, extra_positions = [], []
        if config.shifted_cls_mask:
            has_padding = lengths < config.max_text_length
            tokens = real if input_ids is None else hide_after_pad_id(input_ids, real, config.pad_token_id)
            visible = torch.cat([tokens, has_padding, ~has_padding], dim=-1)
            pad_token = torch.full_like(lengths, config.pad_token_id)
            extra_embeds.append(self.embed_tokens(pad_token))
            extra_positions.append(lengths.clamp(max=config.max_text_length))
        else:
            visible = F.pad(real, (0, 1), value=True)
        extra_embeds.append(self.class_embedding.to(embeds.dtype).expand(batch_size, 1, -1))
        extra_positions.append(
            torch.full_like(lengths, config.max_position_embeddings - 1) if config.cls_position == "last" else lengths
        )
        return torch.cat([embeds, *extra_embeds], 1), torch.cat([position_ids, *extra_positions], 1), visible

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        output_embedding: bool | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CocaTextModelOutput:
        """
        Args:
            input_ids (`torch.LongTensor` of shape `(B, T)`): at most `config.max_text_length` tokens.
            attention_mask (`torch.Tensor` of shape `(B, T)`, *optional*):
                1 for tokens, 0 for padding, left or right. Without it a run of `pad_token_id` at either end is padding.
            position_ids (`torch.LongTensor` of shape `(B, T)`, *optional*): counted along the mask by default.
            cache (`Cache`, *optional*): tokens seen before, while generating.
            inputs_embeds (`torch.FloatTensor` of shape `(B, T, D)`, *optional*): instead of `input_ids`.
            output_embedding (`bool`, *optional*):
                Append [CLS] and fill `pooler_output`; by default where no cache is given.
            past_key_values (`Cache`, *optional*): what transformers before 5.24 calls `cache`.

        Returns:
            [`CocaTextModelOutput`]. `hidden_states` and `attentions` include the appended positions.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of `input_ids` and `inputs_embeds`.")
        config = self.config
        if inputs_embeds is None:
            check_texts(input_ids, "input_ids", 2)
            inputs_embeds = _look_up(
                self.embed_tokens, input_ids, "`input_ids` must be less than `text_config.vocab_size`"
            )
        else:
            check_texts(inputs_embeds, "inputs_embeds", 3)
        batch_size, length = inputs_embeds.shape[:2]
        if length > config.max_text_length:
            raise ValueError(
                f"`input_ids` have {length} tokens, the model takes at most {config.max_text_length} "
                "(`text_config.max_text_length`): shorten the text, or tokenize with `truncation=True`."
            )
        cache = as_coca_cache(cache, past_key_values)
        check_cache(cache, batch_size)
        check_mask(attention_mask, batch_size, length, cache)
        if output_embedding is None:
            output_embedding = cache is None
        add_cls = output_embedding and config.use_cls_token
        if add_cls and cache is not None and cache.get_seq_length() > 0:
            raise ValueError("The text embedding needs the whole text: call it without a `cache`.")

        if output_embedding and attention_mask is None:
            if input_ids is None:
                attention_mask = inputs_embeds.new_ones(inputs_embeds.shape[:2], dtype=torch.bool)
            else:
                attention_mask = real_tokens(input_ids, config.pad_token_id)
        if position_ids is None:
            if attention_mask is not None and attention_mask.ndim == 2:
                position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
            else:
                past_length = 0 if cache is None else cache.get_seq_length()
                position_ids = torch.arange(length, device=inputs_embeds.device)[None] + past_length
        position_ids = position_ids.expand(batch_size, -1)
        if add_cls:
            inputs_embeds, position_ids, attention_mask = self._append_cls(
                inputs_embeds, position_ids, attention_mask.bool(), input_ids
            )
        elif (
            config.shifted_cls_mask
            and input_ids is not None
            and (cache is None or cache.get_seq_length() == 0)
            and (attention_mask is None or attention_mask.shape == input_ids.shape)
        ):
            real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            attention_mask = hide_after_pad_id(input_ids, real.bool(), config.pad_token_id)
        positions = _look_up(
            self.embed_positions, position_ids, "the text, or `position_ids`, must end within `max_position_embeddings`"
        )
        hidden_states = self.dropout(inputs_embeds + positions)
        mask = create_causal_mask(config, hidden_states, attention_mask, cache)
        for layer in self.layers:
            hidden_states = layer(hidden_states, mask, cache=cache, **kwargs)

        pooled = None
        if add_cls:
            hidden_states, pooled = hidden_states[:, :length], self.final_layer_norm(hidden_states[:, -1])
        elif not config.use_cls_token:
            hidden_states = self.final_layer_norm(hidden_states)
            if output_embedding:
                pooled = hidden_states[torch.arange(batch_size), self._eos_position(input_ids, attention_mask)]
        return CocaTextModelOutput(last_hidden_state=hidden_states, pooler_output=pooled, **{CACHE_NAME: cache})

    def _eos_position(self, input_ids: torch.Tensor | None, attention_mask: torch.Tensor) -> torch.Tensor:
        """(B,): where the first EOS stands, else the last real token."""
        positions = torch.arange(attention_mask.shape[-1], device=attention_mask.device)
        last = (positions * attention_mask.long()).argmax(dim=-1)
        if input_ids is None:
            return last
        is_eos = is_one_of(input_ids, self.config.eos_token_id) & attention_mask.bool()
        return torch.where(is_eos.any(dim=-1), is_eos.long().argmax(dim=-1), last)


def _look_up(embedding: nn.Embedding, ids: torch.LongTensor, rule: str) -> torch.Tensor:
    """Rows of a table. On CPU an id that it has not is named; a GPU says only that it was one, so `generate` looks before."""
    try:
        return embedding(ids)
    except IndexError as error:
        low, high = (int(value) for value in ids.aminmax())
        raise ValueError(f"{rule} ({embedding.num_embeddings}), got ids from {low} to {high}.") from error


# --------------------------------------------------------------------------------------------------- the dual encoder


class CocaModel(CocaPreTrainedModel):
    """
    The contrastive half of CoCa: a dual encoder that aligns whole images and texts, and never runs the decoder.

    Either modality alone works, and N texts against one image do.

    Example:

    ```python
    >>> import torch
    >>> from modeling_coca import CocaConfig, CocaModel

    >>> small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
    >>> config = CocaConfig(
    ...     vision_config={**small, "image_size": 36},
    ...     text_config={**small, "num_multimodal_layers": 2, "vocab_size": 99, "bos_token_id": 97, "eos_token_id": 98},
    ...     num_query_tokens=4, projection_dim=32,
    ... )
    >>> model = CocaModel(config).eval()
    >>> input_ids = torch.tensor([[97, 5, 6, 98], [97, 7, 98, 0]])
    >>> model(input_ids=input_ids, pixel_values=torch.randn(1, 3, 36, 36)).logits_per_image.shape
    torch.Size([1, 2])
    ```
    """

    # A checkpoint of a class with a decoder opens here without it
    _keys_to_ignore_on_load_unexpected = [r"^text_decoder\.", r"^lm_head\.", r"^classifier\."]

    def __init__(self, config: CocaConfig):
        super().__init__(config)
        if config.pooler_type != "none":
            self._no_split_modules = ["CocaAttentionalPooler"]
        self.vision_model = _build_vision_model(config)
        self.image_pooler = CocaImagePooler(config, _vision_hidden_size(config))
        self.text_model = CocaTextModel._from_config(config.text_config)
        self.visual_projection = CocaLinear(self.image_pooler.embedding_size, config.projection_dim, bias=False)
        self.text_projection = CocaLinear(
            config.text_config.hidden_size, config.projection_dim, bias=config.text_projection_bias
        )
        # Shape (1,): FSDP2 refuses scalars
        self.logit_scale = nn.Parameter(torch.empty(1))
        self.logit_bias = nn.Parameter(torch.empty(1)) if config.logit_bias_init_value is not None else None
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.text_model.embed_tokens

    def set_input_embeddings(self, value: nn.Module):
        self.text_model.embed_tokens = value

    def encode_image(
        self,
        pixel_values: torch.Tensor | None,
        image_hidden_states: torch.Tensor | None = None,
        need_embedding: bool = True,
        need_tokens: bool = True,
        interpolate_pos_encoding: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, BaseModelOutput]:
        """
        One pass over the images, or videos.

        Args:
            pixel_values (`(B, channels, height, width)`): images, or instead of them
            image_hidden_states (`(B, N, D)`): the image encoder's last hidden states, computed beforehand.
                Both may have a dimension more, `(B, frames, ...)`: videos, as in VideoCoCa (arXiv 2212.04979). The embedding is
                then the mean of the frames' normalised ones, and the caption pooler sees the tokens of all frames.
            need_embedding, need_tokens (`bool`): what to compute.

        Returns:
            the embedding before normalisation (B, projection_dim), the image tokens for the decoder (B, Q, D), and the image
            encoder's output, with the tokens of all frames of a video.
        """
        check_one_image_input(pixel_values=pixel_values, image_hidden_states=image_hidden_states)
        images = pixel_values if image_hidden_states is None else image_hidden_states
        is_video = images is not None and images.ndim == (5 if image_hidden_states is None else 4)
        if is_video:
            clips, images = images.shape[:2], images.flatten(0, 1)
        if image_hidden_states is None:
            vision_outputs = run_vision_model(
                self.vision_model, images, interpolate_pos_encoding, self.config.vision_feature_layers, **kwargs
            )
        else:
            vision_outputs = _given_vision_outputs(self, images)
        states = vision_outputs.last_hidden_state
        if not is_video:
            pooled, tokens = self.image_pooler(states, need_embedding, need_tokens)
            return None if pooled is None else self.visual_projection(pooled), tokens, vision_outputs

        embedding = tokens = None
        vision_outputs.last_hidden_state = states.unflatten(0, clips).flatten(1, 2)
        if need_embedding:
            pooled, _ = self.image_pooler(states, need_tokens=False)
            embedding = F.normalize(self.visual_projection(pooled), dim=-1).unflatten(0, clips).mean(dim=1)
        if need_tokens and self.config.pooler_type == "none":  # each frame may have a class token
            tokens = self.image_pooler(states, need_embedding=False)[1].unflatten(0, clips).flatten(1, 2)
        elif need_tokens:
            _, tokens = self.image_pooler(vision_outputs.last_hidden_state, need_embedding=False)
        return embedding, tokens, vision_outputs

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.FloatTensor | None = None,
        image_hidden_states: torch.FloatTensor | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """
        Image embeddings. See [`~CocaModel.encode_image`] for the arguments.

        Returns:
            `BaseModelOutputWithPooling`: `pooler_output` (B, projection_dim) is the projected embedding, not normalised;
            `last_hidden_state` (B, N, D) are the image encoder's tokens.
        """
        kwargs["interpolate_pos_encoding"] = interpolate_pos_encoding
        pooled, _, outputs = self.encode_image(pixel_values, image_hidden_states, need_tokens=False, **kwargs)
        return BaseModelOutputWithPooling(
            last_hidden_state=outputs.last_hidden_state,
            pooler_output=pooled,
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
        )

    @can_return_tuple
    def get_text_features(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """
        Text embeddings. See [`CocaTextModel.forward`] for the arguments.

        Returns:
            `BaseModelOutputWithPooling`: `pooler_output` (B, projection_dim) is the projected embedding, not normalised;
            `last_hidden_state` (B, T, D) are the token states.
        """
        outputs = self.text_model(
            input_ids, attention_mask, position_ids, inputs_embeds=inputs_embeds, output_embedding=True, **kwargs
        )
        outputs.pooler_output = self.text_projection(outputs.pooler_output)
        return outputs

    def contrastive_loss(
        self, image_embeds: torch.Tensor, text_embeds: torch.Tensor, group: "dist.ProcessGroup | None" = None
    ) -> torch.Tensor:
        """Contrastive loss of L2-normalised embeddings; see [`~loss_coca.contrastive_loss`]."""
        kind = self.config.contrastive_loss
        return contrastive_loss(image_embeds, text_embeds, self.logit_scale, self.logit_bias, kind, group)

    def similarity(self, image_embeds: torch.Tensor, text_embeds: torch.Tensor) -> torch.Tensor:
        """Scaled similarities (images, texts) of L2-normalised embeddings."""
        logits = self.logit_scale.exp() * (image_embeds @ text_embeds.to(image_embeds.device).t())
        return logits if self.logit_bias is None else logits + self.logit_bias

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        image_hidden_states: torch.FloatTensor | None = None,
        return_loss: bool | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CocaOutput:
        """
        Args:
            input_ids (`(texts, T)`), attention_mask, position_ids, inputs_embeds: see [`CocaTextModel.forward`].
            pixel_values (`(images, channels, height, width)`) or image_hidden_states (`(images, N, D)`): see
                [`~CocaModel.encode_image`].
            return_loss (`bool`, *optional*):
                Compute the contrastive loss; image `i` then belongs to text `i`. In training by several processes the loss
                is that of all their pairs.

        Returns:
            [`CocaOutput`], of one modality alone [`CocaTowerOutput`].
        """
        has_text = input_ids is not None or inputs_embeds is not None
        has_image = pixel_values is not None or image_hidden_states is not None
        if not has_text and not has_image:
            raise ValueError(
                "Give `input_ids` (or `inputs_embeds`), `pixel_values` (or `image_hidden_states`), or both."
            )
        text_outputs = vision_outputs = text_embeds = image_embeds = image_features = None
        if has_image:
            image_features, _, vision_outputs = self.encode_image(
                pixel_values,
                image_hidden_states,
                need_tokens=False,
                interpolate_pos_encoding=interpolate_pos_encoding,
                **kwargs,
            )
            image_embeds = F.normalize(image_features, dim=-1)
        if has_text:
            text_outputs = self.get_text_features(
                input_ids, attention_mask, position_ids, inputs_embeds, return_dict=True, **kwargs
            )
            text_embeds = F.normalize(text_outputs.pooler_output, dim=-1)

        outputs = {
            "text_embeds": text_embeds,
            "image_embeds": image_embeds,
            "text_model_output": text_outputs,
            "vision_model_output": vision_outputs,
        }
        if has_text and has_image:
            logits_per_image = self.similarity(image_embeds, text_embeds)
            loss = self.contrastive_loss(image_embeds, text_embeds, self._loss_group()) if return_loss else None
            return CocaOutput(
                loss=loss, logits_per_image=logits_per_image, logits_per_text=logits_per_image.t(), **outputs
            )
        if return_loss:
            raise ValueError("`return_loss=True` needs both images and texts.")
        tower = text_outputs or vision_outputs
        return CocaTowerOutput(
            last_hidden_state=tower.last_hidden_state,
            pooler_output=text_outputs.pooler_output if has_text else image_features,
            hidden_states=tower.get("hidden_states"),
            attentions=tower.get("attentions"),
            **outputs,
        )


def _build_vision_model(config: CocaConfig) -> PreTrainedModel:
    # By name: as remote code this file may meet a config class of another copy of its module
    if config.vision_config.model_type == "coca_vision_model":
        return CocaVisionModel._from_config(config.vision_config)
    model = AutoModel.from_config(config.vision_config)
    if model.main_input_name != "pixel_values":
        raise ValueError(
            f"`vision_config` of type {config.vision_config.model_type!r} is of no image encoder: it takes "
            f"`{model.main_input_name}`, no `pixel_values`."
        )
    return model


def _vision_hidden_size(config: CocaConfig) -> int:
    """Width of the image encoder's tokens, with the earlier layers that are joined to them."""
    vision, layers = config.vision_config, config.vision_feature_layers or []
    if vision.model_type == "timm_wrapper":
        last, widths = _timm_widths(vision.architecture, tuple(sorted((vision.model_args or {}).items())))
    elif sizes := getattr(vision, "hidden_sizes", None):  # convolutional encoders: the stem's width, and each stage's
        last, widths = sizes[-1], [getattr(vision, "embedding_size", sizes[0]), *sizes]
    elif hasattr(vision, "hidden_size"):
        last, widths = vision.hidden_size, [vision.hidden_size] * (getattr(vision, "num_hidden_layers", 0) + 1)
    else:
        raise ValueError(
            f"`vision_config` of type {vision.model_type!r} names no `hidden_size`: use the timm model of that name "
            "(`timm_wrapper`)."
        )
    wrong = [layer for layer in layers if not -len(widths) <= layer < len(widths)]
    if wrong:
        raise ValueError(
            f"`vision_feature_layers` {wrong} do not exist: the image encoder has {len(widths)} hidden states."
        )
    return last + sum(widths[layer] for layer in layers)


def _given_vision_outputs(model: PreTrainedModel, image_hidden_states: torch.Tensor) -> BaseModelOutput:
    """The image encoder's tokens, computed beforehand, in the model's dtype."""
    expected = _vision_hidden_size(model.config)
    if image_hidden_states.ndim != 3 or image_hidden_states.shape[-1] != expected:
        raise ValueError(
            f"`image_hidden_states` must have shape (batch, tokens, {expected}), got {tuple(image_hidden_states.shape)}."
        )
    return BaseModelOutput(last_hidden_state=image_hidden_states.to(model.dtype))


def _timm_widths(architecture: str, model_args: tuple) -> tuple[int, list[int]]:
    """Channels of a timm model's last feature map and of its intermediate ones."""
    try:  # outside of `try`, transformers takes an import for one that every user of the code on the Hub needs
        import timm
    except ImportError as error:
        raise ImportError(f"The image encoder {architecture!r} is a model of timm: `pip install timm`.") from error

    with torch.device("meta"):
        model = timm.create_model(architecture, pretrained=False, num_classes=0, **dict(model_args))
    return model.num_features, [info["num_chs"] for info in model.feature_info]


def run_vision_model(
    vision_model: PreTrainedModel,
    pixel_values: torch.Tensor | None,
    interpolate_pos_encoding: bool = False,
    feature_layers: list[int] | None = None,
    **kwargs: Unpack[TransformersKwargs],
) -> BaseModelOutputWithPooling:
    """
    Any vision model's tokens, in the one form that the poolers take.

    Args:
        vision_model (`PreTrainedModel`): a vision model of transformers, or of timm through `timm_wrapper`.
        pixel_values (`(B, channels, height, width)`): images.
        interpolate_pos_encoding (`bool`): passed on if true.
        feature_layers (`list[int]`, *optional*): see `CocaConfig.vision_feature_layers`.

    Returns:
        `BaseModelOutputWithPooling`: `last_hidden_state` is (B, N, D), feature maps being read row by row; the rest is the
        model's own.
    """
    if pixel_values is None:
        raise ValueError("`pixel_values` are missing (or `image_hidden_states` instead of them).")
    model_type = vision_model.config.model_type
    wants_hidden_states = kwargs.pop("output_hidden_states", None)
    if wants_hidden_states is None:
        wants_hidden_states = vision_model.config.output_hidden_states
    if model_type != "coca_vision_model":
        kwargs = {"output_attentions": True} if kwargs.get("output_attentions") else {}
    if model_type == "timm_wrapper":
        kwargs = {"do_pooling": False}  # timm refuses `output_attentions`
    if interpolate_pos_encoding:
        kwargs["interpolate_pos_encoding"] = True
    if wants_hidden_states or feature_layers:
        kwargs["output_hidden_states"] = True if feature_layers else wants_hidden_states
    outputs = vision_model(pixel_values=pixel_values, return_dict=True, **kwargs)

    states, earlier = outputs.last_hidden_state, [outputs.hidden_states[i] for i in feature_layers or []]
    if states.ndim == 4:
        timm_model = getattr(vision_model, "timm_model", None)
        if getattr(timm_model, "output_fmt", "NCHW") == "NHWC":  # Swin, for one
            states = states.permute(0, 3, 1, 2)
        earlier = [F.adaptive_avg_pool2d(state, states.shape[-2:]) for state in earlier]
        states = torch.cat([*earlier, states], dim=1).flatten(2).transpose(1, 2)
    elif earlier:
        if any(state.shape[:2] != states.shape[:2] for state in earlier):
            shapes = [tuple(state.shape) for state in (*earlier, states)]
            raise ValueError(
                f"`vision_feature_layers` {feature_layers} have other numbers of tokens than the last: {shapes}."
            )
        states = torch.cat([*earlier, states], dim=-1)
    return BaseModelOutputWithPooling(
        last_hidden_state=states,
        pooler_output=outputs.get("pooler_output"),
        hidden_states=outputs.hidden_states if wants_hidden_states else None,
        attentions=outputs.get("attentions"),
    )


# ------------------------------------------------------------------------------------------------------- the captioner


class CocaCrossBlock(nn.Module):
    """The second half of a multimodal layer: attention to the image tokens, then an MLP of its own."""

    def __init__(self, config: CocaTextConfig, kv_size: int, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        norm_image_tokens = config.multimodal_layer_type == "two_mlps"
        self.layer_norm_kv = nn.LayerNorm(kv_size, eps=config.layer_norm_eps) if norm_image_tokens else nn.Identity()
        self.cross_attn = CocaAttention(
            config,
            config.hidden_size,
            config.num_attention_heads,
            kv_size=kv_size,
            layer_idx=layer_idx,
            dropout=config.attention_dropout,
        )
        self.layer_scale1 = _layer_scale(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = CocaMLP(config, config.multimodal_intermediate_size)
        self.layer_scale2 = _layer_scale(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None,
        cache: EncoderDecoderCache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        is_cached = cache is not None and cache.is_updated.get(self.layer_idx, False)
        attended, _ = self.cross_attn(
            self.layer_norm1(hidden_states),
            key_value_states=None if is_cached else self.layer_norm_kv(encoder_hidden_states),
            cache=cache,
            **kwargs,
        )
        hidden_states = hidden_states + self.dropout(self.layer_scale1(attended))
        return hidden_states + self.dropout(self.layer_scale2(self.mlp(self.layer_norm2(hidden_states))))


class CocaDecoderLayer(GradientCheckpointingLayer):
    """Multimodal layer. `cache_idx` and `layer_idx` are its places in the self- and in the cross-attention cache."""

    def __init__(self, config: CocaTextConfig, kv_size: int, cache_idx: int, layer_idx: int):
        super().__init__()
        self.self_block = CocaLayer(
            config,
            is_causal=True,
            layer_idx=cache_idx,
            intermediate_size=config.multimodal_intermediate_size,
            has_mlp=config.multimodal_layer_type == "two_mlps",
        )
        self.cross_block = CocaCrossBlock(config, kv_size, layer_idx)

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None,
        attention_mask: torch.Tensor | None = None,
        cache: EncoderDecoderCache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        hidden_states = self.self_block(hidden_states, attention_mask, cache=cache, **kwargs)
        return self.cross_block(hidden_states, encoder_hidden_states, cache=cache, **kwargs)


class CocaTextDecoder(CocaPreTrainedModel):
    """The multimodal stack on top of the unimodal one. It has no embeddings of its own."""

    config: CocaTextConfig
    _no_split_modules = ["CocaDecoderLayer"]
    _tp_plan = _tensor_parallel(
        ("layers.*.self_block.self_attn", "layers.*.cross_block.cross_attn"),
        ("layers.*.self_block.mlp", "layers.*.cross_block.mlp"),
    )
    input_modalities = ("text",)
    main_input_name = "inputs_embeds"
    _can_record_outputs = {
        "hidden_states": OutputRecorder(CocaDecoderLayer, num_hidden_layers_key="num_multimodal_layers"),
        "attentions": OutputRecorder(CocaAttention, index=1, layer_name="self_attn"),
        "cross_attentions": OutputRecorder(CocaAttention, index=1, layer_name="cross_attn"),
    }

    def __init__(self, config: CocaTextConfig, kv_size: int):
        super().__init__(config)
        self.kv_size = kv_size
        self.layers = nn.ModuleList(
            [
                CocaDecoderLayer(config, kv_size, cache_idx=config.num_unimodal_layers + i, layer_idx=i)
                for i in range(config.num_multimodal_layers)
            ]
        )
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        inputs_embeds: torch.FloatTensor,
        encoder_hidden_states: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        cache: EncoderDecoderCache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """
        Args:
            inputs_embeds (`(B, T, D)`): token states of the unimodal stack.
            encoder_hidden_states (`(B, Q, D)`, or `(images, Q, D)` with `B / images` texts for each image standing next
                to each other): image tokens. Not needed once `cache` holds their keys and values.
            attention_mask (`(B, past + T)`): 1 for tokens, 0 for padding.
            cache: see [`CocaCache`].
        """
        if encoder_hidden_states is not None:  # as `pixel_values`, they may come in another precision
            encoder_hidden_states = encoder_hidden_states.to(inputs_embeds.dtype)
        # The unimodal layers have written to the cache already, hence the mask is sized by the first multimodal one
        mask = create_causal_mask(
            self.config, inputs_embeds, attention_mask, cache, layer_idx=self.config.num_unimodal_layers
        )
        hidden_states = inputs_embeds
        for layer in self.layers:
            hidden_states = layer(hidden_states, encoder_hidden_states, mask, cache=cache, **kwargs)
        return BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=self.final_layer_norm(hidden_states), **{CACHE_NAME: cache}
        )


class CocaDecoderModel(CocaPreTrainedModel):
    """A [`CocaModel`] with the multimodal decoder on top: what captioner and answerer have in common."""

    def __init__(self, config: CocaConfig):
        super().__init__(config)
        self.model = CocaModel(config)
        self.text_decoder = CocaTextDecoder._from_config(config.text_config, kv_size=self.model.image_pooler.token_size)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.model.set_input_embeddings(value)

    def _split_hidden_states_selection(self, selected: bool | int | list[int] | None) -> tuple[Any, Any]:
        """`output_hidden_states` may name indices of the joined tuple: those of the unimodal and the multimodal stack."""
        if selected is None:
            selected = self.config.output_hidden_states
        if selected is None or isinstance(selected, bool):
            return selected, selected
        unimodal, total = self.config.text_config.num_unimodal_layers, self.config.text_config.num_hidden_layers + 1
        indices = {i % total for i in ([selected] if isinstance(selected, int) else selected) if -total <= i < total}
        # The unimodal stack's last state is the multimodal one's first. An index that exists in no stack selects nothing.
        return (
            [i for i in indices if i < unimodal] or [total],
            [i - unimodal for i in indices if i >= unimodal] or [total],
        )

    @staticmethod
    def _join_captured(
        text_outputs: CocaTextModelOutput, decoder_outputs: ModelOutput | None, texts: torch.Tensor
    ) -> dict[str, tuple[torch.Tensor | None, ...] | None]:
        """Hidden states and attentions of both stacks as one model's, without what was appended for the text embedding."""
        length = texts.shape[1]
        hidden_states, attentions = text_outputs.hidden_states, text_outputs.attentions
        if text_outputs.pooler_output is not None:  # else they stay the tensors of the graph, for `retain_grad`
            if hidden_states is not None:
                hidden_states = tuple(None if h is None else h[:, :length] for h in hidden_states)
            if attentions is not None:
                attentions = tuple(a[:, :, :length, :length] for a in attentions)
        if decoder_outputs is None:
            return {"hidden_states": hidden_states, "attentions": attentions}
        if hidden_states is not None:
            hidden_states = hidden_states[:-1] + decoder_outputs.hidden_states
        if attentions is not None:
            attentions = attentions + decoder_outputs.attentions
        return {
            "hidden_states": hidden_states,
            "attentions": attentions,
            "cross_attentions": decoder_outputs.cross_attentions,
        }


class CocaForConditionalGeneration(CocaDecoderModel, CocaGenerationMixin):
    """
    The whole CoCa: a [`CocaModel`] with the multimodal decoder on top, trained with both losses in one forward pass.

    Captions and answers come from the stock `generate()`. Images are encoded once an image, whatever the beams, and so
    are the decoder's keys and values of it.

    Example:

    ```python
    >>> import torch
    >>> from modeling_coca import CocaConfig, CocaForConditionalGeneration

    >>> small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
    >>> config = CocaConfig(
    ...     vision_config={**small, "image_size": 36},
    ...     text_config={**small, "num_multimodal_layers": 2, "vocab_size": 99, "bos_token_id": 97, "eos_token_id": 98},
    ...     num_query_tokens=4, projection_dim=32,
    ... )
    >>> model = CocaForConditionalGeneration(config).eval()
    >>> pixel_values = torch.randn(2, 3, 36, 36)
    >>> model.generate(pixel_values, max_new_tokens=5, do_sample=False).shape[0]
    2

    >>> # embedding and caption from one pass over the image
    >>> features = model.get_image_features(pixel_values)
    >>> captions = model.generate(encoder_hidden_states=features.pooler_output, max_new_tokens=5)
    >>> features.image_embeds.shape
    torch.Size([2, 32])

    >>> # training: both losses from one forward pass
    >>> input_ids = torch.tensor([[97, 5, 6, 98], [97, 7, 98, 0]])
    >>> outputs = model(input_ids=input_ids, pixel_values=pixel_values, labels=input_ids.masked_fill(input_ids == 0, -100))
    >>> bool(outputs.loss == outputs.contrastive_loss + 2 * outputs.caption_loss)
    True
    ```
    """

    _fsdp_plan = {"lm_head": "keep_full_weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _tied_weights_keys = {"lm_head.weight": "model.text_model.embed_tokens.weight"}

    def __init__(self, config: CocaConfig):
        super().__init__(config)
        self.lm_head = CocaLinear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.FloatTensor | None = None,
        image_hidden_states: torch.FloatTensor | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CocaImageFeatures:
        """
        Image tokens for the decoder and the image embedding, from one pass. See [`CocaModel.encode_image`].

        Returns:
            [`CocaImageFeatures`]: `pooler_output` (B, Q, D) for `generate(encoder_hidden_states=...)`, and the normalised
            `image_embeds` (B, projection_dim).
        """
        embedding, tokens, outputs = self.model.encode_image(
            pixel_values, image_hidden_states, interpolate_pos_encoding=interpolate_pos_encoding, **kwargs
        )
        return CocaImageFeatures(
            last_hidden_state=outputs.last_hidden_state,
            pooler_output=tokens,
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
            image_embeds=F.normalize(embedding, dim=-1),
        )

    def get_text_features(self, *args, **kwargs) -> BaseModelOutputWithPooling:
        """Text embeddings, see [`CocaModel.get_text_features`]."""
        return self.model.get_text_features(*args, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        image_hidden_states: torch.FloatTensor | None = None,
        encoder_hidden_states: torch.FloatTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        contrastive_mask: torch.BoolTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        past_key_values: Cache | None = None,
        contrastive_chunk_size: int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CocaConditionalOutput:
        """
        Args:
            input_ids (`(B, T)`), attention_mask, position_ids, inputs_embeds: see [`CocaTextModel.forward`].
            pixel_values (`(B, channels, height, width)`), or instead of them
            image_hidden_states (`(B, N, D)`): the image encoder's last hidden states, computed beforehand (frozen encoder), or
            encoder_hidden_states (`(B, Q, D)`): image tokens, see [`~CocaForConditionalGeneration.get_image_features`].
                Without labels, each image may have several texts, which stand next to each other.
            cache (`Cache`, *optional*): what `generate` has computed before.
            labels (`(B, T)`, *optional*):
                Token ids, -100 where there is no captioning loss (padding, a question). Shifted inside. With labels, each loss
                that has a weight is computed; in training by several processes as the loss of their joined batch.
            contrastive_mask (`(B,)` of bool, *optional*):
                Which rows are pairs for the contrastive loss, by default all. Questions with answers, which describe no whole
                image, can so be mixed with captions.
            logits_to_keep (`int` or `torch.Tensor`, *optional*):
                Logits of the last positions only, 0 for all, or of the positions given. By default all without labels,
                and none with labels, as the loss does without them.
            past_key_values (`Cache`, *optional*): what transformers before 5.24 calls `cache`.
            contrastive_chunk_size (`int`, *optional*):
                With labels: run the network on so many rows at a time, in the memory that these take, with the losses
                and gradients of the whole batch (GradCache, arXiv 2101.06983). The forward pass runs twice for it, and
                the output has the losses and embeddings alone.

        Returns:
            [`CocaConditionalOutput`]
        """
        config = self.config
        check_one_image_input(
            pixel_values=pixel_values,
            image_hidden_states=image_hidden_states,
            encoder_hidden_states=encoder_hidden_states,
        )
        if input_ids is None and inputs_embeds is None:
            raise ValueError("Give `input_ids` or `inputs_embeds` (a BOS token alone starts a caption).")
        texts = input_ids if inputs_embeds is None else inputs_embeds
        check_texts(texts, "input_ids" if inputs_embeds is None else "inputs_embeds", 2 if inputs_embeds is None else 3)
        if labels is not None and (labels.shape != texts.shape[:2] or labels.is_floating_point()):
            raise ValueError(
                f"`labels` must be token ids (integers) of shape {tuple(texts.shape[:2])}, got {labels.dtype} of shape "
                f"{tuple(labels.shape)}."
            )
        if contrastive_mask is not None and contrastive_mask.shape != texts.shape[:1]:
            raise ValueError(
                f"`contrastive_mask` must have shape ({texts.shape[0]},), got {tuple(contrastive_mask.shape)}."
            )
        has_image = pixel_values is not None or image_hidden_states is not None
        contrast = labels is not None and config.contrastive_loss_weight > 0
        caption = labels is None or config.caption_loss_weight > 0
        if contrast and not has_image:
            raise ValueError(
                "The contrastive loss needs `pixel_values` or `image_hidden_states`: give them, or set "
                "`config.contrastive_loss_weight = 0`."
            )
        if labels is not None:
            if attention_mask is None and input_ids is not None:
                attention_mask = real_tokens(input_ids, config.text_config.pad_token_id)
            if attention_mask is not None and attention_mask.ndim == 2:
                check_mask(attention_mask, *texts.shape[:2], None)
                labels = _ignore_first_after_padding(labels, attention_mask)
        if contrastive_chunk_size is not None and labels is not None:
            return self._forward_in_chunks(
                contrastive_chunk_size,
                labels=labels,
                contrastive_mask=contrastive_mask,
                input_ids=input_ids,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                position_ids=position_ids,
                pixel_values=pixel_values,
                image_hidden_states=image_hidden_states,
                encoder_hidden_states=encoder_hidden_states,
                interpolate_pos_encoding=interpolate_pos_encoding,
                **kwargs,
            )
        in_chunk = kwargs.pop("in_chunk", False)
        if use_cache is None:
            use_cache = config.text_config.use_cache and labels is None and not self.training
        use_cache = use_cache and not contrast  # [CLS] would stay in the cache
        cache = as_coca_cache(cache, past_key_values)
        if self.training and self.is_activation_checkpointing:
            use_cache, cache = False, None  # the layers run twice and would write to it twice
        if cache is None and use_cache:
            cache = CocaCache(DynamicCache(config=config.text_config), DynamicCache())
        output_hidden_states, image_outputs = kwargs.pop("output_hidden_states", None), None
        if has_image:
            embedding, encoder_hidden_states, image_outputs = self.model.encode_image(
                pixel_values,
                image_hidden_states,
                need_embedding=contrast,
                need_tokens=caption,
                interpolate_pos_encoding=interpolate_pos_encoding,
                # As a list, `output_hidden_states` has indices of the text stacks
                output_hidden_states=output_hidden_states if isinstance(output_hidden_states, bool) else None,
                **{name: kwargs[name] for name in ("output_attentions",) if name in kwargs},
            )
        if caption:
            check_image_tokens(
                encoder_hidden_states,
                self.text_decoder.kv_size,
                cache,
                texts,
                one_text_each=labels is not None,
            )

        unimodal_states, multimodal_states = self._split_hidden_states_selection(output_hidden_states)
        text_attention_mask = kwargs.pop("text_attention_mask", None)
        text_outputs = self.model.text_model(
            input_ids,
            attention_mask if text_attention_mask is None else text_attention_mask,
            position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            output_embedding=contrast,
            output_hidden_states=unimodal_states,
            return_dict=True,
            **kwargs,
        )

        caption_total = logits = image_embeds = text_embeds = decoder_outputs = None
        if contrast:
            image_embeds = F.normalize(embedding, dim=-1)
            text_embeds = F.normalize(self.model.text_projection(text_outputs.pooler_output), dim=-1)
        if caption:
            decoder_outputs = self.text_decoder(
                text_outputs.last_hidden_state,
                encoder_hidden_states,
                attention_mask,
                cache=cache,
                output_hidden_states=multimodal_states,
                return_dict=True,
                **kwargs,
            )
            hidden_states = decoder_outputs.last_hidden_state
            if labels is not None:
                shift_labels = kwargs.get("shift_labels")
                caption_total = caption_loss(hidden_states, self.lm_head, labels, shift_labels, num_items_in_batch=1)
            if labels is None or logits_to_keep is not None:
                keep = (
                    logits_to_keep if isinstance(logits_to_keep, torch.Tensor) else slice(-(logits_to_keep or 0), None)
                )
                logits = self.lm_head(hidden_states[:, keep])

        if labels is None or in_chunk:
            losses = {"caption_loss": caption_total}
        else:
            losses = self._losses(image_embeds, text_embeds, caption_total, labels, contrastive_mask, **kwargs)
        return CocaConditionalOutput(
            **losses,
            logits=logits,
            **{CACHE_NAME: cache if use_cache else None},
            text_embeds=text_embeds,
            image_embeds=image_embeds,
            encoder_hidden_states=encoder_hidden_states,
            image_outputs=image_outputs,
            **self._join_captured(text_outputs, decoder_outputs, texts),
        )

    def _losses(
        self,
        image_embeds: torch.Tensor | None,
        text_embeds: torch.Tensor | None,
        caption_total: torch.Tensor | None,
        labels: torch.Tensor,
        contrastive_mask: torch.Tensor | None = None,
        shift_labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs,
    ) -> dict[str, torch.Tensor | None]:
        """Both losses and their weighted sum, from the embeddings and the captioning loss summed over tokens."""
        config, group = self.config, self._loss_group()
        contrastive = caption = None
        weighted = []
        if image_embeds is not None:
            pairs = slice(None) if contrastive_mask is None else contrastive_mask.bool()
            contrastive = self.model.contrastive_loss(image_embeds[pairs], text_embeds[pairs], group)
            weighted.append(config.contrastive_loss_weight * contrastive)
        if caption_total is not None:
            if num_items_in_batch is None:
                shift_labels = shift(labels) if shift_labels is None else shift_labels
                num_items_in_batch = mean_count((shift_labels != IGNORE_INDEX).sum(), group)
            caption = caption_total / num_items_in_batch
            weighted.append(config.caption_loss_weight * caption)
        return {"loss": sum(weighted), "contrastive_loss": contrastive, "caption_loss": caption}

    def _forward_in_chunks(
        self, chunk_size: int, labels: torch.Tensor, contrastive_mask: torch.Tensor | None, **inputs
    ) -> CocaConditionalOutput:
        """
        The losses of a batch, one chunk of it in memory at a time. Activations of a chunk are dropped and computed again,
        under the same random state, when the backward pass comes to it: its embeddings then have the gradients of the
        contrastive loss of all chunks. Batch norms in training see chunks.
        """
        if chunk_size < 1:
            raise ValueError(f"`contrastive_chunk_size` must be at least 1, got {chunk_size}.")
        batch_size, group = labels.shape[0], self._loss_group()
        num_chunks = torch.tensor(-(-batch_size // chunk_size), device=labels.device)
        if (
            group is not None
        ):  # FSDP gathers weights layer by layer, so all processes have to run the layers equally often
            dist.all_reduce(num_chunks, dist.ReduceOp.MAX, group=group)
        num_chunks = int(num_chunks)
        if batch_size < num_chunks:
            raise ValueError(
                f"This process has {batch_size} rows, and another has enough for {num_chunks} chunks of {chunk_size} "
                "(`contrastive_chunk_size`): give all processes batches of about the same size "
                "(`dataloader_drop_last=True` leaves a short last one out)."
            )

        def chunk_of(value: Any, i: int) -> Any:
            is_batch = isinstance(value, torch.Tensor) and value.ndim > 0 and value.shape[0] == batch_size
            return value.tensor_split(num_chunks)[i] if is_batch else value

        def run(i: int) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
            chunk = {name: chunk_of(value, i) for name, value in {**inputs, "labels": labels}.items()}
            outputs = CocaForConditionalGeneration.forward(self, **chunk, in_chunk=True, return_dict=True)
            return outputs.image_embeds, outputs.text_embeds, outputs.caption_loss

        if num_chunks == 1:
            parts = [run(0)]
        else:
            parts = [checkpoint(run, i, use_reentrant=False) for i in range(num_chunks)]
        image_embeds, text_embeds, caption_totals = (
            None if part[0] is None else part for part in zip(*parts, strict=True)
        )
        image_embeds, text_embeds = (None if part is None else torch.cat(part) for part in (image_embeds, text_embeds))
        caption_total = None if caption_totals is None else sum(caption_totals)
        losses = self._losses(image_embeds, text_embeds, caption_total, labels, contrastive_mask, **inputs)
        return CocaConditionalOutput(**losses, image_embeds=image_embeds, text_embeds=text_embeds)

    @torch.no_grad()
    def get_null_image_tokens(
        self, pixel_values: torch.FloatTensor | None = None, interpolate_pos_encoding: bool = False
    ) -> torch.FloatTensor:
        """
        Image tokens `(1, Q, D)` of an image that shows nothing: all pixels 0, which after normalisation is the mean colour.
        With them the decoder is a language model: log p(text | null image) stands for log p(text).

        Args:
            pixel_values (`(B, channels, height, width)`, *optional*): images of the size to take, by default `image_size`.
            interpolate_pos_encoding (`bool`): if that is another size than `image_size`.
        """
        if pixel_values is None:
            vision_config = self.config.vision_config
            size = getattr(vision_config, "image_size", None)
            if size is None:
                raise ValueError(
                    f"The image encoder ({vision_config.model_type!r}) has no `image_size` of its own: give "
                    "`null_image_tokens = model.get_null_image_tokens(pixel_values)`, for the size of your images."
                )
            height, width = (size, size) if isinstance(size, int) else size
            null_image = torch.zeros(1, vision_config.num_channels, height, width, device=self.device, dtype=self.dtype)
        else:
            null_image = torch.zeros_like(pixel_values[:1])
        return self.model.encode_image(
            null_image, need_embedding=False, interpolate_pos_encoding=interpolate_pos_encoding
        )[1]

    @torch.no_grad()
    def score_captions(
        self,
        input_ids: torch.LongTensor,
        pixel_values: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_hidden_states: torch.FloatTensor | None = None,
        encoder_hidden_states: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        pairs: bool = False,
        language_prior: float = 0.0,
        null_image_tokens: torch.FloatTensor | None = None,
        batch_size: int = 64,
        interpolate_pos_encoding: bool = False,
    ) -> torch.FloatTensor:
        """
        log p(text | image), of every text given every image: the sum over the text's tokens, its EOS included.

        Unlike the contrastive similarity it sees the order of words and details, and the two add up: to re-rank, take their sum
        with `logits_per_image`. But it prefers short and common texts, whatever the image. `language_prior` takes that away:
        with weight a, the score is `log p(text | image) - a * log p(text)` (arXiv 2306.01879, 2311.17072), the second being
        that of null images; at 1 it is the pointwise mutual information. It is for choosing between texts that are not equally
        natural; where all of them are captions like those of the training it does harm. Choosing an image for a text needs no
        prior, which is the same for all images.

        Args:
            input_ids (`(texts, T)`), attention_mask: whole texts, from BOS to EOS, padded on either side.
            pixel_values (`(images, channels, height, width)`), image_hidden_states or encoder_hidden_states:
                See [`~CocaForConditionalGeneration.forward`].
            labels (`(texts, T)`, *optional*): `input_ids` with -100 for tokens whose probability is not counted, e.g. a question
                before the answer. By default all but BOS count.
            pairs (`bool`): text `i` given image `i` only, or, with k texts an image, given image `i // k`.
            language_prior (`float`): the weight a.
            null_image_tokens (`(K, Q, D)`, *optional*): image tokens whose mean p(text) is the prior; by default those of
                [`~CocaForConditionalGeneration.get_null_image_tokens`]. For a model that never saw a null image, a few hundred
                training images estimate it better.
            batch_size (`int`): texts, or images, in the network at a time. Each image is encoded once, and each text's
                unimodal states are computed once.
            interpolate_pos_encoding (`bool`): take images of another size than `image_size`.

        Returns:
            `torch.FloatTensor`: `(images, texts)`, or with `pairs` `(texts,)`.

        Example:

        ```python
        >>> import torch
        >>> from modeling_coca import CocaConfig, CocaForConditionalGeneration

        >>> small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
        >>> config = CocaConfig(
        ...     vision_config={**small, "image_size": 36},
        ...     text_config={**small, "num_multimodal_layers": 2, "vocab_size": 99, "bos_token_id": 97, "eos_token_id": 98},
        ...     num_query_tokens=4, projection_dim=32,
        ... )
        >>> model = CocaForConditionalGeneration(config).eval()
        >>> input_ids = torch.tensor([[97, 5, 6, 98], [97, 7, 98, 0], [97, 8, 98, 0]])
        >>> model.score_captions(input_ids, torch.randn(2, 3, 36, 36), language_prior=0.8).shape
        torch.Size([2, 3])
        ```
        """
        text_config = self.config.text_config
        check_one_image_input(
            pixel_values=pixel_values,
            image_hidden_states=image_hidden_states,
            encoder_hidden_states=encoder_hidden_states,
        )
        check_texts(input_ids, "input_ids", 2)
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
        if attention_mask is None:
            attention_mask = real_tokens(input_ids, text_config.pad_token_id)
        labels = input_ids if labels is None else labels
        for name, value in (("attention_mask", attention_mask), ("labels", labels)):
            if value.shape != input_ids.shape:
                raise ValueError(
                    f"`{name}` must have the shape of `input_ids` {tuple(input_ids.shape)}, got {tuple(value.shape)}."
                )
        labels = labels.masked_fill(attention_mask == 0, IGNORE_INDEX)
        labels = F.pad(_ignore_first_after_padding(labels, attention_mask), (-1, 1), value=IGNORE_INDEX)
        if pixel_values is not None or image_hidden_states is not None:
            images = pixel_values if image_hidden_states is None else image_hidden_states
            encoder_hidden_states = torch.cat(
                [
                    self.model.encode_image(
                        part if image_hidden_states is None else None,
                        None if image_hidden_states is None else part,
                        need_embedding=False,
                        interpolate_pos_encoding=interpolate_pos_encoding,
                    )[1]
                    for part in images.split(batch_size)
                ]
            )
        # Every text stands by each image
        check_image_tokens(
            encoder_hidden_states, self.text_decoder.kv_size, None, input_ids if pairs else encoder_hidden_states
        )
        text_states = torch.cat(
            [
                self.model.text_model(ids, mask, output_embedding=False).last_hidden_state
                for ids, mask in zip(input_ids.split(batch_size), attention_mask.split(batch_size), strict=True)
            ]
        )

        def log_probs(image_tokens: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
            """Image tokens (I, Q, D) and indices (I, k) of the texts of each image -> (I, k)."""
            num_images, per_image = texts.shape
            scores = text_states.new_empty(texts.shape, dtype=torch.promote_types(text_states.dtype, torch.float32))
            step = max(1, batch_size // max(per_image, 1))
            for i in range(0, num_images, step):
                keys_and_values = DynamicCache()  # of these images, for all their texts
                for t in range(0, per_image, batch_size):
                    part = texts[i : i + step, t : t + batch_size]
                    rows = part.flatten()
                    hidden_states = self.text_decoder(
                        text_states[rows],
                        image_tokens[i : i + step],
                        attention_mask[rows],
                        cache=CocaCache(DynamicCache(config=text_config), keys_and_values),
                    ).last_hidden_state
                    targets = labels[rows]
                    row, position = (targets != IGNORE_INDEX).nonzero(as_tuple=True)
                    logits = self.lm_head(hidden_states[row, position]).to(scores.dtype)
                    chosen = logits.log_softmax(dim=-1).gather(1, targets[row, position, None])[:, 0]
                    total = scores.new_zeros(len(rows)).index_add_(0, row, chosen)
                    scores[i : i + step, t : t + batch_size] = total.view(part.shape)
            return scores

        texts = torch.arange(len(input_ids), device=input_ids.device)
        by_image = texts.view(len(encoder_hidden_states), -1) if pairs else texts.expand(len(encoder_hidden_states), -1)
        scores = log_probs(encoder_hidden_states, by_image)
        if language_prior:
            if null_image_tokens is None:
                null_image_tokens = self.get_null_image_tokens(pixel_values, interpolate_pos_encoding)
            prior = log_probs(null_image_tokens, texts.expand(len(null_image_tokens), -1))
            prior = prior.logsumexp(dim=0) - math.log(len(prior))
            scores = scores - language_prior * prior[by_image]
        return scores.flatten() if pairs else scores


def _ignore_first_after_padding(labels: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """What comes before the first token of a text padded on the left is no context to predict it from."""
    return labels.masked_fill(F.pad(~attention_mask.bool(), (1, -1), value=False), IGNORE_INDEX)


class CocaForImageClassification(CocaPreTrainedModel):
    """
    CoCa's image encoder with a new one-query attentional pooler and a linear head: the paper's frozen-feature evaluation
    (freeze `vision_model`, see `modeling_coca.training.freeze`), or fine-tuning.

    Opens checkpoints of [`CocaModel`] and [`CocaForConditionalGeneration`]; pooler and head are new then.

    Example:

    ```python
    >>> import torch
    >>> from modeling_coca import CocaConfig, CocaForImageClassification

    >>> config = CocaConfig(
    ...     vision_config={
    ...         "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 36
    ...     },
    ...     num_labels=3,
    ... )
    >>> CocaForImageClassification(config)(torch.randn(2, 3, 36, 36), labels=torch.tensor([0, 2])).logits.shape
    torch.Size([2, 3])
    ```
    """

    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _no_split_modules = ["CocaAttentionalPooler"]
    _keys_to_ignore_on_load_unexpected = [
        r"^text_decoder\.",
        r"^lm_head\.",
        r"image_pooler\.",
        r"text_model\.",
        r"(visual|text)_projection\.",
        r"logit_(scale|bias)$",
    ]

    def __init__(self, config: CocaConfig):
        super().__init__(config)
        self.vision_model = _build_vision_model(config)
        self.pooler = CocaAttentionalPooler(config, 1, _vision_hidden_size(config), output_norm=True)
        self.classifier = CocaLinear(config.pooler_hidden_size, config.num_labels)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.vision_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.vision_model.set_input_embeddings(value)

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.FloatTensor | None = None,
        image_hidden_states: torch.FloatTensor | None = None,
        labels: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ImageClassifierOutput:
        """
        Args:
            pixel_values (`(B, channels, height, width)`): images, or instead of them
            image_hidden_states (`(B, N, D)`): the image encoder's last hidden states, computed beforehand.
            labels (`(B,)`, *optional*): class indices; with `config.problem_type` "regression" or
                "multi_label_classification" as in any transformers classifier.

        Returns:
            `ImageClassifierOutput`: `logits` (B, `config.num_labels`) and, with labels, `loss`.
        """
        check_one_image_input(pixel_values=pixel_values, image_hidden_states=image_hidden_states)
        if image_hidden_states is None:
            outputs = run_vision_model(
                self.vision_model, pixel_values, interpolate_pos_encoding, self.config.vision_feature_layers, **kwargs
            )
        else:
            outputs = _given_vision_outputs(self, image_hidden_states)
        pooled, _ = self.pooler(outputs.last_hidden_state)
        logits = self.classifier(pooled[:, 0])
        return ImageClassifierOutput(
            loss=None if labels is None else self.loss_function(labels, logits, self.config),
            logits=logits,
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
        )


class CocaForVisualQuestionAnswering(CocaDecoderModel):
    """
    CoCa with a classifier over a list of answers, `config.id2label`: the paper's VQA head. It reads the multimodal decoder's
    state of the question's last token. For answers in free words, give the question as prompt to
    [`CocaForConditionalGeneration`]'s `generate`.

    Opens checkpoints of [`CocaForConditionalGeneration`], with its decoder, and of [`CocaModel`]; what these lack is new
    then. The parts of the contrastive half that no answer needs ([CLS], projections, contrastive pooler) are kept as they
    are and get no gradient.

    Example:

    ```python
    >>> import torch
    >>> from modeling_coca import CocaConfig, CocaForVisualQuestionAnswering

    >>> small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
    >>> config = CocaConfig(
    ...     vision_config={**small, "image_size": 36},
    ...     text_config={**small, "num_multimodal_layers": 2, "vocab_size": 99, "bos_token_id": 97, "eos_token_id": 98},
    ...     num_query_tokens=4, projection_dim=32, id2label={0: "yes", 1: "no", 2: "red"},
    ... )
    >>> model = CocaForVisualQuestionAnswering(config).eval()
    >>> question = torch.tensor([[97, 5, 6, 98]])
    >>> outputs = model(question, torch.randn(1, 3, 36, 36), labels=torch.tensor([2]))
    >>> outputs.logits.shape
    torch.Size([1, 3])
    >>> answer = model.config.id2label[outputs.logits[0].argmax().item()]
    ```
    """

    _keys_to_ignore_on_load_unexpected = [r"^lm_head\."]

    def __init__(self, config: CocaConfig):
        super().__init__(config)
        self.classifier = CocaLinear(config.text_config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        image_hidden_states: torch.FloatTensor | None = None,
        encoder_hidden_states: torch.FloatTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CocaAnswerOutput:
        """
        Args:
            input_ids (`(B, T)`), attention_mask, position_ids, inputs_embeds: the questions, see [`CocaTextModel.forward`].
            pixel_values, image_hidden_states or encoder_hidden_states:
                See [`CocaForConditionalGeneration.forward`]. Each image may have several questions, which stand next to
                each other.
            labels (`(B,)` or `(B, num_labels)`, *optional*):
                Either the answers' ids, where -100 stands for an answer that is not in the list and gives no loss: the loss
                is the cross-entropy. Or a score from 0 to 1 for each answer, as VQA v2 has them (an answer's score is
                `min(people who gave it / 3, 1)`): the loss is the binary cross-entropy, summed over the answers. Both are
                means over the questions.

        Returns:
            [`CocaAnswerOutput`]
        """
        check_one_image_input(
            pixel_values=pixel_values,
            image_hidden_states=image_hidden_states,
            encoder_hidden_states=encoder_hidden_states,
        )
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give the questions, as exactly one of `input_ids` and `inputs_embeds`.")
        questions = input_ids if inputs_embeds is None else inputs_embeds
        if attention_mask is None:
            attention_mask = (
                questions.new_ones(questions.shape[:2], dtype=torch.bool)
                if input_ids is None
                else real_tokens(input_ids, self.config.text_config.pad_token_id)
            )
        if pixel_values is not None or image_hidden_states is not None:
            _, encoder_hidden_states, _ = self.model.encode_image(
                pixel_values,
                image_hidden_states,
                need_embedding=False,
                interpolate_pos_encoding=interpolate_pos_encoding,
            )
        check_image_tokens(encoder_hidden_states, self.text_decoder.kv_size, None, questions)

        unimodal_states, multimodal_states = self._split_hidden_states_selection(
            kwargs.pop("output_hidden_states", None)
        )
        text_outputs = self.model.text_model(
            input_ids,
            attention_mask,
            position_ids,
            inputs_embeds=inputs_embeds,
            output_embedding=False,
            output_hidden_states=unimodal_states,
            return_dict=True,
            **kwargs,
        )
        decoder_outputs = self.text_decoder(
            text_outputs.last_hidden_state,
            encoder_hidden_states,
            attention_mask,
            output_hidden_states=multimodal_states,
            return_dict=True,
            **kwargs,
        )
        states = decoder_outputs.last_hidden_state
        last = (torch.arange(states.shape[1], device=states.device) * attention_mask.long()).argmax(dim=-1)
        logits = self.classifier(states[torch.arange(len(states), device=states.device), last])
        return CocaAnswerOutput(
            loss=None if labels is None else self._answer_loss(logits.float(), labels.to(logits.device)),
            logits=logits,
            **self._join_captured(text_outputs, decoder_outputs, questions),
        )

    @staticmethod
    def _answer_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if labels.shape == logits.shape[:1] and not labels.is_floating_point():
            total = F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")
            return total / (labels != IGNORE_INDEX).sum().clamp(min=1)
        if labels.shape == logits.shape:
            return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="sum") / len(logits)
        raise ValueError(
            f"`labels` must be answer ids (integers) of shape ({len(logits)},), or scores of shape {tuple(logits.shape)} "
            f"(`config.num_labels` answers), got {labels.dtype} of shape {tuple(labels.shape)}."
        )


__all__ = [
    "CocaForConditionalGeneration",
    "CocaForImageClassification",
    "CocaForVisualQuestionAnswering",
    "CocaModel",
    "CocaPreTrainedModel",
    "CocaTextModel",
    "CocaVisionModel",
]
