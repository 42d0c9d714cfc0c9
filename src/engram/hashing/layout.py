"""Multipliers and primes: everything about the addresses that does not depend on the text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from operator import index

import numpy as np
from sympy import nextprime

from engram.config import EngramConfig
from engram.errors import ConfigError

__all__ = ["given_multipliers", "layer_multipliers", "prime_layout", "prime_walk"]

_LAYER_SEED_STEP = 10007


def layer_multipliers(config: EngramConfig, vocab_size: int) -> dict[int, np.ndarray]:
    """N odd int64 multipliers per layer, small enough that ``id * multiplier`` cannot overflow.

    Args:
        config: gives ``layer_ids``, ``seed`` and ``max_ngram_size``.
        vocab_size: number of canonical ids |V'|.
    """
    bound = max(1, (int(np.iinfo(np.int64).max) // vocab_size) // 2)
    multipliers = {}
    for layer_id in config.layer_ids:
        generator = np.random.default_rng(config.seed + _LAYER_SEED_STEP * layer_id)
        multipliers[layer_id] = generator.integers(0, bound, size=config.max_ngram_size, dtype=np.int64) * 2 + 1
    return multipliers


def given_multipliers(
    config: EngramConfig, vocab_size: int, given: Mapping[int, Sequence[int] | np.ndarray]
) -> dict[int, np.ndarray]:
    """Multipliers of one's own as ``layer_multipliers`` gives the drawn ones, checked.

    Args:
        config: gives ``layer_ids`` and ``max_ngram_size``.
        vocab_size: number of canonical ids |V'|.
        given: ``{layer_id: N ints}``, that of the newest token first.

    Raises:
        ConfigError: a layer is missing or unknown, or has another number of them than N, or one is not an int whose product with every id
            fits into int64, where all kernels agree.
    """
    count, largest = config.max_ngram_size, int(np.iinfo(np.int64).max) // vocab_size
    try:
        # JSON's keys are strings.
        read = {int(layer): [index(number) for number in numbers] for layer, numbers in given.items()}
    except (AttributeError, TypeError, ValueError):
        read = {}
    fit = all(1 <= number <= largest for numbers in read.values() for number in numbers)
    if not fit or set(read) != set(config.layer_ids) or any(len(numbers) != count for numbers in read.values()):
        raise ConfigError(
            f"multipliers: got {given!r}, expected {{layer: ints}} for layers {list(config.layer_ids)}, {count} each (max_ngram_size), from 1 "
            f"to {largest} (what int64 holds over the {vocab_size:,} ids)."
        )
    return {layer_id: np.array(read[layer_id], dtype=np.int64) for layer_id in config.layer_ids}


@lru_cache(maxsize=1 << 14)  # a walk asks for the same ones again: in every layer, and for every memory of one size
def _next_prime(number: int) -> int:
    return int(nextprime(number))


def prime_walk(config: EngramConfig) -> dict[int, list[list[int]]]:
    """Primes of all orders in every layer: ``{layer_id: [primes of order 2, primes of order 3, ...]}``.

    No prime is used twice in the whole memory, so that two heads never collide on the same pairs of n-grams. Orders that a layer does
    not read (``layer_orders``) take their primes from the walk all the same: leaving one out moves no other address.
    """
    seen: set[int] = set()
    layout: dict[int, list[list[int]]] = {}
    for layer_id in config.layer_ids:
        layout[layer_id] = []
        for floor in config.engram_vocab_size:  # type: ignore[union-attr]
            candidate = floor - 1
            primes = []
            for _ in range(config.n_head_per_ngram):
                candidate = _next_prime(candidate)
                while candidate in seen:
                    candidate = _next_prime(candidate)
                seen.add(candidate)
                primes.append(candidate)
            layout[layer_id].append(primes)
    return layout


def prime_layout(config: EngramConfig, walk: dict[int, list[list[int]]] | None = None) -> dict[int, list[list[int]]]:
    """Rows of every head, as ``prime_walk`` gives them; an order that a layer does not read has no heads. Give the walk if it is known."""
    return {
        layer_id: [primes if order in config.orders_of(layer_id) else [] for order, primes in zip(config.orders, by_order)]
        for layer_id, by_order in (walk or prime_walk(config)).items()
    }
