"""Cross-entropy of tokens in half of the memory: logits of a small model are its largest activations by far."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["sum_of_token_losses"]


def sum_of_token_losses(logits: Tensor, labels: Tensor, ignore_index: int = -100) -> Tensor:
    """What ``F.cross_entropy(..., reduction="sum")`` gives, computed in float32 at least; the backward pass turns the log-probabilities of the
    forward pass into the gradient where they lie. So a graph can be gone through once.

    Args:
        logits: ``[N, V]``.
        labels: int64 ``[N]``, ``ignore_index`` where nothing is predicted.
        ignore_index: the label that counts as none.

    Returns:
        A scalar, in nats.

    Raises:
        RuntimeError: the backward pass is run a second time, or is to be derived itself.
    """
    if torch.compiler.is_compiling() or not logits.requires_grad or not torch.is_grad_enabled():
        return plain_sum_of_token_losses(logits, labels, ignore_index)
    return _TokenLosses.apply(logits, labels, ignore_index)


def plain_sum_of_token_losses(logits: Tensor, labels: Tensor, ignore_index: int = -100) -> Tensor:
    """The reference of ``sum_of_token_losses``."""
    return F.cross_entropy(logits.to(_precise(logits)), labels, ignore_index=ignore_index, reduction="sum")


def _precise(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
        log_p_NV = torch.log_softmax(logits, dim=-1, dtype=_precise(logits))
        counts_N1 = (labels != ignore_index).unsqueeze(-1)
        targets_N1 = labels.unsqueeze(-1).where(counts_N1, 0)
        ctx.save_for_backward(log_p_NV, targets_N1, counts_N1)
        ctx.dtype = logits.dtype
        ctx.used = False
        return -log_p_NV.gather(-1, targets_N1).where(counts_N1, 0.0).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.used or torch.is_grad_enabled():  # the latter with create_graph=True
            asked = "a second backward pass" if ctx.used else "create_graph=True"
            raise RuntimeError(f"sum_of_token_losses: got {asked}, expected one pass that is not derived; use F.cross_entropy.")
        ctx.used = True
        grad_NV, targets_N1, counts_N1 = ctx.saved_tensors
        grad_NV.exp_()
        grad_NV.scatter_(-1, targets_N1, grad_NV.gather(-1, targets_N1) - 1.0)
        return grad_NV.mul_(grad.where(counts_N1, 0.0)).to(ctx.dtype), None, None
