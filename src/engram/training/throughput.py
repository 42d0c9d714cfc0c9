"""Tokens per second of training itself: what evaluation and saving take is left out."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["Throughput"]


class Throughput:
    """Counts tokens between two readings; times are in seconds of wall clock."""

    def __init__(self) -> None:
        self._tokens, self._idle = 0, 0.0
        self._since: float | None = None

    def reset(self) -> None:
        """Forget what was counted; time runs from the next ``start``."""
        self._tokens, self._idle, self._since = 0, 0.0, None

    def start(self) -> None:
        """Work begins; of several calls between two readings the first counts."""
        if self._since is None:
            self._since = time.perf_counter()

    def add(self, tokens: int) -> None:
        """So many were worked on."""
        self._tokens += tokens

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent inside does not count."""
        before = time.perf_counter()
        try:
            yield
        finally:
            if self._since is not None:
                self._idle += time.perf_counter() - max(before, self._since)

    def read(self) -> float | None:
        """Tokens per second since the last reading; None if nothing was counted."""
        now = time.perf_counter()
        if self._since is None or not self._tokens:
            return None
        rate = self._tokens / max(now - self._since - self._idle, 1e-9)
        self._tokens, self._idle, self._since = 0, 0.0, now
        return rate
