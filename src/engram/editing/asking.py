"""What a tokenizer makes of texts and of ids: whether it asks as facts were taught, and gives back what they say.

Rows are found by token ids, people ask in text. Between the two stands the tokenizer, and one of the same vocabulary may still split a text
otherwise (a token at either end, a space in front, tokens added since): then the ids of the ledger are right, and nobody asks with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from engram.data.facts import quoted, tokenize_prompts
from engram.editing.keys import KeyedPrompt
from engram.editing.ledger import LedgerFact

__all__ = ["at_start_only", "not_given_back", "out_of_reach"]

_BEFORE = "Well. "
"""Text before a prompt, when it is looked for in running text."""


def not_given_back(tokenizer: Any, facts: Sequence[LedgerFact]) -> dict[str, str]:
    """Facts whose answers would not be read as they were written, by id, with the reason."""
    read = {fact.id: (fact.answer, _read_instead(tokenizer, fact)) for fact in facts}
    return {
        fact_id: f"its answer {quoted(answer)} comes back from the tokenizer as {quoted(text)} (it has signs or spaces that the vocabulary "
        "lacks or changes, or special tokens): put it in other words, or write it as it comes back"
        for fact_id, (answer, text) in read.items()
        if text is not None
    }


def out_of_reach(tokenizer: Any, facts: Sequence[LedgerFact]) -> list[str]:
    """Ids of the facts that nobody gets to read through this tokenizer, whatever the model: one of their prompts has other ids than when it
    was taught, or the answer is not given back.
    """
    asked = [(fact.id, prompt) for fact in facts for prompt in fact.prompts]
    now = tokenize_prompts(tokenizer, [prompt.text for _, prompt in asked])
    otherwise = {fact_id for (fact_id, prompt), ids in zip(asked, now) if list(prompt.prompt_ids) != ids}
    return [fact.id for fact in facts if fact.id in otherwise or _read_instead(tokenizer, fact) is not None]


def at_start_only(tokenizer: Any, facts: Sequence[LedgerFact]) -> list[str]:
    """Ids of the facts one of whose prompts is answered only as the beginning of an input, or of a line: its key takes in the first word,
    which is another token behind a space, or the padding before it.
    """
    asked = [(fact.id, prompt) for fact in facts for prompt in fact.prompts]
    inside = tokenize_prompts(tokenizer, [_BEFORE + prompt.text for _, prompt in asked])
    return list(dict.fromkeys(fact_id for (fact_id, prompt), ids in zip(asked, inside) if not _is_found(prompt, ids)))


def _is_found(prompt: KeyedPrompt, ids: list[int]) -> bool:
    """Whether these ids end in the prompt's key; one with padding in it is longer than the prompt."""
    key = prompt.key_length
    return key <= len(prompt.prompt_ids) and list(prompt.prompt_ids[-key:]) == ids[-key:]


def _read_instead(tokenizer: Any, fact: LedgerFact) -> str | None:
    """What is read where the fact's answer is said, if it is not the answer."""
    for ids in dict.fromkeys(prompt.answer_ids[:-1] for prompt in fact.prompts):  # the last one ends it
        text: str = tokenizer.decode(list(ids), skip_special_tokens=True).strip()
        if text != fact.answer:
            return text
    return None
