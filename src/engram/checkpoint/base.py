"""Which model a saved memory was made for."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["ADAPTERS_FOLDER", "BACKBONE_FOLDER", "base_name"]

BACKBONE_FOLDER = "backbone"
"""In the folder of a memory: the base model that was trained with it, as ``from_pretrained`` reads it."""
ADAPTERS_FOLDER = "adapters"
"""In the folder of a memory: adapters that were trained with it, as ``PeftModel.from_pretrained`` reads them."""


def base_name(path: str | os.PathLike[str], description: Mapping[str, Any]) -> str | None:
    """What the base model of the memory in the folder ``path`` is called, or where it lies: in that folder, if it was saved with the memory; in
    the run's folder beside the memory, if that is a run's; else what the memory says; None if it says nothing.
    """
    named = (description.get("base_model") or {}).get("name_or_path") or None
    folder = Path(os.path.abspath(path))
    if description.get("base_folder") == BACKBONE_FOLDER:
        return str(folder / BACKBONE_FOLDER)
    beside = folder.parent / "model"
    # A run that went on from a model has its own beside the memory, which names the one that it went on from.
    return str(beside) if (folder.name == "memory" or not named) and (beside / "config.json").is_file() else named
