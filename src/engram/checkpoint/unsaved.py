"""Rows of a placed memory that were trained or edited in their files and not saved: what reads the save alone would leave them behind."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from engram.checkpoint.stream import TensorReader
from engram.errors import CheckpointError
from engram.tables import (
    MappedRows,
    MmapTable,
    QuantisedMmapTable,
    RowFormat,
    is_being_filled,
    is_untouched,
    row_file,
    row_file_layout,
    row_format,
    row_stamp,
    rows_are,
)

if TYPE_CHECKING:
    from engram.checkpoint.convert import StoredTable

__all__ = ["bits_equal", "holds_the_same", "placed_folder", "refuse_unsaved_rows"]

_ROWS_AT_ONCE = 1 << 16


def placed_folder(source: str | os.PathLike[str], description: Mapping[str, Any]) -> Path | None:
    """The folder of a saved memory's row files (``engram place --path``); a relative one is meant from the memory's own. None without."""
    path = (description.get("placement") or {}).get("path")
    if path is None:
        return None
    return Path(path if os.path.isabs(path) else os.path.normpath(os.path.join(os.path.realpath(source), path)))


def refuse_unsaved_rows(
    source: str | os.PathLike[str], description: Mapping[str, Any], tables: Sequence[StoredTable], tensors: TensorReader
) -> None:
    """
    Raises:
        CheckpointError: a row file holds other rows than the save.
    """
    folder = placed_folder(source, description)
    if folder is None:
        return
    for table in tables:
        file = row_file(folder, table.layer_id)
        stamp = row_stamp(tensors.file.name, table.layer_id, table.form.name)
        if not file.is_file() or rows_are(file, stamp) or is_untouched(file) or is_being_filled(file):
            continue
        # A copy has other times than those that were noted.
        if not (_has_the_size(file, table) and holds_the_same(_mapped(file, table), table.prefix, tensors, table.form)):
            raise CheckpointError(
                f"{file} holds other rows than the save in {os.fspath(source)}, which would be read: they were trained or edited and not "
                "saved. Save them first (in Python, load the memory with TableConfig(..., changed_rows='keep') and call save_pretrained); or, "
                "if nobody needs them, delete that file: it is made anew from the saved rows."
            )


def _has_the_size(file: Path, table: StoredTable) -> bool:
    return file.stat().st_size == row_file_layout(table.rows, table.dim, table.form)[1]


def _mapped(file: Path, table: StoredTable) -> MappedRows:
    """A row file, to be read alone."""
    if table.form.quantised:
        return QuantisedMmapTable(table.rows, table.dim, table.form.name, file)
    return MmapTable(table.rows, table.dim, file, dtype=table.form.dtype)


def holds_the_same(cold: MappedRows, prefix: str, tensors: TensorReader, form: RowFormat) -> bool:
    """Whether saved rows are those that are mapped already: a checkpoint holds a copy of frozen ones. ``prefix``: of their names."""
    names = [f"{prefix}{name}" for name in ("weight", "scales")]
    names = [name for name in names if name in tensors.specs]
    stop = 0
    for block in cold.stored_blocks(_ROWS_AT_ONCE):
        start, stop = stop, stop + len(block[0])
        saved = _in_format(cold.format_name, form, *(tensors.read(name, start, stop) for name in names))
        if len(saved) != len(block) or not all(
            a.dtype == b.dtype and a.shape == b.shape and bits_equal(a, b) for a, b in zip(saved, block)
        ):
            return False
    return True


def _in_format(wanted: str, form: RowFormat, values: Tensor, scales: Tensor | None = None) -> tuple[Tensor, ...]:
    """Stored rows as a table of the format ``wanted`` stores them."""
    if wanted == form.name:
        return (values,) if scales is None else (values, scales)
    values, scales = row_format(wanted).encode(form.decode(values, scales))
    return (values,) if scales is None else (values, scales)


def bits_equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one type and shape are the same to the bit; a NaN equals itself then."""
    return torch.equal(*(x.contiguous().view(-1).view(torch.uint8) for x in (a, b)))
