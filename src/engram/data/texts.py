"""Texts to measure on, by kind: a user's, and those that every installation has."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from engram.data.blocks import held_out_order
from engram.data.corpus import held_out_standard_library
from engram.data.facts import load_facts
from engram.data.recipe import KINDS
from engram.data.records import holds_records, read_records
from engram.data.sources import split_documents
from engram.data.store import TokenStore
from engram.errors import DataError
from engram.yaml_text import parse_yaml

__all__ = ["held_out_texts", "load_documents", "load_texts", "standard_texts"]

_BUNDLED = Path(__file__).parent.parent / "bundled"


def load_texts(path: str | os.PathLike[str]) -> dict[str, list[str]]:
    """Read a YAML mapping from kinds to lists of texts; a plain list is one kind, ``text``.

    Raises:
        DataError: the file is missing or malformed.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read texts {path}: {' '.join(str(error).split())}") from None
    fields = parse_yaml(text, f"texts {path}", DataError)
    kinds = {"text": fields} if isinstance(fields, list) else fields
    if not isinstance(kinds, dict) or not kinds:
        raise DataError(f"{path}: expected a mapping from kinds to lists of texts, or a list of texts.")
    for kind, texts in kinds.items():
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text.strip() for text in texts):
            raise DataError(f"{path}, {kind!r}: expected a list of texts, none of them empty.")
    return {str(kind): texts for kind, texts in kinds.items()}


def load_documents(path: str | os.PathLike[str]) -> dict[str, list[str]]:
    """Texts by kind: of a YAML file as ``load_texts`` reads it; any other file is text of one kind, named after the file.

    Lines that hold just ``<|doc|>`` separate documents, as in a corpus; of a `.jsonl` file every line is one, under the key ``text``.

    Raises:
        DataError: the file is missing, not UTF-8, empty or malformed.
    """
    file = Path(path)
    if file.suffix in (".yaml", ".yml"):
        return load_texts(file)
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read texts {path}: {error}. Expected a text file in UTF-8, or YAML.") from None
    documents = [found for _, found in read_records(text, str(path))] if holds_records(file) else split_documents(text)
    if not documents:
        raise DataError(f"{path}: the file is empty; expected text.")
    return {file.stem: documents}


def held_out_texts(store: TokenStore, tokens: int, window: int) -> dict[str, list[str]]:
    """Held-out documents of a token store by kind, in their one fixed order; of a large store as many as will be read.

    Args:
        store: where the ids are; its tokenizer makes text of them.
        tokens: how many are to be read; of each kind documents are given until their first windows hold more.
        window: tokens per window.
    """
    tokenizer = store.load_tokenizer()
    documents = held_out_order(store)
    kinds, first = store.documents["kind"][documents], np.minimum(store.documents["length"][documents], window)
    texts: dict[str, list[str]] = {}
    for number, kind in enumerate(KINDS):
        own = np.flatnonzero(kinds == number)
        before = np.cumsum(first[own]) - first[own]
        for document in documents[own[before <= tokens]]:
            text = tokenizer.decode(store.ids(document)[1:].tolist(), clean_up_tokenization_spaces=False)
            texts.setdefault(kind, []).append(text)
    return texts


def standard_texts() -> dict[str, list[str]]:
    """Texts of several kinds that the bundled model was not trained on: code, docstrings and manual pages of the running Python's
    standard library (its held-out part), prose and stories; and sentences of facts that it was trained on, capitals.
    """
    texts: dict[str, list[str]] = {}
    for document in held_out_standard_library():
        if document.name.endswith("#doc0"):  # a module's docstring: the beginning of its code
            continue
        kind = "manual" if document.name.startswith("topics/") else "docstrings" if "#doc" in document.name else "code"
        texts.setdefault(kind, []).append(document.text)
    other = load_texts(_BUNDLED / "none_of_its_business.yaml")
    texts |= {kind: other[kind] for kind in ("prose", "story")}
    capitals = [fact for fact in load_facts(_BUNDLED / "capitals.yaml") if fact.category == "sentence"]
    return texts | {"facts": [f"{fact.prompts[0]} {fact.answer}" for fact in capitals]}
