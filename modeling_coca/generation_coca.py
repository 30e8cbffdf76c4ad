"""What `generate()` needs to know of CoCa: a decoder-only model whose images are read once, by cross-attention.

Everything else is transformers' own generation. The hooks stand in the order in which `generate` calls them.
"""

from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache, StaticCache
from transformers.generation import GenerationMixin, LogitsProcessor, LogitsProcessorList
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions
from transformers.utils import logging

logger = logging.get_logger(__name__)

# transformers 5.24 renamed it, in its outputs as in what `generate` hands to the model
CACHE_NAME = "cache" if "cache" in CausalLMOutputWithCrossAttentions.__dataclass_fields__ else "past_key_values"


class CocaCache(EncoderDecoderCache):
    """
    Self-attention keys and values for each sequence, cross-attention ones for each *image*.

    All beams of an image attend to the same keys and values (see `CocaAttention`), so beam search has nothing to copy
    or reorder in the cross-attention half.
    """

    def reorder_cache(self, beam_idx: torch.LongTensor):
        self.self_attention_cache.reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int):
        self.self_attention_cache.batch_repeat_interleave(repeats)


def as_coca_cache(cache: Cache | None, past_key_values: Cache | None = None) -> EncoderDecoderCache | None:
    """The cache, by whichever name it came. A bare self-attention cache gets its cross-attention half."""
    if cache is not None and past_key_values is not None:
        raise ValueError("Give one of `cache` and `past_key_values`: they are two names of the same thing.")
    cache = past_key_values if cache is None else cache
    if cache is None or isinstance(cache, EncoderDecoderCache):
        return cache
    return CocaCache(cache, DynamicCache())


def has_image(cache: Cache | None) -> bool:
    """Whether the keys and values of the images are there."""
    return isinstance(cache, EncoderDecoderCache) and cache.is_updated.get(0, False)


def check_one_image_input(**inputs: torch.Tensor | None) -> None:
    """At most one, and that a tensor of floats. NaN are looked for by the image processor: here it would wait for the GPU."""
    given = [name for name, value in inputs.items() if value is not None]
    if len(given) > 1:
        raise ValueError(f"Give one of {', '.join(f'`{name}`' for name in given)}: each stands for the image.")
    for name in given:
        value = inputs[name]
        if not isinstance(value, torch.Tensor):
            raise ValueError(
                f'`{name}` must be a tensor, got {type(value).__name__}: call the processor with `return_tensors="pt"`.'
            )
        if not value.is_floating_point():
            raise ValueError(f"`{name}` must be floats as the image processor makes them, got {value.dtype}.")


def check_texts(texts: torch.Tensor, name: str, ndim: int) -> None:
    """`input_ids` (B, T) or `inputs_embeds` (B, T, D) must be a tensor of that shape, with something in it."""
    if not isinstance(texts, torch.Tensor):
        raise ValueError(
            f'`{name}` must be a tensor, got {type(texts).__name__}: call the processor with `return_tensors="pt"`.'
        )
    if texts.ndim != ndim or 0 in texts.shape:
        shape = "(batch, tokens)" if ndim == 2 else "(batch, tokens, width)"
        raise ValueError(f"`{name}` must have shape {shape} with a token in it, got {tuple(texts.shape)}.")
    if ndim == 2 and (texts.is_floating_point() or texts.dtype == torch.bool):
        raise ValueError(f"`{name}` must be token ids (integers), got {texts.dtype}.")


def check_cache(cache: Cache | None, batch_size: int) -> None:
    """Keys and values that are there must be those of as many texts."""
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    keys = getattr(cache.layers[0], "keys", None) if cache is not None and len(cache.layers) else None
    if keys is not None and keys.ndim == 4 and keys.shape[0] != batch_size:
        raise ValueError(
            f"The cache (`{CACHE_NAME}`) holds {keys.shape[0]} texts, `input_ids` are {batch_size}: each text continues its own."
        )


