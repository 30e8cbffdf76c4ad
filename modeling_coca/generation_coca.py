"""What `generate()` needs to know of CoCa: a decoder-only model whose images are read once, by cross-attention.

Everything else is transformers' own generation. The hooks stand in the order in which `generate` calls them.
"""

import torch
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache, StaticCache
from transformers.generation import GenerationMixin
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
    given = [name for name, value in inputs.items() if value is not None]
    if len(given) > 1:
        raise ValueError(f"Give one of {', '.join(f'`{name}`' for name in given)}: each stands for the image.")


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
    if encoder_hidden_states.ndim != 3 or encoder_hidden_states.shape[-1] != width:
        raise ValueError(
            f"`encoder_hidden_states` must have shape (batch, image tokens, {width}), got "
            f"{tuple(encoder_hidden_states.shape)}."
        )
    images, rows = encoder_hidden_states.shape[0], texts.shape[0]
    if rows % images or (one_text_each and rows != images):
        raise ValueError(f"There are {images} images for {rows} texts (`input_ids`): each text needs its image.")


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


class CocaGenerationMixin(GenerationMixin):
    """Hooks of transformers' generation, for [`CocaForConditionalGeneration`]."""

    def _prepare_model_inputs(self, inputs, bos_token_id, model_kwargs):
        if inputs is not None and inputs.ndim == 4 and model_kwargs.get("pixel_values") is None:
            inputs, model_kwargs = None, {"pixel_values": inputs, **model_kwargs}  # generate(pixel_values)
        inputs, input_name, model_kwargs = super()._prepare_model_inputs(inputs, bos_token_id, model_kwargs)
        cache = model_kwargs.get(CACHE_NAME)
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
        first = int(input_ids.shape[1] - real.sum(dim=-1).max())
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
        cache = model_kwargs.get(CACHE_NAME)
        if any(value is not None for value in images.values()) and not has_image(cache):
            _, model_kwargs["encoder_hidden_states"], _ = self.model.encode_image(
                **images, need_embedding=False, interpolate_pos_encoding=interpolate_pos_encoding
            )
        check_image_tokens(model_kwargs.get("encoder_hidden_states"), self.text_decoder.kv_size, cache, inputs_tensor)
        return model_kwargs

    def _expand_inputs_for_generation(
        self, expand_size=1, is_encoder_decoder=False, input_ids=None, encoder_hidden_states=None, **model_kwargs
    ):
        """Image tokens stay one set an image: the beams of an image share them, see `CocaAttention`."""
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        if encoder_hidden_states is not None:
            model_kwargs["encoder_hidden_states"] = encoder_hidden_states
        return input_ids, model_kwargs

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

    def prepare_inputs_for_generation(
        self, input_ids, *args, is_first_iteration=False, inputs_embeds=None, encoder_hidden_states=None, **kwargs
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
