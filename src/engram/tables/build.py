"""The only switch between tiers."""

from __future__ import annotations

import torch

from engram.config import TableConfig
from engram.tables.base import EmbeddingTable
from engram.tables.device import DeviceTable

__all__ = ["build_table"]


def build_table(
    rows: int, dim: int, config: TableConfig | None = None, init: str = "zero", device: torch.device | str | None = None
) -> EmbeddingTable:
    """Make an empty table of ``rows`` x ``dim`` where ``config`` says it should live."""
    config = config or TableConfig()
    return DeviceTable(rows, dim, init=init, dtype=getattr(torch, config.dtype), device=device)
