"""One thread at a time: between a pass's start and its blocks, addresses wait on the model, and so do switches and routes."""

from __future__ import annotations

import os
from threading import RLock
from types import TracebackType
from typing import Any, Self
from weakref import WeakSet

__all__ = ["Turns"]

_ALL: WeakSet[Turns] = WeakSet()


class Turns:
    """A lock for ``with`` that its thread may take again inside; a copy, or what is pickled, has one of its own."""

    def __init__(self) -> None:
        self._lock = RLock()
        _ALL.add(self)

    def __enter__(self) -> Self:
        self._lock.acquire()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._lock.release()

    def __deepcopy__(self, memo: dict[int, Any]) -> Turns:
        return memo.setdefault(id(self), Turns())

    def __reduce__(self) -> tuple[type[Turns], tuple[()]]:
        return Turns, ()


def _in_child() -> None:
    """After a fork: a lock that another thread held is never given back, as that thread is not there."""
    for turns in list(_ALL):
        if turns._lock.acquire(blocking=False):
            turns._lock.release()
        else:
            turns._lock = RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
