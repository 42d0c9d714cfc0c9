"""One comparison: alternatives that do the same work, and the proof that they do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Setting"]


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
