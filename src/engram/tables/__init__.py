"""Floor 2: where rows live."""

from engram.tables.base import EmbeddingTable
from engram.tables.build import build_table
from engram.tables.device import DeviceTable
from engram.tables.overlay import OverlayTable

__all__ = ["DeviceTable", "EmbeddingTable", "OverlayTable", "build_table"]
