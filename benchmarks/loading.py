"""From a start to a model in memory: imports and checkpoints, ours and open_clip's CoCa with the same weights.

    python benchmarks/loading.py --output loading.json

Each is a process of its own. Counted are its CPU seconds, the import of torch included, and its highest
resident size (Linux only).
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import open_clip
from harness import benchmark_parser, report, summary
from open_clip_peer import load_pair
from safetensors.torch import save_file

OPEN_CLIP = "import open_clip; open_clip.create_model('local-dir:{theirs}')"
FROM_PRETRAINED = "from modeling_coca import CocaForConditionalGeneration as M; M.from_pretrained('{%s}')"
CODE = {
    "import": {"open_clip": "import open_clip", "ours": "from modeling_coca import CocaForConditionalGeneration"},
    "import and load": {"open_clip": OPEN_CLIP, "ours": FROM_PRETRAINED % "ours"},
    "import and load open_clip's files": {"open_clip": OPEN_CLIP, "ours": FROM_PRETRAINED % "theirs"},
    "convert, beside their load": {
        "open_clip": OPEN_CLIP,
        "ours": "from modeling_coca.conversion import convert; convert('{theirs}', '{ours}-new', overwrite=True)",
    },
}


# On Linux `ru_maxrss` begins with what the parent held, so the process itself tells its peak, in KB
PEAK = "; import re; print(re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1])"


def cost_of(code: str, threads: int) -> tuple[float, float]:
    """CPU seconds and peak MB of a Python process that runs `code`."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile("w+") as messages:
        command = [sys.executable, "-c", code + PEAK]
        child = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=messages, text=True)
        printed = child.stdout.read()
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            messages.seek(0)
            raise RuntimeError(f"`{code}` ended with {child.returncode}:\n{messages.read()}")
    return usage.ru_utime + usage.ru_stime, int(printed.split()[-1]) / 2**10


def main(argv: list[str] | None = None) -> dict:
    parser = benchmark_parser(__doc__, rounds=5)
    args = parser.parse_args(argv)
    theirs, ours = load_pair(args.model, "cpu", args.dtype)
    is_file = args.model.endswith(".json")
    config = json.loads(Path(args.model).read_text()) if is_file else open_clip.get_model_config(args.model)
    rows = {}
    with tempfile.TemporaryDirectory() as name:
        folders = {"theirs": Path(name) / "theirs", "ours": Path(name) / "ours"}
        folders["theirs"].mkdir()
        save_file(theirs.state_dict(), folders["theirs"] / "open_clip_model.safetensors")
        (folders["theirs"] / "open_clip_config.json").write_text(
            json.dumps({"model_cfg": config, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}})
        )
        ours.save_pretrained(folders["ours"])
        for row, contestants in CODE.items():
            costs = {name: [] for name in contestants}
            for _ in range(args.rounds + 1):
                for name, code in contestants.items():
                    costs[name].append(cost_of(code.format(**folders), args.threads))
            rows[row] = summary({name: [cost[0] for cost in values[1:]] for name, values in costs.items()}, "open_clip")
            rows[row]["peak_mb"] = {name: max(cost[1] for cost in values[1:]) for name, values in costs.items()}
    report("From a start to a model in memory (CPU seconds)", rows, args, "open_clip")
    for row, figures in rows.items():
        print(f"{row}: peak MB", {name: round(value) for name, value in figures["peak_mb"].items()})
    return rows


if __name__ == "__main__":
    main()
