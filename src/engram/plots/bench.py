"""Pictures of `engram bench`: throughput against size, and where a layer's time goes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engram.plots.figure import COLOURS, new_figure, save_figure

__all__ = ["plot_bench", "plot_steps"]


def plot_bench(result: Mapping[str, Any], folder: str | Path, prefix: str = "bench") -> list[Path]:
    """A picture for each benchmark in the result.

    Args:
        result: what ``engram bench`` writes.
        folder: where the pictures go.
        prefix: how their names begin.

    Raises:
        ConfigError: matplotlib is missing.
    """
    return [_draw(benchmark, Path(folder) / f"{prefix}_{name}.png") for name, benchmark in result["benchmarks"].items()]


def plot_steps(entries: Sequence[Mapping[str, Any]], names: Mapping[str, str], path: str | Path) -> Path:
    """Seconds of a training step against the rows of a table, one line per kind of step.

    Args:
        entries: each with ``kind``, ``rows_per_layer`` and ``seconds`` (``median``, ``min``, ``max``).
        names: what to call the kinds; others are left out.
        path: PNG file.

    Raises:
        ConfigError: matplotlib is missing.
    """
    figure, (axis,) = new_figure(1, width=6.0)
    for number, (kind, name) in enumerate(names.items()):
        line = sorted((e for e in entries if e["kind"] == kind), key=lambda e: e["rows_per_layer"])
        rows, colour = [e["rows_per_layer"] for e in line], COLOURS[number % len(COLOURS)]
        axis.plot(rows, [e["seconds"]["median"] for e in line], marker="o", ms=3, color=colour, label=name)
        low, high = ([e["seconds"][key] for e in line] for key in ("min", "max"))
        axis.fill_between(rows, low, high, color=colour, alpha=0.15, lw=0)
    axis.set(xscale="log", yscale="log", xlabel="rows per layer", ylabel="seconds per step")
    axis.legend(frameon=False, fontsize=8)
    return save_figure(figure, Path(path))


def _draw(benchmark: Mapping[str, Any], path: Path) -> Path:
    sizes = [setting["size"] for setting in benchmark["settings"]]
    one_axis = len(set(sizes)) == len(sizes) > 2
    figure, (axis,) = new_figure(1, width=7.0)
    (_lines if one_axis else _bars)(axis, benchmark)
    axis.set_title(benchmark["title"], fontsize=10)
    return save_figure(figure, path)


def _lines(axis: Any, benchmark: Mapping[str, Any]) -> None:
    """Throughput against size, one line per alternative, quartiles shaded."""
    settings = benchmark["settings"]
    names = list(dict.fromkeys(name for setting in settings for name in setting["variants"]))
    for number, name in enumerate(names):
        present = [(s["size"], s["amount"], s["variants"][name]["seconds"]) for s in settings if name in s["variants"]]
        sizes = [size for size, _, _ in present]
        colour = COLOURS[number % len(COLOURS)]
        style = "--" if name.startswith("limit") else "-"
        axis.plot(sizes, [n / t["median"] for _, n, t in present], style, marker="o", ms=3, color=colour, label=name)
        low, high = ([n / t[key] for _, n, t in present] for key in ("high", "low"))
        axis.fill_between(sizes, low, high, color=colour, alpha=0.15, lw=0)
    axis.set(xscale="log", yscale="log", xlabel=benchmark["size"], ylabel=f"{benchmark['unit']} per second")
    axis.legend(frameon=False, fontsize=8)


def _bars(axis: Any, benchmark: Mapping[str, Any]) -> None:
    """Milliseconds per call, one group of bars per setting."""
    labels, heights, colours = [], [], []
    for number, setting in enumerate(benchmark["settings"]):
        for name, measured in setting["variants"].items():
            labels.append(f"{setting['label']}: {name}")
            heights.append(1e3 * measured["seconds"]["median"])
            colours.append(COLOURS[number % len(COLOURS)])
    axis.barh(range(len(labels)), heights, color=colours)
    axis.set_yticks(range(len(labels)), labels, fontsize=7)
    axis.invert_yaxis()
    axis.set(xscale="log", xlabel="milliseconds per call")
