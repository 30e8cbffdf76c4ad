# ruff: noqa: E402
"""Kills, full disks, read-only folders and lack of memory, at random moments of all jobs that write.

    python tests/reliability/faults.py --job caption-jsonl --fault kill --trials 20
    python tests/reliability/faults.py --job all --fault all --trials 20       # needs root, to mount small disks

For each trial a process does the job and meets the fault. What is there under the final names must be the old state or
the new one. Then the same command runs again without the fault; the result must be that of an unbroken run: the same files,
equal to the bit, and no others. A fault comes

- at a random moment;
- at a random change to the file system (the n-th file opened for writing, rename, deletion, new folder), half of the
  times just after a file was emptied to be written;
- in the middle of a write, at a random byte of a file, also in the libraries that are not written in Python.

The package is imported once and each run is a fork of this process, so a trial takes about a second.
"""

import argparse
import contextlib
import ctypes
import hashlib
import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]
os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "COLUMNS": "200"}
os.environ.setdefault("HF_HOME", os.path.join(tempfile.gettempdir(), f"faults-{os.getuid()}"))

# All that jobs import, once for all forks
import datasets
import faiss  # noqa: F401
import numpy as np
import pyarrow.parquet  # noqa: F401
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import Trainer  # noqa: F401

from modeling_coca import CocaConfig, CocaForConditionalGeneration, CocaImageProcessorPil, CocaProcessor, CocaTokenizer
from modeling_coca.cli.main import main as coca
from modeling_coca.conversion import convert
from modeling_coca.hub import export_to_folder
from modeling_coca.inference import read_rows
from modeling_coca.retrieval import CocaIndex
from modeling_coca.training import ImageAugmentation, compute_features, features

EMOJI = ROOT / "tests" / "fixtures" / "emoji"
TINY = ROOT / "hub_configs" / "coca-tiny"
SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM}
FAULTS = (*SIGNALS, "full", "read-only", "memory")


# ---------------------------------------------------------------------------------------------------------- jobs


