"""Asking a model and comparing its answers, word for word."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from engram.data.facts import EncodedFact, Fact, encode_fact, tokenize_prompt

__all__ = ["Answer", "CategoryScore", "ask", "check_facts", "score_by_category"]


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


@torch.no_grad()
def ask(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    max_new_tokens: int = 32,
    batch_size: int = 128,
    progress: Callable[[int], None] | None = None,
) -> list[str]:
    """Greedy answers to prompts, up to the end-of-text token, white space around them removed.

    Args:
        model: a causal language model, with or without a memory.
        tokenizer: its tokenizer (padding is put on the left here whatever its setting).
        prompts: what to ask.
        max_new_tokens: longest answer.
        batch_size: prompts per call of ``generate``.
        progress: called with the number of prompts answered since the last call.
    """
    encoded = [tokenize_prompt(tokenizer, prompt) for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(encoded[i]))
    device = model.get_input_embeddings().weight.device
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    answers = [""] * len(prompts)
    for start in range(0, len(order), batch_size):
        members = order[start : start + batch_size]
        longest = max(len(encoded[i]) for i in members)
        ids = torch.tensor([[pad] * (longest - len(encoded[i])) + encoded[i] for i in members])
        mask = torch.tensor([[0] * (longest - len(encoded[i])) + [1] * len(encoded[i]) for i in members])
        out = model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=pad,
            eos_token_id=tokenizer.eos_token_id,
        )
        for i, row in zip(members, out[:, longest:].tolist()):
            answers[i] = tokenizer.decode(_before(row, tokenizer.eos_token_id), skip_special_tokens=True).strip()
        if progress is not None:
            progress(len(members))
    return answers


def check_facts(
    model: Any, tokenizer: Any, facts: Sequence[Fact], batch_size: int = 128, progress: Callable[[int], None] | None = None
) -> list[Answer]:
    """Ask every prompt of every fact; answers may be as long as the longest expected one and a little more."""
    rows = [(index, prompt, fact.answer) for index, fact in enumerate(facts) for prompt in fact.prompts]
    longest = max(_answer_length(tokenizer, fact, index) for index, fact in enumerate(facts))
    said = ask(model, tokenizer, [prompt for _, prompt, _ in rows], longest + 2, batch_size, progress)
    return [Answer(index, prompt, expected, text) for (index, prompt, expected), text in zip(rows, said)]


def score_by_category(facts: Sequence[Fact], answers: Sequence[Answer]) -> list[CategoryScore]:
    """Exact answers per category, in the order in which categories first appear."""
    totals: dict[str, list[int]] = {}
    for answer in answers:
        entry = totals.setdefault(facts[answer.fact_index].category, [0, 0])
        entry[0] += 1
        entry[1] += answer.exact
    return [CategoryScore(category, prompts, exact) for category, (prompts, exact) in totals.items()]


def _answer_length(tokenizer: Any, fact: Fact, index: int) -> int:
    rows: list[EncodedFact] = encode_fact(tokenizer, fact, index)
    return max(len(row.answer_ids) for row in rows)


def _before(row: list[int], end: int) -> list[int]:
    return row[: row.index(end)] if end in row else row
