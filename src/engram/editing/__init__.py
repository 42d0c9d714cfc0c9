"""Floor 5: changing what a memory knows."""

from typing import TYPE_CHECKING

from engram.lazy import loaded_on_use

if TYPE_CHECKING:
    from engram.editing.editor import MemoryEditor
    from engram.editing.ledger import Ledger, LedgerFact
    from engram.editing.lesson import TeachSettings
    from engram.editing.merge import MemoryDiff, MergeReport, diff_memories, merge_memories
    from engram.editing.readers import fit_reader_to_head
    from engram.editing.reports import ForgetReport, RowConflict, TeachReport
    from engram.editing.why import Explanation, explain

_HOMES = {
    "Explanation": "engram.editing.why",
    "ForgetReport": "engram.editing.reports",
    "Ledger": "engram.editing.ledger",
    "LedgerFact": "engram.editing.ledger",
    "MemoryDiff": "engram.editing.merge",
    "MemoryEditor": "engram.editing.editor",
    "MergeReport": "engram.editing.merge",
    "RowConflict": "engram.editing.reports",
    "TeachReport": "engram.editing.reports",
    "TeachSettings": "engram.editing.lesson",
    "diff_memories": "engram.editing.merge",
    "explain": "engram.editing.why",
    "fit_reader_to_head": "engram.editing.readers",
    "merge_memories": "engram.editing.merge",
}

__all__ = sorted(_HOMES)

__getattr__ = loaded_on_use(__name__, _HOMES)


def __dir__() -> list[str]:
    return __all__
