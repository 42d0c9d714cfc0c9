"""A reader that needs no file: random signs that follow from a seed, the same on every machine and for every version."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

__all__ = ["seeded_signs"]


def seeded_signs(seed: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
    """A float32 tensor of +1 and -1.

    The bits come straight from the PCG64 generator, whose stream NumPy guarantees never to change (its distributions may).
    """
    count = math.prod(shape)
    words = np.random.PCG64(np.random.SeedSequence(seed)).random_raw((count + 63) // 64)
    bits = np.unpackbits(words.astype("<u8").view(np.uint8), count=count)
    return torch.from_numpy(bits.astype(np.float32) * 2 - 1).view(shape)
