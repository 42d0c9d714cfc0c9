"""safetensors files read and written in parts, so that a table costs a block of memory whatever its size.

The format is the plain one (a length, a JSON header, the data); the ``safetensors`` library reads what is written here, but can itself
write only tensors that are in memory whole, and reads through a map whose pages count as the process's own.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from engram.errors import CheckpointError

__all__ = ["TensorReader", "TensorSpec", "as_parts", "can_be_written", "read_header", "type_code", "write_tensors"]

_NAMES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CODES = {dtype: name for name, dtype in _NAMES.items()}
_LONGEST_HEADER = 100_000_000  # as in the safetensors library
_PART_BYTES = 16 << 20


@dataclass(frozen=True)
class TensorSpec:
    """Type and shape of a tensor in a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the data."""
        return math.prod(self.shape) * self.dtype.itemsize

    @classmethod
    def of(cls, tensor: Tensor) -> Self:
        """Of a tensor in memory."""
        return cls(tensor.dtype, tuple(tensor.shape))


def type_code(dtype: torch.dtype) -> str:
    """A type's name in a safetensors file."""
    return _CODES[dtype]


def can_be_written(dtype: torch.dtype) -> bool:
    """Whether safetensors files written here hold values of this type."""
    return dtype in _CODES


def as_parts(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Tensors in parts of some megabytes, for ``write_tensors``."""
    for name, tensor in tensors.items():
        flat = tensor.detach().reshape(-1)
        step = _PART_BYTES // tensor.dtype.itemsize
        for start in range(0, flat.numel(), step):
            yield name, flat[start : start + step]


def write_tensors(
    file: Path, specs: Mapping[str, TensorSpec], parts: Iterable[tuple[str, Tensor]], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file: the header first, then parts of tensors as they come.

    Args:
        file: where; replaced if it exists.
        specs: all tensors.
        parts: pairs (name, next values of that tensor, in order); parts of different tensors may alternate.
        metadata: texts for the header.

    Raises:
        OSError: the disk is full, or the file cannot be written.
        CheckpointError: parts and specs do not agree.
    """
    # Large items first, as the library orders them: every tensor then starts at a multiple of its item size and can be mapped.
    order = sorted(specs, key=lambda name: (-specs[name].dtype.itemsize, name))
    header, cursor, end = dict[str, Any]({"__metadata__": dict(metadata)} if metadata else {}), dict[str, int](), 0
    for name in order:
        cursor[name], start, end = end, end, end + specs[name].nbytes
        header[name] = {"dtype": _CODES[specs[name].dtype], "shape": list(specs[name].shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    data = 8 + len(text)
    _check_space(file, data + end)
    with open(file, "wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        opened.truncate(data + end)
        for name, part in parts:
            content = part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
            if part.dtype != specs[name].dtype or cursor[name] + len(content) > header[name]["data_offsets"][1]:
                raise CheckpointError(f"{file}: {name} got more or other values than {specs[name]}.")
            opened.seek(data + cursor[name])
            opened.write(content)
            cursor[name] += len(content)
        short = [name for name in order if cursor[name] != header[name]["data_offsets"][1]]
        if short:
            raise CheckpointError(f"{file}: {', '.join(short)} got fewer values than announced.")


def _check_space(file: Path, needed: int) -> None:
    """A disk that is too small is an error before the first byte, not hours later."""
    free = shutil.disk_usage(file.parent).free
    if needed > free:
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} ({needed:,} bytes needed, {free:,} free)")


def read_header(file: Path) -> tuple[dict[str, TensorSpec], dict[str, int]]:
    """Tensors of a safetensors file and the first byte of each.

    Raises:
        CheckpointError: the file is missing or malformed.
    """
    try:
        with open(file, "rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            size = os.fstat(opened.fileno()).st_size
            if length > min(size - 8, _LONGEST_HEADER):
                raise ValueError("the header is longer than the file")
            entries = json.loads(opened.read(length))
        specs, places = {}, {}
        for name, entry in entries.items():
            if name == "__metadata__":
                continue
            specs[name] = TensorSpec(_NAMES[entry["dtype"]], tuple(int(n) for n in entry["shape"]))
            start, end = entry["data_offsets"]
            if min(specs[name].shape, default=0) < 0:
                raise ValueError(f"{name} has a negative size")
            if not 0 <= start <= end <= size - 8 - length or end - start != specs[name].nbytes:
                raise ValueError(f"{name} lies outside the file")
            places[name] = 8 + length + start
        return specs, places
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{file} is not a readable safetensors file: {error}. Copy it again.") from error


class TensorReader:
    """A safetensors file of which parts are read, each into memory of its own; use it in a ``with`` block.

    Args:
        file: the file.

    Raises:
        CheckpointError: it is missing or malformed.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.specs, self._places = read_header(file)
        try:
            self._opened = open(file, "rb", buffering=0)  # noqa: SIM115
        except OSError as error:  # it was there a moment ago
            raise CheckpointError(f"cannot read {file}: {error.strerror}. Copy it again.") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._opened.close()

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Entries ``start`` to ``stop`` of a tensor's first dimension; a tensor without dimensions is one entry, and comes as it is.

        Raises:
            CheckpointError: the file became shorter.
        """
        spec = self.specs[name]
        if not spec.shape:
            start, stop, spec = 0, 1, TensorSpec(spec.dtype, (1,))
        stop = max(start, spec.shape[0] if stop is None else min(stop, spec.shape[0]))
        part = TensorSpec(spec.dtype, (stop - start, *spec.shape[1:]))
        content = torch.empty(part.nbytes, dtype=torch.uint8, device="cpu")
        self._fill(content.numpy().data, self._places[name] + start * TensorSpec(spec.dtype, spec.shape[1:]).nbytes)
        return content.view(spec.dtype).view(part.shape if self.specs[name].shape else ())

    def _fill(self, buffer: memoryview, place: int) -> None:
        self._opened.seek(place)
        while len(buffer):
            count = self._opened.readinto(buffer)
            if not count:
                raise CheckpointError(f"{self.file}: it became shorter while it was read. Copy it again.")
            buffer = buffer[count:]

    def parts(self, name: str) -> Iterator[tuple[str, Tensor]]:
        """A whole tensor for ``write_tensors``."""
        spec = self.specs[name]
        step = max(1, _PART_BYTES // max(1, TensorSpec(spec.dtype, spec.shape[1:]).nbytes))
        for start in range(0, spec.shape[0] if spec.shape else 1, step):
            yield name, self.read(name, start, start + step)
