"""The short convolution that smooths gated values over neighbouring positions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engram.ops import causal_depthwise_conv

__all__ = ["ShortConv"]


class ShortConv(nn.Module):
    """``SiLU(Conv1D(RMSNorm(v)))`` over M * d channels, depthwise, causal, dilated, without bias (paper equation 5).

    The weights start at zero, so a new memory's output is its gated value alone.

    Args:
        hidden_size: width d of one branch.
        branches: M.
        kernel_size: taps.
        dilation: distance between taps, the largest n-gram order.
        norm_eps: epsilon of the per-branch norms.
    """

    def __init__(self, hidden_size: int, branches: int, kernel_size: int, dilation: int, norm_eps: float) -> None:
        super().__init__()
        channels = hidden_size * branches
        self.conv = nn.Conv1d(channels, channels, kernel_size, dilation=dilation, groups=channels, bias=False)
        nn.init.zeros_(self.conv.weight)
        self.norms = nn.ModuleList(nn.RMSNorm(hidden_size, eps=norm_eps) for _ in range(branches))
        self.dilation = dilation

    @property
    def taps(self) -> Tensor:
        """The convolution's weight ``[M * d, kernel]``."""
        return self.conv.weight.squeeze(1)

    def normalize(self, values: Tensor) -> Tensor:
        """The convolution's input, each branch under its own norm: ``[B, T, M, d]`` to ``[B, T, M * d]``."""
        normed = [norm(values[:, :, branch]) for branch, norm in enumerate(self.norms)]
        return torch.stack(normed, dim=2).flatten(2)

    def forward(self, normed: Tensor, past: Tensor | None = None) -> Tensor:
        """Convolve normalised inputs ``[B, T, M * d]`` after those of the ``past``; the result has the same shape."""
        return F.silu(causal_depthwise_conv(normed, self.taps, self.dilation, past))
