"""Documents that say nearly the same, found by MinHash over word 5-grams as they stream by.

MinHash: Broder 1997. A library does this too (datasketch), but asks for SciPy to place its bands, and what it keeps may change with its
version; which documents a corpus holds must not.
"""

from __future__ import annotations

import zlib

import numpy as np

__all__ = ["NearDuplicates", "estimated_overlap", "signature"]

_WORDS = 5
_HASHES = 128
_PART = 4096
_FOUND = 0.99
"""Probability with which a pair just at the threshold is compared at all."""
# PCG64's raw stream is fixed by NumPy's promise, so a signature never changes.
_DRAWN = np.random.PCG64(20260112).random_raw(2 * _HASHES + _WORDS)
_FACTORS, _SHIFTS, _PLACES = (
    _DRAWN[:_HASHES] | np.uint64(1),
    _DRAWN[_HASHES : 2 * _HASHES],
    _DRAWN[2 * _HASHES :] | np.uint64(1),
)


class NearDuplicates:
    """Remembers signatures (some 4 KB per document, whatever its length) and tells whether a text resembles an earlier one."""

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self.rows = _rows_per_band(threshold)
        self._signatures: list[np.ndarray] = []
        self._bands: dict[bytes, list[int]] = {}

    def add(self, text: str) -> None:
        """Remember a text as one that is kept."""
        self._remember(signature(text))

    def add_if_new(self, text: str) -> bool:
        """Remember the text unless it resembles an earlier one; whether it was new."""
        own = signature(text)
        seen: set[int] = set()
        for key in self._keys(own):
            for number in self._bands.get(key, ()):
                if number not in seen and estimated_overlap(own, self._signatures[number]) >= self.threshold:
                    return False
                seen.add(number)
        self._remember(own)
        return True

    def _remember(self, own: np.ndarray) -> None:
        for key in self._keys(own):
            self._bands.setdefault(key, []).append(len(self._signatures))
        self._signatures.append(own)

    def _keys(self, own: np.ndarray) -> list[bytes]:
        bands = own.reshape(-1, self.rows)
        return [number.to_bytes(2, "little") + band.tobytes() for number, band in enumerate(bands)]


def signature(text: str) -> np.ndarray:
    """Smallest hash of the text's word 5-grams under each of 128 hash functions, uint32 ``[128]``. Case and white space do not count."""
    words = np.fromiter((zlib.crc32(word.encode()) for word in text.lower().split()), dtype=np.uint64)
    grams = max(len(words) - _WORDS + 1, 1)  # a text of fewer words is one shorter n-gram
    mixed = np.zeros(grams, dtype=np.uint64)
    for place, column in zip(_PLACES, range(min(_WORDS, len(words)))):
        mixed += words[column : column + grams] * place
    mixed = np.unique(mixed ^ (mixed >> np.uint64(32)))
    smallest = np.full(_HASHES, np.iinfo(np.uint32).max, dtype=np.uint32)
    for start in range(0, len(mixed), _PART):
        hashed = (mixed[start : start + _PART, None] * _FACTORS + _SHIFTS) >> np.uint64(32)
        np.minimum(smallest, hashed.min(axis=0).astype(np.uint32), out=smallest)
    return smallest


def estimated_overlap(one: np.ndarray, other: np.ndarray) -> float:
    """Share of equal places in two signatures: estimates the Jaccard index (standard error at 0.8: 0.035)."""
    return float((one == other).mean())


def _rows_per_band(threshold: float) -> int:
    """The most rows per band (fewest comparisons) that still find a pair at the threshold almost surely."""
    fitting = [rows for rows in (1, 2, 4, 8, 16, 32) if 1 - (1 - threshold**rows) ** (_HASHES // rows) >= _FOUND]
    return max(fitting, default=1)
