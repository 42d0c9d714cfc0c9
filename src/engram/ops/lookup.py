"""Row look-up whose gradient holds the touched rows only."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from engram.ops.dispatch import gather, kernel_serves

__all__ = ["gradient_at", "lookup_rows", "read_rows"]


def lookup_rows(weight: Tensor, row_ids: Tensor, dtype: torch.dtype | None = None, fetched: Tensor | None = None) -> Tensor:
    """Rows ``[..., dim]`` of ``weight [rows, dim]``; the gradient of ``weight`` is a sparse tensor of the rows read.

    A dense gradient would make every training step cost as much as the whole table. Rows are fetched, and converted on the way if asked
    for, by the native core on the CPU and by Triton on CUDA.

    Args:
        weight: the table.
        row_ids: int64, any shape.
        dtype: type of the result; that of the table if not given.
        fetched: the rows themselves ``[..., dim]``, if they are here already (prefetched, or out of a table on another device): only the
            way back to ``weight`` is added.

    Raises:
        IndexError: a row number is out of range (CPU; on CUDA see ``engram.ops.gather``).
    """
    dtype = dtype or weight.dtype
    if weight.requires_grad and torch.is_grad_enabled():
        return _lookup_to_train(weight, row_ids, dtype, fetched)
    return read_rows(weight, row_ids, dtype) if fetched is None else fetched


@torch.compiler.disable  # Inductor cannot have sparse gradients within a graph
def _lookup_to_train(weight: Tensor, row_ids: Tensor, dtype: torch.dtype, fetched: Tensor | None) -> Tensor:
    if fetched is None and not kernel_serves(weight, row_ids, dtype):
        return F.embedding(row_ids, weight, sparse=True).to(dtype)
    return _Lookup.apply(weight, row_ids, dtype, (fetched,))


def read_rows(data: Tensor, row_ids: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """Rows ``[..., dim]`` of floating point rows ``[rows, dim]`` on the device of ``row_ids``, into ``out`` if given; no gradient."""
    if kernel_serves(data, row_ids, dtype):
        return gather(data, row_ids, dtype, out=out)
    rows = F.embedding(row_ids, data.detach()).to(dtype)
    return rows if out is None else out.copy_(rows)


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, weight: Tensor, row_ids: Tensor, dtype: torch.dtype, fetched: tuple[Tensor | None]) -> Tensor:
        context.save_for_backward(row_ids)
        context.shape, context.dtype, context.device = weight.shape, weight.dtype, weight.device
        rows = fetched[0]  # in a tuple, where autograd does not take it for an input
        return gather(weight, row_ids, dtype) if rows is None else rows.detach()

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (row_ids,) = context.saved_tensors
        values = gradients[0].reshape(-1, context.shape[1]).to(context.dtype)
        gradient = torch.sparse_coo_tensor(
            row_ids.reshape(1, -1).to(values.device), values, context.shape, check_invariants=False
        )
        return gradient_at(gradient, context.device), None, None, None


def gradient_at(gradient: Tensor, device: torch.device) -> Tensor:
    """A gradient ``[rows, dim]`` where its rows live, for the optimiser works there.

    Rows read more than once are summed before they are sent, unless they have 16 bits: those are summed in float32 later.
    """
    if gradient.device == device:
        return gradient
    gradient = gradient.coalesce() if gradient.dtype == torch.float32 else gradient
    indices, values = gradient._indices().to(device), gradient._values().to(device)
    summed = gradient.is_coalesced()
    return torch.sparse_coo_tensor(indices, values, gradient.shape, check_invariants=False, is_coalesced=summed)
