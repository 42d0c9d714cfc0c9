"""The only switch between tiers."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import torch

from engram.config import TableConfig
from engram.distributed import process_count, rows_of_each
from engram.errors import ConfigError, TableError
from engram.tables.base import EmbeddingTable
from engram.tables.device import DeviceTable
from engram.tables.formats import RowFormat, row_format
from engram.tables.host import HostTable
from engram.tables.hybrid import HybridTable
from engram.tables.mapped import MappedRows, MmapTable, QuantisedMmapTable
from engram.tables.memory import check_fits
from engram.tables.quantised import QuantisedTable
from engram.tables.rownotes import check_form, is_untouched, note_form, rows_are
from engram.tables.sharded import ShardedTable
from engram.tables.verified import VerifiedTable

__all__ = ["build_table", "check_room", "refuse_other_rows", "row_file"]

_ROWS_AT_ONCE = 1 << 18


def build_table(
    rows: int,
    dim: int,
    config: TableConfig | None = None,
    init: str = "zero",
    device: torch.device | str | None = None,
    verified: bool = False,
    layer_id: int = 0,
) -> EmbeddingTable:
    """Make a table of ``rows`` x ``dim`` where ``config`` says it should live; ``verified`` rows answer to their owners only.

    Raises:
        ConfigError: the tier cannot hold such a table.
        TableError: there is not enough memory or disk, or a file does not fit.
    """
    with torch.inference_mode(False):  # tables outlive it, and their tensors must count changes
        return _build(rows, dim, config or TableConfig(), init, device, verified, layer_id)


def _build(
    rows: int,
    dim: int,
    config: TableConfig,
    init: str,
    device: torch.device | str | None,
    verified: bool,
    layer_id: int,
) -> EmbeddingTable:
    if verified:
        return _verified(rows, dim, config, device)
    if _is_sharded(config):
        return _sharded(rows, dim, config, init, device)
    table: DeviceTable | QuantisedTable
    if config.tier == "mmap" or (config.tier == "hybrid" and config.path is not None):
        table = _mapped(rows, dim, config, init, layer_id)
    else:
        table = _in_memory(rows, dim, config, device)
        if init == "normal":
            _fill_randomly(table)
    if config.hot_rows is None:
        return table
    assert isinstance(table, HostTable | QuantisedTable)
    return HybridTable(table, config.hot_rows, device)


def _in_memory(rows: int, dim: int, config: TableConfig, device: torch.device | str | None) -> DeviceTable | QuantisedTable:
    form, host = row_format(config.dtype), config.tier != "device"
    if form.quantised:
        return QuantisedTable(rows, dim, form.name, device, host=host)
    return HostTable(rows, dim, dtype=form.dtype) if host else DeviceTable(rows, dim, dtype=form.dtype, device=device)


def _is_sharded(config: TableConfig) -> bool:
    """Whether there are processes to divide tables between.

    Raises:
        ConfigError: there will be, but they are not set up yet.
    """
    if config.sharded and process_count() == 1 and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            f"TableConfig.sharded: this is one of {os.environ['WORLD_SIZE']} processes that are not set up yet, expected them to be before "
            "tables are made: make the training arguments first, or call torch.distributed.init_process_group()."
        )
    return config.sharded and process_count() > 1


def _sharded(rows: int, dim: int, config: TableConfig, init: str, device: torch.device | str | None) -> ShardedTable:
    part = _in_memory(rows_of_each(rows, process_count()), dim, config, device)
    assert isinstance(part, DeviceTable)
    table = ShardedTable(part, rows)
    if init == "normal":
        for start in range(0, rows, _ROWS_AT_ONCE):  # all draw the whole table, as one process would, and keep their own
            table.load_rows(start, torch.randn((min(_ROWS_AT_ONCE, rows - start), dim)))
    return table


def _fill_randomly(table: DeviceTable | QuantisedTable) -> None:
    """Rows as N(0, 1)."""
    if not isinstance(table, QuantisedTable | MappedRows):
        torch.nn.init.normal_(table.weight)
        return
    for start in range(0, table.rows, _ROWS_AT_ONCE):
        table.load_rows(start, torch.randn(min(_ROWS_AT_ONCE, table.rows - start), table.dim))


def _verified(rows: int, dim: int, config: TableConfig, device: torch.device | str | None) -> VerifiedTable:
    if config.tier != "device" or config.sharded:
        raise ConfigError(
            f"verified rows: got tier {config.tier!r}{', sharded' * config.sharded}, expected 'device' and whole: only written rows are "
            "stored, so they are small."
        )
    return VerifiedTable(rows, dim, config.dtype, device)


def check_room(
    rows: Iterable[int], dim: int, config: TableConfig, verified: bool = False, device: torch.device | str = "cpu"
) -> None:
    """Refuse tables that would not fit together, before the first of them is made (rows off the device are taken when first written, so
    that each alone would seem to fit).

    Args:
        rows: of each table.
        dim: values per row.
        config: where they shall live.
        verified: whether only written rows are stored, which always fit.
        device: where tables of tier ``device`` shall be; those of the others are in host memory.

    Raises:
        TableError: there is less memory than they need.
    """
    if not verified and config.tier != "mmap" and config.path is None:
        place = torch.device(device if config.tier == "device" else "cpu")
        parts = process_count() if config.sharded else 1
        here = _processes_here() if place.type == "cpu" else 1
        size = here * sum(rows_of_each(n, parts) for n in rows) * row_format(config.dtype).row_bytes(dim)
        check_fits(size, place, f"tier={config.tier!r}" + (f" in {here} processes" if here > 1 else ""))


def _processes_here() -> int:
    """How many processes of this run share this machine's memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if process_count() > 1 else 1


