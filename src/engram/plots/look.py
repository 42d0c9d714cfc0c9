"""Pictures of `engram look`, drawn from its result alone."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from engram.plots.figure import COLOURS, new_figure, save_figure

__all__ = ["PHRASE_COLUMNS", "PHRASE_PLACES", "named_subjects", "plot_look"]

PHRASE_PLACES = {
    "begins": "end of a phrase's first word",
    "completes": "end of a phrase",
    "same_word": "its last word elsewhere",
    "other": "end of another word",
}
"""What the places of ``phrase_gates`` are called."""
PHRASE_COLUMNS = {
    **PHRASE_PLACES,
    "completes_less_begins": "end less first word",
    "completes_less_same_word": "end less same word elsewhere",
    "completes_less_other": "end less other words",
}
"""The same with their differences."""

_LABEL_LENGTH = 34
_BARS = 12


def plot_look(result: Mapping[str, Any], folder: str | Path) -> dict[str, list[Path]]:
    """PNGs of every analysis in the result of ``engram look``, by the analysis's name.

    Raises:
        ConfigError: matplotlib is missing.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # tokens may be of any script
        shown = named_subjects(result)
        return {name: draw(shown[name], Path(folder)) for name, draw in _DRAWERS.items() if name in shown}


def named_subjects(result: Mapping[str, Any]) -> Mapping[str, Any]:
    """The result with the models under their own names, where the lens's curves are told apart."""
    if "logit_lens" not in result:
        return result
    lens = result["logit_lens"]
    names: dict[str, str] = {}
    for key in lens["subjects"]:
        name = result[key] if key in ("model", "against") else key
        names[key] = f"{name} ({key})" if name in names.values() else name
    parts = {part: {names[key]: curve for key, curve in lens[part].items()} for part in ("subjects", "difference")}
    return {**result, "logit_lens": {**lens, **parts, "reference": names[lens["reference"]]}}


def _gates(result: Mapping[str, Any], folder: Path) -> list[Path]:
    paths = []
    if result["texts"]:
        paths.append(_gate_map(result["texts"], folder / "gates.png"))
    layers = list(next(iter(result["kinds"].values())))
    figure, axes = new_figure(len(layers), width=max(5.0, 4.2 * len(layers)))
    for axis, layer in zip(axes, layers):
        for number, (kind, by_layer) in enumerate(result["kinds"].items()):
            counts, read = by_layer[layer]["histogram"], sum(by_layer[layer]["histogram"])
            if read:
                places = [(i + 0.5) / len(counts) for i in range(len(counts))]
                axis.plot(places, [c / read for c in counts], color=_colour(number), label=_safe(kind), lw=1)
        axis.set(xlabel="gate", ylabel="share of positions that read", title=f"layer {layer}", xlim=(0, 1), ylim=(0, None))
        if axis.lines:
            axis.legend(frameon=False, fontsize=8)
    return [*paths, save_figure(figure, folder / "gate_distributions.png")]


