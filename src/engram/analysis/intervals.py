"""Means with 95 % intervals over documents: tokens of one document are not independent, documents are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

__all__ = ["as_interval", "document_mean", "document_statistic"]

_DRAWS = 2000
_LEVELS = (2.5, 97.5)


def document_statistic(
    sums: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], seed: int = 0
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    """A function of sums over documents, with the percentile bootstrap's 95 % interval (Efron, 1979).

    Args:
        sums: what every document adds up to, ``[D, ...]``.
        statistic: takes totals ``[R, ...]`` of R drawings and gives ``[R, ...]``.
        seed: of the drawings.

    Returns:
        Value, lower and upper end. The ends are None for fewer than two documents, and NaN where the function has no value (a ratio to
        nothing) for some of the drawings.
    """
    documents = len(sums)
    with np.errstate(invalid="ignore", divide="ignore"):
        value = statistic(sums.sum(axis=0)[None])[0]
        if documents < 2:
            return value, None, None
        weights = np.random.default_rng(seed).multinomial(documents, np.full(documents, 1 / documents), size=_DRAWS)
        drawn = statistic(np.tensordot(weights.astype(float), sums, axes=1))
    low, high = np.percentile(np.where(np.isfinite(drawn), drawn, np.nan), _LEVELS, axis=0)
    return value, low, high


def document_mean(sums: np.ndarray, counts: np.ndarray) -> dict[str, Any]:
    """``{mean, low, high}`` of tokens' values, from sums and numbers of tokens per document, both ``[D]``."""
    return as_interval("mean", *document_statistic(np.stack([sums, counts], axis=-1), _ratio))


def as_interval(name: str, value: Any, low: Any, high: Any) -> dict[str, Any]:
    """JSON-ready fields: the value under ``name``, ``low`` and ``high``; None where there is no number."""
    return {name: _as_number(value), "low": _as_number(low), "high": _as_number(high)}


def _as_number(value: Any) -> float | None:
    """A float, or None for what is none (JSON knows no NaN)."""
    return None if value is None or not np.isfinite(value) else float(value)


def _ratio(totals: np.ndarray) -> np.ndarray:
    """First over second of ``[R, 2]``."""
    return totals[:, 0] / totals[:, 1]
