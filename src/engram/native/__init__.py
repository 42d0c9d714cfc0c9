"""The native core: the hot loops in C++, called with addresses that are checked here. Optional: everything works without it on PyTorch.

Set ``ENGRAM_NATIVE=0`` to do without. Kernels run on CPU tensors only; every one has a plain counterpart in PyTorch that it must equal.
"""

from __future__ import annotations

import importlib
import logging
import os
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["HashKernel", "RowIndex", "core", "gather_rows", "have_addresses", "instruction_set", "scan_rows", "touch_rows"]

_COPY, _FORMATS = 0, {torch.bfloat16: 1, torch.float16: 2}
_INT8, _FLOAT8, _INT4 = 3, 4, 5

_core: Any = None
if os.environ.get("ENGRAM_NATIVE", "1") != "0":
    try:
        _core = importlib.import_module("engram.native._core")
    except ImportError:
        logging.getLogger("engram").warning(
            "the native core is not built (no C++ compiler at installation?); engram runs on PyTorch alone, more slowly. "
            "Reinstall with a compiler, or set ENGRAM_NATIVE=0 to hide this."
        )


def core() -> Any:
    """The compiled module, or None."""
    return _core


_PLAIN = frozenset({Tensor, torch.nn.Parameter})


def have_addresses(*tensors: Tensor) -> bool:
    """Whether kernels may work on the memory of these tensors: there is some, and nobody stands between PyTorch and it.

    Fake and divided tensors (``FakeTensor``, ``DTensor``) have none of their own. Whoever compiles, traces, records or maps a function
    (``torch.compile``, ``torch.jit.trace``, ``make_fx``, ``torch.func.vmap``) must see PyTorch's own operations.
    """
    if torch.compiler.is_compiling():  # first: whoever compiles this sees no more of it
        return False
    for tensor in tensors:
        if type(tensor) not in _PLAIN:
            return False
    return not (
        torch._C._is_tracing() or torch._C._len_torch_dispatch_stack() or torch._C._functorch.maybe_current_level() is not None
    )


def instruction_set() -> str | None:
    """What the kernels use on this machine: ``avx512``, ``avx2`` or ``portable``; None without the native core."""
    return None if _core is None else _core.instruction_set()


