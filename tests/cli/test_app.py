"""`coca app`: what it prints, when it ends, and what is left then."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture
def served(monkeypatch):
    """What was there while the page was: it ends at once."""
    gradio = pytest.importorskip("gradio")
    httpx = pytest.importorskip("httpx")
    seen = {}

    def visit(page):
        seen["status"] = httpx.get(page.local_url, timeout=30).status_code
        seen["uploads"] = Path(os.environ["GRADIO_TEMP_DIR"])
        assert seen["uploads"].is_dir() and seen["uploads"].stat().st_mode & 0o077 == 0
        seen["page"] = page

    monkeypatch.setattr(gradio.Blocks, "block_thread", visit)
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")
    before = signal.getsignal(signal.SIGTERM)
    yield seen
    signal.signal(signal.SIGTERM, before)


def test_the_page_is_served_and_leaves_nothing_behind(coca, served, photos, tmp_path):
    coca("index", photos, "-o", tmp_path / "photos.index", "--num_workers", 0)
    code, out, _ = coca("app", "--index", tmp_path / "photos.index", "--max_megabytes", 1)
    assert code == 0 and out.startswith("The page is at http://127.0.0.1:")
    assert served["status"] == 200 and served["page"].max_file_size == 2**20
    assert not served["page"].is_running and not served["uploads"].exists()


def test_a_port_that_is_taken(coca, served):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        code, _, err = coca("app", "--port", taken.getsockname()[1])
    assert code == 1 and "Cannot find empty port" in err and not served


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model", "./none"], "There is no model folder ./none"),
        (["--index", "./none"], "There is no index ./none"),
    ],
)
def test_errors_take_one_line(args, message, coca, served):
    code, out, err = coca("app", *args)
    assert code == 1 and err.splitlines()[-1].startswith(f"coca: {message}") and not out and not served


def test_without_gradio(coca, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("modeling_coca.app")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "gradio", None)
    code, _, err = coca("app")
    assert code == 1 and "run `pip install gradio`" in err


def test_help_tells_who_can_see_the_page(coca):
    code, out, _ = coca("app", "--help")
    assert code == 0 and "for this computer only" in out and "coca app --model outputs/quickstart" in out
    assert "lets in the whole network" in out and "Whoever has it can use it" in out


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_process_that_is_ended_deletes_what_was_sent(number, model_folder, photos, tmp_path):
    pytest.importorskip("gradio")
    httpx = pytest.importorskip("httpx")
    command = [sys.executable, "-m", "modeling_coca.cli", "app", "--model", str(model_folder)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "TMPDIR": str(tmp_path)}
    ) as run:
        try:
            address = run.stdout.readline().split()[4]
            files = {"files": ("a.png", (photos / "00.png").read_bytes())}
            assert httpx.post(f"{address}gradio_api/upload", files=files, timeout=60).status_code == 200
            (folder,) = tmp_path.glob("coca-app-*")
            assert len(list(folder.rglob("a.png"))) == 1
            run.send_signal(number)
            assert run.wait(timeout=60) == 0
        finally:
            run.kill()
    assert not folder.exists()
