"""The optimiser's state of parameters that FSDP has divided: each process saves and loads its own part."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from engram.distributed import own_part, part_from
from engram.optim.row_state import rows_by_reference

__all__ = ["load_own_state", "own_state"]


def own_state(optimizer: Optimizer, by_reference: bool = False) -> dict[str, Any]:
    """``optimizer.state_dict()`` with this process's parts in the place of divided tensors.

    Args:
        optimizer: of any kind.
        by_reference: give states of rows as they lie in the optimiser, to be written at once: copies might take as much memory as the tables.
    """
    with rows_by_reference() if by_reference else nullcontext():
        packed = optimizer.state_dict()
    state = {
        index: {name: own_part(value) if isinstance(value, Tensor) else value for name, value in entry.items()}
        for index, entry in packed["state"].items()
    }
    return {**packed, "state": state}


def load_own_state(optimizer: Optimizer, saved: dict[str, Any]) -> None:
    """Load what ``own_state`` gave in the process of the same rank, of as many.

    Raises:
        CheckpointError: as the optimiser's ``load_state_dict``; parts of other shapes are another model's or another number of processes'.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = {index: _divided(entry, parameters, index) for index, entry in saved.get("state", {}).items()}
    optimizer.load_state_dict({**saved, "state": state})


def _divided(entry: Any, parameters: list[Tensor], index: Any) -> Any:
    """An entry with its parts as tensors that are divided like the parameter; malformed ones are left for the optimiser to refuse."""
    if not isinstance(entry, dict) or not str(index).isdecimal() or int(index) >= len(parameters):
        return entry
    parameter = parameters[int(index)]
    shape = own_part(parameter).shape
    return {
        name: part_from(value, parameter) if isinstance(value, Tensor) and name != "step" and value.shape == shape else value
        for name, value in entry.items()
    }
