"""What the editor's operations say they did."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["ForgetReport", "RowConflict", "TeachReport"]


@dataclass
class TeachReport:
    """What teaching did."""

    taught: list[str] = field(default_factory=list)
    """Ids of the facts that are new in the memory."""
    already_known: list[str] = field(default_factory=list)
    """Ids of facts that were in the memory, word for word."""
    not_exact: dict[str, str] = field(default_factory=dict)
    """Facts that could not be made exact, by id, with the reason; nothing of them is in the memory."""
    replaced: list[str] = field(default_factory=list)
    """Contradictions in which the memory's fact gave way, all its phrasings with it, one line each."""
    at_start_only: list[str] = field(default_factory=list)
    """Those of ``taught`` one of whose prompts is answered only at the start of an input, or of a line: a longer prompt would be found in
    running text too."""
    joined: dict[str, str] = field(default_factory=dict)
    """Ids that name nothing now, and the id under which their prompts stand: facts of one answer that share a prompt are one fact."""
    prompts: int = 0
    steps: int = 0
    rows_written: int = 0
    rows_in_conflict: int = 0
    """Rows that a new n-gram shares with another n-gram by its hash; it does without them (see ``RowConflict``)."""
    reverified: int = 0
    """Earlier prompts that read one of the new rows and were asked again; no other prompt can have changed."""


@dataclass(frozen=True)
class RowConflict:
    """A row that two n-grams claim by their hash. The one that was there first keeps it; the other does without."""

    layer: str
    row: int
    loser: str
    """Id of the fact that does without."""
    owners: tuple[str, ...]
    """Ids of the facts that keep it."""


@dataclass
class ForgetReport:
    """What forgetting did."""

    forgotten: list[str]
    rows_removed: int
    rows_shared: int
    """Rows that stay because other facts own them too."""
    no_longer_exact: list[str] = field(default_factory=list)
    """Remaining facts whose answer leant on a forgotten one; teach them again."""
