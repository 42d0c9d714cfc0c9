"""The context gate: how much of a looked-up value the current hidden state lets in (paper equation 4)."""

from __future__ import annotations

import math

from torch import Tensor

__all__ = ["SIGNED_SQRT_FLOOR", "context_gate"]

SIGNED_SQRT_FLOOR = 1e-6
"""Smallest magnitude under the square root; keeps its gradient finite (demo)."""


def context_gate(query: Tensor, key: Tensor, kind: str = "signed_sqrt") -> Tensor:
    """``sigmoid(s(query . key / sqrt(d)))`` over the last dimension.

    Args:
        query: normalised hidden states ``[..., d]``.
        key: normalised keys ``[..., d]``.
        kind: ``plain`` (s is the identity, paper) or ``signed_sqrt`` (s(g) = sign(g) sqrt(max(|g|, 1e-6)), demo).

    Returns:
        Gates in (0, 1), ``[..., 1]``.
    """
    score = (query * key).sum(dim=-1, keepdim=True) / math.sqrt(query.shape[-1])
    if kind == "signed_sqrt":
        score = score.abs().clamp_min(SIGNED_SQRT_FLOOR).sqrt() * score.sign()
    return score.sigmoid()
