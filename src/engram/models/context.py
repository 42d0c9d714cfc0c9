"""What one forward pass of the decoder needs to know before its blocks run: addresses, padding and the past."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from engram.errors import AttachError
from engram.models.packing import Packing, lets_through, of_full_attention
from engram.tables import RowHandle

__all__ = ["ForwardContext", "token_mask"]


@dataclass
class ForwardContext:
    """Prepared once per forward pass, read by every hooked block."""

    hash_ids: dict[int, Tensor]
    """Head indices ``[B, T, H]`` per layer; for verified rows only while activity is recorded."""
    slots: dict[int, Tensor | None] | None
    """For verified rows: slots ``[B, T, H]`` per layer, None for a layer in which nothing is read."""
    input_ids: Tensor
    """Raw ids ``[B, T]`` with ``pad_id`` at masked positions."""
    mask: Tensor | None
    """bool ``[B, T]``, False at padding."""
    state: Any
    """The ``CacheState`` to extend, or None when nothing will be continued."""
    route: Tensor | None = None
    """bool ``[B]``: which sequences may read the memory; None stands for all. Already applied to ``slots``."""
    fetched: dict[int, RowHandle] = field(default_factory=dict)
    """Rows on their way, per layer that has any prefetched."""
    cache: Any = None
    """The cache that was given."""
    packing: Packing | None = None
    """Where rows hold several texts: all else here is by text, ``B`` and ``T`` being those of the texts as sequences of their own."""
    found: dict[int, int] = field(default_factory=dict)
    """For verified rows: positions per layer that have slots, where that is known."""


def token_mask(attention_mask: Any, past: int, input_ids: Tensor) -> Tensor | None:
    """Which of the new positions are real, bool ``[B, T]``, from whatever mask a transformers model accepts.

    A 4-D mask is read on its diagonal: a real position may attend to itself, a padded one may not, whatever the window. One of fewer keys
    than there are positions is of a cache that holds a window alone, the newest last.

    Args:
        attention_mask: None, ``[B, past + T]`` (or ``[B, T]``), ``[B, 1, T, keys]`` (bool or additive), or a dict of the latter.
        past: positions already in the cache.
        input_ids: ``[B, T]``.

    Raises:
        AttachError: the mask is of another kind or size.
    """
    batch, length = input_ids.shape
    attention_mask = of_full_attention(attention_mask)
    if attention_mask is None:
        return None
    if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
        if attention_mask.shape[1] >= past + length:  # a static cache may come with a mask of its full size
            return attention_mask[:, past : past + length] != 0
        if attention_mask.shape[1] == length:
            return attention_mask != 0
    if isinstance(attention_mask, Tensor) and attention_mask.dim() == 4 and attention_mask.shape[-1] >= length:
        first = min(past, attention_mask.shape[-1] - length)
        diagonal = attention_mask[:, 0, :, first : first + length].diagonal(dim1=-2, dim2=-1)
        return lets_through(diagonal).expand(batch, length)
    got = list(attention_mask.shape) if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
    raise AttachError(
        f"attention_mask: got {got}, from which padding cannot be told; expected [B, {past + length}] for {length} new ids after {past}."
    )
