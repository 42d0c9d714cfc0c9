"""Written rows with the n-grams that own them, exactly as they are stored: what verified tables, saved memories and unions are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from engram.errors import TableError
from engram.tables.formats import RowFormat, as_bytes, chosen

__all__ = ["StoredRows"]


@dataclass(frozen=True)
class StoredRows:
    """Rows of one format, sorted by row number. Selecting and joining move stored bits and never decode them."""

    form: RowFormat
    row_ids: Tensor
    """int64 ``[n]``, sorted, no row twice."""
    tags: Tensor
    """int32 ``[n]``, the owners' tags."""
    weight: Tensor
    """``[n, form.width(dim)]``."""
    scales: Tensor | None = None
    """``form.scale_shape(n, dim)``, or None for formats without."""

    @classmethod
    def encode(cls, form: RowFormat, row_ids: Tensor, tags: Tensor, values: Tensor) -> Self:
        """From floating point values ``[n, dim]``.

        Raises:
            TableError: a value is not finite and the format cannot hold that.
        """
        return cls(form, row_ids, tags, *form.encode(values))

    def __len__(self) -> int:
        return self.row_ids.shape[0]

    def values(self) -> Tensor:
        """float32 ``[n, dim]``."""
        return self.form.decode(self.weight, self.scales)

    def select(self, which: Tensor) -> Self:
        """Those rows that a mask ``[n]`` or sorted positions choose."""
        scales = None if self.scales is None else self.scales[which]
        return replace(
            self, row_ids=self.row_ids[which], tags=self.tags[which], weight=chosen(self.weight, which), scales=scales
        )

    def in_format(self, form: RowFormat) -> Self:
        """The same rows in another format; in their own they stay bit for bit."""
        if form == self.form:
            return self
        return type(self).encode(form, self.row_ids, self.tags, self.values())

    def to(self, device: torch.device | str) -> Self:
        """The same rows on a device."""
        scales = None if self.scales is None else self.scales.to(device)
        moved = (self.row_ids.to(device), self.tags.to(device), self.weight.to(device))
        return type(self)(self.form, *moved, scales)

    def equal_to(self, other: Self) -> Tensor:
        """Per row, bool ``[n]``, whether its values are those of the row at the same place of ``other``."""
        if self.form == other.form:
            return (self.weight.float() == other.weight.float()).all(dim=1) & self._same_scales(other)
        return (self.values() == other.values()).all(dim=1)

    def _same_scales(self, other: Self) -> Tensor:
        if self.scales is None or other.scales is None:
            return torch.ones_like(self.tags, dtype=torch.bool)
        return (self.scales == other.scales).unsqueeze(1).flatten(1).all(dim=1)

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        """Rows of several parts of one format, sorted.

        Raises:
            TableError: a row is in two of them.
        """
        row_ids, order = torch.cat([part.row_ids for part in parts]).sort()
        if bool((row_ids[1:] == row_ids[:-1]).any()):
            raise TableError("insert: a row is stored already or given twice; delete it first.")
        tags = torch.cat([part.tags for part in parts])[order]
        weight = as_bytes(torch.cat([as_bytes(part.weight) for part in parts])[order], parts[0].weight.dtype)
        scales = [part.scales for part in parts if part.scales is not None]
        return cls(parts[0].form, row_ids, tags, weight, torch.cat(scales)[order] if scales else None)
