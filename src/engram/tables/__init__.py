"""Floor 2: where rows live."""

from engram.tables.base import EmbeddingTable
from engram.tables.build import build_table
from engram.tables.device import DeviceTable

__all__ = ["DeviceTable", "EmbeddingTable", "build_table"]
