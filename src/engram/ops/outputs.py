"""New tensors on the CPU, the large ones in memory that was used before.

Memory of 32 MB or more is mapped anew at every allocation (glibc), and the first touch of its pages takes longer than most kernels take to
fill it. What smaller tensors leave behind is used again by the allocator itself.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["new_output"]

_ALWAYS_NEW = 1 << 25
_TOO_LARGE = 1 << 28
"""Bytes that are not worth keeping for the next time."""
_KEPT = 2
"""At most so many pieces of memory wait for the next time: what two layers of a model need at once."""
_LINE = 64

_free: list[Tensor] = []


class _Lease:
    """Memory that goes back when the last tensor in it is gone: NumPy's array holds this, PyTorch's storage holds the array."""

    def __init__(self, memory: Tensor) -> None:
        self._memory = memory
        self.__array_interface__: dict[str, Any] = memory.numpy().__array_interface__

    def __del__(self) -> None:
        if _free is not None and len(_free) < _KEPT:  # None when Python ends
            _free.append(self._memory)


def new_output(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised and contiguous; large ones on the CPU begin at a cache line, which kernels write as a whole, and cannot be grown."""
    size = torch.Size(shape).numel() * dtype.itemsize
    if device.type != "cpu" or not _ALWAYS_NEW <= size <= _TOO_LARGE:
        return torch.empty(shape, dtype=dtype, device=device)
    memory = np.asarray(_Lease(_take(size + _LINE)))
    start = -memory.ctypes.data % _LINE
    storage = torch.from_numpy(memory[start : start + size]).untyped_storage()
    whole = torch.empty(0, dtype=dtype, device="cpu").set_(storage, 0, (size // dtype.itemsize,), (1,))
    return whole.resize_(shape)  # no view of anything, which autograd would mind


def _take(size: int) -> Tensor:
    """Bytes that are free, or new ones. A piece that does not fit is let go: whoever wants other sizes now will want them again."""
    while True:
        try:
            memory = _free.pop()  # one step, so that threads need no lock
        except IndexError:
            return torch.empty(size, dtype=torch.uint8, device="cpu")
        if size <= len(memory) <= 2 * size:
            return memory
