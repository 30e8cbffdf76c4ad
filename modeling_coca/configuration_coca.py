"""CoCa model configuration: image encoder, text stacks and the poolers between them."""

import difflib
import math
from dataclasses import fields
from typing import Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec


def _image_hw(size: int | list[int] | tuple[int, int]) -> tuple[int, int]:
    """`224` -> `(224, 224)`; `[32, 48]` -> `(32, 48)` (height, width)."""
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _require_at_least(config: PreTrainedConfig, minimum: int, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(value is None or value >= minimum, f"`{name}` must be at least {minimum}, got {value}.")


def _require_divisible(config: PreTrainedConfig, width: str, heads: str) -> None:
    size, count = getattr(config, width), getattr(config, heads)
    if size % count:
        raise ValueError(f"`{width}` ({size}) must be a multiple of `{heads}` ({count}): change one of the two.")


def _require_probability(config: PreTrainedConfig, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(0 <= value < 1, f"`{name}` is a probability and must lie in [0, 1), got {value}.")


def _check_timm(vision_config: PreTrainedConfig) -> None:
    """A config is data: it must not have timm read other files, whatever they hold, or ask the Hub for another config."""
    if vision_config.model_type == "timm_wrapper":
        reads = sorted(
            {*(vision_config.model_args or {})}
            & {"cache_dir", "checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay"}
        )
        _require(
            not reads,
            f"`vision_config.model_args` must not have {', '.join(reads)}: load weights after the model is made.",
        )
        name = vision_config.architecture
        _require(":" not in name, f"`vision_config.architecture` must be one of timm's own, got {name!r}.")


def _require_finite(config: PreTrainedConfig, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(value is None or math.isfinite(value), f"`{name}` must be a finite number, got {value}.")


def _require_positive(config: PreTrainedConfig, *names: str) -> None:
    _require_finite(config, *names)
    for name in names:
        value = getattr(config, name)
        _require(value > 0, f"`{name}` must be more than 0, got {value}.")


def _require_activation(config: PreTrainedConfig) -> None:
    from transformers.activations import ACT2FN  # brings PyTorch, which a config can do without until then

    _require(
        config.hidden_act in ACT2FN,
        f"`hidden_act` {config.hidden_act!r} is no activation of transformers: choose one of {', '.join(ACT2FN)}.",
    )


def _check_given(config: PreTrainedConfig, others: dict[str, Any]) -> None:
    """
    Refuses fields that are a letter away from a field of `config`, which transformers would keep as attributes that nobody
    reads, and values of its own fields on which it stumbles.
    """
    known = [field.name for field in fields(config)]
    for name in others:
        if similar := difflib.get_close_matches(name, known, n=1, cutoff=0.9):
            raise ValueError(f"{type(config).__name__} has no field `{name}`: do you mean `{similar[0]}`?")
    if isinstance(config.dtype, str):
        import torch

        name = config.dtype.removeprefix("torch.")
        _require(
            isinstance(getattr(torch, name, None), torch.dtype),
            f"`dtype` {config.dtype!r} is no type of PyTorch: give float32, bfloat16, float16 or another.",
        )
    for name in ("id2label", "label2id"):
        value = getattr(config, name)
        _require(value is None or isinstance(value, dict), f"`{name}` must be a dict, got {type(value).__name__}.")


@strict
class CocaVisionConfig(PreTrainedConfig):
    r"""
    The image encoder of CoCa: a pre-norm ViT, by default without a final norm (the poolers bring their own, see
    `CocaConfig.image_layer_norm`).

    Args:
        image_size (`int` or `[height, width]`, defaults to 288):
            Pixels of the square (or not) input image.
        patch_size (`int`, defaults to 18):
            Pixels of a square patch; image sides are cut down to whole patches.
        patch_dropout (`float`, defaults to 0.0):
            Share of patch tokens that is left out in training (FLIP, arXiv 2212.00794). The class token stays.
        use_class_token (`bool`, defaults to `True`):
            Put a learned class token before the patches.
        patch_bias (`bool`, defaults to `False`):
            The projection of the patches has a bias, as in timm's ViTs (CONCH) and torchmultimodal's.
        use_pre_layernorm (`bool`, defaults to `True`):
            LayerNorm between the embeddings and the first layer, as in CLIP.
        use_post_layernorm (`bool`, defaults to `False`):
            LayerNorm after the last layer, beside those of the poolers (CONCH).
        layer_scale_init_value (`float`, *optional*):
            Initial value of LayerScale (arXiv 2103.17239) on both residual branches; `None` leaves it out.

    Example:

    ```python
    >>> from modeling_coca import CocaVisionConfig, CocaVisionModel

    >>> model = CocaVisionModel(CocaVisionConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4))
    ```
    """

    model_type = "coca_vision_model"
    base_config_key = "vision_config"
    base_model_fsdp_plan: ClassVar = {"layers.*": "free_full_weight"}

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int | list[int] | tuple[int, int] = 288
    patch_size: int = 18
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-5
    attention_dropout: float | int = 0.0
    patch_dropout: float | int = 0.0
    initializer_range: float = 0.02
    use_class_token: bool = True
    patch_bias: bool = False
    use_pre_layernorm: bool = True
    use_post_layernorm: bool = False
    layer_scale_init_value: float | None = None

    def __post_init__(self, **kwargs):
        _check_given(self, kwargs)
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        super().validate_architecture()
        _require_at_least(
            self, 1, "hidden_size", "intermediate_size", "num_attention_heads", "num_channels", "patch_size"
        )
        _require_at_least(self, 0, "num_hidden_layers")
        _require_divisible(self, "hidden_size", "num_attention_heads")
        _require_probability(self, "attention_dropout", "patch_dropout")
        _require_positive(self, "layer_norm_eps")
        _require_finite(self, "layer_scale_init_value", "initializer_range")
        _require_at_least(self, 0, "initializer_range")
        _require_activation(self)
        _require(
            isinstance(self.image_size, int) or len(self.image_size) == 2,
            f"`image_size` must be an int or [height, width], got {self.image_size}.",
        )
        _require(
            min(_image_hw(self.image_size)) >= self.patch_size,
            f"`image_size` ({self.image_size}) must be at least one patch (`patch_size` = {self.patch_size}).",
        )

    @property
    def grid_size(self) -> tuple[int, int]:
        """Patches per column and per row."""
        height, width = _image_hw(self.image_size)
        return height // self.patch_size, width // self.patch_size


@strict
class CocaTextConfig(PreTrainedConfig):
    r"""
    Both text stacks of CoCa: the unimodal layers, which see text alone, and the multimodal layers on top of them, which
    also attend to the image.

    Args:
        num_hidden_layers (`int`, defaults to 24):
            **All** self-attention layers, unimodal and multimodal. Key/value caches are sized by it.
        num_multimodal_layers (`int`, defaults to 12):
            How many of them, the last ones, also cross-attend to the image tokens.
        multimodal_intermediate_size (`int`, *optional*):
            MLP width of the multimodal layers; `None` means `intermediate_size`.
        multimodal_layer_type (`"two_mlps"` or `"one_mlp"`, defaults to `"two_mlps"`):
            What a multimodal layer is made of: self-attention, MLP, cross-attention to normed image tokens, MLP (all
            open_clip weights); or the layer of the original Transformer, self-attention, cross-attention to the image tokens
            as they are, MLP (torchmultimodal).
        max_position_embeddings (`int`, defaults to 77):
            Rows of the position table: text tokens **plus one for [CLS]** (77 = 76 + 1 in the public weights).
        dropout (`float`, defaults to 0.0):
            Dropout on the embeddings and on each residual branch.
        use_cls_token (`bool`, defaults to `True`):
            Append a learned [CLS] whose unimodal output is the text embedding (the paper's way). `False` is open_clip's
            `embed_cls: false`: the embedding is read at the EOS token, all token states pass the final norm, and the
            position table has no row for [CLS].
        cls_position (`"last"` or `"next"`, defaults to `"last"`):
            Position row of [CLS]: always the last one of the table, which is where all open_clip weights were trained,
            or the one after the text's last token.
        shifted_cls_mask (`bool`, defaults to `False`):
            Quirk of all open_clip weights (open_clip issue 549): their padding mask is off by one, so that [CLS] sees the
            first padding token, and itself only if the text fills the whole context. New models keep `False`.

    Example:

    ```python
    >>> from modeling_coca import CocaTextConfig

    >>> CocaTextConfig(num_hidden_layers=8, num_multimodal_layers=3).num_unimodal_layers
    5
    ```
    """

    model_type = "coca_text_model"
    base_config_key = "text_config"
    base_model_fsdp_plan: ClassVar = {"layers.*": "free_full_weight"}

    vocab_size: int = 49408
    hidden_size: int = 768
    intermediate_size: int = 3072
    multimodal_intermediate_size: int | None = None
    multimodal_layer_type: Literal["two_mlps", "one_mlp"] = "two_mlps"
    num_hidden_layers: int = 24
    num_multimodal_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 77
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-5
    attention_dropout: float | int = 0.0
    dropout: float | int = 0.0
    layer_scale_init_value: float | None = None
    initializer_range: float = 0.02
    use_cls_token: bool = True
    cls_position: Literal["last", "next"] = "last"
    shifted_cls_mask: bool = False
    use_cache: bool = True
    bos_token_id: int | None = 49406
    eos_token_id: int | list[int] | None = 49407
    pad_token_id: int | None = 0

    def __post_init__(self, **kwargs):
        _check_given(self, kwargs)
        if self.multimodal_intermediate_size is None:
            self.multimodal_intermediate_size = self.intermediate_size
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        super().validate_architecture()
        _require_at_least(
            self,
            1,
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "multimodal_intermediate_size",
            "num_attention_heads",
            "num_multimodal_layers",
        )
        _require_divisible(self, "hidden_size", "num_attention_heads")
        _require_probability(self, "attention_dropout", "dropout")
        _require_positive(self, "layer_norm_eps")
        _require_finite(self, "layer_scale_init_value", "initializer_range")
        _require_at_least(self, 0, "initializer_range")
        _require_activation(self)
        _require(
            self.num_multimodal_layers <= self.num_hidden_layers,
            f"`num_multimodal_layers` ({self.num_multimodal_layers}) exceeds `num_hidden_layers` "
            f"({self.num_hidden_layers}), which counts the unimodal and the multimodal layers together.",
        )
        _require(
            self.max_text_length >= 2,
            f"`max_position_embeddings` ({self.max_position_embeddings}) leaves no room for BOS, EOS and [CLS].",
        )
        _require(
            not self.shifted_cls_mask or (self.use_cls_token and self.pad_token_id is not None),
            "`shifted_cls_mask=True` needs `use_cls_token=True` and a `pad_token_id`.",
        )
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            self._require_token(name)

    def _require_token(self, name: str) -> None:
        value = getattr(self, name)
        if value is None or value == getattr(CocaTextConfig, name):  # CLIP's, of which transformers warns
            return
        ids = [value] if isinstance(value, int) else value
        _require(
            len(ids) > 0 and all(0 <= token < self.vocab_size for token in ids),
            f"`{name}` {value} must be an id of the vocabulary (`vocab_size` = {self.vocab_size}) or None: give the "
            "tokenizer's.",
        )

    @property
    def num_unimodal_layers(self) -> int:
        return self.num_hidden_layers - self.num_multimodal_layers

    @property
    def max_text_length(self) -> int:
        """Longest text in tokens, BOS and EOS included."""
        return self.max_position_embeddings - int(self.use_cls_token)


@strict
class CocaConfig(PreTrainedConfig):
    r"""
    CoCa (Contrastive Captioners, arXiv 2205.01917): an image encoder, attentional poolers, and a decoder whose lower half
    is a text encoder.

    Args:
        vision_config (`dict` or `PreTrainedConfig`, *optional*):
            `CocaVisionConfig` or the config of any registered transformers vision model, told apart by `model_type`
            (timm models through `timm_wrapper`).
        text_config (`dict` or `CocaTextConfig`, *optional*):
            Both text stacks.
        vision_feature_layers (`list[int]`, *optional*):
            Earlier hidden states of the image encoder, by index, whose channels are joined to those of its last one. The
            last layer of a classifier has forgotten much of colours and edges: on the quickstart's frozen EfficientNet, its
            first four feature maps took captions right for new skin tones from 57 % to 81 %, in equal time of training.
            Larger feature maps are averaged to the last one's grid.
        projection_dim (`int`, defaults to 512):
            Width of the shared embedding space.
        pooler_type (`str`, defaults to `"cascade"`):
            How the encoder's tokens become one image embedding and `num_query_tokens` image tokens:
            `"cascade"` caption pooler, then a one-query contrastive pooler over its output (the paper's default);
            `"parallel"` two poolers over the encoder's tokens (the paper's other, CONCH);
            `"shared"` one pooler with `num_query_tokens + 1` queries, query 0 contrastive (open_clip's released weights
            with 255 + 1, lucidrains' CoCa-pytorch with 256 + 1);
            `"none"` class token and patch tokens as they are (open_clip's coca_base).
        num_query_tokens (`int`, defaults to 256):
            Image tokens handed to the decoder. Not used by `pooler_type="none"`.
        pooler_hidden_size (`int`, *optional*):
            Width of the poolers; `None` means the text stacks' `hidden_size`.
        contrastive_pooler_hidden_size (`int`, *optional*):
            Width of the contrastive pooler where it has one of its own (CONCH); `None` means `pooler_hidden_size`.
        num_pooler_attention_heads (`int`, defaults to 8):
            Heads of each pooler.
        image_layer_norm (`"pooler"`, `"encoder"` or `"embedding"`, defaults to `"pooler"`):
            Where the last LayerNorm of the image side sits: on each pooler's output, on the encoder's tokens before the
            poolers, or on the vector that becomes the image embedding alone. With `pooler_type="none"` there is no
            pooler and `"pooler"` means `"encoder"`. open_clip uses all three.
        image_pooling (`"first"` or `"mean"`, defaults to `"first"`):
            For `"shared"` and `"none"`: the embedding is read from the first token (query 0, class token), or is the
            mean of the image tokens.
        contrastive_loss_weight (`float`, defaults to 1.0), caption_loss_weight (`float`, defaults to 2.0):
            `loss = contrastive_loss_weight * contrastive + caption_loss_weight * caption`. A weight of 0 switches the
            branch off and saves its compute.
        contrastive_loss (`"softmax"` or `"sigmoid"`, defaults to `"softmax"`):
            CLIP's loss, or SigLIP's (arXiv 2303.15343), which has a learned bias.
        logit_scale_init_value (`float`, *optional*):
            Log of the initial inverse temperature: `ln(1/0.07)` for softmax and `ln(10)` for sigmoid by default.
        logit_bias_init_value (`float`, *optional*):
            Initial bias on the similarity; `None` means no bias for softmax and -10 for sigmoid.
        text_projection_bias (`bool`, defaults to `False`):
            open_clip's `proj_bias`.
        tie_word_embeddings (`bool`, defaults to `False`):
            Share the weights of the token embedding and of `lm_head`. The paper and all released weights do not.

    Example:

    ```python
    >>> from modeling_coca import CocaConfig, CocaForConditionalGeneration

    >>> config = CocaConfig(
    ...     vision_config={"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
    ...     text_config={"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_multimodal_layers": 2, "num_attention_heads": 4},
    ...     num_query_tokens=16,
    ...     projection_dim=32,
    ... )
    >>> model = CocaForConditionalGeneration(config)

    >>> # any vision model of transformers as the image encoder
    >>> config = CocaConfig(vision_config={"model_type": "vit", "hidden_size": 192, "num_attention_heads": 3})
    ```
    """

    model_type = "coca"
    base_model_fsdp_plan: ClassVar = {}  # the parts have theirs
    sub_configs_defaults: ClassVar = {
        "text_config": CocaTextConfig,
        "vision_config": SubConfigSpec(AutoConfig, model_type="coca_vision_model"),
    }
    # Large tensors that `Trainer` would otherwise gather over the whole evaluation set
    keys_to_ignore_at_inference: ClassVar = [
        "cache",
        "past_key_values",
        "hidden_states",
        "attentions",
        "cross_attentions",
        "encoder_hidden_states",
        "image_outputs",
        "text_model_output",
        "vision_model_output",
    ]

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    projection_dim: int = 512
    vision_feature_layers: list[int] | None = None
    pooler_type: Literal["cascade", "parallel", "shared", "none"] = "cascade"
    num_query_tokens: int = 256
    pooler_hidden_size: int | None = None
    contrastive_pooler_hidden_size: int | None = None
    num_pooler_attention_heads: int = 8
    image_layer_norm: Literal["pooler", "encoder", "embedding"] = "pooler"
    image_pooling: Literal["first", "mean"] = "first"
    contrastive_loss_weight: float | int = 1.0
    caption_loss_weight: float | int = 2.0
    contrastive_loss: Literal["softmax", "sigmoid"] = "softmax"
    logit_scale_init_value: float | None = None
    logit_bias_init_value: float | None = None
    text_projection_bias: bool = False
    tie_word_embeddings: bool = False

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        try:
            config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        except (TypeError, AttributeError, RecursionError) as error:
            raise OSError(f"The config.json of {pretrained_model_name_or_path} is no JSON object ({error}).") from error
        # Without this, a folder of another library or model would become the default model with random weights
        if not isinstance(config_dict, dict) or config_dict.get("model_type") != cls.model_type:
            raise OSError(
                f'{pretrained_model_name_or_path} has no config.json with a `model_type` "{cls.model_type}". If it is a checkpoint of '
                "open_clip, CONCH or torchmultimodal, load the model with `CocaForConditionalGeneration.from_pretrained`, which takes "
                f"it, or convert it once for all: `coca convert {pretrained_model_name_or_path} OUT`."
            )
        return config_dict, kwargs

    def __post_init__(self, **kwargs):
        if type(self).__module__ == __name__ and not __name__.startswith("transformers_modules"):
            # Where to find the code that a folder brings along: this package's stands in for it, and saves no copy of it
            kwargs.pop("auto_map", None)
            kwargs.pop("custom_pipelines", None)
        _check_given(self, kwargs)
        self._check_parts()
        super().__post_init__(**kwargs)
        _check_timm(self.vision_config)
        if self.pooler_hidden_size is None:
            self.pooler_hidden_size = self.text_config.hidden_size
        if self.contrastive_pooler_hidden_size is None:
            self.contrastive_pooler_hidden_size = self.pooler_hidden_size
        sigmoid = self.contrastive_loss == "sigmoid"
        if self.logit_scale_init_value is None:
            self.logit_scale_init_value = math.log(10) if sigmoid else math.log(1 / 0.07)
        if self.logit_bias_init_value is None and sigmoid:
            self.logit_bias_init_value = -10.0

    def _check_parts(self) -> None:
        for name, is_fine in (
            ("vision_config", lambda model_type: model_type not in ("coca", "coca_text_model")),
            ("text_config", lambda model_type: model_type in (None, "coca_text_model")),
        ):
            part = getattr(self, name)
            model_type = part.get("model_type") if isinstance(part, dict) else getattr(part, "model_type", None)
            _require(
                is_fine(model_type),
                f'`{name}` is of the `model_type` "{model_type}": it must be '
                + ('"coca_text_model".' if name == "text_config" else "that of a vision model."),
            )

    def validate_architecture(self):
        super().validate_architecture()
        _require_at_least(
            self,
            1,
            "projection_dim",
            "num_query_tokens",
            "num_pooler_attention_heads",
            "pooler_hidden_size",
            "contrastive_pooler_hidden_size",
        )
        _require_finite(self, "contrastive_loss_weight", "caption_loss_weight", "logit_bias_init_value")
        _require_at_least(self, 0, "contrastive_loss_weight", "caption_loss_weight")
        _require(
            self.contrastive_loss_weight > 0 or self.caption_loss_weight > 0,
            "`contrastive_loss_weight` and `caption_loss_weight` are both 0: nothing would be trained.",
        )
        if self.pooler_type != "none" and self.pooler_hidden_size is not None:
            _require_divisible(self, "pooler_hidden_size", "num_pooler_attention_heads")
        if self.pooler_type in ("cascade", "parallel") and self.contrastive_pooler_hidden_size is not None:
            _require_divisible(self, "contrastive_pooler_hidden_size", "num_pooler_attention_heads")
        _require(
            self.image_pooling == "first" or self.pooler_type in ("shared", "none"),
            f'`image_pooling="mean"` belongs to `pooler_type` "shared" or "none", not "{self.pooler_type}", whose '
            "contrastive pooler has its own query.",
        )
        _require(
            self.pooler_type != "none" or self.image_pooling == "mean" or self._has_class_token(),
            '`pooler_type="none"` with `image_pooling="first"` reads the embedding from the class token, and '
            '`vision_config.use_class_token` is False: set one of the three, as `image_pooling="mean"`.',
        )
        # Beyond, the factor is no number in fp32; it is easily given as the factor itself
        _require(
            self.logit_scale_init_value is None or abs(self.logit_scale_init_value) <= 80,
            f"`logit_scale_init_value` is a logarithm and must lie in [-80, 80], got {self.logit_scale_init_value}.",
        )

    def _has_class_token(self) -> bool:
        return getattr(self.vision_config, "use_class_token", True)


# Sub-configs are found by `model_type`, also when this file comes from the Hub as remote code.
AutoConfig.register(CocaVisionConfig.model_type, CocaVisionConfig, exist_ok=True)
AutoConfig.register(CocaTextConfig.model_type, CocaTextConfig, exist_ok=True)
AutoConfig.register(CocaConfig.model_type, CocaConfig, exist_ok=True)

__all__ = ["CocaConfig", "CocaTextConfig", "CocaVisionConfig"]
