"""A few rows of a table held apart, to be changed and then written back at once or thrown away."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from engram.errors import TableError
from engram.tables.base import EmbeddingTable

__all__ = ["OverlayTable"]


class OverlayTable(EmbeddingTable):
    """Stands in for ``base``: listed rows come from a small trainable parameter, all others from ``base`` without gradient.

    Optimising the overlay costs time and memory by the rows listed, on every tier; ``base`` is untouched until ``commit``.

    Args:
        base: the table below.
        row_ids: int64 ``[n]``, sorted, no row twice.
    """

    row_ids: Tensor

    def __init__(self, base: EmbeddingTable, row_ids: Tensor) -> None:
        super().__init__()
        if row_ids.numel() > 1 and not bool((row_ids[1:] > row_ids[:-1]).all()):
            raise TableError("OverlayTable: row_ids must be sorted, no row twice; use torch.unique.")
        self.rows, self.dim = base.rows, base.dim
        self.__dict__["_base"] = base  # not a submodule: the overlay must not claim the base's parameters
        self.register_buffer("row_ids", row_ids, persistent=False)
        with torch.no_grad():
            held = base.lookup(row_ids).detach().float().clone()
        self.held = nn.Parameter(held)

    @property
    def base(self) -> EmbeddingTable:
        """The table below."""
        return self.__dict__["_base"]

    @property
    def dtype(self) -> torch.dtype:
        """Type of the rows as looked up: float32 while they are apart."""
        return self.held.dtype

    @property
    def location(self) -> str:
        """Where the base rows are."""
        return self.base.location

    def lookup(self, row_ids: Tensor) -> Tensor:
        """Rows ``[..., dim]``, float32; gradients reach the overlay only."""
        rows = self.base.lookup(row_ids).detach().to(self.held.dtype)
        if self.held.shape[0] == 0:
            return rows
        slot = torch.searchsorted(self.row_ids, row_ids).clamp_max(self.held.shape[0] - 1)
        hit = self.row_ids[slot] == row_ids
        return torch.where(hit.unsqueeze(-1), self.held[slot], rows)

    def update_rows(self, row_ids: Tensor, fn: Callable[[Tensor], Tensor]) -> None:
        """Not offered: an overlay is changed through its parameter.

        Raises:
            TableError: always.
        """
        raise TableError("OverlayTable.update_rows: change the parameter `held` instead, then commit().")

    def iter_row_blocks(self, block_rows: int = 1 << 16) -> Iterator[tuple[int, Tensor]]:
        """Blocks of the table as it would be after ``commit``."""
        for start, block in self.base.iter_row_blocks(block_rows):
            inside = (self.row_ids >= start) & (self.row_ids < start + block.shape[0])
            merged = block.clone()
            merged[self.row_ids[inside] - start] = self.held.detach()[inside].to(block.dtype)
            yield start, merged

    def commit(self) -> None:
        """Write the rows back into ``base``."""
        self.base.update_rows(self.row_ids, lambda _: self.held.detach())
