"""What sweeps say about the paper's claims. Each function takes results by kind and name and yields evidence."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from engram.experiments.arms import find_arm, layer_arms
from engram.experiments.evidence import AGREES, CANNOT_TELL, DISAGREES, Evidence, Results, of_sign, sign_verdict
from engram.experiments.paper import PAPER
from engram.experiments.summary import SHARE_ROUNDING, other_labels, paired

__all__ = [
    "ablated",
    "first_two",
    "gain",
    "largest_table",
    "last_against_second",
    "memory_helps",
    "optimum",
    "paper_shares",
    "placement",
    "single_module",
    "slope",
    "u_shape",
]

_SECOND = 1
"""The paper's second layer, as ``layer_ids`` count."""


def _sweeps(results: Results, question: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Sweeps that have points, with names that say if they are unfinished."""
    for name, result in results.get(question, {}).items():
        if result["summary"]:
            done, wanted = len(result["points"]), result["expected_points"]
            yield name if done >= wanted else f"{name} ({done} of {wanted} points)", result


def _points(result: Mapping[str, Any], dimension: str, setting: str) -> list[Mapping[str, Any]]:
    """Points whose labels, ``dimension`` aside, are those that the summary calls ``setting``."""
    return [p for p in result["points"] if other_labels(p, dimension) == setting]


def _budgets(results: Results) -> Iterator[tuple[str, Mapping[str, Any], list[Mapping[str, Any]]]]:
    """Every budget of every allocation sweep: where, its summary, its points."""
    for name, result in _sweeps(results, "allocation"):
        for budget, summary in result["summary"].items():
            points = _points(result, "rho", budget)
            yield name if budget == "all" else f"{name}, {budget}", summary, points


def _seeds(points: Sequence[Mapping[str, Any]]) -> int:
    return len({point["seed"] for point in points})


def u_shape(results: Results) -> Iterator[Evidence]:
    """A parabola that is open upwards and lowest below 100 %, and a loss that is seen to rise again at the smallest share.

    The second is asked of the points themselves: a parabola through a curve that flattens out bends upwards too.
    """
    for where, summary, points in _budgets(results):
        parabola = summary.get("parabola")
        if parabola is None:
            yield Evidence(CANNOT_TELL, where, note="fewer than four shares")
            continue
        low, high = parabola["curvature_interval"] or (None, None)
        verdict, note = _judge_parabola(parabola)
        if verdict == AGREES:
            verdict, note = _judge_rise(summary, points)
        unit = "nats per unit of rho squared"
        yield Evidence(verdict, where, parabola["coefficients"][0], low, high, unit, note, _seeds(points))


def _judge_parabola(parabola: Mapping[str, Any]) -> tuple[str, str]:
    curvature, lowest = parabola["curvature_interval"], parabola["lowest_interval"]
    if curvature is None:
        return CANNOT_TELL, "one seed: no interval"
    if curvature[1] < 0:
        return DISAGREES, "the curve bends the other way"
    if curvature[0] <= 0:
        return CANNOT_TELL, "curvature may be zero"
    if lowest is None or lowest[0] < 1 <= lowest[1]:
        return CANNOT_TELL, "curved, but the lowest point may be at 100 % or above"
    if lowest[0] >= 1:
        return DISAGREES, "curved, but the lowest point is not below 100 %"
    return AGREES, ""


def _judge_rise(summary: Mapping[str, Any], points: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """Whether the smallest share is worse than the best one."""
    smallest, best = summary["curve"][0], summary["best"]
    share = f"{100 * smallest['rho']:.0f} %, the smallest share measured"
    if smallest["label"] == best["label"]:
        return CANNOT_TELL, f"curved, but best at {share}: where the loss rises again was not seen"
    rise = paired(_at(points, smallest["label"]), _at(points, best["label"]))
    if rise is None or sign_verdict(rise["low"], rise["high"], 1) != AGREES:
        return CANNOT_TELL, f"curved, but at {share}, the loss is not clearly above that of the best share"
    return AGREES, f"at {share}, the loss is {rise['mean']:.4f} [{rise['low']:.4f}, {rise['high']:.4f}] above that of the best"


def _at(points: Sequence[Mapping[str, Any]], rho: str) -> list[Mapping[str, Any]]:
    return [point for point in points if point["labels"]["rho"] == rho]


def paper_shares() -> tuple[float, float, float, float]:
    """The shares that the paper calls best, first and last, and those of its own grid next to them, below and above."""
    (first, _), last = PAPER["optimum"]["text"], PAPER["optimum"]["plotted"]
    shares = sorted(next(iter(PAPER["allocation"].values()))["loss"])
    return first, last, max(s for s in shares if s < first), min(s for s in shares if s > last)


def optimum(results: Results) -> Iterator[Evidence]:
    """The best share measured against the paper's best shares: by the points, since where a parabola is lowest depends on the range fitted."""
    # The paper's own grid tells its lowest shares from no others than these neighbours.
    first, last, below, above = paper_shares()
    for where, summary, points in _budgets(results):
        if "best" not in summary:
            continue
        best = next(row for row in summary["curve"] if row["label"] == summary["best"]["label"])
        inside = _between(below, best["rho"], above)
        # Told apart must be: the best from all outside, if it is one of the paper's, else from all of the paper's.
        others = [
            row
            for row in summary["curve"]
            if (not _between(below, row["rho"], above) if inside else _between(first, row["rho"], last))
        ]
        yield _judge_optimum(where, best, others, inside, points)


def _between(first: float, share: float, last: float) -> bool:
    return first - SHARE_ROUNDING <= share <= last + SHARE_ROUNDING


def _judge_optimum(
    where: str,
    best: Mapping[str, Any],
    others: Sequence[Mapping[str, Any]],
    inside: bool,
    points: Sequence[Mapping[str, Any]],
) -> Evidence:
    told = f"best share with a memory: {100 * best['rho']:.0f} %"
    found = [
        (row, difference) for row in others if (difference := paired(_at(points, best["label"]), _at(points, row["label"])))
    ]
    theirs = "those outside the paper's shares" if inside else "the paper's shares"
    if not found:
        return Evidence(CANNOT_TELL, where, note=f"{told}; none of {theirs} was measured")
    row, nearest = max(found, key=lambda pair: pair[1]["mean"])
    note = f"{told}, against {100 * row['rho']:.0f} %, the nearest in loss of {theirs}"
    clear = all(sign_verdict(difference["low"], difference["high"], -1) == AGREES for _, difference in found)
    verdict = CANNOT_TELL if not clear else AGREES if inside else DISAGREES
    return Evidence(verdict, where, nearest["mean"], nearest["low"], nearest["high"], note=note, seeds=nearest["n"])


def gain(results: Results) -> Iterator[Evidence]:
    """The best share (chosen by validation loss) against experts alone: an interval below zero, and more than seeds differ."""
    for where, summary, points in _budgets(results):
        best = summary.get("best")
        if best is None or best["gain"] is None:
            continue
        gain, spread = best["gain"], _spread(points, {best["label"], *_pure(summary)})
        note = f"rho {100 * best['rho']:.0f} %; losses of one setting spread over {spread:.4f} between seeds"
        for evidence in of_sign(where, gain, -1, note):
            if evidence.verdict == AGREES and abs(gain["mean"]) <= spread:
                evidence = Evidence(**{**asdict(evidence), "verdict": CANNOT_TELL, "note": f"{note}: more than the gain"})
            yield evidence


def _pure(summary: Mapping[str, Any]) -> Iterator[str]:
    return (row["label"] for row in summary["curve"] if row["rho"] == 1)


def _spread(points: Sequence[Mapping[str, Any]], labels: set[str]) -> float:
    """Largest difference between seeds of one of these shares."""
    losses: dict[str, list[float]] = {}
    for point in points:
        if point["labels"]["rho"] in labels:
            losses.setdefault(point["labels"]["rho"], []).append(point["test"]["loss"])
    return max((max(values) - min(values) for values in losses.values()), default=0.0)


def slope(results: Results) -> Iterator[Evidence]:
    """Loss per decade of slots."""
    for where, result in _sweeps(results, "slots"):
        line = result["summary"].get("line")
        if line is None:
            yield Evidence(CANNOT_TELL, where, note="fewer than three table sizes")
            continue
        low, high = line["slope_interval"] or (None, None)
        note = "one seed: no interval" if low is None else ""
        verdict, unit = sign_verdict(low, high, -1), "nats per decade"
        yield Evidence(verdict, where, line["slope_per_decade"], low, high, unit, note, _seeds(result["points"]))


def largest_table(results: Results) -> Iterator[Evidence]:
    """The largest table against no memory."""
    for where, result in _sweeps(results, "slots"):
        rows = result["summary"]["curve"]
        if rows:
            yield from of_sign(where, rows[-1]["against_none"], -1, f"{rows[-1]['slots']:,} slots")


def _settings(results: Results) -> Iterator[tuple[str, Mapping[str, Any], Mapping[str, Any], list[Mapping[str, Any]]]]:
    """Every setting of every ablation: where, arms of its summary, recipe, points."""
    for name, result in _sweeps(results, "ablation"):
        for setting, arms in result["summary"].items():
            points = _points(result, "arm", setting)
            yield name if setting == "all" else f"{name}, {setting}", arms, result["recipe"], points


def ablated(change: str) -> Callable[[Results], Iterator[Evidence]]:
    """A judge of one change (a key of ``arms.CHANGES``) against the reference."""
    _, in_paper = PAPER["ablation"]["changes"][change]

    def judge_arm(results: Results) -> Iterator[Evidence]:
        for where, arms, recipe, _ in _settings(results):
            label = find_arm(recipe, change)
            if label is not None and label in arms:
                for found in of_sign(where, arms[label]["against_reference"], 1, f"arm {label!r}"):
                    yield _beside_paper(found, in_paper)

    return judge_arm


def _beside_paper(found: Evidence, in_paper: float) -> Evidence:
    """Evidence that cannot tell an effect from nothing says so where it cannot tell it from the paper's either."""
    if found.verdict != CANNOT_TELL or found.low is None or found.high is None or not found.low <= in_paper <= found.high:
        return found
    return replace(found, note=f"{found.note}; the paper's difference lies in the interval too")


def memory_helps(results: Results) -> Iterator[Evidence]:
    """Arms without any table against the reference."""
    for where, arms, _, points in _settings(results):
        without = {p["labels"]["arm"] for p in points if not p["counts"]["table_rows"]}
        for label in sorted(without & set(arms)):
            yield from of_sign(where, arms[label]["against_reference"], 1, f"arm {label!r}")


def placement(choose: Callable[[dict[int, str]], tuple[str, str] | None]) -> Callable[[Results], Iterator[Evidence]]:
    """Judges that one placement loses more than another; both are chosen from the arms by their layers, counted from 0."""

    def judge_pair(results: Results) -> Iterator[Evidence]:
        for where, arms, _, points in _settings(results):
            pair = choose(layer_arms(arms))
            if pair is not None:
                worse, better = ([p for p in points if p["labels"]["arm"] == label] for label in pair)
                yield from of_sign(where, paired(worse, better), 1, f"{pair[0]!r} against {pair[1]!r}")

    return judge_pair


def single_module(results: Results) -> Iterator[Evidence]:
    """One module at the second layer against the reference."""
    for where, arms, _, _ in _settings(results):
        label = layer_arms(arms).get(_SECOND)
        if label is not None:
            yield from of_sign(where, arms[label]["against_reference"], 1, f"arm {label!r}")


def first_two(labels: dict[int, str]) -> tuple[str, str] | None:
    """The first layer, then the second."""
    return (labels[0], labels[_SECOND]) if {0, _SECOND} <= labels.keys() else None


def last_against_second(labels: dict[int, str]) -> tuple[str, str] | None:
    """The last layer that was tried, then the second."""
    last = max(labels, default=_SECOND)
    return (labels[last], labels[_SECOND]) if last > _SECOND and _SECOND in labels else None
