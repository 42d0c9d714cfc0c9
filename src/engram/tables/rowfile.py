"""A file of rows, mapped into memory: made whole or not at all, locked while it may be written, watched for truncation, and kept within a
budget of resident pages.
"""

from __future__ import annotations

import errno
import fcntl
import gc
import json
import mmap
import os
import secrets
import shutil
import weakref
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from engram.errors import TableError

__all__ = ["RowFile", "check_form", "note_form", "rows_are", "stamp_rows"]

_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Python has the name since 3.12; 0x4000 on Linux
_POPULATE_READ = 22  # MADV_POPULATE_READ, Linux 5.14
_AROUND = 1 << 16
"""Bytes that Linux maps around a page that is read, if they are in memory anyway."""
_PROBES = 16
"""Places of a file that are looked at for huge pages."""
_SHARE = 2
"""Residency is looked at whenever half of the budget may have come in, and pages go if half of it has: the sum is the budget. Smaller parts
would leave the threads that read cold rows too little to read together."""


class RowFile:
    """One mapped file.

    Args:
        path: the file. With mode ``r+`` a missing one is made, all zero.
        end: bytes that must be there.
        mode: ``r`` or ``r+``; the second holds an exclusive lock as long as the map lives, and loses it with the process.
        resident_bytes: how many bytes of files the process may have mapped in at a time, all its row files together; None is no bound.
        row_bytes: bytes of a row, in each of the tensors that hold a part of it.

    Raises:
        TableError: the file is missing, too short, locked by another writer, or cannot be made or mapped.
    """

    def __init__(
        self,
        path: Path,
        end: int,
        mode: Literal["r", "r+"],
        resident_bytes: int | None = None,
        row_bytes: Sequence[int] = (),
    ) -> None:
        path = path.absolute()  # a process may change its folder, and notes lie beside the file
        self.path, self.end, self.mode, self.resident_bytes = path, end, mode, resident_bytes
        self._in_order, self._at_random = sum(row_bytes), sum(size + _AROUND for size in row_bytes)
        self.created = mode == "r+" and not path.exists()
        """Whether the file is new, all zero."""
        try:
            if self.created:
                _create(path, end)
            with open(path, "rb" if mode == "r" else "r+b") as file:
                self._check_size(os.fstat(file.fileno()).st_size)
                if mode == "r+":
                    _lock(file.fileno(), path)
                    self.map = mmap.mmap(file.fileno(), end, access=mmap.ACCESS_WRITE)  # shares the lock until it is gone
                    self._handle = os.dup(file.fileno())
                    weakref.finalize(self, os.close, self._handle).atexit = False  # threads may write until the very end
                else:
                    # torch wants writable memory. Nothing is ever written, so no copy is made; but Linux would want memory for copies of
                    # all pages, and refuse files larger than the machine's, were it not told otherwise.
                    self.map = mmap.mmap(
                        file.fileno(), end, flags=mmap.MAP_PRIVATE | _NO_RESERVE, prot=mmap.PROT_READ | mmap.PROT_WRITE
                    )
        except OSError as error:
            raise TableError(f"cannot map {path}: {error.strerror}; check the path and the space on its disk.") from error
        with suppress(OSError, AttributeError):
            self.map.madvise(mmap.MADV_RANDOM)
        if resident_bytes is not None:
            self._out_of_huge_pages()
            _PAGES.watch(self)

    def _out_of_huge_pages(self) -> None:
        """Drop the file from the system's cache if it lies there in large pages, of which a touch maps up to two megabytes; it comes back
        in small ones. What is read or written in large pieces is kept so.
        """
        came_in = []
        for place in range(0, self.end, max(mmap.PAGESIZE, self.end // _PROBES)):
            before = _resident() or 0
            self.map[place]
            came_in.append((_resident() or 0) - before)
        # Twice, unless it is very much: now and then a page of a library comes in meanwhile.
        if max(came_in) > 4 * _AROUND or sum(size > _AROUND for size in came_in) > 1:
            self.drop()
        else:
            self.release()

    def write(self, place: int, content: memoryview) -> None:
        """Put bytes into a file of mode ``r+`` at ``place`` and after; the map shows them at once.

        What the system is given in one piece it keeps in huge pages where it can, in which rows are found faster (Linux: XFS, ext4 since 6.16).
        Where residency has a bound pages must be small: these are written through the map.

        Raises:
            TableError: the disk refuses.
        """
        if self.resident_bytes is not None:
            self.map[place : place + len(content)] = content
            return
        try:
            while content:
                written = os.pwrite(self._handle, content, place)
                content, place = content[written:], place + written
        except OSError as error:
            raise TableError(f"cannot write rows to {self.path}: {error.strerror}; check its disk.") from error

    def populate(self) -> None:
        """Read the whole file into memory at once, where the system offers that, in large pieces; otherwise pages come as they are used."""
        with suppress(OSError, ValueError, AttributeError):
            self.map.madvise(mmap.MADV_NORMAL)
            try:
                self.map.madvise(_POPULATE_READ)
            finally:
                self.map.madvise(mmap.MADV_RANDOM)

    def check(self) -> None:
        """Raise if the file was truncated since it was mapped: touching pages past its end would kill the process.

        Raises:
            TableError: it was.
        """
        self._check_size(self.map.size())

    def flush(self) -> None:
        """Write what changed to the disk; it is safe there, under the file's name, when this returns.

        Raises:
            TableError: the file was truncated, removed, or another was put in its place since it was mapped.
        """
        self.check()
        self.map.flush()
        with suppress(OSError):
            if os.path.samestat(os.stat(self.path), os.fstat(self._handle)):
                return
        raise TableError(
            f"{self.path}: another file is there now, or none; the rows are in the one that was mapped. Save the memory elsewhere."
        )

    def changing(self) -> None:
        """Check, and withdraw the note of what the file holds: not every file system's times tell of writes through a map.

        Raises:
            TableError: the file was truncated.
        """
        self.check()
        with suppress(OSError):
            os.unlink(_note_of(self.path))

    def _check_size(self, size: int) -> None:
        if size < self.end:
            raise TableError(
                f"{self.path}: got {size:,} bytes, expected at least {self.end:,}; the file was truncated, or is another table's. "
                "Copy it again and reload."
            )

    def rows_at_once(self) -> int | None:
        """Rows that may be touched between two calls of ``touched``; None if any number."""
        return None if self.resident_bytes is None else max(1, self.resident_bytes // _SHARE // self._at_random)

    def touched(self, rows: int, in_order: bool = False) -> None:
        """Note that rows were read or written, and let go of pages if the budget is used up. They stay in the system's cache."""
        if self.resident_bytes is None:
            return
        _PAGES.unseen += rows * (self._in_order if in_order else self._at_random)
        if _PAGES.unseen < self.resident_bytes // _SHARE:
            return
        _PAGES.unseen, now = 0, _resident()
        if now is None or now - _PAGES.before > self.resident_bytes // _SHARE:
            for file in list(_PAGES.files):
                file.release()

    def soon(self, start: int, size: int) -> None:
        """Have bytes read ahead that are needed next, in order; the map as a whole expects single rows."""
        first = start - start % mmap.PAGESIZE
        with suppress(OSError, ValueError, AttributeError):
            self.map.madvise(mmap.MADV_WILLNEED, first, min(start + size, self.end) - first)

    def drop(self) -> None:
        """Have the system drop the file from its cache, as far as it does; what was written is written to the disk first."""
        self.release()
        with suppress(OSError, AttributeError), open(self.path, "rb") as file:
            os.fdatasync(file.fileno())  # only what is on the disk is dropped
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def release(self) -> None:
        """Let go of all pages; what was written is safe in the system's cache, and on the disk when that is written."""
        with suppress(OSError, AttributeError):
            self.map.madvise(mmap.MADV_DONTNEED)


class _Pages:
    """Pages of all row files with a budget: it is one for the process."""

    def __init__(self) -> None:
        self.files: weakref.WeakSet[RowFile] = weakref.WeakSet()
        self.unseen = self.before = 0

    def watch(self, file: RowFile) -> None:
        """Count a file's pages in; what the process had mapped before the first of them belongs to others."""
        if not self.files:
            self.unseen, self.before = 0, _resident() or 0
        self.files.add(file)


_PAGES = _Pages()


def _create(path: Path, size: int) -> None:
    """A file of zeros with all its blocks: a full disk is an error now, not a crash later."""
    path.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(path.parent).free
    if size > free:
        raise TableError(
            f"{path}: got {size:,} bytes of rows, expected at most the {free:,} bytes free on the disk; free space there."
        )
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, size)
        with suppress(FileExistsError):  # somebody made it meanwhile: theirs counts
            os.link(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _lock(handle: int, path: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            raise
        gc.collect()  # a table of ours that nobody uses may still hold it
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise TableError(
                f"{path} is locked: another process, or another table of this one, may write to it. Close that first, or map it with mode='r'."
            ) from None


def _resident() -> int | None:
    """Bytes of files that the process has mapped in; None where the system does not say."""
    with suppress(OSError, ValueError, StopIteration), open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssFile:")) * 1024
    return None


def stamp_rows(path: Path, source: str) -> None:
    """Note beside a row file that it holds the rows of ``source``, as long as nobody changes it.

    A later change shows in the file's time, which is put an instant back here so that it always differs.
    """
    status = os.stat(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns - 1_000_000_000))
    status = os.stat(path)
    note = {"source": source, "bytes": status.st_size, "mtime_ns": status.st_mtime_ns}
    _write_note(_note_of(path), note)


def rows_are(path: Path, source: str) -> bool:
    """Whether a row file holds the rows of ``source``, unchanged (see ``stamp_rows``)."""
    with suppress(OSError, ValueError):
        status = os.stat(path)
        note = json.loads(_note_of(path).read_text(encoding="utf-8"))
        return note == {"source": source, "bytes": status.st_size, "mtime_ns": status.st_mtime_ns}
    return False


def note_form(path: Path, form: str, rows: int, dim: int) -> None:
    """Note beside a row file, for as long as it lives, how its rows are stored: other formats may be as many bytes."""
    _write_note(_form_of(path), {"format": form, "rows": rows, "dim": dim})


def check_form(path: Path, form: str, rows: int, dim: int) -> None:
    """Refuse a row file whose rows are stored otherwise, if that was noted.

    Raises:
        TableError: they are.
    """
    found, expected = None, {"format": form, "rows": rows, "dim": dim}
    with suppress(OSError, ValueError):
        found = json.loads(_form_of(path).read_text(encoding="utf-8"))
    if found is not None and path.exists() and found != expected:
        raise TableError(
            f"{path}: got rows stored as {found}, expected {expected}; choose another folder, or the dtype they have."
        )


def _write_note(file: Path, fields: dict[str, Any]) -> None:
    """Whole or not at all."""
    temporary = file.with_name(f"{file.name}.tmp")
    temporary.write_text(json.dumps(fields) + "\n", encoding="utf-8")
    os.replace(temporary, file)


def _form_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.form")


def _note_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")
