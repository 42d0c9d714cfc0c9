"""The report's tables and sentences on sweeps; every number comes from their results."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

from engram.experiments.cross_checks import (
    against_experts_alone,
    control_name,
    curvature_per_decade,
    made_twice,
    measured_tokens,
    not_told_apart,
    on_validation,
    parabola_above,
    pooled_half_width,
    shares_from,
)
from engram.experiments.statistics import excludes_zero, half_width_over_settings
from engram.experiments.summary import aligned, paired
from engram.plots.markdown import count, interval, literal_text, plural, span, table
from engram.plots.marks import points_of
from engram.plots.report_counts import counts_row
from engram.plots.settings import differing_settings

__all__ = [
    "ANSWERS",
    "contamination",
    "experts_as_control",
    "failures",
    "measured",
    "progress",
    "protocol",
    "repeats",
    "tuning",
]

_PAPER_RANGE = 0.4
"""The smallest share of experts that the paper measured."""


def progress(result: Mapping[str, Any]) -> str:
    """How far a sweep is; empty if it is finished."""
    done, wanted = len(result["points"]), result["expected_points"]
    if done >= wanted:
        return ""
    if not done:
        aside = len(result.get("other_points", ()))
        told = (
            f" {plural(aside, 'point')} of another recipe, or not yet of this one, are kept aside in the file." if aside else ""
        )
        return f"Not finished: 0 of {plural(wanted, 'point')} so far ({plural(len(result['tuning']), 'run')} to choose learning rates).{told}"
    return f"Not finished: {done} of {plural(wanted, 'point')}; what follows is from these alone."


def failures(result: Mapping[str, Any]) -> str:
    """What failed, one line each; empty if nothing did."""
    # No machine's folders.
    told = [(failure["point"], re.sub(r"(?<!\S)/\S*/", "", failure["error"])) for failure in result["failures"]]
    lines = [f"- {literal_text(point)}: {literal_text(error)}" for point, error in told]
    return "\n".join([f"{plural(len(lines), 'run')} failed:", "", *lines]) if lines else ""


def protocol(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Sizes, tokens, seeds and cost of all sweeps that have points."""
    header = (
        "sweep",
        "points",
        "seeds",
        "parameters",
        "active",
        "tokens per run",
        "epochs",
        "tokens per active parameter",
        "hours",
    )
    rows = []
    for name, result in results.items():
        points = result["points"]
        if points:
            counts = [p["counts"] for p in points]
            hours = sum(p["seconds"] for p in [*points, *result["tuning"]]) / 3600
            rows.append(
                (
                    literal_text(name),
                    f"{len(points)} of {result['expected_points']}",
                    literal_text(", ".join(map(str, sorted({p["seed"] for p in points})))),
                    span([c["total"] for c in counts]),
                    span([c["active"] for c in counts]),
                    span([p["tokens"] for p in points]),
                    span([p["epochs"] for p in points]),
                    span([round(p["tokens"] / p["counts"]["active"], 2) for p in points]),
                    f"{hours:.2g}",
                )
            )
    return table(header, rows, right=range(3, 9)) if rows else ""


def contamination(corpus: Mapping[str, Any]) -> str:
    """What the held-out text shares with the training text, after duplicates were left out."""
    removed = corpus["duplicates"]
    lines = [
        f"{100 * entry['share']:.1f} % of the {count(entry['ngrams'])} held-out {entry['n']}-grams (tokens) occur in the training text too ("
        + ", ".join(f"{literal_text(kind)} {100 * share:.1f} %" for kind, share in entry["share_by_kind"].items())
        + f"), and more than half of those of {plural(entry['documents_shared_over_half'], 'document')} of {count(entry['documents'])}."
        for entry in corpus["contamination"]
    ]
    told = f"Left out of the corpus as duplicates: {count(removed['exact'])} exact, {count(removed['near'])} near."
    rest = (
        "This is of all held-out documents, of which losses are measured on a part. What is shared stays in: a memory may gain more there than "
        "on text that is new throughout."
    )
    return " ".join([told, *lines, rest])


