"""How the values of a row are stored: plain floating point, or fewer bits with scales."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from engram.errors import TableError
from engram.ops import gather, kernel_serves

__all__ = ["FORMATS", "RowFormat", "as_bytes", "chosen", "narrowed", "row_format"]

_BLOCK = 32
_FLOAT8_MAX, _EXPONENT_BIAS = 448.0, 127
_LARGEST_SURE = torch.finfo(torch.float32).max / 2


@dataclass(frozen=True)
class RowFormat:
    """One way to store rows of float32 values.

    Formats without scales are floating point types and can be trained; the others are made from float rows and read.
    """

    name: str
    dtype: torch.dtype
    """Type of the stored tensor ``[rows, stored width]``."""
    values_per_item: int = 1
    scale_dtype: torch.dtype | None = None
    """Type of the scales, one per row, or one per 32 values for ``float8``; None if there are none."""

    @property
    def quantised(self) -> bool:
        """Whether rows need scales to be read."""
        return self.scale_dtype is not None

    def width(self, dim: int) -> int:
        """Items per stored row.

        Raises:
            TableError: ``dim`` values do not fill whole items.
        """
        if dim % self.values_per_item:
            raise TableError(f"{self.name} rows: got {dim} values, expected a multiple of {self.values_per_item}.")
        return dim // self.values_per_item

    def scale_shape(self, rows: int, dim: int) -> tuple[int, ...]:
        """Shape of the scales of a table."""
        return (rows, -(-dim // _BLOCK)) if self.scale_dtype == torch.uint8 else (rows,)

    def row_bytes(self, dim: int) -> int:
        """Bytes of a row with its scales."""
        scales = 0 if self.scale_dtype is None else self.scale_dtype.itemsize * self.scale_shape(1, dim)[-1]
        return self.width(dim) * self.dtype.itemsize + scales

    def encode(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """Stored values ``[n, width]`` and scales of float rows ``[n, dim]``: nearest values, ties to even.

        Raises:
            TableError: the format cannot hold a value: it is too large, or not finite where there are scales.
        """
        if not self.quantised:
            return narrowed(rows, self.dtype), None
        if not bool(rows.isfinite().all()):
            raise TableError(f"{self.name} rows: got a value that is not finite, expected finite ones; look for what made it.")
        stored, scales = _ENCODERS[self.name](rows.float())
        if rows.numel() and float(rows.abs().amax()) > _LARGEST_SURE:  # scales are rounded, up to past the end of float32
            _refuse_lost(rows, self.decode(stored, scales), self.name, _LARGEST_SURE)
        return stored, scales

    def decode(self, stored: Tensor, scales: Tensor | None) -> Tensor:
        """float32 rows ``[n, dim]``; the plain counterpart of ``read``."""
        if not self.quantised:
            return stored.float()
        assert scales is not None
        return _DECODERS[self.name](stored, scales)

    def read(
        self,
        stored: Tensor,
        scales: Tensor | None,
        row_ids: Tensor,
        dtype: torch.dtype = torch.float32,
        out: Tensor | None = None,
    ) -> Tensor:
        """Rows ``[..., dim]`` by number in ``dtype``, into ``out`` if given.

        Raises:
            IndexError: a row number is out of range (CPU; on CUDA a kernel gives zeros).
        """
        dim = stored.shape[1] * self.values_per_item
        if kernel_serves(stored, row_ids, dtype, scales):
            return gather(stored, row_ids, dtype, scales, dim, out)
        if kernel_serves(stored, row_ids, torch.float32, scales):
            rows = gather(stored, row_ids, torch.float32, scales, dim).to(dtype)
        else:
            flat = row_ids.reshape(-1)
            if stored.device.type == "cpu" and flat.numel() and not torch.compiler.is_compiling():
                _check_range(flat, stored.shape[0])  # a negative number would be counted from the end
            rows = (
                self.decode(chosen(stored, flat), None if scales is None else scales[flat]).to(dtype).view(*row_ids.shape, dim)
            )
        return rows if out is None else out.copy_(rows)


def as_bytes(rows: Tensor, dtype: torch.dtype = torch.uint8) -> Tensor:
    """float8 tensors as bytes, or back: torch moves them, but joins and sorts them on few devices."""
    return rows.view(dtype) if torch.float8_e4m3fn in (rows.dtype, dtype) else rows


def chosen(rows: Tensor, which: Tensor) -> Tensor:
    """``rows[which]``, row numbers or a mask, which torch 2.6 has not for float8."""
    return as_bytes(as_bytes(rows)[which], rows.dtype)


def _check_range(row_ids: Tensor, rows: int) -> None:
    for number in (int(row_ids.min()), int(row_ids.max())):
        if not 0 <= number < rows:
            raise IndexError(f"row number {number} is out of range, expected 0..{rows - 1}")


def narrowed(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows ``[n, dim]`` in a floating type that may be smaller; what is not finite stays so.

    Raises:
        TableError: a finite value is too large for it.
    """
    stored = rows.to(dtype)
    if torch.finfo(dtype).max < torch.finfo(rows.dtype).max and not bool(stored.isfinite().all()):
        _refuse_lost(rows, stored, str(dtype).removeprefix("torch."), torch.finfo(dtype).max)
    return stored


