"""`engram eval`: one result of one schema for everything a memory is judged by, and its Markdown table."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from engram.data.facts import Fact, pad_right, tokenize_prompt
from engram.errors import DataError
from engram.evaluation.answers import Answer, check_facts, compare_answers, reads_memory, score_by_category, wilson_interval
from engram.evaluation.bits_per_byte import bits_per_byte
from engram.evaluation.drift import measure_drift
from engram.models import EngramModel, Router
from engram.models.cache import cache_argument, cache_in
from engram.models.devices import input_device
from engram.models.positions import within_context

__all__ = ["EvalResult", "FactResult", "ShareResult", "evaluate_memory", "markdown_table"]

_GATE_BINS = 20
_DECODE_ROUNDS, _DECODE_TOKENS = 5, 16


@dataclass(frozen=True)
class FactResult:
    """One prompt asked."""

    id: str
    category: str
    prompt: str
    expected: str
    answer: str
    exact: bool
    held_out: bool
    """Whether this phrasing was never taught."""


@dataclass(frozen=True)
class ShareResult:
    """Exact answers of a group of prompts."""

    prompts: int
    exact: int
    share: float
    low: float
    high: float
    """Wilson's 95 % interval is ``low`` to ``high``."""

    @classmethod
    def of(cls, exact: int, prompts: int) -> ShareResult:
        """From counts."""
        low, high = wilson_interval(exact, prompts)
        return cls(prompts, exact, exact / prompts if prompts else 0.0, low, high)


