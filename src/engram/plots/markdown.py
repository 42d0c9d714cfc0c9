"""Pieces of Markdown: escaped text, numbers with intervals, tables."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["count", "interval", "literal_text", "plural", "span", "table"]


def literal_text(text: str) -> str:
    """Text that Markdown shows as it is, in a table too."""
    return re.sub(r"([\\`*_\[\]<>|#&])", r"\\\1", " ".join(text.split()))


def table(header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """A table of cells that are Markdown already; columns in ``right`` are aligned there."""
    ruler = ["---:" if number in right else "---" for number in range(len(header))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, ruler, *rows))


def interval(entry: Mapping[str, Any] | None, digits: int = 4, signed: bool = False, factor: float = 1.0) -> str:
    """``mean [low, high]``; says so where there is no interval, and a dash where there is nothing."""
    if entry is None or entry["mean"] is None:
        return "–"
    style = f"{'+' if signed else ''}.{digits}f"
    mean = format(factor * entry["mean"], style)
    if entry["low"] is None or entry["high"] is None:
        return f"{mean} (no interval)"
    return f"{mean} [{format(factor * entry['low'], style)}, {format(factor * entry['high'], style)}]"


def count(number: float) -> str:
    """A whole number with commas."""
    return f"{number:,.0f}"


def span(values: Sequence[float]) -> str:
    """One number, or the smallest and the largest."""
    low, high = _short(min(values)), _short(max(values))
    return low if low == high else f"{low} to {high}"


def _short(value: float) -> str:
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.3g}"


def plural(number: int, name: str) -> str:
    """``1 seed``, ``3 seeds``."""
    return f"{number:,} {name}{'' if number == 1 else 's'}"
