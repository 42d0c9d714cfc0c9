"""A model of n-gram counts, the plain rival of a memory of n-grams; and how much of it a mixture with another model takes.

Modified Kneser-Ney smoothing, interpolated: Chen and Goodman, "An empirical study of smoothing techniques for language modeling", Computer
Speech and Language 13 (1999):

    P_k(w | h) = (c(hw) - D(c(hw))) / c(h) + left(h) P_{k-1}(w | h'),    P_0 = 1 / V

with ``h'`` the context ``h`` without its oldest token, ``c(h)`` the sum of ``c(hw)`` over ``w``, and ``left(h)`` the mass that the discounts
``D`` take away there. ``c`` counts occurrences in the highest order, and below it how many tokens were seen before ``hw``. After an unseen
context, ``P_k`` is ``P_{k-1}``.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from engram.errors import ConfigError, DataError

__all__ = ["NgramCounts", "mixture_weight"]

_FEW = (0.5, 1.0, 1.5)
"""Discounts where counts of counts are too few for the estimate (KenLM's ``--discount_fallback``)."""
_BISECTIONS = 60


@dataclass(frozen=True)
class _Order:
    """What n-grams of one length say; keys are sorted."""

    grams: np.ndarray
    """Keys of n-grams seen, int64 ``[G]``."""
    shares: np.ndarray
    """Their discounted shares of all that followed their contexts, float64 ``[G]``."""
    contexts: np.ndarray
    """Keys of contexts seen, int64 ``[C]``."""
    left: np.ndarray
    """Mass that discounts leave to the next shorter context, float64 ``[C]``."""


class NgramCounts:
    """An interpolated Kneser-Ney model over token ids.

    A stream is what a language model reads at once: its first token is nobody's target, and contexts begin there. A begin token is a target
    like any other, and after it contexts begin anew. What lies before a context's beginning is one symbol of its own, so that beginnings
    are contexts too.

    Args:
        streams: token ids, ``[T]`` each (``[B, T]`` are ``B`` streams of one length): arrays, lists or CPU tensors.
        vocab_size: ids are below this; V in the formula.
        order: tokens of the longest n-gram, the predicted one included.
        begin_id: the token that leads documents; none if not given.

    Raises:
        ConfigError: a number is impossible, or n-grams of this order do not fit into 63 bits.
        DataError: an id is outside the vocabulary, or no stream has a token to predict.
    """

    def __init__(self, streams: Iterable[Any], vocab_size: int, order: int = 3, begin_id: int | None = None) -> None:
        for name, value, least in (("vocab_size", vocab_size, 1), ("order", order, 1)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"NgramCounts.{name}: got {value!r}, expected a whole number of at least {least}.")
        if (vocab_size + 1) ** order >= 1 << 63:
            raise ConfigError(
                f"NgramCounts: got order {order} with vocab_size {vocab_size}, expected (vocab_size + 1) ** order below 2 ** 63; take a "
                "smaller order."
            )
        if begin_id is not None and not 0 <= begin_id < vocab_size:
            raise ConfigError(f"NgramCounts.begin_id: got {begin_id}, expected an id from 0 to {vocab_size - 1}.")
        self.vocab_size, self.order, self.begin_id = vocab_size, order, begin_id
        self._base = vocab_size + 1  # the symbol before a beginning is the largest digit
        ids, starts = self._joined(streams)
        keys = self._keys(ids, starts)[~starts]
        if not len(keys):
            raise DataError("NgramCounts: got no tokens to predict, expected a stream of at least two ids.")
        self.tokens = len(keys)
        """Predicted tokens that were counted."""
        self._orders, self.discounts = self._count(keys)

    @property
    def ngrams(self) -> tuple[int, ...]:
        """How many different n-grams were seen, by length from 1 on."""
        return tuple(len(order.grams) for order in self._orders)

    def log_probabilities(self, ids: Any) -> np.ndarray:
        """Log-probability of every token given those before it in its stream.

        Args:
            ids: a stream ``[T]`` or streams ``[B, T]``. A first token has no context: it is told by ``P_1``.

        Returns:
            Nats (none above zero), float64 of the shape of ``ids``.

        Raises:
            DataError: an id is outside the vocabulary, or the shape is another.
        """
        given = self._checked(ids)
        starts = np.zeros(given.shape, dtype=bool)
        starts[..., :1] = True
        keys = self._keys(given.ravel(), starts.ravel())
        found = np.full(len(keys), 1.0 / self.vocab_size)
        for length, order in enumerate(self._orders, start=1):
            grams = keys % self._base**length
            left = _look_up(order.contexts, order.left, grams // self._base, absent=1.0)
            found = _look_up(order.grams, order.shares, grams, absent=0.0) + left * found
        return np.log(found).reshape(given.shape)

    def _checked(self, ids: Any) -> np.ndarray:
        given = np.asarray(ids)
        if given.ndim not in (1, 2) or (given.size and not np.issubdtype(given.dtype, np.integer)):
            raise DataError(f"NgramCounts: got {given.dtype} of shape {given.shape}, expected whole numbers [T] or [B, T].")
        if given.size and not 0 <= given.min() <= given.max() < self.vocab_size:
            raise DataError(
                f"NgramCounts: got ids from {given.min()} to {given.max()}, expected them from 0 to {self.vocab_size - 1}: vocab_size is "
                f"{self.vocab_size}."
            )
        return given.astype(np.int64)

    def _joined(self, streams: Iterable[Any]) -> tuple[np.ndarray, np.ndarray]:
        """All ids one after another, int64 ``[N]``, and where streams start, bool ``[N]``."""
        rows = [row for stream in streams for row in np.atleast_2d(self._checked(stream)) if len(row)]
        ids = np.concatenate(rows) if rows else np.zeros(0, dtype=np.int64)
        starts = np.zeros(len(ids), dtype=bool)
        starts[list(itertools.accumulate((len(row) for row in rows[:-1]), initial=0)) if rows else []] = True
        return ids, starts

    def _keys(self, ids: np.ndarray, starts: np.ndarray) -> np.ndarray:
        """The longest n-gram that ends at each position as one number, int64 ``[N]``: digits to the base V + 1, the last token lowest."""
        place = np.arange(len(ids))
        begins = starts if self.begin_id is None else starts | (ids == self.begin_id)
        # Where the context of a position begins; a begin token is itself in the context of the document before it.
        border = np.concatenate([[0], np.maximum.accumulate(np.where(begins, place, 0))])[:-1]
        border = np.where(starts, place, border)
        keys = ids.copy()
        for back in range(1, self.order):
            inside = place - back >= border
            digit = np.where(inside, ids[np.maximum(place - back, 0)], self.vocab_size)
            keys += digit * self._base**back
        return keys

    def _count(self, keys: np.ndarray) -> tuple[list[_Order], list[tuple[float, float, float]]]:
        """Orders and their discounts from 1 on, from the keys of all n-grams of the highest."""
        grams, counts = np.unique(keys, return_counts=True)
        orders, discounts = [], []
        for length in range(self.order, 0, -1):
            discounts.append(_discounts(counts))
            orders.append(self._discounted(grams, counts, discounts[-1]))
            # Each different n-gram is one token seen before the n-gram that lacks its oldest.
            grams, counts = np.unique(grams % self._base ** (length - 1), return_counts=True)
        return orders[::-1], discounts[::-1]

    def _discounted(self, grams: np.ndarray, counts: np.ndarray, discounts: tuple[float, float, float]) -> _Order:
        taken = np.asarray(discounts)[np.minimum(counts, 3) - 1]
        contexts, first, of = np.unique(grams // self._base, return_index=True, return_inverse=True)
        totals = np.add.reduceat(counts, first)
        return _Order(grams, (counts - taken) / totals[of], contexts, np.add.reduceat(taken, first) / totals)


def _discounts(counts: np.ndarray) -> tuple[float, float, float]:
    """What is taken off counts of 1, of 2, and of 3 and more: Chen and Goodman's estimate from counts of counts."""
    n1, n2, n3, n4 = (int((counts == number).sum()) for number in (1, 2, 3, 4))
    if not min(n1, n2, n3, n4):
        return _FEW
    y = n1 / (n1 + 2 * n2)
    found = (1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3)
    # A discount of nothing could leave no mass to tokens that were not seen; one above the count would make a share negative.
    return found if all(0 < discount <= most for most, discount in enumerate(found, start=1)) else _FEW


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray, absent: float) -> np.ndarray:
    """Values of the wanted keys, ``absent`` where there is no such key; ``keys`` are sorted and not empty."""
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[place] == wanted, values[place], absent)


def mixture_weight(first: Any, second: Any) -> float:
    """The weight ``w`` of the first model that makes tokens most likely under ``w p + (1 - w) q``; their likelihood has one maximum only.

    Args:
        first: log-probabilities of the same tokens, ``[N]`` (nats) by one model.
        second: by the other.

    Returns:
        0 to 1.

    Raises:
        DataError: the two are not of one length, or there are none.
    """
    p, q = (np.asarray(given, dtype=np.float64) for given in (first, second))
    if p.shape != q.shape or p.ndim != 1 or not len(p):
        raise DataError(
            f"mixture_weight: got {p.shape} and {q.shape}, expected log-probabilities of the same tokens, [N] each."
        )
    largest = np.maximum(p, q)  # the likelihood's slope is the same when a token's two probabilities are scaled alike
    p, q = np.exp(p - largest), np.exp(q - largest)
    low, high = 0.0, 1.0
    for _ in range(_BISECTIONS):
        weight = (low + high) / 2
        rising = float(((p - q) / (weight * p + (1 - weight) * q)).sum()) > 0
        low, high = (weight, high) if rising else (low, weight)
    return (low + high) / 2
