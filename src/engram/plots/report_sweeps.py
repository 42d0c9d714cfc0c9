"""The report's tables and sentences on sweeps; every number comes from their results."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from engram.plots.markdown import count, interval, literal_text, plural, span, table
from engram.plots.marks import points_of

__all__ = ["ANSWERS", "contamination", "failures", "progress", "protocol", "tuning"]


def progress(result: Mapping[str, Any]) -> str:
    """How far a sweep is; empty if it is finished."""
    done, wanted = len(result["points"]), result["expected_points"]
    if done >= wanted:
        return ""
    if not done:
        return f"Not finished: 0 of {plural(wanted, 'point')} so far ({plural(len(result['tuning']), 'run')} to choose learning rates)."
    return f"Not finished: {done} of {plural(wanted, 'point')}; what follows is from these alone."


def failures(result: Mapping[str, Any]) -> str:
    """What failed, one line each; empty if nothing did."""
    told = [
        (failure["point"], re.sub(r"(?<!\S)/\S*/", "", failure["error"])) for failure in result["failures"]
    ]  # no machine's folders
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
    return " ".join(
        [told, *lines, "They stay in what is reported: a memory may gain more there than on text that is new throughout."]
    )


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
        f"{literal_text(', '.join(rate['at'].values()))}: {rate['learning_rate']:g}{edge[rate['edge']]}"
        for rate in result["learning_rates"]
    )
    seeds = ", ".join(map(str, sorted({p["seed"] for p in runs})))
    return (
        f"{literal_text(name)}: {plural(len(runs), 'run')} of {count(tokens)} tokens in all{share}, rates {_listed(tried)}, seed {seeds}. "
        f"Chosen: {chosen or 'nothing yet'}."
    )


def _listed(rates: Sequence[float]) -> str:
    return ", ".join(f"{rate:g}" for rate in rates)


def _allocation(result: Mapping[str, Any]) -> list[str]:
    parts = []
    for budget, summary in result["summary"].items():
        if budget != "all":
            parts.append(f"**Budget {literal_text(budget)}**")
        loads = _largest_loads(result, budget)
        header = (
            "rho",
            "parameters",
            "active",
            "experts",
            "largest load",
            "rows per head",
            "test loss",
            "difference to experts alone",
        )
        rows = [
            (
                f"{100 * row['rho']:.1f} %",
                count(row["total"]),
                count(row["active"]),
                count(row["experts"]),
                loads.get(row["label"], "–"),
                count(max(row["rows_per_head"], default=0)),
                interval(row["loss"]),
                interval(row["against_experts_alone"], signed=True),
            )
            for row in summary["curve"]
        ]
        parts += [table(header, rows, right=range(8)), _parabola(summary)]
    parts.append("*Largest load*: tokens of the busiest expert in the last step, as a multiple of the mean; 1 is balanced.")
    return parts


def _largest_loads(result: Mapping[str, Any], budget: str) -> dict[str, str]:
    """By share of experts, over seeds."""
    loads = {
        rho: [round(point["expert_load_max"], 1) for point in points if point["expert_load_max"] is not None]
        for rho, points in points_of(result, "rho", budget).items()
    }
    return {rho: span(found) for rho, found in loads.items() if found}


def _parabola(summary: Mapping[str, Any]) -> str:
    sentences = []
    fit = summary.get("parabola")
    if fit is None:
        sentences.append("Too few shares for a parabola.")
    else:
        curvature = interval({"mean": fit["coefficients"][0], **_ends(fit["curvature_interval"])}, digits=3, signed=True)
        sentences.append(
            f"Parabola: curvature {curvature} nats per unit of rho squared; root mean square residual {fit['residual']:.4f}."
        )
        if fit["lowest"] is None:
            sentences.append("It has no lowest point.")
        else:
            place = interval({"mean": fit["lowest"], **_ends(fit["lowest_interval"])}, digits=1, factor=100)
            sentences.append(f"It is lowest at {place} %.")
    best = summary.get("best")
    if best is not None:
        against = "" if best["gain"] is None else f": {interval(best['gain'], signed=True)} nats against experts alone"
        sentences.append(f"Best share by validation loss: {100 * best['rho']:.1f} %{against}.")
    return " ".join(sentences)


def _ends(ends: Sequence[float] | None) -> dict[str, float | None]:
    return {"low": None, "high": None} if ends is None else {"low": ends[0], "high": ends[1]}


def _slots(result: Mapping[str, Any]) -> list[str]:
    summary = result["summary"]
    rows = [
        (literal_text(row["label"]), count(row["slots"]), interval(row["loss"]), interval(row["against_none"], signed=True))
        for row in summary["curve"]
    ]
    if summary["none"] is not None:
        rows.insert(0, ("no memory", "0", interval(summary["none"]), "–"))
    parts = [table(("table", "slots", "test loss", "difference to no memory"), rows, right=(1, 2, 3))]
    line = summary.get("line")
    if line is None:
        return [*parts, "Too few table sizes for a line."]
    slope = interval({"mean": line["slope_per_decade"], **_ends(line["slope_interval"])}, signed=True)
    return [*parts, f"Slope: {slope} nats per decade of slots."]


def _arms(result: Mapping[str, Any]) -> list[str]:
    parts = []
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
            header.append(f"difference to {literal_text(result['recipe'].get('reference', 'reference'))}")
            rows = [[*row, interval(arm["against_reference"], signed=True)] for row, (_, arm) in zip(rows, ordered)]
        parts.append(table(header, rows, right=range(1, 6)))
    return parts


ANSWERS: dict[str, Callable[[Mapping[str, Any]], list[str]]] = {
    "allocation": _allocation,
    "slots": _slots,
    "ablation": _arms,
    "comparison": _arms,
}
"""By question: tables and sentences of a sweep that has points."""
