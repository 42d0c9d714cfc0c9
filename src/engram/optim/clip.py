"""Gradient clipping that sees sparse gradients too."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from engram.native.rows import sum_duplicates

__all__ = ["clip_grad_norm_"]


@torch.no_grad()
def clip_grad_norm_(parameters: Tensor | Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale all gradients together so that their joint 2-norm is at most ``max_norm``; returns the norm before.

    The norm equals that of the densified gradients: duplicate rows of a sparse gradient are summed first (and stay summed).

    Args:
        parameters: one tensor or several; those without a gradient are passed over.
        max_norm: infinity measures without scaling.
    """
    holders = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    parts = [_values(p) for p in holders if p.grad is not None]
    if not parts:
        return torch.tensor(0.0)
    device = parts[0].device
    total = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(v.float()).to(device) for v in parts]))
    scale = (max_norm / (total + 1e-6)).clamp(max=1.0)
    for values in parts:
        values.mul_(scale.to(values.device))
    return total


def _values(parameter: Tensor) -> Tensor:
    """The numbers of a gradient: all of a dense one, the stored rows of a sparse one, which is coalesced in place of the old."""
    assert parameter.grad is not None
    if not parameter.grad.is_sparse:
        return parameter.grad
    parameter.grad = sum_duplicates(parameter.grad)
    return parameter.grad.values()
