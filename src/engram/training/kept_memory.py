"""Memory that training on the CPU frees stays with the process and is used again.

glibc maps every piece of 32 MB or more anew and gives the end of its heap back to the system; the first touch of pages, 4 KiB at a time, then
takes a tenth of a small model's step and more (`benchmarks/train_step.py`: `trainer` keeps memory, `raw` does not). Other C libraries are left
alone, and so is an allocator that was set up by the environment.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["kept_memory"]

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h
_LARGEST = 1 << 27
"""Bytes of a piece that is kept: activations and logits. Larger ones are tables and optimiser states, which come and go rarely."""
_NEVER = -1
_USUAL = 1 << 25
"""What glibc's own threshold grows to once a piece of this size was freed; twice as much for trimming."""

_lock = threading.Lock()
_users = 0


@contextmanager
def kept_memory(wanted: bool = True) -> Iterator[None]:
    """While it lasts, freed memory of up to 128 MB a piece is kept; at the end of the last one it is given back.

    It holds for the whole process, as the allocator does; afterwards the thresholds are what glibc's own grow to. Nothing happens if it is not
    ``wanted``, the C library is not glibc, or ``MALLOC_*`` or ``GLIBC_TUNABLES`` say how memory is to be had.
    """
    library = _glibc() if wanted else None
    if library is None:
        yield
        return
    _count(library, 1)
    try:
        yield
    finally:
        _count(library, -1)


def _count(library: Any, change: int) -> None:
    global _users
    with _lock:
        _users += change
        if change == 1 and _users == 1:
            if not library.mallopt(_MMAP_THRESHOLD, _LARGEST):
                library.mallopt(_MMAP_THRESHOLD, _USUAL)  # older ones take no more
            library.mallopt(_TRIM_THRESHOLD, _NEVER)
        elif _users == 0:
            library.mallopt(_MMAP_THRESHOLD, _USUAL)
            library.mallopt(_TRIM_THRESHOLD, 2 * _USUAL)
            library.malloc_trim(0)


def _glibc() -> Any:
    """The C library of this process if it is glibc and nobody has set it up, or None."""
    if any(name.startswith("MALLOC_") for name in os.environ) or "GLIBC_TUNABLES" in os.environ:
        return None
    try:
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version, library.mallopt, library.malloc_trim  # noqa: B018
    except (OSError, AttributeError, TypeError):  # TypeError: Windows has no library without a name
        return None
    return library
