"""One thread at a time: between a pass's start and its blocks, addresses wait on the model, and so do switches and routes."""

from __future__ import annotations

from threading import RLock
from types import TracebackType
from typing import Any, Self

__all__ = ["Turns"]


class Turns:
    """A lock for ``with`` that its thread may take again inside; a copy, or what is pickled, has one of its own."""

    def __init__(self) -> None:
        self._lock = RLock()

    def __enter__(self) -> Self:
        self._lock.acquire()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._lock.release()

    def __deepcopy__(self, memo: dict[int, Any]) -> Turns:
        return memo.setdefault(id(self), Turns())

    def __reduce__(self) -> tuple[type[Turns], tuple[()]]:
        return Turns, ()
