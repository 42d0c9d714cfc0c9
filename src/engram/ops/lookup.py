"""Row look-up whose gradient holds the touched rows only."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from engram.native import core, gather_rows

__all__ = ["lookup_rows"]

_NATIVE_TO_FLOAT32 = (torch.bfloat16, torch.float16)


def lookup_rows(weight: Tensor, row_ids: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Rows ``[..., dim]`` of ``weight [rows, dim]``; the gradient of ``weight`` is a sparse tensor of the rows read.

    A dense gradient would make every training step cost as much as the whole table. On the CPU rows are fetched, and turned into
    float32 on the way if asked for, by the native core.

    Args:
        weight: the table.
        row_ids: int64, any shape.
        dtype: type of the result; that of the table if not given.

    Raises:
        IndexError: a row number is out of range (CPU).
    """
    dtype = dtype or weight.dtype
    if not _native_serves(weight, row_ids, dtype):
        return F.embedding(row_ids, weight, sparse=True).to(dtype)
    if weight.requires_grad and torch.is_grad_enabled():
        return _NativeLookup.apply(weight, row_ids, dtype)
    return _gather(weight, row_ids, dtype)


def _native_serves(weight: Tensor, row_ids: Tensor, dtype: torch.dtype) -> bool:
    return (
        core() is not None
        and weight.device.type == "cpu"
        and row_ids.device.type == "cpu"
        and row_ids.dtype == torch.int64
        and weight.is_contiguous()
        and (dtype == weight.dtype or (dtype == torch.float32 and weight.dtype in _NATIVE_TO_FLOAT32))
        and not torch.compiler.is_compiling()
    )


def _gather(weight: Tensor, row_ids: Tensor, dtype: torch.dtype) -> Tensor:
    rows = torch.empty((*row_ids.shape, weight.shape[1]), dtype=dtype)
    try:
        gather_rows(weight.detach(), row_ids.contiguous(), rows)
    except IndexError as error:
        raise IndexError(f"row number {error} is out of range, expected 0..{weight.shape[0] - 1}") from None
    return rows


class _NativeLookup(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, weight: Tensor, row_ids: Tensor, dtype: torch.dtype) -> Tensor:
        context.save_for_backward(row_ids)
        context.shape, context.dtype = weight.shape, weight.dtype
        return _gather(weight, row_ids, dtype)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (row_ids,) = context.saved_tensors
        values = gradients[0].reshape(-1, context.shape[1]).to(context.dtype)
        sparse = torch.sparse_coo_tensor(row_ids.reshape(1, -1), values, context.shape, check_invariants=False)
        return sparse, None, None