@dataclass
class Shared:
    """What all jobs start from: made once, and read only."""

    folder: Path

    def __post_init__(self):
        torch.manual_seed(0)
        texts = ["a photo of a red square", "a drawing of a green circle", "what is it?", "yellow blue white"]
        tokenizer = CocaTokenizer(model_max_length=32).train_new_from_iterator(texts, vocab_size=450)
        self.model(0, tokenizer), self.model(1, tokenizer)
        for name, numbers in (("pictures", range(40)), ("more", range(40, 52))):
            folder = self.folder / name
            folder.mkdir(parents=True)
            for number in numbers:
                pixels = np.random.default_rng(number).integers(0, 256, (24, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number:03d}.{('png', 'jpg')[number % 2]}")
            (folder / f"{numbers[-1]}-broken.png").write_bytes(b"no picture")
        for source in ("source", "source-2"):
            (self.folder / source).mkdir()
            with safe_open(ROOT / "tests" / "fixtures" / "open_clip_default.safetensors", framework="pt") as file:
                weights = {name[3:]: file.get_tensor(name) for name in file.keys() if name.startswith("sd.")}
                (self.folder / source / "open_clip_config.json").write_text(file.metadata()["config"])
            shift = float(source == "source-2")
            weights = {name: x + shift if x.is_floating_point() else x for name, x in weights.items()}
            torch.save(weights, self.folder / source / "open_clip_pytorch_model.bin")
            convert(self.folder / source, self.folder / f"ours-of-{source}")

    def model(self, number: int, tokenizer) -> None:
        fields = json.loads((TINY / "config.json").read_text())
        ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        fields["text_config"] |= {"vocab_size": len(tokenizer), "max_position_embeddings": 33, **ids}
        fields["projection_dim"] += 8 * number
        torch.manual_seed(number)
        model = CocaForConditionalGeneration(CocaConfig(**fields))
        model.lm_head.weight.data[ids["eos_token_id"]] *= 3
        folder = self.folder / f"model-{number}"
        model.save_pretrained(folder)
        CocaProcessor(CocaImageProcessorPil(size=fields["vision_config"]["image_size"]), tokenizer).save_pretrained(
            folder
        )


@dataclass
class Job:
    """
    Args:
        run (`Callable`): does it, in the trial's folder.
        look (`Callable`): what is there under the final names, name -> value; raises where something is half.
        start (`Callable`): makes the state before.
        whole (`bool`): all of the old or all of the new; else each name by itself.
        processes (`int`): share the job, by `RANK` and `WORLD_SIZE`.
        finished (`str`): of the error of a command that has nothing left to do.
        one_line (`bool`): errors are told in one line, without a traceback.
        before (`Callable`): what there may be before the job is finished, where that is less than `look` sees.
    """

    run: Callable[[], None]
    look: Callable[[], dict[str, Any]]
    start: Callable[[], None] = lambda: None
    whole: bool = True
    processes: int = 1
    finished: str = ""
    one_line: bool = True
    before: Callable[[], dict[str, Any]] | None = None


def command(*arguments: Any) -> None:
    sys.argv = ["coca", *map(str, arguments)]
    try:
        coca()
    except SystemExit as end:
        if end.code:
            raise


def rows_of(*names: str) -> dict[str, Any]:
    return {name: list(read_rows(name)) for name in names if Path(name).exists()}


def tensors_of(path: Path) -> str:
    """A digest of tensors, by name, whatever their file is."""
    content = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=False)
    digest = hashlib.sha256()

    def add(value):
        if isinstance(value, torch.Tensor):
            digest.update(str(value.dtype).encode() + value.reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(value, np.ndarray):
            digest.update(value.tobytes())
        elif isinstance(value, dict):
            for key in sorted(value, key=str):
                digest.update(str(key).encode())
                add(value[key])
        elif isinstance(value, (list, tuple)):
            for item in value:
                add(item)
        else:
            digest.update(repr(value).encode())

    add(content)
    return digest.hexdigest()


# Times; and the mean loss, which `Trainer` takes of the steps since it was resumed
_OF_THE_RUN = re.compile(r"runtime|per_second|^train_loss$")


def json_of(path: Path) -> Any:
    def clean(value):
        if isinstance(value, dict):
            return {key: clean(item) for key, item in value.items() if not _OF_THE_RUN.search(key)}
        return [clean(item) for item in value] if isinstance(value, list) else value

    return clean(json.loads(path.read_text()))


def folder_of(name: str, *left_out: str) -> dict[str, Any]:
    """All files of a folder, each by what it holds."""
    found = {}
    for path in sorted(Path(name).rglob("*")) if Path(name).is_dir() else []:
        if any(fnmatch(part, pattern) for part in path.relative_to(name).parts for pattern in left_out):
            continue
        if path.is_file() and path.name != "training_args.bin":
            kind = {".json": json_of, ".safetensors": tensors_of, ".pt": tensors_of, ".pth": tensors_of}
            found[str(path)] = kind.get(path.suffix, lambda path: hashlib.sha256(path.read_bytes()).hexdigest())(path)
    return found


def jobs(shared: Path) -> dict[str, Job]:
    model = shared / "model-0"
    writing = ("--model", model, "--batch_size", 4, "--shard_size", 8, "--max_new_tokens", 6)

    def caption(output: str, *more: Any) -> Callable[[], None]:
        return lambda: command("caption", shared / "pictures", "--output", output, *writing, *more)

    def in_folder() -> dict[str, Any]:
        return rows_of(*sorted(map(str, Path("out").glob("part-*"))))

    def index_state() -> dict[str, Any]:
        if not Path("my.index/index.json").exists():
            return {}
        index = CocaIndex.load("my.index")
        found = index.search_embeddings(np.eye(index.embedding_size, dtype=np.float32)[:4], 100)
        return {"ids": sorted(index.ids), "rows": index.dataset.to_list(), "scores": found[0].tolist()}

    def index(*more: Any) -> Callable[[], None]:
        return lambda: command("index", "-o", "my.index", "--model", model, "--batch_size", 4, *more)

    def compute(number: int) -> None:
        features._CHUNK = 1
        encoder = CocaForConditionalGeneration.from_pretrained(shared / f"model-{number}").model.vision_model
        rows = datasets.Dataset.from_dict(
            {"image": [str(path) for path in sorted((shared / "pictures").glob("0*"))]}
        ).cast_column("image", datasets.Image())
        processor = CocaProcessor.from_pretrained(model).image_processor
        options = {"views": 2, "augmentation": ImageAugmentation(rotate=10), "batch_size": 4}
        compute_features(rows, encoder, processor, "cache/train.npy", **options)

    def cache() -> dict[str, Any]:
        if not Path("cache/train.npy.json").exists():
            return {}
        key = json.loads(Path("cache/train.npy.json").read_text())
        return {"cache": (key, hashlib.sha256(np.load("cache/train.npy").tobytes()).hexdigest())}

    def train(script: str, *more: Any) -> Callable[[], None]:
        def run():
            shared_arguments = ["--dataset_name", EMOJI, "--output_dir", "out", "--max_steps", 6, "--save_steps", 2]
            shared_arguments += ["--per_device_train_batch_size", 8, "--logging_steps", 1, "--save_total_limit", 1]
            shared_arguments += ["--report_to", "none", "--disable_tqdm", "True", "--use_cpu", "True"]
            shared_arguments += ["--resume_from_checkpoint", "True"]
            __import__(script).main([str(argument) for argument in (*shared_arguments, *more)])

        return run

    def trained() -> dict[str, Any]:
        """What is there under final names. A checkpoint may be half, as the next run does not take it."""
        return folder_of("out", "checkpoint-*", ".*")

    def opened(name: str) -> dict[str, Any]:
        """A model's files, if there is a model."""
        return folder_of(name) if Path(name, "config.json").exists() else {}

    def export(number: int) -> None:
        model_class, folder = CocaForConditionalGeneration, shared / f"model-{number}"
        export_to_folder(model_class.from_pretrained(folder), CocaProcessor.from_pretrained(folder), "out")

    def exported_before() -> None:
        export(1)
        Path("out/checkpoint-2").mkdir()
        Path("out/checkpoint-2/mine.json").write_text("{}")
        Path("out/notes.txt").write_text("mine")

    pretrain = ("--config_name", TINY, "--vocab_size", 400, "--max_text_length", 32, "--ema_decay", "0.9")
    retrieval = ("--model_name_or_path", model, "--contrastive_chunk_size", 3, "--dropout", 0.1)
    there = "is there, and complete"
    return {
        "caption-jsonl": Job(caption("out.jsonl", "--num_workers", 0), lambda: rows_of("out.jsonl"), finished=there),
        "caption-parquet": Job(
            caption("out.parquet", "--num_workers", 1, "--embeddings"), lambda: rows_of("out.parquet"), finished=there
        ),
        "caption-folder": Job(caption("out", "--num_workers", 0), in_folder, whole=False, finished=there),
        "caption-2-processes": Job(
            caption("out.jsonl", "--num_workers", 0), lambda: rows_of("out.jsonl"), processes=2, finished=there
        ),
        "index-build": Job(index(shared / "pictures", "--num_workers", 0), index_state),
        "index-update": Job(
            # By the same command again, an image that it has removed is not there any more
            index(shared / "pictures", shared / "more", "--num_workers", 0, "--kind", "hnsw"),
            index_state,
            start=index(shared / "pictures", "--num_workers", 0),
        ),
        "features": Job(lambda: compute(0), cache, one_line=False),
        "features-anew": Job(lambda: compute(0), cache, start=lambda: compute(1), whole=False, one_line=False),
        "pretrain": Job(
            train("pretrain", *pretrain),
            lambda: folder_of("out"),
            # Two trainings of a tokenizer may break ties differently
            start=lambda: CocaProcessor.from_pretrained(model).save_pretrained("out"),
            whole=False,
            one_line=False,
            before=trained,
        ),
        "retrieval-chunked": Job(
            train("finetune_retrieval", *retrieval),
            lambda: folder_of("out"),
            whole=False,
            one_line=False,
            before=trained,
        ),
        "convert": Job(lambda: command("convert", shared / "source", "out"), lambda: opened("out"), finished="exists"),
        "convert-over": Job(
            lambda: command("convert", shared / "source", "out", "--overwrite"),
            lambda: opened("out"),
            start=lambda: command("convert", shared / "source-2", "out", "--max_shard_size", "200KB"),
        ),
        "convert-back": Job(
            lambda: command("convert", shared / "ours-of-source", "out", "--to", "open_clip", "--overwrite"),
            lambda: folder_of("out"),
            start=lambda: command("convert", shared / "ours-of-source-2", "out", "--to", "open_clip"),
        ),
        "export": Job(lambda: export(0), lambda: opened("out"), one_line=False),
        "export-over": Job(lambda: export(0), lambda: opened("out"), start=exported_before, one_line=False),
    }


# --------------------------------------------------------------------------------------------------------- faults


@dataclass
class Fault:
    """When and how a run is disturbed. `event`: the number of a change to the file system; `None` counts them."""

    event: int | None = None
    emptied: bool = False
    act: Callable[[], bool] | None = None
    byte: int | None = None
    memory: int | None = None
    count: int = field(default=0, init=False)

    def set_up(self) -> None:
        """In the process that is to meet it."""
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if self.byte is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            most = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.byte, most))
            # Workers have their shared memory in files
            os.register_at_fork(after_in_child=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most, most)))
        if self.memory is not None:
            status = Path("/proc/self/status").read_text()
            now = int(re.search(r"VmSize:\s+(\d+)", status)[1]) * 1024
            resource.setrlimit(resource.RLIMIT_AS, (now + self.memory, now + self.memory))
        self.process, self.busy = os.getpid(), False
        sys.addaudithook(self._see)

    def _see(self, event: str, arguments: tuple) -> None:
        if event == "open":
            path, _, flags = arguments
            if not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) or str(path).startswith("/dev/"):
                return
        elif event not in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate"):
            return
        if self.busy or os.getpid() != self.process:
            return
        self.count += 1
        if self.act is None or self.event is None or self.count < self.event:
            return
        self.busy = True
        if self.emptied and event == "open" and arguments[2] & os.O_TRUNC and not isinstance(arguments[0], int):
            with contextlib.suppress(OSError):
                os.close(os.open(arguments[0], arguments[2]))
        if self.act():
            self.act = None
        self.busy = False


