"""Files and folders that are whole or not there; what the libraries below say of a full disk, in one line."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors import SafetensorError

from modeling_coca import saving
from modeling_coca.saving import new_file, new_files, new_folder, told_if_full, write_file


def contents(folder):
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def make(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("_", ".")).write_text(text)


def fail(place):
    make(place, config_json="half")
    raise ZeroDivisionError


def write_half(path):
    path.write_text("half")
    raise ZeroDivisionError


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_folder_takes_the_place_of_another(can_exchange, tmp_path, monkeypatch):
    if not can_exchange:
        monkeypatch.setattr(saving, "_can_exchange", lambda folder: False)
    out = tmp_path / "below" / "out"
    with new_folder(out) as folder:
        make(folder, config_json="1", b_txt="1")
        assert not out.exists()
    assert contents(out) == {"config.json": "1", "b.txt": "1"}
    make(out, stale_bin="old", mine_txt="mine")
    make(out / "checkpoint-2", c_txt="deep")
    out.chmod(0o750)
    with pytest.raises(ZeroDivisionError), new_folder(out) as folder:
        fail(folder)
    with new_folder(out, keep=lambda name: not name.startswith("stale")) as folder:
        make(folder, config_json="2")
        assert contents(out)["config.json"] == "1"
    assert contents(out) == {"config.json": "2", "b.txt": "1", "mine.txt": "mine", "checkpoint-2/c.txt": "deep"}
    with new_folder(out) as folder:
        make(folder, config_json="3")
    assert contents(out) == {"config.json": "3"} and os.listdir(out.parent) == ["out"]
    assert out.stat().st_mode & 0o777 == 0o750


def test_an_open_folder_is_never_without_a_whole_model(tmp_path, monkeypatch):
    """Whoever is killed between two steps: after each of them the old one or the new one is there."""
    out, seen = tmp_path / "out", []
    make(out, config_json="1", weights_bin="1")
    for name in ("rename", "replace", "unlink", "rmdir"):
        step = getattr(os, name)

        def watched(*args, step=step, **kwargs):
            result = step(*args, **kwargs)
            seen.append(contents(out) if out.is_dir() else "nothing")
            return result

        monkeypatch.setattr(os, name, watched)
    with new_folder(out) as folder:
        make(folder, config_json="2", weights_bin="2")
    assert saving._can_exchange(tmp_path) and seen
    assert {tuple(state.values()) for state in seen} <= {("1", "1"), ("2", "2")}


def test_what_killed_processes_left_is_removed_and_what_others_write_is_not(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    with new_folder(tmp_path / "out") as mine:
        number = str(os.getpid())
        dead, alive = (tmp_path / mine.name.replace(number, str(other)) for other in (process.pid, os.getppid()))
        for folder in (dead, alive, tmp_path / ".out.old.unfinished", tmp_path / f"{dead.name}.txt"):
            make(folder, a_txt="1")
    with new_folder(tmp_path / "out"):
        assert not dead.exists() and alive.exists()
    assert len(list(tmp_path.iterdir())) == 4


def test_files_are_replaced_one_by_one_the_config_last(tmp_path):
    out = tmp_path / "out"
    make(out, config_json="1", a_txt="1", other_txt="1")
    with pytest.raises(ZeroDivisionError), new_files(out) as folder:
        fail(folder)
    with new_files(out) as folder:
        make(folder, config_json="2", a_txt="2")
        make(folder / "deep", b_txt="2")
        assert contents(out)["a.txt"] == "1"
    assert contents(out) == {"config.json": "2", "a.txt": "2", "other.txt": "1", "deep/b.txt": "2"}
    assert not list(out.glob(".*"))


def test_a_file_is_whole_or_not_there(tmp_path):
    path = tmp_path / "a.json"
    write_file(path, "1")
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / ".a.json.unfinished").symlink_to(victim)
    with pytest.raises(ZeroDivisionError), new_file(path) as temporary:
        write_half(temporary)
    assert contents(tmp_path) == {"a.json": "1", "victim": "precious"}


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("Error in faiss: write error in a.faiss: 0 != 1 (No space left on device)"),
    ],
)
def test_a_full_disk_is_told_in_one_line(error, tmp_path):
    with pytest.raises(OSError, match=rf"^The disk is full: {tmp_path}/a could not be written\. Free some") as info:
        with told_if_full(tmp_path / "a"):
            raise error
    assert info.value.errno == errno.ENOSPC


def test_errors_without_a_reason_are_explained_by_the_disk(tmp_path, monkeypatch):
    def write():
        with told_if_full(tmp_path / "gone" / "a"):
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")

    with pytest.raises(RuntimeError, match="unexpected pos"):
        write()
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 0}))
    with pytest.raises(OSError, match="The disk is full"):
        write()
    with pytest.raises(FileNotFoundError), told_if_full(tmp_path):
        np.load(tmp_path / "gone.npy")
    assert Path(tmp_path).is_dir()
