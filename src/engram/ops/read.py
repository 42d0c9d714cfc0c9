"""Equations 3 to 5 of a few positions in one go, for decoding: the same formulas as ``context_gate`` and ``causal_depthwise_conv``.

Where a step has one new position per sequence, a dozen small tensor operations cost more than the arithmetic in them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engram.native import core, have_addresses

__all__ = ["FEW_POSITIONS", "few_positions_serve"]

FEW_POSITIONS = 32
"""Up to so many positions the native loops are used; longer inputs are worth PyTorch's own."""


def few_positions_serve(streams: Tensor, weight: Tensor) -> bool:
    """Whether ``engram.native.read.read_streams`` can take the place of the tensor operations: few positions ``[B, T, M, d]``, hidden
    states and the layer's ``weight`` float32 on the CPU, no gradient wanted, no graph being traced and no autocast.
    """
    return (
        core() is not None
        and 0 < streams.shape[0] * streams.shape[1] <= FEW_POSITIONS
        and not torch.is_grad_enabled()
        and have_addresses(streams, weight)
        and not torch.is_autocast_enabled("cpu")
        and all(x.dtype == torch.float32 and x.device.type == "cpu" for x in (streams, weight))
    )
