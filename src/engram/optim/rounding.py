"""Stochastic rounding: up or down by chance, so that on average nothing is lost.

A step on a bfloat16 row is often smaller than half of the last place; rounding to nearest drops it every time. The random bits are a hash
of (seed, row, column), so that they depend neither on the order of the rows nor on threads, and any implementation can make the same ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["ROUNDED_DTYPES", "draw_seed", "round_stochastically"]

ROUNDED_DTYPES = (torch.bfloat16, torch.float16)
_LOW = 0xFFFFFFFF


def draw_seed() -> int:
    """A seed from torch's global CPU generator, whose state checkpoints carry."""
    return int(torch.randint(1 << 62, (), dtype=torch.int64, device="cpu"))


def round_stochastically(values: Tensor, dtype: torch.dtype, row_ids: Tensor, seed: int) -> Tensor:
    """Each value becomes one of its two neighbours in ``dtype``, the nearer one more often: the expectation is the value.

    Values that ``dtype`` can hold stay as they are; finite ones never become infinite (beyond its range they become its largest).

    Args:
        values: float32 ``[n, ...]``.
        dtype: bfloat16 or float16.
        row_ids: int64 ``[n]``, what tells rows apart.
        seed: the same seed gives the same rounding.
    """
    bits = _random_bits(values.shape, row_ids, seed)
    limit = torch.finfo(dtype).max
    clamped = values.clamp(-limit, limit)
    rounded = _round_bfloat16(clamped, bits) if dtype == torch.bfloat16 else _round_float16(clamped, bits)
    return torch.where(values.isfinite(), rounded, values.to(dtype))


def _random_bits(shape: torch.Size, row_ids: Tensor, seed: int) -> Tensor:
    """32 uniform bits for each value, as int64 ``[n, ...]``: splitmix64 of seed and row, then a 32-bit mix with the column."""
    mixed = row_ids * _signed(0x9E3779B97F4A7C15) + seed
    mixed = (mixed ^ _shifted(mixed, 30)) * _signed(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ _shifted(mixed, 27)) * _signed(0x94D049BB133111EB)
    keys = (mixed ^ _shifted(mixed, 31)) & _LOW
    columns = torch.arange(shape[1:].numel(), device=row_ids.device) * 0x9E3779B9
    x = (keys.unsqueeze(1) + columns) & _LOW
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _LOW
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _LOW
    return (x ^ (x >> 16)).view(shape)


def _round_bfloat16(values: Tensor, bits: Tensor) -> Tensor:
    """Add random bits below the last place that stays, then cut: a carry happens as often as the part cut is large."""
    raw = values.contiguous().view(torch.int32)
    return ((raw + (bits >> 16).int()) >> 16 << 16).view(torch.float32).to(torch.bfloat16)


def _round_float16(values: Tensor, bits: Tensor) -> Tensor:
    """The same for float16; its subnormals are multiples of 2^-24, so there fewer bits stay."""
    raw = values.contiguous().view(torch.int32)
    normal = ((raw + (bits >> 19).int()) >> 13 << 13).view(torch.float32)
    steps = values.abs() * 2.0**24
    whole = steps.floor()
    chance = (bits >> 8).float() * 2.0**-24
    subnormal = ((whole + (chance < steps - whole)) * 2.0**-24).copysign(values)
    return torch.where(values.abs() < 2.0**-14, subnormal, normal).to(torch.float16)


def _shifted(x: Tensor, by: int) -> Tensor:
    """Shift right as if unsigned: int64 is what torch computes with."""
    return (x >> by) & ((1 << (64 - by)) - 1)


def _signed(constant: int) -> int:
    return constant - (1 << 64) if constant >= 1 << 63 else constant
