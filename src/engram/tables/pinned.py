"""Host memory that CUDA devices read by themselves: page-locked in place, and seen as a tensor of the device.

With unified addressing a page-locked host address is a device address, so that a kernel fetches exactly the rows it wants over the
bus, without the CPU, a staging buffer or a wait.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from engram.tables.memory import available_memory, take_pages

__all__ = ["PageLock", "nothing_unlocked", "through_host", "unlock_what_waits"]

_PORTABLE, _MAPPED = 1, 2  # cudaHostRegisterPortable, cudaHostRegisterMapped


class PageLock:
    """Page-locks tensors in host memory once a CUDA device asks for them, and keeps the devices' views of them.

    Where the system refuses (a limit on locked memory, say), that is said once and look-ups go through the CPU. A copy of a lock holds
    nothing. The memory is unlocked when the lock goes away; it keeps the tensors alive until then.
    """

    def __init__(self) -> None:
        self._views: dict[tuple[torch.device, int, int], Tensor] = {}
        self._locked: set[tuple[int, int]] = set()
        self._readers: set[torch.device] = set()
        self._refused: set[torch.device] = set()
        """Where it failed; it is not tried again there."""
        self._one_at_a_time = Lock()

    @property
    def active(self) -> bool:
        """Whether any memory is locked."""
        return bool(self._locked)

    def view(self, tensor: Tensor, device: torch.device) -> Tensor | None:
        """``tensor`` (contiguous, in host memory) as ``device`` sees it, locked on the first call; None where that is impossible."""
        if tensor.numel() == 0:
            return None
        key = (device, tensor.data_ptr(), tensor.nbytes)
        if key not in self._views:
            with self._one_at_a_time:  # locking memory twice fails
                self._add_view(key, tensor.detach())
        return self._views.get(key)

    def _add_view(self, key: tuple[torch.device, int, int], tensor: Tensor) -> None:
        device = key[0]
        if key in self._views or device in self._refused or not self._lock(tensor, device):
            return
        self._readers.add(device)
        try:
            self._views[key] = _device_view(tensor, device)
        except RuntimeError as error:
            self._refuse(tensor, device, str(error))

    def settle(self) -> None:
        """Wait until no device reads the memory any more; for whoever is about to write into it."""
        for device in tuple(self._readers):  # of memory that somebody else locked, too
            torch.cuda.synchronize(device)

    def _lock(self, tensor: Tensor, device: torch.device) -> bool:
        part = (tensor.data_ptr(), tensor.nbytes)
        if part in self._locked:
            return True
        unlock_what_waits()  # memory that is still locked for a table that is gone must not pass for this one's
        if tensor.is_pinned():
            return True
        if (available_memory() or 0) > tensor.nbytes:  # if that is refused, they are there to stay
            take_pages(tensor)
        with torch.cuda.device(device):  # whose memory it then is, as far as torch can tell
            status = int(_cudart().cudaHostRegister(*part, _PORTABLE | _MAPPED))
        if status:
            self._refuse(tensor, device, f"cudaHostRegister answered {status}")
            _clear_error()
            return False
        self._locked.add(part)
        # At exit the system unlocks everything, and the CUDA context may be gone before Python is.
        weakref.finalize(self, _unlock, tensor, self._readers).atexit = False
        return True

    def _refuse(self, tensor: Tensor, device: torch.device, reason: str) -> None:
        self._refused.add(device)
        logging.getLogger("engram").warning(
            "%s bytes of host memory could not be page-locked for %s (%s): rows go through the CPU, more slowly. Give the process more "
            "memory (locked pages cannot be swapped out), or use a smaller table.",
            f"{tensor.nbytes:,}",
            device,
            reason,
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> PageLock:
        return PageLock()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return PageLock, ()


def through_host(
    fetch: Callable[[Tensor, Tensor], Tensor], row_ids: Tensor, dim: int, dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    """Rows ``[..., dim]`` fetched by the CPU and sent to the device of ``row_ids``.

    Args:
        fetch: puts rows, by their numbers on the CPU, into the buffer given (contiguous, on the CPU).
        row_ids: int64 ``[...]``; the CPU waits until it knows them.
        dim: values per row.
        dtype: type of the rows.
        out: where on the device to put them; a new tensor if not given.
    """
    # The page-locked buffer belongs to torch's host allocator, which does not hand it out again before the copy has been made.
    staging = torch.empty((*row_ids.shape, dim), dtype=dtype, device="cpu", pin_memory=row_ids.device.type == "cuda")
    rows = fetch(row_ids.to("cpu"), staging)
    return rows.to(row_ids.device, non_blocking=True) if out is None else out.copy_(rows, non_blocking=True)


def _cudart() -> Any:
    return torch.cuda.cudart()


_waiting: list[tuple[Tensor, set[torch.device]]] = []
"""Memory that nobody uses any more and that could not be unlocked yet, and which devices may be reading it. It is kept: what is mapped at its
address next would be taken for locked, and the device would read the old pages."""


_captures = 0
_counting = Lock()


@contextmanager
def nothing_unlocked() -> Iterator[None]:
    """While a graph is captured, which a wait for the device would spoil, whatever thread it is in; what went meanwhile is unlocked then."""
    global _captures
    with _counting:
        _captures += 1
    try:
        yield
    finally:
        with _counting:
            _captures -= 1
        unlock_what_waits()


def _unlock(tensor: Tensor, readers: set[torch.device]) -> None:
    _waiting.append((tensor, readers))
    unlock_what_waits()


def unlock_what_waits() -> None:
    """Unlock memory of tables that are gone, unless a graph is being captured."""
    if not _waiting or _captures or torch.cuda.is_current_stream_capturing():
        return
    for device in set().union(*(readers for _, readers in _waiting)):
        with suppress(RuntimeError):
            torch.cuda.synchronize(device)  # a look-up may still be reading
    for tensor, _ in list(_waiting):
        with suppress(RuntimeError):
            if int(_cudart().cudaHostUnregister(tensor.data_ptr())):
                _clear_error()
        if not tensor.is_pinned():
            _waiting[:] = [entry for entry in _waiting if entry[0] is not tensor]


def _clear_error() -> None:
    """A refused registration leaves its code behind, which the next kernel's check would take for its own."""
    with suppress(RuntimeError):
        torch.ones(1, device="cuda")  # a kernel launch, whose check reports and clears it


class _HostBytes:
    """Names the bytes of a host tensor to torch as memory of a device, and keeps the tensor alive as long as the view is."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor
        self.__cuda_array_interface__ = {
            "shape": (tensor.nbytes,),
            "typestr": "|u1",
            "data": (tensor.data_ptr(), False),
            "strides": None,
            "version": 3,
        }


def _device_view(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of ``device`` over page-locked host memory; nothing is copied."""
    bytes_ = tensor.view(-1).view(torch.uint8)
    with torch.cuda.device(device):
        for part in (bytes_[:1], bytes_):  # one byte first: where torch makes a copy instead, it is not one of the table
            view = torch.as_tensor(_HostBytes(part), device=device)
            if view.data_ptr() != tensor.data_ptr():
                raise RuntimeError(f"{device} sees page-locked memory under another address")
    return view.view(tensor.dtype).view(tensor.shape)
