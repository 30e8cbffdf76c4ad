"""A training step (both losses, backward) of ours and of open_clip's CoCa: same weights, images, captions and precision.

Captions have `--caption_tokens` tokens, BOS and EOS included. open_clip pads them to its context of 76, as its tokenizer does;
ours are padded to the longest, as `CocaDataCollator` does. Both give the same losses, which is checked. Then a large batch at
once and in chunks (`contrastive_chunk_size`). Memory is that of tensors, counted exactly; weights are not in it.

    python benchmarks/training.py --batch_size 16 --chunk_size 8 --large_batch_size 64
"""

import json

import torch
from harness import Clock, benchmark_parser, machine, race, report, summary
from open_clip.loss import CoCaLoss
from open_clip_peer import BOS, EOS, load_pair
from peak_memory import PeakMemory
from torch import nn

from modeling_coca.loss_coca import caption_loss, contrastive_loss


def make_batch(model, rows: int, tokens: int, device: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    size = model.config.vision_config.image_size
    words = torch.randint(1, 40_000, (rows, tokens - 2), generator=generator)
    ids = torch.cat([torch.full((rows, 1), BOS), words, torch.full((rows, 1), EOS)], dim=1)
    images = torch.randn(rows, 3, size, size, generator=generator).to(device, model.dtype)
    return {"pixel_values": images, "input_ids": ids.to(device), "labels": ids.to(device)}


def open_clip_step(model, batch) -> torch.Tensor:
    model.zero_grad()
    text = nn.functional.pad(batch["input_ids"], (0, model.context_length - batch["input_ids"].shape[1]))
    outputs = model(batch["pixel_values"], text)
    outputs = {name: outputs[name] for name in ("image_features", "text_features", "logits", "labels", "logit_scale")}
    loss = sum(CoCaLoss(caption_loss_weight=2.0, clip_loss_weight=1.0)(**outputs))
    loss.backward()
    return loss.detach()


def our_step(model, batch, **kwargs) -> torch.Tensor:
    model.zero_grad()
    loss = model(**batch, **kwargs).loss
    loss.backward()
    return loss.detach()


def peak(run) -> int:
    with PeakMemory() as memory:
        run()
    return memory.peak


def loss_paths(ours, rows: int, tokens: int):
    """From the decoder's states and the embeddings to the losses and their gradients, as each of the two does it."""
    config, lm_head = ours.config, ours.lm_head
    width, dtype, device = config.text_config.hidden_size, ours.dtype, ours.device
    image_embeds, text_embeds = (
        nn.functional.normalize(torch.randn(rows, config.projection_dim, device=device, dtype=dtype), dim=-1)
        for _ in range(2)
    )
    context = config.text_config.max_text_length
    labels = torch.randint(1, 40_000, (rows, context), device=device)
    labels[:, tokens:] = 0
    states = torch.randn(rows, context - 1, width, device=device, dtype=dtype)
    projection, scale = lm_head.weight.detach().t().contiguous().requires_grad_(), ours.model.logit_scale.detach()

    def open_clip_losses():
        inputs = [x.clone().requires_grad_() for x in (image_embeds, text_embeds, states)]
        losses = CoCaLoss(caption_loss_weight=2.0, clip_loss_weight=1.0)(
            *inputs[:2], inputs[2] @ projection, labels[:, 1:], scale.exp()
        )
        torch.autograd.grad(sum(losses), (*inputs, projection))

    def our_losses():
        inputs = [x.clone().requires_grad_() for x in (image_embeds, text_embeds, states[:, :tokens])]
        losses = contrastive_loss(*inputs[:2], scale) + 2 * caption_loss(inputs[2], lm_head, labels[:, :tokens])
        torch.autograd.grad(losses, (*inputs, lm_head.weight))

    return open_clip_losses, our_losses


def main(argv: list[str] | None = None) -> dict:
    parser = benchmark_parser(__doc__, rounds=3)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--caption_tokens", type=int, default=12)
    parser.add_argument("--large_batch_size", type=int, default=64, help="for chunks")
    parser.add_argument("--chunk_size", type=int, default=8)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    theirs, ours = load_pair(args.model, args.device, args.dtype)
    theirs.train(), ours.train()
    batch = make_batch(ours, args.batch_size, args.caption_tokens, args.device)

    losses = open_clip_step(theirs, batch).float(), our_step(ours, batch).float()
    torch.testing.assert_close(*losses, rtol=1e-4 if args.dtype == "float32" else 0.02, atol=1e-4)
    seconds = race(
        {"open_clip": lambda: open_clip_step(theirs, batch), "ours": lambda: our_step(ours, batch)},
        args.device,
        args.rounds,
    )
    row = summary(seconds, "open_clip")
    row["peak_bytes"] = {
        "open_clip": peak(lambda: open_clip_step(theirs, batch)),
        "ours": peak(lambda: our_step(ours, batch)),
    }
    paths = loss_paths(ours, args.batch_size, args.caption_tokens)
    row["loss_path_peak_bytes"] = dict(zip(("open_clip", "ours"), map(peak, paths), strict=True))
    theirs.zero_grad()

    large = make_batch(ours, args.large_batch_size, args.caption_tokens, args.device)
    micro = {name: value[: args.chunk_size] for name, value in large.items()}
    clock, chunks = Clock(args.device), {}
    runs = {
        "whole": lambda: our_step(ours, large),
        "chunks": lambda: our_step(ours, large, contrastive_chunk_size=args.chunk_size),
        "one chunk alone": lambda: our_step(ours, micro),
    }
    for name, run in runs.items():
        start = clock()
        loss = run()
        chunks[name] = {"seconds": clock() - start, "loss": loss.item(), "peak_bytes": peak(run)}
    row["chunks"] = chunks
    report("training step", {"step": row}, args, "open_clip")
    speeds = {name: round(args.batch_size / row[name]["median_s"], 2) for name in ("open_clip", "ours")}
    print(f"samples/s: {speeds}")
    for name in ("peak_bytes", "loss_path_peak_bytes"):
        values = row[name]
        print(f"{name}: {json.dumps(values)}, {values['open_clip'] / values['ours']:.1f} times less")
    print(f"batch of {args.large_batch_size}, chunks of {args.chunk_size}: {json.dumps(chunks, indent=2)}")
    print(json.dumps(machine(args.device)))
    return {"step": row}


if __name__ == "__main__":
    main()
