"""Where commands write their results."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import typer

from engram._version import __version__

__all__ = ["check_folder", "check_text", "check_writable", "made_with"]


def made_with() -> dict[str, Any]:
    """The hardware and versions that a result was made with."""
    import torch
    import transformers

    return {
        "hardware": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "versions": {"engram": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
    }


def check_text(text: str, hint: str) -> None:
    """Refuse what the shell handed over as bytes that are no text."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise typer.BadParameter("got bytes that are not UTF-8, expected text", param_hint=hint) from None


def check_writable(file: Path | None) -> None:
    """Find out before work of minutes that its result has no place."""
    if file is None:
        return
    if file.is_dir():
        raise typer.BadParameter(f"got {file}, which is a folder; expected a file to write")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "a", encoding="utf-8"):
            pass
    except OSError as error:
        raise typer.BadParameter(f"cannot write {file}: {error.strerror}; choose another place") from None


def check_folder(folder: Path | None) -> None:
    """The same for a folder of results."""
    if folder is None:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise typer.BadParameter(f"got {folder}, expected a folder that can be made: {error.strerror}") from None
