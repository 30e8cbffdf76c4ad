"""How the tests come here: from the sdist, all or nothing, and never in silence."""

import io
import subprocess
import tarfile
from pathlib import Path

import pytest
import transformers
import upstream


@pytest.fixture
def folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "modeling_coca" / f"transformers-{transformers.__version__}"


def pip_that(monkeypatch, returncode=0, members=()):
    """Stands in for pip: writes an sdist with these files, or fails."""

    def run(command, **kwargs):
        top = f"transformers-{transformers.__version__}"
        if not returncode:
            with tarfile.open(Path(command[command.index("--dest") + 1]) / f"{top}.tar.gz", "w:gz") as archive:
                for name in members:
                    info = tarfile.TarInfo(f"{top}/{name}")
                    info.size = 4
                    archive.addfile(info, io.BytesIO(b"a=1\n"))
        return subprocess.CompletedProcess(command, returncode, "", "no such host")

    monkeypatch.setattr(upstream.subprocess, "run", run)


def test_only_tests_are_kept(monkeypatch, folder):
    pip_that(monkeypatch, members=["setup.py", "tests/test_a.py", "tests/../../../escaped.py", "tests/data.bin"])
    with pytest.raises(OSError, match="cannot be unpacked"):
        upstream.download(folder)
    assert list(folder.parent.iterdir()) == []  # nothing half-written, nothing outside
    pip_that(monkeypatch, members=["setup.py", "tests/test_a.py", "tests/data.bin"])
    spec = upstream.UpstreamFinder.find_spec(upstream.PACKAGE)
    assert [str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()] == ["tests/test_a.py"]
    assert spec.submodule_search_locations == [str(folder / "tests"), str(upstream.MISSING)]
    pip_that(monkeypatch, returncode=1)  # asked once only
    assert upstream.UpstreamFinder.find_spec(upstream.PACKAGE) is not None


@pytest.mark.parametrize("members", [None, ["setup.py"]], ids=["no_index", "no_tests_in_it"])
def test_without_the_sdist_tests_are_skipped_and_in_ci_fail(monkeypatch, folder, members):
    pip_that(monkeypatch, returncode=int(members is None), members=members or [])
    reason = "no such host" if members is None else "no tests in it"
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match=reason):
        upstream.UpstreamFinder.find_spec(upstream.PACKAGE)
    monkeypatch.setenv("CI", "true")
    with pytest.raises(ImportError, match=reason):
        upstream.UpstreamFinder.find_spec(upstream.PACKAGE)
    assert not folder.exists()
