"""Where a memory helps and where it harms, text by text, and a router that goes by it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from engram.errors import ConfigError, refuse_one_text
from engram.models import EngramModel, LearnedRouter
from engram.models.devices import input_device
from engram.models.mode import evaluation_mode
from engram.models.positions import within_context

__all__ = ["RoutedKind", "TextGain", "fit_router_to_texts", "measure_gains"]


@dataclass(frozen=True)
class TextGain:
    """Loss of one text with the memory and without it, nats per token."""

    tokens: int
    """Predicted tokens."""
    loss_on: float
    loss_off: float

    @property
    def nats(self) -> float:
        """What the memory gains in the whole text; below zero it harms."""
        return (self.loss_off - self.loss_on) * self.tokens


@torch.no_grad()
def measure_gains(memory: EngramModel, tokenizer: Any, texts: Sequence[str], max_length: int = 256) -> list[TextGain]:
    """Loss of the first ``max_length`` tokens of every text (at most the model's context) with the memory on and off; texts of fewer than
    two tokens gain nothing.

    Raises:
        DataError: one text in place of several.
    """
    refuse_one_text(texts, "measure_gains")
    device = input_device(memory)
    max_length = within_context(memory.config, max_length)
    gains = []
    with evaluation_mode(memory):
        for text in texts:
            ids = torch.tensor([tokenizer(text, verbose=False)["input_ids"][:max_length]], device=device, dtype=torch.int64)
            if ids.shape[1] < 2:
                gains.append(TextGain(0, 0.0, 0.0))
                continue
            on = _loss(memory, ids)
            with memory.disable_engram():
                gains.append(TextGain(ids.shape[1] - 1, on, _loss(memory, ids)))
    return gains


def _loss(memory: EngramModel, ids: Tensor) -> float:
    logits = memory(input_ids=ids, use_cache=False).logits[0, :-1].float()
    return float(F.cross_entropy(logits, ids[0, 1:]))


@dataclass(frozen=True)
class RoutedKind:
    """What routing is worth on texts of one kind that the router was not fitted to; gains in nats per token, below zero it is harm."""

    kind: str
    texts: int
    read: int
    """Texts that the router lets read the memory."""
    tokens: int
    always: float
    """Gain where every text reads it."""
    routed: float
    """Gain where the router decides."""
    best: float
    """Gain where exactly those texts read it that it helps."""


def fit_router_to_texts(
    memory: EngramModel, tokenizer: Any, texts: Mapping[str, Sequence[str]], first_tokens: int = 64, max_length: int = 256
) -> tuple[LearnedRouter, list[RoutedKind]]:
    """A router that lets texts read the memory as far as it helps them (``LearnedRouter.fit_to_gains``), and what it is worth.

    Every other text is left out of a first fit, which is judged by them; the router that comes back is fitted to all.

    Args:
        memory: the model with its memory.
        tokenizer: its tokenizer.
        texts: by kind; at least two of each.
        first_tokens: how much of a text the router looks at.
        max_length: how many tokens of a text are judged.

    Raises:
        ConfigError: a kind has one text only, or the memory helps all texts, or none.
    """
    for kind, group in texts.items():
        if len(group) < 2:
            raise ConfigError(f"texts, {kind!r}: got {len(group)}, expected at least 2: one to fit to, one to judge by.")
    fitted = [(kind, text) for kind, group in texts.items() for text in group[::2]]
    asked = [(kind, text) for kind, group in texts.items() for text in group[1::2]]
    of_fitted, of_asked = (measure_gains(memory, tokenizer, [text for _, text in part], max_length) for part in (fitted, asked))
    first = LearnedRouter.fit_to_gains(
        memory, tokenizer, [text for _, text in fitted], [gain.nats for gain in of_fitted], first_tokens
    )
    reads = [score >= first.threshold for score in first.scores([text for _, text in asked])]
    kinds = [
        _of_kind(kind, [(gain, read) for (found, _), gain, read in zip(asked, of_asked, reads) if found == kind])
        for kind in texts
    ]
    every = [text for _, text in [*fitted, *asked]]
    gains = [gain.nats for gain in [*of_fitted, *of_asked]]
    return LearnedRouter.fit_to_gains(memory, tokenizer, every, gains, first_tokens), kinds


def _of_kind(kind: str, judged: Sequence[tuple[TextGain, bool]]) -> RoutedKind:
    tokens = sum(gain.tokens for gain, _ in judged)
    sums = (
        sum(gain.nats for gain, _ in judged),
        sum(gain.nats for gain, read in judged if read),
        sum(max(0.0, gain.nats) for gain, _ in judged),
    )
    read = sum(read for _, read in judged)
    return RoutedKind(kind, len(judged), read, tokens, *(total / max(tokens, 1) for total in sums))
