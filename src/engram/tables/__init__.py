"""Floor 2: where rows live."""

from engram.tables.base import EmbeddingTable, announce_step, row_parameters
from engram.tables.build import build_table, check_room, refuse_other_rows, row_file
from engram.tables.counts import AccessCounts
from engram.tables.device import DeviceTable
from engram.tables.formats import FORMATS, RowFormat, row_format
from engram.tables.host import HostTable
from engram.tables.hybrid import HybridTable
from engram.tables.mapped import MappedRows, MmapTable, QuantisedMmapTable, row_file_layout
from engram.tables.measure import rows_per_second
from engram.tables.memory import available_memory, check_fits
from engram.tables.prefetch import RowHandle, RowPrefetcher
from engram.tables.quantised import QuantisedTable
from engram.tables.replicas import Replicas, are_equal_but_tables, copy_all_but_tables, replicate_tables
from engram.tables.rowfile import new_row_file
from engram.tables.rownotes import (
    is_being_filled,
    is_untouched,
    left_by_placing,
    note_form,
    remove_row_file,
    row_stamp,
    rows_are,
    stamp_rows,
)
from engram.tables.sharded import ShardedTable, is_in_parts, is_sharded
from engram.tables.stored import StoredRows
from engram.tables.verified import ABSENT, DraftTable, VerifiedTable

__all__ = [
    "ABSENT",
    "FORMATS",
    "AccessCounts",
    "DeviceTable",
    "DraftTable",
    "EmbeddingTable",
    "HostTable",
    "HybridTable",
    "MappedRows",
    "MmapTable",
    "QuantisedMmapTable",
    "QuantisedTable",
    "Replicas",
    "RowFormat",
    "RowHandle",
    "RowPrefetcher",
    "ShardedTable",
    "StoredRows",
    "VerifiedTable",
    "announce_step",
    "are_equal_but_tables",
    "available_memory",
    "build_table",
    "check_fits",
    "check_room",
    "copy_all_but_tables",
    "is_being_filled",
    "is_in_parts",
    "is_sharded",
    "is_untouched",
    "left_by_placing",
    "new_row_file",
    "note_form",
    "refuse_other_rows",
    "remove_row_file",
    "replicate_tables",
    "row_file",
    "row_file_layout",
    "row_format",
    "row_parameters",
    "row_stamp",
    "rows_are",
    "rows_per_second",
    "stamp_rows",
]
