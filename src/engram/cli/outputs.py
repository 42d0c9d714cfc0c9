"""Where commands write their results."""

from __future__ import annotations

from pathlib import Path

import typer

__all__ = ["check_folder", "check_writable"]


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
