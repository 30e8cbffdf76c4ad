"""One function over all images of a source: sources, workers, processes, resuming and progress, for every job."""

import os
from collections.abc import Callable, Container, Iterator, Sequence
from typing import Any

import torch
from transformers import ProcessorMixin
from transformers.utils import logging

from .journal import Journal, begun_settings
from .loading import ImageLoader, ImageRef, default_num_workers
from .sources import ImageShard, open_images


def map_images(
    images: Any,
    output: str | os.PathLike | None,
    load: Callable[[], tuple[Callable[[torch.Tensor], list[dict[str, Any]]], ProcessorMixin]],
    settings: dict[str, Any],
    *,
    description: str = "Images",
    batch_size: int = 32,
    num_workers: int | None = None,
    source_kwargs: dict[str, Any] | None = None,
    skip: Container[str] = (),
    fast_decode: bool = False,
    output_format: str = "jsonl",
    overwrite: bool = False,
    show_progress: bool = True,
    seed: int = 0,
) -> list[dict[str, Any]] | dict[str, Any] | None:
    """
    Calls a function with all images of a source, in batches, and writes down a row for each image.

    With an `output` the work can be killed at any time and taken up again by the same call: it goes on where it was.
    Under `accelerate launch` or `torchrun` each process takes its share of the shards, without talking to the others;
    they must see the same files.

    Args:
        images: see [`open_images`].
        output (`str`, *optional*):
            A `.jsonl` or `.parquet` file, or a folder for a file a shard. Without it the rows are returned.
        load (`Callable`):
            Gives the function, which turns `pixel_values` `(B, 3, H, W)` into `B` dicts and has its model as `model`, and
            the processor. Called when it is clear that there is work.
        settings (`dict`): what the rows depend on beside the images. A job is taken up again with the same ones only.
        description (`str`): in front of the progress bar.
        batch_size (`int`, defaults to 32): images at a time.
        num_workers (`int`, *optional*):
            Processes that decode and resize; by default one for each CPU core but one, up to 8, where there is more than
            one batch.
        source_kwargs (`dict`, *optional*): of [`open_images`].
        skip (`Container[str]`): ids of images to leave out.
        fast_decode (`bool`): decode JPEGs that are much larger than the model's images at a half, a quarter or an eighth of
            their size. Several times faster; pixels differ a little from the processor's own.
        output_format (`str`, defaults to `"jsonl"`): of the files in a folder, or `"parquet"`.
        overwrite (`bool`): throw away an output that is there.
        show_progress (`bool`): show a bar with images a second and the time left, where there is more than one batch.
        seed (`int`): of random numbers.

    Returns:
        - without `output`, `list[dict]`: for each image, in order, its `id`, its kept columns and what the function
          gives, or `error`, the reason why it could not be read;
        - with it, `dict`: `output`, `images` (their number) and `failed`, pairs of id and reason. `None` in a process
          that is not the last to end.
    """
    process, num_processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    source_kwargs = {
        name: os.fspath(value) if isinstance(value, os.PathLike) else value  # they are written down
        for name, value in (source_kwargs or {}).items()
        if value is not None
    }
    if output is None and num_processes > 1:
        raise ValueError("Give an `output`: several processes have no list of rows to return.")
    begun = {} if output is None or overwrite else begun_settings(output)
    is_given = "shard_size" in source_kwargs
    source_kwargs.setdefault("shard_size", begun.get("shard_size", 1024))  # whatever the number of processes is now
    shards = open_images(images, **source_kwargs)
    if not begun and not is_given and len(shards) < 4 * num_processes > 4:  # too few to share out evenly
        number = sum(shard.size or 0 for shard in shards)
        source_kwargs["shard_size"] = max(1, number // (4 * num_processes))
        shards = open_images(images, **source_kwargs)
    journal = None
    if output is not None:
        sources = [str(image) for image in images] if isinstance(images, (list, tuple)) else [str(images)]
        settings = {
            "images": sources if len(sources) <= 100 else len(sources),
            "number of images": sum(shard.size or 0 for shard in shards),
            **source_kwargs,
            "fast_decode": fast_decode,
            **settings,
        }
        journal = Journal(output, settings, len(shards), process, num_processes, output_format, overwrite)
    mine = range(len(shards)) if journal is None else journal.mine
    todo = [shard for shard in mine if journal is None or not journal.is_done(shard)]
    rows: Iterator[tuple[ImageRef, dict[str, Any]]] = iter(())
    if todo:
        function, processor = load()
        torch.manual_seed(seed + process)
        rows = _run(
            function,
            processor,
            shards,
            todo,
            skip,
            fast_decode,
            journal,
            description,
            batch_size,
            num_workers,
            show_progress,
        )
    if journal is None:
        return [row for _, row in sorted(rows, key=lambda item: item[0][:2])]
    try:
        for _ in rows:
            pass
    finally:
        journal.release()
    return journal.close()


def _run(
    function: Callable[[torch.Tensor], list[dict[str, Any]]],
    processor: ProcessorMixin,
    shards: Sequence[ImageShard],
    todo: Sequence[int],
    skip: Container[str],
    fast_decode: bool,
    journal: Journal | None,
    description: str,
    batch_size: int,
    num_workers: int | None,
    show_progress: bool,
) -> Iterator[tuple[ImageRef, dict[str, Any]]]:
    """Rows as they are made; a journal has them before."""
    sizes = {shard: shards[shard].size for shard in todo}
    few = sum(batch_size + 1 if size is None else size for size in sizes.values()) <= batch_size
    device = function.model.device
    num_workers = default_num_workers(device, not few) if num_workers is None else num_workers
    if not few:
        function.model.pack_linear_layers()

    def refs_of(shard: int) -> list[ImageRef]:
        listed = [item for item in shards[shard].list() if item[0] not in skip]
        done = journal.begin(shard, len(listed)) if journal is not None else set()
        refs = [ImageRef(shard, place, name, key) for place, (name, key) in enumerate(listed) if place not in done]
        sizes[shard] = len(refs)
        return refs

    loader = ImageLoader(
        shards,
        processor.image_processor,
        batch_size,
        num_workers,
        map(refs_of, todo),
        pin_memory=device.type == "cuda",
        fast_decode=fast_decode,
    )
    with logging.tqdm(total=0, unit="img", desc=description, disable=few or not show_progress, smoothing=0.05) as bar:
        for batch in loader:
            rows = [(ref, {"id": ref.id, "error": reason}) for ref, reason in batch.errors]
            if batch.refs:
                rows += [
                    (ref, {"id": ref.id, **kept, **result})
                    for ref, kept, result in zip(batch.refs, batch.kept, function(batch.pixel_values), strict=True)
                ]
            if journal is not None:
                for shard in {ref.shard for ref, _ in rows}:
                    journal.write(shard, [(ref.position, row) for ref, row in rows if ref.shard == shard])
            known = [size for size in sizes.values() if size is not None]
            bar.total = round(sum(known) * len(sizes) / len(known))  # tar files are counted when they are opened
            bar.update(len(rows))
            yield from rows


__all__ = ["map_images"]
