"""Phrases that a text is fond of: neighbouring words that stand together far more often than chance would have them."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

from engram.errors import ConfigError, DataError

__all__ = ["find_phrases", "read_phrases"]

_WORDS = re.compile(r"(?<!\w)[^\W\d_]{2,}(?!\w)(?: [^\W\d_]{2,}(?!\w))*")
"""A run of words of two letters and more with one space between them; a piece of an identifier is no word."""


def find_phrases(texts: Iterable[str], count: int = 20, documents: int = 5, bits: float = 6.0) -> list[str]:
    """Pairs of neighbouring words, in lower case, the most frequent first.

    Pointwise mutual information as of Church and Hanks (Computational Linguistics 16, 1990): ``log2(pairs * N / (first * second))``, where N
    counts words.

    Args:
        texts: documents, what a memory was trained on for instance, in a script that puts spaces between words.
        count: how often a pair must occur at least.
        documents: in how many documents at least; a pair of one document is its author's, not the language's.
        bits: pointwise mutual information that it must have at least.

    Raises:
        ConfigError: a number is not positive, or one text was given for documents.
    """
    for name, value in (("count", count), ("documents", documents), ("bits", bits)):
        if value <= 0:
            raise ConfigError(f"find_phrases: {name}: got {value}, expected more than 0.")
    if isinstance(texts, str | bytes):
        raise ConfigError("find_phrases: got one text, expected a list of documents; put it into a list.")
    words: Counter[str] = Counter()
    pairs: Counter[tuple[str, str]] = Counter()
    spread: Counter[tuple[str, str]] = Counter()
    for text in texts:
        own: Counter[tuple[str, str]] = Counter()
        for run in _WORDS.findall(text):
            found = run.lower().split(" ")
            words.update(found)
            own.update(pairwise(found))
        pairs.update(own)
        spread.update(own.keys())
    total = words.total()

    def information(pair: tuple[str, str]) -> float:
        return math.log2(pairs[pair] * total / (words[pair[0]] * words[pair[1]]))

    frequent = (pair for pair, times in pairs.most_common() if times >= count and spread[pair] >= documents)
    return [" ".join(pair) for pair in frequent if information(pair) >= bits]


def read_phrases(path: str | os.PathLike[str]) -> list[str]:
    """Phrases of a text file, one on each line; empty lines and repeated ones are passed over.

    Raises:
        DataError: the file is missing, not UTF-8 or holds none.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read phrases {path}: {error}. Expected a text file in UTF-8, a phrase on each line.") from None
    found = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not found:
        raise DataError(f"{path}: holds no phrase; expected one on each line.")
    return found
