"""What looks inside several trainings, and memories switched off, say about the paper's claims: one value for each seed, judged over them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from engram.experiments.evidence import Evidence, Results, sign_verdict
from engram.experiments.statistics import mean_interval

__all__ = [
    "LOOKS",
    "MEMORY_OFF",
    "alignment",
    "early_blocks",
    "kept",
    "logit_lens",
    "memory_off",
    "phrase_gates",
    "total",
]

LOOKS = "looks_by_seed"
"""What entries of ``benchmarks/looks.py`` are told by."""

MEMORY_OFF = "memory_off"
"""What entries of ``benchmarks/memory_off.py`` are told by."""


def logit_lens(results: Results) -> Iterator[Evidence]:
    """KL of the lens in early blocks, without a memory less with one: above zero, the model with a memory knows more."""
    for where, looks in _looks(results):
        early = early_blocks(looks[0])
        curves = [found["logit_lens"] for found in looks]
        values = [_mean(curve["without"][block] - curve["memory"][block] for block in early) for curve in curves]
        yield _over_seeds(where, values, "nats", f"mean of {_blocks(early)}, from the first with a memory to the middle")


def alignment(results: Results) -> Iterator[Evidence]:
    """How many blocks further the soft alignment index of early blocks is than that of another seed's model without a memory."""
    for where, looks in _looks(results):
        found = [look["cka"] for look in looks]
        if any("without" not in alike for alike in found):
            continue
        early = early_blocks(looks[0])
        ahead = [[alike[kind]["soft_alignment"] for kind in ("memory", "without")] for alike in found]
        values = [_mean(memory[block] - without[block] for block in early) for memory, without in ahead]
        note = f"mean of {_blocks(early)}; less the index of another seed's model without a memory, both beside the same model without"
        yield _over_seeds(where, values, "blocks ahead", note)


def phrase_gates(results: Results) -> Iterator[Evidence]:
    """Gates at ends of phrases less those at ends of other words, mean over layers with a memory."""
    for where, looks in _looks(results):
        found = [look["phrases"]["layers"] for look in looks]
        if any(layer["completes_less_other"]["mean"] is None for layers in found for layer in layers.values()):
            continue
        values, begins = (
            [_mean(layer[name]["mean"] or 0.0 for layer in layers.values()) for layers in found]
            for name in ("completes_less_other", "completes_less_begins")
        )
        note = f"ends of phrases less ends of other words; less ends of their own first words {_told(begins)}"
        yield _over_seeds(where, values, "of a gate", note)


def memory_off(results: Results) -> Iterator[Evidence]:
    """Share of exact answers that is kept with the memory off: of reading less of facts, for models that were pretrained with their memory and
    always read it.
    """
    for where, result in results.get("memory_off", {}).items():
        arms: dict[str, list[Mapping[str, Any]]] = {}
        for entry in result["entries"]:
            if entry["start"] != "empty" and not entry["memory_dropout"]:
                arms.setdefault(entry["arm"], []).append(entry[MEMORY_OFF])
        for arm, found in arms.items():
            facts, reading = ([kept(entry, group) for entry in found] for group in ("facts", "reading"))
            values = [100 * (read - fact) for read, fact in zip(reading, facts)]
            note = f"{arm!r}: kept of reading {_percent(reading)}, less kept of facts {_percent(facts)}"
            yield _over_seeds(where, values, "percentage points", note)


def total(found: Mapping[str, Any], group: str) -> tuple[int, int]:
    """Exact answers and all of a group of questions, ``{question: [exact, asked]}``."""
    exact, asked = (sum(numbers) for numbers in zip(*found[group].values()))
    return exact, asked


def kept(found: Mapping[str, Any], group: str) -> float:
    """Exact answers with the memory off as a share of those with it on; NaN where there are none."""
    on, off = (total(found[state], group)[0] for state in ("on", "off"))
    return off / on if on else math.nan


def early_blocks(look: Mapping[str, Any]) -> range:
    """The first half of the blocks, from the first with a memory on: what stands before it knows nothing of the memory."""
    first, blocks = min(look["layer_ids"]), len(look["logit_lens"]["memory"])
    return range(first, max(first + 1, blocks // 2))


def _looks(results: Results) -> Iterator[tuple[str, list[Mapping[str, Any]]]]:
    for where, result in results.get("looks", {}).items():
        yield where, [entry[LOOKS] for entry in result["entries"]]


def _over_seeds(where: str, values: Sequence[float], unit: str, note: str) -> Evidence:
    """Evidence for a value that the claim says is above zero."""
    found = mean_interval(values)
    note += f"; {len(values)} seeds" if found["low"] is not None else "; one seed: no interval"
    return Evidence(sign_verdict(found["low"], found["high"], 1), where, found["mean"], found["low"], found["high"], unit, note)


def _told(values: Sequence[float]) -> str:
    found = mean_interval(values)
    ends = "" if found["low"] is None else f" [{found['low']:+.3f}, {found['high']:+.3f}]"
    return f"{found['mean']:+.3f}{ends}"


def _percent(shares: Sequence[float]) -> str:
    low, high = (f"{100 * end:.0f}" for end in (min(shares), max(shares)))
    return f"{low} %" if low == high else f"{low} to {high} %"


def _blocks(blocks: range) -> str:
    return f"blocks {blocks[0]} to {blocks[-1]}" if len(blocks) > 1 else f"block {blocks[0]}"


def _mean(values: Iterator[float]) -> float:
    found = list(values)
    return math.fsum(found) / len(found)
