"""Rows by number in one Triton launch, dequantised on the way: from a table on the device, or from page-locked host memory.

Importing this module needs Triton; ``engram.ops.dispatch`` does so only where a kernel can run. Nothing here waits for the device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["gather_rows_triton"]

_PLAIN, _INT8, _FLOAT8, _INT4 = 0, 1, 2, 3
_KINDS = {torch.int8: _INT8, torch.float8_e4m3fn: _FLOAT8, torch.uint8: _INT4}
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_TILE = 2048
"""Values per program: enough loads in flight to hide the latency of a bus, few enough for registers."""


@triton.jit
def _float8_to_float32(bits):
    """e4m3 from its byte: sign apart, the rest is a half-precision number that is 2^8 too small; subnormals come out right."""
    magnitude = bits & 0x7F
    half = (magnitude.to(tl.int16) << 7).to(tl.float16, bitcast=True)
    value = half.to(tl.float32) * 256.0
    value = tl.where(magnitude == 0x7F, float("nan"), value)
    return tl.where(bits >= 0x80, -value, value)


@triton.jit
def _power_of_two(exponent):
    """2^(exponent - 127) from its bits; the exponent 0 stands for a subnormal number."""
    bits = exponent.to(tl.int32)
    return tl.where(bits == 0, 1 << 22, bits << 23).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["count"])  # or batches of other sizes would compile it again
def _gather_kernel(
    data,
    scales,
    row_ids,
    out,
    rows,
    count,
    KIND: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    SCALES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    number_N = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    column_D = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    asked_N = number_N < count
    row_N = tl.load(row_ids + number_N, mask=asked_N, other=0)
    there_N = asked_N & (row_N >= 0) & (row_N < rows)
    # Everything else reads zero bits, which every format takes for zero.
    there_ND = there_N[:, None] & (column_D < DIM)[None, :]
    if KIND == 3:  # two values per byte
        item_D = column_D // 2
    else:
        item_D = column_D
    stored_ND = tl.load(data + (row_N[:, None] * WIDTH + item_D[None, :]), mask=there_ND, other=0)
    if KIND == 0:
        if data.dtype.element_ty == out.dtype.element_ty:
            value_ND = stored_ND
        else:
            value_ND = stored_ND.to(tl.float32)
    elif KIND == 2:
        exponent_ND = tl.load(scales + (row_N[:, None] * SCALES + (column_D // 32)[None, :]), mask=there_ND, other=0)
        value_ND = _float8_to_float32(stored_ND) * _power_of_two(exponent_ND)
    else:
        if KIND == 3:
            half_ND = (stored_ND >> ((column_D % 2) * 4)[None, :].to(tl.uint8)) & 15
            whole_ND = half_ND.to(tl.int32)
            whole_ND = tl.where(whole_ND > 7, whole_ND - 16, whole_ND)
        else:
            whole_ND = stored_ND.to(tl.int32)
        scale_N = tl.load(scales + row_N, mask=there_N, other=0)
        value_ND = whole_ND.to(tl.float32) * scale_N[:, None]
    written_ND = asked_N[:, None] & (column_D < DIM)[None, :]
    tl.store(out + (number_N[:, None] * DIM + column_D[None, :]), value_ND.to(out.dtype.element_ty), mask=written_ND)


def gather_rows_triton(data: Tensor, scales: Tensor | None, row_ids: Tensor, out: Tensor) -> None:
    """Rows by number into ``out``, in its type, on the current stream of the device of ``row_ids``.

    A number out of range reads nothing and gives zeros: raising would make every look-up wait for the device.

    Args:
        data: ``[rows, width]`` contiguous, on the device or a view of page-locked host memory: float32, bfloat16 or float16; or with
            ``scales``: int8, float8_e4m3fn, uint8 (two 4-bit values per byte).
        scales: float32 ``[rows]``, for float8 uint8 exponents ``[rows, ceil(dim / 32)]``; None for floating point rows.
        row_ids: int64, any shape, contiguous.
        out: ``[*row_ids.shape, dim]`` contiguous: float32, bfloat16 or float16.

    Raises:
        ValueError: types or shapes do not go together.
    """
    kind, dim = _check(data, scales, row_ids, out), out.shape[-1]
    count = row_ids.numel()
    if count == 0 or dim == 0:
        return
    block_d = min(triton.next_power_of_2(dim), 1024)
    # Many look-ups are only a few rows (a decoding step): small blocks spread them over the device.
    block_n = max(1, min(_TILE // block_d, triton.next_power_of_2(triton.cdiv(count, 256))))
    grid = (triton.cdiv(count, block_n), triton.cdiv(dim, block_d))
    _gather_kernel[grid](
        data.view(torch.uint8) if kind == _FLOAT8 else data,
        row_ids if scales is None else scales,
        row_ids,
        out,
        data.shape[0],
        count,
        KIND=kind,
        DIM=dim,
        WIDTH=data.shape[1],
        SCALES=scales.shape[1] if kind == _FLOAT8 and scales is not None else 1,
        BLOCK_N=block_n,
        BLOCK_D=block_d,
        num_warps=4 if block_n * block_d > 512 else 1,
        enable_fp_fusion=False,  # bit for bit as PyTorch decodes
    )


def _check(data: Tensor, scales: Tensor | None, row_ids: Tensor, out: Tensor) -> int:
    """The kind of rows these are, if everything goes together."""
    kind = _PLAIN if scales is None else _KINDS.get(data.dtype, _PLAIN)
    width, dim = data.shape[-1] * (2 if kind == _INT4 else 1), out.shape[-1]
    if data.dim() != 2 or out.shape != (*row_ids.shape, dim) or dim != width or row_ids.dtype != torch.int64:
        raise ValueError(
            f"gather_rows_triton: got rows {list(data.shape)} of {width} values, {row_ids.dtype} row numbers {list(row_ids.shape)} "
            f"and out {list(out.shape)}, expected int64 numbers [...] and out [..., {width}]."
        )
    scale_shape = None if scales is None else (data.shape[0], -(-dim // 32)) if kind == _FLOAT8 else (data.shape[0],)
    scale_dtype = None if scales is None else torch.uint8 if kind == _FLOAT8 else torch.float32
    if (kind == _PLAIN and (scales is not None or data.dtype not in _FLOATS)) or out.dtype not in _FLOATS:
        raise ValueError(f"gather_rows_triton: got {data.dtype} rows and {out.dtype} out, which it does not know.")
    if scales is not None and (scales.shape != scale_shape or scales.dtype != scale_dtype):
        raise ValueError(
            f"gather_rows_triton: got {scales.dtype} scales {list(scales.shape)}, expected {scale_dtype} {list(scale_shape or ())}."
        )
    tensors = [data, row_ids, out, *([] if scales is None else [scales])]
    if not all(t.is_contiguous() for t in tensors) or len({t.device for t in tensors}) > 1:
        raise ValueError("gather_rows_triton: expected contiguous tensors of one device (host memory through its device view).")
    return kind
