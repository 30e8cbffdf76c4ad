"""Captions with their log-probability, contrastive score and the image's embedding, from one pass over the image."""

import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, ProcessorMixin
from transformers.utils import logging

from modeling_coca.generation_coca import is_one_of

from .journal import Journal, begun_settings
from .loading import ImageLoader, ImageRef, default_num_workers, load_for_inference
from .sources import ImageShard, open_images

logger = logging.get_logger(__name__)

_LOGITS_AT_A_TIME = 2**24  # 64 MB of fp32


class CocaCaptioner:
    """
    Captions images that are batches of pixels.

    The image encoder runs once an image. Its tokens go to `generate()`; the captions then go once through the text
    towers, all tokens at the same time, which gives their log-probability and the embedding for the contrastive score.

    Args:
        model ([`CocaForConditionalGeneration`]), processor ([`CocaProcessor`]): see [`load_for_inference`].
        prompt (`str`, *optional*): how each caption begins.
        best_of (`int`, defaults to 1):
            Captions to write for each image, of which those with the best contrastive scores are kept. They are sampled,
            unless `num_beams` is at least that many.
        num_captions (`int`, defaults to 1): captions to keep, different ones; fewer where there are not as many.
        embeddings (`bool`, defaults to `False`): give the image's embedding, too.
        answer_only (`bool`, defaults to `False`): leave the prompt out of the text: what a question is answered by.
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
        sequences = model.generate(
            encoder_hidden_states=image_tokens,
            input_ids=prompts,
            attention_mask=torch.ones_like(prompts),
            **self.generation_kwargs,
        )
        log_probs, num_tokens, text_embeds = self._read(sequences, image_tokens)
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
            if self.num_captions > 1:
                row["captions"] = list({c["caption"]: c for c in reversed(ranked)}.values())[::-1][: self.num_captions]
            if self.embeddings:
                row["embedding"] = embeddings[i]
            rows.append(row)
        return rows

    def _read(
        self, sequences: torch.Tensor, image_tokens: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Log-probabilities and numbers of the tokens after the prompt (R,), and text embeddings (R, projection_dim)."""
        model, start = self.model, len(self.prompt_ids)
        eos = model.generation_config.eos_token_id
        is_eos = is_one_of(sequences, eos) & (torch.arange(sequences.shape[1], device=sequences.device) >= start)
        real = (is_eos.cumsum(-1) - is_eos.long()) == 0  # up to the first EOS
        ids = sequences
        if not is_eos.any(-1).all() and sequences.shape[1] < model.config.text_config.max_text_length:
            # The embedding is that of a text with an end, also where `max_new_tokens` cut it off
            end = torch.tensor(eos, device=ids.device).reshape(-1)[0].expand(len(ids), 1)
            ids = torch.cat([ids, end], dim=1)
            real = torch.cat([real, ~is_eos.any(-1, keepdim=True)], dim=1)
        text = model.model.text_model(input_ids=ids, attention_mask=real.long(), output_embedding=True)
        text_embeds = F.normalize(model.model.text_projection(text.pooler_output).float(), dim=-1)
        length = sequences.shape[1]
        states = model.text_decoder(
            text.last_hidden_state[:, : length - 1], image_tokens, attention_mask=real[:, : length - 1].long()
        ).last_hidden_state[:, start - 1 :]
        targets, counted = sequences[:, start:], real[:, start:length]
        rows = max(1, _LOGITS_AT_A_TIME // max(1, states.shape[1] * model.config.text_config.vocab_size))
        log_probs = torch.cat(
            [
                -F.cross_entropy(model.lm_head(some).float().transpose(1, 2), tokens, reduction="none")
                for some, tokens in zip(states.split(rows), targets.split(rows), strict=True)
            ]
        )
        return log_probs.masked_fill(~counted, 0).sum(-1), counted.sum(-1), text_embeds


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
    output_format: str = "jsonl",
    overwrite: bool = False,
    show_progress: bool = True,
    seed: int = 0,
    **captioner_kwargs: Any,
) -> list[dict[str, Any]] | dict[str, Any] | None:
    """
    Captions all images of a source. What `coca caption` does.

    With an `output` the work can be killed at any time and taken up again by the same call: it goes on where it was.
    Under `accelerate launch` or `torchrun` each process takes its share of the shards, without talking to the others;
    they must see the same files.

    Args:
        images: see [`open_images`].
        output (`str`, *optional*):
            A `.jsonl` or `.parquet` file, or a folder for a file a shard. Without it the rows are returned.
        model, processor, device, dtype: see [`load_for_inference`].
        batch_size (`int`, defaults to 32): images at a time.
        num_workers (`int`, *optional*): processes that decode and resize; by default one for each CPU core but one, up
            to 8 on an accelerator, where there are more than a few images.
        source_kwargs (`dict`, *optional*): of [`open_images`].
        output_format (`str`, defaults to `"jsonl"`): of the files in a folder, or `"parquet"`.
        overwrite (`bool`): throw away an output that is there.
        show_progress (`bool`): show a bar with images a second and the time left.
        seed (`int`): of sampling.
        **captioner_kwargs: see [`CocaCaptioner`].

    Returns:
        - without `output`, `list[dict]`: for each image, in order, its `id`, its kept columns and what
          [`CocaCaptioner`] gives, or `error`, the reason why it could not be read;
        - with it, `dict`: `output`, `images` (their number) and `failed`, pairs of id and reason. `None` in a process
          that is not the last to end.

    Example:

    ```python
    >>> from modeling_coca.inference import caption_images

    >>> caption_images("photos", "captions.parquet", model="outputs/quickstart", embeddings=True)  # doctest: +SKIP
    {'output': 'captions.parquet', 'images': 500, 'failed': []}
    ```
    """
    process, num_processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    source_kwargs = {name: value for name, value in (source_kwargs or {}).items() if value is not None}
    if output is None and num_processes > 1:
        raise ValueError("Give an `output`: several processes have no list of rows to return.")
    begun = {} if output is None or overwrite else begun_settings(output)
    source_kwargs.setdefault("shard_size", begun.get("shard_size", 1024))  # whatever the number of processes is now
    shards = open_images(images, **source_kwargs)
    if not begun and len(shards) < 4 * num_processes > 4:  # too few to share out evenly
        number = sum(shard.size or 0 for shard in shards)
        source_kwargs["shard_size"] = max(1, number // (4 * num_processes))
        shards = open_images(images, **source_kwargs)
    journal = None
    if output is not None:
        settings = {
            "images": [str(image) for image in images] if isinstance(images, (list, tuple)) else str(images),
            "number of images": sum(shard.size or 0 for shard in shards),
            **source_kwargs,
            "model": str(getattr(model, "name_or_path", model)),
            **{name: value for name, value in captioner_kwargs.items() if value is not None},
        }
        journal = Journal(output, settings, len(shards), process, num_processes, output_format, overwrite)
    from modeling_coca import CocaForConditionalGeneration

    model, processor = load_for_inference(model, CocaForConditionalGeneration, processor, device, dtype)
    captioner = CocaCaptioner(model, processor, **captioner_kwargs)
    torch.manual_seed(seed + process)
    if num_workers is None:
        num_workers = default_num_workers(
            model.device, sum(shard.size or batch_size + 1 for shard in shards) > batch_size
        )
    rows = _caption(shards, captioner, processor, batch_size, num_workers, journal, show_progress)
    if journal is None:
        return [row for _, row in sorted(rows, key=lambda item: item[0][:2])]
    for _ in rows:
        pass
    return journal.close()


def _caption(
    shards: Sequence[ImageShard],
    captioner: CocaCaptioner,
    processor: ProcessorMixin,
    batch_size: int,
    num_workers: int,
    journal: Journal | None,
    show_progress: bool,
) -> Iterator[tuple[ImageRef, dict[str, Any]]]:
    """Rows as they are made; a journal has them before."""
    mine = range(len(shards)) if journal is None else journal.mine
    todo = [shard for shard in mine if journal is None or not journal.is_done(shard)]
    sizes = {shard: shards[shard].size for shard in todo}
    few = sum(batch_size + 1 if size is None else size for size in sizes.values()) <= batch_size
    bar = logging.tqdm(total=0, unit="img", desc="Captions", disable=few or not show_progress, smoothing=0.05)

    def refs_of(shard: int) -> list[ImageRef]:
        listed = shards[shard].list()
        done = journal.begin(shard, len(listed)) if journal is not None else set()
        refs = [ImageRef(shard, place, name, key) for place, (name, key) in enumerate(listed) if place not in done]
        sizes[shard] = len(refs)
        return refs

    with bar:
        loader = ImageLoader(
            shards,
            processor.image_processor,
            batch_size,
            num_workers,
            map(refs_of, todo),
            captioner.model.device.type == "cuda",
        )
        for batch in loader:
            rows = [(ref, {"id": ref.id, "error": reason}) for ref, reason in batch.errors]
            if batch.refs:
                captions = captioner(batch.pixel_values)
                rows += [
                    (ref, {"id": ref.id, **kept, **caption})
                    for ref, kept, caption in zip(batch.refs, batch.kept, captions, strict=True)
                ]
            if journal is not None:
                for shard in {ref.shard for ref, _ in rows}:
                    journal.write(shard, [(ref.position, row) for ref, row in rows if ref.shard == shard])
            known = [size for size in sizes.values() if size is not None]
            bar.total = round(sum(known) * len(sizes) / len(known))  # tar files are counted when they are opened
            bar.update(len(rows))
            yield from rows


__all__ = ["CocaCaptioner", "caption_images"]
