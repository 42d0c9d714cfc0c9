"""Memory for rows that live off the model's device: lazily mapped, in huge pages where the system gives them, and never more than there is."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from engram.errors import ConfigError, TableError

__all__ = ["available_memory", "check_fits", "lazy_zeros", "take_pages"]

_HUGE = 2 << 20
_WORTH_CHECKING = 64 << 20
_PART = 1 << 30
_MADV_POPULATE_WRITE = 23
_MEMINFO, _CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")


def available_memory() -> int | None:
    """Bytes that this process can still use, by the machine, its control group and its own limits; None if nothing says.

    ``ENGRAM_AVAILABLE_MEMORY`` in the environment takes the place of all that, on machines whose memory grows as it is used for instance.

    Raises:
        ConfigError: it is no number of bytes.
    """
    if told := os.environ.get("ENGRAM_AVAILABLE_MEMORY"):
        return _number_of_bytes(told)
    found = [value for value in (_machine_memory(), _group_memory(), _own_limits()) if value is not None]
    return min(found) if found else None


def _number_of_bytes(told: str) -> int:
    try:
        return int(float(told))
    except (ValueError, OverflowError):
        raise ConfigError(f"ENGRAM_AVAILABLE_MEMORY: got {told!r}, expected a number of bytes, such as 1.2e11.") from None


def _machine_memory() -> int | None:
    with suppress(OSError, StopIteration, ValueError):
        line = next(line for line in _MEMINFO.read_text().splitlines() if line.startswith("MemAvailable:"))
        return int(line.split()[1]) * 1024
    return None


def _group_memory() -> int | None:
    """Of the control group, version 2 or 1: the limit less what is in use; files in its cache give way when memory is wanted."""
    found = []
    for root, group, limit, usage in _group_folders():
        for folder in (root / group.lstrip("/"), root):
            with suppress(OSError, ValueError, StopIteration):
                lines = (folder / "memory.stat").read_text().splitlines()
                cached = next(
                    int(line.split()[1]) for line in lines if line.startswith(("inactive_file ", "total_inactive_file "))
                )
                found.append(int((folder / limit).read_text()) - int((folder / usage).read_text()) + cached)
                break
    return min(found) if found else None


def _group_folders() -> list[tuple[Path, str, str, str]]:
    """Roots, the process's own group below them, and the names of the files that hold limit and usage."""
    folders = []
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, kind, group = line.split(":", 2)
            if kind == "":
                folders.append((_CGROUP, group, "memory.max", "memory.current"))
            elif "memory" in kind.split(","):
                folders.append((_CGROUP / "memory", group, "memory.limit_in_bytes", "memory.usage_in_bytes"))
    return folders


def _own_limits() -> int | None:
    """Of the process: its address space, and its data."""
    found = []
    with suppress(ImportError, OSError, ValueError, IndexError):
        import resource

        pages = [int(n) for n in Path("/proc/self/statm").read_text().split()]
        for kind, used in ((resource.RLIMIT_AS, pages[0]), (resource.RLIMIT_DATA, pages[5])):
            limit, _ = resource.getrlimit(kind)
            if limit != resource.RLIM_INFINITY:
                found.append(limit - used * resource.getpagesize())
    return min(found) if found else None


def check_fits(size: int, device: torch.device | str | None, what: str) -> None:
    """Refuse to allocate what would not fit; a look at the system's figures, for large tables only.

    Args:
        size: bytes wanted.
        device: where.
        what: begins the message.

    Raises:
        TableError: there is less memory than that.
    """
    place = torch.get_default_device() if device is None else torch.device(device)
    if size < _WORTH_CHECKING or place.type not in ("cpu", "cuda"):
        return
    available = available_memory() if place.type == "cpu" else _accelerator_memory(place)
    if available is not None and size > available:
        raise TableError(
            f"{what}: got a table of {size:,} bytes, expected at most the {available:,} bytes available; "
            "use fewer rows, a smaller dtype, or tier='mmap'."
        )


def _accelerator_memory(device: torch.device) -> int:
    """Free bytes of a CUDA device, with those that torch holds and does not use."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype, what: str) -> Tensor:
    """Zeros on the CPU whose pages are taken when they are first written.

    Raises:
        TableError: the tensor would not fit into the memory there is; nothing is allocated then.
    """
    count = torch.Size(shape).numel()
    size = count * dtype.itemsize
    check_fits(size, "cpu", what)
    if count == 0:
        return torch.zeros(shape, dtype=dtype, device="cpu")
    # Private: shared anonymous memory is a file to the kernel, and gets no huge pages on most systems.
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    pages = mmap.mmap(-1, size, **private)
    if size >= _HUGE and hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without huge pages is merely slower
            pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype).view(shape)


def take_pages(tensor: Tensor) -> None:
    """Have the system map and clear the pages of a large tensor now, by several threads: whoever locks or writes it next would do so in one.

    Values stay as they are. On systems that cannot (Linux before 5.14, others) nothing happens.
    """
    if sys.platform != "linux":
        return
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if end - start < _WORTH_CHECKING:
        return
    with suppress(OSError, AttributeError):
        advise = ctypes.CDLL(None).madvise
        parts = range(start, end, _PART)
        with ThreadPoolExecutor(min(len(parts), os.cpu_count() or 1)) as threads:  # ctypes lets others run meanwhile
            for part in parts:
                size = ctypes.c_size_t(min(_PART, end - part))
                threads.submit(advise, ctypes.c_void_p(part), size, _MADV_POPULATE_WRITE)
