"""One step on some rows of a table, in PyTorch: the reference of the native step, and what runs where that cannot."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engram.optim.rounding import round_stochastically

__all__ = ["StepNumbers", "step_rows"]


@dataclass(frozen=True)
class StepNumbers:
    """The numbers of one step on one table.

    Attributes:
        kind: the row state, a name of ``ROW_STATES``.
        step_size: learning rate, with Adam's bias corrections where there are any.
        beta1, beta2: decay of the moments.
        eps: added to the root.
        keep: what weight decay leaves of a row, 1 without it.
        sign: -1 to ascend.
        seed: of stochastic rounding; None rounds to nearest.
    """

    kind: str
    step_size: float
    beta1: float
    beta2: float
    eps: float
    keep: float
    sign: float
    seed: int | None


@torch.no_grad()
def step_rows(
    table: Tensor, rows: Tensor, gradients: Tensor, buffers: dict[str, Tensor], slots: Tensor, numbers: StepNumbers
) -> None:
    """Change rows of ``table`` and their state in place.

    Args:
        table: ``[rows, ...]``, any floating dtype.
        rows: int64 ``[n]``, no row twice.
        gradients: float32 ``[n, ...]``.
        buffers: the state by name, ``[capacity, ...]`` or, for one number per row, ``[capacity]``.
        slots: int64 ``[n]``, where the state of each row is in the buffers.
        numbers: of this step.
    """
    values = gradients if numbers.sign == 1 else -gradients
    direction, root = _advance(values, buffers, slots, numbers)
    current = table[rows].to(torch.promote_types(table.dtype, torch.float32))
    if numbers.keep != 1:
        current.mul_(numbers.keep)
    current.addcdiv_(direction, root.add_(numbers.eps), value=-numbers.step_size)
    if numbers.seed is None:
        table[rows] = current.to(table.dtype)
    else:
        table[rows] = round_stochastically(current, table.dtype, rows, numbers.seed)


def _advance(values: Tensor, buffers: dict[str, Tensor], slots: Tensor, numbers: StepNumbers) -> tuple[Tensor, Tensor]:
    """Advance the state by gradients ``[n, ...]``; the direction of the step and the root below it, which broadcasts to it."""
    if numbers.kind == "rowwise_adagrad":
        total = buffers["square_sum_of_row"][slots] + _mean_square(values)
        buffers["square_sum_of_row"][slots] = total
        return values, _beside(total, values).sqrt()
    exp_avg = buffers["exp_avg"][slots].float().lerp_(values, 1 - numbers.beta1)
    buffers["exp_avg"][slots] = exp_avg.to(buffers["exp_avg"].dtype)
    if numbers.kind == "rowwise_adam":
        of_row = buffers["exp_avg_sq_of_row"][slots].mul_(numbers.beta2).add_(_mean_square(values), alpha=1 - numbers.beta2)
        buffers["exp_avg_sq_of_row"][slots] = of_row
        return exp_avg, _beside(of_row, values).sqrt()
    exp_avg_sq = buffers["exp_avg_sq"][slots].float().mul_(numbers.beta2).addcmul_(values, values, value=1 - numbers.beta2)
    buffers["exp_avg_sq"][slots] = exp_avg_sq.to(buffers["exp_avg_sq"].dtype)
    return exp_avg, exp_avg_sq.sqrt()


def _mean_square(values: Tensor) -> Tensor:
    return values.reshape(values.shape[0], -1).square().mean(1)


def _beside(of_row: Tensor, values: Tensor) -> Tensor:
    return of_row.view(-1, *(1 for _ in values.shape[1:]))
