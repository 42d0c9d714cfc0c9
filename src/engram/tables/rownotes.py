"""Notes beside row files: what a file holds as long as nobody changes it, how its rows are stored, and what was being done with it."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from engram.errors import TableError
from engram.tables.hidden import hidden_beside

__all__ = [
    "check_form",
    "identity_of",
    "is_being_filled",
    "is_untouched",
    "left_by_placing",
    "note_beside",
    "note_form",
    "read_note",
    "remove_row_file",
    "row_stamp",
    "rows_are",
    "sources_of",
    "stamp_rows",
    "state_of_file",
    "write_note",
]

_SOURCES = 16
"""Saves that a note names: the first, whose rows came into the file, and the last ones of the same rows."""


def stamp_rows(path: Path, source: str) -> None:
    """Note beside a row file that it holds the rows of ``source``, as long as nobody changes it.

    What it was noted to hold, and does unchanged, it goes on holding: a checkpoint or a copy of a memory is one more save of the same rows.

    Raises:
        TableError: the note cannot be written.
    """
    note = read_note(note_beside(path))
    before = sources_of(note) if _fits(note, path) else []
    if source in before and "placing" not in note:
        return
    others = [other for other in before if other != source]
    try:
        state = {field: note[field] for field in ("bytes", "mtime_ns")} if before else state_of_file(path)
    except OSError as error:
        raise _not_noted(path, error) from error
    write_note(note_beside(path), {**state, "sources": [*others[:1], *others[1:][2 - _SOURCES :], source]})


def state_of_file(file: Path | int) -> dict[str, Any]:
    """What a note says of a file as it is. A later change shows in the file's time, which is put an instant back here so that it always
    differs.
    """
    status = os.stat(file)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns - 1_000_000_000))
    status = os.stat(file)
    return {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns}


def row_stamp(source: str, layer_id: int | str, dtype: str) -> str:
    """What is noted beside a row file: which rows it holds. Every save gives its weights file a name of its own."""
    return f"{source} layer {layer_id} {dtype}"


def rows_are(path: Path, source: str) -> bool:
    """Whether a row file holds the rows of ``source``, unchanged (see ``stamp_rows``)."""
    note = read_note(note_beside(path))
    return source in sources_of(note) and _fits(note, path)


def sources_of(note: dict[str, Any]) -> list[str]:
    """Saves whose rows a note says are in the file."""
    sources = note.get("sources")
    return sources if isinstance(sources, list) else []


def left_by_placing(path: Path, placing: str) -> bool:
    """Whether a row file is what an unfinished run on behalf of ``placing`` left (see ``rowfile.new_row_file``), unchanged."""
    note = read_note(note_beside(path))
    return note.get("placing") == placing and _fits(note, path)


def _fits(note: dict[str, Any], path: Path) -> bool:
    with suppress(OSError):
        status = os.stat(path)
        return (note.get("bytes"), note.get("mtime_ns")) == (status.st_size, status.st_mtime_ns)
    return False


def is_being_filled(path: Path) -> bool:
    """Whether a row file was being filled with saved rows, whichever, when that was stopped, and nothing was done with it since."""
    return bool(read_note(note_beside(path)).get("filling"))


def is_untouched(path: Path) -> bool:
    """Whether nothing was ever put into a row file: it was made, and is all zero."""
    note = read_note(note_beside(path))
    with suppress(OSError):
        return note.get("filling", "") is None and note.get("inode") == os.stat(path).st_ino and _fits(note, path)
    return False


def identity_of(file: Path) -> tuple[int, int] | None:
    """Which file has a name, and since when it is what it is; None if none has."""
    with suppress(OSError):
        status = os.stat(file)
        return status.st_ino, status.st_mtime_ns
    return None


def note_form(path: Path, form: str, rows: int, dim: int) -> None:
    """Note beside a row file, for as long as it lives, how its rows are stored: other formats may be as many bytes.

    Raises:
        TableError: the note cannot be written.
    """
    write_note(_form_of(path), {"format": form, "rows": rows, "dim": dim})


def check_form(path: Path, form: str, rows: int, dim: int) -> None:
    """Refuse a row file whose rows are stored otherwise, if that was noted.

    Raises:
        TableError: they are.
    """
    found, expected = read_note(_form_of(path)), {"format": form, "rows": rows, "dim": dim}
    if found and path.exists() and found != expected:
        raise TableError(
            f"{path}: got rows stored as {found}, expected {expected}; choose another folder, or the dtype they have."
        )


def remove_row_file(path: Path) -> None:
    """Remove a row file and what is noted of it, as far as the system lets go of them."""
    for file in (path, note_beside(path), _form_of(path)):
        with suppress(OSError):
            file.unlink(missing_ok=True)


def read_note(file: Path) -> dict[str, Any]:
    """What a note says; nothing where there is none that can be read."""
    with suppress(OSError, ValueError, RecursionError):
        fields = json.loads(file.read_text(encoding="utf-8"))
        return fields if isinstance(fields, dict) else {}
    return {}


def write_note(file: Path, fields: dict[str, Any]) -> None:
    """Whole or not at all.

    Raises:
        TableError: the disk refuses.
    """
    try:
        with hidden_beside(file) as hidden:
            hidden.write(json.dumps(fields).encode() + b"\n")
            hidden.flush()
            os.replace(hidden.name, file)
    except OSError as error:
        raise _not_noted(file, error) from error


def _not_noted(path: Path, error: OSError) -> TableError:
    return TableError(
        f"cannot note in {path} what a row file holds: {error.strerror}. Free space there, or see that the folder can be written, then try "
        "again."
    )


def _form_of(path: Path) -> Path:
    return _beside(path, "form")


def note_beside(path: Path) -> Path:
    """Where the note of what a row file holds lies, by whatever link it was reached."""
    return _beside(path, "json")


def _beside(path: Path, ending: str) -> Path:
    file = Path(os.path.realpath(path))
    return file.with_name(f"{file.name}.{ending}")
