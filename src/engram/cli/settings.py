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
    import yaml

    from engram.data.recipe import read_value

    changes = {}
    for text in given or []:
        key, equals, value = text.partition("=")
        if not key or not equals:
            raise typer.BadParameter(f"--set: got {text!r}, expected FIELD=VALUE, e.g. tokens=200000")
        try:
            changes[key] = read_value(value)
        except yaml.YAMLError:
            raise typer.BadParameter(f"--set: got {text!r}, whose value is not YAML") from None
    return changes
