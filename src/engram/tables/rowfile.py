"""A file of rows, mapped into memory: made whole or not at all, locked while it may be written, watched for truncation, and kept within a
budget of resident pages.
"""

from __future__ import annotations

import errno
import gc
import mmap
import os
import shutil
import sys
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Literal

from engram.errors import TableError
from engram.tables.hidden import give_name, hidden_beside, left_beside
from engram.tables.locks import check_lockable, lock, unlock
from engram.tables.rownotes import (
    identity_of,
    is_untouched,
    note_beside,
    read_note,
    rows_are,
    sources_of,
    stamp_rows,
    state_of_file,
    write_note,
)

__all__ = ["RowFile", "new_row_file"]

# Python has the name since 3.12.
_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)
_POPULATE_READ = 22  # MADV_POPULATE_READ, Linux 5.14
_AROUND = 1 << 16
"""Bytes that Linux maps around a page that is read, if they are in memory anyway."""
_PROBES = 16
"""Places of a file that are looked at for huge pages."""
_ELSEWHERE = "have the rows elsewhere: in Python by another TableConfig(...), on the command line by `engram place`"
_ZEROS = bytes(1 << 20)
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
        unchanged: for mode ``r``: what the file is noted to hold (``stamp_rows``). Whoever changes it withdraws that note first, so a reader
            that finds it after reading has read nothing half written; once it is gone, reading is an error.

    Raises:
        TableError: the file is missing, too short, locked by another writer, or cannot be made or mapped; it is not ``unchanged``.
    """

    def __init__(
        self,
        path: Path,
        end: int,
        mode: Literal["r", "r+"],
        resident_bytes: int | None = None,
        row_bytes: Sequence[int] = (),
        unchanged: str | None = None,
    ) -> None:
        check_lockable()
        path = path.absolute()  # a process may change its folder, and notes lie beside the file
        self.path, self.end, self.mode, self.resident_bytes = path, end, mode, resident_bytes
        self._in_order, self._at_random = sum(row_bytes), sum(size + _AROUND for size in row_bytes)
        self._filling = False
        try:
            made = _create(path, end) if mode == "r+" and not path.exists() else None
            with made or open(path, "rb" if mode == "r" else "r+b") as file:
                self._check_size(os.fstat(file.fileno()).st_size)
                if mode == "r+":
                    _lock(file.fileno(), path)
                    _fill_holes(file.fileno())
                    self.map = mmap.mmap(file.fileno(), end, access=mmap.ACCESS_WRITE)  # shares the lock until it is gone
                    self._handle = os.dup(file.fileno())
                    # Threads may write until the very end.
                    weakref.finalize(self.map, _let_go, self._handle, os.getpid()).atexit = False
                else:
                    # torch wants writable memory. Nothing is ever written, so no copy is made; but Linux would want memory for copies of
                    # all pages, and refuse files larger than the machine's, were it not told otherwise.
                    self.map = mmap.mmap(
                        file.fileno(), end, flags=mmap.MAP_PRIVATE | _NO_RESERVE, prot=mmap.PROT_READ | mmap.PROT_WRITE
                    )
        except OSError as error:
            raise TableError(
                f"cannot map {path}: {error.strerror}; check the path and the space on its disk, or {_ELSEWHERE}."
            ) from error
        self.created = mode == "r+" and (made is not None or is_untouched(path))
        """Whether the file is new, all zero: made now, or by somebody who never put anything into it."""
        self._unchanged = unchanged
        if unchanged is not None:
            self._seen, self._since = identity_of(note_beside(path)), read_note(note_beside(path)).get("mtime_ns")
            if not rows_are(path, unchanged):
                raise self._changed()
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
        self.check_unchanged()

    def check_unchanged(self) -> None:
        """Raise if the file may not hold any more what it was mapped for; of no concern to whoever may write it.

        Raises:
            TableError: somebody withdrew the note of what it holds. One that names further saves of the very same rows may come in its place.
        """
        if self._unchanged is None or (seen := identity_of(note_beside(self.path))) == self._seen:
            return
        note = read_note(note_beside(self.path))
        if note.get("mtime_ns") != self._since or self._unchanged not in sources_of(note):
            raise self._changed()
        self._seen = seen

    def _changed(self) -> TableError:
        return TableError(
            f"{self.path}: another process changes its rows, or has saved others since they were opened here for reading only; load the "
            "memory again when that process is done."
        )

    def flush(self) -> None:
        """Write what changed to the disk; it is safe there, under the file's name, when this returns.

        Raises:
            TableError: the file was truncated, removed, or another was put in its place since it was mapped.
        """
        self.check()
        try:
            self.map.flush()
        except OSError as error:
            raise TableError(
                f"cannot write the rows of {self.path} to its disk: {error.strerror}. Check the disk, and save the memory elsewhere."
            ) from error
        with suppress(OSError):
            if os.path.samestat(os.stat(self.path), os.fstat(self._handle)):
                return
        raise TableError(
            f"{self.path}: another file is there now, or none; the rows are in the one that was mapped. Save the memory elsewhere."
        )

    def changing(self) -> None:
        """Check, and withdraw the note of what the file holds: not every file system's times tell of writes through a map.

        Raises:
            TableError: the file was truncated, or the note cannot be withdrawn.
        """
        self.check()
        if self._filling:
            return
        note = note_beside(self.path)
        try:
            os.unlink(note)
        except FileNotFoundError:
            pass
        except OSError as error:
            # Whoever reads the file by that note would get rows that are half of the one and half of the other.
            raise TableError(
                f"cannot change the rows in {self.path}: {note} says what they are, and cannot be removed ({error.strerror}); see that its "
                "folder can be written."
            ) from error

    @contextmanager
    def filled_with(self, source: str) -> Iterator[None]:
        """Inside, the rows of ``source`` are put into the file, which is noted to hold them when all are on the disk.

        Until then it is noted to be filled: whoever finds that (``is_being_filled``) knows that it can be begun again, and nothing lost.

        Raises:
            TableError: the file was truncated, or the disk refuses.
        """
        self.check()
        write_note(note_beside(self.path), {"filling": source})
        self._filling = True
        try:
            yield
        finally:
            self._filling = False
        self.flush()
        stamp_rows(self.path, source)
        self.created = False

    def _check_size(self, size: int) -> None:
        if size < self.end:
            raise TableError(
                f"{self.path}: got {size:,} bytes, expected at least {self.end:,}; the file was truncated, or is another table's. "
                "Copy it again and reload; row files of a saved memory may be deleted instead: they are made anew from its rows."
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


def _create(path: Path, size: int) -> BinaryIO | None:
    """A file of zeros with all its blocks (a full disk is an error now, not a crash later), open and locked; None if somebody else made
    one meanwhile: theirs counts.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(path.parent).free + sum(left.stat().st_size for left in left_beside(path))
    if size > free:
        raise TableError(
            f"{path}: got {size:,} bytes of rows, expected at most the {free:,} bytes free on the disk; free space there, or {_ELSEWHERE}."
        )
    with hidden_beside(path) as file:
        _reserve(file.fileno(), size)
        try:
            _name_with_note(
                file, path, {**state_of_file(file.fileno()), "filling": None, "inode": os.fstat(file.fileno()).st_ino}
            )
        except FileExistsError:
            return None
        return os.fdopen(os.dup(file.fileno()), "r+b")  # the same lock


