"""Pictures of a sweep, from its result alone, in the manner of the paper's figures."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engram.experiments.summary import other_labels
from engram.plots.figure import COLOURS, Picture, new_figure, save_figure
from engram.plots.marks import colour_of, draw_mean, draw_seeds, literal, points_of, tested
from engram.plots.sweep_arms import plot_ablation, plot_comparison

__all__ = ["DIMENSIONS", "plot_sweep"]

DIMENSIONS = {"allocation": "rho", "slots": "rows", "ablation": "arm", "comparison": "arm"}
"""What the points of a sweep differ in, by its question."""

_LOSS = "test loss, nats per token"


def plot_sweep(result: Mapping[str, Any], folder: Path, name: str, paper: Mapping[str, Any] | None = None) -> list[Picture]:
    """Pictures of one sweep as ``folder/name_*.png``; none while it has no points.

    Args:
        result: as ``engram sweep`` writes it.
        folder: made if missing.
        name: beginning of the files' names.
        paper: what the paper measured (``engram.experiments.paper``), to be drawn beside it.

    Raises:
        ConfigError: matplotlib is missing.
    """
    if not result["points"]:
        return []
    draw: Callable[..., list[Picture]] = _DRAWERS[result["question"]]
    return [*draw(result, folder, name, paper or {}), _curves(result, folder / f"{name}_curves.png")]


def _allocation(result: Mapping[str, Any], folder: Path, name: str, paper: Mapping[str, Any]) -> list[Picture]:
    budgets, theirs = result["summary"], paper.get("allocation")
    figure, axes = new_figure(len(budgets) + bool(theirs), width=4.3 * (len(budgets) + bool(theirs)), height=3.8)
    if theirs:
        _paper_allocation(axes[0], theirs)
    for number, (axis, (budget, summary)) in enumerate(zip(axes[bool(theirs) :], budgets.items())):
        _budget(axis, summary, points_of(result, "rho", budget), colour_of(number))
        axis.set(xlabel="experts' share of sparse parameters (rho), %", ylabel=_LOSS, title=_scale(budget, summary["curve"]))
        axis.title.set_fontsize(9)
        if axis.get_legend_handles_labels()[0]:  # without a best share or a parabola there is nothing to name
            axis.legend(frameon=False, fontsize=7)
    beside = "Left: the paper's points. " if theirs else ""
    caption = (
        f"{beside}Loss against the share of experts, one panel per budget. Faint: single seeds. Bars: 95 % intervals. Dashed: parabola. "
        "Star: its lowest point with interval. Ring: the best share with a memory by validation loss."
    )
    pictures = [Picture(save_figure(figure, folder / f"{name}.png"), caption)]
    return pictures + _gains(budgets, folder / f"{name}_gain.png")


def _budget(axis: Any, summary: Mapping[str, Any], points: Mapping[str, Sequence[Mapping[str, Any]]], colour: str) -> None:
    rows, parabola = summary["curve"], summary.get("parabola")
    for row in rows:
        draw_seeds(axis, 100 * row["rho"], tested(points[row["label"]]), colour)
        draw_mean(axis, 100 * row["rho"], row["loss"], colour)
    shares = [row["rho"] for row in rows]
    if parabola is not None:
        _dashed_parabola(axis, parabola["coefficients"], shares, colour, "parabola")
        lowest, interval = parabola["lowest"], parabola["lowest_interval"]
        if lowest is not None and shares[0] <= lowest <= shares[-1]:
            ends = (
                None if interval is None else [[100 * max(0.0, lowest - interval[0])], [100 * max(0.0, interval[1] - lowest)]]
            )
            height = float(np.polyval(parabola["coefficients"], lowest))
            axis.errorbar(
                100 * lowest,
                height,
                xerr=ends,
                fmt="*",
                ms=10,
                color="#333333",
                lw=1,
                capsize=2.5,
                label=f"lowest: {100 * lowest:.0f} %",
            )
    best = next((row for row in rows if "best" in summary and row["label"] == summary["best"]["label"]), None)
    if best is not None:
        axis.plot(
            100 * best["rho"],
            best["loss"]["mean"],
            "o",
            ms=12,
            mfc="none",
            mec="#333333",
            label=f"best: {100 * best['rho']:.0f} %",
        )


def _scale(budget: str, rows: Sequence[Mapping[str, Any]]) -> str:
    total, active = (_million(max(row[key] for row in rows)) for key in ("total", "active"))
    size = f"{total} parameters, {active} active"
    return size if budget == "all" else literal(f"{budget}: {size}")


def _million(count: int) -> str:
    return f"{count / 1e6:.3g}M" if count >= 1e6 else f"{count / 1e3:.3g}k"


def _paper_allocation(axis: Any, budgets: Mapping[str, Any]) -> None:
    for number, (budget, entry) in enumerate(budgets.items()):
        shares, losses = zip(*sorted(entry["loss"].items()))
        axis.plot([100 * s for s in shares], losses, "o", ms=5, color=COLOURS[-1 - number], label=budget)
        _dashed_parabola(axis, np.polyfit(shares, losses, 2).tolist(), shares, COLOURS[-1 - number], None)
    axis.set(xlabel="rho, %", ylabel="validation loss", title="the paper: " + next(iter(budgets.values()))["scale"])
    axis.title.set_fontsize(8)
    axis.legend(frameon=False, fontsize=7)


def _dashed_parabola(axis: Any, coefficients: Sequence[float], shares: Sequence[float], colour: str, label: str | None) -> None:
    x = np.linspace(min(shares), max(shares), 100)
    axis.plot(100 * x, np.polyval(coefficients, x), "--", lw=1, color=colour, label=label)


def _gains(budgets: Mapping[str, Any], path: Path) -> list[Picture]:
    """Differences to experts alone, which have no offset between budgets; none if experts alone were not run."""
    if not any(row["against_experts_alone"] for summary in budgets.values() for row in summary["curve"]):
        return []
    figure, (axis,) = new_figure(1, width=6.0)
    for number, (budget, summary) in enumerate(budgets.items()):
        rows = [row for row in summary["curve"] if row["against_experts_alone"]]
        for place, row in enumerate(rows):
            label = literal(budget) if not place else None
            draw_mean(axis, 100 * row["rho"] + 0.3 * number, row["against_experts_alone"], colour_of(number), label=label)
    axis.axhline(0, color="#333333", lw=0.8)
    axis.set(xlabel="rho, %", ylabel="difference to experts alone, nats", title="below zero: the memory helps")
    axis.legend(frameon=False, fontsize=8)
    return [
        Picture(save_figure(figure, path), "Difference of test losses to experts alone, seed by seed, with 95 % intervals.")
    ]


def _slots(result: Mapping[str, Any], folder: Path, name: str, paper: Mapping[str, Any]) -> list[Picture]:
    summary, theirs = result["summary"], paper.get("slots")
    figure, axes = new_figure(1 + bool(theirs), width=5.5 * (1 + bool(theirs)), height=3.8)
    if theirs:
        sizes, losses = zip(*sorted(theirs["loss"].items()))
        axes[0].plot(sizes, losses, "o", ms=5, color="#333333")
        axes[0].axhline(theirs["none"], ls="--", lw=1, color=COLOURS[0], label="no memory")
        axes[0].set(xscale="log", xlabel="slots", ylabel="validation loss", title="the paper")
        axes[0].legend(frameon=False, fontsize=8)
    axis, arms, colour = axes[-1], _by_rows(result), colour_of(1)
    for row in summary["curve"]:
        draw_seeds(axis, row["slots"], tested(arms[row["label"]]), colour)
        draw_mean(axis, row["slots"], row["loss"], colour)
    if "line" in summary:
        _line(axis, summary["line"], [row["slots"] for row in summary["curve"]], colour)
    if summary["none"] is not None:
        none = summary["none"]
        axis.axhline(none["mean"], ls="--", lw=1, color=COLOURS[0], label="no memory")
        if none["low"] is not None:
            axis.axhspan(none["low"], none["high"], color=COLOURS[0], alpha=0.12, lw=0)
    axis.set(xscale="log", xlabel="slots (rows of all tables)", ylabel=_LOSS, title="this work")
    if axis.get_legend_handles_labels()[0]:
        axis.legend(frameon=False, fontsize=8)
    beside = "Left: the paper's points. " if theirs else ""
    caption = f"{beside}Loss against table size, with 95 % intervals and a line fitted to the logarithm of slots."
    return [Picture(save_figure(figure, folder / f"{name}.png"), caption)]


def _by_rows(result: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    found: dict[str, list[Mapping[str, Any]]] = {}
    for point in result["points"]:
        found.setdefault(point["labels"]["rows"], []).append(point)
    return found


def _line(axis: Any, line: Mapping[str, Any], slots: Sequence[float], colour: str) -> None:
    ends = [min(slots), max(slots)]
    low, high = line["slope_interval"] or (None, None)
    interval = "" if low is None else f" [{low:+.4f}, {high:+.4f}]"
    label = f"{line['slope_per_decade']:+.4f}{interval} per decade"
    axis.plot(
        ends, [line["intercept"] + line["slope_per_decade"] * math.log10(x) for x in ends], "-", lw=1, color=colour, label=label
    )


def _curves(result: Mapping[str, Any], path: Path) -> Picture:
    """Validation loss on the way: a thin line for each run, one colour per arm, one panel per budget or setting."""
    from matplotlib import colormaps

    dimension = DIMENSIONS[result["question"]]
    settings = list(dict.fromkeys(other_labels(p, dimension) for p in result["points"]))
    labels = list(dict.fromkeys(p["labels"][dimension] for p in result["points"]))
    shades = colormaps["viridis"](np.linspace(0, 0.92, len(labels)))
    figure, axes = new_figure(len(settings), width=4.0 * len(settings) + 2.2, height=4.0)
    for axis, setting in zip(axes, settings):
        for label, points in points_of(result, dimension, setting).items():
            for number, point in enumerate(points):
                steps, losses = zip(*point["curve"]) if point["curve"] else ((), ())
                tokens = [step * point["tokens"] / point["steps"] / 1e6 for step in steps]
                axis.plot(tokens, losses, lw=0.7, color=shades[labels.index(label)], label=None if number else literal(label))
        axis.set(
            xlabel="tokens, millions",
            ylabel="validation loss",
            title="" if setting == "all" else literal(setting),
        )
    axes[-1].legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    return Picture(
        save_figure(figure, path), "Loss on a part of the validation text during training, a thin line for each run."
    )


_DRAWERS: dict[str, Callable[..., list[Picture]]] = {
    "allocation": _allocation,
    "slots": _slots,
    "ablation": plot_ablation,
    "comparison": plot_comparison,
}
