"""What points say beyond a sweep's summary: the other half of the text, noise pooled over arms, runs made twice, arms of two sweeps."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from engram.experiments.arms import REFERENCE
from engram.experiments.statistics import excludes_zero, half_width_over_settings, mean_interval, seed_interval
from engram.experiments.summary import SHARE_ROUNDING, aligned, group_by, other_labels, paired, parabola, summarise

__all__ = [
    "against_experts_alone",
    "control_name",
    "curvature_per_decade",
    "made_twice",
    "measured_tokens",
    "not_told_apart",
    "on_validation",
    "parabola_above",
    "pooled_half_width",
    "shares_from",
]

_SAME_SIZE = 0.02
"""Active parameters of two models that are compared across sweeps differ by less than this."""

Results = Mapping[str, Mapping[str, Any]]
Points = Sequence[Mapping[str, Any]]


def on_validation(result: Mapping[str, Any]) -> dict[str, Any]:
    """A sweep's summary with the losses of the validation half in place of those of the test half."""
    points = [{**point, "test": point["validation"]} for point in result["points"]]
    return summarise(result["question"], points, result["recipe"].get("reference") or REFERENCE)


def measured_tokens(results: Results) -> dict[str, dict[str, int]]:
    """Tokens that losses are measured on, by half and kind of text; those of the first point."""
    points = [point for result in results.values() for point in result["points"]]
    if not points:
        return {}
    halves = {half: points[0][half].get("by_kind", {}) for half in ("validation", "test")}
    return {half: {kind: entry["tokens"] for kind, entry in kinds.items()} for half, kinds in halves.items() if kinds}


def pooled_half_width(points: Points) -> float | None:
    """Half of the 95 % interval of a difference between two arms, if all arms with a memory are as noisy as each other.

    Returns:
        As ``half_width_over_settings``; None for fewer than three arms or two seeds that all of them have.
    """
    arms: dict[str, dict[int, float]] = {}
    for point in points:
        if point["counts"]["table_rows"]:
            arms.setdefault(point["labels"]["arm"], {})[point["seed"]] = point["test"]["loss"]
    seeds = sorted(set.intersection(*map(set, arms.values()))) if arms else []
    return half_width_over_settings([[of_seed[seed] for seed in seeds] for of_seed in arms.values()])


def made_twice(results: Results) -> dict[bool, list[float]]:
    """Differences of test loss between runs of one recipe, text and seed that stand in two sweeps, the later name less the earlier.

    Returns:
        Those of models with a memory (True) and without (False), if there are any.
    """
    runs: dict[str, list[Mapping[str, Any]]] = {}
    for _, result in sorted(results.items()):
        found = {p["digest"] + result["data"]["fingerprint"]: p for p in (*result["points"], *result["tuning"])}
        for key, point in found.items():
            runs.setdefault(key, []).append(point)
    differences: dict[bool, list[float]] = {}
    for first, *others in runs.values():
        for other in others:
            has_memory = first["counts"]["table_rows"] > 0
            differences.setdefault(has_memory, []).append(other["test"]["loss"] - first["test"]["loss"])
    return differences


def against_experts_alone(results: Results) -> Iterator[tuple[str, str, dict[str, Any], bool]]:
    """Arms of comparisons beside experts alone of an allocation: same text, tokens and seeds, active parameters within 2 %.

    Yields:
        Names of both, the difference of test losses, seed by seed, and whether the arm has a memory. A run that stands in both sweeps is not
        compared with itself.
    """
    pure = [
        (name, points)
        for name, result in results.items()
        if result["question"] == "allocation"
        for points in group_by(result["points"], lambda p: other_labels(p, "rho")).values()
    ]
    for name, result in results.items():
        if result["question"] != "comparison":
            continue
        for points in group_by(result["points"], lambda p: other_labels(p, None)).values():
            for other, candidates in pure:
                experts = [p for p in candidates if p["counts"]["rho"] == 1]
                same_text = result["data"]["fingerprint"] == results[other]["data"]["fingerprint"]
                if not (experts and same_text and _comparable(points[0], experts[0])):
                    continue
                if found := paired(_not_the_same_runs(points, experts), experts):
                    has_memory = points[0]["counts"]["table_rows"] > 0
                    names = control_name(name, "comparison", points[0]), control_name(other, "allocation", experts[0])
                    yield *names, found, has_memory


def control_name(name: str, question: str, point: Mapping[str, Any]) -> str:
    """What ``against_experts_alone`` calls the arm that a point of the sweep ``name`` belongs to."""
    labels = [label for dimension, label in point["labels"].items() if (question, dimension) != ("allocation", "rho")]
    return ", ".join([name, *labels])


def _not_the_same_runs(points: Points, others: Points) -> list[Mapping[str, Any]]:
    runs = {p["digest"] for p in others}
    return [p for p in points if p["digest"] not in runs]


def _comparable(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    sizes = a["counts"]["active"], b["counts"]["active"]
    return a["tokens"] == b["tokens"] and max(sizes) <= (1 + _SAME_SIZE) * min(sizes)


def not_told_apart(curve: Points, points: Points, best: str) -> list[float]:
    """Shares whose loss does not differ clearly from that of the share labelled ``best``, itself included."""
    of = group_by(points, lambda p: p["labels"]["rho"])

    def is_apart(label: str) -> bool:
        difference = None if label == best else paired(of[label], of[best])
        return difference is not None and excludes_zero(difference["low"], difference["high"])

    return [row["rho"] for row in curve if not is_apart(row["label"])]


def shares_from(curve: Points, smallest: float) -> Points:
    """The rows of a curve whose share, as it was asked for, is ``smallest`` or more."""
    return [row for row in curve if row["rho"] >= smallest - SHARE_ROUNDING]


def parabola_above(curve: Points, points: Points, smallest: float) -> dict[str, Any] | None:
    """The parabola through shares from ``smallest`` alone; None for fewer than four."""
    rows = shares_from(curve, smallest)
    if len(rows) < 4:
        return None
    of = group_by(points, lambda p: p["labels"]["rho"])
    return parabola([row["rho"] for row in rows], aligned([of[row["label"]] for row in rows]))


def curvature_per_decade(result: Mapping[str, Any]) -> dict[str, Any] | None:
    """The quadratic term of loss over the logarithm of slots, nats per decade squared; zero if the line is one. None for too few sizes."""
    curve = result["summary"]["curve"]
    if len(curve) < 4:
        return None
    x = [math.log10(row["slots"]) for row in curve]
    of = group_by(result["points"], lambda p: p["labels"]["rows"])
    groups = aligned([of[row["label"]] for row in curve])

    def quadratic(losses: Sequence[float]) -> float:
        return float(np.polyfit(x, losses, 2)[0])

    low, high = seed_interval(groups, quadratic) or (None, None)
    return {**mean_interval([quadratic([sum(group) / len(group) for group in groups])]), "low": low, "high": high}
