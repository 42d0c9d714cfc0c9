"""The text that is looked at: windows of documents, by kind, up to a number of tokens."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from engram.data.facts import pad_right
from engram.errors import DataError
from engram.evaluation.bits_per_byte import text_windows

__all__ = ["Batch", "Progress", "Sample", "Window", "iter_batches", "sample_texts"]

Progress = Callable[[int], None]
"""Called with the number of tokens done since the last call."""

_CHARACTERS_PER_TOKEN = 16  # more than any text has; a longer document is not tokenized to its end
_VALUES_PER_BATCH = 1 << 24  # logits of one forward pass: 64 MB in float32


@dataclass(frozen=True)
class Window:
    """Part of a document, led by the tokenizer's first token."""

    kind: str
    document: int
    """Number of the document, counted over all kinds."""
    ids: tuple[int, ...]
    is_beginning: bool = True
    """Whether the document begins here; otherwise the leading token stands where other text was cut away."""


@dataclass(frozen=True)
class Sample:
    """Windows of at most ``length`` tokens, in the order in which they were chosen."""

    windows: tuple[Window, ...]
    length: int
    complete: bool
    """Whether this is all of the text."""

    @property
    def tokens(self) -> int:
        """Tokens of all windows."""
        return sum(len(window.ids) for window in self.windows)

    @property
    def kinds(self) -> list[str]:
        """Kinds of text, in the order of their first window."""
        return list(dict.fromkeys(window.kind for window in self.windows))

    @property
    def documents(self) -> list[int]:
        """Numbers of the documents that occur, ascending."""
        return sorted({window.document for window in self.windows})

    def document_places(self) -> np.ndarray:
        """For every window the place of its document in ``documents``."""
        return np.searchsorted(self.documents, [window.document for window in self.windows])

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready sizes, by kind."""
        kinds = {}
        for kind in self.kinds:
            own = [window for window in self.windows if window.kind == kind]
            kinds[kind] = {
                "documents": len({window.document for window in own}),
                "windows": len(own),
                "tokens": sum(len(window.ids) for window in own),
            }
        return {"tokens": self.tokens, "window": self.length, "complete": self.complete, "kinds": kinds}


@dataclass(frozen=True)
class Batch:
    """Windows that go through a model together."""

    places: list[int]
    """Their places in the sample."""
    ids: Tensor
    """``[B, T]``, padded on the right."""
    mask: Tensor
    """``[B, T]``, zero at padding."""


def sample_texts(tokenizer: Any, texts: Mapping[str, Sequence[str]], tokens: int, length: int = 128) -> Sample:
    """Windows of the texts until ``tokens`` tokens are reached: kinds in equal shares, the beginning of every document first.

    Args:
        tokenizer: the model's tokenizer.
        texts: kinds of text and their documents.
        tokens: about how many tokens; the last window is taken whole.
        length: tokens per window, the leading one included.

    Raises:
        DataError: no text gives a window of two tokens.
    """
    queues: dict[str, deque[Window]] = {}
    number, cut = 0, False
    for kind, documents in texts.items():
        found: list[tuple[int, Window]] = []
        for text in documents:
            head = text[: tokens * _CHARACTERS_PER_TOKEN]
            cut |= len(head) < len(text)
            rows = [row for row in text_windows(tokenizer, [head], length) if len(row) > 1]
            found += [(place, Window(kind, number, tuple(row), place == 0)) for place, row in enumerate(rows)]
            number += 1
        queues[kind] = deque(window for _, window in sorted(found, key=lambda entry: entry[0]))
    taken = dict.fromkeys(queues, 0)
    chosen: list[Window] = []
    while sum(taken.values()) < tokens and any(queues.values()):
        kind = min((kind for kind, queue in queues.items() if queue), key=lambda kind: taken[kind])
        chosen.append(queues[kind].popleft())
        taken[kind] += len(chosen[-1].ids)
    if not chosen:
        raise DataError("the texts give no window of two tokens; expected at least one document with a word in it.")
    return Sample(tuple(chosen), length, complete=not cut and not any(queues.values()))


def iter_batches(sample: Sample, vocab_size: int, progress: Progress | None = None) -> Iterator[Batch]:
    """All windows of a sample, those of like length together; a batch's logits stay below 64 MB where a single window's do."""
    order = sorted(range(len(sample.windows)), key=lambda place: len(sample.windows[place].ids))
    size = max(1, _VALUES_PER_BATCH // (vocab_size * sample.length))
    for start in range(0, len(order), size):
        places = order[start : start + size]
        ids, mask = pad_right([sample.windows[place].ids for place in places], pad_id=0)
        yield Batch(places, ids, mask)
        if progress is not None:
            progress(sum(len(sample.windows[place].ids) for place in places))
