"""Files and folders that are there as a whole or not at all, whoever is killed whenever, and full disks told of plainly.

What is written lies under a hidden name, ending in `.unfinished`, until it is complete. A later call removes what a killed
process has left there.
"""

import ctypes
import errno
import glob
import os
import re
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_EXCHANGE = 2  # RENAME_EXCHANGE of renameat2(2), RENAME_SWAP of renameatx_np(2)
# safetensors, FAISS and PyTorch have exceptions of their own, the last without a reason
_FULL = re.compile(r"no space left|os error 28|disk quota|file too large", re.IGNORECASE)
_LITTLE = 1 << 20  # bytes


@contextmanager
def told_if_full(path: str | os.PathLike) -> Iterator[None]:
    """
    Whatever a library raises when the disk is full becomes an `OSError` of one line, which names what was to be written.

    Args:
        path (`str`): file or folder.
    """
    try:
        yield
    except Exception as error:
        if not _is_full(error, Path(path)):
            raise
        message = f"The disk is full: {path} could not be written. Free some space there, and run the same again."
        full = OSError(message)
        full.errno = errno.ENOSPC
        raise full from error


def _is_full(error: Exception, path: Path) -> bool:
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or _FULL.search(str(error)):
        return True
    if not isinstance(error, (OSError, RuntimeError)) or getattr(error, "errno", None) is not None:
        return False
    there = next(place for place in (path, *path.absolute().parents) if place.is_dir())
    return shutil.disk_usage(there).free < _LITTLE


@contextmanager
def new_file(path: str | os.PathLike) -> Iterator[Path]:
    """
    A temporary name beside `path` to write to, which is renamed to it when the block ends well. One process at a time.

    Args:
        path (`str`): the file.

    Example:

    ```python
    >>> import tempfile
    >>> from pathlib import Path
    >>> from modeling_coca.saving import new_file

    >>> path = Path(tempfile.mkdtemp()) / "a.txt"
    >>> with new_file(path) as temporary:
    ...     _ = temporary.write_text("all of it")
    >>> path.read_text()
    'all of it'
    ```
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.unfinished")
    temporary.unlink(missing_ok=True)  # of a process that was killed; or a link to elsewhere
    try:
        with told_if_full(path):
            yield temporary
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_file(path: str | os.PathLike, text: str) -> None:
    """A text, by [`new_file`]."""
    with new_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def new_files(folder: str | os.PathLike) -> Iterator[Path]:
    """
    A temporary folder to write files to, which go to `folder` one by one when the block ends well, `config.json` last.
    Each is the old one or the new one, and others stay: for files of which none depends on another.

    Args:
        folder (`str`): made if it is not there.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with _temporary(folder / "files") as temporary, told_if_full(folder):
        yield temporary
        _move_files(temporary, folder)


@contextmanager
def new_folder(folder: str | os.PathLike, keep: Callable[[str], bool] = lambda name: False) -> Iterator[Path]:
    """
    A temporary folder beside `folder`, which takes its place when the block ends well: whoever opens it sees all of the
    old one or all of the new one. On file systems that cannot exchange two folders its files are replaced one by one.

    Args:
        folder (`str`): may exist.
        keep (`Callable`): says which files and folders of an old one, by name, are taken over where the new one has none of
            that name. They are linked, not copied.

    Example:

    ```python
    >>> import tempfile
    >>> from pathlib import Path
    >>> from modeling_coca.saving import new_folder

    >>> folder = Path(tempfile.mkdtemp()) / "model"
    >>> with new_folder(folder) as temporary:
    ...     _ = (temporary / "config.json").write_text("{}")
    >>> [path.name for path in folder.iterdir()]
    ['config.json']
    ```
    """
    folder = Path(os.path.realpath(folder))
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _temporary(folder) as temporary, told_if_full(folder):
        yield temporary
        if not folder.is_dir() or not any(folder.iterdir()):
            temporary.rename(folder)
            return
        written = {path.name for path in temporary.iterdir()}
        stay = [path for path in folder.iterdir() if path.name not in written and keep(path.name)]
        if _can_exchange(temporary):
            for path in stay:
                _link(path, temporary / path.name)
            shutil.copystat(folder, temporary)
            _exchange(temporary, folder)
        else:
            _move_files(temporary, folder)
            for path in set(folder.iterdir()) - {folder / name for name in written} - set(stay):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


@contextmanager
def _temporary(folder: Path) -> Iterator[Path]:
    """A hidden folder of this process beside `folder`. Those of processes that are gone are removed."""
    host = re.sub(r"\W", "_", socket.gethostname())
    for path in folder.parent.glob(f".{glob.escape(folder.name)}.{host}-*.unfinished"):
        number = path.name.removesuffix(".unfinished").rpartition("-")[2]
        if number.isdigit() and not _is_alive(int(number)):
            shutil.rmtree(path, ignore_errors=True)
    temporary = folder.with_name(f".{folder.name}.{host}-{os.getpid()}.unfinished")
    shutil.rmtree(temporary, ignore_errors=True)  # of an earlier process of this number
    temporary.mkdir()
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _is_alive(process: int) -> bool:
    if os.name != "posix":
        return True  # cannot be asked
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True


def _move_files(source: Path, target: Path) -> None:
    paths = [path for path in source.rglob("*") if not path.is_dir()]
    for path in sorted(paths, key=lambda path: (path.name == "config.json", path)):
        place = target / path.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, place)


def _link(source: Path, target: Path) -> None:
    def link(one: str, other: str) -> None:
        try:
            os.link(one, other, follow_symlinks=False)
        except OSError:
            shutil.copy2(one, other, follow_symlinks=False)

    if source.is_dir() and not source.is_symlink():
        shutil.copytree(source, target, symlinks=True, copy_function=link)
    else:
        link(os.fspath(source), os.fspath(target))


def _exchange(one: Path, other: Path) -> None:
    """Each takes the other's name, at once."""
    libc = ctypes.CDLL(None, use_errno=True)
    rename, here = (libc.renameatx_np, -2) if sys.platform == "darwin" else (libc.renameat2, -100)
    if rename(here, os.fsencode(one), here, os.fsencode(other), _EXCHANGE):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(one), None, str(other))


def _can_exchange(folder: Path) -> bool:
    """Whether this system and the file system of a folder can; tried there."""
    places = folder / ".a", folder / ".b"
    for place in places:
        place.mkdir()
    try:
        _exchange(*places)
    except (AttributeError, OSError, TypeError):  # of Windows: there is no libc
        return False
    finally:
        for place in places:
            place.rmdir()
    return True


__all__ = ["new_file", "new_files", "new_folder", "told_if_full", "write_file"]
