"""Gradient clipping that sees sparse gradients too."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from engram.distributed import own_part, shard_group, sum_everywhere, whole
from engram.native.rows import sum_duplicates

__all__ = ["clip_grad_norm_"]


@torch.no_grad()
def clip_grad_norm_(parameters: Tensor | Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale all gradients together so that their joint 2-norm is at most ``max_norm``; returns the norm before.

    The norm equals that of the densified gradients: duplicate rows of a sparse gradient are summed first. They stay summed, unless they have
    16 bits: those are summed in float32, which a gradient of theirs could not hold. Tables that are divided between processes count as
    whole ones, and so do parameters that FSDP has divided; all processes clip together then.

    Args:
        parameters: one tensor or several; those without a gradient are passed over.
        max_norm: infinity measures without scaling.
    """
    holders = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    holders = [p for p in holders if p.grad is not None]
    if not holders:
        return torch.tensor(0.0)
    total = _joint_norm([_norm(p) for p in holders])
    if max_norm == float("inf"):
        return total
    scale = (max_norm / (total + 1e-6)).clamp(max=1.0)
    for p in holders:
        assert p.grad is not None
        values = p.grad._values() if p.grad.is_sparse else own_part(p.grad)
        values.mul_(scale.to(values.device))
    return total


def _norm(parameter: Tensor) -> Tensor:
    """Of a gradient; of a parameter that is divided between processes, of all parts together."""
    norm, divided = torch.linalg.vector_norm(_summed(parameter).float()), shard_group(parameter)
    return norm if divided is None else sum_everywhere(norm.square(), *divided).sqrt()


def _joint_norm(norms: list[Tensor]) -> Tensor:
    """The norm of all, on the device of the first; each device sums up its own and sends one number, which is one wait. So do processes that
    FSDP has divided parameters between.
    """
    together: dict[Any, list[Tensor]] = {}
    for norm in norms:
        together.setdefault((norm.device, getattr(norm, "device_mesh", None)), []).append(norm)
    parts = [whole(torch.linalg.vector_norm(torch.stack(part))) for part in together.values()]
    return parts[0] if len(parts) == 1 else torch.linalg.vector_norm(torch.stack([part.to(norms[0].device) for part in parts]))


def _summed(parameter: Tensor) -> Tensor:
    """The numbers of a gradient: of a dense one all, of a sparse one the sums by row, which replace it where they have its type."""
    gradient = parameter.grad
    assert gradient is not None
    if not gradient.is_sparse:
        return gradient
    summed = sum_duplicates(gradient)
    if summed.dtype == gradient.dtype:
        parameter.grad = summed
    return summed.values()
