"""The definition of the n-gram hash, written to be read: one position, one order, one head at a time.

Nothing else in the package may disagree with this file; the tests compare the fast path with it, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

__all__ = ["hash_reference", "tag_reference"]


def hash_reference(
    canonical_ids: np.ndarray,
    multipliers: np.ndarray,
    primes: list[list[int]],
    pad: int,
    history: np.ndarray | None = None,
    attention_mask: np.ndarray | None = None,
    boundaries: np.ndarray | None = None,
) -> np.ndarray:
    """Head indices of one layer, ``demo_v1``.

    Args:
        canonical_ids: int ``[B, T]``, compressed ids.
        multipliers: int64 ``[N]``, odd.
        primes: per order 2..N, the K primes of its heads; none for an order that the layer does not read.
        pad: canonical id of ``pad_id``; stands before the start of a sequence and at masked positions.
        history: int ``[B, H]`` compressed ids that precede ``canonical_ids``, any H >= 0.
        attention_mask: ``[B, T]``, zero where a position is padding.
        boundaries: bool ``[B, H + T]``, true at tokens that n-grams do not reach across: such a token and all that is older read as ``pad``.

    Returns:
        int64 ``[B, T, (N - 1) * K]``, order-major: all heads of order 2, then of order 3, and so on.
    """
    return _walk(canonical_ids, multipliers, primes, pad, history, attention_mask, lambda mix, prime: mix % prime, boundaries)


def tag_reference(
    canonical_ids: np.ndarray,
    multipliers: np.ndarray,
    primes: list[list[int]],
    pad: int,
    history: np.ndarray | None = None,
    attention_mask: np.ndarray | None = None,
) -> np.ndarray:
    """Tags of the same n-grams: what the modulus throws away, folded to 1..2^31 - 1. Arguments and shape as ``hash_reference``."""
    return _walk(
        canonical_ids, multipliers, primes, pad, history, attention_mask, lambda mix, prime: (mix // prime) % (2**31 - 1) + 1
    )


def _walk(
    canonical_ids: np.ndarray,
    multipliers: np.ndarray,
    primes: list[list[int]],
    pad: int,
    history: np.ndarray | None,
    attention_mask: np.ndarray | None,
    value: Callable[[int, int], int],
    boundaries: np.ndarray | None = None,
) -> np.ndarray:
    batch, length = canonical_ids.shape
    past = np.zeros((batch, 0), dtype=np.int64) if history is None else history
    indices = np.empty((batch, length, sum(len(p) for p in primes)), dtype=np.int64)
    for b in range(batch):
        present = [int(x) for x in canonical_ids[b]]
        if attention_mask is not None:
            present = [x if keep else pad for x, keep in zip(present, attention_mask[b])]
        sequence = [int(x) for x in past[b]] + present
        for t in range(length):
            position = past.shape[1] + t
            start = 0 if boundaries is None else _start(boundaries[b], position)
            column = 0
            for order, order_primes in enumerate(primes, start=2):
                mix = 0
                for step in range(order):
                    token = sequence[position - step] if position - step >= start else pad
                    mix ^= token * int(multipliers[step])
                for prime in order_primes:
                    indices[b, t, column] = value(mix, prime)
                    column += 1
    return indices


def _start(boundaries: np.ndarray, position: int) -> int:
    """First position that n-grams ending at ``position`` read: the one behind the last boundary."""
    return max((at + 1 for at in range(position + 1) if boundaries[at]), default=0)
