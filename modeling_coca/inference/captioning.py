"""Captions with their log-probability, contrastive score and the image's embedding, from one pass over the image."""

import copy
import os
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, ProcessorMixin
from transformers.utils import ModelOutput

from modeling_coca.generation_coca import is_one_of

from .loading import load_for_inference
from .mapping import map_images

_LOGITS_AT_A_TIME = 2**24  # 64 MB of fp32
_LOGITS_TO_KEEP = 2**27  # 512 MB


class CocaCaptioner:
    """
    Captions images that are batches of pixels.

    The image encoder runs once an image. Its tokens go to `generate()`, whose logits give the log-probability; the captions
    then go once through the unimodal text tower, all tokens at the same time, for the embedding of the contrastive score.
    Where the logits of all steps would take too much memory, the captions go once through the decoder, too.

    Args:
        model ([`CocaForConditionalGeneration`]), processor ([`CocaProcessor`]): see [`load_for_inference`].
        prompt (`str`, *optional*): how each caption begins.
        best_of (`int`, defaults to 1):
            Captions to write for each image, of which those with the best contrastive scores are kept. They are sampled,
            unless `num_beams` is at least that many.
        num_captions (`int`, defaults to 1): captions to keep, different ones; fewer where there are not as many.
        embeddings (`bool`, defaults to `False`): give the image's embedding, too.
        answer_only (`bool`, defaults to `False`):
            The prompt is a question: rows have the text after it, as `answer` instead of `caption`, and no score.
        **generation_kwargs: of `generate`: `num_beams`, `max_new_tokens`, `do_sample`, `temperature`, `top_p`, ...

    Example:

    ```python
    >>> from modeling_coca.inference import CocaCaptioner

    >>> captioner = CocaCaptioner(model, processor, num_beams=3)  # doctest: +SKIP
    >>> captioner(processor(images=[image], return_tensors="pt")["pixel_values"])  # doctest: +SKIP
    [{'caption': 'a red apple', 'log_prob': -0.4, 'num_tokens': 4, 'score': 0.83}]
    ```
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        *,
        prompt: str | None = None,
        best_of: int = 1,
        num_captions: int = 1,
        embeddings: bool = False,
        answer_only: bool = False,
        **generation_kwargs: Any,
    ):
        if not 1 <= num_captions <= best_of:
            raise ValueError(f"`num_captions` ({num_captions}) must be from 1 to `best_of` ({best_of}).")
        self.model, self.tokenizer = model, processor.tokenizer
        self.best_of, self.num_captions, self.embeddings = best_of, num_captions, embeddings
        self.generation_kwargs = {"do_sample": best_of > max(1, generation_kwargs.get("num_beams") or 1)}
        self.generation_kwargs |= {name: value for name, value in generation_kwargs.items() if value is not None}
        self.generation_kwargs["num_return_sequences"] = best_of
        ids = self.tokenizer(prompt or "")["input_ids"]
        if len(ids) > 1 and ids[-1] == self.tokenizer.eos_token_id:
            ids = ids[:-1]
        self.prompt_ids = torch.tensor(ids)
        self.answer_only = answer_only

    @torch.inference_mode()
    def __call__(self, pixel_values: torch.Tensor) -> list[dict[str, Any]]:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(B, 3, H, W)`): images, on any device.

        Returns:
            `list[dict]`, one for each image:

            - `caption` (`str`), the best one,
            - `log_prob` (`float`), that the model gives its tokens after the prompt, the end of the text included,
            - `num_tokens` (`int`), their number,
            - `score` (`float`), the cosine of image and caption,
            - `captions` (`list[dict]`), the `num_captions` best with these four, if `num_captions` is more than one,
            - `embedding` (array of shape `(projection_dim,)`), L2-normalised, if asked for.
        """
        model = self.model
        features = model.get_image_features(pixel_values.to(model.device, model.dtype, non_blocking=True))
        image_tokens, image_embeds = features.pooler_output, features.image_embeds.float()
        prompts = self.prompt_ids.to(model.device).expand(len(image_tokens), -1)
        written = model.generate(
            encoder_hidden_states=image_tokens,
            input_ids=prompts,
            attention_mask=torch.ones_like(prompts),
            return_dict_in_generate=True,
            output_logits=len(prompts) * self._logits_per_image() <= _LOGITS_TO_KEEP,
            **self.generation_kwargs,
        )
        sequences = written.sequences
        log_probs, num_tokens, text_embeds = self._read(written, image_tokens)
        scores = (text_embeds.unflatten(0, (-1, self.best_of)) * image_embeds[:, None]).sum(-1)  # [B, best_of]
        start = len(self.prompt_ids) if self.answer_only else 0
        texts = self.tokenizer.batch_decode(sequences[:, start:], skip_special_tokens=True)
        columns = (texts, log_probs.tolist(), num_tokens.tolist(), scores.flatten().tolist())
        candidates = [
            {"caption": text.strip(), "log_prob": log_prob, "num_tokens": number, "score": score}
            for text, log_prob, number, score in zip(*columns, strict=True)
        ]
        embeddings = image_embeds.cpu().numpy() if self.embeddings else None
        rows = []
        for i in range(len(image_tokens)):
            ranked = sorted(candidates[i * self.best_of : (i + 1) * self.best_of], key=lambda c: -c["score"])
            row = dict(ranked[0])
            if self.answer_only:
                row = {"answer": row["caption"], "log_prob": row["log_prob"], "num_tokens": row["num_tokens"]}
            if self.num_captions > 1:
                row["captions"] = list({c["caption"]: c for c in reversed(ranked)}.values())[::-1][: self.num_captions]
            if self.embeddings:
                row["embedding"] = embeddings[i]
            rows.append(row)
        return rows

    def _logits_per_image(self) -> int:
        """How many `generate` makes at the most."""
        text, settings = self.model.config.text_config, copy.deepcopy(self.model.generation_config)
        settings.update(**self.generation_kwargs)
        start = len(self.prompt_ids)
        longest = min(settings.max_length or text.max_text_length, text.max_text_length) - start
        steps = longest if settings.max_new_tokens is None else settings.max_new_tokens
        return max(settings.num_beams or 1, self.best_of) * steps * text.vocab_size

    def _read(
        self, written: ModelOutput, image_tokens: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Log-probabilities and numbers of the tokens after the prompt (R,), and text embeddings (R, projection_dim)."""
        model, sequences, start = self.model, written.sequences, len(self.prompt_ids)
        eos = model.generation_config.eos_token_id
        is_eos = is_one_of(sequences, eos) & (torch.arange(sequences.shape[1], device=sequences.device) >= start)
        real = (is_eos.cumsum(-1) - is_eos.long()) == 0  # up to the first EOS
        counted = real[:, start:]
        ids = sequences
        if not is_eos.any(-1).all() and sequences.shape[1] < model.config.text_config.max_text_length:
            # The embedding is that of a text with an end, also where `max_new_tokens` cut it off
            end = torch.tensor(eos, device=ids.device).reshape(-1)[0].expand(len(ids), 1)
            ids = torch.cat([ids, end], dim=1)
            real = torch.cat([real, ~is_eos.any(-1, keepdim=True)], dim=1)
        text = model.model.text_model(input_ids=ids, attention_mask=real.long(), output_embedding=True)
        text_embeds = F.normalize(model.model.text_projection(text.pooler_output).float(), dim=-1)
        targets = sequences[:, start:]
        if written.logits is None:
            length = sequences.shape[1]
            log_probs = self._log_probs_of(
                text.last_hidden_state[:, : length - 1], real[:, : length - 1], targets, image_tokens
            )
        else:
            # Beams change places: `beam_indices` tells whose logits a token was chosen from, -1 after the end
            beams = getattr(written, "beam_indices", None)
            log_probs = torch.stack(
                [
                    -F.cross_entropy(
                        logits if beams is None else logits[beams[:, step].clamp(min=0)], tokens, reduction="none"
                    )
                    for step, (logits, tokens) in enumerate(zip(written.logits, targets.unbind(1), strict=False))
                ],
                dim=1,
            )
        return log_probs.masked_fill(~counted, 0).sum(-1), counted.sum(-1), text_embeds

    def _log_probs_of(
        self, states: torch.Tensor, mask: torch.Tensor, targets: torch.Tensor, image_tokens: torch.Tensor
    ) -> torch.Tensor:
        """(R, T) log-probabilities of the last T tokens, from the decoder, over the unimodal states of all before them."""
        model, length = self.model, targets.shape[1]
        decoded = model.text_decoder(states, image_tokens, attention_mask=mask.long()).last_hidden_state[:, -length:]
        rows = max(1, _LOGITS_AT_A_TIME // max(1, length * model.config.text_config.vocab_size))
        return torch.cat(
            [
                -F.cross_entropy(model.lm_head(some).float().transpose(1, 2), tokens, reduction="none")
                for some, tokens in zip(decoded.split(rows), targets.split(rows), strict=True)
            ]
        )


def caption_images(
    images: Any,
    output: str | os.PathLike | None = None,
    *,
    model: str | os.PathLike | PreTrainedModel,
    processor: ProcessorMixin | None = None,
    batch_size: int = 32,
    num_workers: int | None = None,
    device: str | None = None,
    dtype: str | None = None,
    source_kwargs: dict[str, Any] | None = None,
    fast_decode: bool = False,
    output_format: str = "jsonl",
    overwrite: bool = False,
    show_progress: bool = True,
    seed: int = 0,
    **captioner_kwargs: Any,
) -> list[dict[str, Any]] | dict[str, Any] | None:
    """
    Captions all images of a source. What `coca caption` does.

    With an `output` the work can be killed at any time and taken up again by the same call, and shared by processes.

    Args:
        model, processor, device, dtype: see [`load_for_inference`].
        images, output and the rest, returns: see [`map_images`].
        **captioner_kwargs: see [`CocaCaptioner`].

    Example:

    ```python
    >>> from modeling_coca.inference import caption_images

    >>> caption_images("photos", "captions.parquet", model="outputs/quickstart", embeddings=True)  # doctest: +SKIP
    {'output': 'captions.parquet', 'images': 500, 'failed': []}
    ```
    """

    def load() -> tuple[CocaCaptioner, ProcessorMixin]:
        from modeling_coca import CocaForConditionalGeneration

        loaded = load_for_inference(model, CocaForConditionalGeneration, processor, device, dtype)
        return CocaCaptioner(*loaded, **captioner_kwargs), loaded[1]

    settings = {"model": str(getattr(model, "name_or_path", model)), **captioner_kwargs}
    return map_images(
        images,
        output,
        load,
        {name: value for name, value in settings.items() if value is not None},
        description="Captions",
        batch_size=batch_size,
        num_workers=num_workers,
        source_kwargs=source_kwargs,
        fast_decode=fast_decode,
        output_format=output_format,
        overwrite=overwrite,
        show_progress=show_progress,
        seed=seed,
    )


def ask_images(
    images: Any, question: str, output: str | os.PathLike | None = None, **kwargs: Any
) -> list[dict[str, Any]] | dict[str, Any] | None:
    """
    Asks the same question about all images of a source: the model goes on writing after it. What `coca ask` does.

    Args:
        question (`str`): of a kind that the model was trained with.
        images, output, **kwargs, returns: see [`caption_images`]. Rows have `answer`, its `log_prob` and `num_tokens`.

    Example:

    ```python
    >>> from modeling_coca.inference import ask_images

    >>> ask_images("apple.png", "what color is it?", model="outputs/quickstart")[0]["answer"]  # doctest: +SKIP
    'red'
    ```
    """
    if not question.strip():
        raise ValueError("The `question` is empty.")
    return caption_images(images, output, prompt=question, answer_only=True, **kwargs)


__all__ = ["CocaCaptioner", "ask_images", "caption_images"]
