"""What a corpus is made of, as written in the ``corpus`` mapping of a recipe file."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engram.data.records import RECORD_SUFFIXES, holds_records
from engram.errors import ConfigError, DataError
from engram.yaml_text import parse_yaml

__all__ = [
    "KINDS",
    "CorpusRecipe",
    "FolderSource",
    "TextSource",
    "build_fields",
    "parse_corpus",
    "read_corpus_recipe",
    "read_yaml",
]

KINDS = ("prose", "code", "test", "documentation")
"""Kinds of documents: the user's own text, source files, test files, and text written about code."""


@dataclass(frozen=True)
class TextSource:
    """Text files of the user's: lines of ``<|doc|>`` separate documents in a file, and every line of a `.jsonl` file is one."""

    path: str
    """A file or a glob pattern, relative to the recipe."""
    weight: int = 1
    """How often each document is seen per epoch. Files of weight above 1 are for knowing by heart and are never held out.
    Where several entries name the same text, the largest weight counts."""
    field: str = "text"
    """In `.jsonl` and `.ndjson` files, the key of the text in the object on each line."""

    def __post_init__(self) -> None:
        if not isinstance(self.path, str) or not self.path:
            raise ConfigError(f"TextSource.path: got {self.path!r}, expected a file or a pattern.")
        if not _is_int(self.weight) or self.weight < 1:
            raise ConfigError(f"TextSource.weight: got {self.weight!r}, expected a whole number of at least 1.")
        _check_key(self.field, "TextSource.field")


@dataclass(frozen=True)
class FolderSource:
    """A folder of the user's, read with all folders in it; one file is one document, and of a `.jsonl` file one line. Hidden files and
    folders are left out.
    """

    path: str
    """The folder, relative to the recipe."""
    suffixes: tuple[str, ...] = (".txt", ".md", ".rst", ".html", ".py")
    """Ends of the names of files to take; others are left out (and counted). HTML is read as text; `.jsonl` and `.ndjson`, which have to be
    named here, line by line."""
    max_bytes: int = 1_000_000
    """Larger files are left out (and counted), but for `.jsonl` and `.ndjson`, where a file is many documents."""
    exclude: tuple[str, ...] = ("__pycache__", "node_modules", "site-packages")
    """Names of files and folders left out."""
    kind: str | None = None
    """One of ``KINDS``; told from suffix and name if not given."""
    field: str = "text"
    """In `.jsonl` and `.ndjson` files, the key of the text in the object on each line."""

    def __post_init__(self) -> None:
        if not isinstance(self.path, str) or not self.path:
            raise ConfigError(f"FolderSource.path: got {self.path!r}, expected a folder.")
        for name in ("suffixes", "exclude"):
            object.__setattr__(self, name, _texts(getattr(self, name), f"FolderSource.{name}"))
        if not self.suffixes:
            raise ConfigError("FolderSource.suffixes: got none, expected at least one such as '.txt'.")
        if not _is_int(self.max_bytes) or self.max_bytes < 1:
            raise ConfigError(f"FolderSource.max_bytes: got {self.max_bytes!r}, expected a positive number of bytes.")
        if self.kind is not None and self.kind not in KINDS:
            raise ConfigError(f"FolderSource.kind: got {self.kind!r}, expected one of {', '.join(KINDS)}.")
        _check_key(self.field, "FolderSource.field")
        if self.field != "text" and not any(map(holds_records, self.suffixes)):
            raise ConfigError(
                f"FolderSource.field: got {self.field!r}, expected none unless suffixes name {' or '.join(RECORD_SUFFIXES)}: add that suffix."
            )