def check_image_tokens(
    encoder_hidden_states: torch.Tensor | None,
    width: int,
    cache: Cache | None,
    texts: torch.Tensor,
    one_text_each: bool = False,
) -> None:
    """Image tokens (images, Q, `width`), or the cache that holds their keys and values, must fit the texts (B, T)."""
    if has_image(cache):
        return
    if encoder_hidden_states is None:
        raise ValueError("No image: give `pixel_values`, `image_hidden_states` or `encoder_hidden_states`.")
    if encoder_hidden_states.ndim != 3 or encoder_hidden_states.shape[-1] != width or 0 in encoder_hidden_states.shape:
        raise ValueError(
            f"`encoder_hidden_states` must have shape (batch, image tokens, {width}), got "
            f"{tuple(encoder_hidden_states.shape)}."
        )
    images, rows = encoder_hidden_states.shape[0], texts.shape[0]
    if rows % images or (one_text_each and rows != images):
        raise ValueError(f"There are {images} images for {rows} texts (`input_ids`): each text needs its image.")


def check_mask(attention_mask: Any, batch_size: int, length: int, cache: Cache | None) -> None:
    """A mask of four dimensions, and those by name, are the caller's own."""
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.ndim == 4:
        return
    past = 0 if cache is None else cache.get_seq_length()
    fits = attention_mask.ndim == 2 and attention_mask.shape[0] == batch_size
    if not fits or (isinstance(past, int) and attention_mask.shape[1] != past + length):
        cached = f" with the {past} tokens in the cache" if cache is not None and past else ""
        raise ValueError(
            f"`attention_mask` must have the shape of `input_ids`{cached}, which is ({batch_size}, {past + length}), got "
            f"{tuple(attention_mask.shape)}."
        )


def real_tokens(input_ids: torch.LongTensor, pad_token_id: int | None) -> torch.BoolTensor:
    """(B, T) -> (B, T), for a caller who gave no mask: what is not in a run of padding at either end.

    Inside a text the padding's id is a real token in CLIP's vocabulary."""
    if pad_token_id is None:
        return torch.ones_like(input_ids, dtype=torch.bool)
    is_token = input_ids != pad_token_id
    return (is_token.cumsum(-1) > 0) & (is_token.flip(-1).cumsum(-1).flip(-1) > 0)


def is_one_of(input_ids: torch.LongTensor, token_ids: int | list[int] | None) -> torch.BoolTensor:
    """Where `input_ids` are among `token_ids`, which a config may give as one id, several or none."""
    token_ids = torch.tensor([] if token_ids is None else token_ids, dtype=torch.long, device=input_ids.device)
    return torch.isin(input_ids, token_ids.reshape(-1))


def hide_after_pad_id(input_ids: torch.LongTensor, real: torch.BoolTensor, pad_token_id: int) -> torch.BoolTensor:
    """(B, T): open_clip's shifted mask looks at ids, so a real token that has the padding id hides the one after it."""
    return real & ~torch.nn.functional.pad(real & (input_ids == pad_token_id), (1, -1), value=False)


