"""Rows that stay in host memory or in a mapped file, whatever device the model is on."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor

from engram.errors import TableError
from engram.native import touch_rows
from engram.ops import lookup_rows, read_rows
from engram.tables.device import DeviceTable
from engram.tables.memory import lazy_zeros
from engram.tables.pinned import PageLock, through_host
from engram.tables.prefetch import RowHandle, RowPrefetcher
from engram.tables.rowfile import RowFile

__all__ = ["HostTable", "MmapTable"]

_COLD_READERS = 64
"""Threads that touch rows of a file: reads from a disk wait, they do not compute."""
_POPULATE_READ = 22  # MADV_POPULATE_READ, Linux 5.14


class HostTable(DeviceTable):
    """A table in host memory. ``.to(device)`` and changes of dtype pass it by; look-ups carry rows to where they were asked from.

    Its parameter is an ordinary one: gradients hold the touched rows only, and ``EngramAdamW`` updates them in place on the CPU. Once a
    CUDA device asks for rows the memory is page-locked and read by the device itself. Whoever writes into ``weight`` past this class must
    know that a look-up enqueued before may still be reading.

    Args:
        rows: number of rows.
        dim: values per row.
        init: ``zero`` or ``normal``.
        dtype: storage type.

    Raises:
        TableError: the table would not fit into the memory there is.
    """

    def __init__(self, rows: int, dim: int, init: str = "zero", dtype: torch.dtype = torch.float32) -> None:
        self._lock = PageLock()
        super().__init__(rows, dim, init, dtype, "cpu")

    def _allocate(self, dtype: torch.dtype, device: torch.device | str | None) -> Tensor:
        return lazy_zeros((self.rows, self.dim), dtype, "tier='host'")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        device = fn(torch.empty(0)).device
        if device.type == "cuda":  # page-locking takes a while: now, not at the first look-up
            self._view_on(device)
        return self  # rows stay where and as they are

    @property
    def tier(self) -> str:
        """``host``."""
        return "host"

    @property
    def location(self) -> str:
        """Where the rows are, for people."""
        return "host memory"

    def lookup(self, row_ids: Tensor | RowHandle, dtype: torch.dtype | None = None) -> Tensor:
        """Rows ``[..., dim]`` on the device of ``row_ids``."""
        if isinstance(row_ids, RowHandle) or row_ids.device.type == "cpu":
            return super().lookup(row_ids, dtype)
        dtype = dtype or self.dtype
        return lookup_rows(self.weight, row_ids, dtype, fetched=self.read(row_ids, dtype))

    def read(self, row_ids: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """Rows ``[..., dim]`` on the device of ``row_ids``, into ``out`` if given; no gradient.

        A CUDA device reads page-locked memory itself. Where that cannot be, the CPU gathers and the device is sent what it asked for.
        """
        view = self._view_on(row_ids.device)
        if view is not None:
            return read_rows(view, row_ids, dtype, out)
        return through_host(lambda numbers, rows: read_rows(self.weight, numbers, dtype, rows), row_ids, self.dim, dtype, out)

    def is_read_by(self, device: torch.device) -> bool:
        """Whether ``device`` reads the memory itself."""
        return device.type != "cpu" and self._view_on(device) is not None

    def _view_on(self, device: torch.device) -> Tensor | None:
        """The rows as ``device`` sees them; None where the CPU must fetch."""
        if device.type == "cpu":
            return self.weight.detach()
        return self._lock.view(self.weight, device) if device.type == "cuda" else None

    def update_rows(self, row_ids: Tensor, fn: Callable[[Tensor], Tensor]) -> None:
        """Replace rows in place, when no device reads them any more."""
        self._lock.settle()
        super().update_rows(row_ids, fn)

    def load_rows(self, start: int, rows: Tensor) -> None:
        """Put rows ``[n, dim]`` at ``start`` and after, when no device reads them any more."""
        self._lock.settle()
        super().load_rows(start, rows)


class MmapTable(HostTable):
    """A table in a file that is mapped into memory: the system keeps the rows in use, the rest costs disk space only.

    Args:
        rows: number of rows.
        dim: values per row.
        path: the file. With mode ``r+`` a missing one is made, all zero.
        mode: ``r``: rows are read only (and the parameter is frozen); ``r+``: they can be trained and edited, in the file.
        offset: first byte of the rows in the file (a multiple of the item size), so that a tensor inside a safetensors file can be read.
        dtype: storage type.
        resident_bytes: see ``TableConfig``; None is no bound.

    Raises:
        TableError: the file is missing, too short, locked by another writer, or cannot be mapped.
    """

    def __init__(
        self,
        rows: int,
        dim: int,
        path: str | os.PathLike[str],
        mode: Literal["r", "r+"] = "r",
        offset: int = 0,
        dtype: torch.dtype = torch.float32,
        resident_bytes: int | None = None,
    ) -> None:
        if mode not in ("r", "r+"):
            raise TableError(f"MmapTable: got mode {mode!r}, expected 'r' or 'r+'.")
        self.path, self.mode, self.offset = Path(path), mode, offset
        self.warm_rows = self.cold_rows = 0
        """Rows looked up that were in memory already, and rows that had to come from the file (counted while ``count_cold`` is on)."""
        self.count_cold = False
        self._row_bytes = dim * dtype.itemsize
        self._file = RowFile(self.path, offset + rows * self._row_bytes, mode, resident_bytes)
        super().__init__(rows, dim, "zero", dtype)
        self.weight.requires_grad_(mode == "r+")
        if mode == "r+":
            file = self._file  # an optimiser's step follows, which would die of a truncated file
            self.weight.register_post_accumulate_grad_hook(lambda _: file.changing())

    def _allocate(self, dtype: torch.dtype, device: torch.device | str | None) -> Tensor:
        count = self.rows * self.dim
        return torch.frombuffer(self._file.map, dtype=dtype, count=count, offset=self.offset).view(self.rows, self.dim)

    @property
    def is_new(self) -> bool:
        """Whether the file was made for this table, all zero."""
        return self._file.created

    @property
    def tier(self) -> str:
        """``mmap``."""
        return "mmap"

    @property
    def location(self) -> str:
        """Where the rows are, for people."""
        return str(self.path)

    def lookup(self, row_ids: Tensor | RowHandle, dtype: torch.dtype | None = None) -> Tensor:
        """Rows ``[..., dim]``; those that are not in memory yet are read by many threads at once.

        Raises:
            TableError: the file was truncated since it was mapped.
        """
        if isinstance(row_ids, RowHandle):
            return super().lookup(row_ids, dtype)
        if not (torch.is_grad_enabled() and self.weight.requires_grad):
            return self.read(row_ids, dtype or self.dtype)
        if row_ids.device.type == "cpu":
            self._bring(row_ids)
        rows = super().lookup(row_ids, dtype)
        self._file.touched(row_ids.numel(), self._row_bytes)
        return rows

    def read(self, row_ids: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """Rows ``[..., dim]`` on the device of ``row_ids``, into ``out`` if given; no gradient. In parts, where memory has a bound.

        Raises:
            TableError: the file was truncated since it was mapped.
        """

        def fetch(numbers: Tensor, rows: Tensor | None) -> Tensor:
            step = self._file.rows_at_once(self._row_bytes)
            if step is None or numbers.numel() <= step:
                return self._fetch(numbers, dtype, rows)
            rows = torch.empty((*numbers.shape, self.dim), dtype=dtype) if rows is None else rows
            for some, place in zip(numbers.reshape(-1).split(step), rows.view(-1, self.dim).split(step)):
                self._fetch(some, dtype, place)
            return rows

        return fetch(row_ids, out) if row_ids.device.type == "cpu" else through_host(fetch, row_ids, self.dim, dtype, out)

    def _fetch(self, row_ids: Tensor, dtype: torch.dtype, out: Tensor | None) -> Tensor:
        self._bring(row_ids)
        rows = read_rows(self.weight, row_ids, dtype, out)
        self._file.touched(row_ids.numel(), self._row_bytes)
        return rows

    def prefetch(
        self, row_ids: Tensor, dtype: torch.dtype | None = None, through: RowPrefetcher | None = None
    ) -> Tensor | RowHandle:
        """Bring rows into memory: ahead of their use and beside it, if ``through`` is given and thinks that it pays, else at once."""
        if through is not None:
            return super().prefetch(row_ids, dtype, through)
        self._bring(row_ids.to("cpu"))
        return row_ids

    def _bring(self, row_ids: Tensor) -> None:
        """Have rows, numbered on the CPU, read from the file into memory if they are not there."""
        self._file.check()
        if row_ids.numel():
            warm = touch_rows(self.weight.detach(), row_ids.long().contiguous(), _COLD_READERS, self.count_cold)
            if self.count_cold:
                self.warm_rows += warm
                self.cold_rows += row_ids.numel() - warm

    def _view_on(self, device: torch.device) -> Tensor | None:
        return self.weight.detach() if device.type == "cpu" else None  # page-locking would read the whole file

    def populate(self) -> None:
        """Read the whole file into memory at once, where the system offers that; otherwise rows come as they are used."""
        with suppress(OSError, ValueError):
            self._file.map.madvise(_POPULATE_READ)

    def evict(self) -> None:
        """Drive the rows out of memory, as far as the system lets go of them; the next look-ups read the file again."""
        self.flush()
        self._file.release()
        with suppress(OSError, AttributeError), open(self.path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def flush(self) -> None:
        """Write changed rows to the disk; they are safe there when it returns.

        Raises:
            TableError: the file was truncated since it was mapped.
        """
        if self.mode == "r+":
            self._file.check()
            self._file.map.flush()

    def iter_row_blocks(self, block_rows: int = 1 << 16) -> Iterator[tuple[int, Tensor]]:
        """Views of consecutive rows, detached.

        Raises:
            TableError: the file was truncated since it was mapped.
        """
        for start, block in super().iter_row_blocks(block_rows):
            self._file.check()
            self._file.soon(self.offset + start * self._row_bytes, 2 * len(block) * self._row_bytes)
            yield start, block
            self._file.touched(len(block), self._row_bytes, in_order=True)

    def update_rows(self, row_ids: Tensor, fn: Callable[[Tensor], Tensor]) -> None:
        """Replace rows in the file.

        Raises:
            TableError: the file is mapped read-only or was truncated, a row number is out of range or ``fn`` changed the shape.
        """
        if self.mode == "r":
            raise TableError(f"{self.path} is mapped read-only; open it with mode='r+' to change rows.")
        self._file.changing()
        super().update_rows(row_ids, fn)
        self._file.touched(row_ids.numel(), self._row_bytes)

    def load_rows(self, start: int, rows: Tensor) -> None:
        """Put rows ``[n, dim]`` into the file at ``start`` and after.

        Raises:
            TableError: the file is mapped read-only or was truncated.
        """
        if self.mode == "r":
            raise TableError(f"{self.path} is mapped read-only; open it with mode='r+' to change rows.")
        self._file.changing()
        super().load_rows(start, rows)
        self._file.touched(rows.shape[0], self._row_bytes, in_order=True)

    def __deepcopy__(self, memo: dict[int, Any]) -> MmapTable:
        raise TableError(f"a table mapped from {self.path} cannot be copied; open the file a second time instead.")

    def __getstate__(self) -> dict[str, Any]:
        raise TableError(f"a table mapped from {self.path} cannot be pickled; save the memory and load it there instead.")
