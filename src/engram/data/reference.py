"""The plain definitions that `blocks.py` and `contamination.py` are tested against: short, slow, all in memory."""

from __future__ import annotations

import numpy as np

from engram.data.blocks import epoch_order
from engram.data.store import TokenStore

__all__ = ["shared_ngrams", "training_stream"]


def training_stream(store: TokenStore, length: int, seed: int) -> list[int]:
    """The first ``length`` ids of a training run: every epoch all training documents, as often as they weigh, in that epoch's order."""
    copies = [document for document in store.split("train") for _ in range(store.documents[document]["weight"])]
    stream: list[int] = []
    epoch = 0
    while len(stream) < length:
        for place in epoch_order(seed, epoch, len(copies)):
            stream += store.ids(copies[place]).tolist()
        epoch += 1
    return stream[:length]


def shared_ngrams(train: list[list[int]], held_out: list[list[int]], n: int) -> list[tuple[int, int]]:
    """For every held-out document: how many of its n-grams occur in a training document, and how many it has."""
    known = {tuple(ids[i : i + n]) for ids in train for i in range(len(ids) - n + 1)}
    grams = [[tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)] for ids in held_out]
    return [(int(np.sum([gram in known for gram in own])), len(own)) for own in grams]
