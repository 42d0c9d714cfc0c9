"""Texts that a memory has no business with, by kind."""

from __future__ import annotations

import os
from pathlib import Path

import yaml

from engram.errors import DataError

__all__ = ["load_texts"]


def load_texts(path: str | os.PathLike[str]) -> dict[str, list[str]]:
    """Read a YAML mapping from kinds to lists of texts; a plain list is one kind, ``text``.

    Raises:
        DataError: the file is missing or malformed.
    """
    try:
        fields = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(f"cannot read texts {path}: {' '.join(str(error).split())}") from None
    kinds = {"text": fields} if isinstance(fields, list) else fields
    if not isinstance(kinds, dict) or not kinds:
        raise DataError(f"{path}: expected a mapping from kinds to lists of texts, or a list of texts.")
    for kind, texts in kinds.items():
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text.strip() for text in texts):
            raise DataError(f"{path}, {kind!r}: expected a list of texts, none of them empty.")
    return {str(kind): texts for kind, texts in kinds.items()}
