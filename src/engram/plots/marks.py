"""Marks that pictures of sweeps share: means with 95 % bars, a dot for each seed, a panel of the paper's own points."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from engram.experiments.summary import other_labels
from engram.plots.figure import COLOURS

__all__ = ["colour_of", "draw_mean", "draw_seeds", "literal", "points_of", "tested"]


def colour_of(number: int) -> str:
    """A colour for the n-th line; grey is left to what is without memory."""
    return COLOURS[1 + number % (len(COLOURS) - 1)]


def literal(text: str) -> str:
    """Text that matplotlib takes literally."""
    return text.replace("$", r"\$")


def points_of(result: Mapping[str, Any], dimension: str, setting: str) -> dict[str, list[Mapping[str, Any]]]:
    """Points of one budget or setting by their label of ``dimension``."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for point in result["points"]:
        if other_labels(point, dimension) == setting:
            found.setdefault(point["labels"][dimension], []).append(point)
    return found


def tested(points: Sequence[Mapping[str, Any]]) -> list[float]:
    """Test losses."""
    return [point["test"]["loss"] for point in points]


def draw_mean(axis: Any, place: float, interval: Mapping[str, Any], colour: str, flat: bool = False, **style: Any) -> None:
    """A mean with its 95 % bar if it has one; ``flat``: values along the x axis."""
    mean, low, high = interval["mean"], interval["low"], interval["high"]
    error = None if low is None or high is None else [[mean - low], [high - mean]]
    x, y = (mean, place) if flat else (place, mean)
    bars = {"xerr" if flat else "yerr": error}
    axis.errorbar(x, y, **bars, **{"fmt": "o", "ms": 4.5, "lw": 1.2, "capsize": 2.5, "color": colour, **style})


def draw_seeds(axis: Any, place: float, losses: Sequence[float], colour: str, flat: bool = False) -> None:
    """A faint dot for each seed."""
    places = [place] * len(losses)
    axis.plot(*((losses, places) if flat else (places, losses)), "o", ms=3, color=colour, alpha=0.4, mew=0, zorder=1)
