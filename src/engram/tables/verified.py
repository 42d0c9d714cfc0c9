"""Rows that answer only to the n-gram that owns them: what taught memories are stored in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Self

import torch
from torch import Tensor, nn

from engram.errors import TableError
from engram.ops import lookup_rows
from engram.tables.base import EmbeddingTable, check_row_ids, replaced
from engram.tables.formats import FORMATS, RowFormat, row_format
from engram.tables.stored import StoredRows

__all__ = ["ABSENT", "DraftTable", "VerifiedTable"]

_PARTS = ("row_ids", "tags", "weight", "scales")
ABSENT = -1
"""Slot of a row that is not stored, or that belongs to another n-gram."""


class VerifiedTable(EmbeddingTable):
    """Only written rows are stored, sorted by row number, each with the tag of its n-gram; everything else reads zero.

    A table of any number of ``rows`` costs what is written in it. The rows are buffers, not parameters: teaching optimises them apart
    (``DraftTable``) and puts them here when they are done. Rows are encoded once, when they come in; their stored bits never change after
    that, whatever else is written or deleted.

    Args:
        rows: number of rows that can be addressed.
        dim: values per row.
        form: how the values are stored, a name in ``FORMATS``.
        device: where the rows are kept.

    Raises:
        TableError: there is no such format, or it cannot hold rows of this width.
    """

    row_ids: Tensor
    tags: Tensor
    weight: Tensor
    scales: Tensor | None

    def __init__(self, rows: int, dim: int, form: str = "float32", device: torch.device | str | None = None) -> None:
        super().__init__()
        self.rows, self.dim, self._form = rows, dim, row_format(form)
        self.version = 0
        """Counts the changes, for whoever keeps something computed from the rows."""
        self.register_buffer("row_ids", torch.zeros(0, dtype=torch.int64, device=device))
        self.register_buffer("tags", torch.zeros(0, dtype=torch.int32, device=device))
        self.register_buffer("weight", torch.empty((0, self._form.width(dim)), dtype=self._form.dtype, device=device))
        scales = self._form.scale_dtype
        self.register_buffer(
            "scales", None if scales is None else torch.empty(self._form.scale_shape(0, dim), dtype=scales, device=device)
        )

    @property
    def can_be_trained(self) -> bool:
        """Rows are written one by one, not trained."""
        return False

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        if not self._form.quantised:
            return super()._apply(fn, recurse)
        # Only moves are followed: another dtype would make the stored bits meaningless.
        self.stored = self.stored.to(fn(torch.empty(0, device=self.row_ids.device)).device)
        return self

    @property
    def form(self) -> RowFormat:
        """How the values are stored; floating point rows follow a module's changes of dtype."""
        if self._form.quantised or self._form.dtype == self.weight.dtype:
            return self._form
        name = super().format_name
        return FORMATS.get(name) or RowFormat(name, self.weight.dtype)

    @property
    def format_name(self) -> str:
        """How rows are stored, by its name in ``FORMATS``."""
        return self.form.name

    @property
    def stored_rows(self) -> int:
        """Rows written."""
        return self.row_ids.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of the rows with their scales."""
        return self.stored_rows * self.form.row_bytes(self.dim)

    @property
    def stored(self) -> StoredRows:
        """The rows as they are stored. Assigning exchanges them all, bit for bit if they have the table's format."""
        return StoredRows(self.form, self.row_ids, self.tags, self.weight, self.scales)

    @stored.setter
    def stored(self, rows: StoredRows) -> None:
        rows = rows.in_format(self.form)
        self.row_ids, self.tags, self.weight, self.scales = rows.row_ids, rows.tags, rows.weight, rows.scales
        self.version += 1

    def find(self, row_ids: Tensor, tags: Tensor) -> Tensor:
        """Slots (int64, the shape of ``row_ids``) of the rows that belong to n-grams with these tags; ``ABSENT`` elsewhere."""
        if self.stored_rows == 0:
            return torch.full_like(row_ids, ABSENT)
        slot, found = _search(self.row_ids, self.tags, row_ids, tags)
        return torch.where(found, slot, ABSENT)

    def gather(self, slots: Tensor) -> Tensor:
        """Rows ``[..., dim]`` of slots, float32 where the format has scales; zero where a slot is ``ABSENT``."""
        rows = torch.zeros((*slots.shape, self.dim), dtype=self._read_dtype, device=self.weight.device)
        if self.stored_rows == 0:
            return rows
        present = slots != ABSENT  # picking them makes the host wait for their number
        if self._form.quantised:
            rows[present] = self.form.read(self.weight, self.scales, slots[present])
        else:
            rows[present] = self.weight[slots[present]]
        return rows

    def gather_without_waiting(self, slots: Tensor) -> Tensor:
        """As ``gather``, reading a row for absent slots too: picking the present ones first would make the host wait for their number.
        There must be a stored row.
        """
        every = slots.clamp_min(0)
        rows = self.form.read(self.weight, self.scales, every) if self._form.quantised else self.weight[every]
        return rows.masked_fill((slots == ABSENT).unsqueeze(-1), 0)

    @property
    def _read_dtype(self) -> torch.dtype:
        return torch.float32 if self._form.quantised else self.weight.dtype

    def lookup(self, row_ids: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Rows ``[..., dim]`` whoever owns them, zero where nothing is written: for looking at the table, not for the layer."""
        if self.stored_rows == 0:
            return torch.zeros((*row_ids.shape, self.dim), dtype=dtype or self._read_dtype, device=self.weight.device)
        slot = torch.searchsorted(self.row_ids, row_ids).clamp_max(self.stored_rows - 1)
        rows = self.gather(torch.where(self.row_ids[slot] == row_ids, slot, ABSENT))
        return rows if dtype is None else rows.to(dtype)

    def owner_tags(self, row_ids: Tensor) -> Tensor:
        """Tags of the n-grams that own rows; 0 where a row is not written."""
        if self.stored_rows == 0:
            return torch.zeros_like(row_ids, dtype=torch.int32)
        slot = torch.searchsorted(self.row_ids, row_ids).clamp_max(self.stored_rows - 1)
        return torch.where(self.row_ids[slot] == row_ids, self.tags[slot], 0)

    @torch.no_grad()
    def insert(self, row_ids: Tensor, tags: Tensor, values: Tensor) -> None:
        """Add rows that are not stored yet.

        Args:
            row_ids: int64 ``[n]``, no row twice.
            tags: int32 ``[n]``, 1 or more.
            values: ``[n, dim]``.

        Raises:
            TableError: a row is stored already, given twice or out of range, shapes differ, or the format cannot hold a value.
        """
        if values.shape != (row_ids.shape[0], self.dim) or tags.shape != row_ids.shape:
            raise TableError(
                f"insert: got {list(row_ids.shape)} rows, {list(tags.shape)} tags and values {list(values.shape)}, "
                f"expected [n], [n] and [n, {self.dim}]."
            )
        if row_ids.numel() == 0:
            return
        check_row_ids(row_ids, self.rows)
        own = (row_ids.to(self.row_ids), tags.to(self.tags), values.detach().to(self.weight.device))
        self.stored = StoredRows.join([self.stored, StoredRows.encode(self.form, *own)])

    @torch.no_grad()
    def delete(self, row_ids: Tensor) -> None:
        """Remove rows; they read zero from then on. Rows that are not stored are ignored."""
        self.stored = self.stored.select(~torch.isin(self.row_ids, row_ids.to(self.row_ids.device)))

    @torch.no_grad()
    def update_rows(self, row_ids: Tensor, fn: Callable[[Tensor], Tensor]) -> None:
        """Replace the values of stored rows; their owners stay.

        Raises:
            TableError: a row is not stored, or ``fn`` changed the shape.
        """
        if row_ids.numel() == 0:
            return
        slot = torch.searchsorted(self.row_ids, row_ids).clamp_max(max(self.stored_rows - 1, 0))
        if self.stored_rows == 0 or not bool((self.row_ids[slot] == row_ids).all()):
            raise TableError("update_rows: some rows are not written yet; insert() them with the tags of their n-grams.")
        new = replaced(self.gather(slot), fn)
        kept = torch.ones(self.stored_rows, dtype=torch.bool, device=slot.device)
        kept[slot] = False
        changed = StoredRows.encode(self.form, row_ids, self.tags[slot], new.to(self.weight.device))
        self.stored = StoredRows.join([self.stored.select(kept), changed])

    def iter_row_blocks(self, block_rows: int = 1 << 16) -> Iterator[tuple[int, Tensor]]:
        """Blocks of the rows that are stored; the first of a pair is a slot, not a row number."""
        for start in range(0, self.stored_rows, block_rows):
            part = slice(start, start + block_rows)
            yield start, self.weight[part] if self.scales is None else self.form.decode(self.weight[part], self.scales[part])

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """A saved table may hold any number of rows; one that is none of this width, or no table, changes nothing and is an error."""
        own = {name: tensor for name, tensor in self._buffers.items() if tensor is not None}
        saved = {name: state_dict[prefix + name] for name in _PARTS if prefix + name in state_dict}
        if saved and (wrong := _why_no_table(saved, own, self.rows)):
            *_, errors = args
            errors.append(f"{prefix.rstrip('.') or type(self).__name__}: {wrong}")
            return
        for name, tensor in saved.items():
            setattr(self, name, torch.empty_like(tensor, dtype=own[name].dtype, device=own[name].device))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self.version += 1

    def extra_repr(self) -> str:
        """Shown by ``print(module)``."""
        return f"{super().extra_repr()}, stored_rows={self.stored_rows}"


class DraftTable(EmbeddingTable):
    """Stands in for a ``VerifiedTable`` while new rows are made: they are a small trainable parameter, all others come from ``base``.

    Optimising a draft costs by its rows; ``base`` is untouched until ``commit``.

    Args:
        base: the table below.
        row_ids: int64 ``[n]``, sorted, no row twice, none stored in ``base``.
        tags: int32 ``[n]``.
    """

    row_ids: Tensor
    tags: Tensor

    def __init__(self, base: VerifiedTable, row_ids: Tensor, tags: Tensor) -> None:
        super().__init__()
        if row_ids.numel() > 1 and not bool((row_ids[1:] > row_ids[:-1]).all()):
            raise TableError("DraftTable: row_ids must be sorted, no row twice.")
        self.rows, self.dim, self.version = base.rows, base.dim, 0
        self.__dict__["_base"] = base  # not a submodule: a draft must not claim the base's rows
        self.register_buffer("row_ids", row_ids, persistent=False)
        self.register_buffer("tags", tags, persistent=False)
        self.held = nn.Parameter(torch.zeros((row_ids.shape[0], base.dim), device=row_ids.device))

    @property
    def base(self) -> VerifiedTable:
        """The table below."""
        return self.__dict__["_base"]

    @property
    def dtype(self) -> torch.dtype:
        """Type of the new rows: float32 while they are drafts."""
        return self.held.dtype

    @property
    def location(self) -> str:
        """Where the base rows are."""
        return self.base.location

    @property
    def stored_rows(self) -> int:
        """Rows of the base and of the draft."""
        return self.base.stored_rows + self.held.shape[0]

    def find(self, row_ids: Tensor, tags: Tensor) -> Tensor:
        """Slots as the base's; those of the draft follow after the base's."""
        slots = self.base.find(row_ids, tags)
        if self.held.shape[0] == 0:
            return slots
        slot, found = _search(self.row_ids, self.tags, row_ids, tags)
        return torch.where(found, slot + self.base.stored_rows, slots)

    def gather(self, slots: Tensor) -> Tensor:
        """Rows ``[..., dim]``, float32; gradients reach the draft only, and only the rows read (sparse)."""
        first = self.base.stored_rows
        own = slots >= first
        rows = self.base.gather(torch.where(own, ABSENT, slots)).to(self.held.dtype)
        rows[own] = lookup_rows(self.held, slots[own] - first)
        return rows

    def lookup(self, row_ids: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Not offered: drafts have no reader but the layer.

        Raises:
            TableError: always.
        """
        raise TableError("DraftTable.lookup: a draft is read by find() and gather() only.")

    def update_rows(self, row_ids: Tensor, fn: Callable[[Tensor], Tensor]) -> None:
        """Not offered: a draft is changed through its parameter.

        Raises:
            TableError: always.
        """
        raise TableError("DraftTable.update_rows: change the parameter `held` instead, then commit().")

    def iter_row_blocks(self, block_rows: int = 1 << 16) -> Iterator[tuple[int, Tensor]]:
        """Blocks of the draft's own rows."""
        for start in range(0, self.held.shape[0], block_rows):
            yield start, self.held.detach()[start : start + block_rows]

    def commit(self) -> None:
        """Put the rows into ``base``."""
        self.base.insert(self.row_ids, self.tags, self.held)


def _why_no_table(saved: dict[str, Tensor], own: dict[str, Tensor], rows: int) -> str | None:
    """What is wrong with the parts of a saved table, beside those of the one that it shall be loaded into; None if nothing is."""
    if saved.keys() != own.keys():
        return f"got {', '.join(saved)}, expected {', '.join(own)}; it is of another format, or lacks a part."
    widths = {name: (list(part.shape[1:]), list(own[name].shape[1:])) for name, part in saved.items()}
    for name, (got, expected) in widths.items():
        if got != expected:
            return f"{name}: got entries of shape {got}, expected {expected}."
    if len(counts := {len(part) for part in saved.values()}) > 1:
        return f"got parts of {', '.join(map(str, sorted(counts)))} entries, expected as many of each."
    ids, tags = saved["row_ids"], saved["tags"]
    if ids.is_meta or len(ids) == 0:
        return None
    if not bool((ids[1:] > ids[:-1]).all()) or int(ids[0]) < 0 or int(ids[-1]) >= rows:
        return f"got row numbers that do not ascend from 0 to at most {rows - 1}, as those of a saved table do."
    return None if int(tags.min()) > 0 else "got a tag below 1: rows without an owner."


def _search(row_ids: Tensor, tags: Tensor, wanted_ids: Tensor, wanted_tags: Tensor) -> tuple[Tensor, Tensor]:
    """Position of each wanted row in sorted ``row_ids`` and whether row and tag are there; ``row_ids`` is not empty."""
    slot = torch.searchsorted(row_ids, wanted_ids).clamp_max(row_ids.shape[0] - 1)
    return slot, (row_ids[slot] == wanted_ids) & (tags[slot] == wanted_tags)
