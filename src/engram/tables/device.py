"""Rows as an ordinary parameter on one device."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from engram.ops import lookup_rows, read_rows
from engram.tables.base import EmbeddingTable, check_place, check_row_ids, replaced
from engram.tables.formats import narrowed
from engram.tables.memory import check_fits
from engram.tables.prefetch import RowHandle, RowPrefetcher

__all__ = ["DeviceTable"]


class DeviceTable(EmbeddingTable):
    """A table held in one parameter ``weight [rows, dim]`` (the name the paper's demo uses), all zero at first.

    Args:
        rows: number of rows.
        dim: values per row.
        dtype: storage type.
        device: where the parameter is made.

    Raises:
        TableError: the table would not fit into the memory there is.
    """

    def __init__(
        self,
        rows: int,
        dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.rows, self.dim = rows, dim
        self.weight = nn.Parameter(self._allocate(dtype, device))

    def _allocate(self, dtype: torch.dtype, device: torch.device | str | None) -> Tensor:
        """Zeros ``[rows, dim]`` where the rows shall live."""
        check_fits(self.rows * self.dim * dtype.itemsize, device, "tier='device'")
        return torch.zeros((self.rows, self.dim), dtype=dtype, device=device)

    def lookup(self, row_ids: Tensor | RowHandle, dtype: torch.dtype | None = None) -> Tensor:
        """Rows ``[..., dim]``; the gradient of ``weight`` is sparse."""
        if isinstance(row_ids, RowHandle):
            return lookup_rows(self.weight, row_ids.row_ids, fetched=row_ids.wait())
        return lookup_rows(self.weight, row_ids, dtype)

    def read(self, row_ids: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """Rows ``[..., dim]`` without a gradient, into ``out`` if given."""
        return read_rows(self.weight, row_ids, dtype, out)

    def prefetch(
        self, row_ids: Tensor, dtype: torch.dtype | None = None, through: RowPrefetcher | None = None
    ) -> Tensor | RowHandle:
        """Start fetching rows, where ``through`` thinks that it pays."""
        if through is None or not through.pays(self, row_ids.device):
            return row_ids
        return through.start(self, row_ids, dtype or self.dtype)

    @torch.no_grad()
    def update_rows(self, row_ids: Tensor, fn: Callable[[Tensor], Tensor]) -> None:
        """Replace rows in place.

        Raises:
            TableError: a row number is out of range, ``fn`` changed the shape or gave a value that is too large for the table's type.
        """
        if row_ids.numel() == 0:
            return
        check_row_ids(row_ids, self.rows)
        row_ids = row_ids.to(self.weight.device)
        new = narrowed(replaced(self.weight[row_ids], fn), self.weight.dtype)
        self._before_writing()
        self.weight[row_ids] = new

    @torch.no_grad()
    def load_rows(self, start: int, rows: Tensor) -> None:
        """Put rows ``[n, dim]`` at ``start`` and after.

        Raises:
            TableError: they do not fit there, or a value is too large for the table's type.
        """
        check_place(start, rows, self.rows, self.dim)
        stored = narrowed(rows, self.weight.dtype).to(self.weight.device)
        self._before_writing()
        self._put(start, stored)

    def _put(self, start: int, rows: Tensor) -> None:
        """Store consecutive rows, which fit."""
        self.weight[start : start + rows.shape[0]] = rows

    def iter_row_blocks(self, block_rows: int = 1 << 16) -> Iterator[tuple[int, Tensor]]:
        """Views of consecutive rows, detached."""
        for start in range(0, self.rows, block_rows):
            yield start, self.weight.detach()[start : start + block_rows]
