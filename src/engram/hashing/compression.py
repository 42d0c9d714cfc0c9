"""Token compression: the map P from raw token ids to canonical ids (the demo; paper section 2.2).

Tokens that differ in case, accents or white space alone share one canonical id, so that " Apple" and "apple" build the same n-gram.
"""

from __future__ import annotations

import hashlib
from typing import Protocol

import numpy as np
from tokenizers import Regex, normalizers

from engram.errors import ConfigError

__all__ = [
    "CompressedTokenizer",
    "ExactTokenizer",
    "TokenizerLike",
    "build_normalizer",
    "check_id_range",
    "count_ids",
    "unknown_id",
]

_REPLACEMENT_CHARACTER = "\ufffd"
_LONE_SPACE = "\ue000"  # private-use character that carries a single space through Strip


class TokenizerLike(Protocol):
    """What compression needs from a tokenizer; every Hugging Face tokenizer has it."""

    def __len__(self) -> int: ...

    def decode(self, token_ids: list[int], skip_special_tokens: bool = ...) -> str:
        """Text of ids."""
        ...

    def convert_ids_to_tokens(self, ids: int) -> str:
        """Raw token of an id."""
        ...


def build_normalizer() -> normalizers.Normalizer:
    """The demo's chain: NFKC, NFD, strip accents, lower case, white-space runs to one space, strip (a lone space survives)."""
    return normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.NFD(),
            normalizers.StripAccents(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"[ \t\r\n]+"), " "),
            normalizers.Replace(Regex(r"^ $"), _LONE_SPACE),
            normalizers.Strip(),
            normalizers.Replace(_LONE_SPACE, " "),
        ]
    )


def count_ids(tokenizer: TokenizerLike) -> int:
    """Ids that a tokenizer may give, its largest and one; more than it has tokens where their numbers have gaps."""
    vocabulary = tokenizer.get_vocab() if hasattr(tokenizer, "get_vocab") else {}
    return max(len(tokenizer), 1 + max(vocabulary.values(), default=-1))


class CompressedTokenizer:
    """The compression map of one tokenizer.

    Args:
        tokenizer: a Hugging Face tokenizer (anything with ``len``, ``decode`` and ``convert_ids_to_tokens``).

    Attributes:
        lookup_table: int64 ``[count_ids(tokenizer)]``, raw id -> canonical id; canonical ids are numbered by first appearance.

    Raises:
        ConfigError: the object is not a tokenizer, or its vocabulary is empty.
    """

    def __init__(self, tokenizer: TokenizerLike) -> None:
        _check_tokenizer(tokenizer, type(self).__name__)
        self.lookup_table = self._build_lookup_table(tokenizer)
        self._num_canonical = int(self.lookup_table.max()) + 1

    @staticmethod
    def _build_lookup_table(tokenizer: TokenizerLike) -> np.ndarray:
        normalizer = build_normalizer()
        canonical: dict[str, int] = {}
        table = np.empty(count_ids(tokenizer), dtype=np.int64)
        for token_id in range(len(table)):
            key = _canonical_key(tokenizer, token_id, normalizer)
            table[token_id] = canonical.setdefault(key, len(canonical))
        return table

    def __repr__(self) -> str:
        return f"{type(self).__name__}(ids={len(self.lookup_table)}, canonical_ids={len(self)})"

    def __len__(self) -> int:
        """Number of canonical ids, |V'|."""
        return self._num_canonical

    def compress(self, input_ids: np.ndarray) -> np.ndarray:
        """Canonical ids of raw ids, any shape, int64.

        Raises:
            ConfigError: an id is outside the tokenizer's vocabulary.
        """
        ids = np.asarray(input_ids, dtype=np.int64)
        check_id_range(ids, len(self.lookup_table))
        return self.lookup_table[ids]

    @property
    def reduction(self) -> float:
        """Share of the vocabulary that compression takes away, ``1 - |V'| / |V|`` (paper section 2.2: 0.2343 of DeepSeek's 128k tokens)."""
        return 1 - len(self) / len(self.lookup_table)

    def largest_classes(self, tokenizer: TokenizerLike, count: int = 5) -> list[tuple[str, int]]:
        """What most tokens are the same as: normalised text and number of tokens, the largest first (paper: a space, then a, o, e, i).

        Args:
            tokenizer: the one that the map was made from.
            count: how many.
        """
        sizes = np.bincount(self.lookup_table, minlength=len(self))
        largest = np.argsort(-sizes, kind="stable")[:count]
        normalizer = build_normalizer()
        firsts = [int(np.argmax(self.lookup_table == canonical)) for canonical in largest]
        return [(_canonical_key(tokenizer, first, normalizer), int(sizes[c])) for first, c in zip(firsts, largest)]

    @property
    def identity(self) -> bytes:
        """What tells this map from others: it enters the fingerprint of a memory."""
        return self.lookup_table.astype("<i8").tobytes()


class ExactTokenizer(CompressedTokenizer):
    """The map of specifications with raw ids: every token keeps its own id. Its identity is the list of raw tokens."""

    _identity: bytes

    @staticmethod
    def _build_lookup_table(tokenizer: TokenizerLike) -> np.ndarray:
        return np.arange(count_ids(tokenizer), dtype=np.int64)

    def __init__(self, tokenizer: TokenizerLike) -> None:
        super().__init__(tokenizer)
        digest = hashlib.sha256()
        for token_id in range(count_ids(tokenizer)):
            digest.update(str(tokenizer.convert_ids_to_tokens(token_id)).encode("utf-8", "surrogatepass") + b"\0")
        self._identity = digest.digest()

    @classmethod
    def of_size(cls, vocab_size: int) -> ExactTokenizer:
        """The map of any tokenizer of this size; it has no identity."""
        ids = cls.__new__(cls)
        ids.lookup_table = np.arange(vocab_size, dtype=np.int64)
        ids._num_canonical = vocab_size
        ids._identity = b""
        return ids

    @property
    def identity(self) -> bytes:
        """SHA-256 of the raw tokens in order."""
        return self._identity


def _check_tokenizer(tokenizer: object, wanted_by: str) -> None:
    if not all(hasattr(tokenizer, name) for name in ("decode", "convert_ids_to_tokens", "__len__")):
        raise ConfigError(
            f"{wanted_by}: got {type(tokenizer).__name__}, expected a Hugging Face tokenizer object; "
            "load one with transformers.AutoTokenizer.from_pretrained(...)."
        )
    if len(tokenizer) == 0:  # type: ignore[arg-type]
        raise ConfigError(f"{wanted_by}: the tokenizer has no tokens, expected at least one.")


def check_id_range(ids: np.ndarray, vocab_size: int) -> None:
    """Refuse ids that no token has: they would silently read another token's row."""
    if ids.size and (ids.min() < 0 or ids.max() >= vocab_size):
        worst = int(ids.min()) if ids.min() < 0 else int(ids.max())
        raise unknown_id(worst, vocab_size)


def unknown_id(token_id: int, vocab_size: int) -> ConfigError:
    """What to raise for an id that no token has."""
    return ConfigError(
        f"input_ids: got id {token_id}, expected 0..{vocab_size - 1}; are they from another tokenizer, or of tokens added to it since?"
    )


def _canonical_key(tokenizer: TokenizerLike, token_id: int, normalizer: normalizers.Normalizer) -> str:
    text = tokenizer.decode([token_id], skip_special_tokens=False)
    if _REPLACEMENT_CHARACTER in text:  # a fragment of a multi-byte character: its raw token string is all that tells it apart
        return str(tokenizer.convert_ids_to_tokens(token_id))
    return normalizer.normalize_str(text) or text
