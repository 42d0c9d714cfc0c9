"""Several texts packed into one row: what none of them may read of another.

transformers keeps packed texts apart in attention, by ``position_ids`` that start again or by a mask with blocks on its diagonal. N-grams and
convolutions look back over a row as well, so for them every text becomes a sequence of its own.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from engram.errors import AttachError

__all__ = ["Packing", "find_packing", "lets_through", "of_full_attention"]

_CLOSED = -1000.0
"""What is added to a score where nothing may pass; a bias of nearby positions is far above, and masks are far below."""


def lets_through(values: Tensor) -> Tensor:
    """Where a mask of four dimensions, boolean or to be added, lets attention through; bool of the same shape. It may hold biases too."""
    return values if values.dtype == torch.bool else values > _CLOSED


def of_full_attention(attention_mask: Any) -> Any:
    """Of a dict of masks that of full attention, or the first if no block has such; others are given back as they are."""
    if not isinstance(attention_mask, dict):
        return attention_mask
    full = attention_mask.get("full_attention")
    return full if full is not None else next(iter(attention_mask.values()), None)


class Packing:
    """Rows of several texts, and the same texts as sequences of their own.

    Args:
        starts: bool ``[B, T]``, True where a text starts.
    """

    def __init__(self, starts: Tensor) -> None:
        batch, length = starts.shape
        starts = starts.clone()
        starts[:, 0] = True
        first = starts.view(-1).nonzero()[:, 0]
        lengths = torch.diff(first, append=first.new_full((1,), batch * length))
        self._shape, self._rows = (batch, length), torch.div(first, length, rounding_mode="floor")
        number = starts.view(-1).cumsum(0) - 1
        offset = torch.arange(batch * length, device=starts.device) - first[number]
        longest = int(lengths.max())
        self._place = number * longest + offset  # of every position among the sequences
        columns = torch.arange(longest, device=starts.device)
        self.mask = columns < lengths[:, None]
        """bool ``[S, L]``: which positions of the sequences are real."""
        self._source = (first[:, None] + columns).clamp_(max=batch * length - 1)

    def apart(self, values: Tensor) -> Tensor:
        """Values ``[B, T, ...]`` by sequence, ``[S, L, ...]``; whatever stands behind the end of one is to be masked."""
        return values.flatten(0, 1)[self._source.to(values.device)]

    def together(self, values: Tensor) -> Tensor:
        """Values ``[S, L, ...]`` where they belong, ``[B, T, ...]``."""
        return values.flatten(0, 1)[self._place.to(values.device)].unflatten(0, self._shape)

    def of_rows(self, values: Tensor) -> Tensor:
        """Values ``[B]`` of rows for each of their sequences, ``[S]``."""
        return values[self._rows.to(values.device)]


def find_packing(position_ids: Any, attention_mask: Any, past: int, input_ids: Tensor, mask: Tensor | None) -> Packing | None:
    """How the texts in these rows are kept apart; None where every row is one text.

    Args:
        position_ids: as the decoder got them. They count where no mask is given, as in transformers.
        attention_mask: as the decoder got it, or a dict of such. One of four dimensions keeps texts apart where a real position may not attend
            to the last real one before it, padding between them or not.
        past: positions already in the cache.
        input_ids: ``[B, T]``.
        mask: bool ``[B, T]``, which positions are real (``token_mask``).

    Raises:
        AttachError: texts are packed behind what a cache holds.
    """
    length, attention_mask = input_ids.shape[1], of_full_attention(attention_mask)
    if length < 2:
        return None
    if attention_mask is None and isinstance(position_ids, Tensor) and position_ids.dim() == 2:
        return _packing(position_ids.diff(dim=1) != 1, past, input_ids)
    if isinstance(attention_mask, Tensor) and attention_mask.dim() == 4 and attention_mask.shape[-1] >= past + length:
        assert mask is not None
        place = torch.arange(length, device=mask.device)
        before = torch.where(mask, place, -1).cummax(dim=1).values[:, :-1]  # the last real position, -1 if there is none
        asked = attention_mask[:, 0, 1:, past : past + length].expand(len(mask), -1, -1)
        scores = asked.gather(-1, before.clamp(min=0)[..., None])[..., 0]
        return _packing(~lets_through(scores) & mask[:, 1:] & (before >= 0), past, input_ids)
    return None


@torch.compiler.disable  # what is packed is seen from the values
def _packing(starts: Tensor, past: int, input_ids: Tensor) -> Packing | None:
    """``starts``: bool ``[B, T - 1]``, of all positions but the first."""
    if not bool(starts.any()):
        return None
    if past:
        raise AttachError(
            f"got several texts packed into rows behind {past} cached positions; the memory cannot tell which one goes on."
        )
    return Packing(F.pad(starts, (1, 0)).to(input_ids.device).expand(input_ids.shape))
