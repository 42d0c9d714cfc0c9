"""The ledger: which facts a memory holds, from where and since when, and so which rows belong to whom.

Rows are not listed: they follow from a prompt's ids and key length (``plan_rows``), so the ledger can never disagree with the addresses.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from engram.data.facts import Fact
from engram.editing.keys import KeyedPrompt
from engram.errors import CheckpointError, TeachError

__all__ = ["Ledger", "LedgerFact", "answer_room", "what_it_says"]

_VERSION = 1


@dataclass(frozen=True)
class LedgerFact:
    """One fact in a memory."""

    id: str
    answer: str
    category: str
    prompts: tuple[KeyedPrompt, ...]
    held_out: tuple[str, ...] = ()
    source: str = ""
    """File the fact was taught from."""
    checksum: str = ""
    """SHA-256 of that file."""
    taught_at: str = ""
    """UTC, ISO 8601."""

    def to_fact(self) -> Fact:
        """As it stands in a facts file."""
        return Fact(tuple(prompt.text for prompt in self.prompts), self.answer, self.category, self.held_out, self.id)

    def same_as(self, other: LedgerFact | Fact) -> bool:
        """Whether both say the same: answer and prompts, whoever wrote them when."""
        return what_it_says(self) == what_it_says(other)


def what_it_says(fact: LedgerFact | Fact) -> tuple[str, frozenset[str]]:
    """Answer and prompts, whoever wrote them when."""
    plain = fact.to_fact() if isinstance(fact, LedgerFact) else fact
    return plain.answer, frozenset(plain.prompts)


def answer_room(facts: Iterable[LedgerFact], at_least: int) -> int:
    """Tokens that let every one of these answers be said to its end."""
    return max([at_least, *(len(prompt.answer_ids) for fact in facts for prompt in fact.prompts)])


class Ledger:
    """Facts by id, in the order in which they were taught."""

    def __init__(self, facts: Iterable[LedgerFact] = ()) -> None:
        self._facts = {fact.id: fact for fact in facts}
        self._by_prompt = {prompt.text: fact.id for fact in self._facts.values() for prompt in fact.prompts}

    def __repr__(self) -> str:
        return f"{type(self).__name__}(facts={len(self)}, prompts={len(self._by_prompt)})"

    def __len__(self) -> int:
        return len(self._facts)

    def __iter__(self) -> Iterator[LedgerFact]:
        return iter(self._facts.values())

    def __contains__(self, fact_id: str) -> bool:
        return fact_id in self._facts

    def __getitem__(self, fact_id: str) -> LedgerFact:
        """A fact.

        Raises:
            TeachError: there is none of this id.
        """
        try:
            return self._facts[fact_id]
        except KeyError:
            raise TeachError(
                f"no fact {fact_id!r} in this memory; `engram facts` lists the ids of its {len(self)} facts."
            ) from None

    def owner_of_prompt(self, text: str) -> LedgerFact | None:
        """The fact that a prompt belongs to."""
        fact_id = self._by_prompt.get(text)
        return None if fact_id is None else self._facts[fact_id]

    def add(self, fact: LedgerFact) -> None:
        """Enter a fact."""
        self._facts[fact.id] = fact
        self._by_prompt.update({prompt.text: fact.id for prompt in fact.prompts})

    def remove(self, fact_id: str) -> LedgerFact:
        """Strike a fact out and return it."""
        fact = self[fact_id]
        del self._facts[fact_id]
        for prompt in fact.prompts:
            del self._by_prompt[prompt.text]
        return fact

    def copy(self) -> Ledger:
        """A ledger that can be changed without changing this one."""
        return Ledger(self)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields; sources are listed once."""
        sources: dict[tuple[str, str], int] = {}
        facts = []
        for fact in self:
            source = sources.setdefault((fact.source, fact.checksum), len(sources))
            prompts = [[p.text, list(p.prompt_ids), list(p.answer_ids), p.key_length] for p in fact.prompts]
            facts.append(
                {
                    "id": fact.id,
                    "answer": fact.answer,
                    "category": fact.category,
                    "prompts": prompts,
                    "held_out": list(fact.held_out),
                    "source": source,
                    "taught_at": fact.taught_at,
                }
            )
        return {"ledger_version": _VERSION, "sources": [{"file": f, "sha256": c} for f, c in sources], "facts": facts}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Ledger:
        """What ``to_dict`` gave.

        Raises:
            CheckpointError: the fields are malformed or of a newer version.
        """
        if fields.get("ledger_version") != _VERSION:
            raise CheckpointError(
                f"ledger: got version {fields.get('ledger_version')!r}, expected {_VERSION}; upgrade engram to read newer files."
            )
        try:
            sources = fields["sources"]
            return cls(
                LedgerFact(
                    id=entry["id"],
                    answer=entry["answer"].strip(),  # older versions kept white space, which nobody asks for
                    category=entry["category"],
                    prompts=tuple(KeyedPrompt(t, tuple(p), tuple(a), int(k)) for t, p, a, k in entry["prompts"]),
                    held_out=tuple(entry["held_out"]),
                    source=sources[entry["source"]]["file"],
                    checksum=sources[entry["source"]]["sha256"],
                    taught_at=entry["taught_at"],
                )
                for entry in fields["facts"]
            )
        except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
            raise CheckpointError(
                f"ledger: malformed entry ({type(error).__name__}: {error}). Copy the memory again."
            ) from error
