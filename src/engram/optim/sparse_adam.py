"""AdamW whose step on a table costs time and memory by the rows touched, not by the rows there are."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from engram.errors import CheckpointError, ConfigError

__all__ = ["EngramAdamW", "RowMoments"]

_FIRST_CAPACITY = 1024
_MOMENTS = ("exp_avg", "exp_avg_sq")


class RowMoments:
    """Adam's two moments for the rows of one table that have ever had a gradient, in growing compact buffers.

    Attributes:
        used: rows seen; only the first ``used`` entries of the buffers below are meaningful.
        slot_of_row: int32 ``[rows]``, 1 + position of the row's moments, 0 if it has none; on the CPU lazily mapped memory, so an
            untouched region of the table costs nothing here either.
        row_of_slot: int64 ``[capacity]``, the inverse, so that saving need not scan the whole table.
        exp_avg, exp_avg_sq: float32 ``[capacity, dim]``.
    """

    def __init__(self, table: Tensor) -> None:
        self.used = 0
        self.slot_of_row = _lazy_zeros(table.shape[0], table.device)
        self.row_of_slot = torch.empty(0, dtype=torch.int64, device=table.device)
        self.exp_avg = torch.empty((0, *table.shape[1:]), dtype=torch.float32, device=table.device)
        self.exp_avg_sq = torch.empty_like(self.exp_avg)

    def slots(self, rows: Tensor) -> Tensor:
        """Positions of the moments of ``rows`` (int64, no row twice); new rows get zero moments."""
        found = self.slot_of_row[rows]
        new = rows[found == 0]
        if new.numel():
            self._append(new)
            found = self.slot_of_row[rows]
        return found.long() - 1

    def _append(self, new: Tensor) -> None:
        start, end = self.used, self.used + new.numel()
        self._grow(end)
        self.row_of_slot[start:end] = new
        self.exp_avg[start:end] = 0
        self.exp_avg_sq[start:end] = 0
        self.slot_of_row[new] = torch.arange(start + 1, end + 1, dtype=torch.int32, device=new.device)
        self.used = end

    def _grow(self, needed: int) -> None:
        capacity = self.exp_avg.shape[0]
        if needed <= capacity:
            return
        larger = max(needed, 2 * capacity, _FIRST_CAPACITY)  # doubling: a row is copied a bounded number of times on average
        for name in ("row_of_slot", *_MOMENTS):
            old = getattr(self, name)
            new = torch.empty((larger, *old.shape[1:]), dtype=old.dtype, device=old.device)
            new[: self.used] = old[: self.used]
            setattr(self, name, new)

    def state_dict(self) -> dict[str, Tensor]:
        """Compact tensors: the rows seen, in slot order, and their moments."""
        names = {"rows": self.row_of_slot, "exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}
        return {name: tensor[: self.used].clone() for name, tensor in names.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what ``state_dict`` gave, exactly.

        Raises:
            CheckpointError: the state is malformed or belongs to a table of another shape; nothing is changed then.
        """
        rows, table_rows, dim = state["rows"], self.slot_of_row.shape[0], tuple(self.exp_avg.shape[1:])
        shapes = {tuple(state[name].shape) for name in _MOMENTS}
        outside = rows.numel() > 0 and not 0 <= int(rows.min()) <= int(rows.max()) < table_rows
        if shapes != {(rows.numel(), *dim)} or outside:
            raise CheckpointError(
                f"optimiser state: got moments {sorted(shapes)} for {rows.numel()} rows up to {int(rows.max()) if rows.numel() else 0}, "
                f"expected rows of shape {dim} below {table_rows}; it belongs to another table."
            )
        device = self.slot_of_row.device
        self.used = 0
        self.slot_of_row = _lazy_zeros(table_rows, device)
        slots = self.slots(rows.to(device))
        for name in _MOMENTS:
            getattr(self, name)[slots] = state[name].to(device, torch.float32)


