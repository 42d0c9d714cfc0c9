"""Where the model that ships with engram lies, and the memory that was trained with it; loads neither."""

from __future__ import annotations

from pathlib import Path

from engram.checkpoint import DESCRIPTION_NAME

__all__ = ["BUNDLED_MEMORY", "BUNDLED_MODEL", "BUNDLED_NAME", "memory_folder"]

BUNDLED_NAME = "bundled"
"""Name that stands for the bundled model wherever a model path is asked for, and for its memory where ``memory_folder`` is asked."""
BUNDLED_MODEL = Path(__file__).parent.parent / "bundled" / "base_model"
BUNDLED_MEMORY = Path(__file__).parent.parent / "bundled" / "memory"


def memory_folder(memory: Path) -> Path:
    """Where a trained memory lies that is only to be read: ``memory``, or the bundled one if that is ``bundled`` and no memory lies there."""
    mine = (memory / DESCRIPTION_NAME).exists()
    return BUNDLED_MEMORY if str(memory) == BUNDLED_NAME and not mine else memory
