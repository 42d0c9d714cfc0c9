"""What a sweep answers: curves, slopes and differences with their intervals, all from test losses."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from engram.experiments.arms import REFERENCE
from engram.experiments.statistics import NOTHING, fit_line, fit_parabola, mean_interval, seed_interval

__all__ = ["SHARE_ROUNDING", "aligned", "group_by", "other_labels", "paired", "parabola", "summarise"]

SHARE_ROUNDING = 0.01
"""Whole experts and primes move a share by less than this from the one that was asked for."""

_SIZES = ("total", "active", "experts", "dense_width", "table_rows", "rows_per_head", "flops_per_token")

Entries = Sequence[Mapping[str, Any]]


def summarise(question: str, entries: Entries, reference: str = REFERENCE) -> dict[str, Any]:
    """The answer to a sweep's question from the points there are.

    Args:
        question: ``allocation``, ``slots``, ``ablation`` or ``comparison``.
        entries: points as a sweep's result holds them.
        reference: the arm that others are compared with, if there are arms.
    """
    if not entries:
        return {}
    if question in ("ablation", "comparison"):
        return _arms(entries, reference)
    return _allocation(entries) if question == "allocation" else _slots(entries)


def _loss(entry: Mapping[str, Any]) -> float:
    return entry["test"]["loss"]


def group_by(entries: Entries, key: Callable[[Mapping[str, Any]], Any]) -> dict[Any, list[Mapping[str, Any]]]:
    """Entries by what ``key`` makes of them, in the order in which that comes up."""
    groups: dict[Any, list[Mapping[str, Any]]] = {}
    for entry in entries:
        groups.setdefault(key(entry), []).append(entry)
    return groups


def paired(entries: Entries, others: Entries) -> dict[str, Any] | None:
    """Mean of the differences ``entries - others``, seed by seed, with its interval; None without a common seed."""
    losses = {e["seed"]: _loss(e) for e in others}
    differences = [_loss(e) - losses[e["seed"]] for e in entries if e["seed"] in losses]
    return mean_interval(differences) if differences else None


def aligned(groups: Sequence[Entries]) -> list[list[float]]:
    """Losses of each group by the seeds that all of them have, in one order; means of whatever there is where they share none."""
    by_seed = [{e["seed"]: _loss(e) for e in group} for group in groups]
    seeds = sorted(set.intersection(*(set(losses) for losses in by_seed)))
    if not seeds:
        return [[sum(losses.values()) / len(losses)] for losses in by_seed]
    return [[losses[seed] for seed in seeds] for losses in by_seed]


def other_labels(entry: Mapping[str, Any], dimension: str | None) -> str:
    """Labels of all dimensions but this one, as one name; ``all`` where there are none. It is what summaries call a budget or a setting."""
    return ", ".join(label for name, label in entry["labels"].items() if name != dimension) or "all"


def _allocation(entries: Entries) -> dict[str, Any]:
    """By budget: the loss at every rho, a parabola through it, its lowest point, and the gain of the best rho over experts alone."""
    return {budget: _curve(group) for budget, group in group_by(entries, lambda e: other_labels(e, "rho")).items()}


def _curve(entries: Entries) -> dict[str, Any]:
    arms = group_by(entries, lambda e: e["labels"]["rho"])
    rows = []
    for label, group in arms.items():
        counts = group[0]["counts"]
        rows.append(
            {
                "label": label,
                "rho": counts["rho"],
                "loss": mean_interval([_loss(e) for e in group]),
                **{k: counts[k] for k in _SIZES},
            }
        )
    rows.sort(key=lambda row: row["rho"])
    pure = next((arms[row["label"]] for row in rows if row["rho"] == 1), None)
    for row in rows:
        row["against_experts_alone"] = None if pure is None or row["rho"] == 1 else paired(arms[row["label"]], pure)
    summary: dict[str, Any] = {"curve": rows}
    if len(rows) >= 4:
        summary["parabola"] = parabola([r["rho"] for r in rows], aligned([arms[r["label"]] for r in rows]))
    # The best rho is named by validation loss and reported by test loss. Both are of the same trained models, so that a lucky training can
    # still flatter it, but not a lucky half of the text.
    mixed = [row for row in rows if row["rho"] < 1]
    # Seeds differ by more than shares do: all are compared on the same ones.
    if mixed and (seeds := set.intersection(*({e["seed"] for e in arms[row["label"]]} for row in mixed))):
        best = min(mixed, key=lambda row: _validation(arms[row["label"]], seeds))
        summary["best"] = {"rho": best["rho"], "label": best["label"], "gain": best["against_experts_alone"]}
    return summary


def _validation(entries: Entries, seeds: Collection[int]) -> float:
    losses = [e["validation"]["loss"] for e in entries if e["seed"] in seeds]
    mean = sum(losses) / len(losses)
    return mean if math.isfinite(mean) else math.inf


def parabola(rho: Sequence[float], losses: Sequence[Sequence[float]]) -> dict[str, Any]:
    """The parabola through mean losses at shares ``rho``, with intervals over seeds (``aligned`` losses)."""

    def lowest(means: list[float]) -> float | None:
        a, b, _ = fit_parabola(rho, means)
        return -b / (2 * a) if a > NOTHING else None

    def curvature(means: list[float]) -> float:
        return fit_parabola(rho, means)[0]

    means = [sum(group) / len(group) for group in losses]
    a, b, c = fit_parabola(rho, means)
    residual = math.sqrt(sum((a * x * x + b * x + c - y) ** 2 for x, y in zip(rho, means)) / len(rho))
    return {
        "coefficients": [a, b, c],
        "curvature_interval": seed_interval(losses, curvature),
        "lowest": lowest(means),
        "lowest_interval": seed_interval(losses, lowest),
        "residual": residual,
    }


def _slots(entries: Entries) -> dict[str, Any]:
    """The loss at every table size, the slope per decade of rows, and the gain over no memory."""
    arms = group_by(entries, lambda e: e["labels"]["rows"])
    without = next((group for group in arms.values() if not group[0]["counts"]["rows_per_head"]), None)
    rows = [
        {
            "label": label,
            "rows_per_head": max(group[0]["counts"]["rows_per_head"]),
            "slots": group[0]["counts"]["table_rows"],
            "loss": mean_interval([_loss(e) for e in group]),
            "against_none": None if without is None else paired(group, without),
        }
        for label, group in arms.items()
        if group is not without
    ]
    rows.sort(key=lambda row: row["slots"])
    summary: dict[str, Any] = {"curve": rows, "none": mean_interval([_loss(e) for e in without]) if without else None}
    if len(rows) >= 3:
        x = [math.log10(row["slots"]) for row in rows]
        groups = aligned([arms[row["label"]] for row in rows])
        slope, intercept = fit_line(x, [sum(g) / len(g) for g in groups])
        summary["line"] = {
            "slope_per_decade": slope,
            "slope_interval": seed_interval(groups, lambda means: fit_line(x, means)[0]),
            "intercept": intercept,
        }
    return summary


def _arms(entries: Entries, reference: str) -> dict[str, Any]:
    """By setting: the loss of every arm, and its difference to the reference, seed by seed."""
    summary = {}
    for setting, group in group_by(entries, lambda e: other_labels(e, "arm")).items():
        arms = group_by(group, lambda e: e["labels"]["arm"])
        compared = arms.get(reference)
        summary[setting] = {
            label: {
                "loss": mean_interval([_loss(e) for e in members]),
                "against_reference": None if compared is None or members is compared else paired(members, compared),
                **{k: members[0]["counts"][k] for k in ("total", "active", "flops_per_token")},
            }
            for label, members in arms.items()
        }
    return summary
