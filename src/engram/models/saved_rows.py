"""Rows of a memory between its tables and its saved file: from any format into any place, and out of those that are not one tensor here."""

from __future__ import annotations

import os
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from engram.checkpoint import TensorReader
from engram.checkpoint.unsaved import holds_the_same
from engram.errors import CheckpointError
from engram.tables import (
    HybridTable,
    MappedRows,
    QuantisedTable,
    RowFormat,
    ShardedTable,
    StoredRows,
    VerifiedTable,
    is_being_filled,
    row_format,
    row_stamp,
    rows_are,
    stamp_rows,
)

if TYPE_CHECKING:
    from engram.models.engram_model import EngramModel

__all__ = [
    "PLACEMENT",
    "TABLE",
    "cold_table",
    "fill_tables",
    "fill_verified_tables",
    "gathered_tables",
    "promote_rows",
    "table_shapes",
]

TABLE = "multi_head_embedding.embedding."
"""What the names of a table's tensors begin with, after the layer's."""
PLACEMENT = "placement."
"""Tensors that say where rows shall live, not what they are; they may be missing."""
_ROWS_AT_ONCE = 1 << 16


def gathered_tables(memory: EngramModel) -> dict[str, MappedRows | ShardedTable]:
    """Tables that are not one tensor in this process's memory, by what the names of their tensors begin with."""
    return {
        f"layers.{layer_id}.{TABLE}": cold
        for layer_id, engram in memory.engrams.items()
        if isinstance(cold := cold_table(engram.table), MappedRows | ShardedTable)
    }


def table_shapes(memory: EngramModel, saved_dtype: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the saved tables' tensors; the first dimension is -1 where any number of rows may be."""
    shapes: dict[str, tuple[int, ...]] = {}
    form = row_format(saved_dtype)
    for layer_id, engram in memory.engrams.items():
        table, prefix = engram.table, f"layers.{layer_id}.{TABLE}"
        if memory.engram_config.verify_rows:
            shapes |= {f"{prefix}row_ids": (-1,), f"{prefix}tags": (-1,)}
        rows = -1 if memory.engram_config.verify_rows else table.rows
        shapes[f"{prefix}weight"] = (rows, form.width(table.dim))
        if form.quantised:
            shapes[f"{prefix}scales"] = form.scale_shape(rows, table.dim)
    return shapes


def fill_tables(memory: EngramModel, tensors: TensorReader, saved_dtype: str, changed_rows: str) -> None:
    """Rows of every layer, block by block, turned from the saved format into the table's.

    Those mapped where they lie are left, and row files that hold the rows of this very file, unchanged.

    Raises:
        CheckpointError: a row file holds other rows, and nobody said what to do with them (``TableConfig.changed_rows``); no row was changed.
    """
    form = row_format(saved_dtype)
    tables = {layer_id: engram.table for layer_id, engram in memory.engrams.items()}
    stamps = {layer_id: row_stamp(tensors.file.name, layer_id, table.format_name) for layer_id, table in tables.items()}
    # All are looked at before the first is changed.
    empty = {
        layer_id: table
        for layer_id, table in tables.items()
        if not _is_filled(table, layer_id, stamps[layer_id], tensors, form, changed_rows)
    }
    for layer_id, table in empty.items():
        cold = cold_table(table)
        with cold.filled_with(stamps[layer_id]) if isinstance(cold, MappedRows) else nullcontext():
            _fill_table(table, layer_id, tensors, form)


def _fill_table(table: Any, layer_id: str, tensors: TensorReader, form: RowFormat) -> None:
    prefix, cold = f"layers.{layer_id}.{TABLE}", cold_table(table)
    for start in range(0, table.rows, _ROWS_AT_ONCE):
        stop = start + _ROWS_AT_ONCE
        block = tensors.read(f"{prefix}weight", start, stop)
        scales = tensors.read(f"{prefix}scales", start, stop) if form.quantised else None
        if scales is None:
            table.load_rows(start, block)
        elif isinstance(cold, QuantisedTable) and cold.form == form:
            cold.load_stored(start, block, scales)
        else:
            table.load_rows(start, form.decode(block, scales))


def cold_table(table: Any) -> Any:
    """The table that holds every row: of a hybrid the one in it, else itself."""
    return table.cold if isinstance(table, HybridTable) else table


def _is_filled(table: Any, layer_id: str, stamp: str, tensors: TensorReader, form: RowFormat, changed_rows: str) -> bool:
    """Whether a table's rows are to stay as they are."""
    cold, source = cold_table(table), tensors.file
    if not isinstance(cold, MappedRows):
        return False
    cold.flush()  # what was changed here shows in the file's times from then on
    if rows_are(cold.path, stamp):
        cold.check_unchanged()  # others may have saved between the description that it was opened by and the one that is read now
        return True
    if cold.mode == "r":
        if cold.path.resolve() != source.resolve() and not holds_the_same(cold, f"layers.{layer_id}.{TABLE}", tensors, form):
            raise CheckpointError(
                f"the rows are mapped where they lie in {cold.path}, and {source} holds others. Load that memory anew (from_pretrained), or "
                "give the rows files of their own: TableConfig(tier='mmap', path=...)."
            )
        return True
    if cold.is_new or changed_rows == "refill" or is_being_filled(cold.path):
        return False
    if changed_rows == "keep":
        return True
    if holds_the_same(
        cold, f"layers.{layer_id}.{TABLE}", tensors, form
    ):  # a copy, whose times are others; or the note was not written
        stamp_rows(cold.path, stamp)
        return True
    raise CheckpointError(
        f"{cold.path} holds other rows than {source}: they were trained or edited and not saved, or are another memory's. If nobody needs "
        "them, delete that file: it is made anew from the saved rows. Or choose another path; in Python, TableConfig(changed_rows='keep') "
        "goes on with them, and 'refill' writes the saved rows over them."
    )


def promote_rows(memory: EngramModel, tensors: Any) -> None:
    """Hot rows that were chosen when the memory was placed."""
    for layer_id, engram in memory.engrams.items():
        table, name = engram.table, f"{PLACEMENT}{layer_id}.hot_ids"
        if isinstance(table, HybridTable) and name in tensors.keys():  # noqa: SIM118
            table.promote(tensors.get_tensor(name)[: table.hot_rows])  # the most frequent come first


def fill_verified_tables(memory: EngramModel, tensors: Any, saved_dtype: str, path: str | os.PathLike[str]) -> None:
    """Exchange the rows of every layer; all are checked before the first is changed."""
    form, new = row_format(saved_dtype), []
    for layer_id, engram in memory.engrams.items():
        table: VerifiedTable = engram.table
        names = ("row_ids", "tags", "weight", *(("scales",) if form.quantised else ()))
        saved = [tensors.get_tensor(f"layers.{layer_id}.{TABLE}{name}") for name in names]
        row_ids, tags, count = saved[0], saved[1], saved[0].shape[0]
        in_range = count == 0 or (
            int(row_ids[0]) >= 0 and int(row_ids[-1]) < table.rows and bool((row_ids[1:] > row_ids[:-1]).all())
        )
        if not in_range or any(x.shape[0] != count for x in saved) or (count and int(tags.min()) < 1):
            raise CheckpointError(
                f"{path}: the rows of layer {layer_id} are out of order or out of range. Copy the file again."
            )
        new.append((table, StoredRows(form, *saved).to(table.row_ids.device)))
    for table, rows in new:
        table.stored = rows
