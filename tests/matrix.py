"""Runs the quick tests on the oldest and on the newest supported PyTorch and transformers: `make matrix`.

Each pair gets a virtual environment of its own in `.venv-matrix/`, which stays for the next time. The oldest versions are
the lower bounds in pyproject.toml, the newest those that pip chooses. CI tests the newest with each change; the oldest are
for a release, as their PyTorch is a download of several gigabytes.

    python tests/matrix.py                      # both
    python tests/matrix.py oldest -- tests/test_modeling_coca.py -x
"""

import argparse
import os
import re
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Without the tools of tests/tools and the scripts, which ask for newer versions themselves; their tests are skipped
EXTRAS = "convert,eval,inference,retrieval,train"
TEST_TOOLS = ["hypothesis>=6.100", "parameterized>=0.9", "pytest>=8.0", "timm>=1.0.23"]


def lower_bounds() -> list[str]:
    """`["torch==2.6.*", ...]` from pyproject.toml's bounds of PyTorch, torchvision and transformers."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    requirements = [*project["dependencies"], *project["optional-dependencies"]["torchvision"]]
    bounds = []
    for name in ("torch", "torchvision", "transformers"):
        (bound,) = (m[1] for r in requirements if (m := re.match(rf"{name}>=([\d.]+)", r)))
        bounds.append(f"{name}=={bound}" if bound.count(".") > 1 else f"{name}=={bound}.0")
    return bounds


def run(name: str, versions: list[str], pytest_args: list[str]) -> tuple[str, int]:
    """Installs `versions`, tests, and returns a line of the table and pytest's exit status."""
    folder = ROOT / ".venv-matrix" / name
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not python.exists():
        venv.create(folder, with_pip=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    upgrade = [] if name == "oldest" else ["--upgrade"]
    print(f"==> {name}: installing {', '.join(versions)}", flush=True)
    subprocess.run([*pip, *upgrade, *versions, *TEST_TOOLS, "--editable", f"{ROOT}[{EXTRAS}]"], check=True)
    code = "import torch, transformers as t; print(f'torch {torch.__version__}, transformers {t.__version__}')"
    found = subprocess.run([str(python), "-c", code], check=True, capture_output=True, text=True).stdout.strip()
    print(f"==> {name}: {found}", flush=True)
    tests = subprocess.Popen(
        [str(python), "-m", "pytest", "-q", *pytest_args], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    last = ""
    for line in tests.stdout:
        print(line, end="", flush=True)
        last = line.strip() or last
    return f"| {name} | {found} | {last.strip('= ')} |", tests.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="oldest, newest or both (the default)")
    own, pytest_args = sys.argv[1:], []
    if "--" in own:
        own, pytest_args = own[: own.index("--")], own[own.index("--") + 1 :]
    matrix = {"oldest": lower_bounds(), "newest": ["torch", "torchvision", "transformers"]}
    names = parser.parse_args(own).names or list(matrix)
    if unknown := sorted(set(names) - set(matrix)):
        parser.error(f"there is no {', '.join(unknown)}: choose from {', '.join(matrix)}")
    results = [run(name, matrix[name], pytest_args) for name in names]
    print("\n| versions | | result |\n|---|---|---|", *(line for line, _ in results), sep="\n")
    return max(status for _, status in results)


if __name__ == "__main__":
    sys.exit(main())
