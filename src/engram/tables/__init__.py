"""Floor 2: where rows live."""

from engram.tables.base import EmbeddingTable
from engram.tables.build import build_table
from engram.tables.device import DeviceTable
from engram.tables.verified import ABSENT, DraftTable, VerifiedTable

__all__ = ["ABSENT", "DeviceTable", "DraftTable", "EmbeddingTable", "VerifiedTable", "build_table"]
