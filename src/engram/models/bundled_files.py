"""Where the model that ships with engram lies, and the memory that was trained with it; loads neither."""

from __future__ import annotations

from pathlib import Path

from engram.checkpoint import DESCRIPTION_NAME

__all__ = ["BUNDLED_MEMORY", "BUNDLED_MODEL", "BUNDLED_NAME", "is_path", "memory_folder"]

BUNDLED_NAME = "bundled"
"""Name that stands for the bundled model wherever a model path is asked for, and for its memory where ``memory_folder`` is asked."""
BUNDLED_MODEL = Path(__file__).parent.parent / "bundled" / "base_model"
BUNDLED_MEMORY = Path(__file__).parent.parent / "bundled" / "memory"


def memory_folder(memory: Path) -> Path:
    """Where a memory lies: ``memory``; if none is there, the bundled one for ``bundled``, or the folder ``memory`` that a run left in it."""
    if (memory / DESCRIPTION_NAME).exists():
        return memory
    if str(memory) == BUNDLED_NAME:
        return BUNDLED_MEMORY
    inside = memory / "memory"
    return inside if (inside / DESCRIPTION_NAME).exists() else memory


def is_path(name: str) -> bool:
    """Whether a name is not one of a hub (``model`` or ``owner/model``): by its form, or because it begins with a folder that is here."""
    return (
        name.count("/") > 1 or name.startswith((".", "/", "~")) or "\\" in name or ("/" in name and Path(name).parent.is_dir())
    )
