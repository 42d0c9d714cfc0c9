"""AdamW whose step on a table costs time and memory by the rows touched, not by the rows there are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["EngramAdamW", "RowMoments"]

_FIRST_CAPACITY = 1024


class RowMoments:
    """Adam's two moments for the rows of one table that have ever had a gradient, in growing compact buffers.

    Attributes:
        slot_of_row: int32 ``[rows]``, 1 + position of the row's moments, 0 if it has none. Zeros are lazily mapped memory, so an
            untouched region of the table costs nothing here either.
        exp_avg, exp_avg_sq: float32 ``[capacity, dim]``, of which the first ``used`` are meaningful.
    """

    def __init__(self, table: Tensor) -> None:
        rows, dim = table.shape
        self.used = 0
        self.slot_of_row = torch.zeros(rows, dtype=torch.int32, device=table.device)
        self.exp_avg = torch.zeros((0, dim), dtype=torch.float32, device=table.device)
        self.exp_avg_sq = torch.zeros_like(self.exp_avg)

    def slots(self, rows: Tensor) -> Tensor:
        """Positions of the moments of ``rows`` (int64, no row twice); new rows get zero moments."""
        found = self.slot_of_row[rows]
        new = rows[found == 0]
        if new.numel():
            self._grow(self.used + new.numel())
            self.slot_of_row[new] = torch.arange(
                self.used + 1, self.used + 1 + new.numel(), dtype=torch.int32, device=rows.device
            )
            self.used += new.numel()
            found = self.slot_of_row[rows]
        return found.long() - 1

    def _grow(self, needed: int) -> None:
        capacity = self.exp_avg.shape[0]
        if needed <= capacity:
            return
        larger = max(needed, 2 * capacity, _FIRST_CAPACITY)
        for name in ("exp_avg", "exp_avg_sq"):
            old = getattr(self, name)
            new = torch.zeros((larger, old.shape[1]), dtype=old.dtype, device=old.device)
            new[: self.used] = old[: self.used]
            setattr(self, name, new)

    def state_dict(self) -> dict[str, Tensor]:
        """Compact tensors: the rows seen, in slot order, and their moments."""
        rows = torch.nonzero(self.slot_of_row).flatten()
        order = self.slot_of_row[rows].argsort()
        return {
            "rows": rows[order],
            "exp_avg": self.exp_avg[: self.used].clone(),
            "exp_avg_sq": self.exp_avg_sq[: self.used].clone(),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what ``state_dict`` gave, exactly."""
        device = self.slot_of_row.device
        self.used = 0
        self.slot_of_row.zero_()
        slots = self.slots(state["rows"].to(device))
        self.exp_avg[slots] = state["exp_avg"].to(device, torch.float32)
        self.exp_avg_sq[slots] = state["exp_avg_sq"].to(device, torch.float32)


class EngramAdamW(torch.optim.AdamW):
    """AdamW for a model with Engram tables.

    Parameters whose gradient is sparse take the row path: for the rows in the gradient it computes what
    ``torch.optim.SparseAdam`` computes (lazy moments, bias correction by the parameter's step count), but holds moments for rows ever
    seen only. Weight decay there is decoupled and reaches the touched rows only. All other parameters go through torch's AdamW
    unchanged. Arguments are those of ``torch.optim.AdamW``.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; returns the closure's value."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        sparse = [
            (group, p, p.grad)
            for group in self.param_groups
            for p in group["params"]
            if p.grad is not None and p.grad.is_sparse
        ]
        for _, p, _ in sparse:
            p.grad = None  # torch's AdamW passes over parameters without a gradient
        try:
            super().step()
        finally:
            for _, p, grad in sparse:
                p.grad = grad
        for group, p, grad in sparse:
            self._row_step(group, p, grad)
        return loss

    def _row_step(self, group: dict[str, Any], table: Tensor, grad: Tensor) -> None:
        state = self.state[table]
        if "row_moments" not in state:
            state["step"] = torch.tensor(0.0)
            state["row_moments"] = RowMoments(table)
        state["step"] += 1
        grad = grad.coalesce()
        rows, values = grad.indices()[0], grad.values().float()
        if rows.numel() == 0:
            return
        beta1, beta2 = group["betas"]
        moments: RowMoments = state["row_moments"]
        slots = moments.slots(rows)
        exp_avg = moments.exp_avg[slots].lerp_(values, 1 - beta1)
        exp_avg_sq = moments.exp_avg_sq[slots].mul_(beta2).addcmul_(values, values, value=1 - beta2)
        moments.exp_avg[slots], moments.exp_avg_sq[slots] = exp_avg, exp_avg_sq
        step, lr = float(state["step"]), float(group["lr"])
        step_size = lr * (1 - beta2**step) ** 0.5 / (1 - beta1**step)
        current = table[rows].float()
        if group["weight_decay"]:
            current.mul_(1 - lr * group["weight_decay"])
        current.addcdiv_(exp_avg, exp_avg_sq.sqrt_().add_(group["eps"]), value=-step_size)
        table[rows] = current.to(table.dtype)

    def state_dict(self) -> dict[str, Any]:
        """As torch's; the moments of a table are compact tensors under ``row_moments``."""
        packed = super().state_dict()
        packed["state"] = {
            index: {**entry, "row_moments": entry["row_moments"].state_dict()} if "row_moments" in entry else entry
            for index, entry in packed["state"].items()
        }
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore exactly; torch alone would cast the row numbers to the table's floating type."""
        rows = {index: entry["row_moments"] for index, entry in state_dict["state"].items() if "row_moments" in entry}
        plain = {index: {k: v for k, v in entry.items() if k != "row_moments"} for index, entry in state_dict["state"].items()}
        super().load_state_dict({**state_dict, "state": plain})
        parameters = [p for group in self.param_groups for p in group["params"]]
        for index, saved in rows.items():
            moments = RowMoments(parameters[int(index)])
            moments.load_state_dict(saved)
            self.state[parameters[int(index)]]["row_moments"] = moments
