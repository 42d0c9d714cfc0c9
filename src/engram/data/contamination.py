"""How much of the held-out text was also trained on: shared token n-grams, counted in memory that does not grow with the training text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from engram.data.corpus import SPLITS
from engram.data.recipe import KINDS
from engram.data.store import TokenStore
from engram.errors import ConfigError

__all__ = ["Contamination", "measure_contamination"]

_PART = 1 << 18
"""Tokens looked at together: some 15 MB at work."""
_KNOWN = 1 << 23
"""Held-out n-grams that are looked for in one pass over the training text: 64 MB of hashes."""
_MUCH = 0.5
_WORST = 20


@dataclass(frozen=True)
class Contamination:
    """Held-out n-grams that the training text has too."""

    n: int
    """Tokens per n-gram; the begin token is in none."""
    documents: np.ndarray
    """Numbers of the held-out documents, ``[D]``."""
    ngrams: np.ndarray
    """How many n-grams each has, ``[D]``; none where it is shorter than n."""
    shared: np.ndarray
    """How many of them occur in a training document, ``[D]``."""
    store: TokenStore

    @property
    def share(self) -> float:
        """Of all held-out n-grams (0 where there are none)."""
        return _share(self.shared.sum(), self.ngrams.sum())

    def to_dict(self, worst: int = _WORST) -> dict[str, Any]:
        """JSON-ready: in total, by kind, and the most contaminated documents."""
        shares = self.shared / np.maximum(self.ngrams, 1)
        kinds = self.store.documents["kind"][self.documents]
        order = np.lexsort((self.documents, -self.ngrams, -shares))[:worst]
        return {
            "n": self.n,
            "ngrams": int(self.ngrams.sum()),
            "shared": int(self.shared.sum()),
            "share": round(self.share, 6),
            "documents": len(self.documents),
            "documents_shorter_than_n": int((self.ngrams == 0).sum()),
            "documents_shared_over_half": int((shares > _MUCH).sum()),
            "mean_share_per_document": round(float(shares[self.ngrams > 0].mean()), 6) if self.ngrams.any() else 0.0,
            "share_by_kind": {
                kind: round(_share(self.shared[kinds == number].sum(), self.ngrams[kinds == number].sum()), 6)
                for number, kind in enumerate(KINDS)
                if self.ngrams[kinds == number].any()
            },
            "most_contaminated": [
                {
                    "document": self.store.names[self.documents[i]],
                    "kind": KINDS[kinds[i]],
                    "ngrams": int(self.ngrams[i]),
                    "share": round(float(shares[i]), 6),
                }
                for i in order
                if self.shared[i]
            ],
        }


def measure_contamination(
    store: TokenStore, n: int = 13, show: Callable[[int, int], None] = lambda done, total: None
) -> Contamination:
    """Count the held-out n-grams that occur in training documents, once per occurrence; n-grams never cross documents.

    n-grams are told apart by 64-bit hashes: among 10^7 training and 10^6 held-out ones, a false match has a probability of about 10^-6.

    Args:
        store: both sides of a corpus.
        n: tokens per n-gram; 13 is usual for contamination of large corpora (GPT-3, arXiv:2005.14165), 8 is stricter.
        show: called with tokens done and in all.

    Raises:
        ConfigError: n is not positive.
    """
    if n < 1:
        raise ConfigError(f"contamination: got n = {n}, expected at least 1.")
    documents = store.split("held_out")
    place = np.full(len(store), -1)
    place[documents] = np.arange(len(documents))
    ngrams = np.maximum(store.documents["length"][documents] - n, 0)  # one token leads the document
    shared = np.zeros(len(documents), dtype=np.int64)
    rounds = max(1, -(-int(ngrams.sum()) // _KNOWN))
    for number, (hashes, owners) in enumerate(_groups(store, n, _KNOWN)):
        known, inverse = np.unique(hashes, return_inverse=True)
        found = np.zeros(len(known), dtype=bool)
        for done, part, _ in _hashed(store, n, "train"):
            at = np.minimum(np.searchsorted(known, part), len(known) - 1)
            found[at[known[at] == part]] = True
            show(number * len(store.tokens) + done, rounds * len(store.tokens))
        shared += np.bincount(place[owners[found[inverse]]], minlength=len(documents))
    return Contamination(n, documents, ngrams, shared, store)


def _share(part: Any, whole: Any) -> float:
    return float(part) / float(whole) if whole else 0.0


def _groups(store: TokenStore, n: int, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Hashes of held-out n-grams and their documents, about ``size`` at a time."""
    waiting: list[tuple[np.ndarray, np.ndarray]] = []
    for _, hashes, owners in _hashed(store, n, "held_out"):
        if len(hashes):
            waiting.append((hashes, owners))
        if sum(len(part) for part, _ in waiting) + _PART > size:
            yield _joined(waiting)
            waiting = []
    if waiting:
        yield _joined(waiting)


def _joined(parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])


def _hashed(store: TokenStore, n: int, split: str) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Part by part: tokens done, hashes (uint64) of the n-grams of one side, numbers of their documents."""
    drawn = np.random.PCG64(n).random_raw(store.vocab_size + n)
    token_hash, factors = drawn[: store.vocab_size], drawn[store.vocab_size :] | np.uint64(1)
    starts, ends = store.documents["start"], store.documents["start"] + store.documents["length"]
    wanted = store.documents["split"] == SPLITS.index(split)
    total = len(store.tokens)
    for start in range(0, total, _PART):
        part = token_hash[store.tokens[start : start + _PART + n - 1]]
        count = len(part) - n + 1
        if count < 1:
            continue
        positions = np.arange(start, start + count)
        owners = np.searchsorted(ends, positions, side="right")
        inside = wanted[owners] & (positions > starts[owners]) & (positions + n <= ends[owners])
        hashes = np.zeros(count, dtype=np.uint64)
        for place in range(n):
            hashes += part[place : place + count] * factors[place]
        yield min(start + _PART, total), hashes[inside], owners[inside]
