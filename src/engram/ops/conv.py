"""Causal depthwise convolution with an explicit past: one formula for training, prefill and decoding (paper equation 5)."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["causal_depthwise_conv"]


def causal_depthwise_conv(inputs: Tensor, weight: Tensor, dilation: int, past: Tensor | None = None) -> Tensor:
    """``y[t] = sum_j weight[:, j] * x[t - (kernel - 1 - j) * dilation]``, positions before the past being zero.

    Shifted multiplications instead of a convolution call: the same arithmetic whether one position or a thousand arrive, so that
    token-by-token decoding agrees with a full forward pass.

    Args:
        inputs: ``[B, T, C]``.
        weight: ``[C, kernel]``, the last tap is the current position.
        dilation: distance between taps.
        past: inputs ``[B, H, C]`` of the positions before, any H; None means the sequence starts here.

    Returns:
        ``[B, T, C]``.
    """
    batch, length, channels = inputs.shape
    kernel = weight.shape[1]
    reach = (kernel - 1) * dilation
    past = inputs.new_zeros((batch, 0, channels)) if past is None else past[:, max(past.shape[1] - reach, 0) :]
    missing = reach - past.shape[1]
    padded = torch.cat([inputs.new_zeros((batch, missing, channels)), past, inputs], dim=1)
    output = inputs * weight[:, kernel - 1]
    for tap in range(kernel - 1):
        output = output + padded[:, tap * dilation : tap * dilation + length] * weight[:, tap]
    return output
