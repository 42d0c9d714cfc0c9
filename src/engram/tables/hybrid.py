"""Rows in use on the model's device, all rows in host memory or a file."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from threading import Lock
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from engram.errors import TableError
from engram.ops import lookup_rows
from engram.tables.base import EmbeddingTable, refuse_assign
from engram.tables.counts import AccessCounts
from engram.tables.formats import row_format
from engram.tables.host import HostTable
from engram.tables.memory import check_fits
from engram.tables.prefetch import RowHandle, RowPrefetcher
from engram.tables.quantised import QuantisedTable

__all__ = ["HybridTable"]


_SWAPPING = Lock()
"""Held for the moment in which a table's copies are exchanged, of whichever table."""


def _new_lock() -> None:
    global _SWAPPING
    _SWAPPING = Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_new_lock)  # a thread that held it is not there to give it back


class _Copies(NamedTuple):
    """Which rows are hot and what they are. Never changed, only exchanged as one: a thread that reads sees all of the old or of the new."""

    ids: Tensor
    """int64 ``[h]``, sorted."""
    hot: Tensor
    """As they are stored, ``[h, width]``."""
    scales: Tensor | None
    version: int | None
    """Of the cold table's parameter when they were copied; None if they must be copied anew."""

    def to(self, device: torch.device) -> _Copies:
        return _Copies(
            self.ids.to(device),
            self.hot.to(device),
            None if self.scales is None else self.scales.to(device),
            self.version,
        )


