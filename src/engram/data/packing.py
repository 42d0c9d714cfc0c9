"""From documents to training blocks: one seeded stream of token ids, cut to equal lengths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from engram.data.corpus import Document
from engram.data.store import begin_token
from engram.errors import ConfigError, DataError
from engram.hashing import count_ids

__all__ = ["PackedDataset", "pack"]


class PackedDataset(Dataset[dict[str, Tensor]]):
    """Blocks ``[seq_len]`` of a flat stream; labels equal the ids (the model shifts them)."""

    def __init__(self, stream: np.ndarray, seq_len: int) -> None:
        self.stream, self.seq_len = stream, seq_len

    def __len__(self) -> int:
        return len(self.stream) // self.seq_len

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"block {index} of {len(self)}")
        block = torch.from_numpy(self.stream[index * self.seq_len : (index + 1) * self.seq_len].astype(np.int64))
        return {"input_ids": block, "labels": block.clone()}


def pack(documents: Sequence[Document | str], tokenizer: Any, seq_len: int, blocks: int, seed: int) -> PackedDataset:
    """Exactly ``blocks`` blocks: epoch after epoch, each in its own seeded order, a document as often as its weight says; a text as often as
    any other.

    Every document starts with the tokenizer's beginning-of-text token (or else its end-of-text token) and holds no other special token:
    text that looks like one is text. The same arguments give the same blocks.

    Raises:
        DataError: there are no documents, they are something else, or all are white space.
        ConfigError: the tokenizer has neither token, or a number is not positive.
    """
    own = _documents(documents)
    for name, value in (("seq_len", seq_len), ("blocks", blocks)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"pack: got {name}={value!r}, expected a whole number of at least 1.")
    dtype = np.uint16 if count_ids(tokenizer) <= 1 << 16 else np.uint32
    begin = begin_token(tokenizer)
    texts = [doc.text for doc in own]
    options = {"add_special_tokens": False, "split_special_tokens": True, "return_attention_mask": False, "verbose": False}
    encoded = tokenizer(texts, **options)["input_ids"]
    ids = [np.asarray([begin, *row], dtype=dtype) for row in encoded]
    copies = np.repeat(np.arange(len(own)), [doc.weight for doc in own])
    rng = np.random.default_rng(seed)
    wanted, pieces, length = blocks * seq_len, [], 0
    while length < wanted:
        for index in rng.permutation(copies):
            pieces.append(ids[index])
            length += len(ids[index])
            if length >= wanted:
                break
    return PackedDataset(np.concatenate(pieces)[:wanted], seq_len)


def _documents(given: Sequence[Document | str]) -> list[Document]:
    """Plain texts as documents, named by number."""
    if isinstance(given, str | bytes):
        raise DataError("pack: got one text, expected a list of documents or texts; put it into a list.")
    found = [Document(f"text {number}", each) if isinstance(each, str) else each for number, each in enumerate(given)]
    other = next((each for each in found if not isinstance(each, Document)), None)
    if other is not None:
        raise DataError(f"pack: got {type(other).__name__} among the documents, expected Document or text (str).")
    if not found:
        raise DataError("pack: got no documents.")
    if not any(document.text.strip() for document in found):
        raise DataError("pack: got nothing but white space, expected text.")
    for document in found:
        try:
            document.text.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"pack: {document.name} holds {document.text[error.start]!r}, half of a character; expected text."
            ) from None
    return found