def start_run(job: Job, folder: Path, log: Path, fault: Fault, rank: int = 0) -> int:
    """Forks a process that does the job."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        os.setpgid(0, 0)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1), os.dup2(output, 2)
        os.chdir(folder)
        if job.processes > 1:
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(job.processes)}
        fault.set_up()
        job.run()
        code = 0
        status = Path("/proc/self/status").read_text()
        peak, size = (int(re.search(rf"{name}:\s+(\d+)", status)[1]) * 1024 for name in ("VmPeak", "VmSize"))
        log.with_suffix(".json").write_text(json.dumps({"events": fault.count, "peak": peak, "size": size}))
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
        if isinstance(end.code, str):
            os.write(2, end.code.encode() + b"\n")
    except BaseException:
        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(code)


def wait_for(process: int, kill_after: float | None = None, number: int = signal.SIGKILL) -> int:
    """Its exit code; negative for a signal."""
    end = None if kill_after is None else time.monotonic() + kill_after
    deadline = time.monotonic() + 600
    while True:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if end is not None and time.monotonic() >= end:
            os.kill(process, number)
            end = None
        if time.monotonic() > deadline:
            os.killpg(process, signal.SIGKILL)
        time.sleep(0.002)


def run(job: Job, folder: Path, log: Path, faults: list[Fault] | None = None, **kill: Any) -> tuple[list[int], str]:
    """All processes of a job to their ends: exit codes, and what they said on their way."""
    faults = faults or [Fault()] * job.processes
    logs = [log.with_name(f"{log.name}.{rank}") for rank in range(job.processes)]
    started = [start_run(job, folder, logs[rank], faults[rank], rank) for rank in range(job.processes)]
    codes = []
    for rank, process in enumerate(started):
        codes.append(wait_for(process, **(kill if rank == 0 else {})))
    for process in started:  # workers that outlived a kill; they end by themselves, but the next trial may come first
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process, signal.SIGKILL)
    return codes, "".join(path.read_text(errors="replace") for path in logs)


# --------------------------------------------------------------------------------------------------------- trials


def look(function: Callable[[], dict[str, Any]], folder: Path) -> dict[str, Any]:
    """In a process of its own: forks of one that has threads, or locks that a killed one held, would hang."""
    reader, writer = os.pipe()
    process = os.fork()
    if not process:
        try:
            os.chdir(folder)
            answer = function()
        except BaseException as error:
            answer = AssertionError(f"half: {type(error).__name__}: {error}")
        with open(writer, "wb") as pipe:
            pickle.dump(answer, pipe)
        os._exit(0)
    os.close(writer)
    with open(reader, "rb") as pipe:
        answer = pickle.load(pipe)
    os.waitpid(process, 0)
    if isinstance(answer, AssertionError):
        raise answer
    return answer


def files_of(folder: Path) -> list[str]:
    names = (str(path.relative_to(folder)) for path in folder.rglob("*"))
    return sorted(re.sub(r"data-[0-9a-f]{12}", "data-*", name) for name in names)


def largest_files(folder: Path) -> list[int]:
    return [path.stat().st_size for path in folder.rglob("*") if path.is_file()] or [0]


def mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True, capture_output=True)


def used(folder: Path) -> int:
    space = os.statvfs(folder)
    return (space.f_blocks - space.f_bfree) * space.f_frsize


class Bench:
    """An unbroken run of a job, and trials that are compared with it."""

    def __init__(self, name: str, job: Job, folder: Path, seed: int = 0):
        self.name, self.job, self.folder = name, job, folder / name
        self.folder.mkdir()
        self.random = random.Random(f"{seed} {name}")
        self.before, self.log = self.folder / "before", self.folder / "log"
        self.before.mkdir()
        starting = Job(job.start, job.look)
        codes, said = run(starting, self.before, self.log)
        assert codes == [0], said
        self.old = look(job.look, self.before)
        self.whole = self.copy("whole")
        began = time.monotonic()
        codes, said = run(job, self.whole, self.log)
        assert codes == [0] * job.processes, said
        self.seconds = time.monotonic() - began
        report = json.loads(Path(f"{self.log}.0").with_suffix(".json").read_text())
        self.events, self.memory = report["events"], report["peak"]
        self.new, self.files = look(job.look, self.whole), files_of(self.whole)

    def copy(self, name: str) -> Path:
        folder = self.folder / name
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.before, folder)
        return folder

    def check_state(self, folder: Path) -> str:
        """`old`, `new` or `between`, where a job has several outputs; what is half is an error."""
        function = self.job.before or self.job.look
        found = look(function, folder)
        old, new = (look(function, place) for place in (self.before, self.whole))
        if found in (old, new):
            return "new" if found == new else "old"
        if self.job.whole:
            raise AssertionError(f"neither old nor new: {different(found, new)}")
        for name, value in found.items():
            if value not in (old.get(name), new.get(name)):
                raise AssertionError(f"half: {name}")
        return "between"

    def check_again(self, folder: Path) -> None:
        """The same command, without a fault."""
        codes, said = run(self.job, folder, self.log)
        if any(codes) and not (self.job.finished and self.job.finished in said and "Traceback" not in said):
            raise AssertionError(f"the next run ended with {codes}: {said[-1500:]}")
        found = look(self.job.look, folder)
        if found != self.new:
            raise AssertionError(f"not that of an unbroken run: {different(found, self.new)}")
        if files_of(folder) != self.files:
            raise AssertionError(f"files left or missing: {sorted(set(files_of(folder)) ^ set(self.files))[:8]}")

    # ------------------------------------------------------------------------------------------------- one trial

    def trial(self, fault: str, number: int) -> str:
        """How it ended; raises `AssertionError` where something is wrong."""
        if fault in SIGNALS:
            return self.killed(SIGNALS[fault], number)
        return {"full": self.full, "read-only": self.read_only, "memory": self.out_of_memory}[fault](number)

    def killed(self, number: int, trial: int) -> str:
        folder = self.copy("trial")
        faults, kill = [Fault() for _ in range(self.job.processes)], {}
        form = ("event", "byte", "time")[trial % 3] if number == signal.SIGKILL else ("event", "time")[trial % 2]
        if form == "event":

            def act() -> bool:
                os.kill(os.getpid(), number)
                time.sleep(5)  # the signal may take a moment
                return True

            faults[0] = Fault(self.random.randint(1, self.events), self.random.random() < 0.5, act)
        elif form == "byte":
            sizes = largest_files(self.whole)
            faults[0] = Fault(byte=int(self.random.choice(sizes) * self.random.random()))
        else:
            kill = {"kill_after": self.random.random() * 1.02 * self.seconds, "number": number}
        codes, said = run(self.job, folder, self.log, faults, **kill)
        if codes[0] > 0 and form == "byte" and "too large" not in said:
            raise AssertionError(f"ended with {codes}: {said[-1500:]}")
        state = self.check_state(folder)
        self.check_again(folder)
        return f"{'finished' if codes[0] == 0 else 'stopped'}, {state}"

    @contextlib.contextmanager
    def disk(self, size: int):
        """A small disk with the state before on it."""
        folder = self.folder / "disk"
        folder.mkdir(exist_ok=True)
        mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder))
        try:
            shutil.copytree(self.before, folder / "in")
            yield folder / "in"
        finally:
            subprocess.run(["umount", "-l", str(folder)], check=True)

    def full(self, number: int) -> str:
        if not hasattr(self, "space"):
            with self.disk(1 << 30) as folder:
                begin, peak = used(folder), 0
                process = start_run(self.job, folder, self.log.with_name("log.0"), Fault())
                while os.waitpid(process, os.WNOHANG) == (0, 0):
                    peak = max(peak, used(folder))
                    time.sleep(0.001)
                self.space = (begin, max(peak, used(folder)))
        begin, peak = self.space
        size = self.random.randint(begin // 4096 + 1, max(peak // 4096, begin // 4096 + 2)) * 4096
        with self.disk(size) as folder:
            codes, said = run(self.job, folder, self.log)
            state = self.check_state(folder)
            if codes[0] != 0:
                self.check_message(codes, said, r"disk is full: \S+ could not be written|no space left on device: '")
            mount("-o", f"remount,size={1 << 30}", str(folder.parent))
            self.check_again(folder)
        return f"{'finished' if codes[0] == 0 else 'stopped'}, {state}"

    def check_message(self, codes: list[int], said: str, pattern: str) -> None:
        last = said.strip().splitlines()[-1] if said.strip() else ""
        if set(codes) - {0, 1} or not re.search(pattern, last, re.IGNORECASE):
            raise AssertionError(f"ended with {codes} and said: {said[-1500:]}")
        if self.job.one_line and "Traceback" in said:
            raise AssertionError(f"a traceback: {said[-1500:]}")

    def read_only(self, number: int) -> str:
        """Read-only from the start, or from a random change to the file system on."""
        with self.disk(1 << 30) as folder:
            disk, libc = str(folder.parent).encode(), ctypes.CDLL(None, use_errno=True)

            def act() -> bool:  # MS_REMOUNT | MS_RDONLY; busy while a file is open for writing
                return libc.mount(None, disk, None, 32 | 1, None) == 0

            fault = Fault()
            if number % 2:
                fault = Fault(self.random.randint(1, self.events), act=act)
            else:
                assert act()
            codes, said = run(self.job, folder, self.log, [fault] * self.job.processes)
            state = self.check_state(folder)
            if any(codes):
                self.check_message(codes, said, "read-only|cannot be written|permission")
            mount("-o", "remount,rw", str(folder.parent))
            self.check_again(folder)
        return f"{'finished' if codes[0] == 0 else 'stopped'}, {state}"

    def out_of_memory(self, number: int) -> str:
        folder = self.copy("trial")
        status = Path("/proc/self/status").read_text()
        now = int(re.search(r"VmSize:\s+(\d+)", status)[1]) * 1024
        fault = Fault(memory=int(self.random.random() * max(self.memory - now, 1 << 20)))
        codes, said = run(self.job, folder, self.log, [fault] * self.job.processes)
        state = self.check_state(folder)
        if codes[0] > 0:
            self.check_message(codes, said, "memory|allocat|thread|map segment|primitive")
        self.check_again(folder)
        return f"{'finished' if codes[0] == 0 else 'stopped'}, {state}"


def different(found: Any, expected: Any, at: str = "") -> str:
    if isinstance(found, dict) and isinstance(expected, dict):
        for name in [*found, *expected]:
            if found.get(name) != expected.get(name):
                return different(found.get(name), expected.get(name), f"{at}[{name}]")
    if isinstance(found, list) and isinstance(expected, list) and len(found) == len(expected):
        for number, (one, other) in enumerate(zip(found, expected, strict=True)):
            if one != other:
                return different(one, other, f"{at}[{number}]")
    return f"{at} {str(found)[:150]} in place of {str(expected)[:150]}"


@dataclass
class Outcome:
    job: str
    fault: str
    trials: int
    good: int
    ends: dict[str, int]
    errors: list[str]


def campaign(name: str, job: Job, fault_names: list[str], trials: int, folder: Path, seed: int = 0) -> list[Outcome]:
    outcomes = []
    try:
        bench = Bench(name, job, folder, seed)
    except AssertionError as error:
        return [Outcome(name, fault, trials, 0, {}, [f"{name}, undisturbed: {error}"]) for fault in fault_names]
    for fault in fault_names:
        ends, errors = Counter(), []
        for number in range(trials):
            try:
                ends[bench.trial(fault, number)] += 1
            except Exception as error:
                errors.append(f"{name} {fault} {number}: {type(error).__name__}: {error}")
        outcomes.append(Outcome(name, fault, trials, trials - len(errors), dict(ends), errors))
    return outcomes


def prepare(folder: Path) -> Path:
    """What all jobs start from, made in a fork as all work is: threads would not survive one."""
    shared = folder / "shared"
    codes, said = run(Job(lambda: Shared(shared), dict), folder, folder / "log")
    assert codes == [0], said
    return shared


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", default="all", help="starts of names, with commas between, or all")
    parser.add_argument("--fault", default="kill", help=f"all, or of {', '.join(FAULTS)}")
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", help="to work in; by default a temporary one")
    options = parser.parse_args(arguments)
    fault_names = list(FAULTS) if options.fault == "all" else options.fault.split(",")
    errors: list[str] = []
    with tempfile.TemporaryDirectory(prefix="faults-", dir=options.folder) as temporary:
        folder = Path(temporary)
        chosen = jobs(prepare(folder))
        chosen = {
            name: job
            for name, job in chosen.items()
            if options.job == "all" or name.startswith(tuple(options.job.split(",")))
        }
        if not chosen:
            parser.error(f"--job {options.job}: there are {', '.join(jobs(folder))}")
        print(
            "| job | fault | old or new, then exact | how runs ended and what was there | seconds |\n|---|---|---|---|---|"
        )
        for name, job in chosen.items():
            for fault in fault_names:
                began = time.monotonic()
                for outcome in campaign(name, job, [fault], options.trials, folder, options.seed):
                    ends = "; ".join(f"{end}: {count}" for end, count in sorted(outcome.ends.items()))
                    seconds = time.monotonic() - began
                    line = f"| {name} | {fault} | {outcome.good} of {outcome.trials} | {ends} | {seconds:.0f} |"
                    print(line, flush=True)
                    errors += outcome.errors
                    print(*outcome.errors, sep="\n", end="\n" * bool(outcome.errors), file=sys.stderr, flush=True)
                shutil.rmtree(folder / name)
    return bool(errors)


if __name__ == "__main__":
    raise SystemExit(main())
