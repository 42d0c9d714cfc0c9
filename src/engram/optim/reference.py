"""Row steps in plain float32, one row at a time, written from their formulas; the tests hold the fast paths against them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["row_adam_step_reference", "rowwise_adagrad_step_reference", "rowwise_adam_step_reference"]


@torch.no_grad()
def row_adam_step_reference(
    table: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    row_ids: Tensor,
    gradients: Tensor,
    step: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    maximize: bool = False,
) -> None:
    """Change ``table`` and its moments in place at the rows that have a gradient, and nowhere else.

    Args:
        table: ``[rows, dim]``, any floating dtype.
        exp_avg: first moments, float32 ``[rows, dim]``.
        exp_avg_sq: second moments, float32 ``[rows, dim]``.
        row_ids: int64 ``[n]``; a row that comes twice has the sum of its gradients.
        gradients: ``[n, dim]``.
        step: steps taken on this table, this one included; steps in which a row had no gradient count too.
        lr: learning rate.
        betas: decay of the moments.
        eps: added to the root of the second moment, before bias correction as in ``torch.optim.SparseAdam``.
        weight_decay: decoupled, of the touched rows.
        maximize: ascend instead.
    """
    beta1, beta2 = betas
    step_size = lr * math.sqrt(1 - beta2**step) / (1 - beta1**step)
    for row in sorted(set(row_ids.tolist())):
        gradient = gradients[row_ids == row].float().sum(0) * (-1 if maximize else 1)
        exp_avg[row] = beta1 * exp_avg[row] + (1 - beta1) * gradient
        exp_avg_sq[row] = beta2 * exp_avg_sq[row] + (1 - beta2) * gradient**2
        decayed = (1 - lr * weight_decay) * table[row].float()
        table[row] = (decayed - step_size * exp_avg[row] / (exp_avg_sq[row].sqrt() + eps)).to(table.dtype)


@torch.no_grad()
def rowwise_adam_step_reference(
    table: Tensor,
    exp_avg: Tensor,
    exp_avg_sq_of_row: Tensor,
    row_ids: Tensor,
    gradients: Tensor,
    step: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    maximize: bool = False,
) -> None:
    """Adam with one second moment per row, the decayed mean of the mean of squares (FBGEMM's ``PARTIAL_ROWWISE_ADAM``).

    Arguments are those of ``row_adam_step_reference``, but ``exp_avg_sq_of_row`` is float32 ``[rows]``.
    """
    beta1, beta2 = betas
    step_size = lr * math.sqrt(1 - beta2**step) / (1 - beta1**step)
    for row in sorted(set(row_ids.tolist())):
        gradient = gradients[row_ids == row].float().sum(0) * (-1 if maximize else 1)
        exp_avg[row] = beta1 * exp_avg[row] + (1 - beta1) * gradient
        exp_avg_sq_of_row[row] = beta2 * exp_avg_sq_of_row[row] + (1 - beta2) * (gradient**2).mean()
        decayed = (1 - lr * weight_decay) * table[row].float()
        table[row] = (decayed - step_size * exp_avg[row] / (exp_avg_sq_of_row[row].sqrt() + eps)).to(table.dtype)


@torch.no_grad()
def rowwise_adagrad_step_reference(
    table: Tensor,
    square_sum_of_row: Tensor,
    row_ids: Tensor,
    gradients: Tensor,
    lr: float,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    maximize: bool = False,
) -> None:
    """Adagrad with one accumulator per row, to which the mean of the squared gradient is added (FBGEMM's ``EXACT_ROWWISE_ADAGRAD``).

    Arguments are those of ``row_adam_step_reference``, but ``square_sum_of_row`` is float32 ``[rows]``.
    """
    for row in sorted(set(row_ids.tolist())):
        gradient = gradients[row_ids == row].float().sum(0) * (-1 if maximize else 1)
        square_sum_of_row[row] += (gradient**2).mean()
        decayed = (1 - lr * weight_decay) * table[row].float()
        table[row] = (decayed - lr * gradient / (square_sum_of_row[row].sqrt() + eps)).to(table.dtype)
