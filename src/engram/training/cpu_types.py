"""Whether the CPU at hand has instructions for bfloat16: where it is emulated, training takes ten to a hundred times as long."""

from __future__ import annotations

import functools
import time

import torch

__all__ = ["bfloat16_slowdown", "warning_of_slow_bfloat16"]

_SIZE, _TRIES = 192, 3
_TOLERABLE = 2.0
"""What rounding costs where oneDNN has AVX-512 but no bfloat16 to work with is below this."""


@functools.cache
def bfloat16_slowdown() -> float:
    """Times as long as a matrix product takes in bfloat16 as in float32, measured once per process (milliseconds)."""
    seconds = [_seconds_of_product(dtype) for dtype in (torch.bfloat16, torch.float32)]
    return seconds[0] / seconds[1]


def _seconds_of_product(dtype: torch.dtype) -> float:
    matrix = torch.ones(_SIZE, _SIZE, dtype=dtype, device="cpu")
    shortest = float("inf")
    for _ in range(1 + _TRIES):  # the first one also sets things up
        started = time.perf_counter()
        matrix @ matrix
        shortest = min(shortest, time.perf_counter() - started)
    return shortest


def warning_of_slow_bfloat16(what: str) -> str | None:
    """What to say before training on this CPU in bfloat16; None if it is good at it.

    Args:
        what: the setting to change, for the message.
    """
    slowdown = bfloat16_slowdown()
    if slowdown < _TOLERABLE:
        return None
    return (
        f"bfloat16 is emulated on this CPU: a matrix product takes {slowdown:.0f} times as long as in float32. "
        f"Set {what} to train in float32, or use a machine with AVX-512 BF16, AMX or a GPU."
    )
