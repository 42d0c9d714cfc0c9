"""What recall is asked with and hidden in: names, numbers and text that has nothing to do with them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from itertools import product
from typing import Any, Literal

import numpy as np

from engram.errors import ConfigError, DataError

__all__ = ["Distraction", "RecallWords", "Split"]

_TEST_PERCENT = 30
_ENOUGH_NAMES = 200
_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"

Split = Literal["train", "test"]


class RecallWords:
    """Names and numbers of one side of the split.

    Names are the lower-case words that the tokenizer writes as one token, because a small model that has to put names together from
    pieces fails at that before it comes to recall; where it has too few of them, invented ones. Which side a name or number is on is
    decided by a hash of it.

    Args:
        tokenizer: whose vocabulary names are taken from.
        split: ``train`` or ``test``.
        digits: digits per number.
    """

    def __init__(self, tokenizer: Any, split: Split, digits: int = 3) -> None:
        if split not in ("train", "test"):
            raise ConfigError(f"RecallWords.split: got {split!r}, expected 'train' or 'test'.")
        if not 1 <= digits <= 6:
            raise ConfigError(f"RecallWords.digits: got {digits}, expected 1..6.")
        names = _known_names(tokenizer)
        if len(names) < _ENOUGH_NAMES:
            names = ["".join(parts) for parts in product(_CONSONANTS, _VOWELS, _CONSONANTS, _VOWELS)]
        self.split = split
        self.names = [name for name in names if _side(name) == split]
        numbers = (str(number) for number in range(10 ** (digits - 1), 10**digits))
        self.numbers = [number for number in numbers if _side(number) == split]

    def draw_names(self, rng: np.random.Generator, count: int) -> list[str]:
        """Different names.

        Raises:
            DataError: there are not so many.
        """
        return _draw(rng, self.names, count, "names")

    def draw_numbers(self, rng: np.random.Generator, count: int) -> list[str]:
        """Different numbers, as texts.

        Raises:
            DataError: there are not so many.
        """
        return _draw(rng, self.numbers, count, "numbers")


class Distraction:
    """Text that has nothing to do with the questions, as one stream of token ids.

    Args:
        tokenizer: what tokens are counted with.
        texts: where it is taken from.

    Raises:
        DataError: there is no text.
    """

    def __init__(self, tokenizer: Any, texts: Sequence[str]) -> None:
        self.tokenizer = tokenizer
        rows = (
            tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
            if texts
            else []
        )
        self.ids = [i for row in rows for i in row]
        if not self.ids:
            raise DataError("distraction: got no text; give some texts to hide notes in.")

    def stretch(self, rng: np.random.Generator, tokens: int) -> list[int]:
        """So many tokens from a random place.

        Raises:
            DataError: there are not so many.
        """
        if tokens > len(self.ids):
            raise DataError(f"distraction: got {len(self.ids)} tokens of text, expected at least {tokens}; give more text.")
        start = int(rng.integers(len(self.ids) - tokens + 1))
        return self.ids[start : start + tokens]


def _draw(rng: np.random.Generator, words: list[str], count: int, what: str) -> list[str]:
    if count > len(words):
        raise DataError(f"recall: got {len(words)} {what} to draw from, expected at least {count}; ask for fewer notes.")
    return [words[i] for i in rng.choice(len(words), count, replace=False)]


def _known_names(tokenizer: Any) -> list[str]:
    """Words that are one token with the space before them, as byte-level (``Ġ``) and sentencepiece (``▁``) vocabularies write them."""
    return sorted(token[1:] for token in tokenizer.get_vocab() if re.fullmatch("[Ġ▁][a-z]{3,8}", token))


def _side(word: str) -> str:
    return "test" if int.from_bytes(hashlib.sha256(word.encode()).digest()[:4], "big") % 100 < _TEST_PERCENT else "train"
