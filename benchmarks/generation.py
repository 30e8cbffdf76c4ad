"""How much faster are captions? Greedy and beams, ours and open_clip's CoCa with the same weights, images already on the device.

    python benchmarks/generation.py --output generation.json

30 new tokens, end-of-text disabled, so that all write equally many. All must write the same tokens before they are timed.
"packed" is ours after `pack_linear_layers()`.
"""

import torch
from harness import benchmark_parser, race, report, summary
from open_clip_peer import OpenClipGenerator, greedy, load_pair, our_captions, packed


def main(argv: list[str] | None = None) -> dict:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--num_beams", type=int, nargs="+", default=[1, 6])
    parser.add_argument("--new_tokens", type=int, default=30)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    theirs, ours = load_pair(args.model, args.device, args.dtype)
    generator, ours_packed = OpenClipGenerator(theirs), packed(ours)
    size = ours.config.vision_config.image_size
    rows = {}
    for num_beams in args.num_beams:
        for batch_size in args.batch_sizes if num_beams == 1 else args.batch_sizes[:1]:
            images = torch.randn(batch_size, 3, size, size, device=args.device, dtype=getattr(torch, args.dtype))
            contestants = {
                "open_clip": (
                    (lambda images=images: greedy(theirs, images, args.new_tokens))
                    if num_beams == 1
                    else (lambda images=images, n=num_beams: generator.beams(images, args.new_tokens, n))
                ),
                "ours": lambda images=images, n=num_beams: our_captions(ours, images, args.new_tokens, n),
            }
            if ours_packed is not None:
                contestants["packed"] = lambda images=images, n=num_beams: our_captions(
                    ours_packed, images, args.new_tokens, n
                )
            written = {name: run() for name, run in contestants.items()}
            equal = all(torch.equal(written["open_clip"], ids) for ids in written.values())
            if not equal and args.dtype == "float32":
                raise AssertionError(f"Different captions for batch {batch_size}, {num_beams} beams: no timing.")
            seconds = race(contestants, args.device, args.rounds)
            row = summary(seconds, "open_clip")
            row["equal_tokens"] = (written["open_clip"] == written["ours"]).float().mean().item()
            row["ours_tokens_per_s"] = batch_size * args.new_tokens / row["ours"]["median_s"]
            rows[f"{'greedy' if num_beams == 1 else f'{num_beams} beams'}, batch {batch_size}"] = row
    report("Captions of 30 new tokens", rows, args, "open_clip")
    return rows


if __name__ == "__main__":
    main()
