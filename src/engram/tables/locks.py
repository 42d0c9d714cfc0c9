"""Locks on files by which processes tell who may write; they go with the process."""

from __future__ import annotations

try:
    import fcntl
except ImportError:  # Windows, whose locks keep others from reading too
    fcntl = None  # type: ignore[assignment]

from typing import BinaryIO

from engram.errors import TableError

__all__ = ["check_lockable", "lock", "unlock"]


def check_lockable() -> None:
    """Refuse row files where they could not be guarded.

    Raises:
        TableError: the system has no such locks.
    """
    if fcntl is None:
        raise TableError("row files: this system has no file locks as Linux and macOS have, expected tier 'device' or 'host'.")


def lock(file: int | BinaryIO, wait: bool = False) -> None:
    """Lock an open file for this process.

    Raises:
        OSError: another holds it, and ``wait`` is False; or the file system has no locks.
        TableError: the system has none.
    """
    check_lockable()
    fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))


def unlock(file: int) -> None:
    """Give a lock back."""
    fcntl.flock(file, fcntl.LOCK_UN)
