"""From JPEG files to captions: images a second, end to end, ours and open_clip's CoCa with the same weights.

    python benchmarks/folder.py --output folder.json

open_clip's side is the loop that its users write: open each file, its own transform, batches, greedy captions. Ours is
`caption_images`, what `coca caption` does, log-probabilities and contrastive scores included. With random weights no caption ends by
itself: both write `--new_tokens` tokens, which must be equal.
"""

import io
import tempfile
import time
from pathlib import Path

import open_clip
import torch
from harness import benchmark_parser, report, summary
from open_clip_peer import EOS, greedy, load_pair
from PIL import Image

from modeling_coca import CocaImageProcessorPil, CocaProcessor, CocaTokenizer
from modeling_coca.inference import caption_images


def write_photos(folder: Path, count: int, size: tuple[int, int] = (640, 480)) -> None:
    """JPEG files as a camera's: smooth areas with some detail, all different."""
    generator = torch.Generator().manual_seed(0)
    for i in range(count):
        coarse = torch.rand(1, 3, 6, 8, generator=generator)
        fine = torch.rand(1, 3, size[1] // 4, size[0] // 4, generator=generator)
        shape = {"size": size[::-1], "mode": "bicubic"}
        pixels = 0.8 * torch.nn.functional.interpolate(coarse, **shape) + 0.2 * torch.nn.functional.interpolate(
            fine, **shape
        )
        array = (pixels[0].permute(1, 2, 0).clamp(0, 1) * 255).byte().numpy()
        Image.fromarray(array).save(folder / f"{i:05}.jpg", quality=90)


def main(argv: list[str] | None = None) -> dict:
    parser = benchmark_parser(__doc__, rounds=3)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--new_tokens", type=int, default=20)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    theirs, ours = load_pair(args.model, args.device, args.dtype)
    size = ours.config.vision_config.image_size
    transform = open_clip.image_transform(size, is_train=False)
    bpe = open_clip.SimpleTokenizer()
    image_processor = CocaImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    tokenizer = CocaTokenizer.from_open_clip_bpe(model_max_length=ours.config.text_config.max_text_length)
    processor = CocaProcessor(image_processor, tokenizer)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_photos(folder, args.images)
        paths = sorted(folder.iterdir())

        def open_clip_folder() -> list[str]:
            texts = []
            for start in range(0, len(paths), args.batch_size):
                opened = [Image.open(io.BytesIO(path.read_bytes())) for path in paths[start : start + args.batch_size]]
                images = torch.stack([transform(image) for image in opened]).to(args.device, getattr(torch, args.dtype))
                texts += [bpe.decode(row[1:].tolist()) for row in greedy(theirs, images, args.new_tokens)]
            return texts

        def our_folder() -> list[str]:
            rows = caption_images(
                folder,
                model=ours,
                processor=processor,
                batch_size=args.batch_size,
                num_workers=0,
                show_progress=False,
                max_new_tokens=args.new_tokens,
                num_beams=1,
                suppress_tokens=[EOS],
            )
            return [row["caption"] for row in rows]

        contestants = {"open_clip": open_clip_folder, "ours": our_folder}
        seconds = {name: [] for name in contestants}
        for _ in range(args.rounds):
            written = {}
            for name, run in contestants.items():
                start = time.perf_counter()
                written[name] = run()
                seconds[name].append(time.perf_counter() - start)
        plain = [["".join(text.split()) for text in texts] for texts in written.values()]
        same = sum(a == b for a, b in zip(*plain, strict=True)) / args.images
    row = {**summary(seconds, "open_clip"), "same_captions": same}
    row["images_per_s"] = {name: args.images / row[name]["median_s"] for name in contestants}
    rows = {f"{args.images} JPEG files, {args.new_tokens} tokens, batch {args.batch_size}": row}
    report("From files to captions (clock)", rows, args, "open_clip")
    print(f"captions that are the same: {same:.3f}; images a second: {row['images_per_s']}")
    return rows


if __name__ == "__main__":
    main()
