"""Facts as they will stand in the ledger: tokenised, their answers in tokens that can be said, their keys chosen."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

from engram.data.facts import EncodedFact, Fact, encode_fact
from engram.editing.keys import KeyedPrompt, choose_keys, surprise_bits
from engram.editing.ledger import LedgerFact
from engram.editing.lesson import TeachSettings
from engram.editing.spelling import Speller
from engram.errors import TeachError
from engram.models import EngramModel
from engram.models.positions import context_length

__all__ = ["make_entries"]


def make_entries(
    memory: EngramModel,
    tokenizer: Any,
    speller: Speller,
    facts: Sequence[Fact],
    held: Iterable[LedgerFact],
    settings: TeachSettings,
    source: str = "",
    checksum: str = "",
) -> list[LedgerFact]:
    """Ledger entries of facts, in their order.

    Args:
        memory: what they will be taught to.
        tokenizer: the model's tokenizer.
        speller: of the same model.
        facts: what to encode.
        held: what the memory holds already; keys are told apart from theirs.
        settings: least length and surprise of a key.
        source: file the facts come from.
        checksum: its SHA-256.

    Raises:
        DataError: a fact does not fit the model's context, or has the token that ends answers in its own.
        TeachError: no n-gram of this memory is as long as the shortest key allowed.
    """
    config = memory.engram_config
    if settings.min_order > config.max_ngram_size:
        raise TeachError(
            f"TeachSettings.min_order is {settings.min_order}, but the memory's n-grams end at {config.max_ngram_size}; "
            "lower min_order or make a memory with a larger max_ngram_size."
        )
    context = context_length(memory.config)
    encoded = [
        (text, row)
        for index, fact in enumerate(facts)
        for text, row in zip(fact.prompts, encode_fact(tokenizer, fact, index, context))
    ]
    reach = config.max_ngram_size + 1 - settings.min_order
    rows = [
        KeyedPrompt(text, row.prompt_ids, spelt if _has_room(row, spelt, context, reach) else row.answer_ids)
        for (text, row), spelt in zip(encoded, speller.spell([row.answer_ids for _, row in encoded]))
    ]
    keyed = iter(
        choose_keys(
            rows,
            surprise_bits(memory, rows, settings.batch_size),
            [prompt for fact in held for prompt in fact.prompts],
            config.max_ngram_size,
            settings.min_order,
            settings.min_bits,
            config.pad_id,
            tokenizer.bos_token_id,
        )
    )
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return [
        LedgerFact(
            fact.id,
            fact.answer,
            fact.category,
            tuple(next(keyed) for _ in fact.prompts),
            fact.held_out,
            source,
            checksum,
            now,
        )
        for fact in facts
    ]


def _has_room(row: EncodedFact, spelt: tuple[int, ...], context: int | None, reach: int) -> bool:
    """Whether an answer may be spelt so: within the context, and within reach of the shortest key where it was so before."""
    fits = context is None or len(row.prompt_ids) + len(spelt) <= context
    return fits and (len(spelt) <= reach or len(row.answer_ids) > reach)