@dataclass(frozen=True)
class CorpusRecipe:
    """What a corpus is made of."""

    texts: tuple[TextSource, ...] = ()
    standard_library: bool = False
    """Sources, docstrings and `pydoc` topics of the running Python."""
    test_percent: int = 40
    """Share of the standard library's own test files that is used."""
    exclude_parts: tuple[str, ...] = (
        "site-packages",
        "idlelib",
        "encodings",
        "pydoc_data",
        "lib2to3",
        "__pycache__",
        "turtledemo",
    )
    """Folders of the standard library left out: generated tables and copies."""
    held_out_percent: int = 3
    """Share of files kept for measuring, each with all of its documents, chosen by a hash of its name; records of `.jsonl` files are chosen
    one by one, by a hash of their text."""
    folders: tuple[FolderSource, ...] = ()
    documentation: bool = False
    """Text files of the Python installation, `pydoc` topics, and what installed distributions say about themselves."""
    near_duplicates: float | None = None
    """A document whose word 5-grams resemble an earlier one's at least this much (Jaccard, estimated) is left out; None: keep all."""

    def __post_init__(self) -> None:
        for field in ("test_percent", "held_out_percent"):
            value = getattr(self, field)
            if not _is_int(value) or not 0 <= value <= 100:
                raise ConfigError(f"CorpusRecipe.{field}: got {value!r}, expected a whole number, 0..100.")
        for field in ("standard_library", "documentation"):
            if not isinstance(getattr(self, field), bool):
                raise ConfigError(f"CorpusRecipe.{field}: got {getattr(self, field)!r}, expected true or false.")
        object.__setattr__(self, "exclude_parts", _texts(self.exclude_parts, "CorpusRecipe.exclude_parts"))
        threshold = self.near_duplicates
        if threshold is not None and (not _is_number(threshold) or not 0 < threshold <= 1):
            raise ConfigError(
                f"CorpusRecipe.near_duplicates: got {threshold!r}, expected a share above 0 and up to 1, such as 0.8."
            )
        if not (self.texts or self.folders or self.standard_library or self.documentation):
            raise ConfigError(
                "CorpusRecipe: got no texts, no folders, standard_library: false and documentation: false, expected at least one source."
            )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields. Fields added since the first version appear only where they are used, so that older runs compare equal."""
        fields = dataclasses.asdict(self)
        for name in ("folders", "documentation", "near_duplicates"):
            if not fields[name]:
                del fields[name]
        for source in (*fields["texts"], *fields.get("folders", ())):
            if source["field"] == TextSource.field:
                del source["field"]
        return json.loads(json.dumps(fields))


def read_corpus_recipe(path: str | os.PathLike[str]) -> CorpusRecipe:
    """The ``corpus`` mapping of a recipe file, or that in its ``data`` (a run) or ``base.data`` (a sweep), which may name another recipe beside
    it; whatever else stands there is left to others.

    Raises:
        DataError: the file is missing or not YAML.
        ConfigError: there is no such mapping, a key is unknown or a value impossible.
    """
    fields = _corpus_in(read_yaml(path))
    if isinstance(fields, str) and os.path.basename(fields) == fields:
        path = Path(path).with_name(fields)
        fields = _corpus_in(read_yaml(path))
    if not isinstance(fields, dict):
        raise ConfigError(f"recipe {path}: expected a mapping with a 'corpus' mapping in it.")
    return parse_corpus(fields, f"recipe {path}")


def _corpus_in(fields: Any) -> Any:
    """What stands under ``corpus`` in the recipe of a corpus, a run or a sweep; None if nothing does."""
    for parents in ((), ("data",), ("base", "data")):
        inner = fields
        for name in (*parents, "corpus"):
            inner = inner.get(name) if isinstance(inner, dict) else None
        if inner is not None:
            return inner
    return None


def parse_corpus(fields: Mapping[str, Any], where: str) -> CorpusRecipe:
    """A recipe from plain data; ``texts`` and ``folders`` may be paths alone.

    Raises:
        ConfigError: a key is unknown or a value impossible.
    """
    corpus = dict(fields)
    for name, cls in (("texts", TextSource), ("folders", FolderSource)):
        entries = corpus.pop(name, [])
        if not isinstance(entries, list) or not all(isinstance(entry, (str, dict)) for entry in entries):
            raise ConfigError(f"{where}: corpus.{name}: got {entries!r}, expected a list of paths or of {{path: ..., ...}}.")
        mappings = [{"path": entry} if isinstance(entry, str) else entry for entry in entries]
        corpus[name] = tuple(build_fields(cls, entry, f"corpus.{name}") for entry in mappings)
    return build_fields(CorpusRecipe, corpus, "corpus")


def read_yaml(path: str | os.PathLike[str]) -> Any:
    """The plain data in a recipe file.

    Raises:
        DataError: the file is missing or not YAML.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DataError(f"recipe {path} does not exist.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read recipe {path}: {' '.join(str(error).split())}") from None
    return parse_yaml(text, f"recipe {path}", DataError)


def build_fields(cls: type, fields: Mapping[str, Any], where: str) -> Any:
    """The dataclass ``cls`` from a mapping.

    Raises:
        ConfigError: a key is unknown or missing, or a value impossible.
    """
    known = {f.name for f in dataclasses.fields(cls)}
    unknown = sorted(str(key) for key in set(fields) - known)
    if unknown:
        raise ConfigError(f"{where}: unknown key(s) {', '.join(unknown)}; expected some of {', '.join(sorted(known))}.")
    needed = [f.name for f in dataclasses.fields(cls) if f.default is f.default_factory is dataclasses.MISSING]
    missing = [name for name in needed if name not in fields]
    if missing:
        raise ConfigError(f"{where}: missing key(s) {', '.join(missing)}; it may have {', '.join(sorted(known))}.")
    try:
        return cls(**fields)
    except TypeError as error:  # a value that cannot be compared
        raise ConfigError(f"{where}: {error}.") from None


def _texts(value: Any, field: str) -> tuple[str, ...]:
    if not isinstance(value, (list, tuple)) or not all(isinstance(part, str) and part for part in value):
        raise ConfigError(f"{field}: got {value!r}, expected a list of texts.")
    return tuple(value)


def _check_key(value: Any, field: str) -> None:
    if not isinstance(value, str) or not value:
        raise ConfigError(
            f"{field}: got {value!r}, expected the key of the text in each line of a .jsonl file, such as 'text'."
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
