"""What can be measured: every benchmark by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from engram.bench.gather import gather_settings
from engram.bench.hashing import hash_settings
from engram.bench.layer import layer_settings
from engram.bench.setting import Setting
from engram.bench.tiers import cold_settings, tier_settings

__all__ = ["BENCHMARKS", "Benchmark", "Setting"]


@dataclass(frozen=True)
class Benchmark:
    """A question, and the settings in which it is asked."""

    title: str
    unit: str
    """What a call's ``amount`` counts."""
    settings: Callable[[bool], Iterator[Setting]]
    """Makes the settings, large ones or (True) quick ones, one at a time: the next is made when the last is done with."""
    size: str = "tokens per call"
    """What a setting's ``size`` counts."""
    notes: Mapping[str, str] = field(default_factory=dict)
    """What the names of limits mean."""


_TABLE = "rows of the table"
_READ_LIMIT = {"limit: random read": "every byte of the rows read and summed, many loads in flight, nothing written"}

BENCHMARKS: dict[str, Benchmark] = {
    "hash": Benchmark("n-gram hash, 2 layers x 16 heads, orders 2 and 3", "tokens", hash_settings),
    "gather": Benchmark("rows by number, as stored and turned into float32", "rows", gather_settings, _TABLE, _READ_LIMIT),
    "tiers": Benchmark("look-up through every tier, by table size", "rows", tier_settings, _TABLE, _READ_LIMIT),
    "cold": Benchmark("a mapped file that is not in memory", "rows", cold_settings, _TABLE),
    "layer": Benchmark("an Engram layer's parts beside one transformer block", "tokens", layer_settings),
}
