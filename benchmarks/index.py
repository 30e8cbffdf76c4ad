"""Recall and latency of `CocaIndex` by number of images and kind, against the exact search.

Vectors are clustered as embeddings of images are: clusters of very unequal sizes (Zipf), each with a few directions of
its own in which it spreads. Queries are new draws. Writes `index.json` and prints a table.

    python benchmarks/index.py --sizes 10000 100000 1000000 --dim 512 --out outputs/benchmarks
"""

import argparse
import json
import os
import platform
import time
from pathlib import Path

import faiss
import numpy as np
from transformers.utils import logging

from modeling_coca.retrieval import CocaIndex, choose_kind

K = 10


def clustered(number: int, dim: int, seed: int, clusters: int = 2000, directions: int = 16) -> np.ndarray:
    fixed = np.random.default_rng(0)
    centres = fixed.normal(size=(clusters, dim)).astype(np.float32)
    spread = fixed.normal(size=(clusters, directions, dim)).astype(np.float32)
    weights = 1 / np.arange(1, clusters + 1) ** 0.7
    random = np.random.default_rng(seed)
    labels = random.choice(clusters, size=number, p=weights / weights.sum())
    rows = np.empty((number, dim), np.float32)
    for cluster in range(clusters):
        members = np.flatnonzero(labels == cluster)
        inside = random.normal(size=(len(members), directions)).astype(np.float32) @ spread[cluster] * 0.2
        noise = 0.3 * random.normal(size=(len(members), dim)).astype(np.float32)
        rows[members] = centres[cluster] + inside + noise
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def measure(rows: np.ndarray, queries: np.ndarray, truth: np.ndarray, kind: str) -> dict[str, float | int | str]:
    logging.disable_progress_bar()
    index = CocaIndex(kind=kind)
    step = 100_000
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        index.add(part, [str(number) for number in range(start, start + len(part))])
    start_time = time.perf_counter()
    index.rebuild()
    build = time.perf_counter() - start_time
    found, seconds = [], []
    for query in queries:  # one at a time, as a user asks
        start_time = time.perf_counter()
        found.append(index.search_embeddings(query[None], K)[1][0])
        seconds.append(time.perf_counter() - start_time)
    recall = np.mean([len(set(a) & set(b)) / K for a, b in zip(np.array(found).tolist(), truth.tolist(), strict=True)])
    size = len(faiss.serialize_index(index._faiss.faiss_index))
    milliseconds = 1000 * np.array(seconds)
    return {
        "images": len(rows),
        "kind": kind,
        "chosen": choose_kind(len(rows))[0] == kind,
        "recall_at_10": round(float(recall), 4),
        "median_ms": round(float(np.median(milliseconds)), 2),
        "p95_ms": round(float(np.percentile(milliseconds, 95)), 2),
        "build_seconds": round(build, 1),
        "index_megabytes": round(size / 1e6, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--kinds", nargs="+", default=["exact", "hnsw", "ivfpq"])
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmarks"))
    args = parser.parse_args()
    queries = clustered(args.queries, args.dim, seed=1)
    results = []
    args.out.mkdir(parents=True, exist_ok=True)
    print("| images | kind | recall@10 | median ms | p95 ms | build s | MB |\n|---|---|---|---|---|---|---|")
    for number in args.sizes:
        rows = clustered(number, args.dim, seed=2)
        exact = faiss.IndexFlatIP(args.dim)
        exact.add(rows)
        truth = exact.search(queries, K)[1]
        for kind in args.kinds:
            result = measure(rows, queries, truth, kind)
            results.append(result)
            chosen = " (chosen)" if result["chosen"] else ""
            print(
                f"| {number:,} | {kind}{chosen} | {result['recall_at_10']:.3f} | {result['median_ms']} | "
                f"{result['p95_ms']} | {result['build_seconds']} | {result['index_megabytes']} |",
                flush=True,
            )
            report = {
                "dim": args.dim,
                "queries": args.queries,
                "threads": faiss.omp_get_max_threads(),
                "machine": platform.processor() or platform.machine(),
                "cores": len(os.sched_getaffinity(0)),
                "faiss": faiss.__version__,
                "results": results,
            }
            (args.out / "index.json").write_text(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
