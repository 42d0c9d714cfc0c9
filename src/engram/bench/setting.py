"""One comparison: alternatives that do the same work, and the proof that they do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

__all__ = ["RowNumbers", "Setting"]


class RowNumbers:
    """Sets of random row numbers that take turns, so that no call finds the rows of the one before in a cache.

    Args:
        rows: of the table.
        count: numbers in a set.
        sets: how many.
    """

    def __init__(self, rows: int, count: int, sets: int = 24) -> None:
        generator = torch.Generator().manual_seed(0)
        self.first, *others = (torch.randint(rows, (count,), generator=generator) for _ in range(sets))
        self._turns = cycle([self.first, *others])

    def next(self) -> Tensor:
        """int64 ``[count]``."""
        return next(self._turns)


@dataclass(frozen=True)
class Setting:
    """Alternatives that take turns."""

    label: str
    """The size, for people (``16,384 tokens``)."""
    calls: Mapping[str, Callable[[], Any]]
    """What is timed, by name."""
    baseline: str
    """The name that ratios refer to."""
    amount: int
    """Units of work per call."""
    verify: Callable[[], str | None]
    """What is wrong with the results, or None; asked before anything is timed."""
    size: int | None = None
    """Rows of the table, or whatever a picture has on its axis."""
    before: Callable[[], None] | None = None
    """Done before every single call, outside the time (to empty caches)."""
    repeats: int = 1
    """Calls per turn, for those too short for the clock."""
