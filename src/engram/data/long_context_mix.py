"""Training blocks with recall questions among them, without which a small model does not learn to recall at all."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from engram.data.long_context import RECALL_TASKS, RecallTask, encode_example, make_example
from engram.data.long_context_words import Distraction, RecallWords
from engram.errors import ConfigError

__all__ = ["RecallMix", "long_context_mix"]

_SHORTEST = 64  # tokens of a document
_TOKENS_PER_NOTE = 22  # of a note and its question, about
_MOST_NOTES = 16
_MOST_OTHER_VALUES = 3  # as many as are asked among by default
_SHORTEST_REPEAT = 8
_IGNORED = -100


class RecallMix(Dataset[dict[str, Tensor]]):
    """Blocks ``[seq_len]`` of another dataset, all of them and in their order, with blocks of recall documents spread evenly among them.

    Made by ``long_context_mix``.
    """

    def __init__(self, blocks: Any, maker: _BlockMaker, share: float) -> None:
        self.blocks, self.maker, self.share = blocks, maker, share

    @property
    def _share(self) -> Fraction:
        """As it was written: 0.29 is no binary number, and what falls short of it adds up to a block."""
        return Fraction(str(self.share))

    def __len__(self) -> int:
        return int(len(self.blocks) / (1 - self._share))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"block {index} of {len(self)}")
        before = int(index * self._share)
        return self.maker.block(before) if int((index + 1) * self._share) > before else self.blocks[index - before]


def long_context_mix(
    blocks: Any,
    tokenizer: Any,
    texts: Sequence[str],
    share: float = 0.5,
    repeats: float = 0.25,
    seed: int = 0,
    kinds: Sequence[str] = tuple(RECALL_TASKS),
    digits: int = 3,
) -> RecallMix:
    """Interleave recall documents (names and numbers for training; from a few dozen tokens to a whole block long) with training blocks.

    A share of them are not questions but stretches of names and digits drawn by chance and said twice: every token of the second half
    is recall, so that the skill of looking up what followed before (induction) forms sooner than from a few answers per document.
    Labels of recall blocks are the answers and second halves alone: what was drawn by chance cannot be predicted, and learning to
    expect certain names and numbers would stand in the way of recalling others.

    Args:
        blocks: equally long training blocks with ``input_ids`` and ``labels``, such as a ``PackedDataset``.
        tokenizer: the model's.
        texts: what notes are hidden in; training text, not the held-out one.
        share: share of recall blocks among all blocks, 0 to below 1.
        repeats: share of blocks of repeated stretches among the recall blocks, 0 to 1.
        seed: of the documents; block i of the mix depends on it and on i alone.
        kinds: kinds of question, some of ``RECALL_TASKS``.
        digits: digits per number.

    Raises:
        ConfigError: a share or a kind is impossible, or blocks are too short for recall documents.
        DataError: there is not a block's worth of text.
    """
    for name, value, possible in (("share", share, 0 <= share < 1), ("repeats", repeats, 0 <= repeats <= 1)):
        if not possible:
            raise ConfigError(f"long_context_mix: {name}: got {value}, expected 0 to {'below 1' if name == 'share' else '1'}.")
    unknown = [kind for kind in kinds if kind not in RECALL_TASKS]
    if unknown or not kinds:
        raise ConfigError(
            f"long_context_mix: kinds: got {', '.join(unknown) or 'none'}, expected some of {', '.join(RECALL_TASKS)}."
        )
    seq_len = len(blocks[0]["input_ids"])
    if seq_len < _SHORTEST:
        raise ConfigError(f"long_context_mix: got blocks of {seq_len} tokens, expected at least {_SHORTEST}.")
    words, distraction = RecallWords(tokenizer, "train", digits), Distraction(tokenizer, texts)
    distraction.stretch(np.random.default_rng(0), seq_len)  # too little text is an error now and not after an hour of training
    return RecallMix(blocks, _BlockMaker(words, distraction, seq_len, seed, tuple(kinds), repeats), share)


class _BlockMaker:
    """Recall documents packed into blocks ``[seq_len]``."""

    def __init__(
        self, words: RecallWords, distraction: Distraction, seq_len: int, seed: int, kinds: tuple[str, ...], repeats: float
    ) -> None:
        self.words, self.distraction, self.tokenizer = words, distraction, distraction.tokenizer
        self.seq_len, self.seed, self.kinds, self.repeats = seq_len, seed, kinds, repeats
        pieces = self.tokenizer([f" {name}" for name in words.names] + list("0123456789"), add_special_tokens=False)[
            "input_ids"
        ]
        self.alphabet = np.array(sorted({i for piece in pieces for i in piece}))

    def block(self, number: int) -> dict[str, Tensor]:
        """Documents one after another, cut at the block's end. Labels are -100 where the next token is drawn by chance."""
        rng = np.random.default_rng((self.seed, number))
        repeated = rng.random() < self.repeats
        ids: list[int] = []
        labels: list[int] = []
        while len(ids) < self.seq_len:
            more, known = self._repeated(rng) if repeated else self._document(rng, self.seq_len - len(ids))
            ids += more
            labels += [i if is_known else _IGNORED for i, is_known in zip(more, known)]
        return {"input_ids": torch.tensor(ids[: self.seq_len]), "labels": torch.tensor(labels[: self.seq_len])}

    def _document(self, rng: np.random.Generator, room: int) -> tuple[list[int], list[bool]]:
        """A question that fits, and which of its tokens are answers; plain text where none does."""
        if room < _SHORTEST:
            return self.distraction.stretch(rng, room), [True] * room
        task = _task(rng, self.kinds[int(rng.integers(len(self.kinds)))], _between(rng, _SHORTEST, room))
        example = make_example(task, self.words, self.distraction, int(rng.integers(1 << 62)))
        ids, spans = encode_example(self.tokenizer, example)
        answers = {i for first, end in spans for i in range(first, end)}
        return ids, [i in answers for i in range(len(ids))]

    def _repeated(self, rng: np.random.Generator) -> tuple[list[int], list[bool]]:
        """A stretch said twice, and which of its tokens follow from what was said (all of the second time but the first one)."""
        start = [] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]
        few = rng.choice(self.alphabet, _between(rng, _SHORTEST_REPEAT, len(self.alphabet)), replace=False)
        stretch = rng.choice(few, _between(rng, _SHORTEST_REPEAT, self.seq_len // 2)).tolist()
        unknown = len(start) + len(stretch) + 1
        ids = start + stretch * 2
        return ids, [i >= unknown for i in range(len(ids))]


def _task(rng: np.random.Generator, kind: str, length: int) -> RecallTask:
    """As many notes as make a document worth reading: from one to all that there is room for."""
    room = min(length // _TOKENS_PER_NOTE - 1, _MOST_NOTES)
    notes = int(rng.integers(1, max(room, 1) + 1))
    if kind == "multi_query":
        return RecallTask(kind, length, asked=notes)
    if kind == "multi_key":
        return RecallTask(kind, length, distractors=notes - 1)
    if kind == "multi_value":
        return RecallTask(kind, length, asked=min(notes, 3), distractors=min(max(notes - 3, 0), _MOST_OTHER_VALUES))
    if kind == "tracking":
        links = int(rng.integers(1, min(notes, 3) + 1))
        return RecallTask(kind, length, asked=links, distractors=notes // links - 1)
    return RecallTask(kind, length)


def _between(rng: np.random.Generator, least: int, most: int) -> int:
    """A length; on a scale of logarithms all are as likely, so that most are short."""
    return round(float(np.exp(rng.uniform(np.log(least), np.log(max(least, most))))))
