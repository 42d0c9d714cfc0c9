"""Files under hidden names until they are whole."""

from __future__ import annotations

import errno
import glob
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from engram.tables.locks import lock

__all__ = ["give_name", "hidden_beside", "left_beside"]

_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS)
"""How file systems say that they have no hard links."""


@contextmanager
def hidden_beside(path: Path) -> Iterator[BinaryIO]:
    """A new file beside ``path``, named ``.NAME.*.tmp``; open for reading and writing, and gone in the end unless ``give_name`` was called.

    It is locked, by which others tell it from what a killed process left there; that is removed.

    Raises:
        OSError: it cannot be made.
    """
    left_beside(path, remove=True)
    file = _open_hidden(path)
    try:
        with file:
            yield file
    finally:
        Path(file.name).unlink(missing_ok=True)


def _open_hidden(path: Path) -> BinaryIO:
    while True:
        file = open(path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp"), "x+b")  # noqa: SIM115
        try:
            lock(file, wait=True)
        except OSError:
            file.close()
            Path(file.name).unlink()
            raise
        if os.path.exists(file.name):
            return file
        file.close()  # somebody took it for one that was left, in the moment before it was locked


def left_beside(path: Path, remove: bool = False) -> list[Path]:
    """Hidden files for ``path`` that nobody is writing any more; with ``remove`` they are gone afterwards."""
    left = []
    for file in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        with suppress(OSError), open(file, "r+b") as opened:  # whoever writes it holds its lock
            lock(opened)
            left.append(file)
            if remove:  # while it is locked: one that was made just now may be taken for its maker's again as soon as it is not
                file.unlink(missing_ok=True)
    return left


def give_name(hidden: BinaryIO, path: Path) -> None:
    """Let a file of ``hidden_beside`` have the name ``path`` too, or alone. What has that name is never replaced.

    Raises:
        FileExistsError: something has it.
        OSError: the file system refuses.
    """
    try:
        os.link(hidden.name, path)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))  # the name is ours from here on
        os.replace(hidden.name, path)
