"""`engram look`: every look inside that a model allows, as one result."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from engram.analysis.cka import cka
from engram.analysis.gains import gains
from engram.analysis.gates import gates
from engram.analysis.logit_lens import logit_lens
from engram.analysis.losses import memory_off, token_losses
from engram.analysis.phrases import phrase_gates
from engram.analysis.rows import row_usage
from engram.analysis.sample import Progress, Sample, sample_texts
from engram.analysis.subject import Subject
from engram.analysis.zipf import row_zipf
from engram.errors import ConfigError
from engram.models.positions import context_length

__all__ = ["ANALYSES", "look", "refusal"]

ANALYSES = ("gates", "phrases", "logit_lens", "cka", "memory_off", "rows", "zipf", "gains")
"""Names of the analyses, in the order in which they are shown."""

_WITHOUT_MEMORY = ("logit_lens", "cka")
_HASHED_LENGTH = 1024

Start = Callable[[str, int], Progress]
"""Called with an analysis and the number of tokens it will go through; gives what is told of tokens done."""


def refusal(name: str, subject: Subject, phrases: Sequence[str] | None = None) -> str | None:
    """Why an analysis makes no sense for a model, or without phrases to look for; None if it does."""
    if not subject.has_memory and name not in _WITHOUT_MEMORY:
        return "it looks at a memory, and none was given"
    if name == "rows" and subject.model.engram_config.verify_rows:
        return "this memory's rows are verified: no n-gram reads another's, and only rows in use exist"
    if name == "phrases" and not phrases:
        return "no phrases were named (--phrases FILE)"
    return None


def look(
    subject: Subject,
    tokenizer: Any,
    texts: Mapping[str, Sequence[str]],
    what: Sequence[str] | None = None,
    against: tuple[Subject, Any] | None = None,
    tokens: int = 6000,
    row_tokens: int = 60_000,
    length: int = 128,
    start: Start | None = None,
    phrases: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Run analyses of a model on texts.

    Args:
        subject: the model.
        tokenizer: its tokenizer.
        texts: kinds of text and their documents.
        what: names from ``ANALYSES``; all that make sense for this model if None.
        against: a second model and its tokenizer, for ``logit_lens`` and ``cka``; without one a memory is compared with itself
            switched off, and a plain model's layers with one another.
        tokens: how many are run through the models.
        row_tokens: how many are only hashed (``rows`` and ``zipf``).
        length: tokens per window that is run through the models, at most their context.
        start: told when an analysis begins.
        phrases: names and phrases at whose ends gates are looked at (``phrases``).

    Returns:
        ``model`` and ``against`` (their names), ``has_memory`` (of both), ``text`` and ``text_hashed`` (what was read), ``skipped`` (name:
        reason) and one entry per analysis under its name. Curves of the lens are those of ``memory on`` and ``memory off``, or of ``model``
        where it has no memory, and of ``against``.

    Raises:
        ConfigError: an analysis is unknown or makes no sense for this model, or the second model has another vocabulary.
        DataError: there is no text to read, or none of the phrases occurs in it.
    """
    names, skipped = _chosen(subject, what, phrases)
    if against is not None:
        _check_vocabulary(tokenizer, against[1])
    second = None if against is None else against[0]
    length = min([length, *(_context(s) for s in (subject, second) if s is not None)])
    sample = sample_texts(tokenizer, texts, tokens, length)
    begin: Start = start or (lambda name, total: lambda done: None)
    hashed = cache(lambda: sample_texts(tokenizer, texts, row_tokens, max(length, _HASHED_LENGTH)))
    losses = cache(lambda: token_losses(subject.model, sample, begin("losses", sample.tokens)))
    run: dict[str, Callable[[], dict[str, Any]]] = {
        "gates": lambda: gates(subject.model, sample, tokenizer, progress=begin("gates", sample.tokens)),
        "phrases": lambda: phrase_gates(
            subject.model, sample, tokenizer, phrases or (), progress=begin("phrases", sample.tokens)
        ),
        "logit_lens": lambda: _lens(subject, second, sample, begin),
        "cka": lambda: cka(*_pair(subject, second), sample, begin("cka", sample.tokens)),
        "memory_off": lambda: memory_off(losses(), sample, tokenizer),
        "rows": lambda: row_usage(subject.model, hashed()),
        "zipf": lambda: row_zipf(subject.model, hashed()),
        "gains": lambda: gains(subject.model, losses(), sample, tokenizer),
    }
    result: dict[str, Any] = {"model": subject.name, "against": None if second is None else second.name}
    result["has_memory"] = {"model": subject.has_memory, "against": second is not None and second.has_memory}
    result |= {"text": sample.to_dict(), "text_hashed": None, "skipped": skipped}
    if {"rows", "zipf"} & set(names):
        result["text_hashed"] = hashed().to_dict()
    return result | {name: run[name]() for name in names}


def _chosen(subject: Subject, what: Sequence[str] | None, phrases: Sequence[str] | None) -> tuple[list[str], dict[str, str]]:
    if what is None:
        reasons = {name: refusal(name, subject, phrases) for name in ANALYSES}
        return [n for n in ANALYSES if reasons[n] is None], {n: reason for n, reason in reasons.items() if reason is not None}
    unknown = [name for name in what if name not in ANALYSES]
    if unknown or not what:
        raise ConfigError(f"look: got {', '.join(unknown) or 'nothing to do'}, expected some of {', '.join(ANALYSES)}.")
    for name in what:
        reason = refusal(name, subject, phrases)
        if reason is not None:
            raise ConfigError(f"look: {name} cannot be done: {reason}. Leave it out, or name a memory it fits.")
    return [name for name in ANALYSES if name in what], {}


def _lens(subject: Subject, second: Subject | None, sample: Sample, begin: Start) -> dict[str, Any]:
    subjects = {"model": subject}
    if subject.has_memory:
        subjects = {"memory on": subject, "memory off": Subject("memory off", subject.model, False)}
    if second is not None:
        subjects["against"] = second
    return logit_lens(subjects, sample, begin("logit_lens", sample.tokens * len(subjects)))


def _pair(subject: Subject, second: Subject | None) -> tuple[Subject, Subject]:
    if second is not None:
        return subject, second
    if subject.has_memory:
        return Subject("memory on", subject.model), Subject("memory off", subject.model, False)
    return subject, subject


def _context(subject: Subject) -> int:
    return context_length(subject.base.config) or 1 << 30


def _check_vocabulary(one: Any, other: Any) -> None:
    if one.get_vocab() != other.get_vocab():
        raise ConfigError(
            f"look: the second model's tokenizer has another vocabulary ({len(other)} tokens, the first {len(one)}); expected two "
            "models that read the same tokens."
        )
