"""What is lost when a trained memory is switched off at inference, by kind of text and by kind of token."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from engram.analysis.intervals import as_interval, document_statistic
from engram.analysis.sample import Progress, Sample, iter_batches
from engram.analysis.subject import Subject

__all__ = ["TokenLosses", "memory_off", "token_class", "token_losses"]


@dataclass(frozen=True)
class TokenLosses:
    """Every predicted token of a sample, in the order of its windows: arrays ``[n]``."""

    window: np.ndarray
    """Place of the window in the sample."""
    position: np.ndarray
    """Position (0-based) of the token *before* the predicted one: the last that the model saw."""
    target: np.ndarray
    """Id of the predicted token."""
    on: np.ndarray
    """Nats with the memory on."""
    off: np.ndarray
    """Nats with the memory off."""
    right_on: np.ndarray
    """Whether the token was the most likely one, memory on."""
    right_off: np.ndarray
    """The same with the memory off."""
    vocab_size: int


@torch.no_grad()
def token_losses(memory: Any, sample: Sample, progress: Progress | None = None) -> TokenLosses:
    """Negative log-probability of every token of the sample but the leading ones, with the memory on and off.

    Args:
        memory: an ``EngramModel``.
        sample: the text.
        progress: told of tokens done.
    """
    subjects = [Subject("on", memory, True), Subject("off", memory, False)]
    parts: dict[int, list[np.ndarray]] = {}
    for batch in iter_batches(sample, subjects[0].vocab_size, progress):
        target = batch.ids[:, 1:].to(subjects[0].device)
        columns = []
        for subject in subjects:
            logits = subject.logits(batch.ids, batch.mask)[:, :-1]
            nats = logits.logsumexp(-1) - logits.gather(-1, target[..., None])[..., 0]
            columns += [nats.double().cpu().numpy(), (logits.argmax(-1) == target).cpu().numpy()]
        for row, place in enumerate(batch.places):
            length = len(sample.windows[place].ids) - 1
            parts[place] = [column[row, :length] for column in columns]
    windows = range(len(sample.windows))
    joined = [np.concatenate([parts[place][number] for place in windows]) for number in range(4)]
    lengths = [len(sample.windows[place].ids) - 1 for place in windows]
    return TokenLosses(
        window=np.repeat(np.arange(len(lengths)), lengths),
        position=np.concatenate([np.arange(length) for length in lengths]),
        target=np.concatenate([sample.windows[place].ids[1:] for place in windows]),
        on=joined[0],
        off=joined[2],
        right_on=joined[1],
        right_off=joined[3],
        vocab_size=subjects[0].vocab_size,
    )


def memory_off(losses: TokenLosses, sample: Sample, tokenizer: Any) -> dict[str, Any]:
    """Loss and accuracy with the memory on and off, and the share that is kept, with 95 % intervals over documents.

    Two shares are given. ``accuracy_kept`` is accuracy off over accuracy on, the way in which the paper reports its benchmarks.
    ``gain_kept`` is ``(ln V - loss off) / (ln V - loss on)``: what is left of the advantage over guessing evenly among V tokens.

    Returns:
        ``all``, ``by_kind`` (kinds of text) and ``by_token`` (numbers, names, words, ...); losses in nats per token.
    """
    kinds = np.array([window.kind for window in sample.windows])[losses.window]
    documents = sample.document_places()[losses.window]
    unique, inverse = np.unique(losses.target, return_inverse=True)
    classes = np.array([token_class(tokenizer.decode([int(token)])) for token in unique])[inverse]

    def group(chosen: np.ndarray) -> dict[str, Any]:
        return _compare(losses, documents, chosen)

    return {
        "unit": "nats per token",
        "all": group(np.ones(len(kinds), dtype=bool)),
        "by_kind": {kind: group(kinds == kind) for kind in sample.kinds},
        "by_token": {str(name): group(classes == name) for name in sorted(set(classes.tolist()))},
    }


def token_class(text: str) -> str:
    """What a token is by its letters alone: ``number``, ``name`` (capitalised), ``CAPITALS``, ``word``, ``space`` or ``sign``."""
    core = text.strip()
    if not core:
        return "space"
    if core.isnumeric():
        return "number"
    if not core.isalpha():
        return "sign"
    if core[0].isupper():
        return "CAPITALS" if len(core) > 1 and core.isupper() else "name"
    return "word"


def _compare(losses: TokenLosses, documents: np.ndarray, chosen: np.ndarray) -> dict[str, Any]:
    names, place = np.unique(documents[chosen], return_inverse=True)
    columns = [losses.on, losses.off, losses.right_on, losses.right_off, np.ones(len(documents))]
    sums = np.stack([np.bincount(place, column[chosen].astype(float), minlength=len(names)) for column in columns], axis=-1)
    ceiling = math.log(losses.vocab_size)
    statistics: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "loss_on": lambda t: t[:, 0] / t[:, 4],
        "loss_off": lambda t: t[:, 1] / t[:, 4],
        "lost": lambda t: (t[:, 1] - t[:, 0]) / t[:, 4],
        "accuracy_on": lambda t: t[:, 2] / t[:, 4],
        "accuracy_off": lambda t: t[:, 3] / t[:, 4],
        "accuracy_kept": lambda t: t[:, 3] / t[:, 2],
        "gain_kept": lambda t: (ceiling * t[:, 4] - t[:, 1]) / (ceiling * t[:, 4] - t[:, 0]),
    }
    found = {name: as_interval("mean", *document_statistic(sums, statistic)) for name, statistic in statistics.items()}
    return {"tokens": int(chosen.sum()), "documents": len(names), **found}
