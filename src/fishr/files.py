"""Writing files and folders so that a reader sees the old or the new, never a half."""

import hashlib
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CHECKSUMS = "SHA256SUMS"
"""Name of a file with :func:`checksums`."""


def write_text(path: Path, text: str) -> None:
    """Write aside, force to disk, rename."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write aside, force to disk, rename."""
    aside = _aside(path)
    try:
        with aside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
        _sync(path.parent)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which takes ``path``'s place when the block ends without an error."""
    aside, old = _aside(path), _aside(path.with_name(f"{path.name}.old"))
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        for file in aside.iterdir():
            _sync(file)
        # Moved away, not deleted: should the second rename fail, the old one takes its place again.
        if path.exists():
            path.rename(old)
        try:
            aside.rename(path)
        except OSError:
            if old.exists():
                old.replace(path)
            raise
        _sync(path.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)


def checksums(folder: Path, *names: str) -> str:
    """SHA-256 of files in a folder, a line each, as ``sha256sum`` writes and ``sha256sum -c`` reads them."""
    lines = []
    for name in names:
        with (folder / name).open("rb") as file:
            lines.append(f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {name}\n")
    return "".join(lines)


def remove_leftovers(folder: Path, *names: str) -> None:
    """Remove what a killed process left of files and folders with these names (patterns)."""
    for name in names:
        for path in folder.glob(f".{name}.*"):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _aside(path: Path) -> Path:
    """A name that no other process uses, on no machine of a shared file system."""
    return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")


def _sync(path: Path) -> None:
    """Force a file, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
