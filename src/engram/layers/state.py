"""What one layer must remember of a sequence to go on with it: the last ids and the last inputs of the convolution."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from engram.errors import EngramError

__all__ = ["EngramState", "RollingTail"]

_MAX_CHUNKS = 64


class RollingTail:
    """The last positions of a growing sequence, at least ``window`` of them, in ``[B, positions, ...]`` chunks.

    Appending costs O(1) copies per step on average; going back (speculative decoding, a cropped cache) is possible for as many
    positions as are kept.

    Args:
        window: positions to keep; None keeps all.
    """

    def __init__(self, window: int | None = None) -> None:
        self.window = window
        self.length = 0
        self._chunks: list[Tensor] = []
        self._owned: list[Tensor] = []

    @property
    def kept(self) -> int:
        """Positions still held."""
        return sum(chunk.shape[1] for chunk in self._chunks)

    def append(self, chunk: Tensor) -> None:
        """Add positions ``[B, T, ...]``.

        Raises:
            EngramError: the batch size differs from what is held.
        """
        if self._chunks and self._chunks[0].shape[0] != chunk.shape[0]:
            raise EngramError(
                f"decoding state: got a batch of {chunk.shape[0]}, expected {self._chunks[0].shape[0]} as in the calls before; "
                "start a new cache for a new batch."
            )
        self._chunks.append(chunk)
        self.length += chunk.shape[1]
        if len(self._chunks) > _MAX_CHUNKS or (self.window is not None and self.kept > self.window + _MAX_CHUNKS):
            self._consolidate()

    def last(self, count: int) -> Tensor | None:
        """The last ``count`` positions, or all there ever were if fewer; None if there are none.

        Raises:
            EngramError: positions are needed that were dropped.
        """
        if min(count, self.length) > self.kept:
            raise EngramError(
                f"decoding state: the cache was cropped further back than the {self.window} positions kept for the convolution; "
                "run the shortened prompt again with a new cache, or attach with a larger rollback_window."
            )
        if not self._chunks or count <= 0:
            return None
        taken = self._chunks.pop()
        if taken.shape[1] < count and self._chunks:
            parts = [taken]
            while self._chunks and sum(part.shape[1] for part in parts) < count:
                parts.append(self._chunks.pop())
            taken = torch.cat(parts[::-1], dim=1)
            if taken.shape[1] > 4 * count:  # what is joined stays joined for the next call, but does not grow with the sequence
                self._chunks.append(taken[:, :-count])
                taken = taken[:, -count:]
        self._chunks.append(taken)
        return taken[:, max(taken.shape[1] - count, 0) :]

    def own(self) -> None:
        """Keep what is held in memory of its own: what a compiled pass made (CUDA graphs) is overwritten by the next one."""
        before = {id(chunk) for chunk in self._owned}
        self._chunks = [chunk if id(chunk) in before else chunk.clone() for chunk in self._chunks]
        self._owned = list(self._chunks)

    def trim(self, length: int) -> None:
        """Forget everything after the first ``length`` positions."""
        surplus = self.length - length
        self.length = min(self.length, length)
        while surplus > 0 and self._chunks:
            chunk = self._chunks.pop()
            if chunk.shape[1] > surplus:
                self._chunks.append(chunk[:, : chunk.shape[1] - surplus])
            surplus -= chunk.shape[1]

    def map_batch(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Apply a change of the batch dimension (beam reordering, repetition, selection)."""
        if self._chunks:
            self._consolidate()
            self._chunks = [fn(self._chunks[0])]

    def _consolidate(self) -> None:
        self._drop_first(0 if self.window is None else max(self.kept - self.window, 0))
        self._chunks = [torch.cat(self._chunks, dim=1)]  # a copy: a view would hold on to all that was cut off

    def _drop_first(self, surplus: int) -> None:
        while surplus > 0 and len(self._chunks) > 1 and self._chunks[0].shape[1] <= surplus:
            surplus -= self._chunks.pop(0).shape[1]
        self._chunks[0] = self._chunks[0][:, surplus:]


class EngramState:
    """Decoding state of one layer used on its own; pass the same object to successive calls of ``Engram.forward``.

    Attributes:
        ids: raw ids seen, masked positions replaced by ``pad_id``.
        conv: normalised inputs of the convolution.

    Args:
        window: positions of ``conv`` to keep; None keeps all.
        conv: share this tail instead of starting one (ids are then hashed, and remembered, by somebody else).
    """

    def __init__(self, window: int | None = None, conv: RollingTail | None = None) -> None:
        self.ids = RollingTail()
        self.conv = RollingTail(window) if conv is None else conv

    def reorder(self, index: Tensor) -> None:
        """Reorder the batch, as beam search does."""
        for tail in (self.ids, self.conv):
            tail.map_batch(lambda x: x.index_select(0, index.to(x.device)))

    def trim(self, length: int) -> None:
        """Go back to the first ``length`` positions."""
        self.ids.trim(length)
        self.conv.trim(length)
