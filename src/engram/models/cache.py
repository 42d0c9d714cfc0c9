"""Decoding state that lives on the KV cache and goes wherever the cache goes.

``generate`` reorders, repeats, selects, crops, copies and resets its cache in many places. Giving the cache object itself the state
(and a subclass of its own class that passes batch changes on) means that none of those places must know about engram.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from engram.errors import AttachError
from engram.layers import RollingTail

__all__ = [
    "CACHE_NAMES",
    "CacheState",
    "bind_state",
    "bound_state",
    "cache_argument",
    "cache_in",
    "cached_length",
    "forget_state",
    "rename_cache",
    "state_of",
]

CACHE_NAMES = ("cache", "past_key_values", "cache_params", "state", "mems", "past_buckets_states", "layer_past")
"""What models call the argument and the output that hold what they keep of the past; transformers 5.24 renamed the second to the first."""


def cache_argument(model: nn.Module) -> str:
    """What a causal language model calls the cache it is given."""
    accepted = inspect.signature(model.forward).parameters
    return next((name for name in CACHE_NAMES if name in accepted), CACHE_NAMES[0])


def rename_cache(model: nn.Module, given: dict[str, Any]) -> None:
    """Let a cache that was given have the name that this model, in this version of transformers, has for it."""
    for name in ("cache", "past_key_values", "cache_params"):
        if name in given:
            given.setdefault(cache_argument(model), given.pop(name))


def cache_in(output: Any) -> Any:
    """What is kept of the past among a model's outputs, of whatever kind; None if nothing is."""
    if isinstance(output, tuple):
        return next((item for item in output if isinstance(item, Cache)), None)
    names = CACHE_NAMES[:1] if hasattr(output, CACHE_NAMES[0]) else CACHE_NAMES  # older names are told off there
    return next((value for name in names if (value := getattr(output, name, None)) is not None), None)


class CacheState:
    """Ids and convolution inputs of the sequences in one KV cache.

    Attributes:
        owner: token of the memory that wrote it.
        ids: raw ids, ``pad_id`` where masked.
        conv: per layer, normalised inputs of the convolution.
    """

    def __init__(self, owner: str, layer_ids: tuple[int, ...], window: int | None) -> None:
        self.owner = owner
        self.ids = RollingTail()
        self.conv = {layer_id: RollingTail(window) for layer_id in layer_ids}

    def trim(self, length: int) -> None:
        """Follow a cache that was cropped or reset to ``length`` positions."""
        for tail in self._tails():
            tail.trim(length)

    def map_batch(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Follow a change of the cache's batch dimension."""
        for tail in self._tails():
            tail.map_batch(fn)

    def own(self) -> None:
        """Keep everything in memory of its own (see ``RollingTail.own``)."""
        for tail in self._tails():
            tail.own()

    def _tails(self) -> list[RollingTail]:
        return [self.ids, *self.conv.values()]


class _FollowsCache:
    """Batch changes of the cache, passed on to the states in it. Crops and resets need nothing: see ``state_of``."""

    engram_states: dict[str, CacheState]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self._map_states(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        self._map_states(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        self._map_states(lambda x: x[indices.to(x.device)])

    def _map_states(self, fn: Callable[[Tensor], Tensor]) -> None:
        for state in self.engram_states.values():
            state.map_batch(fn)

    def __reduce__(self) -> tuple[Any, ...]:
        """By the cache's own class, because pickle finds none that was made at run time."""
        own = next(cls for cls in type(self).__mro__ if not issubclass(cls, _FollowsCache))
        return _new_follower, (own,), self.__getstate__()


@cache
def _following_class(cache_class: type) -> type:
    return type(cache_class.__name__, (_FollowsCache, cache_class), {"__module__": cache_class.__module__})


def _new_follower(cache_class: type) -> Cache:
    """An empty one, which pickle fills."""
    return object.__new__(_following_class(cache_class))


def bind_state(cache: Cache, state: CacheState) -> None:
    """Give a cache the state of a memory; from then on it follows the cache. Memories on one model have a state each."""
    cache.engram_states = {**getattr(cache, "engram_states", {}), state.owner: state}  # type: ignore[attr-defined]
    if not isinstance(cache, _FollowsCache):
        cache.__class__ = _following_class(type(cache))  # type: ignore[arg-type]


def bound_state(cache: Cache | None, owner: str) -> CacheState | None:
    """What a memory has bound to a cache, if anything."""
    return getattr(cache, "engram_states", {}).get(owner)


@torch.compiler.disable
def forget_state(cache: Cache, owner: str) -> None:
    """Take a memory's state off a cache that gets positions it does not see: continuing with that memory must be refused."""
    if bound_state(cache, owner) is not None:
        states = cache.engram_states  # type: ignore[attr-defined]
        cache.engram_states = {name: state for name, state in states.items() if name != owner}  # type: ignore[attr-defined]


def cached_length(cache: Cache | None) -> int:
    """Positions in the cache."""
    return 0 if cache is None else int(cache.get_seq_length())


@torch.compiler.disable
def state_of(cache: Cache | None, owner: str) -> CacheState | None:
    """A memory's state bound to ``cache``, brought to the cache's present length (a crop shows in the length); None for a new cache.

    Raises:
        AttachError: the cache holds positions that this memory has not seen.
    """
    length, state = cached_length(cache), bound_state(cache, owner)
    if length == 0:
        return None
    if state is None or state.ids.length < length:
        seen = 0 if state is None else state.ids.length
        raise AttachError(
            f"the cache holds {length} positions, of which this memory has seen {seen}: it was filled by another model or "
            "with the memory disabled. Start with an empty cache, or run the whole prompt with the memory on."
        )
    state.trim(length)
    return state
