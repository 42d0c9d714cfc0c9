"""How a looked-up value meets the residual streams: through a gate (paper equation 4), or joined to the hidden state by a projection.

Parameters come one per stream, or one for all streams. Shape legend: B batch, T positions, M residual streams, d hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from engram.ops import context_gate

__all__ = ["concat_projections", "fuse_by_concat", "fuse_by_gate"]


def concat_projections(hidden_size: int, count: int) -> nn.ModuleList:
    """Projections W_C of ``fuse="concat"``, ``[d, 2d]`` each, that start as ``[0 ; I]``: the value passes as it is.

    Nothing but the hidden state's half is zero: rows start at zero too, and of a product of two zeros neither learns.
    """
    projections = [nn.Linear(2 * hidden_size, hidden_size, bias=False) for _ in range(count)]
    with torch.no_grad():
        for projection in projections:
            projection.weight.copy_(torch.eye(hidden_size, 2 * hidden_size).roll(hidden_size, dims=1))
    return nn.ModuleList(projections)


def fuse_by_gate(
    streams: Tensor,
    rows: Tensor,
    key_projs: Sequence[nn.Module] | nn.ModuleList,
    key_norms: Sequence[nn.Module] | nn.ModuleList,
    query_norms: Sequence[nn.Module] | nn.ModuleList,
    kind: str,
) -> Tensor:
    """Gates ``[B, T, M, 1]``: each stream asks with its own norms and key projection, or all with the one there is.

    Args:
        streams: hidden states ``[B, T, M, d]``.
        rows: what was looked up, ``[B, T, d_mem]``.
        key_projs: M projections, or one.
        key_norms: as many.
        query_norms: as many.
        kind: see ``context_gate``.
    """
    # Under autocast the projection comes in half precision; the norm and the gate stay in the layer's own.
    if len(key_projs) == 1:
        key = key_norms[0](key_projs[0](rows).to(rows.dtype))
        return context_gate(query_norms[0](streams), key.unsqueeze(2), kind)
    gates = [
        context_gate(query_norms[m](streams[:, :, m]), key_norms[m](key_projs[m](rows).to(rows.dtype)), kind)
        for m in range(streams.shape[2])
    ]
    return torch.stack(gates, dim=2)


def fuse_by_concat(streams: Tensor, value: Tensor, projections: nn.ModuleList, norms: nn.ModuleList) -> Tensor:
    """Values ``[B, T, M, d]``: ``W_C [RMSNorm(h_m) ; value]`` for every stream.

    Args:
        streams: hidden states ``[B, T, M, d]``.
        value: ``W_V e``, ``[B, T, d]``.
        projections: M of W_C, or one for all streams.
        norms: as many.
    """
    fused = []
    for m in range(streams.shape[2]):
        own = m if len(projections) > 1 else 0
        joined = torch.cat([norms[own](streams[:, :, m]), value], dim=-1)
        fused.append(projections[own](joined).to(value.dtype))
    return torch.stack(fused, dim=2)