@dataclass
class EvalResult:
    """What a memory knows, what it harms and what it costs. ``to_dict`` is the schema of ``engram eval --json``."""

    recall: float
    """Exact answers per taught prompt, 0 to 1."""
    recall_held_out: float | None
    """The same for phrasings never taught; None if there are none."""
    kl_to_base: float
    """Mean KL(base || with memory) over the tokens of the texts, nats."""
    categories: dict[str, ShareResult]
    categories_held_out: dict[str, ShareResult]
    harm: dict[str, dict[str, float]]
    """Per kind of text: ``tokens``, ``mean_kl``, ``tokens_changed``, ``untouched`` (share of texts with the base's logits, bit for bit)."""
    bits_per_byte: dict[str, float] | None
    """``base`` and ``memory`` on held-out text."""
    known: dict[str, int] | None
    """Of what the base knew: ``prompts``, ``known``, ``still_right``, ``changed``."""
    latency: dict[str, float]
    """Median seconds per new token: ``base``, ``memory`` (after a text that reads no row, if one was given), ``ratio``."""
    bytes: dict[str, int]
    """``rows``: bytes of the rows with addresses and tags. ``base``: bytes of the base model's weights."""
    gates: dict[str, list[int]]
    """Histograms of gates over all positions, 20 bins over 0..1, for ``taught`` and ``untaught`` text; where no row is read the gate
    counts as closed (first bin)."""
    facts: list[FactResult] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields."""
        return asdict(self)


def evaluate_memory(
    memory: EngramModel,
    tokenizer: Any,
    facts: Sequence[Fact],
    texts: Mapping[str, Sequence[str]],
    held_out_text: Sequence[str] = (),
    known: Sequence[Fact] = (),
    router: Router | None = None,
    progress: Callable[[int], None] | None = None,
) -> EvalResult:
    """Ask everything, on and off, and measure harm and cost.

    Args:
        memory: an attached memory.
        tokenizer: the model's tokenizer.
        facts: what it was taught.
        texts: by kind, texts it has no business with.
        held_out_text: documents for bits per byte.
        known: facts the base model may know and the memory was not taught.
        router: decides per prompt, and per text, whether the memory is read.
        progress: called with the number of prompts answered since the last call.

    Raises:
        DataError: there are no facts, or a prompt takes all positions of a model with learnt ones.
    """
    if not facts:
        raise DataError("evaluate_memory: got no facts, expected at least one to ask for.")
    answers = check_facts(memory, tokenizer, facts, progress=progress, router=router)
    unseen = check_facts(memory, tokenizer, facts, progress=progress, held_out=True, router=router)
    drift = {kind: measure_drift(memory, tokenizer, group, router=router) for kind, group in texts.items()}
    tokens = sum(d.tokens for d in drift.values())
    return EvalResult(
        recall=sum(a.exact for a in answers) / len(answers),
        recall_held_out=sum(a.exact for a in unseen) / len(unseen) if unseen else None,
        kl_to_base=sum(d.mean_kl * d.tokens for d in drift.values()) / max(tokens, 1),
        categories=_shares(facts, answers),
        categories_held_out=_shares(facts, unseen),
        harm={kind: asdict(d) for kind, d in drift.items()},
        bits_per_byte=_bits(memory, tokenizer, held_out_text, router),
        known=_known(memory, tokenizer, known, router),
        latency=_latency(memory, tokenizer, _quiet_text(memory, tokenizer, texts)) if texts else {},
        bytes=_bytes(memory),
        gates=_gates(memory, tokenizer, answers, texts, router),
        facts=[*_fact_results(facts, answers, False), *_fact_results(facts, unseen, True)],
    )


def markdown_table(result: Mapping[str, Any]) -> str:
    """The result (``to_dict``) as Markdown: recall by category, then harm and cost."""
    lines = ["| category | prompts | exact | 95 % interval | held-out phrasings |", "|---|---|---|---|---|"]
    for name, share in result["categories"].items():
        other = result["categories_held_out"].get(name)
        unseen = f"{100 * other['share']:.1f} % of {other['prompts']}" if other else ""
        lines.append(
            f"| {name} | {share['prompts']} | {100 * share['share']:.1f} % | {100 * share['low']:.1f}-{100 * share['high']:.1f} % | {unseen} |"
        )
    lines += [
        "",
        "| harm and cost | |",
        "|---|---|",
        f"| KL to the base on other text | {result['kl_to_base']:.2e} nats per token |",
    ]
    for kind, drift in result["harm"].items():
        same = f"{100 * drift['untouched']:.0f} % of texts bit for bit"
        lines.append(f"| {kind}: next tokens changed | {drift['tokens_changed']} of {drift['tokens']}; {same} |")
    if result["bits_per_byte"]:
        bits = result["bits_per_byte"]
        lines.append(f"| held-out bits per byte | {bits['base']:.4f} -> {bits['memory']:.4f} |")
    if result["known"]:
        known = result["known"]
        lines.append(
            f"| what the base knew, still right | {known['still_right']} of {known['known']} ({known['changed']} answers changed) |"
        )
    if result["latency"]:
        lines.append(f"| time per token, no row read | x{result['latency']['ratio']:.3f} of the base model's |")
    lines.append(f"| bytes of the rows | {result['bytes']['rows']:,} (base model {result['bytes']['base']:,}) |")
    return "\n".join(lines) + "\n"


def _shares(facts: Sequence[Fact], answers: Sequence[Answer]) -> dict[str, ShareResult]:
    return {score.category: ShareResult.of(score.exact, score.prompts) for score in score_by_category(facts, answers)}


def _fact_results(facts: Sequence[Fact], answers: Sequence[Answer], held_out: bool) -> list[FactResult]:
    return [
        FactResult(facts[a.fact_index].id, facts[a.fact_index].category, a.prompt, a.expected, a.said, a.exact, held_out)
        for a in answers
    ]


def _bits(memory: EngramModel, tokenizer: Any, texts: Sequence[str], router: Router | None) -> dict[str, float] | None:
    if not _size(texts):
        return None

    def bits(group: Sequence[str]) -> float:
        return bits_per_byte(memory, tokenizer, group) * _size(group) if _size(group) else 0.0

    reads = reads_memory(router, texts)
    routed = bits([text for text, read in zip(texts, reads) if read])
    with memory.disable_engram():
        base = bits(texts)
        routed += bits([text for text, read in zip(texts, reads) if not read])
    return {"base": base / _size(texts), "memory": routed / _size(texts)}


def _size(texts: Sequence[str]) -> int:
    return sum(len(text.encode()) for text in texts)


def _known(memory: EngramModel, tokenizer: Any, facts: Sequence[Fact], router: Router | None) -> dict[str, int] | None:
    if not facts:
        return None
    with memory.disable_engram():
        before = check_facts(memory, tokenizer, facts)
    return compare_answers(before, check_facts(memory, tokenizer, facts, router=router))


@torch.no_grad()
def _quiet_text(memory: EngramModel, tokenizer: Any, texts: Mapping[str, Sequence[str]]) -> str:
    """The first text of which nothing was taught; the first of all if there is none."""
    each = [text for group in texts.values() for text in group]
    device, longest = input_device(memory), within_context(memory.config, 256)
    for text in each if memory.engram_config.verify_rows else ():
        ids = torch.tensor([tokenize_prompt(tokenizer, text)[:longest]], device=device)
        with memory.record() as traces:
            memory(input_ids=ids, use_cache=False)
        if not any(trace["gate"].any() for trace in traces.values()):
            return text
    return each[0]


@torch.no_grad()
def _latency(memory: EngramModel, tokenizer: Any, text: str) -> dict[str, float]:
    """Decode a few tokens after a text that was read before, memory on and off in turn; medians over rounds."""
    device = input_device(memory)
    prompt = tokenize_prompt(tokenizer, text)
    room = within_context(memory.config, len(prompt) + _DECODE_TOKENS) - _DECODE_TOKENS
    ids = torch.tensor([prompt[: max(room, 1)]], device=device)
    name = cache_argument(memory.base_model)
    times: dict[str, list[float]] = {"base": [], "memory": []}

    def decode() -> float:
        output = memory(input_ids=ids, use_cache=True)
        chosen = int(output.logits[0, -1].argmax())  # as a number of the host, so that the clock starts when the device is done
        started = time.perf_counter()
        for _ in range(_DECODE_TOKENS):
            step = torch.tensor([[chosen]], device=device)
            output = memory(input_ids=step, use_cache=True, **{name: cache_in(output)})
            chosen = int(output.logits[0, -1].argmax())
        return (time.perf_counter() - started) / _DECODE_TOKENS

    for _ in range(_DECODE_ROUNDS):
        with memory.disable_engram():
            times["base"].append(decode())
        times["memory"].append(decode())
    base, on = (statistics.median(times[name]) for name in ("base", "memory"))
    return {"base": base, "memory": on, "ratio": on / base}


def _bytes(memory: EngramModel) -> dict[str, int]:
    tables = [engram.table for engram in memory.engrams.values()]
    rows = sum(t.numel() * t.element_size() for table in tables for t in [*table.buffers(), *table.parameters()])
    return {"rows": rows, "base": sum(p.numel() * p.element_size() for p in memory.base_model.parameters())}


@torch.no_grad()
def _gates(
    memory: EngramModel, tokenizer: Any, answers: Sequence[Answer], texts: Mapping[str, Sequence[str]], router: Router | None
) -> dict[str, list[int]]:
    """How far gates open where rows are read; positions that read none count in the first bin of their histogram."""
    longest = within_context(memory.config, 256)
    samples = {
        "taught": [f"{a.prompt} {a.said}" for a in answers[:: max(1, len(answers) // 256)]],
        "untaught": [text for group in texts.values() for text in group][:256],
    }
    histograms = {}
    device = input_device(memory)
    for name, group in samples.items():
        total = torch.zeros(_GATE_BINS, dtype=torch.int64)
        for text, read in zip(group, reads_memory(router, group)):
            ids, _ = pad_right([tuple(tokenize_prompt(tokenizer, text)[:longest])], 0)
            if not read:
                total[0] += ids.numel() * len(memory.engrams)
                continue
            with memory.record() as traces:
                memory(input_ids=ids.to(device), use_cache=False)
            for trace in traces.values():
                total += torch.histc(trace["gate"].float().mean(-1).cpu(), _GATE_BINS, 0.0, 1.0).long()
        histograms[name] = total.tolist()
    return histograms
