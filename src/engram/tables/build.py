"""The only switch between tiers."""

from __future__ import annotations

import torch

from engram.config import TableConfig
from engram.tables.base import EmbeddingTable
from engram.tables.device import DeviceTable
from engram.tables.verified import VerifiedTable

__all__ = ["build_table"]


def build_table(
    rows: int,
    dim: int,
    config: TableConfig | None = None,
    init: str = "zero",
    device: torch.device | str | None = None,
    verified: bool = False,
) -> EmbeddingTable:
    """Make an empty table of ``rows`` x ``dim`` where ``config`` says it should live; ``verified`` rows answer to their owners only."""
    config = config or TableConfig()
    dtype = getattr(torch, config.dtype)
    if verified:
        return VerifiedTable(rows, dim, dtype=dtype, device=device)
    return DeviceTable(rows, dim, init=init, dtype=dtype, device=device)
