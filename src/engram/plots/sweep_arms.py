"""Pictures of arms side by side: differences to a reference, places of one module, losses of alternatives."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engram.plots.figure import COLOURS, Picture, new_figure, save_figure
from engram.plots.marks import colour_of, draw_mean, draw_seeds, literal, points_of, tested

__all__ = ["layer_number", "plot_ablation", "plot_comparison", "without_memory"]

_LOSS = "test loss, nats per token"


def layer_number(label: str) -> int | None:
    """N of an arm named ``layer N``; None for other names."""
    match = re.fullmatch(r"layer\s*(\d+)", label)
    return int(match[1]) if match else None


def without_memory(points: Sequence[Mapping[str, Any]]) -> bool:
    """Whether an arm has no table at all."""
    return not points[0]["counts"]["table_rows"]


def plot_ablation(result: Mapping[str, Any], folder: Path, name: str, paper: Mapping[str, Any]) -> list[Picture]:
    """Differences to the reference for every setting, and a line over layers where arms are named ``layer N``."""
    pictures = []
    for number, (setting, arms) in enumerate(result["summary"].items()):
        points, stem = points_of(result, "arm", setting), name if not number else f"{name}_{number + 1}"
        of = "" if setting == "all" else f" ({setting})"
        if any(arm["against_reference"] for arm in arms.values()):
            pictures.append(_differences(arms, points, folder / f"{stem}.png", paper.get("ablation"), of))
        layers = {n: label for label in arms if (n := layer_number(label)) is not None}
        if len(layers) >= 2:
            pictures.append(
                _layers(arms, points, dict(sorted(layers.items())), folder / f"{stem}_layers.png", paper.get("ablation"), of)
            )
    return pictures


def _differences(
    arms: Mapping[str, Any],
    points: Mapping[str, Sequence[Mapping[str, Any]]],
    path: Path,
    theirs: Mapping[str, Any] | None,
    of: str,
) -> Picture:
    compared = sorted((arms[n]["against_reference"]["mean"], n) for n in arms if arms[n]["against_reference"])
    plain = [label for _, label in compared if without_memory(points[label])]
    shown = [label for _, label in compared if label not in plain]
    figure, axes = new_figure(
        bool(theirs) + bool(shown) + bool(plain), width=12.0 if theirs else 8.0, height=1.6 + 0.28 * max(len(shown), 6)
    )
    ratios = [2.0] * bool(theirs) + [3.0] * bool(shown) + [1.8] * bool(plain)
    axes[0].get_gridspec().set_width_ratios(ratios)
    if theirs:
        _paper_differences(axes[0], theirs)
    for labels, axis, colour, title in (
        (shown, axes[int(bool(theirs))], colour_of(1), "this work"),
        (plain, axes[-1], COLOURS[0], "without memory"),
    ):
        for place, label in enumerate(labels):
            draw_mean(axis, place, arms[label]["against_reference"], colour, flat=True)
        if labels:
            _named(axis, labels, "nats" if labels is plain else "difference to the reference, nats", title)
    beside = "Left: the paper's figures, in order of size. " if theirs else ""
    caption = (
        f"{beside}Difference of test losses to the reference{of}, seed by seed, with 95 % intervals; right of zero: the change makes it worse."
        f"{' Arms without memory have an axis of their own.' if plain else ''}"
    )
    return Picture(save_figure(figure, path), caption)


def _named(axis: Any, labels: Sequence[str], xlabel: str, title: str) -> None:
    axis.axvline(0, color="#333333", lw=0.8)
    axis.set_yticks(range(len(labels)), [literal(label) for label in labels], fontsize=8)
    axis.set_ylim(-0.6, len(labels) - 0.4)
    axis.set(xlabel=xlabel)
    axis.set_title(title, fontsize=9)
    axis.locator_params(axis="x", nbins=5)


def _paper_differences(axis: Any, theirs: Mapping[str, Any]) -> None:
    found = {f"one module, layer {n}": loss - theirs["reference"] for n, loss in theirs["layers"].items()}
    found |= dict(theirs["changes"].values())
    ordered = sorted(found, key=lambda name: found[name])
    axis.plot([found[name] for name in ordered], range(len(ordered)), "o", ms=5, color="#333333")
    _named(axis, ordered, "nats", f"the paper ({theirs['none'] - theirs['reference']:+.3f} without memory)")


def _layers(
    arms: Mapping[str, Any],
    points: Mapping[str, Sequence[Mapping[str, Any]]],
    layers: Mapping[int, str],
    path: Path,
    theirs: Mapping[str, Any] | None,
    of: str,
) -> Picture:
    figure, axes = new_figure(1 + bool(theirs), width=4.8 * (1 + bool(theirs)))
    if theirs:
        numbers, losses = zip(*sorted(theirs["layers"].items()))
        axes[0].plot(numbers, losses, "o-", ms=5, lw=1, color="#333333", label="one module")
        _level(axes[0], theirs["none"], COLOURS[0], "no memory")
        _level(axes[0], theirs["reference"], colour_of(0), "reference")
        axes[0].set(xlabel="layer", ylabel="validation loss", title="the paper")
    axis = axes[-1]
    axis.plot(
        list(layers),
        [arms[label]["loss"]["mean"] for label in layers.values()],
        "-",
        lw=1,
        color=colour_of(1),
        label="one module",
    )
    for number, label in layers.items():
        draw_seeds(axis, number, tested(points[label]), colour_of(1))
        draw_mean(axis, number, arms[label]["loss"], colour_of(1))
    for label, members in points.items():
        if without_memory(members):
            _level(axis, arms[label]["loss"]["mean"], COLOURS[0], label)
        elif label == "reference":
            _level(axis, arms[label]["loss"]["mean"], colour_of(0), label)
    axis.set(xlabel="layer, as its arm is named", ylabel=_LOSS, title="this work", xticks=list(layers))
    for each in axes:
        each.legend(frameon=False, fontsize=8)
    caption = f"{'Left: the paper. ' if theirs else ''}Loss with one module by its layer{of}, with 95 % intervals."
    return Picture(save_figure(figure, path), caption)


def _level(axis: Any, value: float, colour: str, label: str) -> None:
    axis.axhline(value, ls="--", lw=1, color=colour, label=literal(label))


def plot_comparison(result: Mapping[str, Any], folder: Path, name: str, paper: Mapping[str, Any]) -> list[Picture]:
    """Losses of all arms, one picture for each setting."""
    pictures = []
    for number, (setting, arms) in enumerate(result["summary"].items()):
        points = points_of(result, "arm", setting)
        ordered = sorted(arms, key=lambda label: -arms[label]["loss"]["mean"])
        figure, (axis,) = new_figure(1, width=7.5, height=1.4 + 0.35 * len(ordered))
        for place, label in enumerate(ordered):
            colour = COLOURS[0] if without_memory(points[label]) else colour_of(1)
            draw_seeds(axis, place, tested(points[label]), colour, flat=True)
            draw_mean(axis, place, arms[label]["loss"], colour, flat=True)
        axis.set_yticks(range(len(ordered)), [literal(label) for label in ordered], fontsize=8)
        axis.set(xlabel=_LOSS, ylim=(-0.6, len(ordered) - 0.4), title="" if setting == "all" else literal(setting))
        path = folder / (f"{name}.png" if not number else f"{name}_{number + 1}.png")
        caption = "Test loss of every arm with 95 % intervals; faint: single seeds; grey: without memory."
        pictures.append(Picture(save_figure(figure, path), caption))
    return pictures
