"""How much of a device do captions and training use? Images and pairs a second, memory, and MFU, of ours alone.

    python benchmarks/utilization.py --model coca_ViT-L-14 --dtype bfloat16 --compile --large_batch_size 8192 --chunk_size 128

MFU is floating-point operations that the model's step needs (counted by PyTorch, recomputation left out) over those that the device
could have done in the time: `--peak_tflops` of its data sheet, or else what a large matrix product reaches in the same run. Training
keeps float32 weights and computes in `--dtype` by autocast, with fused AdamW. Captions are greedy with end-of-text disabled.
"""

import json
import statistics
from collections.abc import Callable

import torch
from harness import Clock, benchmark_parser, machine
from open_clip_peer import load_pair, our_captions
from torch.utils.flop_counter import FlopCounterMode
from training import make_batch


def matmul_tflops(device: str, dtype: torch.dtype) -> float:
    """What a matrix product that is large enough reaches."""
    size = 8192 if device != "cpu" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / min(timings(lambda: a @ b, device, 10)) / 1e12


def timings(run: Callable[[], None], device: str, rounds: int) -> list[float]:
    """Seconds of each call, after one that warms up."""
    clock, taken = Clock(device), []
    for _ in range(rounds + 1):
        start = clock()
        run()
        taken.append(clock() - start)
    return taken[1:]


def _linear_flops(x_shape, weight_shape, *args, out_shape, **kwargs) -> int:
    return 2 * x_shape.numel() * weight_shape[0]


def flops_of(step: Callable[[], None]) -> int:
    """Floating-point operations of matrix products, convolutions and attention, also those that oneDNN computes."""
    mapping = {torch.ops.mkldnn._linear_pointwise: _linear_flops} if torch.backends.mkldnn.is_available() else {}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        step()
    return counter.get_total_flops()


class Training:
    """Steps of a model with its optimizer, on random pairs."""

    def __init__(self, model, batch_size: int, args):
        self.model, self.args = model.float().train(), args
        self.forward = torch.compile(model) if args.compile else model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
        self.batch = make_batch(model, batch_size, args.caption_tokens, args.device)

    def step(self, forward=None, **kwargs) -> None:
        dtype = getattr(torch, self.args.dtype)
        with torch.autocast(self.args.device.split(":")[0], dtype, enabled=dtype != torch.float32):
            loss = (forward or self.forward)(**self.batch, **kwargs).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def figures(self, flops_per_pair: float, peak_tflops: float, **kwargs) -> dict[str, float]:
        pairs, device = len(self.batch["input_ids"]), self.args.device
        on_gpu = device.startswith("cuda")
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        seconds = statistics.median(timings(lambda: self.step(**kwargs), device, self.args.rounds))
        mfu = flops_per_pair * pairs / seconds / (peak_tflops * 1e12)
        figures = {"step_s": seconds, "pairs_per_s": pairs / seconds, "mfu": mfu}
        return figures | ({"peak_gb": torch.cuda.max_memory_allocated() / 2**30} if on_gpu else {})


def main(argv: list[str] | None = None) -> dict:
    parser = benchmark_parser(__doc__, rounds=3)
    parser.add_argument("--caption_batch_sizes", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--new_tokens", type=int, default=30)
    parser.add_argument("--batch_size", type=int, default=128, help="pairs of a training step")
    parser.add_argument("--caption_tokens", type=int, default=12, help="of a training text, BOS and EOS included")
    parser.add_argument("--large_batch_size", type=int, default=8192, help="contrastive batch of the step in chunks")
    parser.add_argument("--chunk_size", type=int, default=128)
    parser.add_argument("--compile", action="store_true", help="torch.compile of the training step")
    parser.add_argument("--peak_tflops", type=float, help="of the device's data sheet, for --dtype and dense matrices")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    measured = matmul_tflops(args.device, getattr(torch, args.dtype))
    peak = args.peak_tflops or measured
    model = load_pair(args.model, args.device, args.dtype)[1]
    size, rows = model.config.vision_config.image_size, {}
    for batch_size in args.caption_batch_sizes:
        images = torch.randn(batch_size, 3, size, size, device=args.device, dtype=model.dtype)
        taken = timings(lambda images=images: our_captions(model, images, args.new_tokens), args.device, args.rounds)
        seconds = statistics.median(taken)
        rows[f"captions, batch {batch_size}"] = {"step_s": seconds, "images_per_s": batch_size / seconds}
    few = Training(model, min(8, args.batch_size), args)
    flops_per_pair = flops_of(lambda: few.step(few.model)) / len(few.batch["input_ids"])
    rows[f"training, batch {args.batch_size}"] = Training(model, args.batch_size, args).figures(flops_per_pair, peak)
    rows[f"training, batch {args.large_batch_size} in chunks of {args.chunk_size}"] = Training(
        model, args.large_batch_size, args
    ).figures(flops_per_pair, peak, contrastive_chunk_size=args.chunk_size)
    result = {
        "settings": {key: value for key, value in vars(args).items() if key != "output"},
        "machine": machine(args.device),
        "peak_tflops": {"used": peak, "of a matrix product": measured},
        "flops_per_pair": flops_per_pair,
        "rows": rows,
    }
    if args.output:
        args.output.write_text(json.dumps(result, indent=2))
    print(
        f"\n{args.model}, {args.dtype}, {result['machine']['device']}; a matrix product reaches {measured:.3g} TFLOP/s"
    )
    for name, row in rows.items():
        print(f"{name:48}" + ", ".join(f"{key} {value:.4g}" for key, value in row.items()))
    return result


if __name__ == "__main__":
    main()
