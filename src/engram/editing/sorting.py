"""What a lesson means for the facts that are there already: known, joined, contradicted or new."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from engram.data.facts import Fact
from engram.editing.ledger import Ledger, LedgerFact

__all__ = ["SortedFacts", "sort_out"]


@dataclass
class SortedFacts:
    """The outcome, before anything is changed."""

    new: dict[str, Fact] = field(default_factory=dict)
    """What is to be written, by the id under which it will stand."""
    leaving: dict[str, list[str]] = field(default_factory=dict)
    """For each of those, the facts of the memory that make way for it: contradicted, or taught again with more phrasings."""
    given: dict[str, list[str]] = field(default_factory=dict)
    """For each of those, the ids of the lesson's facts in it."""
    already_known: list[str] = field(default_factory=list)
    contradictions: list[str] = field(default_factory=list)
    """One line each."""

    @property
    def joined(self) -> dict[str, str]:
        """Ids that will name nothing, and the id under which their prompts will stand."""
        return {
            other: kept
            for kept, fact in self.new.items()
            for other in [*self.given[kept], *self.leaving[kept]]
            if other != kept and other not in self.new
        }


def sort_out(ledger: Ledger, facts: Sequence[Fact]) -> SortedFacts:
    """Compare a lesson with what a memory holds."""
    found = SortedFacts()
    for fact in facts:
        owners = [ledger.owner_of_prompt(prompt) for prompt in fact.prompts]
        holders = {holder.id: holder for holder in owners if holder is not None}
        if fact.id in ledger:
            holders[fact.id] = ledger[fact.id]
        opposed = [holder for holder in holders.values() if holder.answer != fact.answer]
        agreeing = [holder.to_fact() for holder in holders.values() if holder.answer == fact.answer]
        found.contradictions += [_contradiction(holder, fact) for holder in opposed]
        if any(set(fact.prompts) <= set(holder.prompts) for holder in agreeing):
            found.already_known.append(fact.id)
            continue
        joined = _joined([*agreeing, fact])
        found.new[joined.id] = _joined([found.new[joined.id], joined]) if joined.id in found.new else joined
        found.given.setdefault(joined.id, []).append(fact.id)
        found.leaving.setdefault(joined.id, []).extend([holder.id for holder in opposed] + [holder.id for holder in agreeing])
    return found


def _contradiction(held: LedgerFact, fact: Fact) -> str:
    texts = [prompt.text for prompt in held.prompts]
    shared = next((text for text in texts if text in fact.prompts), None)
    if shared is None:
        return (
            f"the id {fact.id!r} names {texts[0]!r} -> {held.answer!r} in the memory, "
            f"{fact.prompts[0]!r} -> {fact.answer!r} now (ids must differ)"
        )
    others = [repr(text) for text in texts if text not in fact.prompts]
    also = f"; {', '.join(others)} would leave with it" if others else ""
    return f"{shared!r} is {held.answer!r} in the memory (fact {held.id}), {fact.answer!r} now{also}"


def _joined(facts: Sequence[Fact]) -> Fact:
    """One fact with the prompts of all, under the id of the first."""
    prompts = tuple(dict.fromkeys(prompt for fact in facts for prompt in fact.prompts))
    held_out = tuple(dict.fromkeys(p for fact in facts for p in fact.held_out if p not in prompts))
    return replace(facts[-1], prompts=prompts, held_out=held_out, id=facts[0].id)
