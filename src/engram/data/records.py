"""Lines of a `.jsonl` file, each an object with a text in it."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from typing import Any

from engram.errors import DataError

__all__ = ["RECORD_SUFFIXES", "holds_records", "read_records"]

RECORD_SUFFIXES = (".jsonl", ".ndjson")
"""Ends of the names of files whose lines are documents."""

_KEYS_TOLD = 5


def holds_records(name: str | os.PathLike[str]) -> bool:
    """Whether a file of this name is read line by line."""
    return os.fspath(name).lower().endswith(RECORD_SUFFIXES)


def read_records(text: str, where: str, field: str = "text", or_else: str = "") -> Iterator[tuple[int, str]]:
    """Number of the line, counted from 1, and text of every record; lines and texts of nothing but white space are left out.

    Args:
        text: what the file holds; a line feed ends each of its lines.
        where: the file, for errors.
        field: key of the text in each object.
        or_else: what may be done about a wrong line besides mending it, for errors.

    Raises:
        DataError: a line is no object with that key and a text under it.
    """
    for number, line in enumerate(io.StringIO(text, newline="\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            raise _wrong(where, number, "no JSON", field, or_else) from None
        if not isinstance(record, dict) or not isinstance(record.get(field), str):
            raise _wrong(where, number, _what(record, field), field, or_else)
        found = _as_text(record[field])
        if found.strip():
            yield number, found


def _as_text(value: str) -> str:
    """The text as it would stand in a file: JSON may also write half a character, and ends of lines as other systems have them."""
    value = value.encode("utf-8", "replace").decode()
    return value.replace("\r\n", "\n").replace("\r", "\n").strip("\n")


def _what(record: Any, field: str) -> str:
    if not isinstance(record, dict):
        return f"no object but {type(record).__name__}"
    if field in record:
        return f"no text but {type(record[field]).__name__} under {field!r}"
    keys = [repr(key) for key in list(record)[:_KEYS_TOLD]]
    return f"an object with the keys {', '.join(keys)}" if keys else "an object without keys"


def _wrong(where: str, number: int, got: str, field: str, or_else: str) -> DataError:
    example = f'{{{json.dumps(field)}: "..."}}'
    return DataError(
        f"{where}, line {number}: got {got}, expected an object with text under {field!r}, such as {example}; mend the line{or_else}."
    )
