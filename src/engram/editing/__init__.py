"""Floor 5: changing what a memory knows."""

from engram.editing.teach import TeachReport, TeachSettings, teach_facts

__all__ = ["TeachReport", "TeachSettings", "teach_facts"]
