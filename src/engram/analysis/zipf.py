"""How unevenly rows are read, and what a cache of any size would catch."""

from __future__ import annotations

from typing import Any

import numpy as np

from engram.analysis.addresses import NOTHING, rows_read
from engram.analysis.sample import Sample
from engram.tables import row_format

__all__ = ["fit_zipf", "reuse_distances", "row_zipf"]

_POINTS = 120
_FEWEST = 5  # rarer rows are ties and their ranks chance
_TARGETS = (0.5, 0.8, 0.9, 0.95)


def row_zipf(memory: Any, sample: Sample) -> dict[str, Any]:
    """Frequency by rank and hit rates of caches, for the accesses of each layer in the order of the text, head by head.

    ``lfu`` is the best that a fixed choice can do: the most frequent rows of this very text are there from the beginning. ``lru`` keeps
    what was read last, starts empty and is simulated exactly.

    Returns:
        ``row_bytes`` and ``layers: {layer: {accesses, rows_read, rank, frequency, fit, cache: {rows, bytes, lfu, lru}, needed}}``;
        ``needed`` says how many rows give a hit rate (None: no size does).
    """
    config = memory.engram_config
    row_bytes = row_format(memory.table_config.dtype).row_bytes(config.head_dim)
    layers = {}
    for layer, rows in rows_read(memory, sample).items():
        flat = rows.reshape(-1)
        layers[str(layer)] = _layer(flat[flat != NOTHING], row_bytes)
    return {"row_bytes": row_bytes, "positions": sample.tokens, "layers": layers}


def reuse_distances(accesses: np.ndarray) -> np.ndarray:
    """LRU stack distance of every access that is not its row's first, int64: other rows read since the last time (Mattson et al., 1970).

    A cache of C rows hits exactly those with a distance below C. Between its last reading at ``p`` and ``i`` stand ``i - p - 1``
    accesses, of which those count double whose own last reading is after ``p``; so the distance is a count of inversions, found for
    all accesses together in O(n log n).
    """
    order = np.argsort(accesses, kind="stable")
    again = accesses[order[1:]] == accesses[order[:-1]]
    now, last = order[1:][again], order[:-1][again]
    by_time = np.argsort(now)
    now, last = now[by_time], last[by_time]
    rank = np.empty(len(last), dtype=np.int64)
    rank[np.argsort(last)] = np.arange(len(last))
    return now - last - 1 - _earlier_greater(rank)


def fit_zipf(frequency: np.ndarray, fewest: int = _FEWEST) -> dict[str, Any]:
    """Exponent s of ``frequency ~ rank^-s``: least squares of the logarithms at ranks spaced evenly in the logarithm.

    Args:
        frequency: descending counts ``[R]``.
        fewest: ranks of rarer rows are left out.

    Returns:
        ``exponent``, ``factor`` (fitted frequency at rank 1), ``r2`` and ``ranks`` (the last one used); exponent None for fewer than
        three ranks.
    """
    ranks = int((frequency >= fewest).sum())
    if ranks < 3:
        return {"exponent": None, "factor": None, "r2": None, "ranks": ranks}
    rank = _spaced(ranks)
    x, y = np.log(rank), np.log(frequency[rank - 1])
    slope, height = np.polyfit(x, y, 1)
    spread = ((y - y.mean()) ** 2).sum()
    r2 = 1 - ((y - slope * x - height) ** 2).sum() / spread if spread > 0 else 1.0
    return {"exponent": float(-slope), "factor": float(np.exp(height)), "r2": float(r2), "ranks": ranks}


def _layer(accesses: np.ndarray, row_bytes: int) -> dict[str, Any]:
    total = len(accesses)
    if total == 0:
        return {"accesses": 0, "rows_read": 0}
    frequency = -np.sort(-np.unique(accesses, return_counts=True)[1])
    read = len(frequency)
    lfu = np.cumsum(frequency) / total
    lru = np.cumsum(np.bincount(reuse_distances(accesses), minlength=read)[:read]) / total
    sizes = _spaced(read)
    return {
        "accesses": total,
        "rows_read": read,
        "rank": sizes.tolist(),
        "frequency": frequency[sizes - 1].tolist(),
        "fit": fit_zipf(frequency),
        "cache": {
            "rows": sizes.tolist(),
            "bytes": (sizes * row_bytes).tolist(),
            "lfu": lfu[sizes - 1].round(6).tolist(),
            "lru": lru[sizes - 1].round(6).tolist(),
        },
        "needed": {
            name: {str(target): _size_for(rates, target) for target in _TARGETS} for name, rates in (("lfu", lfu), ("lru", lru))
        },
    }


def _size_for(rates: np.ndarray, target: float) -> int | None:
    """Rows of the smallest cache with at least this hit rate."""
    place = int(np.searchsorted(rates, target - 1e-12))
    return place + 1 if place < len(rates) else None


def _spaced(last: int) -> np.ndarray:
    """Whole numbers from 1 to ``last``, evenly spaced in the logarithm."""
    return np.unique(np.geomspace(1, last, _POINTS).round().astype(np.int64))


def _earlier_greater(rank: np.ndarray) -> np.ndarray:
    """For each element of a permutation of 0..n-1 how many before it are greater, int64 ``[n]``.

    Bit by bit from the highest: elements that agree in the bits above stand together, in their order; those with a zero count the ones
    before them in their group.
    """
    total = len(rank)
    count, values, origin = np.zeros(total, dtype=np.int64), rank.copy(), np.arange(total)
    for bit in reversed(range(max(total - 1, 1).bit_length())):
        one = (values >> bit) & 1
        start = values >> (bit + 1) << (bit + 1)  # groups are full: a permutation leaves no gaps
        ones_before = np.cumsum(one) - one
        ones_before -= ones_before[start]
        count[origin] += np.where(one == 0, ones_before, 0)
        place = start + np.where(one == 1, (1 << bit) + ones_before, np.arange(total) - start - ones_before)
        moved, came = np.empty_like(values), np.empty_like(origin)
        moved[place], came[place] = values, origin
        values, origin = moved, came
    return count
