"""How much of each table a text reads, and how often n-grams share a row; beside it what an even hash would give."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from engram.analysis.addresses import ngram_codes, rows_read
from engram.analysis.sample import Sample
from engram.errors import ConfigError

__all__ = ["expected_usage", "head_usage", "row_usage"]


def row_usage(memory: Any, sample: Sample) -> dict[str, Any]:
    """Usage and collisions of every head of every layer on a text.

    Returns:
        ``layers: {layer: {rows, used_rows, used_share, heads: [...]}}``; each head has its order and number, its rows, and what
        ``head_usage`` and ``expected_usage`` give.

    Raises:
        ConfigError: the memory has verified rows, of which none is shared.
    """
    config = memory.engram_config
    if config.verify_rows:
        raise ConfigError("rows: this memory's rows are verified: no n-gram reads another's, and only rows in use exist.")
    codes, layers = ngram_codes(memory, sample), {}
    for layer, rows in rows_read(memory, sample).items():
        heads = []
        for number, size in enumerate(memory.mapping.head_sizes(layer)):
            order, head = config.orders_of(layer)[number // config.n_head_per_ngram], number % config.n_head_per_ngram
            measured = head_usage(rows[:, number], codes[order], size)
            expected = expected_usage(size, measured["ngrams"])
            heads.append({"order": order, "head": head, "rows": size, **measured, "expected": expected})
        used, total = sum(head["used_rows"] for head in heads), sum(head["rows"] for head in heads)
        layers[str(layer)] = {"rows": total, "used_rows": used, "used_share": used / total, "heads": heads}
    return {"positions": sample.tokens, "layers": layers}


def head_usage(rows: np.ndarray, ngrams: np.ndarray, size: int) -> dict[str, Any]:
    """What one head read.

    Args:
        rows: row of each access, ``[T]``.
        ngrams: number of the n-gram behind each access, ``[T]``.
        size: rows of the head.

    Returns:
        ``ngrams`` (distinct), ``used_rows``, ``used_share``, ``ngrams_per_used_row``, ``sharing_ngrams`` (share of distinct n-grams whose
        row another one reads too) and ``sharing_accesses`` (the same, each n-gram as often as it occurs).
    """
    _, first, count = np.unique(ngrams, return_index=True, return_counts=True)
    used, place, owners = np.unique(rows[first], return_inverse=True, return_counts=True)
    shared = owners[place] > 1
    return {
        "ngrams": len(first),
        "used_rows": len(used),
        "used_share": len(used) / size,
        "ngrams_per_used_row": len(first) / len(used),
        "sharing_ngrams": float(shared.mean()),
        "sharing_accesses": float(count[shared].sum() / count.sum()),
    }


def expected_usage(size: int, ngrams: int) -> dict[str, float]:
    """What to expect if every n-gram drew its row evenly from ``size``: the occupancy problem.

    A row stays unused with probability ``(1 - 1/R)^D``, an n-gram is alone with probability ``(1 - 1/R)^(D - 1)``, however frequent it is.
    """
    empty = _power(size, ngrams)
    return {
        "used_rows": size * (1 - empty),
        "used_share": 1 - empty,
        "ngrams_per_used_row": ngrams / (size * (1 - empty)),
        "sharing": 1 - _power(size, ngrams - 1),
    }


def _power(size: int, exponent: int) -> float:
    """``(1 - 1/size) ** exponent`` without cancellation for large tables."""
    return math.exp(exponent * math.log1p(-1 / size)) if size > 1 else float(exponent == 0)
