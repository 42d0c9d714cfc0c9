"""All hash heads of one layer in one physical table."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from engram.config import TableConfig
from engram.native import RowIndex
from engram.tables import ABSENT, EmbeddingTable, RowHandle, RowPrefetcher, VerifiedTable, build_table

__all__ = ["MultiHeadEmbedding"]


class MultiHeadEmbedding(nn.Module):
    """Heads of different (prime) sizes stacked into one table; head ``h`` owns rows ``offsets[h] .. offsets[h] + size - 1``.

    Args:
        head_sizes: rows of each head, order-major.
        head_dim: values per row.
        table_config: where the table lives.
        init: ``zero`` or ``normal``.
        verified: whether rows answer to their owners only (``VerifiedTable``).
        layer_id: whose table this is.
        device: where a table of tier ``device`` is made.
    """

    offsets: Tensor

    def __init__(
        self,
        head_sizes: list[int],
        head_dim: int,
        table_config: TableConfig | None = None,
        init: str = "zero",
        verified: bool = False,
        layer_id: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        ends = torch.tensor(head_sizes, dtype=torch.int64).cumsum(0)
        self.register_buffer("offsets", torch.cat([ends.new_zeros(1), ends[:-1]]))
        self.embedding: EmbeddingTable = build_table(int(ends[-1]), head_dim, table_config, init, device, verified, layer_id)
        self._used: tuple[object, int, Tensor] | None = None
        self._index: tuple[object, int, RowIndex] | None = None

    def row_ids(self, hash_ids: Tensor) -> Tensor:
        """Physical row numbers of head indices ``[..., heads]``."""
        return hash_ids + self.offsets

    def forward(self, hash_ids: Tensor, dtype: torch.dtype | None = None, fetched: RowHandle | None = None) -> Tensor:
        """Concatenated rows ``[B, T, heads * head_dim]`` of head indices ``[B, T, heads]``, in ``dtype`` (None: the table's own).

        What ``prefetch`` gave for these indices spares the look-up.
        """
        rows: Any = self.row_ids(hash_ids) if fetched is None else fetched
        return self.embedding.lookup(rows, dtype).flatten(-2)

    def prefetch(self, hash_ids: Tensor, dtype: torch.dtype, through: RowPrefetcher) -> RowHandle | None:
        """Start fetching the rows of head indices ``[B, T, heads]`` of any device to this module's; None where that does not pay."""
        if not through.pays(self.embedding, self.offsets.device):
            return None
        handle = self.embedding.prefetch(self.row_ids(hash_ids.to(self.offsets.device)), dtype, through)
        return handle if isinstance(handle, RowHandle) else None

    def find(self, hash_ids: Tensor, tags: Tensor) -> Tensor:
        """Slots ``[B, T, heads]`` of the verified rows that belong to these n-grams, ``ABSENT`` elsewhere.

        Heads in which nothing is written are not searched.
        """
        table: VerifiedTable = self.embedding  # type: ignore[assignment]
        used = self._used_heads(table)
        slots = torch.full_like(hash_ids, ABSENT)
        if used.numel():
            slots[..., used] = table.find(hash_ids[..., used] + self.offsets[used], tags[..., used])
        return slots

    def gather(self, slots: Tensor) -> Tensor:
        """Concatenated rows ``[..., heads * head_dim]`` of slots ``[..., heads]``."""
        table = self.embedding
        if slots.device.type != "cpu" and type(table) is VerifiedTable and table.stored_rows:
            return table.gather_without_waiting(slots).flatten(-2)
        return self.embedding.gather(slots).flatten(-2)  # type: ignore[operator]

    def row_index(self, heads_per_order: int) -> RowIndex | None:
        """The written rows as the native search wants them, made once per change of the table; None where it cannot serve (a draft,
        rows on another device).
        """
        table = self.embedding
        if not isinstance(table, VerifiedTable) or table.row_ids.device.type != "cpu":
            return None
        if self._index is None or self._index[0] is not table or self._index[1] != table.version:
            orders = torch.zeros(len(self.offsets) // heads_per_order, dtype=torch.bool, device="cpu")
            orders[self._used_heads(table).cpu() // heads_per_order] = True
            self._index = (table, table.version, RowIndex(table.row_ids, table.tags, orders))
        return self._index[2]

    def _used_heads(self, table: VerifiedTable) -> Tensor:
        """Heads with at least one written row; found once per change of the table."""
        if not isinstance(table, VerifiedTable):  # a draft lives too briefly to be worth it
            return torch.arange(len(self.offsets), device=self.offsets.device)
        stale = self._used is None or self._used[0] is not table or self._used[1] != table.version
        if stale or self._used[2].device != self.offsets.device:  # type: ignore[index]
            heads = torch.searchsorted(self.offsets, table.row_ids.to(self.offsets.device), right=True) - 1
            self._used = (table, table.version, heads.unique())
        return self._used[2]  # type: ignore[index]