class HybridTable(EmbeddingTable):
    """A cold table that holds every row, and copies of its hot rows on the model's device.

    The cold table is the truth: its parameter is this table's, and gradients, optimisers and checkpoints see that alone. While gradients
    are recorded all rows are read from it. Otherwise hot rows come from the copies, which are fetched again after any change. So look-ups
    are the cold table's, bit for bit, and a training step is that of any other tier. Copies are in the cold table's format.

    Args:
        cold: a table in host memory or in a mapped file, its rows in any format.
        hot_rows: how many rows may be hot at a time.
        device: where hot rows are kept; they move with the module.

    Raises:
        TableError: ``hot_rows`` is not positive.
    """

    def __init__(self, cold: HostTable | QuantisedTable, hot_rows: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        if hot_rows < 1:
            raise TableError(f"hot_rows: got {hot_rows}, expected at least 1; use the cold table alone for none.")
        self.rows, self.dim, self.hot_rows = cold.rows, cold.dim, hot_rows
        # Not a submodule: its parameter is registered here, under the name that other tables save it.
        self.__dict__["cold"] = cold
        self.form = row_format(cold.format_name)
        if isinstance(cold, QuantisedTable):
            self.register_buffer("weight", cold.weight)
            self.register_buffer("scales", cold.scales)
        else:
            self.weight = cold.weight
        hot, scales = cold.read_stored(torch.zeros(0, dtype=torch.int64, device="cpu"))
        none = torch.zeros(0, dtype=torch.int64, device="cpu")
        self._copies = _Copies(none, hot, scales, None).to(torch.device(device or "cpu"))
        self.count_accesses = False
        """Whether look-ups are counted, for ``rebalance``."""
        self.counts = AccessCounts()

    @property
    def hot_ids(self) -> Tensor:
        """Row numbers of the hot rows, int64 ``[h]``, sorted."""
        return self._copies.ids

    @property
    def hot(self) -> Tensor:
        """Their values as they are stored, ``[h, width]``; none between ``promote`` and the next look-up."""
        return self._copies.hot

    @property
    def cold(self) -> HostTable | QuantisedTable:
        """The table that holds every row."""
        return self.__dict__["cold"]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        device = fn(torch.empty(0, device=self.hot.device)).device  # copies move; neither they nor the cold rows change type
        with _SWAPPING:
            self._copies = self._copies.to(device)
        if device.type == "cuda":  # page-locking takes a while: now, not at the first look-up
            self.cold.is_read_by(device)
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        """Into the cold table, whose parameter this is and which may refuse.

        Raises:
            TableError: as the cold table; or loaded tensors shall take the place of its own (``assign``).
        """
        refuse_assign(state_dict, prefix, local_metadata, "HybridTable", "the cold rows")
        self.cold._load_from_state_dict(state_dict, prefix, local_metadata, *args)
        self._forget_copies()

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """The cold table's, which may refuse.

        Raises:
            TableError: as the cold table.
        """
        self.cold._save_to_state_dict(destination, prefix, keep_vars)

    @property
    def format_name(self) -> str:
        """How rows are stored, by its name in ``FORMATS``."""
        return self.form.name

    @property
    def value_dtype(self) -> torch.dtype:
        """The cold table's."""
        return self.cold.value_dtype

    @property
    def can_be_trained(self) -> bool:
        """Whether the cold table can."""
        return self.cold.can_be_trained

    @property
    def nbytes(self) -> int:
        """Bytes of the rows, without the copies."""
        return self.cold.nbytes

    @property
    def tier(self) -> str:
        """``hybrid``."""
        return "hybrid"

    @property
    def location(self) -> str:
        """Where the rows are, for people."""
        return f"{self.cold.location}, {len(self.hot_ids):,} hot rows on {self.hot.device}"

    def lookup(self, row_ids: Tensor | RowHandle, dtype: torch.dtype | None = None) -> Tensor:
        """Rows ``[..., dim]`` on the device of ``row_ids``; gradients reach the cold table."""
        if isinstance(row_ids, RowHandle):
            fetched = row_ids.wait()
            return lookup_rows(self.weight, row_ids.row_ids, fetched=fetched) if self.weight.requires_grad else fetched
        if self.count_accesses:
            self.counts.add(row_ids)
        if torch.is_grad_enabled() and self.weight.requires_grad:
            self._forget_copies()  # a step may follow that changes rows in ways torch does not count
            return self.cold.lookup(row_ids, dtype)
        copies = self._fresh_copies()
        if len(copies.ids) == 0:
            return self.cold.lookup(row_ids, dtype)
        return self._read(copies, row_ids.reshape(-1), dtype or self.value_dtype).view(*row_ids.shape, self.dim)

    def _read(self, copies: _Copies, row_ids: Tensor, dtype: torch.dtype) -> Tensor:
        asked = row_ids.to(copies.ids.device)
        slots = torch.searchsorted(copies.ids, asked).clamp_max_(len(copies.ids) - 1)
        missed = (copies.ids[slots] != asked).nonzero()[:, 0]
        rows = self.form.read(copies.hot, copies.scales, slots, dtype)
        _note_reader(copies.ids, copies.hot, copies.scales)
        if len(missed):
            rows[missed] = self.cold.lookup(asked[missed], dtype)
        return rows.to(row_ids.device)

    @torch.no_grad()
    def _fresh_copies(self) -> _Copies:
        """The hot rows, copied again if any row of the cold table changed since."""
        copies, version = self._copies, self.weight._version
        if copies.version == version or len(copies.ids) == 0:
            return copies
        hot, scales = self.cold.read_stored(copies.ids.cpu())
        fresh = _Copies(copies.ids.cpu(), hot, scales, version).to(copies.ids.device)
        with _SWAPPING:
            if self._copies is copies:  # otherwise others became hot meanwhile, or old
                self._copies = fresh
        return fresh

    def _forget_copies(self) -> None:
        """Have hot rows copied anew at the next look-up."""
        with _SWAPPING:
            self._copies = self._copies._replace(version=None)

    def __getstate__(self) -> dict[str, Any]:
        """Copies fetch their hot rows anew: the versions of copied tensors count from zero.

        Raises:
            TableError: the cold rows are in a file, which is neither copied nor pickled.
        """
        self.cold.__getstate__()  # refuses before all rows are read
        return {**self.__dict__, "_copies": self._copies._replace(version=None)}

    def promote(self, row_ids: Tensor) -> None:
        """Make these rows the hot ones, in place of those before.

        Raises:
            TableError: they are more than ``hot_rows``, out of range, or do not fit into the device's memory.
        """
        rows = row_ids.reshape(-1).to("cpu", torch.int64).unique()
        if len(rows) > self.hot_rows:
            raise TableError(f"promote: got {len(rows):,} rows, expected at most hot_rows = {self.hot_rows:,}.")
        if len(rows) and (int(rows[0]) < 0 or int(rows[-1]) >= self.rows):
            raise TableError(f"promote: got rows {int(rows[0])}..{int(rows[-1])}, expected 0..{self.rows - 1}.")
        place = self.hot.device
        check_fits(len(rows) * self.form.row_bytes(self.dim), place, "hot rows")
        hot, scales = self.cold.read_stored(rows[:0])  # what is hot until now makes room; the next look-up copies
        with _SWAPPING:
            self._copies = _Copies(rows, hot, scales, None).to(place)

    def rebalance(self) -> int:
        """Make the rows hot that were asked for most since counting began; returns how many they are."""
        self.promote(self.counts.most_frequent(self.hot_rows))
        return len(self.hot_ids)

    def prefetch(
        self, row_ids: Tensor, dtype: torch.dtype | None = None, through: RowPrefetcher | None = None
    ) -> Tensor | RowHandle:
        """Start fetching rows, hot ones and others, where ``through`` thinks that it pays; without it, those of the cold table."""
        if through is None:
            return self.cold.prefetch(row_ids)
        if torch.is_grad_enabled() and self.weight.requires_grad:  # as in ``lookup``: no copies that the next step makes old
            self._forget_copies()
            fetched = self.cold.prefetch(row_ids, dtype, through)
            if self.count_accesses and isinstance(fetched, RowHandle):  # ``lookup`` counts numbers
                self.counts.add(row_ids)
            return fetched
        return through.start(self, row_ids, dtype or self.value_dtype) if through.pays(self, row_ids.device) else row_ids

    def update_rows(self, row_ids: Tensor, fn: Callable[[Tensor], Tensor]) -> None:
        """Replace rows in the cold table.

        Raises:
            TableError: as the cold table.
        """
        self.cold.update_rows(row_ids, fn)

    def load_rows(self, start: int, rows: Tensor) -> None:
        """Put rows ``[n, dim]`` into the cold table at ``start`` and after.

        Raises:
            TableError: as the cold table.
        """
        self.cold.load_rows(start, rows)

    def iter_row_blocks(self, block_rows: int = 1 << 16) -> Iterator[tuple[int, Tensor]]:
        """Blocks of the cold table."""
        return self.cold.iter_row_blocks(block_rows)


def _note_reader(*copies: Tensor | None) -> None:
    """Tell the allocator that this stream reads these: they may have been made on another, and be replaced while it does."""
    for copied in copies:
        if copied is not None and copied.device.type == "cuda":
            copied.record_stream(torch.cuda.current_stream(copied.device))
