"""Projections of the same input whose weights lie side by side, so that one matrix product serves them all."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engram.distributed import is_divided

__all__ = ["are_plain", "join_projections", "project_all", "project_together"]


def are_plain(modules: Sequence[nn.Module], kind: type[nn.Module]) -> bool:
    """Whether modules do what their class and float32 weights say and nothing more: no adapter, hook, parametrisation or sharding."""
    return all(
        type(module) is kind
        and not (module._forward_hooks or module._forward_pre_hooks)
        and type(module.weight) is nn.Parameter
        and type(module.weight.data) is Tensor
        and module.weight.dtype == torch.float32
        for module in modules
    )


@torch.no_grad()
def join_projections(projections: Sequence[nn.Linear]) -> None:
    """Move the weights, and the biases, of several projections into one piece of memory each; they stay parameters of their own.

    Nothing is done where they lie so already, or where FSDP has divided them: there each lies by itself.
    """
    for name in ("weight", "bias"):
        parts = [getattr(projection, name) for projection in projections]
        if (
            any(part is None or is_divided(part) for part in parts)
            or len({part.dtype for part in parts}) > 1
            or _side_by_side(parts) is not None
        ):
            continue
        joined = torch.cat([part.detach() for part in parts])
        for part, place in zip(parts, joined.split([len(part) for part in parts])):
            part.data = place


def project_together(projections: Sequence[nn.Linear], rows: Tensor) -> Tensor:
    """What the projections make of ``rows [..., in]``, concatenated ``[..., sum of out]``; no gradient reaches them.

    One matrix product where the weights still lie side by side, else (moved apart by a sharding wrapper, say) one after the other.
    """
    weight, bias = _side_by_side([p.weight for p in projections]), None
    if projections[0].bias is not None:
        bias = _side_by_side([p.bias for p in projections])
        weight = None if bias is None else weight
    if weight is None:
        return torch.cat([projection(rows) for projection in projections], dim=-1)
    return F.linear(rows, weight, bias)


def project_all(projections: Sequence[nn.Linear], rows: Tensor) -> Tensor:
    """As ``project_together``, with gradients: one matrix product each way, and the rows converted once where autocast converts."""
    weight = torch.cat([projection.weight for projection in projections])
    bias = None if projections[0].bias is None else torch.cat([projection.bias for projection in projections])
    return F.linear(rows, weight, bias)


def _side_by_side(parts: Sequence[Tensor]) -> Tensor | None:
    """The parts as one tensor, if they follow each other in memory."""
    first, rows = parts[0].detach(), 0
    storage, start = first.untyped_storage().data_ptr(), first.data_ptr()
    for part in parts:
        follows = part.data_ptr() == start + rows * first.stride(0) * first.element_size()
        if not follows or part.untyped_storage().data_ptr() != storage or not part.is_contiguous() or part.dtype != first.dtype:
            return None
        rows += part.shape[0]
    return first.as_strided((rows, *first.shape[1:]), first.stride())
