"""How far a memory's gates open: token by token for a few texts, and as distributions by kind of text."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from engram.analysis.sample import Progress, Sample, Window, iter_batches
from engram.analysis.subject import Subject
from engram.tables import ABSENT

__all__ = ["gates", "gates_and_reads"]

_BINS = 50
_SHOWN = 4
_SHOWN_TOKENS = 48
_QUANTILES = {"p5": 5, "p25": 25, "median": 50, "p75": 75, "p95": 95}


@torch.no_grad()
def gates(memory: Any, sample: Sample, tokenizer: Any, shown: int = _SHOWN, progress: Progress | None = None) -> dict[str, Any]:
    """Gates of every layer on a text.

    Args:
        memory: an ``EngramModel``.
        sample: the text.
        tokenizer: makes text of tokens.
        shown: how many windows are given token by token: the first of each kind in turn, their first tokens.
        progress: told of tokens done.

    Returns:
        ``texts: [{kind, tokens: [{token, layers: [{layer_id, gate, written}]}]}]``, one gate per residual stream, and
        ``kinds: {kind: {layer: {positions, read, mean, p5 ... p95, open, histogram}}}`` over all streams of the positions that read
        something; ``open`` is the share above one half, ``histogram`` counts 50 equal bins from 0 to 1. The leading token of a
        window is left out.
    """
    wanted = _first_of_each_kind(sample, shown)
    collected: dict[tuple[str, int], list[np.ndarray]] = {}
    positions: dict[tuple[str, int], int] = {}
    texts: dict[int, dict[str, Any]] = {}
    subject = Subject("memory", memory)
    for batch in iter_batches(sample, subject.vocab_size, progress):
        with memory.record() as recorded:
            subject.run(batch.ids, batch.mask)
        layers = {layer: gates_and_reads(recorded[layer]) for layer in memory.engram_config.layer_ids}
        for row, place in enumerate(batch.places):
            window = sample.windows[place]
            for layer, (gate, read) in layers.items():
                key, length = (window.kind, layer), len(window.ids)
                own = gate[row, 1:length][read[row, 1:length]]
                collected.setdefault(key, []).append(own.reshape(-1))
                positions[key] = positions.get(key, 0) + length - 1
            if place in wanted:
                texts[place] = _text(
                    window, {layer: (gate[row], read[row]) for layer, (gate, read) in layers.items()}, tokenizer
                )
    kinds: dict[str, dict[str, Any]] = {kind: {} for kind in sample.kinds}
    streams = memory.engram_config.hc_mult or 1
    for (kind, layer), parts in collected.items():
        values = np.concatenate(parts)
        kinds[kind][str(layer)] = {
            "positions": positions[(kind, layer)],
            "read": len(values) // streams,
            **_distribution(values),
        }
    return {"texts": [texts[place] for place in wanted], "kinds": kinds, "bins": _BINS, "streams": streams}


def gates_and_reads(recorded: dict[str, torch.Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """Gates ``[B, T, M]``, and whether positions read anything ``[B, T]``."""
    gate = recorded["gate"].float().cpu().numpy()
    if "slots" in recorded:
        return gate, (recorded["slots"] != ABSENT).any(dim=-1).cpu().numpy()
    return gate, np.ones(gate.shape[:2], dtype=bool)


def _distribution(values: np.ndarray) -> dict[str, Any]:
    if not len(values):
        return {"mean": None, **dict.fromkeys(_QUANTILES), "open": None, "histogram": [0] * _BINS}
    quantiles = np.percentile(values, list(_QUANTILES.values()))
    return {
        "mean": float(values.mean(dtype=float)),
        **{name: float(value) for name, value in zip(_QUANTILES, quantiles)},
        "open": float((values > 0.5).mean()),
        "histogram": np.histogram(values, bins=_BINS, range=(0.0, 1.0))[0].tolist(),
    }


def _text(window: Window, layers: dict[int, tuple[np.ndarray, np.ndarray]], tokenizer: Any) -> dict[str, Any]:
    tokens = [
        {
            "token": tokenizer.decode([window.ids[t]]),
            "layers": [
                {"layer_id": layer, "gate": [round(float(g), 4) for g in gate[t]], "written": bool(read[t])}
                for layer, (gate, read) in layers.items()
            ],
        }
        for t in range(1, min(len(window.ids), _SHOWN_TOKENS + 1))
    ]
    return {"kind": window.kind, "tokens": tokens}


def _first_of_each_kind(sample: Sample, shown: int) -> list[int]:
    """Places of ``shown`` windows: the first of every kind, then the second of every kind, and so on."""
    queues = {kind: [i for i, window in enumerate(sample.windows) if window.kind == kind] for kind in sample.kinds}
    longest = max(map(len, queues.values()))
    in_turn = [queue[turn] for turn in range(longest) for queue in queues.values() if turn < len(queue)]
    return in_turn[:shown]
