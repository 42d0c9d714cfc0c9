"""Text to pretrain on: documents of all sources, without duplicates, split into text to train on and text to measure on."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from engram.data.near_duplicates import NearDuplicates
from engram.data.recipe import CorpusRecipe, FolderSource, TextSource
from engram.data.sources import Document, Source, UnfitSource, bucket, list_sources, standard_library_sources, text_sources
from engram.errors import DataError

__all__ = [
    "SPLITS",
    "Corpus",
    "CorpusRecipe",
    "Document",
    "DocumentStream",
    "FolderSource",
    "SourceDigest",
    "TextSource",
    "build_corpus",
    "held_out_standard_library",
    "split_of",
]

SPLITS = ("train", "held_out")
"""The two sides; no file is on both, and of a file of records no record."""

_NAMED = 5


@dataclass(frozen=True)
class Corpus:
    """Documents to train on and documents to measure on; no file (of a file of records, no record) is in both."""

    train: list[Document]
    held_out: list[Document]


@dataclass(frozen=True)
class SourceDigest:
    """What the sources of a recipe are at this moment."""

    sha256: str
    """Of all names and contents, in order."""
    files: int
    bytes: int


class DocumentStream:
    """The documents of a recipe one after another, without duplicates: memory does not grow with the text, only with the number of documents.

    Of texts that are the same the first one stays; where ``texts`` give them different weights, the first one of the largest weight.

    Iterating again reads the files again. After an iteration ``duplicates``, ``near_duplicates`` (documents left out), ``skipped`` (files
    left out, by reason) and ``skipped_names`` (the first few of them) tell what it left out, and ``read`` what it read.

    Args:
        recipe: the sources.
        folder: what relative paths are relative to.
    """

    def __init__(self, recipe: CorpusRecipe, folder: Path) -> None:
        self.recipe, self.folder = recipe, folder
        self._start()

    def _start(self) -> None:
        self.duplicates = self.near_duplicates = self.files_read = self.bytes_read = 0
        self.skipped: Counter[str] = Counter()
        self.skipped_names: dict[str, list[str]] = {}
        self._digest = hashlib.sha256()
        self._seen: set[bytes] = set()
        self._by_heart: dict[bytes, int] = {}
        threshold = self.recipe.near_duplicates
        self._similar = None if threshold is None else NearDuplicates(threshold)

    def __iter__(self) -> Iterator[Document]:
        """Documents in the order of the recipe.

        Raises:
            DataError: a named file is missing, empty or not UTF-8.
        """
        self._start()
        self._by_heart = _weights_by_text(self.recipe, self.folder)
        for source in list_sources(self.recipe, self.folder):
            content = self._load(source)
            if content is None:
                continue
            try:
                for document in source.documents(content):
                    if self._is_new(document):
                        yield document
            except UnfitSource as reason:
                self._skip(source, str(reason))
            self.bytes_read += len(content)

    def digest(self) -> SourceDigest:
        """Read all sources once, without making documents of them.

        Raises:
            DataError: a named file is missing or cannot be read.
        """
        self._start()
        for source in list_sources(self.recipe, self.folder):
            self.bytes_read += len(self._load(source) or b"")
        return self.read

    @property
    def read(self) -> SourceDigest:
        """What was read so far."""
        return SourceDigest(self._digest.hexdigest(), self.files_read, self.bytes_read)

    def _load(self, source: Source) -> bytes | None:
        try:
            content = source.load()
        except UnfitSource as reason:
            self._skip(source, str(reason))
            return None
        name = source.name + source.read_as
        self._digest.update(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest() + hashlib.sha256(content).digest())
        self.files_read += 1
        return content

    def nothing_to_train_on(self, held_out: int) -> DataError:
        """What to tell if no document is left to train on, after all were read and so many of them held out."""
        left_out = "; ".join(
            f"{count} {reason} ({', '.join(names := self.skipped_names[reason])}{', ...' if count > len(names) else ''})"
            for reason, count in self.skipped.items()
        )
        found = [
            f"{held_out} held out (held_out_percent: {self.recipe.held_out_percent}; a file with all its documents)"
            if held_out
            else "",
            f"files left out: {left_out}" if left_out else "",
        ]
        told = " and ".join(part for part in found if part)
        return DataError(
            f"corpus: got no documents to train on{f': {told}' if told else ''}; expected at least one. Name more text files in the recipe, or "
            "split large ones."
        )

    def _skip(self, source: Source, reason: str) -> None:
        self.skipped[reason] += 1
        names = self.skipped_names.setdefault(reason, [])
        if len(names) < _NAMED:
            names.append(source.name)

    def _is_new(self, document: Document) -> bool:
        digest = _digest(document)
        if digest in self._seen or document.weight < self._by_heart.get(digest, 1):
            self.duplicates += 1
            return False
        self._seen.add(digest)
        if self._similar is None:
            return True
        if document.weight > 1:  # to be known by heart: similar lines are wanted there
            self._similar.add(document.text)
            return True
        new = self._similar.add_if_new(document.text)
        self.near_duplicates += not new
        return new


def _weights_by_text(recipe: CorpusRecipe, folder: Path) -> dict[bytes, int]:
    """Largest weight of every text that a recipe may give two weights."""
    least = min((text.weight for text in recipe.texts), default=1)
    weights: dict[bytes, int] = {}
    for text in recipe.texts:
        if text.weight > least:
            for source in text_sources(text, folder):
                for document in source.documents(source.load()):
                    digest = _digest(document)
                    weights[digest] = max(text.weight, weights.get(digest, 1))
    return weights


def _digest(document: Document) -> bytes:
    """Of a text without empty lines around it: which of them stay depends on how a recipe names the file."""
    return hashlib.sha256(document.text.strip("\n").encode()).digest()


def build_corpus(recipe: CorpusRecipe, folder: Path) -> Corpus:
    """Collect, deduplicate and split, all in memory; ``build_store`` streams.

    Args:
        recipe: the sources.
        folder: what relative paths are relative to.

    Raises:
        DataError: a named file is missing, empty or not UTF-8, or nothing is left to train on.
    """
    sides: dict[str, list[Document]] = {split: [] for split in SPLITS}
    stream = DocumentStream(recipe, folder)
    for document in stream:
        sides[split_of(document, recipe)].append(document)
    train, held_out = sides["train"], sides["held_out"]
    if not train:
        raise stream.nothing_to_train_on(len(held_out))
    return Corpus(train, held_out)


def held_out_standard_library(recipe: CorpusRecipe | None = None) -> list[Document]:
    """The part of this machine's standard library that no corpus made by ``recipe`` trains on: text to measure on."""
    recipe = recipe or CorpusRecipe(standard_library=True)
    kept: dict[bytes, Document] = {}
    for source in standard_library_sources(recipe, lambda name: _is_held_out(name, recipe)):
        try:
            for doc in source.documents(source.load()):
                kept.setdefault(_digest(doc), doc)
        except UnfitSource:
            continue  # some test files are broken on purpose
    return list(kept.values())


def split_of(document: Document, recipe: CorpusRecipe) -> str:
    """The side of a document, from its file's name alone, or of a record from its text alone, so that a record stays on its side whatever is
    added to the file; what is to be known by heart is never held out.
    """
    told_by = document.text if document.is_record else document.name.partition("#")[0]
    return "held_out" if document.weight == 1 and bucket(told_by) < recipe.held_out_percent else "train"


def _is_held_out(name: str, recipe: CorpusRecipe) -> bool:
    """By file: all documents of a file go to the same side of the split."""
    return bucket(name.partition("#")[0]) < recipe.held_out_percent
