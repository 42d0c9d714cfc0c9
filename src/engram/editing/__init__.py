"""Floor 5: changing what a memory knows."""

from engram.editing.editor import ForgetReport, MemoryEditor, TeachReport
from engram.editing.ledger import Ledger, LedgerFact
from engram.editing.lesson import TeachSettings

__all__ = ["ForgetReport", "Ledger", "LedgerFact", "MemoryEditor", "TeachReport", "TeachSettings"]