class EngramAdamW(torch.optim.AdamW):
    """AdamW for a model with Engram tables.

    Parameters whose gradient is sparse take the row path: for the rows in the gradient it computes what
    ``torch.optim.SparseAdam`` computes (lazy moments, bias correction by the parameter's step count), but holds moments, always in
    float32, for rows ever seen only. A dense gradient goes through torch's AdamW unchanged; the two kinds may alternate.

    Arguments are those of ``torch.optim.AdamW``, but for one default: without a ``weight_decay`` (here or in a group), sparse
    gradients decay nothing, dense ones decay as in torch. A given ``weight_decay`` is decoupled and reaches the touched rows only.

    Raises:
        ConfigError: at a step, a sparse gradient cannot be handled (``amsgrad``, ``differentiable``, more than one sparse dimension).
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float | None = None,
        amsgrad: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(params, lr, betas, eps, 1e-2 if weight_decay is None else weight_decay, amsgrad, **options)
        # With fused=True torch's AdamW undoes a gradient scaler's scale itself; the row path would not, so the scaler shall.
        self._step_supports_amp_scaling = False
        self.defaults["decay_rows"] = weight_decay is not None
        if weight_decay is not None:
            for group in self.param_groups:
                group["decay_rows"] = True

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; remembers whether the group asks for weight decay or merely inherits torch's default."""
        param_group.setdefault("decay_rows", "weight_decay" in param_group or self.defaults.get("decay_rows", False))
        super().add_param_group(param_group)

    def _init_group(self, group: dict[str, Any], *lists: Any) -> bool:
        """Collect the dense gradients for torch's AdamW and step the sparse ones.

        torch's ``step`` calls this for every group. Overriding ``step`` around ``super().step()`` instead would run step hooks twice
        whenever some other AdamW lives in the process, since torch wraps the method on the class.
        """
        with_grad = [(p, p.grad) for p in group["params"] if p.grad is not None]
        sparse = [(p, grad) for p, grad in with_grad if grad.is_sparse]
        for p, grad in with_grad:
            if not grad.is_sparse and "row_moments" in self.state.get(p, {}):
                self._spread_moments(group, p)
        for p, _ in sparse:
            p.grad = None  # torch passes over parameters without a gradient
        try:
            has_complex = super()._init_group(group, *lists)
        finally:
            for p, grad in sparse:
                p.grad = grad
        for p, grad in sparse:
            self._row_step(group, p, grad)
        return has_complex

    @torch.no_grad()
    def _row_step(self, group: dict[str, Any], table: Tensor, grad: Tensor) -> None:
        _check_row_options(group, grad)
        state = self.state[table]
        if not state:
            state["step"], state["row_moments"] = torch.tensor(0.0), RowMoments(table)
        # Not in place: a loaded state dict may share the tensor with the optimiser it came from.
        state["step"] = state["step"] + 1
        grad = grad.coalesce()
        rows, values = grad.indices()[0], grad.values().float()
        if rows.numel() == 0:
            return
        if group["maximize"]:
            values = -values
        beta1, beta2 = (float(beta) for beta in group["betas"])
        step, lr = float(state["step"]), float(group["lr"])
        exp_avg, exp_avg_sq = _update_moments(state, rows, values, beta1, beta2)
        current = table[rows].float()
        if group["weight_decay"] and group.get("decay_rows", True):  # groups saved before the flag existed decayed their rows
            current.mul_(1 - lr * group["weight_decay"])
        step_size = lr * (1 - beta2**step) ** 0.5 / (1 - beta1**step)
        current.addcdiv_(exp_avg, exp_avg_sq.sqrt_().add_(group["eps"]), value=-step_size)
        table[rows] = current.to(table.dtype)

    @torch.no_grad()
    def _spread_moments(self, group: dict[str, Any], table: Tensor) -> None:
        """Turn compact moments into torch's full ones: a dense gradient has come, which costs the whole table anyway."""
        state = self.state[table]
        moments = state.pop("row_moments").state_dict()
        for name in _MOMENTS:
            state[name] = torch.zeros_like(table, memory_format=torch.preserve_format)
            state[name][moments["rows"]] = moments[name].to(table.dtype)
        if group["fused"] or group["capturable"]:
            state["step"] = state["step"].to(table.device)

    def state_dict(self) -> dict[str, Any]:
        """As torch's; the moments of a table are compact tensors under ``row_moments``."""
        packed = super().state_dict()
        packed["state"] = {
            index: {**entry, "row_moments": entry["row_moments"].state_dict()} if "row_moments" in entry else entry
            for index, entry in packed["state"].items()
        }
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore exactly; torch alone would cast the row numbers to the table's floating type.

        Raises:
            CheckpointError: the state of a table is malformed or belongs to one of another shape; nothing is changed then.
        """
        parameters = [p for group in self.param_groups for p in group["params"]]
        compact = {}
        for index, entry in state_dict["state"].items():
            if "row_moments" in entry and int(index) < len(parameters):  # torch complains of groups that do not fit
                compact[int(index)] = RowMoments(parameters[int(index)])
                compact[int(index)].load_state_dict(entry["row_moments"])
        plain = {index: {k: v for k, v in entry.items() if k != "row_moments"} for index, entry in state_dict["state"].items()}
        super().load_state_dict({**state_dict, "state": plain})
        for index, moments in compact.items():
            self.state[parameters[index]]["row_moments"] = moments


def _lazy_zeros(rows: int, device: torch.device) -> Tensor:
    """int32 zeros; on the CPU from ``calloc``, whose pages exist once touched (``torch.zeros`` writes them all)."""
    if device.type != "cpu":
        return torch.zeros(rows, dtype=torch.int32, device=device)
    return torch.from_numpy(np.zeros(rows, dtype=np.int32))


def _update_moments(state: dict[str, Any], rows: Tensor, values: Tensor, beta1: float, beta2: float) -> tuple[Tensor, Tensor]:
    """Advance the moments of ``rows`` by the gradient ``values [n, dim]``; returns both as float32 copies ``[n, dim]``."""
    compact: RowMoments | None = state.get("row_moments")
    slots = rows if compact is None else compact.slots(rows)
    store = state if compact is None else vars(compact)  # torch's full moments, where a dense gradient came first
    exp_avg = store["exp_avg"][slots].float().lerp_(values, 1 - beta1)
    exp_avg_sq = store["exp_avg_sq"][slots].float().mul_(beta2).addcmul_(values, values, value=1 - beta2)
    store["exp_avg"][slots] = exp_avg.to(store["exp_avg"].dtype)
    store["exp_avg_sq"][slots] = exp_avg_sq.to(store["exp_avg_sq"].dtype)
    return exp_avg, exp_avg_sq


def _check_row_options(group: dict[str, Any], grad: Tensor) -> None:
    asked = [name for name in ("amsgrad", "differentiable") if group[name]]
    if asked:
        raise ConfigError(
            f"EngramAdamW: got {asked[0]}=True with a sparse gradient, expected False; use a group of its own for tables."
        )
    if grad.sparse_dim() != 1:
        raise ConfigError(f"EngramAdamW: got a gradient with {grad.sparse_dim()} sparse dimensions, expected 1 (whole rows).")
