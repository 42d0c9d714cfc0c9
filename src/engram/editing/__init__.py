"""Floor 5: changing what a memory knows."""

from engram.editing.editor import MemoryEditor
from engram.editing.ledger import Ledger, LedgerFact
from engram.editing.lesson import TeachSettings
from engram.editing.merge import MemoryDiff, MergeReport, diff_memories, merge_memories
from engram.editing.readers import fit_reader_to_head
from engram.editing.reports import ForgetReport, RowConflict, TeachReport
from engram.editing.why import Explanation, explain

__all__ = [
    "Explanation",
    "ForgetReport",
    "Ledger",
    "LedgerFact",
    "MemoryDiff",
    "MemoryEditor",
    "MergeReport",
    "RowConflict",
    "TeachReport",
    "TeachSettings",
    "diff_memories",
    "explain",
    "fit_reader_to_head",
    "merge_memories",
]