def measured(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Which tokens losses are measured on."""
    halves = measured_tokens(results)
    if not halves:
        return ""
    kinds = list(dict.fromkeys(kind for found in halves.values() for kind in found))
    rows = [
        (half, count(sum(found.values())), *(f"{100 * found.get(kind, 0) / sum(found.values()):.0f} %" for kind in kinds))
        for half, found in halves.items()
    ]
    header = ("measured on", "tokens", *map(literal_text, kinds))
    return table(header, rows, right=range(1, len(header))) + (
        "\n\nIntervals are over seeds on this text: they tell how trainings differ, not how texts do. How much that is, the two halves show, "
        "whose losses stand side by side below; their mixtures differ."
    )


def repeats(results: Mapping[str, Mapping[str, Any]]) -> str:
    """What runs of one recipe, text and seed that were made twice say about digits."""
    found = made_twice(results)
    if not found:
        return ""
    runs = sum(map(len, found.values()))
    came_back = ", ".join(
        f"{'with' if has_memory else 'without'} a memory {sum(not d for d in differences)} of {len(differences)}"
        for has_memory, differences in sorted(found.items())
    )
    others = [difference for differences in found.values() for difference in differences if difference]
    return (
        f"**Repeats.** {plural(runs, 'run')} stand in two sweeps: one recipe, text and seed, run twice. To the last digit came back "
        f"{came_back}{_other_digits(others)}"
    )


def _other_digits(differences: Sequence[float]) -> str:
    """How far the runs are apart that gave other digits; the end of a sentence about the rest."""
    if not differences:
        return "."
    typical = math.sqrt(sum(x * x for x in differences) / len(differences))
    return (
        f"; the other {len(differences)} {'differs' if len(differences) == 1 else 'differ'} by {typical:.4f} (root mean square; at most "
        f"{max(map(abs, differences)):.4f}). Code that adds in another order, the memory's own if only runs with one differ, rounds otherwise, "
        "and rounding grows in training: intervals much narrower than this are luck."
    )


def experts_as_control(results: Mapping[str, Mapping[str, Any]]) -> str:
    """What experts alone are worth beside the arms of other sweeps, where the runs can be compared; empty otherwise."""
    compared = list(against_experts_alone(results))
    if not compared:
        return ""
    told = [
        f"{literal_text(arm)}: {interval(difference, signed=True)} nats against experts alone of {literal_text(other)} "
        f"({literal_text(', '.join(_differing(results, arm, other)) or 'no other setting')})"
        for arm, other, difference, _ in compared
    ]
    better = any(not has_memory and (found["high"] or 0) < 0 for _, _, found, has_memory in compared)
    verdict = (
        "Experts alone lose to a model without a memory, so they are a weak control: what a memory gains over them is not what it gains over "
        "good ones."
        if better
        else "No model without a memory is clearly better than experts alone here; others, better tuned or trained for longer, were not tried."
    )
    return f"**Experts as a control.** Same text, tokens and seeds, in brackets what differs beside them: {'; '.join(told)}. {verdict}"


def _differing(results: Mapping[str, Mapping[str, Any]], arm: str, other: str) -> list[str]:
    """Settings of an arm that its control has otherwise; both by the names that ``against_experts_alone`` gives them."""
    runs = _runs(results)
    return differing_settings(*runs[arm], *runs[other])


def _runs(results: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[Mapping[str, Any], list[Mapping[str, Any]]]]:
    """Sweep and points of every arm of a comparison, and of experts alone of every allocation, by name."""
    found: dict[str, tuple[Mapping[str, Any], list[Mapping[str, Any]]]] = {}
    for name, result in results.items():
        for point in result["points"]:
            if result["question"] == "comparison" or (result["question"] == "allocation" and point["counts"]["rho"] == 1):
                found.setdefault(control_name(name, result["question"], point), (result, []))[1].append(point)
    return found


def tuning(name: str, result: Mapping[str, Any]) -> str:
    """What choosing learning rates cost, and what was chosen."""
    runs = result["tuning"]
    if not runs:
        used = sorted({p["learning_rate"] for p in result["points"]})
        return f"{literal_text(name)}: no learning rate was chosen; all runs use {_listed(used)}." if used else ""
    tokens, reported = (sum(p["tokens"] for p in part) for part in (runs, result["points"]))
    tried = sorted({p["learning_rate"] for p in runs})
    share = f", {100 * tokens / reported:.0f} % of the tokens of the runs that report" if reported else ""
    edge = {True: " (at the edge of those tried)", False: ""}
    chosen = "; ".join(
        f"{literal_text(', '.join(rate['at'].values()))}: {rate['learning_rate']:g}{edge[rate['edge']]}{_tried(runs, rate['at'])}"
        for rate in result["learning_rates"]
    )
    seeds = ", ".join(map(str, sorted({p["seed"] for p in runs})))
    return (
        f"{literal_text(name)}: {plural(len(runs), 'run')} of {count(tokens)} tokens in all{share}, rates {_listed(tried)}, seed {seeds}. "
        f"Chosen, in brackets the validation loss at each rate: {chosen or 'nothing yet'}."
    )


def _tried(runs: Sequence[Mapping[str, Any]], at: Mapping[str, str]) -> str:
    """Validation losses by learning rate, of the runs with which that of a group was chosen."""
    losses: dict[float, list[float]] = {}
    for run in runs:
        if at.items() <= run["labels"].items():
            losses.setdefault(run["learning_rate"], []).append(run["validation"]["loss"])
    told = ", ".join(f"{rate:g}: {statistics.fmean(found):.3f}" for rate, found in sorted(losses.items()))
    return f" ({told})" if told else ""


def _listed(rates: Sequence[float]) -> str:
    return ", ".join(f"{rate:g}" for rate in rates)


def _allocation(result: Mapping[str, Any]) -> list[str]:
    parts, others = [], on_validation(result)
    for budget, summary in result["summary"].items():
        if budget != "all":
            parts.append(f"**Budget {literal_text(budget)}**")
        loads, points = _largest_loads(result, budget), points_of(result, "rho", budget)
        other_half = {row["label"]: row["against_experts_alone"] for row in others[budget]["curve"]}
        half = half_width_over_settings(aligned([points[row["label"]] for row in summary["curve"]]))
        header = (
            "rho",
            "parameters",
            "active",
            "experts",
            "dense width",
            "largest load",
            "rows per head",
            "test loss",
            "bits per byte",
            "difference to experts alone",
            "its interval if all shares are as noisy",
            "on the validation half",
        )
        rows = [
            (
                f"{100 * row['rho']:.1f} %",
                count(row["total"]),
                count(row["active"]),
                count(row["experts"]),
                count(row["dense_width"]),
                loads.get(row["label"], "–"),
                count(max(row["rows_per_head"], default=0)),
                interval(row["loss"]),
                f"{statistics.fmean(p['test']['bits_per_byte'] for p in points[row['label']]):.3f}",
                interval(row["against_experts_alone"], signed=True),
                _pooled_interval(row["against_experts_alone"], half),
                interval(other_half[row["label"]], signed=True),
            )
            for row in summary["curve"]
        ]
        flat = [point for found in points.values() for point in found]
        parts += [
            table(header, [*rows, *counts_row(result.get("rival"), budget, header)], right=range(12)),
            _noise_of_shares(half),
            _parabola(summary, flat),
        ]
        parts.append(_best(summary, points, other_half, half))
    parts.append(
        "*Largest load*: tokens of the busiest expert in the last step, as a multiple of the mean; 1 is balanced. *Dense width*: of the "
        "leading block, which takes up what the router and the memory's projections leave of the active parameters."
    )
    return parts


def _largest_loads(result: Mapping[str, Any], budget: str) -> dict[str, str]:
    """By share of experts, over seeds."""
    loads = {
        rho: [round(point["expert_load_max"], 1) for point in points if point["expert_load_max"] is not None]
        for rho, points in points_of(result, "rho", budget).items()
    }
    return {rho: span(found) for rho, found in loads.items() if found}


def _parabola(summary: Mapping[str, Any], points: Sequence[Mapping[str, Any]]) -> str:
    fit = summary.get("parabola")
    if fit is None:
        return "Too few shares for a parabola."
    curvature = interval({"mean": fit["coefficients"][0], **_ends(fit["curvature_interval"])}, digits=3, signed=True)
    told = f"Parabola: curvature {curvature} nats per unit of rho squared; root mean square residual {fit['residual']:.4f}. {_lowest(fit)}"
    theirs = parabola_above(summary["curve"], points, _PAPER_RANGE)
    if theirs is not None and len(summary["curve"]) > len(shares_from(summary["curve"], _PAPER_RANGE)):
        told += (
            f" Through shares of {100 * _PAPER_RANGE:.0f} % and more alone, the paper's range: {_lowest(theirs, begin='it')} So the place "
            "depends on the range that is fitted: the parabola describes, and nothing is judged by where it is lowest."
        )
    return told


def _lowest(fit: Mapping[str, Any], begin: str = "It") -> str:
    if fit["lowest"] is None:
        return f"{begin} has no lowest point."
    place = interval({"mean": fit["lowest"], **_ends(fit["lowest_interval"])}, digits=1, factor=100)
    return f"{begin} is lowest at {place} %."


def _best(
    summary: Mapping[str, Any],
    points: Mapping[str, Sequence[Mapping[str, Any]]],
    other_half: Mapping[str, Any],
    half: float | None,
) -> str:
    """The best share, and those that may be as good; ``points`` by share, ``half`` of the interval that is pooled over shares."""
    best = summary.get("best")
    if best is None:
        return ""
    told = f"Best share with a memory by validation loss: {100 * best['rho']:.1f} %"
    if best["gain"] is not None:
        other = interval(other_half[best["label"]], signed=True)
        told += f": {interval(best['gain'], signed=True)} nats against experts alone ({other} on the validation half, by which it was chosen)"
    flat = [point for found in points.values() for point in found]
    own = _percents(not_told_apart(summary["curve"], flat, best["label"]))
    if half is None:
        return f"{told}. Shares that these seeds do not tell apart from it: {own}."
    within = _percents(_within(summary["curve"], points, best["label"], half))
    return (
        f"{told}. Shares that are not told apart from it if all are as noisy: {within}; by the interval of each alone: {own}."
    )


def _percents(shares: Sequence[float]) -> str:
    return f"{', '.join(f'{100 * rho:.0f}' for rho in sorted(shares))} %"


def _within(
    curve: Sequence[Mapping[str, Any]], points: Mapping[str, Sequence[Mapping[str, Any]]], best: str, half: float
) -> list[float]:
    """Shares whose loss is less than half an interval away from that of the best one, itself included, and those that share no seed with it."""
    differences = {row["rho"]: paired(points[row["label"]], points[best]) for row in curve}
    return [rho for rho, difference in differences.items() if difference is None or abs(difference["mean"]) <= half]


def _pooled_interval(difference: Mapping[str, Any] | None, half: float | None) -> str:
    if difference is None or half is None:
        return "–"
    return f"[{difference['mean'] - half:+.4f}, {difference['mean'] + half:+.4f}]"


def _noise_of_shares(half: float | None) -> str:
    """What the interval is that is pooled over shares."""
    if half is None:
        return ""
    return (
        "The interval of each difference alone rests on as many differences as there are seeds. If all shares are as noisy as each other "
        f"(share + seed + noise), 95 % of differences lie within ±{half:.4f} of the truth. This was computed after the data were seen and "
        "corrects for no number of comparisons; the verdicts below go by each share's own interval."
    )


def _ends(ends: Sequence[float] | None) -> dict[str, float | None]:
    return {"low": None, "high": None} if ends is None else {"low": ends[0], "high": ends[1]}


def _slots(result: Mapping[str, Any]) -> list[str]:
    summary = result["summary"]
    other = on_validation(result)
    other_half = {row["label"]: row["against_none"] for row in other["curve"]}
    rows = [
        (
            literal_text(row["label"]),
            count(row["slots"]),
            interval(row["loss"]),
            interval(row["against_none"], signed=True),
            interval(other_half[row["label"]], signed=True),
        )
        for row in summary["curve"]
    ]
    if summary["none"] is not None:
        rows.insert(0, ("no memory", "0", interval(summary["none"]), "–", "–"))
    header = ("table", "slots", "test loss", "difference to no memory", "on the validation half")
    parts = [table(header, rows, right=(1, 2, 3, 4))]
    line = summary.get("line")
    if line is None:
        return [*parts, "Too few table sizes for a line."]
    slope, on_other = (
        interval({"mean": found["slope_per_decade"], **_ends(found["slope_interval"])}, signed=True)
        for found in (line, other["line"])
    )
    told = f"Slope: {slope} nats per decade of slots ({on_other} on the validation half)."
    bent = curvature_per_decade(result)
    if bent is not None:
        told += f" Is the line one? Quadratic term: {interval(bent, signed=True)} nats per decade squared."
    return [*parts, told]


def _arms(result: Mapping[str, Any]) -> list[str]:
    parts, others = [], on_validation(result)
    for setting, arms in result["summary"].items():
        if setting != "all":
            parts.append(f"**{literal_text(setting)}**")
        compared = any(arm["against_reference"] for arm in arms.values())
        ordered = sorted(
            arms.items(), key=lambda item: (item[1]["against_reference"] or item[1]["loss"])["mean"] if compared else 0
        )
        header = ["arm", "parameters", "active", "operations per token", "test loss"]
        rows = [
            [literal_text(label), *(count(arm[key]) for key in ("total", "active", "flops_per_token")), interval(arm["loss"])]
            for label, arm in ordered
        ]
        if compared:
            header += [
                f"difference to {literal_text(result['recipe'].get('reference', 'reference'))}",
                "on the validation half",
            ]
            other_half = {label: arm["against_reference"] for label, arm in others[setting].items()}
            rows = [
                [*row, interval(arm["against_reference"], signed=True), interval(other_half[label], signed=True)]
                for row, (label, arm) in zip(rows, ordered)
            ]
        parts.append(table(header, rows, right=range(1, 7)))
        points = [point for found in points_of(result, "arm", setting).values() for point in found]
        if compared and (half := pooled_half_width(points)) is not None:
            parts.append(_pooled(arms, {p["labels"]["arm"] for p in points if p["counts"]["table_rows"]}, half))
    return parts


def _pooled(arms: Mapping[str, Any], noisy: Set[str], half: float) -> str:
    """What would be told apart if all arms with a memory (``noisy``) were as noisy as each other."""
    differences = {
        label: arms[label]["against_reference"] for label in arms if label in noisy and arms[label]["against_reference"]
    }
    clear = [
        f"{literal_text(label)} ({'' if excludes_zero(found['low'], found['high']) else 'not '}by its own interval)"
        for label, found in differences.items()
        if abs(found["mean"]) > half
    ]
    return (
        f"If all arms with a memory are as noisy as each other (arm + seed + noise), 95 % of differences lie within ±{half:.4f} of the truth. "
        f"By that, clearly unlike the reference: {', '.join(clear) or 'none'}. This was computed after the data were seen and corrects for no "
        "number of comparisons; the verdicts below go by each arm's own interval."
    )


ANSWERS: dict[str, Callable[[Mapping[str, Any]], list[str]]] = {
    "allocation": _allocation,
    "slots": _slots,
    "ablation": _arms,
    "comparison": _arms,
}
"""By question: tables and sentences of a sweep that has points."""
