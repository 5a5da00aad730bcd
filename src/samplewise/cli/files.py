"""Files that are whole or absent, and a directory that only one run writes to."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

from .failures import InputError


@contextmanager
def atomically(path: Path) -> Iterator[Path]:
    """A name to write to, which becomes `path` when the block ends well and the disk holds what was written."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        yield partial
        with partial.open("r+b") as written:
            os.fsync(written.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all; what UTF-8 cannot hold becomes a question mark."""
    with atomically(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="replace")


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Keep other runs out of a directory; the system lets go of the lock when the process ends, however it ends."""
    try:
        fcntl = import_module("fcntl")
    except ImportError:  # not a POSIX system
        yield
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise InputError(f"{directory} is being written by another run of samplewise") from None
    except OSError:
        pass  # a file system without locks
    try:
        yield
    finally:
        os.close(handle)
