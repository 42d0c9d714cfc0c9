"""Is this saved optimiser state one that this optimiser could have made?"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from engram.errors import CheckpointError

__all__ = ["check_optimizer_state"]

_OF_ANY_SHAPE = ("step", "row_moments")


def check_optimizer_state(state: Any, groups: list[dict[str, Any]]) -> None:
    """Compare a state dict with an optimiser's groups; torch alone finds some mistakes at the next step, and calls them key errors.

    Args:
        state: what is to be loaded.
        groups: ``param_groups`` of the optimiser that is to load it.

    Raises:
        CheckpointError: it is malformed, has other groups or parameters, or was made with another ``row_state`` or algorithm.
    """
    saved_groups = _well_formed(state)
    sizes = [len(saved["params"]) for saved in saved_groups]
    if sizes != [len(group["params"]) for group in groups]:
        raise CheckpointError(
            f"optimiser state: got parameter groups of {sizes} parameters, expected {[len(group['params']) for group in groups]}; "
            "make the optimiser for the same model with the same arguments as the one that was saved."
        )
    for number, (saved, group) in enumerate(zip(saved_groups, groups)):
        for option, default in (("row_state", group.get("row_state", "adam")), ("algorithm", "adamw")):
            got, expected = saved.get(option, default), group.get(option, default)
            if got != expected:
                raise CheckpointError(
                    f"optimiser state: got {option} {got!r} for group {number}, expected {expected!r}; "
                    f"make the optimiser with the {option} it was saved with."
                )
    _check_entries(state["state"], [p for group in groups for p in group["params"]])


def _well_formed(state: Any) -> list[dict[str, Any]]:
    """The saved groups."""
    if not isinstance(state, dict):
        raise CheckpointError(f"optimiser state: got a {type(state).__name__}, expected what state_dict() gave.")
    entries, groups = state.get("state"), state.get("param_groups")
    if not isinstance(entries, dict) or not isinstance(groups, (list, tuple)):
        raise CheckpointError(
            f"optimiser state: got keys {sorted(map(str, state))}, expected 'state' (a dict) and 'param_groups' (a list); "
            "it is no optimiser's, or damaged: resume from an earlier checkpoint."
        )
    if not all(
        isinstance(group, dict) and isinstance(group.get("params"), (list, tuple)) and "lr" in group for group in groups
    ):
        raise CheckpointError(
            "optimiser state: a parameter group has no list 'params' or no 'lr'; it is damaged: resume from an earlier checkpoint."
        )
    return list(groups)


def _check_entries(entries: dict[Any, Any], parameters: list[Tensor]) -> None:
    for index, entry in entries.items():
        known = str(index).isdecimal() and int(index) < len(parameters)
        if not known or not isinstance(entry, dict):
            what = f"a {type(entry).__name__} for parameter {index}" if known else f"parameter {index!r}"
            raise CheckpointError(
                f"optimiser state: got {what}, expected a dict for each of parameters 0 to {len(parameters) - 1}; it is damaged."
            )
        shape = parameters[int(index)].shape
        for name, value in entry.items():
            if isinstance(value, Tensor) and name not in _OF_ANY_SHAPE and value.shape != shape:
                raise CheckpointError(
                    f"optimiser state: got {name} of shape {list(value.shape)} for parameter {index}, expected {list(shape)}; "
                    "it belongs to another model."
                )
