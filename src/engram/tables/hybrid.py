"""Rows in use on the model's device, all rows in host memory or a file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Self

import torch
from torch import Tensor

from engram.errors import TableError
from engram.ops import lookup_rows
from engram.tables.base import EmbeddingTable
from engram.tables.counts import AccessCounts
from engram.tables.formats import row_format
from engram.tables.host import HostTable
from engram.tables.memory import check_fits
from engram.tables.prefetch import RowHandle, RowPrefetcher
from engram.tables.quantised import QuantisedTable

__all__ = ["HybridTable"]


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

    hot_ids: Tensor
    """Row numbers of the hot rows, int64 ``[h]``, sorted."""
    hot: Tensor
    """Their values as they are stored, ``[h, width]``."""
    hot_scales: Tensor | None
    """Their scales, if the format has them."""

    def __init__(self, cold: HostTable | QuantisedTable, hot_rows: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        if hot_rows < 1:
            raise TableError(f"hot_rows: got {hot_rows}, expected at least 1; use the cold table alone for none.")
        self.rows, self.dim, self.hot_rows = cold.rows, cold.dim, hot_rows
        self.__dict__["cold"] = (
            cold  # not a submodule: its parameter is registered here, under the name that other tables save it
        )
        self.form = row_format(cold.format_name)
        if isinstance(cold, QuantisedTable):
            self.register_buffer("weight", cold.weight)
            self.register_buffer("scales", cold.scales)
        else:
            self.weight = cold.weight
        self.register_buffer("hot_ids", torch.zeros(0, dtype=torch.int64, device=device), persistent=False)
        hot, scales = cold.read_stored(torch.zeros(0, dtype=torch.int64, device="cpu"))
        self.register_buffer("hot", hot.to(device), persistent=False)
        self.register_buffer("hot_scales", None if scales is None else scales.to(device), persistent=False)
        self.count_accesses = False
        """Whether look-ups are counted, for ``rebalance``."""
        self.counts = AccessCounts()
        self._copied: int | None = None

    @property
    def cold(self) -> HostTable | QuantisedTable:
        """The table that holds every row."""
        return self.__dict__["cold"]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        device = fn(torch.empty(0, device=self.hot.device)).device  # copies move; neither they nor the cold rows change type
        self.hot_ids, self.hot = self.hot_ids.to(device), self.hot.to(device)
        self.hot_scales = None if self.hot_scales is None else self.hot_scales.to(device)
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        """Into the cold table, whose parameter this is and which may refuse.

        Raises:
            TableError: as the cold table; or loaded tensors shall take the place of its own (``assign``).
        """
        if local_metadata.get("assign_to_params_buffers") and any(name.startswith(prefix) for name in state_dict):
            raise TableError(
                "HybridTable: got load_state_dict(assign=True), which would leave the cold rows; load without assign."
            )
        self.cold._load_from_state_dict(state_dict, prefix, local_metadata, *args)
        self._copied = None

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
            self._copied = None  # a step may follow that changes rows in ways torch does not count
            return self.cold.lookup(row_ids, dtype)
        if len(self.hot_ids) == 0:
            return self.cold.lookup(row_ids, dtype)
        self._refresh()
        return self._read(row_ids.reshape(-1), dtype or self.value_dtype).view(*row_ids.shape, self.dim)

    def _read(self, row_ids: Tensor, dtype: torch.dtype) -> Tensor:
        asked = row_ids.to(self.hot_ids.device)
        slots = torch.searchsorted(self.hot_ids, asked).clamp_max_(len(self.hot_ids) - 1)
        missed = (self.hot_ids[slots] != asked).nonzero()[:, 0]
        hot, scales = self.hot, self.hot_scales  # which a thread that prefetches may replace at any time
        rows = self.form.read(hot, scales, slots, dtype)
        _note_reader(hot, scales)
        if len(missed):
            rows[missed] = self.cold.lookup(asked[missed], dtype)
        return rows.to(row_ids.device)

    @torch.no_grad()
    def _refresh(self) -> None:
        """Copy the hot rows again if any row of the cold table changed since."""
        version = self.weight._version
        if self._copied != version:
            hot, scales = self.cold.read_stored(self.hot_ids.cpu())
            self.hot = hot.to(self.hot.device)
            self.hot_scales = None if scales is None else scales.to(self.hot.device)
            self._copied = version

    def __getstate__(self) -> dict[str, Any]:
        """Copies fetch their hot rows anew: the versions of copied tensors count from zero."""
        return {**self.__dict__, "_copied": None}

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
        check_fits(len(rows) * self.form.row_bytes(self.dim), self.hot.device, "hot rows")
        self.hot_ids, self._copied = rows.to(self.hot.device), None

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
            self._copied = None
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
