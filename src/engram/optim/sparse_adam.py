"""AdamW whose step on a table costs time and memory by the rows touched, not by the rows there are."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from engram.distributed import agreed_number, warn_of_own_steps
from engram.errors import ConfigError
from engram.native import rows as native_rows
from engram.optim.rounding import ROUNDED_DTYPES, draw_seed
from engram.optim.row_rules import StepNumbers, step_rows
from engram.optim.row_state import RowMoments, check_row_state
from engram.optim.saved_state import check_optimizer_state
from engram.tables import announce_step

__all__ = ["EngramAdamW"]

_MOMENTS = ("exp_avg", "exp_avg_sq")


class EngramAdamW(torch.optim.AdamW):
    """AdamW for a model with Engram tables.

    Parameters whose gradient is sparse take the row path: for the rows in the gradient it computes what
    ``torch.optim.SparseAdam`` computes (lazy moments, bias correction by the parameter's step count), but holds moments, always in
    float32, for rows ever seen only. A dense gradient goes through torch's AdamW unchanged; the two kinds may alternate.

    Arguments are those of ``torch.optim.AdamW``, but for one default: without a ``weight_decay`` (here or in a group), sparse
    gradients decay nothing, dense ones decay as in torch. A given ``weight_decay`` is decoupled and reaches the touched rows only.

    Two more, also per group, concern sparse gradients only. ``row_state`` says what is remembered about a row, in float32:

    - ``adam``: both moments for every value.
    - ``rowwise_adam``: the first moment for every value, the second once per row, from the mean of the squares ("partial row-wise
      Adam" of FBGEMM): half the memory.
    - ``rowwise_adagrad``: one number per row, the sum over steps of the mean of the squares (FBGEMM's and torchrec's row-wise
      Adagrad); betas are not used.

    ``stochastic_rounding`` rounds bfloat16 and float16 rows up or down by chance, so that small steps are not lost. Its seed comes from
    torch's global CPU generator, one number for each table and step.

    Raises:
        ConfigError: unknown ``row_state``, a ``stochastic_rounding`` that is neither True nor False, a group for Muon; or, at a step, a
            gradient cannot be handled (sparse with ``amsgrad``, ``differentiable`` or more than one sparse dimension; dense and
            sparse in turn with a ``row_state`` other than ``adam``).
    """

    _options_of_groups: tuple[str, ...] = ("row_state", "stochastic_rounding")
    _algorithms: tuple[str, ...] = ("adamw",)

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float | None = None,
        amsgrad: bool = False,
        *,
        row_state: str = "adam",
        stochastic_rounding: bool = False,
        **options: Any,
    ) -> None:
        _check_row_group({"row_state": row_state, "stochastic_rounding": stochastic_rounding})
        super().__init__(params, lr, betas, eps, 1e-2 if weight_decay is None else weight_decay, amsgrad, **options)
        # With fused=True torch's AdamW undoes a gradient scaler's scale itself; the row path would not, so the scaler shall.
        self._step_supports_amp_scaling = False
        options_of_rows = {"row_state": row_state, "stochastic_rounding": stochastic_rounding}
        self.defaults.update(options_of_rows)
        for group in self.param_groups:
            group.update({name: value for name, value in options_of_rows.items() if name not in group})
        self.defaults["decay_rows"] = weight_decay is not None
        if weight_decay is not None:
            for group in self.param_groups:
                group["decay_rows"] = True

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; remembers whether the group asks for weight decay or merely inherits torch's default.

        Raises:
            ConfigError: an option of the group is impossible.
        """
        _check_row_group(param_group)
        algorithm = param_group.get("algorithm", "adamw")
        if algorithm not in self._algorithms:
            raise ConfigError(
                f"{type(self).__name__}: got a group with algorithm={algorithm!r}, expected {' or '.join(map(repr, self._algorithms))}"
                + ("; use EngramMuon." if algorithm == "muon" else ".")
            )
        param_group.setdefault("decay_rows", "weight_decay" in param_group or self.defaults.get("decay_rows", False))
        super().add_param_group(param_group)

    def _init_group(self, group: dict[str, Any], *lists: Any) -> bool:
        """Collect the dense gradients for torch's AdamW and step the sparse ones.

        torch's ``step`` calls this for every group. Overriding ``step`` around ``super().step()`` instead would run step hooks twice
        whenever some other AdamW lives in the process, since torch wraps the method on the class.
        """
        with_grad = [(p, p.grad) for p in group["params"] if p.grad is not None]
        sparse = [(p, grad) for p, grad in with_grad if grad.is_sparse]
        for p, grad in sparse:
            _check_row_options(group, grad, self.state.get(p, {}))
        for p, grad in with_grad:
            if grad.is_sparse:
                continue
            announce_step(p)
            if "row_moments" in self.state.get(p, {}):
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
        state = self.state[table]
        if not state:
            warn_of_own_steps(table)
            state["step"], state["row_moments"] = (
                torch.tensor(0.0, dtype=torch.float32, device="cpu"),
                RowMoments(table, group["row_state"]),
            )
        # Not in place: a loaded state dict may share the tensor with the optimiser it came from.
        state["step"] = state["step"] + 1
        if grad._nnz() == 0:
            return
        announce_step(table)
        numbers = _step_numbers(group, float(state["step"]), table)
        values = grad._values()
        if "row_moments" in state and table.dim() == 2 and native_rows.serves(table, values):
            _step_natively(table, grad, state["row_moments"], numbers)
            return
        if not grad.is_coalesced():  # duplicates are summed in float32, whatever the gradient's type
            grad = torch.sparse_coo_tensor(
                grad._indices(), values.float(), grad.shape, device=grad.device, check_invariants=False
            ).coalesce()
        rows, compact = grad.indices()[0], state.get("row_moments")
        # Torch's full moments, where a dense gradient came first, are found by the row itself.
        slots, buffers = (
            (rows, {name: state[name] for name in _MOMENTS}) if compact is None else (compact.slots(rows), compact.buffers)
        )
        step_rows(table, rows, grad.values().float(), buffers, slots, numbers)

    @torch.no_grad()
    def _spread_moments(self, group: dict[str, Any], table: Tensor) -> None:
        """Turn compact moments into torch's full ones: a dense gradient has come, which costs the whole table anyway."""
        state = self.state[table]
        if state["row_moments"].kind != "adam":
            raise ConfigError(
                f"EngramAdamW: got a dense gradient for a table with row_state={state['row_moments'].kind!r}, expected sparse ones only; "
                "use row_state='adam' where both kinds come."
            )
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

        Options that the saved groups do not know (they are older) stay as they are.

        Raises:
            CheckpointError: the state is malformed or another optimiser's, or that of a parameter is of another shape or ``row_state``;
                nothing is changed then.
        """
        check_optimizer_state(state_dict, self.param_groups)
        saved_groups = [
            {**{name: group[name] for name in self._options_of_groups if name in group}, **saved}
            for saved, group in zip(state_dict["param_groups"], self.param_groups)
        ]
        parameters = [(p, group["row_state"]) for group in self.param_groups for p in group["params"]]
        compact = {}
        for index, entry in state_dict["state"].items():
            if "row_moments" in entry:
                compact[int(index)] = RowMoments(*parameters[int(index)])
                compact[int(index)].load_state_dict(entry["row_moments"])
        plain = {index: {k: v for k, v in entry.items() if k != "row_moments"} for index, entry in state_dict["state"].items()}
        super().load_state_dict({**state_dict, "param_groups": saved_groups, "state": plain})
        for index, moments in compact.items():
            state = self.state[parameters[index][0]]
            state["row_moments"] = moments
            # torch moves that of "fused" groups to the parameter's device: reading it would be a wait.
            state["step"] = state["step"].cpu()


def _step_numbers(group: dict[str, Any], step: float, table: Tensor) -> StepNumbers:
    beta1, beta2 = (float(beta) for beta in group["betas"])
    lr, kind = float(group["lr"]), group["row_state"]
    decays = group["weight_decay"] and group.get("decay_rows", True)  # groups saved before the flag existed decayed their rows
    rounds_by_chance = group["stochastic_rounding"] and table.dtype in ROUNDED_DTYPES
    return StepNumbers(
        kind=kind,
        step_size=lr if kind == "rowwise_adagrad" else lr * (1 - beta2**step) ** 0.5 / (1 - beta1**step),
        beta1=beta1,
        beta2=beta2,
        eps=group["eps"],
        keep=1 - lr * group["weight_decay"] if decays else 1.0,
        sign=-1.0 if group["maximize"] else 1.0,
        seed=agreed_number(draw_seed(), table) if rounds_by_chance else None,
    )


def _step_natively(table: Tensor, grad: Tensor, moments: RowMoments, numbers: StepNumbers) -> None:
    groups = native_rows.RowGroups(grad._indices()[0], table.shape[0], unique=grad.is_coalesced())
    slots = moments.slots(groups.rows)
    kind, *scalars, seed = dataclasses.astuple(numbers)
    native_rows.step_rows(table, groups, grad._values(), kind, slots, moments.buffers, tuple(scalars), seed)
    torch.autograd.graph.increment_version(table)  # autograd cannot see that the core wrote into the table


def _check_row_group(group: dict[str, Any]) -> None:
    """Refuse impossible options for rows; what a group does not say is not checked."""
    check_row_state(group.get("row_state", "adam"))
    rounding = group.get("stochastic_rounding", False)
    if not isinstance(rounding, bool):
        raise ConfigError(f"EngramAdamW: got stochastic_rounding={rounding!r}, expected True or False.")


def _check_row_options(group: dict[str, Any], grad: Tensor, state: dict[str, Any]) -> None:
    asked = [name for name in ("amsgrad", "differentiable") if group[name]]
    if asked:
        raise ConfigError(
            f"EngramAdamW: got {asked[0]}=True with a sparse gradient, expected False; use a group of its own for tables."
        )
    if grad.sparse_dim() != 1:
        raise ConfigError(f"EngramAdamW: got a gradient with {grad.sparse_dim()} sparse dimensions, expected 1 (whole rows).")
    kind = group["row_state"]
    check_row_state(kind)
    has = state["row_moments"].kind if "row_moments" in state else "adam" if state else kind
    if has != kind:
        what = f"row state {has!r}" if "row_moments" in state else "the moments of a dense gradient"
        raise ConfigError(
            f"EngramAdamW: got a sparse gradient for a table with {what}, expected row_state={kind!r}; row_state cannot change on the way."
        )
