"""All hash heads of one layer in one physical table."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from engram.config import TableConfig
from engram.tables import EmbeddingTable, build_table

__all__ = ["MultiHeadEmbedding"]


class MultiHeadEmbedding(nn.Module):
    """Heads of different (prime) sizes stacked into one table; head ``h`` owns rows ``offsets[h] .. offsets[h] + size - 1``.

    Args:
        head_sizes: rows of each head, order-major.
        head_dim: values per row.
        table_config: where the table lives.
        init: ``zero`` or ``normal``.
    """

    offsets: Tensor

    def __init__(
        self, head_sizes: list[int], head_dim: int, table_config: TableConfig | None = None, init: str = "zero"
    ) -> None:
        super().__init__()
        ends = torch.tensor(head_sizes, dtype=torch.int64).cumsum(0)
        self.register_buffer("offsets", torch.cat([ends.new_zeros(1), ends[:-1]]))
        self.embedding: EmbeddingTable = build_table(int(ends[-1]), head_dim, table_config, init)

    def row_ids(self, hash_ids: Tensor) -> Tensor:
        """Physical row numbers of head indices ``[..., heads]``."""
        return hash_ids + self.offsets

    def forward(self, hash_ids: Tensor) -> Tensor:
        """Concatenated rows ``[B, T, heads * head_dim]`` of head indices ``[B, T, heads]``."""
        return self.embedding.lookup(self.row_ids(hash_ids)).flatten(-2)
