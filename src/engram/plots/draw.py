"""Pictures of any result file, by its kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from engram.plots.bench import plot_bench
from engram.plots.evaluation import plot_evaluation, plot_shares
from engram.plots.figure import COLOURS, Picture, new_figure, save_figure
from engram.plots.look import plot_look
from engram.plots.marks import colour_of, literal
from engram.plots.results import COPYING, SHARE, ResultFile, reading, recall_interval
from engram.plots.seeds import plot_looks_by_seed, plot_memory_off
from engram.plots.sweep import plot_sweep

__all__ = ["draw_result", "plot_copying", "plot_recall", "plot_throughput"]

_LOOKS = {
    "gates": "How far the memory is let in, by token and layer, and how often how far by kind of text. White: closed. Dark red: open.",
    "phrases": "Gates where the phrases that were named begin and end, at their last words elsewhere, and where other words end.",
    "logit_lens": "Divergence of what the model would say after each block from what it says in the end, with 95 % intervals over documents.",
    "cka": "Similarity of layers (linear CKA, unbiased); dashed: the soft alignment index.",
    "memory_off": "Losses with the trained memory on and off, and what is kept, by kind of text and of token.",
    "rows": "What each head of each layer read; black marks: what an even hash would give.",
    "zipf": "Accesses by rank of a row, and hit rates of caches of every size.",
    "gains": "The n-grams after which most bits were won and lost.",
}


def draw_result(file: ResultFile, folder: Path, paper: Mapping[str, Any] | None = None) -> list[Picture]:
    """Draw one result into a folder.

    Args:
        file: the result.
        folder: of the pictures; those of looks and evaluations are below it, in one named as the result.
        paper: what the paper measured, to be drawn beside sweeps.

    Raises:
        ConfigError: matplotlib is missing.
        DataError: the result lacks something that its kind has.
    """
    with reading(f"result {file.name} ({file.kind})"):
        if file.is_sweep:
            return plot_sweep(file.data, folder, file.name, paper)
        return _DRAWERS[file.kind](file, folder)


def plot_recall(models: Mapping[str, Mapping[str, Any]], path: Path) -> Picture:
    """Exact answers by kind of question and length of text, one colour per model, with intervals over seeds where there are several.

    Args:
        models: as ``pool_recall`` gives them.
        path: PNG file.

    Raises:
        ConfigError: matplotlib is missing.
    """
    systems = {
        name.replace("_", " "): {f"{s['kind']}, {s['length']}".replace("_", " "): s for s in model["scores"]}
        for name, model in models.items()
    }
    plot_shares(systems, path, "exact answers in long text, by question and tokens")
    return Picture(path, f"Exact answers in long text, all seeds together, with 95 % intervals ({recall_interval(models)}).")


def plot_copying(entries: Sequence[Mapping[str, Any]], path: Path) -> Picture:
    """Copying and held-out loss on the way of training, a line for each run: grey without a memory, coloured with one.

    Args:
        entries: as ``benchmarks/copying.py`` writes them.
        path: PNG file.

    Raises:
        ConfigError: matplotlib is missing.
    """
    figure, axes = new_figure(2)
    runs: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for entry in entries:
        runs.setdefault((entry["model"], entry["seed"]), []).append(entry)
    named: set[str] = set()
    for (model, _), run in runs.items():
        run = sorted(run, key=lambda entry: entry["tokens"])
        style = {"color": COLOURS[0] if model == "dense" else colour_of(0), "lw": 1.2, "marker": "o", "ms": 2.5}
        label = None if model in named else {"dense": "without memory", "engram": "with memory"}.get(model, literal(model))
        named.add(model)
        for axis, key in zip(axes, (COPYING, "held_out_loss")):
            axis.plot([entry["tokens"] / 1e6 for entry in run], [entry[key] for entry in run], label=label, **style)
    axes[0].set(xlabel="tokens of training, millions", ylabel="nats per token saved by a second showing")
    axes[1].set(xlabel="tokens of training, millions", ylabel="held-out loss, nats per token")
    axes[0].legend(frameon=False)
    caption = "What random tokens cost less when shown again in one context, and held-out loss, as training goes on; a line for each run."
    return Picture(save_figure(figure, path), caption)


def plot_throughput(entries: Sequence[Mapping[str, Any]], path: Path) -> Picture:
    """Throughput of training with a memory as a share of that without: medians, and the range over rounds.

    Args:
        entries: as ``benchmarks/throughput.py`` writes them.
        path: PNG file.

    Raises:
        ConfigError: matplotlib is missing.
    """
    figure, (axis,) = new_figure(1, width=7.5, height=1.2 + 0.4 * len(entries))
    for place, entry in enumerate(reversed(entries)):
        share = entry[SHARE]["throughput"]
        axis.plot([100 * share["min"], 100 * share["max"]], [place, place], "-", lw=1, color=colour_of(1))
        axis.plot(100 * share["median"], place, "o", color=colour_of(1))
    names = [f"{e['backbone']}, {e['optimizer']}, {e['table_rows']:,} rows" for e in reversed(entries)]
    axis.set_yticks(range(len(entries)), [literal(name) for name in names], fontsize=8)
    axis.axvline(100, color="#333333", lw=0.8)
    axis.set(xlabel="tokens per second with a memory, % of those without", ylim=(-0.6, len(entries) - 0.4))
    caption = "Training throughput with a memory, as a share of the same backbone's without: median and range over rounds."
    return Picture(save_figure(figure, path), caption)


def _look(file: ResultFile, folder: Path) -> list[Picture]:
    drawn = plot_look(file.data, folder / file.name)
    return [Picture(path, _LOOKS.get(name, name)) for name, paths in drawn.items() for path in paths]


def _bench(file: ResultFile, folder: Path) -> list[Picture]:
    return [
        Picture(path, benchmark["title"])
        for path, benchmark in zip(plot_bench(file.data, folder, file.name), file.data["benchmarks"].values())
    ]


def _evaluation(file: ResultFile, folder: Path) -> list[Picture]:
    return [Picture(path, path.stem.replace("_", " ")) for path in plot_evaluation({file.name: file.data}, folder / file.name)]


_DRAWERS: dict[str, Callable[[ResultFile, Path], list[Picture]]] = {
    "bench": _bench,
    "copying": lambda file, folder: [plot_copying(file.data["entries"], folder / f"{file.name}.png")],
    "corpus": lambda file, folder: [],  # the report tells it in words
    "ngram_counts": lambda file, folder: [],  # in words too
    "eval": _evaluation,
    "look": _look,
    "looks": lambda file, folder: [plot_looks_by_seed(file.data["entries"], folder / f"{file.name}.png")],
    "memory_off": lambda file, folder: [plot_memory_off(file.data, folder / f"{file.name}.png")],
    "long_context": lambda file, folder: [plot_recall(file.data["models"], folder / f"{file.name}.png")],
    "throughput": lambda file, folder: [plot_throughput(file.data["entries"], folder / f"{file.name}.png")],
}