class CocaGuidanceLogitsProcessor(LogitsProcessor):
    """
    Captions that say more of what is in *this* image (arXiv 2307.16686): each next token is scored by
    `log p(token | null image) + guidance_scale * (log p(token | image) - log p(token | null image))`.

    `generate(pixel_values, guidance_scale=2.0)` builds it. The null image's half has a cache of its own. What is in it hangs
    on the text alone, so that after each step a row goes on from any row that had the same text; where there is none,
    e.g. where assisted decoding took tokens back, it is computed anew.

    The scores are not normalised again (`renormalize_logits=True` does that): so the score of a beam is the guided score of the
    whole text.

    Args:
        model ([`CocaForConditionalGeneration`]): the model that generates.
        guidance_scale (`float`):
            1 changes nothing; 1.5 to 3 make captions more specific, and less like a person's. The paper's models are trained
            for it: some rows have the null image (`pixel_values` of 0, and `contrastive_mask` false).
        null_image_tokens (`(1, Q, D)`): image tokens of the null image, see `get_null_image_tokens`.
        attention_mask (`(B, T)`, *optional*): the prompt's mask, where rows are padded on the left.
        use_cache (`bool`): whether to keep keys and values.
    """

    def __init__(
        self,
        model: "CocaGenerationMixin",
        guidance_scale: float,
        null_image_tokens: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        use_cache: bool = True,
    ):
        if len(null_image_tokens) != 1:
            raise ValueError(f"Guidance takes one null image, `null_image_tokens` hold {len(null_image_tokens)}.")
        self.model = model
        self.guidance_scale = guidance_scale
        self.null_image_tokens = null_image_tokens
        self.attention_mask = attention_mask
        self.use_cache = use_cache
        self.cache = self.texts = None

    def _log_probs(self, input_ids: torch.LongTensor) -> torch.Tensor:
        """(rows, T) -> (rows, vocabulary): log p(next token | null image)."""
        rows, length = input_ids.shape
        mask = input_ids.new_ones(rows, length)
        if self.attention_mask is not None:
            prompts = self.attention_mask[:, :length]
            mask[:, : prompts.shape[1]] = prompts.repeat_interleave(rows // len(prompts), dim=0)
        texts = input_ids.masked_fill(mask == 0, -1)  # rows with equal texts have equal keys and values
        source = self._find_rows(texts[:, :-1])
        if source is None:
            self.cache = CocaCache(DynamicCache(config=self.model.config.text_config), DynamicCache())
        elif not torch.equal(source, torch.arange(len(self.texts), device=source.device)):
            self.cache.reorder_cache(source)
        self.texts = texts
        inputs = self.model.prepare_inputs_for_generation(
            input_ids,
            attention_mask=mask,
            encoder_hidden_states=self.null_image_tokens,
            next_sequence_length=None if source is None else 1,
            use_cache=self.use_cache,
            is_first_iteration=source is None,
            **{CACHE_NAME: self.cache if self.use_cache else None},
        )
        logits = self.model(**inputs, logits_to_keep=1, return_dict=True).logits[:, -1]
        return logits.to(input_ids.device, torch.float32).log_softmax(dim=-1)

    def _find_rows(self, texts: torch.LongTensor) -> torch.LongTensor | None:
        """(rows, T) -> (rows,): where each text stands in the cache, `None` if not all are there."""
        if not self.use_cache or self.texts is None or self.texts.shape[1] != texts.shape[1]:
            return None
        _, keys = torch.unique(torch.cat([self.texts, texts]), dim=0, return_inverse=True)
        cached, wanted = keys[: len(self.texts)], keys[len(self.texts) :]
        row_of_key = keys.new_full((len(keys),), -1)
        row_of_key[cached] = torch.arange(len(cached), device=keys.device)
        source = row_of_key[wanted]
        return None if (source < 0).any() else source

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        scores, null_scores = scores.log_softmax(dim=-1), self._log_probs(input_ids)
        return null_scores + self.guidance_scale * (scores - null_scores)


class CocaGenerationMixin(GenerationMixin):
    """Hooks of transformers' generation, for [`CocaForConditionalGeneration`]."""

    def _prepare_model_inputs(self, inputs, bos_token_id, model_kwargs):
        if "null_image_tokens" in model_kwargs:  # the size of the batch is that of the first tensor
            model_kwargs["null_image_tokens"] = model_kwargs.pop("null_image_tokens")
        is_image = isinstance(inputs, torch.Tensor) and (inputs.ndim in (4, 5) or inputs.is_floating_point())
        if is_image and model_kwargs.get("pixel_values") is None:
            inputs, model_kwargs = None, {"pixel_values": inputs, **model_kwargs}  # generate(pixel_values)
        inputs, input_name, model_kwargs = super()._prepare_model_inputs(inputs, bos_token_id, model_kwargs)
        cache = model_kwargs.get(CACHE_NAME)
        if input_name == "input_ids":
            check_texts(inputs, "input_ids", 2)
            check_cache(cache, inputs.shape[0])
        if input_name == "input_ids" and (cache is None or cache.get_seq_length() == 0):
            inputs, model_kwargs["attention_mask"] = self._prepare_prompt(inputs, model_kwargs.get("attention_mask"))
        return inputs, input_name, model_kwargs

    def _prepare_prompt(
        self, input_ids: torch.LongTensor, attention_mask: torch.Tensor | None
    ) -> tuple[torch.LongTensor, torch.Tensor]:
        """
        Prompts as they came from the tokenizer -> prompts that can be continued, padded on the left.

        CLIP tokenizers end every text with EOS, and stock pipelines pass it on. A prompt that ends in EOS is taken as the
        prompt without it, so `""` starts a caption.
        """
        if attention_mask is None:
            real = real_tokens(input_ids, self.config.text_config.pad_token_id)
        elif attention_mask.shape == input_ids.shape:
            real = attention_mask.bool()
        else:
            raise ValueError(
                f"`attention_mask` must have the shape of `input_ids` {tuple(input_ids.shape)}, got "
                f"{tuple(attention_mask.shape)}."
            )
        columns = torch.arange(input_ids.shape[1], device=input_ids.device)
        last = (columns * real).argmax(dim=-1, keepdim=True)
        is_eos = is_one_of(input_ids.gather(1, last), self.generation_config.eos_token_id)
        ends_in_eos = is_eos & (real.sum(dim=-1, keepdim=True) > 1)
        real = real & ~(ends_in_eos & (columns == last))
        order = real.long().argsort(dim=-1, stable=True)  # padding to the left, tokens in their order
        lengths, tokens = real.sum(dim=-1), input_ids.masked_fill(~real, 0)
        # Read in one go, as a GPU is waited for. An id that is not there would break it for good
        longest, shortest, low, high = torch.stack([lengths.max(), lengths.min(), tokens.min(), tokens.max()]).tolist()
        if shortest == 0:
            raise ValueError(
                f"`input_ids` have no token in row {int(lengths.argmin())}, only padding: a caption starts with "
                f"`bos_token_id` ({self.config.text_config.bos_token_id})."
            )
        if low < 0 or high >= self.config.text_config.vocab_size:
            raise ValueError(
                f"`input_ids` hold {low if low < 0 else high}, and `text_config.vocab_size` is "
                f"{self.config.text_config.vocab_size}: use the tokenizer that came with the model, or "
                "`resize_token_embeddings`."
            )
        first = input_ids.shape[1] - longest
        real = real.gather(1, order)[:, first:]
        input_ids = input_ids.gather(1, order)[:, first:]
        if self.generation_config.pad_token_id is not None:
            input_ids = input_ids.masked_fill(~real, self.generation_config.pad_token_id)
        return input_ids, real.long()

    def _prepare_attention_mask_for_generation(self, inputs_tensor, generation_config, model_kwargs):
        # Made with the prompt. The base class would mask every token with the padding's id, a real one in CLIP's vocabulary.
        if model_kwargs.get("attention_mask") is not None:
            return model_kwargs["attention_mask"]
        return torch.ones(inputs_tensor.shape[:2], dtype=torch.long, device=inputs_tensor.device)

    def _maybe_prepare_encoder_kwargs_for_generation(
        self, inputs_tensor, model_kwargs, model_input_name, generation_config
    ):
        """Images are encoded here, once, before beams multiply the batch."""
        images = {k: model_kwargs.pop(k, None) for k in ("pixel_values", "image_hidden_states")}
        interpolate_pos_encoding = model_kwargs.pop("interpolate_pos_encoding", False)
        check_one_image_input(**images, encoder_hidden_states=model_kwargs.get("encoder_hidden_states"))
        for name in ("num_beams", "num_return_sequences"):
            value = getattr(generation_config, name)
            if value is not None and not (isinstance(value, int) and value >= 1):
                raise ValueError(f"`{name}` must be a whole number of at least 1, got {value!r}.")
        scale = generation_config.guidance_scale
        if scale is None and model_kwargs.get("null_image_tokens") is not None:
            raise ValueError("`null_image_tokens` are for guidance: give a `guidance_scale` too.")
        if scale is not None and not (isinstance(scale, (int, float)) and 0 <= scale < float("inf")):
            raise ValueError(f"`guidance_scale` must be a number from 0 (the null image alone) upwards, got {scale!r}.")
        if scale not in (None, 1) and model_kwargs.get("null_image_tokens") is None:
            model_kwargs["null_image_tokens"] = self.get_null_image_tokens(
                images["pixel_values"], interpolate_pos_encoding
            )
        cache = model_kwargs.get(CACHE_NAME)
        if any(value is not None for value in images.values()) and not has_image(cache):
            _, model_kwargs["encoder_hidden_states"], _ = self.model.encode_image(
                **images, need_embedding=False, interpolate_pos_encoding=interpolate_pos_encoding
            )
        check_image_tokens(model_kwargs.get("encoder_hidden_states"), self.text_decoder.kv_size, cache, inputs_tensor)
        return model_kwargs

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs):
        """Image tokens stay one set an image: the beams of an image share them, see `CocaAttention`."""
        image_tokens = {
            k: model_kwargs.pop(k) for k in ("encoder_hidden_states", "null_image_tokens") if k in model_kwargs
        }
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        return input_ids, {**model_kwargs, **image_tokens}

    def _prepare_generated_length(
        self, generation_config, has_default_max_length, model_input_name, input_ids_length, inputs_tensor, **kwargs
    ):
        """Generation ends with the context, there being no positions after it; that is also the default length."""
        context = self.config.text_config.max_text_length
        prompt_length = max(input_ids_length, inputs_tensor.shape[1])
        limit = context - (prompt_length - input_ids_length)  # `inputs_embeds` alone are not counted in `max_length`
        if has_default_max_length and generation_config.max_new_tokens is None:
            generation_config.max_new_tokens = max(limit - input_ids_length, 0)
        generation_config = super()._prepare_generated_length(
            generation_config=generation_config,
            has_default_max_length=has_default_max_length,
            model_input_name=model_input_name,
            input_ids_length=input_ids_length,
            inputs_tensor=inputs_tensor,
            **kwargs,
        )
        if prompt_length >= context:
            raise ValueError(
                f"The prompt has {prompt_length} tokens, the model's context is {context} "
                "(`text_config.max_text_length`): shorten the prompt."
            )
        if generation_config.max_length > limit:
            logger.info(f"Generation stops at the model's context of {context} tokens.")
            generation_config.max_length = limit
        return generation_config

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    ):
        super()._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )
        cache = model_kwargs.get(CACHE_NAME)
        if cache is None or isinstance(cache, CocaCache):
            return
        if isinstance(cache, EncoderDecoderCache):  # a user's: beams must not reorder its cross-attention half
            own = CocaCache(cache.self_attention_cache, cache.cross_attention_cache)
            cache.is_updated = own.is_updated  # so that the user's knows what is in it
            model_kwargs[CACHE_NAME] = own
            return
        cross_attention_cache = DynamicCache()
        if isinstance(cache, StaticCache) and model_kwargs.get("encoder_hidden_states") is not None:
            text_config = self.config.text_config
            cross_config = type(text_config).from_dict(
                {**text_config.to_dict(), "num_hidden_layers": text_config.num_multimodal_layers}
            )
            num_image_tokens = model_kwargs["encoder_hidden_states"].shape[1]
            cross_attention_cache = StaticCache(config=cross_config, max_cache_len=num_image_tokens)
        model_kwargs[CACHE_NAME] = CocaCache(cache, cross_attention_cache)

    def _get_logits_processor(self, generation_config, *args, model_kwargs=None, **kwargs) -> LogitsProcessorList:
        """`guidance_scale` contrasts with a null image, where the base class contrasts with another prompt."""
        model_kwargs = {} if model_kwargs is None else model_kwargs
        null_image_tokens, scale = model_kwargs.pop("null_image_tokens", None), generation_config.guidance_scale
        if scale in (None, 1):
            return super()._get_logits_processor(generation_config, *args, model_kwargs=model_kwargs, **kwargs)
        if kwargs.get("negative_prompt_ids") is not None:
            raise ValueError(
                "`guidance_scale` contrasts the image with a null image: leave out `negative_prompt_ids`. Another null image "
                "can be given as `null_image_tokens`."
            )
        if model_kwargs.get("inputs_embeds") is not None:
            raise ValueError("`guidance_scale` needs the prompt as `input_ids`, not as `inputs_embeds`.")
        guidance = CocaGuidanceLogitsProcessor(
            self, scale, null_image_tokens, model_kwargs.get("attention_mask"), generation_config.use_cache
        )
        generation_config.guidance_scale = None  # for the base class
        processors = super()._get_logits_processor(generation_config, *args, model_kwargs=model_kwargs, **kwargs)
        generation_config.guidance_scale = scale
        return LogitsProcessorList([guidance, *processors])

    def prepare_inputs_for_generation(
        self,
        input_ids,
        *args,
        is_first_iteration=False,
        inputs_embeds=None,
        encoder_hidden_states=None,
        null_image_tokens=None,
        **kwargs,
    ):
        model_inputs = super().prepare_inputs_for_generation(
            input_ids, *args, is_first_iteration=is_first_iteration, inputs_embeds=inputs_embeds, **kwargs
        )
        # By the cache, not by `is_first_iteration`, which is never true for an assistant model
        if encoder_hidden_states is not None and not has_image(model_inputs.get(CACHE_NAME)):
            model_inputs["encoder_hidden_states"] = encoder_hidden_states
        text_config, mask = self.config.text_config, kwargs.get("attention_mask")
        if text_config.shifted_cls_mask and inputs_embeds is None:
            # Only here are the ids of the cached tokens at hand
            real = torch.ones_like(input_ids) if mask is None else mask
            if real.shape == input_ids.shape:
                shifted = hide_after_pad_id(input_ids, real.bool(), text_config.pad_token_id)
                if not torch.equal(shifted, real.bool()):
                    model_inputs["text_attention_mask"] = shifted
        return model_inputs
