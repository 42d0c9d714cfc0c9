"""Pictures of evaluations: what systems know, what they harm, how far gates open, how much fits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engram.plots.figure import COLOURS, new_figure, save_figure
from engram.plots.marks import literal

__all__ = ["plot_capacity", "plot_evaluation", "plot_gates", "plot_shares"]


def plot_evaluation(results: Mapping[str, Mapping[str, Any]], folder: str | Path) -> list[Path]:
    """Pictures of results of ``engram eval``, one colour per memory: recall by category, harm by kind of text, gates.

    Raises:
        ConfigError: matplotlib is missing.
    """
    shares = {name: result["categories"] for name, result in results.items()}
    paths = [plot_shares(shares, Path(folder) / "recall.png", "exact answers to taught prompts")]
    figure, axes = new_figure(2)
    for number, (name, result) in enumerate(results.items()):
        kinds = list(result["harm"])
        places = [i + 0.8 * number / len(results) for i in range(len(kinds))]
        changed = [100 * result["harm"][k]["tokens_changed"] / max(result["harm"][k]["tokens"], 1) for k in kinds]
        axes[0].bar(places, changed, 0.8 / len(results), label=literal(name), color=COLOURS[number % len(COLOURS)])
        axes[0].set_xticks(range(len(kinds)), list(map(literal, kinds)))
    axes[0].set(ylabel="next tokens changed, %", title="text it has no business with")
    axes[0].legend(frameon=False, fontsize=8)
    _draw_gates(axes[1], {name: result["gates"] for name, result in results.items()})
    return [*paths, save_figure(figure, Path(folder) / "harm_and_gates.png")]


def plot_shares(systems: Mapping[str, Mapping[str, Mapping[str, float]]], path: str | Path, title: str) -> Path:
    """Bars of exact answers per category and system with their 95 % intervals.

    Args:
        systems: ``{system: {category: {share, low, high}}}``.
        path: PNG file.
        title: heading.

    Raises:
        ConfigError: matplotlib is missing.
    """
    categories = list(dict.fromkeys(category for shares in systems.values() for category in shares))
    figure, (axis,) = new_figure(1, width=min(14.0, 1.2 * len(categories) * max(1, len(systems) / 3) + 3))
    width = 0.85 / max(len(systems), 1)
    for number, (name, shares) in enumerate(systems.items()):
        present = [(i, shares[c]) for i, c in enumerate(categories) if c in shares]
        heights = [100 * s["share"] for _, s in present]
        errors = [
            [max(0.0, 100 * (s["share"] - s["low"])) for _, s in present],
            [max(0.0, 100 * (s["high"] - s["share"])) for _, s in present],
        ]
        places = [i + number * width for i, _ in present]
        colour = COLOURS[number % len(COLOURS)]
        axis.bar(places, heights, width, yerr=errors, label=literal(name), color=colour, error_kw={"lw": 0.8})
    axis.set_xticks([i + 0.4 for i in range(len(categories))], list(map(literal, categories)), rotation=20, ha="right")
    axis.set(ylabel="exact answers, %", ylim=(0, 105), title=title)
    axis.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return save_figure(figure, Path(path))


def plot_capacity(points: Sequence[Mapping[str, Any]], path: str | Path) -> Path:
    """Recall and harm against the number of facts, one line per rows per head.

    Args:
        points: entries with ``facts``, ``rows_per_head``, ``recall`` and ``kl``.
        path: PNG file.

    Raises:
        ConfigError: matplotlib is missing.
    """
    figure, axes = new_figure(2)
    sizes = sorted({point["rows_per_head"] for point in points})
    for number, size in enumerate(sizes):
        line = sorted((p for p in points if p["rows_per_head"] == size), key=lambda p: p["facts"])
        style = {"label": f"{size:,} rows per head", "color": COLOURS[(number + 1) % len(COLOURS)], "marker": "o", "ms": 3}
        axes[0].plot([p["facts"] for p in line], [100 * p["recall"] for p in line], **style)
        axes[1].plot([p["facts"] for p in line], [p["kl"] for p in line], **style)
    axes[0].set(xlabel="facts", ylabel="exact answers, %", xscale="log", title="recall")
    axes[1].set(xlabel="facts", ylabel="KL to the base, nats per token", xscale="log", title="harm on other text")
    axes[1].set_yscale("symlog", linthresh=1e-5)
    axes[1].set_ylim(bottom=-2e-6)
    counts = sorted({point["facts"] for point in points})
    for axis in axes:
        axis.set_xticks(counts, [f"{count:,}" for count in counts])
        axis.minorticks_off()
    axes[0].legend(frameon=False, fontsize=8)
    return save_figure(figure, Path(path))


def plot_gates(gates: Mapping[str, Mapping[str, Sequence[int]]], path: str | Path) -> Path:
    """Histograms of gates for taught and untaught text.

    Args:
        gates: ``{memory: {"taught": counts, "untaught": counts}}``, bins over 0..1.
        path: PNG file.

    Raises:
        ConfigError: matplotlib is missing.
    """
    figure, (axis,) = new_figure(1)
    _draw_gates(axis, gates)
    return save_figure(figure, Path(path))


def _draw_gates(axis: Any, gates: Mapping[str, Mapping[str, Sequence[int]]]) -> None:
    for number, (name, kinds) in enumerate(gates.items()):
        for style, (kind, counts) in zip(("-", "--"), kinds.items()):
            total = max(sum(counts), 1)
            edges = [(i + 0.5) / len(counts) for i in range(len(counts))]
            colour = COLOURS[number % len(COLOURS)]
            axis.plot(edges, [c / total for c in counts], style, color=colour, label=literal(f"{name}, {kind}"))
    axis.set(xlabel="gate", ylabel="share of positions", title="gates (no row read: 0)", yscale="symlog")
    axis.set_yscale("symlog", linthresh=1e-3)
    axis.legend(frameon=False, fontsize=8)
