"""What the arms of an ablation changed, read off the sweep's recipe: names are for people, changes decide."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

__all__ = ["REFERENCE", "arm_fields", "base_fields", "find_arm", "layer_arms"]

REFERENCE = "reference"

Condition = tuple[str, Any]
"""A dotted field and the value it has."""

CHANGES: dict[str, Condition] = {
    "branch_gates": ("engram.branch_gates", False),
    "compression": ("engram.hash_spec", "exact_v1"),
    "gating": ("engram.fuse", "add"),
    "four_grams": ("engram.max_ngram_size", 4),
    "convolution": ("engram.use_conv", False),
}
"""The paper's ablations, and what each is in a recipe."""


_ALONG = {"engram.engram_vocab_size"}
"""What may change along: other orders need other rows for an equal budget."""


def base_fields(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """All fields of a sweep's base, dotted."""
    return _flatten(recipe.get("base") or {})


def arm_fields(recipe: Mapping[str, Any], label: str, dimension: str = "arm") -> dict[str, Any]:
    """All fields of a point of this arm, dotted; those that only other dimensions change are the base's."""
    fields = copy.deepcopy(dict(recipe.get("base") or {}))
    for key, value in recipe["variants"][dimension].get(label, {}).items():
        *parents, last = key.split(".")
        inner = fields
        for parent in parents:
            inner = inner.setdefault(parent, {}) if isinstance(inner.get(parent, {}), dict) else {}
        inner[last] = value
    return _flatten(fields)


def _flatten(fields: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in fields.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def find_arm(recipe: Mapping[str, Any], change: str) -> str | None:
    """The arm that differs from the reference in this one of ``CHANGES`` and in nothing else; None if there is none."""
    arms = recipe["variants"].get("arm", {})
    if REFERENCE not in arms:
        return None
    usual, (field, value) = arm_fields(recipe, REFERENCE), CHANGES[change]
    for label in arms:
        fields = arm_fields(recipe, label)
        changed = {name for name in {*usual, *fields} if usual.get(name) != fields.get(name)}
        if changed - _ALONG == {field} and fields[field] == value:
            return label
    return None


def layer_arms(labels: Mapping[str, Any]) -> dict[int, str]:
    """Arms named ``layer N``, by N in ascending order."""
    found = {int(match[1]): label for label in labels if (match := re.fullmatch(r"layer\s*(\d+)", label))}
    return dict(sorted(found.items()))
