"""What a lesson means for the facts that are there already: known, joined, contradicted or new."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from engram.data.facts import Fact, quoted
from engram.editing.ledger import Ledger, LedgerFact
from engram.errors import TeachError, first_of

__all__ = ["SortedFacts", "in_parts", "sort_out"]

_SHOWN = 5


@dataclass
class SortedFacts:
    """The outcome, before anything is changed."""

    new: dict[str, Fact] = field(default_factory=dict)
    """What is to be written, by the id under which it will stand."""
    leaving: dict[str, list[str]] = field(default_factory=dict)
    """For each of those, the facts of the memory that make way for it: contradicted, or taught again with more phrasings."""
    given: dict[str, list[str]] = field(default_factory=dict)
    """For each of those, the ids of the lesson's facts in it."""
    joined: dict[str, str] = field(default_factory=dict)
    """Ids that will name nothing, and the id under which their prompts will stand."""
    already_known: list[str] = field(default_factory=list)
    holding: list[str] = field(default_factory=list)
    """The facts of the memory by which those are known."""
    contradictions: list[str] = field(default_factory=list)
    """One line each."""

    def refuse_contradictions(self) -> None:
        """Raise if there are any.

        Raises:
            TeachError: there are; the first few are listed.
        """
        if not self.contradictions:
            return
        raise TeachError(
            f"facts contradict the memory: {first_of(self.contradictions, _SHOWN, '; ')}. Forget those first, or have them replaced "
            "(--replace, replace_answers=True)."
        )


def sort_out(ledger: Ledger, facts: Sequence[Fact], stale: Collection[str] = ()) -> SortedFacts:
    """Compare a lesson with what a memory holds; what it holds under a ``stale`` id counts as forgotten in part, and is taught again.

    A fact of the memory that any fact of the lesson contradicts leaves as a whole; what comes in its place has its id and its category, if it
    names none. Facts of one answer that share a prompt or an id, be it by way of others, are one fact, under the id of the first that the
    memory holds.
    """
    found, relatives = SortedFacts(), [_relatives(ledger, fact) for fact in facts]
    said = {prompt for fact in facts for prompt in fact.prompts}
    opposed = [[holder for holder in holders if holder.answer != fact.answer] for fact, holders in zip(facts, relatives)]
    found.contradictions = [_contradiction(holder, fact, said) for fact, holders in zip(facts, opposed) for holder in holders]
    gone = {holder.id for holders in opposed for holder in holders}
    agreeing = [[h for h in holders if h.id not in gone] for holders in relatives]
    for group in _connected(agreeing):
        holders = {holder.id: holder for number in group for holder in agreeing[number]}
        members = [facts[number] for number in group]
        making_way = [holder.id for number in group for holder in opposed[number]]
        known = all(any(set(fact.prompts) <= set(h.to_fact().prompts) for h in holders.values()) for fact in members)
        if known and not making_way and not holders.keys() & set(stale):
            found.already_known += [fact.id for fact in members]
            found.holding += holders
            continue
        joined = _joined([*(holder.to_fact() for holder in holders.values()), *members])
        heir = _heir(joined, {holder.id: holder for number in group for holder in opposed[number]}, found.new)
        found.new[heir.id] = heir
        found.given[heir.id] = [fact.id for fact in members]
        found.leaving[heir.id] = [*making_way, *holders]
        found.joined |= {name: heir.id for name in [*found.given[heir.id], *holders] if name not in (joined.id, heir.id)}
    found.joined = {name: kept for name, kept in found.joined.items() if name not in found.new}
    return found


def in_parts(ledger: Ledger, facts: Sequence[Fact], size: int) -> list[list[Fact]]:
    """A long lesson as lessons of about ``size`` facts, in order; those that concern the same fact of the memory stay together, since it is
    judged as a whole whether that one is known, joined or replaced.
    """
    parts: list[list[Fact]] = [[]]
    for group in _connected([_relatives(ledger, fact) for fact in facts]):
        if len(parts[-1]) >= size:
            parts.append([])
        parts[-1] += [facts[number] for number in group]
    return parts


def _relatives(ledger: Ledger, fact: Fact) -> list[LedgerFact]:
    """Facts of the memory that have a prompt or the id of this one."""
    owners = [ledger.owner_of_prompt(prompt) for prompt in fact.prompts]
    if fact.id in ledger:
        owners.append(ledger[fact.id])
    return list({owner.id: owner for owner in owners if owner is not None}.values())


def _connected(holders: Sequence[Sequence[LedgerFact]]) -> list[list[int]]:
    """Numbers of the facts of the lesson, those together that share holders, be it by way of others; in the lesson's order."""
    leader, first = list(range(len(holders))), dict[str, int]()

    def find(number: int) -> int:
        while leader[number] != number:
            leader[number] = leader[leader[number]]
            number = leader[number]
        return number

    for number, own in enumerate(holders):
        for holder in own:
            one, other = find(first.setdefault(holder.id, number)), find(number)
            leader[max(one, other)] = min(one, other)
    groups: dict[int, list[int]] = {}
    for number in range(len(holders)):
        groups.setdefault(find(number), []).append(number)
    return list(groups.values())


def _contradiction(held: LedgerFact, fact: Fact, said: set[str]) -> str:
    texts = [prompt.text for prompt in held.prompts]
    was, now = quoted(held.answer), quoted(fact.answer)
    shared = next((text for text in texts if text in fact.prompts), None)
    if shared is None:
        return f"the id {fact.id!r} names {quoted(texts[0])} -> {was} in the memory, {quoted(fact.prompts[0])} -> {now} now (ids must differ)"
    others = [repr(text) for text in texts if text not in said]
    also = f"; its other phrasings go too: {', '.join(others)}" if others else ""
    return f"{quoted(shared)} is {was} in the memory (fact {held.id}), {now} now{also}"


def _joined(facts: Sequence[Fact]) -> Fact:
    """One fact with the prompts of all, under the id of the first and in the category that was named last."""
    prompts = tuple(dict.fromkeys(prompt for fact in facts for prompt in fact.prompts))
    held_out = tuple(dict.fromkeys(p for fact in facts for p in fact.held_out if p not in prompts))
    category = next((fact.category for fact in reversed(facts) if fact.category != Fact.category), Fact.category)
    return replace(facts[-1], prompts=prompts, held_out=held_out, id=facts[0].id, category=category)


def _heir(fact: Fact, making_way: Mapping[str, LedgerFact], taken: Collection[str]) -> Fact:
    """A fact in the place of the one that makes way for it: unless it says otherwise, the same fact with another answer."""
    if len(making_way) != 1:
        return fact
    [held] = making_way.values()
    named = fact.id != Fact(fact.prompts, fact.answer).id
    return replace(
        fact,
        id=fact.id if named or held.id in taken else held.id,
        category=held.category if fact.category == Fact.category else fact.category,
    )
