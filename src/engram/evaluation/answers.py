"""Asking a model and comparing its answers, word for word."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch

from engram.data.facts import EncodedFact, Fact, encode_fact, room_before, tokenize_prompt
from engram.errors import DataError, refuse_one_text
from engram.evaluation.generation import generate_greedily, padding_id
from engram.models import Router
from engram.models.devices import input_device
from engram.models.positions import last_position

__all__ = [
    "Answer",
    "CategoryScore",
    "ask",
    "check_facts",
    "compare_answers",
    "reads_memory",
    "score_by_category",
    "wilson_interval",
]


@dataclass(frozen=True)
class Answer:
    """What was said to one prompt of one fact."""

    fact_index: int
    prompt: str
    expected: str
    said: str

    @property
    def exact(self) -> bool:
        """Whether the answer is the expected text, no more and no less."""
        return self.said == self.expected


@dataclass(frozen=True)
class CategoryScore:
    """Exact answers of one category."""

    category: str
    prompts: int
    exact: int

    @property
    def share(self) -> float:
        """Exact answers per prompt, 0 to 1."""
        return self.exact / self.prompts

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the share."""
        return wilson_interval(self.exact, self.prompts)


def wilson_interval(hits: int, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval of a share (E. B. Wilson, 1927); 95 % by default. No trials: 0 to 1."""
    if trials == 0:
        return 0.0, 1.0
    share, spread = hits / trials, z * z / trials
    centre = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / trials + spread / (4 * trials)) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)


def reads_memory(router: Router | None, prompts: Sequence[str]) -> list[bool]:
    """Which prompts may read the memory: all of them without a router."""
    return [True] * len(prompts) if router is None else [score >= router.threshold for score in router.scores(prompts)]


@torch.no_grad()
def ask(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    max_new_tokens: int = 32,
    batch_size: int = 128,
    progress: Callable[[int], None] | None = None,
    router: Router | None = None,
) -> list[str]:
    """Greedy answers to prompts, up to the end-of-text token, white space around them removed.

    Args:
        model: a causal language model, with or without a memory.
        tokenizer: its tokenizer (padding is put on the left here whatever its setting).
        prompts: what to ask.
        max_new_tokens: longest answer; shorter where a model with learnt positions has no more of them.
        batch_size: prompts per call of ``generate``.
        progress: called with the number of prompts answered since the last call.
        router: decides per prompt whether the model's memory is read; without one it always is.

    Raises:
        DataError: a prompt takes all positions of such a model, or is empty and has no token; one prompt in place of several.
    """
    refuse_one_text(prompts, "ask")
    encoded = [tokenize_prompt(tokenizer, prompt) for prompt in prompts]
    if not all(encoded):
        raise DataError(
            f"ask: prompt {encoded.index([]) + 1} is empty and this tokenizer begins with no token; expected some text."
        )
    end = last_position(model.config)
    rooms = [min(max_new_tokens, room_before(end, len(ids), prompt)) for prompt, ids in zip(prompts, encoded)]
    routed = None if router is None else reads_memory(router, prompts)
    device, pad = input_device(model), padding_id(tokenizer) or 0  # what pads is masked
    answers = [""] * len(prompts)
    for members in _batches(encoded, rooms, batch_size):
        longest = max(len(encoded[i]) for i in members)
        ids = torch.tensor([[pad] * (longest - len(encoded[i])) + encoded[i] for i in members])
        mask = torch.tensor([[0] * (longest - len(encoded[i])) + [1] * len(encoded[i]) for i in members])
        with nullcontext() if routed is None else model.routed(torch.tensor([routed[i] for i in members])):
            out = generate_greedily(model, tokenizer, ids.to(device), mask.to(device), rooms[members[0]])
        for i, row in zip(members, out[:, longest:].tolist()):
            answers[i] = tokenizer.decode(_before(row, tokenizer.eos_token_id), skip_special_tokens=True).strip()
        if progress is not None:
            progress(len(members))
    return answers


def check_facts(
    model: Any,
    tokenizer: Any,
    facts: Sequence[Fact],
    batch_size: int = 128,
    progress: Callable[[int], None] | None = None,
    held_out: bool = False,
    router: Router | None = None,
) -> list[Answer]:
    """Ask every prompt of every fact; answers may be as long as the longest expected one and a little more.

    Args:
        model: a causal language model, with or without a memory.
        tokenizer: its tokenizer.
        facts: what to ask for.
        batch_size: prompts per call of ``generate``.
        progress: called with the number of prompts answered since the last call.
        held_out: ask the phrasings that are never taught instead.
        router: as for ``ask``.

    Raises:
        DataError: as for ``ask``.
    """
    rows = [
        (index, prompt, fact.answer)
        for index, fact in enumerate(facts)
        for prompt in (fact.held_out if held_out else fact.prompts)
    ]
    if not rows:
        return []
    longest = max(*(_answer_length(tokenizer, fact, index) for index, fact in enumerate(facts)), _longest_taught(model, facts))
    said = ask(model, tokenizer, [prompt for _, prompt, _ in rows], longest + 2, batch_size, progress, router)
    return [Answer(index, prompt, expected, text) for (index, prompt, expected), text in zip(rows, said)]


def compare_answers(before: Sequence[Answer], after: Sequence[Answer]) -> dict[str, int]:
    """What became of answers that a model knew by itself, prompt by prompt.

    Args:
        before: without the memory.
        after: to the same prompts, with it.

    Returns:
        ``prompts``; ``known``, exact before; ``still_right``, exact in both; ``changed``, said otherwise.
    """
    return {
        "prompts": len(before),
        "known": sum(answer.exact for answer in before),
        "still_right": sum(was.exact and now.exact for was, now in zip(before, after)),
        "changed": sum(was.said != now.said for was, now in zip(before, after)),
    }


def score_by_category(facts: Sequence[Fact], answers: Sequence[Answer]) -> list[CategoryScore]:
    """Exact answers per category, in the order in which categories first appear."""
    totals: dict[str, list[int]] = {}
    for answer in answers:
        entry = totals.setdefault(facts[answer.fact_index].category, [0, 0])
        entry[0] += 1
        entry[1] += answer.exact
    return [CategoryScore(category, prompts, exact) for category, (prompts, exact) in totals.items()]


def _batches(encoded: Sequence[list[int]], rooms: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Indices of prompts of similar length and the same room: one near the end of the context would take it from the others."""
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    for _, same in groupby(order, key=lambda i: rooms[i]):
        group = list(same)
        for start in range(0, len(group), batch_size):
            yield group[start : start + batch_size]


def _answer_length(tokenizer: Any, fact: Fact, index: int) -> int:
    rows: list[EncodedFact] = encode_fact(tokenizer, fact, index)
    return max(len(row.answer_ids) for row in rows)


def _longest_taught(model: Any, facts: Sequence[Fact]) -> int:
    """Tokens of the longest of these answers as the model's memory was taught them: some are spelt in more than the tokenizer would take."""
    answers = {fact.answer for fact in facts}
    taught = (getattr(model, "ledger", None) or {"facts": ()})["facts"]
    return max((len(ids) for fact in taught if fact["answer"] in answers for _, _, ids, _ in fact["prompts"]), default=0)


def _before(row: list[int], end: int) -> list[int]:
    return row[: row.index(end)] if end in row else row
