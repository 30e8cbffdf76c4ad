"""How cost grows: captions over the batch, time over beams, memory of the captioning loss, memory of training over the batch.

    python benchmarks/growth.py --output growth.json --picture growth.png

Captions are beside open_clip's with the same weights. Memory is that of tensors, counted exactly, gradients included and weights
not. The plain loss beside ours is `cross_entropy` over the logits of all tokens, as open_clip computes it.
"""

import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from harness import Clock, benchmark_parser, machine
from open_clip_peer import OpenClipGenerator, greedy, load_pair, our_captions
from peak_memory import PeakMemory

from modeling_coca.linear_coca import CocaLinear
from modeling_coca.loss_coca import caption_loss

COLORS = {"ours": "tab:blue", "at once": "tab:blue", "open_clip": "tab:gray", "logits of all tokens": "tab:gray"}


def peak_mb(run: Callable[[], None]) -> float:
    with PeakMemory() as memory:
        run()
    return memory.peak / 2**20


def loss_job(kind: str, texts: int, tokens: int, vocabulary: int, width: int, device: str) -> Callable[[], None]:
    torch.manual_seed(0)
    head = CocaLinear(width, vocabulary, bias=False, device=device)
    hidden = torch.randn(texts, tokens, width, device=device, requires_grad=True)
    labels = torch.randint(0, vocabulary, (texts, tokens), device=device)

    def run() -> None:
        if kind == "ours":
            loss = caption_loss(hidden, head, labels)
        else:
            loss = F.cross_entropy(head(hidden)[:, :-1].transpose(1, 2), labels[:, 1:])
        loss.backward()

    return run


def training_job(ours, chunk_size: int | None, batch_size: int, device: str) -> Callable[[], None]:
    size, text = ours.config.vision_config.image_size, ours.config.text_config
    images = torch.randn(batch_size, 3, size, size, device=device)
    ids = torch.randint(1, text.vocab_size - 2, (batch_size, min(12, text.max_text_length)), device=device)

    def run() -> None:
        ours.zero_grad()
        ours(ids, images, labels=ids, contrastive_chunk_size=chunk_size).loss.backward()

    return run


def seconds(run: Callable[[], None], device: str, rounds: int) -> float:
    clock, taken = Clock(device), []
    for _ in range(rounds + 1):
        start = clock()
        run()
        taken.append(clock() - start)
    return statistics.median(taken[1:])


def draw(curves: dict[str, dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 3, figsize=(13, 7), layout="constrained")
    for axis, (title, curve) in zip(axes.flat, curves.items(), strict=False):
        for name, values in curve["lines"].items():
            axis.plot(curve["x"], values, marker="o", label=name, color=COLORS.get(name, "tab:green"))
        axis.set(title=title, xlabel=curve["x_label"], ylabel=curve["y_label"], ylim=(0, None))
        axis.set_xscale("log", base=2) if curve["x"][-1] >= 8 * curve["x"][0] else None
        axis.set_xticks(curve["x"], [f"{x:,}" for x in curve["x"]])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        if len(curve["lines"]) > 1:
            axis.legend(frameon=False)
    for axis in axes.flat[len(curves) :]:
        axis.axis("off")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> dict:
    parser = benchmark_parser(__doc__, rounds=2)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--num_beams", type=int, nargs="+", default=[1, 2, 4, 6, 8])
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[4096, 16384, 49408, 131072])
    parser.add_argument("--texts", type=int, nargs="+", default=[16, 32, 64, 128], help="batches of the loss")
    parser.add_argument("--train_batch_sizes", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--chunk_size", type=int, default=8, help="images at a time of the contrastive step in chunks")
    parser.add_argument("--new_tokens", type=int, default=20)
    parser.add_argument("--picture", type=Path, help="PNG file to write")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    theirs, ours = load_pair(args.model, args.device, args.dtype)
    generator = OpenClipGenerator(theirs)
    size, width = ours.config.vision_config.image_size, ours.config.text_config.hidden_size
    images = torch.randn(max(args.batch_sizes), 3, size, size, device=args.device, dtype=getattr(torch, args.dtype))

    def captions(of: str, batch_size: int, num_beams: int) -> float:
        batch, tokens = images[:batch_size], args.new_tokens
        if of == "ours":
            return seconds(lambda: our_captions(ours, batch, tokens, num_beams), args.device, args.rounds)
        if num_beams == 1:
            return seconds(lambda: greedy(theirs, batch, tokens), args.device, args.rounds)
        return seconds(lambda: generator.beams(batch, tokens, num_beams), args.device, args.rounds)

    curves = {
        "Greedy captions": {
            "x": args.batch_sizes,
            "x_label": "images in a batch",
            "y_label": "tokens a second",
            "lines": {
                of: [n * args.new_tokens / captions(of, n, 1) for n in args.batch_sizes] for of in ("ours", "open_clip")
            },
        },
        "Beam search, one image": {
            "x": args.num_beams,
            "x_label": "beams",
            "y_label": f"seconds for {args.new_tokens} tokens",
            "lines": {of: [captions(of, 1, n) for n in args.num_beams] for of in ("ours", "open_clip")},
        },
    }
    kinds = {"ours": "ours", "logits of all tokens": "plain"}
    curves["Captioning loss over the vocabulary"] = {
        "x": args.vocabularies,
        "x_label": f"tokens in the vocabulary ({args.texts[-1]} texts of 20 tokens)",
        "y_label": "MB at the peak, gradients included",
        "lines": {
            name: [peak_mb(loss_job(kind, args.texts[-1], 20, v, width, args.device)) for v in args.vocabularies]
            for name, kind in kinds.items()
        },
    }
    curves["Captioning loss over the batch"] = {
        "x": args.texts,
        "x_label": f"texts of 20 tokens ({args.vocabularies[-2]:,} in the vocabulary)",
        "y_label": "MB at the peak, gradients included",
        "lines": {
            name: [peak_mb(loss_job(kind, n, 20, args.vocabularies[-2], width, args.device)) for n in args.texts]
            for name, kind in kinds.items()
        },
    }
    ours = ours.float().train()
    curves["Training, both losses"] = {
        "x": args.train_batch_sizes,
        "x_label": "pairs in the contrastive batch",
        "y_label": "MB at the peak, gradients included",
        "lines": {
            name: [peak_mb(training_job(ours, chunk, n, args.device)) for n in args.train_batch_sizes]
            for name, chunk in {"at once": None, f"in chunks of {args.chunk_size}": args.chunk_size}.items()
        },
    }
    if args.picture:
        draw(curves, args.picture)
    if args.output:
        settings = {key: value for key, value in vars(args).items() if key not in ("output", "picture")}
        args.output.write_text(
            json.dumps({"settings": settings, "machine": machine(args.device), "curves": curves}, indent=2)
        )
    for title, curve in curves.items():
        print(f"\n{title} ({curve['y_label']} over {curve['x_label']})")
        print(f"{'':24}" + "".join(f"{x:>12,}" for x in curve["x"]))
        for name, values in curve["lines"].items():
            print(f"{name:24}" + "".join(f"{value:>12.4g}" for value in values))
    return curves


if __name__ == "__main__":
    main()
