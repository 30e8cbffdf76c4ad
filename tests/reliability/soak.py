"""Bulk captioning again and again: memory must stay flat, and no file, thread or process may be left behind.

    python tests/reliability/soak.py --minutes 15

Captions random pictures, broken ones among them, in one process, by turns into JSONL, Parquet and folders and with and
without workers that decode. After each round, and after warm-up, it looks at this process's memory (RSS), open files,
threads and children. It fails if memory grows by more than `--megabytes_an_hour`, or if there are more of the others.
"""

import argparse
import gc
import json
import os
import random
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from modeling_coca import CocaConfig, CocaForConditionalGeneration, CocaImageProcessorPil, CocaProcessor, CocaTokenizer
from modeling_coca.inference import caption_images, read_rows

TINY = Path(__file__).parents[2] / "hub_configs" / "coca-tiny" / "config.json"


def make_model(folder: Path) -> None:
    tokenizer = CocaTokenizer(model_max_length=32).train_new_from_iterator(["a photo of a square"], vocab_size=400)
    fields = json.loads(TINY.read_text())
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    fields["text_config"] |= {"vocab_size": len(tokenizer), "max_position_embeddings": 33, **ids}
    CocaForConditionalGeneration(CocaConfig(**fields)).save_pretrained(folder)
    size = fields["vision_config"]["image_size"]
    CocaProcessor(CocaImageProcessorPil(size=size), tokenizer).save_pretrained(folder)


def make_pictures(folder: Path, number: int, rng: np.random.Generator) -> int:
    """Of random sizes and formats; every tenth is broken in one of several ways. Returns the number of broken ones."""
    folder.mkdir()
    broken = 0
    for i in range(number):
        height, width = rng.integers(8, 600, 2)
        path = folder / f"{i:04d}.{('jpg', 'png', 'webp')[i % 3]}"
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
        if i % 10 == 9:
            content = path.read_bytes()
            path.write_bytes((b"", content[: len(content) // 2], b"no picture", content[:20])[i // 10 % 4])
            broken += 1
    return broken


def state() -> dict[str, float]:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return {
        "rss_mb": int(status["VmRSS"].split()[0]) / 1024,
        "files": len(os.listdir("/proc/self/fd")),
        "threads": int(status["Threads"]),
        "children": len(children),
        "shared_memory": len([name for name in os.listdir("/dev/shm") if name.startswith(f"torch_{os.getpid()}_")]),
    }


def soak(minutes: float, pictures: int, megabytes_an_hour: float, warm_up: float) -> dict:
    torch.set_num_threads(1)
    rng, turns = np.random.default_rng(0), random.Random(0)
    with tempfile.TemporaryDirectory(prefix="soak-") as temporary:
        folder = Path(temporary)
        make_model(folder / "model")
        broken = make_pictures(folder / "pictures", pictures, rng)
        began, rounds, images, samples = time.monotonic(), 0, 0, []
        while time.monotonic() - began < 60 * minutes or rounds < 12:
            output = folder / ("out.jsonl", "out.parquet", "out")[rounds % 3]
            done = caption_images(
                folder / "pictures",
                output,
                model=folder / "model",
                batch_size=turns.choice((4, 16, 32)),
                num_workers=rounds // 3 % 3,
                embeddings=turns.random() < 0.5,
                fast_decode=turns.random() < 0.5,
                num_beams=turns.choice((1, 1, 2)),
                max_new_tokens=12,
                source_kwargs={"shard_size": 64},
                show_progress=False,
            )
            rows = list(read_rows(output))
            assert len(rows) == done["images"] == pictures, (len(rows), done["images"])
            assert len(done["failed"]) == broken == sum(bool(row.get("error")) for row in rows), done["failed"]
            shutil.rmtree(output) if output.is_dir() else output.unlink()
            assert sorted(path.name for path in folder.iterdir()) == ["model", "pictures"]
            del rows, done
            gc.collect()
            rounds, images = rounds + 1, images + pictures
            samples.append({"hours": (time.monotonic() - began) / 3600, **state()})
    after = samples[max(9, int(len(samples) * warm_up)) - 1 :]
    slope = float(np.polyfit([s["hours"] for s in after], [s["rss_mb"] for s in after], 1)[0])
    memory = [sample["rss_mb"] for sample in after]
    result = {
        "minutes": round((time.monotonic() - began) / 60, 1),
        "rounds": rounds,
        "images": images,
        "unreadable": rounds * broken,
        "rss_mb": {"first": round(memory[0], 1), "last": round(memory[-1], 1), "most": round(max(memory), 1)},
        "rss_mb_an_hour": round(slope, 1),
    }
    growing = []
    for name in ("files", "threads", "children", "shared_memory"):
        values = [sample[name] for sample in after]
        result[name] = {"first": values[0], "last": values[-1], "most": max(values)}
        if values[-1] > values[0]:
            growing.append(name)
    if minutes >= 5 and slope > megabytes_an_hour:  # a shorter one says nothing of an hour
        growing.append("rss_mb")
    elif memory[-1] > 1.1 * memory[0]:
        growing.append("rss_mb")
    return {**result, "growing": growing}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--pictures", type=int, default=200)
    parser.add_argument("--megabytes_an_hour", type=float, default=40)
    parser.add_argument("--warm_up", type=float, default=0.2, help="share of the rounds that are not counted")
    options = parser.parse_args()
    result = soak(options.minutes, options.pictures, options.megabytes_an_hour, options.warm_up)
    print(json.dumps(result, indent=2))
    return bool(result["growing"])


if __name__ == "__main__":
    raise SystemExit(main())
