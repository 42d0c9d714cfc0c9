"""Plain float32 versions of the layer's formulas, written from the equations; the tests hold every fast path against them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["causal_depthwise_conv_reference", "context_gate_reference", "lookup_rows_reference", "rms_norm_reference"]


def lookup_rows_reference(weight: Tensor, row_ids: Tensor) -> Tensor:
    """``weight[row_ids]`` with an ordinary dense gradient."""
    return weight[row_ids]


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension."""
    return x / torch.sqrt((x * x).mean(dim=-1, keepdim=True) + eps) * weight


def context_gate_reference(query: Tensor, key: Tensor, kind: str) -> Tensor:
    """Equation 4, one dot product per position."""
    score = torch.einsum("...d,...d->...", query, key) / query.shape[-1] ** 0.5
    if kind == "signed_sqrt":
        score = torch.sign(score) * torch.sqrt(torch.maximum(score.abs(), torch.tensor(1e-6)))
    return (1 / (1 + torch.exp(-score))).unsqueeze(-1)


def causal_depthwise_conv_reference(inputs: Tensor, weight: Tensor, dilation: int) -> Tensor:
    """The library convolution over a zero-padded sequence ``[B, T, C]`` with weights ``[C, kernel]``."""
    channels, kernel = weight.shape
    padded = F.pad(inputs.transpose(1, 2), ((kernel - 1) * dilation, 0))
    return F.conv1d(padded, weight.unsqueeze(1), dilation=dilation, groups=channels).transpose(1, 2)
