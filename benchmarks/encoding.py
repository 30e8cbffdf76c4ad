"""How much faster are embeddings of images and of texts? Ours and open_clip's CoCa with the same weights.

    python benchmarks/encoding.py --output encoding.json

Texts have as many tokens as captions do (12, give or take 3, BOS and EOS included). open_clip's text tower always works on the whole context
of 76 tokens, which is how its tokenizer pads; ours on the longest text of the batch. Embeddings must agree before they are timed.
"""

import torch
from harness import benchmark_parser, race, report, summary
from open_clip_peer import BOS, EOS, load_pair, packed


def caption_like_texts(batch_size: int, context: int, vocab_size: int, seed: int = 0) -> torch.Tensor:
    """(B, context) token ids padded with 0: lengths are normal around 12 with a deviation of 3, from 5 to 24."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.normal(12.0, 3.0, (batch_size,), generator=generator).round().long().clamp(5, min(24, context))
    ids = torch.randint(1, min(BOS, vocab_size - 2), (batch_size, context), generator=generator)
    columns = torch.arange(context)
    ids[:, 0] = BOS
    ids[columns == lengths[:, None] - 1] = EOS
    return ids.masked_fill(columns >= lengths[:, None], 0)


def main(argv: list[str] | None = None) -> dict:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 16, 64])
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    theirs, ours = load_pair(args.model, args.device, args.dtype)
    ours_packed = packed(ours)
    our_models = {"ours": ours.model} | ({} if ours_packed is None else {"packed": ours_packed.model})
    text_config, size = ours.config.text_config, ours.config.vision_config.image_size
    rows = {}
    for kind in ("images", "texts"):
        for batch_size in args.batch_sizes:
            if kind == "images":
                images = torch.randn(batch_size, 3, size, size, device=args.device, dtype=getattr(torch, args.dtype))
                contestants = {"open_clip": lambda images=images: theirs.encode_image(images, normalize=False)}
                contestants |= {
                    name: lambda images=images, model=model: model.get_image_features(images).pooler_output
                    for name, model in our_models.items()
                }
            else:
                texts = caption_like_texts(batch_size, text_config.max_text_length, text_config.vocab_size).to(
                    args.device
                )
                short = texts[:, : (texts != 0).sum(-1).max()]
                contestants = {"open_clip": lambda texts=texts: theirs.encode_text(texts, normalize=False)}
                contestants |= {
                    name: lambda short=short, model=model: model.get_text_features(short, short != 0).pooler_output
                    for name, model in our_models.items()
                }
            with torch.inference_mode():
                expected, *embeddings = (run().float() for run in contestants.values())
                difference = max(((found - expected).abs().max() / expected.abs().max()).item() for found in embeddings)
                if difference > (1e-5 if args.dtype == "float32" else 0.05):
                    raise AssertionError(f"Different embeddings of {kind}, by {difference}: no timing.")
                row = summary(race(contestants, args.device, args.rounds), "open_clip")
            rows[f"{kind}, batch {batch_size}"] = {**row, "relative_difference": difference}
    report("Embeddings", rows, args, "open_clip")
    return rows


if __name__ == "__main__":
    main()
