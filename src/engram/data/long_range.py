"""The long-range task: facts are asked for after many tokens of text that has nothing to do with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from engram.data.facts import Fact
from engram.errors import DataError

__all__ = ["after_distraction"]


def after_distraction(tokenizer: Any, facts: Sequence[Fact], texts: Sequence[str], tokens: int) -> list[Fact]:
    """The facts with every prompt (held-out ones too) put after ``tokens`` tokens of distraction and a line break.

    Args:
        tokenizer: what tokens are counted with.
        facts: what to ask.
        texts: distraction; each fact gets another stretch of it.
        tokens: how much.

    Raises:
        DataError: the texts together are shorter than that.
    """
    options = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
    ids = [i for text in texts for i in tokenizer(text, **options)["input_ids"]]
    if len(ids) < tokens:
        raise DataError(f"distraction: got {len(ids)} tokens of text, expected at least {tokens}; give more text.")
    room = len(ids) - tokens
    changed = []
    for number, fact in enumerate(facts):
        start = room * number // max(len(facts) - 1, 1)
        before = tokenizer.decode(ids[start : start + tokens]) + "\n"
        prompts = tuple(before + prompt for prompt in fact.prompts)
        changed.append(replace(fact, prompts=prompts, held_out=tuple(before + prompt for prompt in fact.held_out)))
    return changed