def _gate_map(texts: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """The paper's figure 7: tokens from left to right, one line per layer, red where the gate is open (mean over streams)."""
    longest = max(len(text["tokens"]) for text in texts)
    layers = len(texts[0]["tokens"][0]["layers"])
    figure, axes = new_figure(
        len(texts), width=max(6.0, 0.26 * longest + 1.5), height=(1.2 + 0.25 * layers) * len(texts), stacked=True
    )
    for axis, text in zip(axes, texts):
        shown = [
            [_mean(token["layers"][i]["gate"]) if token["layers"][i]["written"] else 0.0 for token in text["tokens"]]
            for i in range(layers)
        ]
        image = axis.imshow(shown, cmap="Reds", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        axis.set_xticks(
            range(len(text["tokens"])), [_safe(token["token"]) for token in text["tokens"]], rotation=90, fontsize=7
        )
        axis.set_yticks(range(layers), [f"layer {entry['layer_id']}" for entry in text["tokens"][0]["layers"]], fontsize=7)
        axis.set_title(_safe(text["kind"]), fontsize=8, loc="left")
        axis.set_xlim(-0.5, longest - 0.5)
        axis.tick_params(length=0)
    figure.colorbar(image, ax=list(axes), label="gate", shrink=0.6)
    return save_figure(figure, path)


def _phrases(result: Mapping[str, Any], folder: Path) -> list[Path]:
    """Mean gates where phrases begin and complete and where other words end, layer by layer."""
    figure, (axis,) = new_figure(1, width=6.0, height=1.4 + 0.5 * len(result["layers"]))
    for number, (place, label) in enumerate(PHRASE_PLACES.items()):
        entries = [layer[place] for layer in result["layers"].values()]
        _intervals(axis, [row + 0.2 * (number - 1.5) for row in range(len(entries))], entries, label, number)
    axis.set_yticks(range(len(result["layers"])), [f"layer {layer}" for layer in result["layers"]])
    axis.set(xlabel="gate", xlim=(0, 1), ylim=(len(result["layers"]) - 0.5, -0.5))
    axis.legend(frameon=False, fontsize=8)
    return [save_figure(figure, folder / "phrases.png")]


def _logit_lens(result: Mapping[str, Any], folder: Path) -> list[Path]:
    figure, axes = new_figure(2 if result["difference"] else 1)
    for number, (name, curve) in enumerate(result["subjects"].items()):
        shown = [p for p in curve[:-1] if p["mean"] > 0]  # after the last block it is zero by definition
        _band(axes[0], [p["layer"] for p in shown], shown, name, _colour(number + 1))
    axes[0].set(xlabel="after block", ylabel="KL(final || lens), nats per token", title="logit lens", yscale="log")
    axes[0].legend(frameon=False, fontsize=8)
    if result["difference"]:
        for number, (name, curve) in enumerate(result["difference"].items()):
            _band(axes[1], [p["layer"] for p in curve], curve, name, _colour(number + 2))
        axes[1].axhline(0, color="#333333", lw=0.6)
        axes[1].set(xlabel="after block", ylabel="nats per token", title=_safe(f"difference from {result['reference']}"))
        axes[1].legend(frameon=False, fontsize=8)
    for axis in axes:
        axis.set_xticks(range(max(len(curve) for curve in result["subjects"].values())))
    return [save_figure(figure, folder / "logit_lens.png")]


def _cka(result: Mapping[str, Any], folder: Path) -> list[Path]:
    figure, (axis,) = new_figure(1, width=5.2, height=4.4)
    image = axis.imshow(result["map"], cmap="magma", vmin=0, vmax=1, origin="lower", interpolation="nearest")
    axis.plot(result["soft_alignment"], range(len(result["map"])), "w--", lw=1.4, label="soft alignment")
    axis.set(xlabel=_safe(f"block of {result['b']}"), ylabel=_safe(f"block of {result['a']}"), title="linear CKA, unbiased")
    axis.legend(frameon=False, fontsize=8, labelcolor="white", loc="upper left")
    figure.colorbar(image, ax=axis)
    return [save_figure(figure, folder / "cka.png")]


def _memory_off(result: Mapping[str, Any], folder: Path) -> list[Path]:
    groups = {"all": result["all"], **result["by_kind"], **{f"token: {name}": g for name, g in result["by_token"].items()}}
    figure, axes = new_figure(2, width=10.0, height=1.2 + 0.3 * len(groups))
    places = range(len(groups))
    for number, (key, label) in enumerate((("loss_on", "memory on"), ("loss_off", "memory off"))):
        _intervals(axes[0], [place + 0.2 * number for place in places], [g[key] for g in groups.values()], label, 1 - number)
    for number, (key, label) in enumerate((("gain_kept", "gain over guessing kept"), ("accuracy_kept", "accuracy kept"))):
        entries = [{k: None if v is None else 100 * v for k, v in g[key].items()} for g in groups.values()]
        _intervals(axes[1], [place + 0.2 * number for place in places], entries, label, number + 2)
    axes[0].set(xlabel="loss, nats per token")
    axes[1].set(xlabel="kept with the memory off, %")
    axes[1].axvline(100, color="#333333", lw=0.6)
    for axis in axes:
        axis.set_yticks(list(places), [_safe(name) for name in groups], fontsize=8)
        axis.invert_yaxis()
        axis.legend(frameon=False, fontsize=8)
    return [save_figure(figure, folder / "memory_off.png")]


def _rows(result: Mapping[str, Any], folder: Path) -> list[Path]:
    figure, axes = new_figure(3, width=13.0)
    measures = (
        ("used_share", "used_share", "rows ever read, %", 100),
        ("sharing_accesses", "sharing", "accesses to a row of several n-grams, %", 100),
        ("ngrams_per_used_row", "ngrams_per_used_row", "n-grams per used row", 1),
    )
    for axis, (key, expected, label, factor) in zip(axes, measures):
        ticks: list[str] = []
        for number, (layer, entry) in enumerate(result["layers"].items()):
            heads = entry["heads"]
            places = range(len(ticks), len(ticks) + len(heads))
            axis.bar(places, [factor * h[key] for h in heads], color=_colour(number + 1), label=f"layer {layer}")
            uniform = [factor * h["expected"][expected] for h in heads]
            axis.plot(places, uniform, "_", color="#222222", ms=7, label=None if number else "even hash")
            ticks += [f"{h['order']}.{h['head']}" for h in heads]
        axis.set_xticks(range(len(ticks)), ticks, rotation=90, fontsize=6)
        axis.set(xlabel="order.head", ylabel=label)
    axes[0].legend(frameon=False, fontsize=8)
    return [save_figure(figure, folder / "rows.png")]


def _zipf(result: Mapping[str, Any], folder: Path) -> list[Path]:
    figure, axes = new_figure(2, width=11.0, height=4.0)
    for number, (layer, entry) in enumerate(result["layers"].items()):
        if not entry["accesses"]:
            continue
        colour, fit = _colour(number + 1), entry["fit"]
        label = f"layer {layer}" + ("" if fit["exponent"] is None else f", exponent {fit['exponent']:.2f}")
        axes[0].plot(entry["rank"], entry["frequency"], color=colour, label=label)
        if fit["exponent"] is not None:
            ends = [1, fit["ranks"]]
            axes[0].plot(ends, [fit["factor"] * rank ** -fit["exponent"] for rank in ends], "--", color=colour, lw=0.8)
        cache = entry["cache"]
        axes[1].plot(cache["rows"], [100 * x for x in cache["lfu"]], color=colour, label=f"layer {layer}, most frequent rows")
        axes[1].plot(cache["rows"], [100 * x for x in cache["lru"]], "--", color=colour, label=f"layer {layer}, LRU")
    axes[0].set(xscale="log", yscale="log", xlabel="rank of a row", ylabel="accesses")
    axes[1].set(xscale="log", xlabel="rows in the cache", ylabel="hit rate, %", ylim=(0, 100))
    size = result["row_bytes"]
    upper = axes[1].secondary_xaxis("top", functions=(lambda rows: rows * size, lambda count: count / size))
    upper.set_xlabel("bytes")
    for axis in axes:
        if axis.lines:
            axis.legend(frameon=False, fontsize=8)
    return [save_figure(figure, folder / "zipf.png")]


def _gains(result: Mapping[str, Any], folder: Path) -> list[Path]:
    gained, lost = result["top_gains"][:_BARS], result["top_losses"][:_BARS]
    figure, axes = new_figure(2, width=11.0, height=1.0 + 0.28 * max(len(gained), len(lost), 3))
    for axis, entries, colour, title in ((axes[0], gained, "#2f6db5", "gain most"), (axes[1], lost, "#c62f2d", "lose most")):
        axis.barh(range(len(entries)), [entry["bits"] for entry in entries], color=colour)
        labels = [f"{_safe(entry['ngram'])} → {_safe(entry['next'])} ({entry['count']})" for entry in entries]
        axis.set_yticks(range(len(entries)), labels, fontsize=7)
        axis.invert_yaxis()
        axis.set(xlabel="bits in all", title=title)
    return [save_figure(figure, folder / "gains.png")]


_DRAWERS: dict[str, Callable[[Mapping[str, Any], Path], list[Path]]] = {
    "gates": _gates,
    "phrases": _phrases,
    "logit_lens": _logit_lens,
    "cka": _cka,
    "memory_off": _memory_off,
    "rows": _rows,
    "zipf": _zipf,
    "gains": _gains,
}


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _safe(text: str) -> str:
    """One line that matplotlib takes literally."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    shown = shown.replace("$", r"\$")
    return shown if len(shown) <= _LABEL_LENGTH else "…" + shown[-_LABEL_LENGTH:]


def _band(axis: Any, x: Sequence[float], points: Sequence[Mapping[str, Any]], label: str, colour: str) -> None:
    """A line of means with the interval shaded."""
    axis.plot(x, [p["mean"] for p in points], marker="o", ms=3, color=colour, label=_safe(label))
    if all(p["low"] is not None for p in points):
        axis.fill_between(x, [p["low"] for p in points], [p["high"] for p in points], color=colour, alpha=0.2, lw=0)


def _intervals(axis: Any, places: Sequence[float], entries: Sequence[Mapping[str, Any]], label: str, colour: int) -> None:
    """Points with horizontal bars for their intervals; what has no value is left out."""
    known = [(place, e) for place, e in zip(places, entries) if e["mean"] is not None]
    low = [max(0.0, e["mean"] - e["low"]) if e["low"] is not None else 0.0 for _, e in known]
    high = [max(0.0, e["high"] - e["mean"]) if e["high"] is not None else 0.0 for _, e in known]
    axis.errorbar(
        [e["mean"] for _, e in known],
        [p for p, _ in known],
        xerr=[low, high],
        fmt="o",
        ms=4,
        lw=1,
        color=_colour(colour),
        label=label,
    )
