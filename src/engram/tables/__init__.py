"""Floor 2: where rows live."""

from engram.tables.base import EmbeddingTable
from engram.tables.build import build_table
from engram.tables.device import DeviceTable
from engram.tables.formats import FORMATS, RowFormat, row_format
from engram.tables.host import HostTable, MmapTable
from engram.tables.prefetch import RowHandle, RowPrefetcher
from engram.tables.quantised import QuantisedTable
from engram.tables.stored import StoredRows
from engram.tables.verified import ABSENT, DraftTable, VerifiedTable

__all__ = [
    "ABSENT",
    "FORMATS",
    "DeviceTable",
    "DraftTable",
    "EmbeddingTable",
    "HostTable",
    "MmapTable",
    "QuantisedTable",
    "RowFormat",
    "RowHandle",
    "RowPrefetcher",
    "StoredRows",
    "VerifiedTable",
    "build_table",
    "row_format",
]
