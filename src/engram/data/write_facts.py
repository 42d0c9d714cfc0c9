"""Facts as the files that `engram teach` reads."""

from __future__ import annotations

import json
from collections.abc import Iterable

from engram.data.facts import Fact

__all__ = ["facts_yaml", "quoted_yaml"]


def quoted_yaml(text: str) -> str:
    """A YAML text in double quotes (JSON's form is one)."""
    return json.dumps(text)


def facts_yaml(facts: Iterable[Fact]) -> str:
    """A facts file, one fact per line; ``load_facts`` gives back equal facts."""
    return "".join(f"- {{{', '.join(_fields(fact))}}}\n" for fact in facts) or "[]\n"


def _fields(fact: Fact) -> list[str]:
    fields = [
        f"id: {quoted_yaml(fact.id)}",
        f"category: {quoted_yaml(fact.category)}",
        f"prompts: {_listed(fact.prompts)}",
        f"answer: {quoted_yaml(fact.answer)}",
    ]
    return [*fields, f"held_out: {_listed(fact.held_out)}"] if fact.held_out else fields


def _listed(texts: Iterable[str]) -> str:
    return f"[{', '.join(map(quoted_yaml, texts))}]"
