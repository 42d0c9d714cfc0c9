"""Rows in a file that is mapped into memory: the system keeps the rows in use, the rest costs disk space only."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from engram.errors import TableError
from engram.native import touch_rows
from engram.ops import read_rows
from engram.tables.base import EmbeddingTable, refuse_assign, tell_before_steps
from engram.tables.formats import RowFormat, as_bytes, chosen, row_format
from engram.tables.host import HostTable
from engram.tables.pinned import through_host
from engram.tables.prefetch import RowHandle, RowPrefetcher
from engram.tables.quantised import QuantisedTable
from engram.tables.rowfile import RowFile

__all__ = ["MappedRows", "MmapTable", "QuantisedMmapTable", "row_file_layout"]

_COLD_READERS = 64
"""Threads that touch rows of a file: reads from a disk wait, they do not compute."""
_BLOCKS_IN_BOUND = 8
"""Blocks that are read one after another are so small that so many would be within the bound of what may be mapped in."""
_ALIGNMENT = 64
"""Scales begin at a multiple of so many bytes of a row file."""


def row_file_layout(rows: int, dim: int, form: RowFormat) -> tuple[tuple[int, ...], int]:
    """First bytes of the values and, if the format has them, of the scales in a row file, and the file's size."""
    values = rows * form.width(dim) * form.dtype.itemsize
    if form.scale_dtype is None:
        return (0,), values
    scales = -(-values // _ALIGNMENT) * _ALIGNMENT
    return (0, scales), scales + rows * form.row_bytes(dim) - values


class MappedRows(EmbeddingTable):
    """What tables in files have in common, whatever the format of their rows; stands in front of a table in host memory.

    Args:
        path: the file. With mode ``r+`` a missing one is made, all zero.
        mode: ``r``: rows are read only; ``r+``: they can be changed, in the file.
        places: first byte of each tensor (values, then scales if there are any), a multiple of its item size.
        row_bytes: bytes of a row in each of them.
        rows: number of rows.
        resident_bytes: see ``TableConfig``; None is no bound.
        unchanged: for mode ``r``: see ``RowFile``.

    Raises:
        TableError: the file is missing, too short, locked by another writer, or cannot be mapped.
    """

    path: Path
    mode: Literal["r", "r+"]
    read_only_because: str | None = None
    """Why rows are only read although they were to be written, if so."""
    warm_rows: int
    """Rows looked up that were in memory already (by their values; counted while ``count_cold`` is on)."""
    cold_rows: int
    """Rows looked up that had to come from the file."""

    def _map(
        self,
        path: str | os.PathLike[str],
        mode: Literal["r", "r+"],
        places: Sequence[int],
        row_bytes: Sequence[int],
        rows: int,
        resident_bytes: int | None,
        unchanged: str | None,
    ) -> None:
        """Map the file; comes before ``__init__`` of the table that this stands in front of, which then asks for its tensors."""
        if mode not in ("r", "r+"):
            raise TableError(f"{type(self).__name__}: got mode {mode!r}, expected 'r' or 'r+'.")
        end = max(place + rows * size for place, size in zip(places, row_bytes, strict=True))
        self._file = RowFile(Path(path), end, mode, resident_bytes, row_bytes, unchanged)
        self.path, self.mode = self._file.path, mode
        self.warm_rows = self.cold_rows = 0
        self.count_cold = False
        self._places, self._row_bytes = tuple(places), tuple(row_bytes)

    def _tensor(self, number: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        """One of the file's tensors."""
        size = torch.Size(shape).numel() * dtype.itemsize
        if size == 0:
            return torch.empty(shape, dtype=dtype, device="cpu")
        content = torch.frombuffer(self._file.map, dtype=torch.uint8, count=size, offset=self._places[number])
        return content.view(dtype).view(shape)

    @abstractmethod
    def _tensors(self) -> Sequence[Tensor]:
        """What the file holds, ``[rows, ...]`` each."""

    @abstractmethod
    def _gather(self, row_ids: Tensor, dtype: torch.dtype, out: Tensor | None) -> Tensor:
        """Rows, numbered on the CPU, that are in memory."""

    @property
    def is_new(self) -> bool:
        """Whether nothing was put into the file yet, be it made for this table or for one before; it is all zero."""
        return self._file.created

    def filled_with(self, source: str) -> AbstractContextManager[None]:
        """Inside, the rows of a saved memory are put into the file (see ``RowFile``)."""
        return self._file.filled_with(source)

    def check_unchanged(self) -> None:
        """Raise if somebody else changes, or has changed, rows that are only read here (see ``RowFile``).

        Raises:
            TableError: so it is.
        """
        self._file.check_unchanged()

    @property
    def tier(self) -> str:
        """``mmap``."""
        return "mmap"

    @property
    def location(self) -> str:
        """Where the rows are, for people."""
        return str(self.path)

    @property
    def can_be_trained(self) -> bool:
        """Whether the file may be written and holds floating point rows."""
        return self.mode == "r+" and super().can_be_trained

    def is_read_by(self, device: torch.device) -> bool:
        """No device but the CPU reads them: page-locking would read the whole file."""
        return False

    def read(self, row_ids: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """Rows ``[..., dim]`` on the device of ``row_ids``, into ``out`` if given; no gradient. In parts, where memory has a bound.

        Raises:
            TableError: the file was truncated since it was mapped.
        """

        def fetch(numbers: Tensor, rows: Tensor | None) -> Tensor:
            step = self._file.rows_at_once()
            if step is None or numbers.numel() <= step:
                return self._fetch(numbers, dtype, rows)
            rows = torch.empty((*numbers.shape, self.dim), dtype=dtype, device="cpu") if rows is None else rows
            for some, place in zip(numbers.reshape(-1).split(step), rows.view(-1, self.dim).split(step)):
                self._fetch(some, dtype, place)
            return rows

        return fetch(row_ids, out) if row_ids.device.type == "cpu" else through_host(fetch, row_ids, self.dim, dtype, out)

    def _fetch(self, row_ids: Tensor, dtype: torch.dtype, out: Tensor | None) -> Tensor:
        self._bring(row_ids)
        rows = self._gather(row_ids, dtype, out)
        self._file.check_unchanged()  # what was there before may have been gone while rows were read
        self._file.touched(row_ids.numel())
        return rows

    def read_stored(self, row_ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """Rows ``[n, width]`` as they are stored and their scales, if there are any; in parts, where memory has a bound.

        Raises:
            TableError: the file was truncated since it was mapped.
        """
        found = []
        for numbers in row_ids.split(self._file.rows_at_once() or max(1, len(row_ids))):
            self._bring(numbers)
            found.append([chosen(tensor, numbers) for tensor in self._tensors()])
            self._file.check_unchanged()
            self._file.touched(len(numbers))
        values, *scales = (as_bytes(torch.cat([as_bytes(part) for part in parts]), parts[0].dtype) for parts in zip(*found))
        return values, scales[0] if scales else None

    def prefetch(
        self, row_ids: Tensor, dtype: torch.dtype | None = None, through: RowPrefetcher | None = None
    ) -> Tensor | RowHandle:
        """Bring rows into memory: ahead of their use and beside it, if ``through`` is given and thinks that it pays, else at once."""
        if through is not None:
            return super().prefetch(row_ids, dtype, through)
        self._bring(row_ids.to("cpu"))
        return row_ids

    def _bring(self, row_ids: Tensor) -> None:
        """Have rows, numbered on the CPU, read from the file into memory if they are not there.

        Raises:
            TableError: the file was truncated since it was mapped.
        """
        self._file.check()
        if row_ids.numel() == 0:
            return
        numbers = row_ids.long().contiguous()
        for part, tensor in enumerate(self._tensors()):
            count = self.count_cold and part == 0
            warm = touch_rows(tensor if tensor.dim() == 2 else tensor.unsqueeze(1), numbers, _COLD_READERS, count)
            if count:
                self.warm_rows += warm
                self.cold_rows += row_ids.numel() - warm

    def populate(self) -> None:
        """Read the whole file into memory at once, where the system offers that; otherwise rows come as they are used."""
        self._file.populate()

    def evict(self) -> None:
        """Drive the rows out of memory, as far as the system lets go of them; the next look-ups read the file again."""
        self.flush()
        self._file.drop()

    def flush(self) -> None:
        """Write changed rows to the disk; they are safe there when it returns.

        Raises:
            TableError: the file was truncated, removed, or another was put in its place since it was mapped.
        """
        if self.mode == "r+":
            self._file.flush()

    def iter_row_blocks(self, block_rows: int = 1 << 16) -> Iterator[tuple[int, Tensor]]:
        """Consecutive rows, detached.

        Raises:
            TableError: the file was truncated since it was mapped.
        """
        blocks = super().iter_row_blocks(block_rows)  # type: ignore[safe-super]  # of the table that this stands in front of
        for start in range(0, self.rows, block_rows):
            # Some tables read a block when it is asked for, others leave that to whoever gets it.
            self._read_ahead(start, block_rows)
            _, block = next(blocks)
            yield start, block
            self._file.check_unchanged()
            self._file.touched(len(block), in_order=True)

    def stored_blocks(self, block_rows: int = 1 << 16) -> Iterator[tuple[Tensor, ...]]:
        """Consecutive rows as they are stored, copied: values ``[n, width]`` and, if there are any, scales; for saving. Where residency has a
        bound, blocks are smaller than asked for if they would take much of it.

        Raises:
            TableError: the file was truncated since it was mapped.
        """
        if (bound := self._file.resident_bytes) is not None:
            block_rows = max(1, min(block_rows, bound // (_BLOCKS_IN_BOUND * sum(self._row_bytes))))
        for start in range(0, self.rows, block_rows):
            self._read_ahead(start, block_rows)
            block = tuple(tensor[start : start + block_rows].clone() for tensor in self._tensors())
            self._file.check_unchanged()
            yield block
            self._file.touched(len(block[0]), in_order=True)

    def _read_ahead(self, start: int, rows: int) -> None:
        self._file.check()
        for place, size in zip(self._places, self._row_bytes):
            self._file.soon(place + start * size, 2 * rows * size)

    def update_rows(self, row_ids: Tensor, fn: Callable[[Tensor], Tensor]) -> None:
        """Replace rows in the file.

        Raises:
            TableError: the file is mapped read-only or was truncated, a row number is out of range or ``fn`` changed the shape.
        """
        self._refuse_read_only()
        self._file.check()
        super().update_rows(row_ids, fn)  # type: ignore[safe-super]
        self._file.touched(row_ids.numel())

    def load_rows(self, start: int, rows: Tensor) -> None:
        """Put rows ``[n, dim]`` into the file at ``start`` and after.

        Raises:
            TableError: the file is mapped read-only or was truncated, or the rows do not fit there.
        """
        self._refuse_read_only()
        super().load_rows(start, rows)
        self._file.touched(rows.shape[0], in_order=True)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        """As ``nn.Module``; what is loaded goes into the file.

        Raises:
            TableError: the file is mapped read-only (what is loaded would lie in pages of this process, and go with them) or was truncated, or
                loaded tensors shall take the place of the mapped ones (``assign``).
        """
        refuse_assign(state_dict, prefix, local_metadata, f"rows in {self.path}", "the file")
        if any(name.startswith(prefix) for name in state_dict):
            self._refuse_read_only()
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """As ``nn.Module``; values are read when they are used.

        Raises:
            TableError: the file was truncated since it was mapped.
        """
        self._file.check()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _put(self, start: int, *stored: Tensor) -> None:
        for rows, held, place, size in zip(stored, self._tensors(), self._places, self._row_bytes, strict=True):
            content = rows.detach().to("cpu", held.dtype).contiguous().view(-1)
            self._file.write(place + start * size, content.view(torch.uint8).numpy().data)
            torch.autograd.graph.increment_version(held)  # as any change of a tensor: copies of hot rows go by it

    def _before_writing(self) -> None:
        """Check that the file is whole, and note that it no longer holds what it held."""
        self._file.changing()
        super()._before_writing()

    def _refuse_read_only(self) -> None:
        if self.mode == "r":
            raise TableError(
                f"{self.path} is mapped read-only: its rows cannot be changed; "
                + (
                    self._when_writable()
                    or "open it with mode='r+', or load the memory with TableConfig(tier='mmap', path=...)."
                )
            )

    def _when_writable(self) -> str | None:
        because = self.read_only_because
        return because and f"load the memory again when the file can be written. It could not when it was opened: {because}"

    def __deepcopy__(self, memo: dict[int, Any]) -> MappedRows:
        raise TableError(f"a table mapped from {self.path} cannot be copied; open the file a second time instead.")

    def __getstate__(self) -> dict[str, Any]:
        raise TableError(f"a table mapped from {self.path} cannot be pickled; save the memory and load it there instead.")


class MmapTable(MappedRows, HostTable):
    """Floating point rows in a file; its parameter can be trained where the file may be written, and is frozen otherwise.

    Args:
        rows: number of rows.
        dim: values per row.
        path: the file. With mode ``r+`` a missing one is made, all zero.
        mode: ``r``: rows are read only; ``r+``: they can be trained and edited, in the file.
        offset: first byte of the rows in the file (a multiple of the item size), so that a tensor inside a safetensors file can be read.
        dtype: storage type.
        resident_bytes: see ``TableConfig``; None is no bound.
        unchanged: for mode ``r``: see ``RowFile``.

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
        unchanged: str | None = None,
    ) -> None:
        self._map(path, mode, (offset,), (dim * dtype.itemsize,), rows, resident_bytes, unchanged)
        super().__init__(rows, dim, dtype)
        self.weight.requires_grad_(mode == "r+")
        if mode == "r+":
            file = self._file
            # A step may follow, by anybody's optimiser.
            self.weight.register_post_accumulate_grad_hook(lambda _: file.changing())
            tell_before_steps(self.weight, file.changing)  # with a save between the two

    def _allocate(self, dtype: torch.dtype, device: torch.device | str | None) -> Tensor:
        return self._tensor(0, dtype, (self.rows, self.dim))

    def _tensors(self) -> Sequence[Tensor]:
        return (self.weight.detach(),)

    def _gather(self, row_ids: Tensor, dtype: torch.dtype, out: Tensor | None) -> Tensor:
        return read_rows(self.weight, row_ids, dtype, out)

    def _view_on(self, device: torch.device) -> Tensor | None:
        return None  # not page-locked: see ``is_read_by``

    def lookup(self, row_ids: Tensor | RowHandle, dtype: torch.dtype | None = None) -> Tensor:
        """Rows ``[..., dim]``; those that are not in memory yet are read by many threads at once.

        Raises:
            TableError: the file was truncated since it was mapped, or is mapped read-only and a gradient is wanted.
        """
        trained = torch.is_grad_enabled() and self.weight.requires_grad
        if trained and self.mode == "r":  # steps would go into pages of the process's own, and be lost with them
            raise TableError(
                f"{self.path} is mapped read-only: its rows cannot be trained. Freeze them (requires_grad_(False)), or "
                + (self._when_writable() or "load the memory with TableConfig(tier='mmap', path=...), which makes row files.")
            )
        if isinstance(row_ids, RowHandle):
            return super().lookup(row_ids, dtype)
        if not trained:
            return self.read(row_ids, dtype or self.dtype)
        if row_ids.device.type == "cpu":
            self._bring(row_ids)
        rows = super().lookup(row_ids, dtype)
        self._file.touched(row_ids.numel())
        return rows


class QuantisedMmapTable(MappedRows, QuantisedTable):
    """Rows of a format with scales in a file: read as float32, changed row by row, not trained.

    Args:
        rows: number of rows.
        dim: values per row.
        form: name of a quantised ``RowFormat``.
        path: the file. With mode ``r+`` a missing one is made, all zero.
        mode: ``r``: rows are read only; ``r+``: they can be edited, in the file.
        places: first bytes of values and scales in the file, so that tensors inside a safetensors file can be read; those of
            ``row_file_layout`` if not given.
        resident_bytes: see ``TableConfig``; None is no bound.
        unchanged: for mode ``r``: see ``RowFile``.

    Raises:
        TableError: the format is unknown or needs no scales; the file is missing, too short, locked by another writer, or cannot be mapped.
    """

    def __init__(
        self,
        rows: int,
        dim: int,
        form: str,
        path: str | os.PathLike[str],
        mode: Literal["r", "r+"] = "r",
        places: Sequence[int] | None = None,
        resident_bytes: int | None = None,
        unchanged: str | None = None,
    ) -> None:
        found = row_format(form)
        if found.quantised:  # what is not is refused below
            values = found.width(dim) * found.dtype.itemsize
            parts = (values, found.row_bytes(dim) - values)
            self._map(path, mode, places or row_file_layout(rows, dim, found)[0], parts, rows, resident_bytes, unchanged)
        super().__init__(rows, dim, form, host=True)

    def _allocate(self, device: torch.device | str | None) -> tuple[Tensor, Tensor]:
        assert self.form.scale_dtype is not None
        values = self._tensor(0, self.form.dtype, (self.rows, self.form.width(self.dim)))
        return values, self._tensor(1, self.form.scale_dtype, self.form.scale_shape(self.rows, self.dim))

    def _tensors(self) -> Sequence[Tensor]:
        return self.weight, self.scales

    def _gather(self, row_ids: Tensor, dtype: torch.dtype, out: Tensor | None) -> Tensor:
        return self.form.read(self.weight, self.scales, row_ids, dtype, out)

    def load_stored(self, start: int, values: Tensor, scales: Tensor) -> None:
        """Put rows of this very format into the file at ``start`` and after, bit for bit.

        Raises:
            TableError: the file is mapped read-only or was truncated.
        """
        self._refuse_read_only()
        super().load_stored(start, values, scales)
        self._file.touched(values.shape[0], in_order=True)

    def _stored_on(self, device: torch.device) -> tuple[Tensor, Tensor] | None:
        return None  # not page-locked: see ``is_read_by``
