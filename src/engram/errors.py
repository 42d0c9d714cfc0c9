"""Errors that a user can act on.

Every error says what was got, what was expected and how to fix it. Each class also subclasses the builtin that a caller would
expect, so ``except ValueError`` keeps working for code that has never heard of engram.
"""

from collections.abc import Iterable, Sequence

__all__ = [
    "AttachError",
    "BenchError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "EngramError",
    "FingerprintError",
    "MergeConflictError",
    "TableError",
    "TeachError",
    "TrainingError",
    "first_of",
    "nearest",
    "reason_of",
    "refuse_one_text",
]


class EngramError(Exception):
    """Base class of every error that engram raises on purpose."""


class ConfigError(EngramError, ValueError):
    """A configuration value is impossible, unknown or does not fit the model."""


class AttachError(EngramError, ValueError):
    """A memory cannot be attached to, detached from or run on this model in this way."""


class TableError(EngramError, ValueError):
    """A table was asked for rows, shapes or dtypes that it does not have."""


class CheckpointError(EngramError, OSError):
    """A saved memory is missing, truncated, malformed or cannot be written."""


class FingerprintError(EngramError, ValueError):
    """A saved memory belongs to another tokenizer, hash specification or base model."""


class MergeConflictError(EngramError, ValueError):
    """Two memories contradict each other, and nobody said which one wins."""


class DataError(EngramError, ValueError):
    """A facts file, corpus or recipe is missing or malformed."""


class TeachError(EngramError, RuntimeError):
    """Teaching could not do what was asked."""


class TrainingError(EngramError, RuntimeError):
    """A training run cannot go on: its loss or gradient is no number any more."""


class BenchError(EngramError, RuntimeError):
    """What was to be timed gives wrong results."""


def first_of(names: Sequence[str], shown: int, between: str = ", ") -> str:
    """The first ``shown`` of ``names`` for a message, and how many more there are."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return between.join(names[:shown]) + more


def nearest(name: str, known: Iterable[str], within: str = "") -> str:
    """A question for the end of a message: which of ``known`` may have been meant; nothing if none is like ``name``.

    Args:
        name: what was given.
        known: what there is.
        within: stands in front of the answer: the part, with its dot, that a dotted name is of.
    """
    import difflib  # which errors alone need

    near = difflib.get_close_matches(name, sorted(known), 1)
    return f" Did you mean {within}{near[0]}?" if near else ""


def reason_of(error: BaseException) -> str:
    """What somebody else's error says, for a message of ours: its first line, without the full stop, or its name where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def refuse_one_text(texts: Iterable[str], where: str) -> None:
    """Refuse one text where several are expected: it would be read letter by letter.

    Raises:
        DataError: ``texts`` is one.
    """
    if isinstance(texts, str):
        raise DataError(f"{where}: got one text, expected a list of them; write [text].")
