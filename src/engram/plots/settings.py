"""What two runs of different sweeps differ in, read off the recipes in their results."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from engram.experiments import BackboneConfig, DataRecipe, PointRecipe
from engram.experiments.arms import arm_fields, base_fields
from engram.plots.markdown import count

__all__ = ["differing_settings"]

_PARTS: dict[str, type] = {"": PointRecipe, "data": DataRecipe, "backbone": BackboneConfig}
"""What has the defaults of a recipe's fields, by the part that they are in."""

_ELSEWHERE = (
    "budget.",
    "backbone.n_routed_experts",
    "backbone.intermediate_size",
    "learning_rate",
    "tokens",
    "data.corpus",
    "data.vocab_size",
)
"""Told by the sizes and learning rates of the points themselves, or the same where runs are compared at all: their text and tokens."""
_OF_MEMORY = ("engram", "table", "memory_dropout")
_WITHOUT_EFFECT = ("seed", "keep_", "curve_points", "save_steps")
_SAME_TOTAL = 0.01
"""Sizes that a budget is met with differ by less than this."""

Result = Mapping[str, Any]
Points = Sequence[Mapping[str, Any]]


def differing_settings(result: Result, points: Points, control: Result, others: Points) -> list[str]:
    """What an arm has otherwise than its control, which has no memory, in words such as ``balance_rate 0.001 for 0.01``.

    Args:
        result: sweep of the arm.
        points: points of the arm, of one recipe but for seeds and learning rates.
        control: sweep of the control.
        others: points of the control, likewise.
    """
    mine, theirs = (_compared(_settings(sweep, found[0])) for sweep, found in ((result, points), (control, others)))
    names = sorted(name for name in {*mine, *theirs} if mine.get(name, _default(name)) != theirs.get(name, _default(name)))
    another = "backbone.architecture" in names
    if another:  # whose sizes mean something else
        names = [name for name in names if name == "backbone.architecture" or not name.startswith("backbone.")]
    if not points[0]["counts"].get("experts"):
        names = [name for name in names if name != "balance_rate"]
    told = [_told(name, mine.get(name, _default(name)), theirs.get(name, _default(name))) for name in names]
    return told + _sizes(points, others, another) + (["with a memory"] if points[0]["counts"]["table_rows"] else [])


def _settings(result: Result, point: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a point's recipe, dotted, as the sweep writes them."""
    recipe = result["recipe"]
    base = base_fields(recipe)
    found = dict(base)
    for dimension, label in point["labels"].items():
        changed = arm_fields(recipe, label, dimension)
        kept = {name: value for name, value in found.items() if name in changed or name not in base}
        found = kept | {name: value for name, value in changed.items() if name not in base or base[name] != value}
    return found


def _compared(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Those that are told by themselves."""
    left_out = (*_ELSEWHERE, *_OF_MEMORY, *_WITHOUT_EFFECT)
    return {name: value for name, value in fields.items() if not name.startswith(left_out)}


def _default(name: str) -> Any:
    """What a field is where a recipe leaves it away; None where there is no such field, or it has no default."""
    part, _, field = name.rpartition(".")
    found = {f.name: f.default for f in dataclasses.fields(_PARTS[part])} if part in _PARTS else {}
    return None if found.get(field) is dataclasses.MISSING else found.get(field)


def _told(name: str, mine: Any, theirs: Any) -> str:
    if isinstance(mine, bool) and isinstance(theirs, bool):
        return f"{name} {'on' if mine else 'off'}"
    return f"{name} {_value(mine)} for {_value(theirs)}"


def _value(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _sizes(points: Points, others: Points, another: bool) -> list[str]:
    """Learning rates and sizes that differ; experts and widths of another architecture are not compared."""
    mine, theirs = points[0]["counts"], others[0]["counts"]
    rates = [" and ".join(f"{rate:g}" for rate in sorted({p["learning_rate"] for p in part})) for part in (points, others)]
    told = [f"learning_rate {rates[0]} for {rates[1]}"] if rates[0] != rates[1] else []
    if not another:
        names = {"experts": "experts", "dense_width": "dense width"}
        told += [f"{names[n]} {count(mine[n])} for {count(theirs[n])}" for n in names if mine.get(n) != theirs.get(n)]
    if abs(mine["total"] - theirs["total"]) > _SAME_TOTAL * theirs["total"]:
        told.append(f"{count(mine['total'])} parameters for {count(theirs['total'])}")
    return told
