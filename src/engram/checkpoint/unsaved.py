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
from engram.tables import is_being_filled, is_untouched, row_file, row_file_layout, row_stamp, rows_are

if TYPE_CHECKING:
    from engram.checkpoint.convert import StoredTable

__all__ = ["placed_folder", "refuse_unsaved_rows"]


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
        if not _holds_the_same(file, table, tensors):  # a copy has other times than those that were noted
            raise CheckpointError(
                f"{file} holds other rows than the save in {os.fspath(source)}, which would be read: they were trained or edited and not "
                "saved. Save them first (in Python, load the memory with TableConfig(..., changed_rows='keep') and call save_pretrained); or, "
                "if nobody needs them, delete that file: it is made anew from the saved rows."
            )


def _holds_the_same(file: Path, table: StoredTable, tensors: TensorReader) -> bool:
    places, size = row_file_layout(table.rows, table.dim, table.form)
    if file.stat().st_size != size:
        return False
    with open(file, "rb") as there:
        for start, values, scales in table.blocks(tensors):
            for place, part in zip(places, (values,) if scales is None else (values, scales)):
                saved = _bytes(part)
                there.seek(place + start * (len(saved) // len(part)))
                if there.read(len(saved)) != saved.numpy().tobytes():
                    return False
    return True


def _bytes(part: Tensor) -> Tensor:
    return part.contiguous().view(-1).view(torch.uint8)
