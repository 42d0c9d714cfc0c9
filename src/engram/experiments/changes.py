"""Fields of a recipe that a command line or a variant changes, by their dotted names."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from engram.errors import ConfigError, nearest

__all__ = ["change_field", "check_field"]


def check_field(key: str, parts: Mapping[str, type], whole: str) -> None:
    """Refuse a change of what no run has; of parts that are none, ``change_field`` tells.

    Args:
        key: dotted name of a field, ``engram.layer_ids`` for instance.
        parts: what has fields, by the dotted name of the part.
        whole: what is changed, in words.

    Raises:
        ConfigError: there is no such field; the message names the nearest.
    """
    part, _, name = key.rpartition(".")
    known = sorted(f.name for f in dataclasses.fields(parts[part])) if part in parts else [name]
    if name not in known:
        meant = nearest(name, known, key.removesuffix(name))
        raise ConfigError(
            f"--set: got {key!r}, expected a field of {whole}{f' in {part}' if part else ''}: {', '.join(known)}.{meant}"
        )


def change_field(fields: dict[str, Any], key: str, value: Any, where: str, whole: str) -> None:
    """Set a dotted key. Values that are mappings replace or make a whole part; None takes it away.

    Args:
        fields: what is changed; parts in it are copied first.
        key: dotted name of a field.
        value: what it becomes.
        where: who asks, for the error.
        whole: what ``fields`` are, in words.

    Raises:
        ConfigError: a part on the way is no mapping.
    """
    *parents, last = key.split(".")
    for parent in parents:
        inner = fields.get(parent)
        if not isinstance(inner, dict):
            raise ConfigError(f"{where}: got {key!r}, but {whole} has no mapping {parent!r} to change something in.")
        fields[parent] = inner = dict(inner)
        fields = inner
    fields[last] = value
