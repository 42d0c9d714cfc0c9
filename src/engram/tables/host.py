"""Rows that stay in host memory, whatever device the model is on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor

from engram.ops import lookup_rows, read_rows
from engram.tables.device import DeviceTable
from engram.tables.memory import lazy_zeros
from engram.tables.pinned import PageLock, through_host, unlock_what_waits
from engram.tables.prefetch import RowHandle

__all__ = ["HostTable"]


class HostTable(DeviceTable):
    """A table in host memory. ``.to(device)`` and changes of dtype pass it by; look-ups carry rows to where they were asked from.

    Its parameter is an ordinary one: gradients hold the touched rows only, and ``EngramAdamW`` updates them in place on the CPU. Once a
    CUDA device asks for rows the memory is page-locked and read by the device itself. Whoever writes into ``weight`` past this class must
    know that a look-up enqueued before may still be reading.

    Args:
        rows: number of rows.
        dim: values per row.
        dtype: storage type.

    Raises:
        TableError: the table would not fit into the memory there is.
    """

    def __init__(self, rows: int, dim: int, dtype: torch.dtype = torch.float32) -> None:
        self._lock = PageLock()
        super().__init__(rows, dim, dtype, "cpu")

    def _allocate(self, dtype: torch.dtype, device: torch.device | str | None) -> Tensor:
        unlock_what_waits()  # of tables that are gone, whose memory this one may need
        return lazy_zeros((self.rows, self.dim), dtype, "tier='host'")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        device = fn(torch.empty(0, device="cpu")).device
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

    def read_stored(self, row_ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """Rows ``[n, dim]`` as they are stored, numbered on the CPU; they have no scales."""
        return self.weight.detach()[row_ids], None

    def is_read_by(self, device: torch.device) -> bool:
        """Whether ``device`` reads the memory itself."""
        return device.type != "cpu" and self._view_on(device) is not None

    def _view_on(self, device: torch.device) -> Tensor | None:
        """The rows as ``device`` sees them; None where the CPU must fetch."""
        if device.type == "cpu":
            return self.weight.detach()
        return self._lock.view(self.weight, device) if device.type == "cuda" else None

    def _before_writing(self) -> None:
        """Wait until no device reads the rows any more."""
        self._lock.settle()
        super()._before_writing()
