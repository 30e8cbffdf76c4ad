"""A sample of `faults.py`: each job is killed, and meets a full disk or a read-only one where this may be tried."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(tmp_path, *arguments):
    environment = {**os.environ, "HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "tests" / "reliability" / "faults.py"), "--folder", str(tmp_path)]
    result = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr[-3000:]}"
    return result.stdout


def test_killed_jobs_leave_the_old_or_the_new_and_go_on_exactly(tmp_path):
    jobs = "caption-folder,index-update,features-anew,retrieval,convert-over,export-over"
    table = run(tmp_path, "--job", jobs, "--fault", "kill", "--trials", "1", "--seed", "1")
    assert table.count("1 of 1") == 6


@pytest.mark.skipif(os.geteuid() != 0, reason="small disks are mounted by root")
def test_full_and_read_only_disks_cost_a_line(tmp_path):
    try:
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(tmp_path)], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no small disks can be mounted here")
    subprocess.run(["umount", str(tmp_path)], check=True)
    table = run(tmp_path, "--job", "caption-jsonl,convert-over", "--fault", "full,read-only", "--trials", "1")
    assert table.count("1 of 1") == 4
