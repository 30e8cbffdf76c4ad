"""Interleaved timings of contestants in one run, and what a script leaves behind: a table to read and JSON to keep.

Machines are noisy, so contestants take turns, round by round, and what counts is the ratio of a round. On a CPU the time
is the process's CPU time, which other programs disturb less than the clock; it equals the clock at one thread.
"""

import json
import os
import platform
import statistics
import time
from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers


def benchmark_parser(description: str, rounds: int = 5) -> ArgumentParser:
    """Options that all scripts have."""
    parser = ArgumentParser(description=description)
    parser.add_argument(
        "--model", default="coca_ViT-B-32", help="name of an open_clip model config, or a JSON file of one"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--rounds", type=int, default=rounds, help="timed rounds, after one that warms up")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    return parser


class Clock:
    """Seconds on `device`: CPU time there, else the clock with the device's queue drained."""

    def __init__(self, device: str):
        self.is_cpu = torch.device(device).type == "cpu"

    def __call__(self) -> float:
        if self.is_cpu:
            return time.process_time()
        torch.accelerator.synchronize()
        return time.perf_counter()


def race(contestants: dict[str, Callable[[], Any]], device: str, rounds: int) -> dict[str, list[float]]:
    """Seconds of each call: every contestant once a round, in turn. The first round warms up and does not count."""
    clock, seconds = Clock(device), {name: [] for name in contestants}
    for _ in range(rounds + 1):
        for name, run in contestants.items():
            start = clock()
            run()
            seconds[name].append(clock() - start)
    return {name: values[1:] for name, values in seconds.items()}


def summary(seconds: dict[str, list[float]], peer: str) -> dict[str, Any]:
    """Medians and spread, and how many times faster than `peer` the others are within the same round (median and range)."""
    rows: dict[str, Any] = {}
    for name, values in seconds.items():
        rows[name] = {"median_s": statistics.median(values), "min_s": min(values), "max_s": max(values)}
        if name != peer:
            ratios = [theirs / own for own, theirs in zip(values, seconds[peer], strict=True)]
            rows[name]["ratio"] = {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
    return rows


def machine(device: str) -> dict[str, Any]:
    """Where the figures were taken."""
    return {
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.processor() or "cpu",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def report(title: str, rows: dict[str, dict[str, Any]], args: Any, peer: str) -> None:
    """Print a table of `summary` rows, and write them to `--output`."""
    print(f"\n{title}: {args.model}, {args.dtype}, {args.device}, {args.threads} thread(s), {args.rounds} rounds")
    width = max(map(len, rows))
    for row_name, row in rows.items():
        cells = [f"{peer} {row[peer]['median_s']:.4f} s"]
        for name, figures in row.items():
            if isinstance(figures, dict) and "ratio" in figures:
                ratio = figures["ratio"]
                times = f"{ratio['median']:.2f} times faster ({ratio['min']:.2f} to {ratio['max']:.2f})"
                cells.append(f"{name} {figures['median_s']:.4f} s, {times}")
        print(f"{row_name:{width}}  " + " | ".join(cells))
    if args.output:
        settings = {key: value for key, value in vars(args).items() if key != "output"}
        result = {"title": title, "settings": settings, "machine": machine(args.device), "rows": rows}
        temporary = args.output.with_suffix(".tmp")
        temporary.write_text(json.dumps(result, indent=2))
        temporary.rename(args.output)
