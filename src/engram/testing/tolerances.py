"""The constants within which floats are compared, all in one place."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["EXACT_ENOUGH", "HALF_ENOUGH", "assert_close"]

EXACT_ENOUGH = 1e-5
"""Largest difference between two float32 computations of the same formula in another order (relative to the largest value)."""

HALF_ENOUGH = 2.0**-8
"""As much for results that are rounded to bfloat16, which has eight bits: a unit in the last place."""


def assert_close(got: Tensor, expected: Tensor, tolerance: float = EXACT_ENOUGH) -> None:
    """Fail unless shapes agree and no element is off by more than ``tolerance`` times the largest expected magnitude (at least 1)."""
    assert got.shape == expected.shape, f"shape {list(got.shape)}, expected {list(expected.shape)}"
    assert not torch.isnan(got).any(), "NaN"
    if got.numel() == 0:
        return
    scale = max(1.0, float(expected.detach().abs().max()))
    difference = float((got.detach().double() - expected.detach().double()).abs().max())
    assert difference <= tolerance * scale, f"off by {difference:.3g}, allowed {tolerance * scale:.3g}"
