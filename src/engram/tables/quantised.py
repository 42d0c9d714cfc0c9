"""Rows in fewer bits: read as float32, changed row by row, not trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Self

import torch
from torch import Tensor

from engram.errors import TableError
from engram.tables.base import EmbeddingTable, check_place, check_row_ids, replaced
from engram.tables.formats import chosen, row_format
from engram.tables.memory import check_fits, lazy_zeros
from engram.tables.pinned import PageLock, through_host, unlock_what_waits
from engram.tables.prefetch import RowHandle, RowPrefetcher

__all__ = ["QuantisedTable"]


class QuantisedTable(EmbeddingTable):
    """Rows of a format with scales, on the model's device or in host memory.

    Args:
        rows: number of rows.
        dim: values per row.
        form: name of a quantised ``RowFormat``.
        device: where the rows are made; they move with the module.
        host: keep them in host memory instead, wherever the module goes.

    Raises:
        TableError: the format is unknown or needs no scales, or memory does not suffice.
    """

    weight: Tensor
    scales: Tensor

    def __init__(self, rows: int, dim: int, form: str, device: torch.device | str | None = None, host: bool = False) -> None:
        super().__init__()
        self._lock = PageLock()
        self.rows, self.dim, self.form, self.host = rows, dim, row_format(form), host
        if self.form.scale_dtype is None:
            raise TableError(f"QuantisedTable: got format {form!r}, expected one with scales; use a DeviceTable or HostTable.")
        weight, scales = self._allocate(device)
        self.register_buffer("weight", weight)
        self.register_buffer("scales", scales)

    def _allocate(self, device: torch.device | str | None) -> tuple[Tensor, Tensor]:
        """Values and scales, all zero, where they shall live."""
        form, rows, dim = self.form, self.rows, self.dim
        assert form.scale_dtype is not None
        shape, scale_shape = (rows, form.width(dim)), form.scale_shape(rows, dim)
        if self.host:
            unlock_what_waits()
            return lazy_zeros(shape, form.dtype, "tier='host'"), lazy_zeros(scale_shape, form.scale_dtype, "tier='host'")
        check_fits(rows * form.row_bytes(dim), device, "tier='device'")
        # As bytes: zeros() knows fewer types than tensors do.
        weight = torch.zeros(shape, dtype=torch.uint8, device=device).view(form.dtype)
        return weight, torch.zeros(scale_shape, dtype=form.scale_dtype, device=device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        if self.host:
            device = fn(torch.empty(0, device="cpu")).device
            if device.type == "cuda":  # page-locking takes a while: now, not at the first look-up
                self._stored_on(device)
            return self
        # Only moves are followed: another dtype would make the stored bits meaningless.
        for name in ("weight", "scales"):
            old = getattr(self, name)
            setattr(self, name, old.to(fn(torch.empty(0, device=old.device)).device))
        return self

    @property
    def value_dtype(self) -> torch.dtype:
        """float32."""
        return torch.float32

    @property
    def can_be_trained(self) -> bool:
        """No: they are read and edited."""
        return False

    @property
    def tier(self) -> str:
        """``host`` or ``device``."""
        return "host" if self.host else "device"

    @property
    def format_name(self) -> str:
        """How rows are stored, by its name in ``FORMATS``."""
        return self.form.name

    @property
    def location(self) -> str:
        """Where the rows are, for people."""
        return "host memory" if self.host else str(self.weight.device)

    @property
    def nbytes(self) -> int:
        """Bytes of the rows with their scales."""
        return self.rows * self.form.row_bytes(self.dim)

    def lookup(self, row_ids: Tensor | RowHandle, dtype: torch.dtype | None = None) -> Tensor:
        """Rows ``[..., dim]``, float32 unless ``dtype`` is given, on the device of ``row_ids``; no gradient."""
        return row_ids.wait() if isinstance(row_ids, RowHandle) else self.read(row_ids, dtype or self.value_dtype)

    def read(self, row_ids: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """Rows ``[..., dim]`` on the device of ``row_ids``, into ``out`` if given; page-locked host rows are read by the device itself."""
        stored = self._stored_on(row_ids.device)
        if stored is not None:
            return self.form.read(*stored, row_ids, dtype, out)
        if self.host:
            return through_host(
                lambda numbers, rows: self.form.read(self.weight, self.scales, numbers, dtype, rows),
                row_ids,
                self.dim,
                dtype,
                out,
            )
        rows = self.form.read(self.weight, self.scales, row_ids.to(self.weight.device), dtype).to(row_ids.device)
        return rows if out is None else out.copy_(rows)

    def read_stored(self, row_ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """Values ``[n, width]`` and scales as they are stored, of rows numbered where the table is."""
        return chosen(self.weight, row_ids), self.scales[row_ids]

    def prefetch(
        self, row_ids: Tensor, dtype: torch.dtype | None = None, through: RowPrefetcher | None = None
    ) -> Tensor | RowHandle:
        """Start fetching rows, where ``through`` thinks that it pays."""
        if through is None or not through.pays(self, row_ids.device):
            return row_ids
        return through.start(self, row_ids, dtype or self.value_dtype)

    def is_read_by(self, device: torch.device) -> bool:
        """Whether ``device`` reads rows and scales itself."""
        return device.type != "cpu" and self._stored_on(device) is not None

    def _stored_on(self, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """Rows and scales as ``device`` sees them; None where they must be sent there."""
        if self.weight.device == device:
            return self.weight, self.scales
        if not self.host or device.type != "cuda":
            return None
        weight, scales = self._lock.view(self.weight, device), self._lock.view(self.scales, device)
        return None if weight is None or scales is None else (weight, scales)

    @torch.no_grad()
    def update_rows(self, row_ids: Tensor, fn: Callable[[Tensor], Tensor]) -> None:
        """Replace rows by what ``fn`` makes of their float32 values, quantised again.

        Raises:
            TableError: a row number is out of range, ``fn`` changed the shape or gave a value that is not finite.
        """
        if row_ids.numel() == 0:
            return
        check_row_ids(row_ids, self.rows)
        stored, scales = self.form.encode(replaced(self.lookup(row_ids), fn))
        assert scales is not None
        self._before_writing()
        row_ids = row_ids.to(self.weight.device)
        self.weight.view(torch.uint8)[row_ids] = stored.view(torch.uint8).to(self.weight.device)
        self.scales[row_ids] = scales.to(self.scales.device)
        self._count_change()

    def _count_change(self) -> None:
        """As torch counts changes of a tensor, in inference mode too: copies of hot rows go by it."""
        torch.autograd.graph.increment_version(self.weight)

    def _before_writing(self) -> None:
        """Wait until no device reads the rows any more."""
        self._lock.settle()
        super()._before_writing()

    @torch.no_grad()
    def load_stored(self, start: int, values: Tensor, scales: Tensor) -> None:
        """Put rows of this very format at ``start`` and after, bit for bit: float8 made anew would round small values again.

        Args:
            start: first row.
            values: ``[n, width]``.
            scales: of these rows.

        Raises:
            TableError: they do not fit there, or scales are too few or too many.
        """
        check_place(start, values, self.rows, self.weight.shape[1])
        expected = self.form.scale_shape(len(values), self.dim)
        if scales.shape != expected:
            raise TableError(f"load_stored: got scales {list(scales.shape)} of {len(values)} rows, expected {list(expected)}.")
        self._before_writing()
        self._put(start, values.view(self.weight.dtype), scales)

    def _put(self, start: int, values: Tensor, scales: Tensor) -> None:
        """Store consecutive rows, which fit."""
        self.weight[start : start + values.shape[0]].view(torch.uint8).copy_(values.view(torch.uint8))
        self.scales[start : start + values.shape[0]].copy_(scales)
        self._count_change()

    @torch.no_grad()
    def load_rows(self, start: int, rows: Tensor) -> None:
        """Quantise rows ``[n, dim]`` and put them at ``start`` and after.

        Raises:
            TableError: they do not fit there, or a value is not finite.
        """
        check_place(start, rows, self.rows, self.dim)
        stored, scales = self.form.encode(rows)
        assert scales is not None
        self._before_writing()
        self._put(start, stored, scales)

    def iter_row_blocks(self, block_rows: int = 1 << 16) -> Iterator[tuple[int, Tensor]]:
        """Pairs (first row, float32 rows)."""
        for start in range(0, self.rows, block_rows):
            part = slice(start, start + block_rows)
            yield start, self.form.decode(self.weight[part], self.scales[part])