def _reserve(handle: int, size: int) -> None:
    """Have the disk give all blocks of a new file, which is zeros then.

    Raises:
        OSError: the disk is full.
    """
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(handle, 0, size)
        return
    for place in range(0, size, len(_ZEROS)):  # macOS has no such call; what is written has its blocks
        left = memoryview(_ZEROS)[: size - place]
        while left:
            written = os.pwrite(handle, left, place)
            left, place = left[written:], place + written


def _fill_holes(handle: int) -> None:
    """Have the disk give all blocks of a file that a sparse copy left without some: writing into a hole of a map on a full disk would end the
    process. Without effect on systems that cannot be asked for it (macOS).

    Raises:
        OSError: the disk is full.
    """
    if not hasattr(os, "posix_fallocate"):
        return
    found = os.fstat(handle)
    # Some systems compress, and say fewer blocks; some call blocks that were reserved and never written holes.
    if found.st_blocks * 512 < found.st_size and os.lseek(handle, 0, os.SEEK_HOLE) < found.st_size:
        try:
            os.posix_fallocate(handle, 0, found.st_size)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise


@contextmanager
def new_row_file(path: Path, size: int, source: str, placing: str) -> Iterator[BinaryIO]:
    """A file of ``size`` bytes to be written with the rows of ``source``. It gets its name, and the note of what it holds, when the context
    ends without an error.

    Args:
        path: its name.
        size: bytes, which are reserved now.
        source: what it will hold, as for ``stamp_rows``.
        placing: on whose behalf; until ``stamp_rows`` is called once more the file is taken for what an unfinished run left
            (``left_by_placing``).

    Raises:
        FileExistsError: something has that name, and stays.
        OSError: the disk is full, or the file cannot be written.
        TableError: the note cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with hidden_beside(path) as file:
        _reserve(file.fileno(), size)
        yield file
        file.flush()
        os.fsync(file.fileno())
        _name_with_note(file, path, {**state_of_file(file.fileno()), "sources": [source], "placing": placing})


def _name_with_note(hidden: BinaryIO, path: Path, note: dict[str, Any]) -> None:
    """Give a new file its name. The note comes first, so that it never is a file of unknown worth, and holds for no other file, as others may
    make one too.

    Raises:
        FileExistsError: something has that name, and stays as it is noted.
        OSError, TableError: the file system refuses; no note is left.
    """
    if os.path.lexists(path):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
    write_note(note_beside(path), note)
    try:
        give_name(hidden, path)
    except BaseException:
        if read_note(note_beside(path)) == note and not os.path.lexists(path):
            note_beside(path).unlink(missing_ok=True)
        raise


def _let_go(handle: int, process: int) -> None:
    """Give the lock back and close. A forked child shares the lock: it would keep it as long as it lives, or give it back for its parent."""
    if os.getpid() == process:
        with suppress(OSError):
            unlock(handle)
    os.close(handle)


def _lock(handle: int, path: Path) -> None:
    try:
        lock(handle)
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            raise
        gc.collect()  # a table of ours that nobody uses may still hold it
        try:
            lock(handle)
        except OSError:
            raise TableError(
                f"{path} is locked: another process, or another table of this one, may write to it. Close that first, map it with "
                "mode='r' to read it alone, or choose another path "
                "(processes that train together need one each: f'rows{os.environ[\"RANK\"]}')."
            ) from None


def _resident() -> int | None:
    """Bytes of files that the process has mapped in; None where the system does not say."""
    with suppress(OSError, ValueError, StopIteration), open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssFile:")) * 1024
    return None
