"""How often rows were asked for."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["AccessCounts"]

_PENDING = 1 << 20


class AccessCounts:
    """Counts per row, kept for rows that were seen only."""

    def __init__(self) -> None:
        self._rows = torch.zeros(0, dtype=torch.int64, device="cpu")
        self._counts = torch.zeros(0, dtype=torch.int64, device="cpu")
        self._pending: list[tuple[Tensor, Tensor]] = []
        self._waiting = 0

    def add(self, row_ids: Tensor) -> None:
        """Count row numbers of any shape."""
        rows, counts = row_ids.detach().reshape(-1).to("cpu").unique(return_counts=True)
        self._pending.append((rows, counts))
        self._waiting += len(rows)
        if self._waiting > max(_PENDING, len(self._rows)):
            self._merge()

    def _merge(self) -> None:
        if not self._pending:
            return
        rows = torch.cat([self._rows, *(rows for rows, _ in self._pending)])
        counts = torch.cat([self._counts, *(counts for _, counts in self._pending)])
        self._rows, place = rows.unique(return_inverse=True)
        self._counts = torch.zeros_like(self._rows).index_add_(0, place, counts)
        self._pending, self._waiting = [], 0

    @property
    def rows(self) -> Tensor:
        """Rows seen, int64 ``[n]``, sorted."""
        self._merge()
        return self._rows

    @property
    def counts(self) -> Tensor:
        """How often each of ``rows`` was asked for, int64 ``[n]``."""
        self._merge()
        return self._counts

    def most_frequent(self, number: int) -> Tensor:
        """Up to so many rows, the most frequent first; of equally frequent ones the lower number."""
        return self.rows[torch.argsort(self.counts, descending=True, stable=True)[:number]]