class HashKernel:
    """The n-gram hash of one mapping. Keeps the arrays alive whose addresses the native plan holds.

    Args:
        lookup: int64 ``[vocab]``, raw id -> canonical id.
        multipliers: int64 ``[L, N]``.
        primes: int64 ``[L, H]``, order-major.
        heads: heads per order.
        raw_pad: raw id that stands before the start and at masked positions.
    """

    def __init__(self, lookup: np.ndarray, multipliers: np.ndarray, primes: np.ndarray, heads: int, raw_pad: int) -> None:
        self._lookup = np.ascontiguousarray(lookup, dtype=np.int64)
        self._multipliers = np.ascontiguousarray(multipliers, dtype=np.int64)
        self._primes = np.ascontiguousarray(primes, dtype=np.int64)
        self._inverses = 1.0 / self._primes * (1.0 - 2.0**-51)  # less than exact, see hash.cpp
        ends = self._primes.cumsum(axis=1)
        self._offsets = np.ascontiguousarray(ends - self._primes)
        self.layers, self.width = self._primes.shape
        self._heads = heads
        arrays = (self._multipliers, self._primes, self._inverses)
        common = (self._lookup.ctypes.data, len(self._lookup), *(x.ctypes.data for x in arrays))
        shape = (self.layers, self.width // heads, heads, raw_pad)
        self._indices = _core.make_plan(*common, 0, *shape)
        self._rows = _core.make_plan(*common, self._offsets.ctypes.data, *shape)

    def hash(
        self, ids: Tensor, history: Tensor | None, mask: Tensor | None, with_tags: bool, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Head indices int64 ``[L, B, T, H]`` and tags int32 of that shape, if asked for.

        Args:
            ids: int64 ``[B, T]`` on the CPU.
            history: int64 ``[B, X]`` or None.
            mask: ``[B, T]``, zero at padding, or None.
            with_tags: whether tags are wanted.
            out: int64 ``[L, B, T, H]`` to use again for the indices; a new tensor if not given.

        Raises:
            IndexError: with the first id that is not in the vocabulary.
        """
        ids, history, mask = _inputs(ids, history, mask)
        # Arrays cost less than tensors, on the way in and out.
        if history is None and mask is None and out is None and not with_tags:
            return torch.from_numpy(self.hash_array(ids.numpy())), None
        shape = (self.layers, *ids.shape, self.width)
        if out is None:
            out = torch.empty(shape, dtype=torch.int64, device="cpu")  # whatever the default device is, here and below
        elif out.shape != shape or out.dtype != torch.int64 or not out.is_contiguous() or out.device.type != "cpu":
            raise ValueError(f"hash: out is {out.dtype} {list(out.shape)}, expected contiguous int64 {list(shape)} on the CPU.")
        tags = torch.empty(shape, dtype=torch.int32, device="cpu") if with_tags else None
        _core.hash_ngrams(
            self._indices, *_addresses(ids, history, mask), out.data_ptr(), _address(tags), torch.get_num_threads()
        )
        return out, tags

    def hash_array(self, ids: np.ndarray) -> np.ndarray:
        """``hash`` for a C-contiguous int64 array ``[B, T]``, without the cost of making tensors: int64 ``[L, B, T, H]``.

        Raises:
            IndexError: with the first id that is not in the vocabulary.
            BufferError, ValueError: the array is of another type, shape or layout.
        """
        out = np.empty((self.layers, *ids.shape, self.width), dtype=np.int64)
        _core.hash_array(self._indices, ids, out, torch.get_num_threads())
        return out

    def find(
        self, layer: int, index: RowIndex, ids: Tensor, history: Tensor | None, mask: Tensor | None, longest_only: bool
    ) -> Tensor | None:
        """Slots int64 ``[B, T, H]`` of the rows that positions read in the ``layer``-th layer, -1 elsewhere; None if none is read at all.

        Args:
            layer: position in the mapping's layers.
            index: the rows written.
            ids: int64 ``[B, T]`` on the CPU.
            history: int64 ``[B, X]`` or None.
            mask: ``[B, T]``, zero at padding, which reads nothing; or None.
            longest_only: whether a position reads the longest n-gram found only.

        Raises:
            IndexError: with the first id that is not in the vocabulary.
        """
        ids, history, mask = _inputs(ids, history, mask)
        slots = torch.full((*ids.shape, self.width), -1, dtype=torch.int64, device="cpu")
        found = _core.find_verified(
            self._rows,
            *_addresses(ids, history, mask),
            layer,
            *index.addresses,
            longest_only,
            slots.data_ptr(),
            torch.get_num_threads(),
        )
        return slots if found else None


class RowIndex:
    """Where the rows of a table with verified rows are, for ``HashKernel.find``.

    Args:
        row_ids: int64 ``[n]`` on the CPU, no row twice.
        tags: int32 ``[n]``.
        order_used: bool per order, whether any of its rows is written.
    """

    def __init__(self, row_ids: Tensor, tags: Tensor, order_used: Tensor) -> None:
        if row_ids.dtype != torch.int64 or tags.dtype != torch.int32 or row_ids.dim() != 1 or row_ids.shape != tags.shape:
            raise ValueError(
                f"RowIndex: got {row_ids.dtype} {list(row_ids.shape)} and {tags.dtype} {list(tags.shape)}, expected int64 [n] and int32 [n]."
            )
        self._row_ids, self._tags = row_ids.contiguous(), tags.contiguous()
        self._order_used = order_used.to(torch.uint8).contiguous()
        size = 1 << max(4, (2 * len(row_ids)).bit_length())  # at most half full
        self._buckets = torch.empty(size, dtype=torch.int64, device="cpu")
        _core.build_buckets(self._row_ids.data_ptr(), self._tags.data_ptr(), len(row_ids), self._buckets.data_ptr(), size - 1)

    @property
    def addresses(self) -> tuple[int, int, int, int]:
        """For the native search; read anew each time, because a copy of this object has tensors of its own."""
        buckets = self._buckets
        return self._row_ids.data_ptr(), buckets.data_ptr(), len(buckets) - 1, self._order_used.data_ptr()


def gather_rows(data: Tensor, row_ids: Tensor, out: Tensor, scales: Tensor | None = None, dim: int | None = None) -> None:
    """Rows by number into ``out``: as they are if the types are equal, else turned into float32.

    Args:
        data: ``[rows, ...]`` contiguous, on the CPU: any type to copy, bfloat16, float16; or with ``scales``: int8 (one float32 scale per
            row), float8_e4m3fn (one uint8 exponent per 32 values), uint8 (two 4-bit values per byte, one float32 scale per row).
        row_ids: int64, any shape, contiguous, on the CPU.
        out: ``[*row_ids.shape, dim]``, contiguous.
        scales: see ``data``.
        dim: values per row; needed for 4-bit rows.

    Raises:
        IndexError: with the first row number that is out of range.
    """
    width = dim or data.shape[1]
    kind = _COPY if data.dtype == out.dtype and scales is None else _kind(data, scales)
    if data.dim() != 2 or width != data.shape[1] * (2 if kind == _INT4 else 1):
        raise ValueError(f"gather_rows: rows are {data.dtype} {list(data.shape)}, which does not make {width} values.")
    if scales is not None and scales.shape[1:] != ((-(-width // 32),) if kind == _FLOAT8 else ()):
        raise ValueError(
            f"gather_rows: scales are {list(scales.shape)}, expected one per {'32 values' if kind == _FLOAT8 else 'row'}."
        )
    tensors = [data, row_ids, out, *([scales] if scales is not None else [])]
    if not all(t.is_contiguous() and t.device.type == "cpu" for t in tensors) or row_ids.dtype != torch.int64:
        raise ValueError("gather_rows: expected contiguous CPU tensors and int64 row numbers.")
    if out.shape != (*row_ids.shape, width) or (kind != _COPY and out.dtype != torch.float32):
        raise ValueError(f"gather_rows: out is {out.dtype} {list(out.shape)}, expected float32 {[*row_ids.shape, width]}.")
    bad = _core.gather_rows(
        data.data_ptr(),
        _address(scales),
        data.shape[0],
        width,
        data.shape[1] * data.element_size(),
        kind,
        row_ids.data_ptr(),
        row_ids.numel(),
        out.data_ptr(),
        torch.get_num_threads(),
    )
    if bad != -1:
        raise IndexError(int(row_ids.view(-1)[bad]))


def touch_rows(data: Tensor, row_ids: Tensor, threads: int, count: bool = False) -> int:
    """Read a byte of every page of some rows of a mapped file, with many threads, so that they come into memory together.

    Does nothing without the native core: the rows then come one after the other as they are read.

    Args:
        data: ``[rows, dim]``, contiguous, on the CPU.
        row_ids: int64, contiguous; numbers out of range are passed over.
        threads: at most so many.
        count: whether to find out how many rows were in memory before; a system call for each.

    Returns:
        Rows that were in memory before, if counted.
    """
    if _core is None:
        return 0
    if not all(t.is_contiguous() and t.device.type == "cpu" for t in (data, row_ids)) or row_ids.dtype != torch.int64:
        raise ValueError("touch_rows: expected contiguous CPU tensors and int64 row numbers.")
    row_bytes = data.shape[1] * data.element_size()
    return _core.touch_rows(data.data_ptr(), data.shape[0], row_bytes, row_ids.data_ptr(), row_ids.numel(), threads, count)


def scan_rows(data: Tensor, row_ids: Tensor) -> int:
    """Read every byte of some rows and write nothing: the limit that a gather is measured against.

    Args:
        data: ``[rows, ...]``, contiguous, on the CPU.
        row_ids: int64, contiguous, on the CPU; numbers out of range are passed over.

    Returns:
        A number made of all the bytes.
    """
    if not all(t.is_contiguous() and t.device.type == "cpu" for t in (data, row_ids)) or row_ids.dtype != torch.int64:
        raise ValueError("scan_rows: expected contiguous CPU tensors and int64 row numbers.")
    row_bytes = data.shape[1] * data.element_size()
    return _core.scan_rows(
        data.data_ptr(), data.shape[0], row_bytes, row_ids.data_ptr(), row_ids.numel(), torch.get_num_threads()
    )


def _kind(data: Tensor, scales: Tensor | None) -> int:
    if scales is None:
        if data.dtype not in _FORMATS:
            raise ValueError(f"gather_rows: got {data.dtype} without scales, expected bfloat16 or float16.")
        return _FORMATS[data.dtype]
    expected = {
        torch.int8: (_INT8, torch.float32),
        torch.float8_e4m3fn: (_FLOAT8, torch.uint8),
        torch.uint8: (_INT4, torch.float32),
    }
    if data.dtype not in expected or scales.dtype != expected[data.dtype][1] or scales.shape[0] != data.shape[0]:
        raise ValueError(
            f"gather_rows: got {data.dtype} rows with {scales.dtype} scales {list(scales.shape)}, which do not go together."
        )
    return expected[data.dtype][0]


def _inputs(ids: Tensor, history: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    ids = ids.to(torch.int64).contiguous()
    for name, tensor in (("history", history), ("mask", mask)):
        if tensor is not None and tensor.device != ids.device:  # their addresses would mean nothing here
            raise ValueError(f"hash: got {name} on {tensor.device}, expected it where the ids are, on {ids.device}.")
    if history is not None:
        history = history.to(torch.int64).contiguous()
    if mask is not None:
        mask = (mask if mask.dtype == torch.bool else mask != 0).contiguous()
    return ids, history, mask


def _addresses(ids: Tensor, history: Tensor | None, mask: Tensor | None) -> tuple[int, ...]:
    batch, length = ids.shape
    return ids.data_ptr(), _address(mask), _address(history), batch, length, 0 if history is None else history.shape[1]


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
