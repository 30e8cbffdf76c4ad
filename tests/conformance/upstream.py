"""Makes the common tests of the installed transformers importable as the package `transformers_tests`.

They are not part of its wheel, but of its sdist: that of the installed version is downloaded by pip from the package
index once, its `tests` folder is kept in the user's cache, and nothing of it is in this repository. What those files
import in turn and the sdist lacks stands in `missing/`.

Without the sdist, `from transformers_tests... import ...` skips the test module that asks for it; where the environment
variable `CI` is set, it fails.
"""

import importlib.machinery
import importlib.util
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import pytest
import transformers

PACKAGE = "transformers_tests"
MISSING = Path(__file__).parent / "missing"
# A top-level module of transformers' repository, which the image and processor tests find by `sys.path`
HUB_OBJECTS = "fetch_hub_objects_for_ci"


def cache_folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "modeling_coca" / f"transformers-{transformers.__version__}"


def download(folder: Path) -> None:
    """Writes `folder/tests/*.py` from the sdist of the installed transformers, all or nothing.

    Raises:
        OSError: The sdist cannot be had; the message says why.
    """
    requirement = f"transformers=={transformers.__version__}"
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        command = [*pip, "--no-binary", "transformers", "--dest", scratch, requirement]
        try:
            run = subprocess.run(command, capture_output=True, text=True, timeout=300)
        except subprocess.TimeoutExpired as error:
            raise OSError(f"pip did not download the sdist of {requirement} in {error.timeout:.0f} s") from error
        sdists = list(Path(scratch).glob("*.tar.gz"))
        if run.returncode or len(sdists) != 1:
            raise OSError(f"pip cannot download the sdist of {requirement}: {run.stderr.strip()[-500:]}")
        top = sdists[0].name.removesuffix(".tar.gz")
        try:
            with tarfile.open(sdists[0]) as archive:
                tests = (m for m in archive if m.isfile() and m.name.startswith(f"{top}/tests/"))
                members = [member for member in tests if member.name.endswith(".py")]
                archive.extractall(scratch, members, filter="data")
        except tarfile.TarError as error:
            raise OSError(f"the sdist of {requirement} cannot be unpacked: {error}") from error
        if not members:
            raise OSError(f"the sdist of {requirement} has no tests in it")
        try:
            (Path(scratch) / top).rename(folder)
        except OSError:
            if not (folder / "tests").is_dir():  # else another process was faster
                raise


class UpstreamFinder:
    """Finds `transformers_tests`, downloading it where needed, when it is first imported."""

    @staticmethod
    def find_spec(name: str, path=None, target=None):
        if name == HUB_OBJECTS:
            return importlib.util.spec_from_file_location(name, MISSING / "utils" / f"{name}.py")
        if name != PACKAGE:
            return None
        folder = cache_folder()
        if not (folder / "tests").is_dir():
            try:
                download(folder)
            except OSError as error:
                if os.environ.get("CI"):
                    raise ImportError(f"No conformance tests: {error}") from error
                pytest.skip(f"No conformance tests: {error}", allow_module_level=True)
        # Those that look for transformers' classes in the source tree find them in the installed package
        transformers.utils.direct_transformers_import = lambda path: transformers
        spec = importlib.machinery.ModuleSpec(name, None, is_package=True)
        spec.submodule_search_locations = [str(folder / "tests"), str(MISSING)]
        return spec


if UpstreamFinder not in sys.meta_path:
    sys.meta_path.append(UpstreamFinder)
