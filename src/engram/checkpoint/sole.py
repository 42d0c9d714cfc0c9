"""One writer at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from engram.errors import CheckpointError

__all__ = ["sole_writer"]


@contextmanager
def sole_writer(target: Path, doing: str) -> Iterator[None]:
    """Lock the name ``target``, a file or folder, by a hidden file beside it; the lock goes with the process, however it ends.

    Args:
        target: what is going to be written.
        doing: what another process that holds the lock is doing, for the message: ``building {target}``.

    Raises:
        CheckpointError: another process holds it, or the folder around it cannot be written.
    """
    target = target.resolve()  # "." has no name to hide a lock under
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(target.parent / f".{target.name}.lock")
        lock.acquire(timeout=0)
    except Timeout:
        raise CheckpointError(f"another process is {doing}; wait until it is done, then try again.") from None
    except OSError as error:
        raise CheckpointError(f"cannot write to {target.parent}: {error.strerror}; choose another folder.") from None
    try:
        yield
    finally:
        lock.release()
