"""The paper's claims, what it measured, and what our results say about each."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

from engram.experiments import look_evidence as looks
from engram.experiments import seed_evidence as seeds
from engram.experiments import sweep_evidence as sweeps
from engram.experiments.evidence import NOT_MEASURED, Evidence, Results
from engram.experiments.paper import PAPER

__all__ = ["CLAIMS", "Claim", "judge"]


@dataclass(frozen=True)
class Claim:
    """One sentence of the paper that results can contradict."""

    key: str
    statement: str
    paper: str
    """What the paper measured."""
    judge: Callable[[Results], Iterator[Evidence]]
    missing: str = "no result measures this"
    """Why there is no evidence, where there is none."""


def judge(results: Results) -> list[dict[str, Any]]:
    """All claims with all evidence, JSON-ready: one entry for each pair, and one ``not measured`` where there is no evidence."""
    entries = []
    for claim in CLAIMS:
        found = list(claim.judge(results)) or [Evidence(NOT_MEASURED, note=claim.missing)]
        entries += [
            {"claim": claim.key, "statement": claim.statement, "paper": claim.paper, **asdict(evidence)} for evidence in found
        ]
    return entries


def _nothing(results: Results) -> Iterator[Evidence]:
    return iter(())


def _all_of(*judges: Callable[[Results], Iterator[Evidence]]) -> Callable[[Results], Iterator[Evidence]]:
    """The evidence of several judges, one after the other."""
    return lambda results: chain.from_iterable(judge_one(results) for judge_one in judges)


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _paper_allocation() -> str:
    parts = []
    for budget, entry in PAPER["allocation"].items():
        share = min(entry["loss"], key=lambda rho: entry["loss"][rho])
        parts.append(f"{budget}: {entry['loss'][1.0]:.4f} at 100 %, {entry['loss'][share]:.4f} at {_percent(share)}")
    return "; ".join(parts)


def _paper_optimum() -> str:
    first, last = PAPER["optimum"]["text"]
    return f"{_percent(first)} to {_percent(last)} (text), {_percent(PAPER['optimum']['plotted'])} (lowest plotted points)"


def _paper_slots() -> str:
    sizes = PAPER["slots"]["loss"]
    small, large = min(sizes), max(sizes)
    slope = (sizes[large] - sizes[small]) / math.log10(large / small)
    return (
        f"{sizes[small]:.3f} at {small:.2g} slots, {sizes[large]:.3f} at {large:.2g}: {slope:+.4f} per decade from end to end"
    )


def _paper_layers(*numbers: int) -> str:
    return ", ".join(f"layer {n}: {PAPER['ablation']['layers'][n]:.3f}" for n in numbers)


def _paper_tasks() -> str:
    return ", ".join(f"{name} {engram} against {experts}" for name, (engram, experts) in PAPER["tasks"].items())


def _paper_recall(kind: str) -> str:
    engram, experts = PAPER["recall"][kind]
    return f"{100 * engram:.1f} against {100 * experts:.1f} ({PAPER['comparison']['scale']})"


_ABLATIONS = tuple(
    Claim(f"ablation_{key}", f"{name[0].upper()}{name[1:]} the loss is higher", f"{change:+.4f}", sweeps.ablated(key))
    for key, (name, change) in PAPER["ablation"]["changes"].items()
)
_ABLATION = PAPER["ablation"]
_KEPT = PAPER["kept_with_memory_off"]
_TASKS = "the models are too small for the tasks that the paper asks"

CLAIMS: tuple[Claim, ...] = (
    Claim("u_shape", "Loss is U-shaped in the experts' share, lowest below 100 %", _paper_allocation(), sweeps.u_shape),
    Claim("optimum", "The best share is three quarters or a little more", _paper_optimum(), sweeps.optimum),
    Claim(
        "gain",
        "At the best share, experts with memory beat experts alone by more than seeds differ",
        f"{_paper_allocation()}; {PAPER['comparison']['scale']}: {PAPER['comparison']['engram']} against {PAPER['comparison']['experts']}",
        sweeps.gain,
    ),
    Claim("slope", "Loss falls with every decade of slots", _paper_slots(), sweeps.slope),
    Claim(
        "largest_table",
        "The largest table beats no memory",
        f"{PAPER['slots']['loss'][max(PAPER['slots']['loss'])]:.3f} against {PAPER['slots']['none']:.3f}",
        sweeps.largest_table,
    ),
    Claim(
        "memory",
        "Without the memory the loss is higher",
        f"{_ABLATION['none']:.3f} against {_ABLATION['reference']:.3f}",
        sweeps.memory_helps,
    ),
    *_ABLATIONS,
    Claim(
        "first_layer",
        "One module at the first layer is worse than at the second",
        _paper_layers(1, 2),
        sweeps.placement(sweeps.first_two),
    ),
    Claim(
        "late_layer",
        "One module late is worse than at the second layer",
        _paper_layers(12, 2),
        sweeps.placement(sweeps.last_against_second),
    ),
    Claim(
        "two_modules",
        "One module at the second layer is worse than two",
        f"{_ABLATION['layers'][2]:.3f} against {_ABLATION['reference']:.3f}",
        sweeps.single_module,
    ),
    Claim(
        "logit_lens",
        "With a memory, early layers know sooner what the model will say",
        "seen in a figure",
        _all_of(looks.logit_lens, seeds.logit_lens),
    ),
    Claim(
        "alignment",
        "Early layers with a memory resemble later layers without",
        "layer {} resembles layer {}".format(*PAPER["similar_layers"]),
        _all_of(looks.alignment, seeds.alignment),
    ),
    Claim(
        "multi_query",
        "More is found again in long text: multi-query needles",
        _paper_recall("multi_query"),
        looks.recall("multi_query"),
    ),
    Claim(
        "tracking", "More is found again in long text: variable tracking", _paper_recall("tracking"), looks.recall("tracking")
    ),
    Claim(
        "gates",
        "Gates open at tokens that complete a name or a phrase",
        "seen in a figure",
        _all_of(looks.phrase_gates, seeds.phrase_gates),
        "no look was told of names or phrases (`engram look --phrases`)",
    ),
    Claim("tasks", "Tasks are solved better: knowledge, reasoning, code, mathematics", _paper_tasks(), _nothing, _TASKS),
    Claim(
        "memory_off",
        "With the memory off, facts are lost and reading comprehension is kept",
        f"{_percent(_KEPT['factual'][0])} to {_percent(_KEPT['factual'][1])} kept of factual tasks, {_percent(_KEPT['reading'][0])} to "
        f"{_percent(_KEPT['reading'][1])} of reading",
        seeds.memory_off,
        f"{_TASKS}; losses by kind of text are in the section on looks inside, if they were measured",
    ),
    Claim(
        "throughput",
        "A table in host memory costs inference next to nothing",
        ", ".join(f"{100 * change:+.1f} % ({size} backbone)" for size, change in PAPER["throughput"].items()),
        _nothing,
        "training steps are timed here, and decoding with a small table in docs/speed.md, not inference with a table of the paper's size",
    ),
)
"""In the order of the report."""
