"""Pictures of several trainings: looks inside seed by seed, and what is left when the memory is switched off."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engram.experiments.seed_evidence import LOOKS, arms_of
from engram.experiments.statistics import mean_interval
from engram.plots.figure import COLOURS, Picture, new_figure, save_figure
from engram.plots.look import PHRASE_PLACES
from engram.plots.marks import colour_of, draw_mean, literal
from engram.plots.report_seeds import KEPT_GROUPS, kept_interval

__all__ = ["plot_looks_by_seed", "plot_memory_off"]


def plot_looks_by_seed(entries: Sequence[Mapping[str, Any]], path: Path) -> Picture:
    """Logit lens, soft alignment and gates at ends of phrases, a line for each seed.

    Args:
        entries: as ``benchmarks/looks.py`` writes them.
        path: PNG file.

    Raises:
        ConfigError: matplotlib is missing.
    """
    looks = [entry[LOOKS] for entry in entries]
    figure, axes = new_figure(3, width=13.0)
    for number, look in enumerate(looks):
        for name, colour in (("memory", colour_of(1)), ("without", COLOURS[0])):
            label = None if number else {"memory": "with memory", "without": "without"}[name]
            curve = look["logit_lens"][name][:-1]
            axes[0].plot(range(len(curve)), curve, marker="o", ms=2.5, lw=1, color=colour, label=label)
            if name in look["cka"]:
                index = look["cka"][name]["soft_alignment"]
                axes[1].plot(range(len(index)), index, marker="o", ms=2.5, lw=1, color=colour, label=label)
    axes[0].set(xlabel="after block", ylabel="KL(final || lens), nats per token", title="logit lens", yscale="log")
    axes[1].set(xlabel="block", ylabel="soft alignment index", title="most similar blocks of a model without")
    _draw_phrases(axes[2], looks)
    for axis in axes:
        axis.legend(frameon=False, fontsize=8)
    caption = (
        "By seed: divergence of what the model would say after each block from what it says in the end; where the blocks of another seed's "
        "model without a memory stand that are most similar (grey: to a model without one); gates where phrases end, with 95 % intervals "
        "over seeds."
    )
    return Picture(save_figure(figure, path), caption)


def _draw_phrases(axis: Any, looks: Sequence[Mapping[str, Any]]) -> None:
    layers = list(looks[0]["phrases"]["layers"])
    for number, (place, label) in enumerate(PHRASE_PLACES.items()):
        for row, layer in enumerate(layers):
            values = [look["phrases"]["layers"][layer][place]["mean"] for look in looks]
            if None not in values:
                named = None if row else label
                draw_mean(axis, row + 0.15 * (number - 1.5), mean_interval(values), colour_of(number), flat=True, label=named)
    axis.set_yticks(range(len(layers)), [f"layer {layer}" for layer in layers])
    axis.set(xlabel="gate", xlim=(0, 1), ylim=(len(layers) - 0.5, -0.5), title="gates where words end")


def plot_memory_off(result: Mapping[str, Any], path: Path) -> Picture:
    """What is kept of exact answers with the memory off, by arm; and facts with it on and off as training goes on.

    Args:
        result: as ``benchmarks/memory_off.py`` writes it.
        path: PNG file.

    Raises:
        ConfigError: matplotlib is missing.
    """
    figure, axes = new_figure(2, width=11.0, height=3.6)
    arms = arms_of(result)
    for number, (arm, found) in enumerate(arms.items()):
        for row, group in enumerate(KEPT_GROUPS):
            share = kept_interval(found, group)
            if share is not None:
                in_percent = {key: None if value is None else 100 * value for key, value in share.items()}
                draw_mean(axes[0], row + 0.2 * (number - 1), in_percent, colour_of(number), flat=True)
        axes[1].plot([], [], color=colour_of(number), label=literal(arm))
        for entry in result["entries"]:
            if entry["arm"] == arm and entry["curve"]:
                for state, style in (("on", "-"), ("off", "--")):
                    points = [(point["step"], 100 * point[state]["facts"]) for point in entry["curve"]]
                    axes[1].plot(*zip(*points), style, lw=1, color=colour_of(number))
    axes[0].set_yticks(range(len(KEPT_GROUPS)), list(KEPT_GROUPS))
    axes[0].set(xlabel="exact answers kept with the memory off, %", ylim=(len(KEPT_GROUPS) - 0.5, -0.5))
    axes[0].axvline(100, color="#333333", lw=0.6)
    axes[1].legend(frameon=False, fontsize=8)
    axes[1].set(xlabel="step", ylabel="facts answered exactly, %", title="memory on: full lines; off: dashed")
    caption = (
        "Left: exact answers with the memory off as a share of those with it on, with 95 % intervals over seeds. Right: facts while they are "
        "learnt, a line for each seed."
    )
    return Picture(save_figure(figure, path), caption)
