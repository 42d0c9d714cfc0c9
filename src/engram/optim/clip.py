"""Gradient clipping that sees sparse gradients too."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = ["clip_grad_norm_"]


@torch.no_grad()
def clip_grad_norm_(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale all gradients together so that their joint 2-norm is at most ``max_norm``; returns the norm before.

    The norm equals that of the densified gradients: duplicate rows of a sparse gradient are summed first (and stay summed).
    """
    holders = [p for p in parameters if p.grad is not None]
    parts = []
    for p in holders:
        assert p.grad is not None
        if p.grad.is_sparse:
            p.grad = p.grad.coalesce()
        parts.append(_values(p.grad))
    if not parts:
        return torch.tensor(0.0)
    device = parts[0].device
    total = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(v.float()).to(device) for v in parts]))
    scale = (max_norm / (total + 1e-6)).clamp(max=1.0)
    for values in parts:
        values.mul_(scale.to(values.device))
    return total


def _values(grad: Tensor) -> Tensor:
    """The numbers of a gradient: all of a dense one, the stored rows of a coalesced sparse one."""
    return grad._values() if grad.is_sparse else grad
