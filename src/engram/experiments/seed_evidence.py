"""What looks inside several trainings, and memories switched off, say about the paper's claims: one value for each seed, judged over them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from engram.experiments.evidence import CANNOT_TELL, Evidence, Results, sign_verdict
from engram.experiments.statistics import mean_interval

__all__ = [
    "LOOKS",
    "MEMORY_OFF",
    "alignment",
    "arms_of",
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


_LEAST = 0.05
"""Of the questions a model must answer with the memory on, so that a share of these says something."""


def logit_lens(results: Results) -> Iterator[Evidence]:
    """KL of the lens in early blocks, without a memory less with one: above zero, the model with a memory knows more."""
    for where, looks in _looks(results):
        early = early_blocks(looks[0])
        curves = [found["logit_lens"] for found in looks]
        values = [_mean(curve["without"][block] - curve["memory"][block] for block in early) for curve in curves]
        yield _over_seeds(where, values, "nats", f"mean of {_blocks(early)}, from the first with a memory to the middle")


def alignment(results: Results) -> Iterator[Evidence]:
    """How many blocks further the soft alignment index of early blocks is than that of a model without a memory of the same seed, both beside
    another seed's model without.
    """
    for where, looks in _looks(results):
        found = [look["cka"] for look in looks]
        if any("without" not in alike for alike in found):
            continue
        early = early_blocks(looks[0])
        ahead = [[alike[kind]["soft_alignment"] for kind in ("memory", "without")] for alike in found]
        values = [_mean(memory[block] - without[block] for block in early) for memory, without in ahead]
        note = f"mean of {_blocks(early)}; less the index without a memory, both beside another seed's model without"
        yield _of_neighbours(_over_seeds(where, values, "blocks ahead", note), values)


def phrase_gates(results: Results) -> Iterator[Evidence]:
    """Gates at ends of phrases, less those at the same words elsewhere and less those at their own first words; means over layers."""
    for where, looks in _looks(results):
        found = [look["phrases"]["layers"] for look in looks]
        told = {place: _over_layers(found, f"completes_less_{place}") for place in ("same_word", "begins", "other")}
        same = told["same_word"]
        if same is None:
            yield Evidence(
                CANNOT_TELL, where, unit="of a gate", note="the last words of phrases were not seen elsewhere in every look"
            )
            continue
        others = f"less ends of other words {_told(told['other'])}"
        yield _over_seeds(where, same, "of a gate", f"ends of phrases less the same words elsewhere; {others}")
        if (begins := told["begins"]) is not None:  # as the paper's pictures show it, where the words differ too
            yield _over_seeds(where, begins, "of a gate", "ends of phrases less ends of their own first words")


def memory_off(results: Results) -> Iterator[Evidence]:
    """Share of exact answers that is kept with the memory off: of reading less of facts, for models that were pretrained with their memory and
    always read it. All seeds go on from one pretraining, which is told and keeps the verdict back.
    """
    for where, result in results.get("memory_off", {}).items():
        for arm, found in arms_of(result).items():
            entry = next(entry for entry in result["entries"] if entry["arm"] == arm)
            if entry["start"] == "empty" or entry["memory_dropout"]:
                continue
            shares = {group: kept(found, group) for group in ("reading", "facts")}
            if shares["reading"] is None or shares["facts"] is None:
                yield Evidence(
                    CANNOT_TELL, where, unit="percentage points", note=f"{arm!r}: hardly anything was exact with the memory on"
                )
                continue
            values = [100 * (read - fact) for read, fact in zip(shares["reading"], shares["facts"])]
            parts = ", ".join(f"of {group} {_percent(of_seeds)}" for group, of_seeds in shares.items() if of_seeds)
            note = f"{arm!r}, facts taught after pretraining: kept {parts}; all seeds go on from one pretrained model"
            yield replace(_over_seeds(where, values, "percentage points", note), verdict=CANNOT_TELL)


def arms_of(result: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    """What was found with the memory on and off, for each seed of each arm."""
    arms: dict[str, list[Mapping[str, Any]]] = {entry["arm"]: [] for entry in result["entries"]}
    for entry in sorted(result["entries"], key=lambda entry: entry["seed"]):
        arms[entry["arm"]].append(entry[MEMORY_OFF])
    return arms


def kept(found: Sequence[Mapping[str, Any]], group: str) -> list[float] | None:
    """Exact answers with the memory off as a share of those with it on, seed by seed; None where a seed has hardly any to keep."""
    on, off = ([total(entry[state], group) for entry in found] for state in ("on", "off"))
    if any(exact < _LEAST * asked for exact, asked in on):
        return None
    return [left / exact for (exact, _), (left, _) in zip(on, off)]


def total(found: Mapping[str, Any], group: str) -> tuple[int, int]:
    """Exact answers and all of a group of questions, ``{question: [exact, asked]}``."""
    exact, asked = (sum(numbers) for numbers in zip(*found[group].values()))
    return exact, asked


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
    verdict = sign_verdict(found["low"], found["high"], 1)
    return Evidence(verdict, where, found["mean"], found["low"], found["high"], unit, note, len(values))


def _of_neighbours(found: Evidence, values: Sequence[float]) -> Evidence:
    """Evidence from values of which neighbours share a model, so that the interval over all of them is too narrow: it can tell only where every
    other value, the first or the second of each two, tells the same.
    """
    paired = values[: len(values) // 2 * 2]  # of an odd number the last is beside the first's model
    halves = [mean_interval(half) for half in (paired[::2], paired[1::2]) if half]
    if len(halves) < 2 or any(half["low"] is None for half in halves):
        return replace(found, verdict=CANNOT_TELL, note=f"{found.note}; neighbouring values share a model")
    told = " and ".join(f"[{half['low']:+.2f}, {half['high']:+.2f}]" for half in halves)
    alike = all(sign_verdict(half["low"], half["high"], 1) == found.verdict for half in halves)
    note = f"{found.note}; neighbouring values share a model: every other one {told}"
    return replace(found, verdict=found.verdict if alike else CANNOT_TELL, note=note)


def _over_layers(looks: Sequence[Mapping[str, Any]], name: str) -> list[float] | None:
    """Means over layers, seed by seed; None where one is not known."""
    values = [[layer[name]["mean"] for layer in layers.values()] for layers in looks]
    return None if any(value is None for of_seed in values for value in of_seed) else [_mean(of_seed) for of_seed in values]


def _told(values: Sequence[float] | None) -> str:
    if values is None:
        return "not known"
    found = mean_interval(values)
    ends = "" if found["low"] is None else f" [{found['low']:+.3f}, {found['high']:+.3f}]"
    return f"{found['mean']:+.3f}{ends}"


def _percent(shares: Sequence[float]) -> str:
    low, high = (f"{100 * end:.0f}" for end in (min(shares), max(shares)))
    return f"{low} %" if low == high else f"{low} to {high} %"


def _blocks(blocks: range) -> str:
    return f"blocks {blocks[0]} to {blocks[-1]}" if len(blocks) > 1 else f"block {blocks[0]}"


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return math.fsum(found) / len(found)
