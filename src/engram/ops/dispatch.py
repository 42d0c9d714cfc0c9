"""One place that decides what fetches rows: the native core for CPU tensors, Triton for CUDA, and where neither serves, PyTorch.

Both kernels read every row format; callers keep the plain PyTorch path beside them, which the kernels must equal.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from engram.native import core, gather_rows, have_addresses
from engram.native.optional import triton_kernel
from engram.ops.outputs import new_output

__all__ = ["gather", "kernel_serves", "triton_gather"]

_NATIVE_TO_FLOAT32 = (torch.bfloat16, torch.float16)
_TRITON_OUT = (torch.float32, torch.bfloat16, torch.float16)


def triton_gather() -> Callable[..., None] | None:
    """The Triton kernel; None where Triton is missing."""
    return triton_kernel("engram.ops.triton_gather", "gather_rows_triton")


def kernel_serves(data: Tensor, row_ids: Tensor, dtype: torch.dtype, scales: Tensor | None = None) -> bool:
    """Whether ``gather`` can fetch these rows in ``dtype``; tensors must be contiguous, of one device, and no graph being traced."""
    if data.device != row_ids.device or row_ids.dtype != torch.int64 or not data.is_contiguous():
        return False
    if not have_addresses(data, row_ids):
        return False
    if data.device.type == "cuda":
        floats = scales is not None or data.dtype in _TRITON_OUT
        return dtype in _TRITON_OUT and floats and triton_gather() is not None
    if data.device.type != "cpu" or core() is None:
        return False
    if scales is not None:
        return dtype == torch.float32
    return dtype == data.dtype or (dtype == torch.float32 and data.dtype in _NATIVE_TO_FLOAT32)


def gather(
    data: Tensor,
    row_ids: Tensor,
    dtype: torch.dtype,
    scales: Tensor | None = None,
    dim: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Rows ``[..., dim]`` by number, where ``kernel_serves``; no gradient.

    Args:
        data: ``[rows, width]``.
        row_ids: int64, any shape.
        dtype: type of the result.
        scales: of quantised rows, as their format has them.
        dim: values per row, where that is not the width (4-bit rows).
        out: ``[*row_ids.shape, dim]`` contiguous, of ``dtype``; a new tensor if not given (page-locked out of it is the caller's choice).

    Raises:
        IndexError: a row number is out of range (CPU). On CUDA such a number gives zeros.
    """
    data, row_ids = data.detach(), row_ids.contiguous()
    if out is None:
        out = new_output((*row_ids.shape, dim or data.shape[1]), dtype, row_ids.device)
    if data.device.type == "cuda":
        kernel = triton_gather()
        assert kernel is not None
        with torch.cuda.device(data.device):  # Triton launches on the current device
            kernel(data, scales, row_ids, out)
        return out
    try:
        gather_rows(data, row_ids, out, scales, dim)
    except IndexError as error:
        raise IndexError(f"row number {error} is out of range, expected 0..{data.shape[0] - 1}") from None
    return out