def _refuse_lost(before: Tensor, after: Tensor, name: str, most: float) -> None:
    """Refuse rows of which a value was finite ``before`` it was stored and is not ``after``."""
    lost = before.isfinite() & ~after.isfinite()
    if bool(lost.any()):
        row, column = (int(n) for n in lost.nonzero()[0])
        raise TableError(
            f"got the value {float(before[row, column]):.4g} (row {row} of those given), expected at most {most:.4g} in {name}; choose "
            "bfloat16, float8 or int8."
        )


def row_format(name: str) -> RowFormat:
    """The format of a name.

    Raises:
        TableError: there is none.
    """
    if name not in FORMATS:
        raise TableError(f"row format: got {name!r}, expected one of {', '.join(FORMATS)}.")
    return FORMATS[name]


def _encode_int8(rows: Tensor) -> tuple[Tensor, Tensor]:
    scales = rows.abs().amax(dim=1) / 127
    return (rows / _nonzero(scales).unsqueeze(1)).round().clamp(-127, 127).to(torch.int8), scales


def _decode_int8(stored: Tensor, scales: Tensor) -> Tensor:
    return stored.float() * scales.unsqueeze(1)


def _encode_float8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """One power of two per 32 values, the smallest with which the largest of them fits."""
    blocks = torch.nn.functional.pad(rows, (0, -rows.shape[1] % _BLOCK)).unflatten(1, (-1, _BLOCK))
    _, exponent = torch.frexp(blocks.abs().amax(dim=2) / _FLOAT8_MAX)  # largest / 448 = mantissa * 2^exponent, mantissa below 1
    exponent = exponent.clamp(1 - _EXPONENT_BIAS, _EXPONENT_BIAS)
    # Divided in two steps: 2^126 times a subnormal would otherwise leave float32's range on the way.
    scaled = blocks * _power_of_two(-(exponent // 2)).unsqueeze(2) * _power_of_two(exponent // 2 - exponent).unsqueeze(2)
    stored = scaled.flatten(1)[:, : rows.shape[1]].clamp(-_FLOAT8_MAX, _FLOAT8_MAX).to(torch.float8_e4m3fn)
    return stored.contiguous(), (exponent + _EXPONENT_BIAS).to(torch.uint8)


def _decode_float8(stored: Tensor, scales: Tensor) -> Tensor:
    powers = _power_of_two(scales.to(torch.int32) - _EXPONENT_BIAS)
    return stored.float() * powers.repeat_interleave(_BLOCK, dim=1)[:, : stored.shape[1]]


def _power_of_two(exponent: Tensor) -> Tensor:
    """2 to the power of -127 to 127 (int32) in float32, from its bits: ``torch.ldexp`` asks the device's ``pow``, which need not be exact."""
    return torch.where(exponent > -_EXPONENT_BIAS, (exponent + _EXPONENT_BIAS) << 23, 1 << 22).view(torch.float32)


def _encode_int4(rows: Tensor) -> tuple[Tensor, Tensor]:
    scales = rows.abs().amax(dim=1) / 7
    values = (rows / _nonzero(scales).unsqueeze(1)).round().clamp(-7, 7).to(torch.int8) & 15
    return (values[:, 0::2] | values[:, 1::2] << 4).view(torch.uint8).contiguous(), scales


def _decode_int4(stored: Tensor, scales: Tensor) -> Tensor:
    halves = torch.stack([stored & 15, stored >> 4], dim=2).flatten(1).to(torch.int8)
    return torch.where(halves > 7, halves - 16, halves).float() * scales.unsqueeze(1)


def _nonzero(scales: Tensor) -> Tensor:
    return torch.where(scales == 0, 1.0, scales)


_ENCODERS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "int8": _encode_int8,
    "float8": _encode_float8,
    "int4": _encode_int4,
}
_DECODERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "int8": _decode_int8,
    "float8": _decode_float8,
    "int4": _decode_int4,
}
FORMATS = {
    entry.name: entry
    for entry in (
        RowFormat("float32", torch.float32),
        RowFormat("bfloat16", torch.bfloat16),
        RowFormat("float16", torch.float16),
        RowFormat("int8", torch.int8, scale_dtype=torch.float32),
        RowFormat("float8", torch.float8_e4m3fn, scale_dtype=torch.uint8),
        RowFormat("int4", torch.uint8, values_per_item=2, scale_dtype=torch.float32),
    )
}
