"""Writing files so that nothing half-written ever has its final name.

A file goes to a temporary name in the same folder, is flushed to disk, then renamed; a folder is built beside its final
place and moved there in one step.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sd_vae.errors import UserError

__all__ = [
    "atomic_file",
    "atomic_folder",
    "file_errors",
    "finite",
    "make_folder",
    "read_json",
    "read_text",
    "require_own_folder",
    "require_writable_target",
    "write_json",
    "write_text",
]


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`; on success it becomes `path`, on any exception it is removed.

    Raises:
        UserError: The folder cannot be made or written, or the disk is full.
    """
    path = Path(path)
    with file_errors("write", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        os.close(handle)
    temporary = Path(name)
    try:
        with file_errors("write", path):
            yield temporary
            os.chmod(temporary, 0o666 & ~_umask())  # mkstemp makes 0600
            _sync(temporary)
            os.replace(temporary, path)
            _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty temporary folder beside `path`; on success it becomes `path`, on any exception it is removed.

    Args:
        path: Final folder.
        overwrite: Replace a folder that is there; it stays in place until the new one is complete.

    Raises:
        UserError: `path` exists and `overwrite` is off, its parent cannot be written, or the disk is full.
    """
    path = Path(path)
    require_writable_target(path, overwrite=overwrite)
    with file_errors("write", path):
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    try:
        with file_errors("write", path):
            yield temporary
            os.chmod(temporary, 0o777 & ~_umask())
            for item in sorted(temporary.rglob("*"), reverse=True):
                _sync(item)
            _sync(temporary)
            if path.is_dir():
                old = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.parent))
                os.replace(path, old / path.name)
                os.replace(temporary, path)
                shutil.rmtree(old)
            else:
                os.replace(temporary, path)
            _sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def require_writable_target(path: Path, *, overwrite: bool = False) -> None:
    """Check that an output may be made at `path`, and make its parent folder.

    An empty folder counts as absent.

    Raises:
        UserError: Something is there and `overwrite` is off, or the parent cannot be made or written.
    """
    path = Path(path)
    with file_errors("write", path):
        is_taken = path.exists() and not (path.is_dir() and not any(path.iterdir()))
        if is_taken and not overwrite:
            raise UserError(f"{path} exists; choose another place or pass --overwrite to replace it.")
        folder = next((parent for parent in path.parents if parent.exists()), Path())
        if not folder.is_dir():
            raise UserError(f"cannot write {path}: {folder} is a file, not a folder; choose another place.")
        path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"{path.parent} is not writable; choose another place or change its permissions.")


def require_own_folder(path: Path, own: Collection[str], *, kind: str, overwrite: bool) -> None:
    """Check that an output folder may be made at `path`, where at most what the program itself wrote is replaced.

    Args:
        path: The folder.
        own: Names of what the program writes into it.
        kind: What such a folder is called.
        overwrite: Whether it may be replaced.

    Raises:
        UserError: As `require_writable_target`, or it would replace a file or a folder with anything else in it.
    """
    path = Path(path)
    if overwrite and path.is_file():
        raise UserError(f"{path} is a file and not {kind}, so it is not replaced; choose another --out.")
    names = sorted(item.name for item in path.iterdir()) if path.is_dir() else []
    others = [name for name in names if name not in own and not name.endswith((".tmp", ".old"))]
    if overwrite and others:
        raise UserError(
            f"{path} exists and is not {kind} (it holds {others[0]}), so it is not replaced; choose another --out."
        )
    require_writable_target(path, overwrite=overwrite)


def make_folder(path: Path) -> None:
    """Make a folder and those above it, where they are not there.

    Raises:
        UserError: It cannot be made.
    """
    with file_errors("write", path):
        path.mkdir(parents=True, exist_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, whole or not at all; NaN and infinity become null, which every reader takes."""
    write_text(path, json.dumps(finite(value), indent=2, sort_keys=False, allow_nan=False) + "\n")


def read_text(path: Path) -> str:
    """Return the text of a file.

    Raises:
        UserError: The file is missing or unreadable.
    """
    with file_errors("read", path):
        return Path(path).read_text(encoding="utf-8", errors="replace")


def read_json(path: Path) -> Any:
    """Return the value in a JSON file.

    Raises:
        UserError: The file is missing, unreadable or not JSON.
    """
    try:
        return json.loads(read_text(path))
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); restore it or make it anew.") from None


@contextmanager
def file_errors(verb: str, path: Path) -> Iterator[None]:
    """Turn an error of the file system into one line that names the path and the reason.

    Args:
        verb: read or write.
        path: What is read or written.

    Raises:
        UserError: The file system refused.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"cannot {verb} {path}: {reason}; check the path, its permissions and the disk.") from error


def finite(value: Any) -> Any:
    """Return a JSON value with null in place of NaN and infinity, which JSON does not have."""
    if isinstance(value, float):
        return value if abs(value) < float("inf") else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync(path: Path) -> None:
    """Flush a file, or on POSIX a folder's entries, to disk."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)  # Windows flushes only what it may write
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