def row_file(folder: str | os.PathLike[str], layer_id: int) -> Path:
    """The file of a layer's rows in ``TableConfig.path``."""
    return Path(folder) / f"layer-{layer_id}.rows"


def refuse_other_rows(file: Path) -> None:
    """Refuse a row file that is there already for the rows of a new memory: it would start with what that holds, and write over it.

    Raises:
        TableError: it is there.
    """
    if file.exists() and not is_untouched(file):
        raise TableError(
            f"{file} exists: it holds the rows of another memory, or of an earlier run. Choose another path, load that memory "
            "(from_pretrained), or go on with its rows by TableConfig(changed_rows='keep'): so a run is resumed from a checkpoint."
        )


def _mapped(rows: int, dim: int, config: TableConfig, init: str, layer_id: int) -> MmapTable | QuantisedMmapTable:
    form, bound = row_format(config.dtype), config.resident_bytes
    if config.path is not None:
        file = row_file(config.path, layer_id)
        check_form(file, form.name, rows, dim)
        table = _in_row_file(rows, dim, form, file, bound, (config.stamps or {}).get(layer_id))
        if table.is_new:
            note_form(file, form.name, rows, dim)
            if init == "normal" and config.stamps is None:  # saved rows are put in otherwise, and it is empty until then
                _fill_randomly(table)
        return table
    if config.files is None:
        raise ConfigError("TableConfig: got tier 'mmap' without a path, expected a folder for the row files of a new memory.")
    saved, places = config.files[layer_id]
    return _open(rows, dim, form, saved, "r", bound, places)


def _open(
    rows: int,
    dim: int,
    form: RowFormat,
    file: str | os.PathLike[str],
    mode: Literal["r", "r+"],
    bound: int | None,
    places: Sequence[int] | None = None,
    unchanged: str | None = None,
) -> MmapTable | QuantisedMmapTable:
    if form.quantised:
        return QuantisedMmapTable(rows, dim, form.name, file, mode, places, bound, unchanged)
    return MmapTable(rows, dim, file, mode, places[0] if places else 0, form.dtype, bound, unchanged)


def _in_row_file(
    rows: int, dim: int, form: RowFormat, file: Path, bound: int | None, stamp: str | None
) -> MmapTable | QuantisedMmapTable:
    """A table whose rows can be written; if the file cannot (another process has it, or may write there alone) but is noted to hold the
    very rows that are wanted, one that reads them for as long as nobody changes them.
    """
    try:
        return _open(rows, dim, form, file, "r+", bound)
    except TableError as error:
        if stamp is None or not rows_are(file, stamp):
            raise
        table = _open(rows, dim, form, file, "r", bound, unchanged=stamp)
        table.read_only_because = str(error)
        return table
