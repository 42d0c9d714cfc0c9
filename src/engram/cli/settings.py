"""`--set FIELD=VALUE` of the commands that read a recipe."""

from __future__ import annotations

from typing import Any

import typer

__all__ = ["read_settings"]


def read_settings(given: list[str] | None) -> dict[str, Any]:
    """Fields to change and their values, which are YAML.

    Raises:
        typer.BadParameter: something is no assignment, or its value is not YAML.
    """
    from engram.yaml_text import parse_yaml

    changes = {}
    for text in given or []:
        key, equals, value = text.partition("=")
        if not key or not equals:
            raise typer.BadParameter(f"--set: got {text!r}, expected FIELD=VALUE, e.g. tokens=200000")
        changes[key] = parse_yaml(value, f"the value of --set {key}", typer.BadParameter)
    return changes
