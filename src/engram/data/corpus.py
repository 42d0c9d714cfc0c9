"""Text to pretrain on: files of the user's, and the Python standard library that every machine with Python has."""

from __future__ import annotations

import ast
import glob
import hashlib
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from engram.errors import ConfigError, DataError

__all__ = ["Corpus", "CorpusRecipe", "Document", "TextSource", "build_corpus", "held_out_standard_library"]

DOCUMENT_SEPARATOR = "<|doc|>"
"""A line that holds just this separates documents inside a text file."""

_MIN_CHARACTERS = 40
_MAX_MEAN_LINE = 120  # longer on average: a generated table, not prose or code


@dataclass(frozen=True)
class TextSource:
    """Text files of the user's."""

    path: str
    """A file or a glob pattern, relative to the recipe."""
    weight: int = 1
    """How often each document is seen per epoch. Files of weight above 1 are for knowing by heart and are never held out."""


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
    """Share of documents kept for measuring, chosen by a hash of their name."""

    def __post_init__(self) -> None:
        for field in ("test_percent", "held_out_percent"):
            value = getattr(self, field)
            if not 0 <= value <= 100:
                raise ConfigError(f"CorpusRecipe.{field}: got {value}, expected 0..100.")
        if not self.texts and not self.standard_library:
            raise ConfigError("CorpusRecipe: got no texts and standard_library: false, expected at least one source.")


@dataclass(frozen=True)
class Document:
    """One text with a stable name."""

    name: str
    text: str
    weight: int = 1


@dataclass(frozen=True)
class Corpus:
    """Documents to train on and documents to measure on; no file is in both."""

    train: list[Document]
    held_out: list[Document]


def build_corpus(recipe: CorpusRecipe, folder: Path) -> Corpus:
    """Collect, deduplicate and split.

    Args:
        recipe: the sources.
        folder: what relative paths are relative to.

    Raises:
        DataError: a named file is missing, empty or not UTF-8, or nothing is left to train on.
    """
    documents = [doc for source in recipe.texts for doc in _user_documents(source, folder)]
    if recipe.standard_library:
        documents += _standard_library(recipe, lambda name: True)
    documents = _without_duplicates(documents)
    held_out = [doc for doc in documents if doc.weight == 1 and _is_held_out(doc.name, recipe)]
    names = {doc.name for doc in held_out}
    train = [doc for doc in documents if doc.name not in names]
    if not train:
        raise DataError("corpus: no documents to train on; name more text files in the recipe.")
    return Corpus(train, held_out)


def held_out_standard_library(recipe: CorpusRecipe | None = None) -> list[Document]:
    """The part of this machine's standard library that no corpus made by ``recipe`` trains on: text to measure on."""
    recipe = recipe or CorpusRecipe(standard_library=True)
    return _without_duplicates(list(_standard_library(recipe, lambda name: _is_held_out(name, recipe))))


def _is_held_out(name: str, recipe: CorpusRecipe) -> bool:
    """By file: all documents of a file go to the same side of the split."""
    return _bucket(name.partition("#")[0]) < recipe.held_out_percent


def _bucket(name: str) -> int:
    """A stable number 0..99 for a name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % 100


def _user_documents(source: TextSource, folder: Path) -> Iterator[Document]:
    files = sorted(glob.glob(str(folder / source.path), recursive=True))
    if not files:
        raise DataError(f"corpus: no file matches {source.path!r} in {folder}; check the recipe's 'texts'.")
    for file in files:
        try:
            text = Path(file).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"corpus: {file} is not UTF-8 (byte {error.start}); save it as UTF-8.") from None
        except OSError as error:
            raise DataError(f"corpus: cannot read {file}: {error.strerror}.") from None
        parts = [part.strip("\n") for part in f"\n{text}\n".split(f"\n{DOCUMENT_SEPARATOR}\n")]
        parts = [part for part in parts if part.strip()]
        if not parts:
            raise DataError(f"corpus: {file} is empty.")
        for number, part in enumerate(parts):
            yield Document(f"{Path(file).name}#{number}", part, source.weight)


def _standard_library(recipe: CorpusRecipe, wanted: Callable[[str], bool]) -> Iterator[Document]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for file in sorted(root.rglob("*.py")):
        parts = file.relative_to(root).parts
        if any(part in recipe.exclude_parts for part in parts):
            continue
        name = "stdlib/" + "/".join(parts)
        if not wanted(name):
            continue
        is_test = any(part in ("test", "tests") for part in parts)
        if is_test and _bucket("test share " + name) >= recipe.test_percent:
            continue
        try:
            text = file.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue  # some test files are broken on purpose
        if len(text) < _MIN_CHARACTERS or len(text) / (text.count("\n") + 1) > _MAX_MEAN_LINE:
            continue
        yield Document(name, text)
        if not is_test:
            yield from _docstrings(name, text)
    yield from (doc for doc in _topics() if wanted(doc.name))


def _docstrings(name: str, source: str) -> Iterator[Document]:
    """Module and class docstrings as prose of their own."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return
    for number, node in enumerate(ast.walk(tree)):
        if isinstance(node, (ast.Module, ast.ClassDef)):
            text = ast.get_docstring(node)
            if text and len(text) >= 4 * _MIN_CHARACTERS:
                yield Document(f"{name}#doc{number}", text)


def _topics() -> Iterator[Document]:
    from pydoc_data.topics import topics

    for topic, text in sorted(topics.items()):
        yield Document(f"topics/{topic}", text)


def _without_duplicates(documents: list[Document]) -> list[Document]:
    seen: set[bytes] = set()
    kept = []
    for doc in documents:
        digest = hashlib.sha256(doc.text.encode()).digest()
        if digest not in seen:
            seen.add(digest)
            kept.append(doc)
    return kept
