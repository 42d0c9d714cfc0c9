"""Where a saved memory's rows are, what other places would cost, and the way there. Works on the folder; no base model is loaded."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from engram.checkpoint import (
    DESCRIPTION_NAME,
    ConversionReport,
    TensorReader,
    again_if_saved,
    convert_memory,
    lock_store,
    read_description,
    read_tensors,
    tensor_offsets,
)
from engram.checkpoint.convert import StoredTable, check_target, stored_tables
from engram.config import EngramConfig, TableConfig
from engram.errors import CheckpointError, ConfigError, FingerprintError, TableError, refuse_one_text
from engram.hashing import build_mapping
from engram.models.files import PLACED_FIELDS
from engram.tables import (
    FORMATS,
    AccessCounts,
    available_memory,
    left_by_placing,
    new_row_file,
    note_form,
    remove_row_file,
    row_file,
    row_file_layout,
    row_format,
    row_stamp,
    rows_per_second,
    stamp_rows,
)

__all__ = [
    "LayerPlace",
    "PlacementCost",
    "check_fit",
    "count_rows_read",
    "layer_places",
    "place_memory",
    "placement_costs",
    "windows_of",
]

_TIERS: tuple[Literal["device", "host", "mmap", "hybrid"], ...] = ("device", "host", "mmap", "hybrid")
_HOT_SHARE = 20
"""One row in so many is taken to be hot where nobody says how many."""
_WINDOW = 4096


@dataclass(frozen=True)
class LayerPlace:
    """Where one layer's rows are saved."""

    layer_id: int
    file: str
    offset: int
    """First byte of the rows in the file."""
    dtype: str
    rows: int
    dim: int
    bytes: int


@dataclass(frozen=True)
class PlacementCost:
    """What a tier and a format would cost, all layers together."""

    tier: str
    dtype: str
    device_bytes: int
    host_bytes: int
    disk_bytes: int
    """Beside the saved memory itself."""
    rows_per_second: float | None
    """From a quick measurement with a small table that is in memory; None if not measured."""
    fits: bool
    available: dict[str, int | None]
    """Bytes free on ``device``, ``host`` and ``disk``; None where the system does not say."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields."""
        return asdict(self)


def layer_places(path: str | os.PathLike[str]) -> list[LayerPlace]:
    """Where the rows of a saved memory are.

    Raises:
        CheckpointError, ConfigError: the memory cannot be read.
    """

    def read() -> list[LayerPlace]:
        description = read_description(path)
        places = tensor_offsets(path, description)
        with read_tensors(path, description) as tensors:
            return [
                LayerPlace(t.layer_id, *places[f"{t.prefix}weight"], t.form.name, t.rows, t.dim, t.nbytes)
                for t in stored_tables(description, tensors)
            ]

    return again_if_saved(path, read)


@dataclass(frozen=True)
class _Saved:
    """What a saved memory's files say of its tables."""

    tables: list[StoredTable]
    size: int
    """Bytes of the weights file."""
    verified: bool


def _saved(path: str | os.PathLike[str]) -> _Saved:
    def read() -> _Saved:
        description = read_description(path)
        with read_tensors(path, description) as tensors:
            verified = bool(description["engram_config"].get("verify_rows"))
            return _Saved(stored_tables(description, tensors), tensors.file.stat().st_size, verified)

    return again_if_saved(path, read)


def placement_costs(
    path: str | os.PathLike[str],
    hot_rows: int | None = None,
    rows_in: str | os.PathLike[str] | None = None,
    measure: bool = True,
) -> list[PlacementCost]:
    """What every tier and format would cost a saved memory on this machine.

    Args:
        path: folder of the memory.
        hot_rows: hot rows per layer of a hybrid; a twentieth of the rows if not given.
        rows_in: folder in which row files would be (``TableConfig.path``); ``path`` itself if not given.
        measure: whether to time look-ups.

    Raises:
        CheckpointError, ConfigError: the memory cannot be read.
    """
    saved = _saved(path)
    tables, available = saved.tables, _available(Path(rows_in or path))
    costs = []
    for tier in ("device",) if saved.verified else _TIERS:  # few rows are always on the device
        for form in FORMATS.values():
            if tables[0].dim % form.values_per_item:
                continue
            hot = [hot_rows or max(1, table.rows // _HOT_SHARE) for table in tables]
            placement = TableConfig(tier=tier, dtype=form.name, hot_rows=hot[0] if tier == "hybrid" else None)  # type: ignore[arg-type]
            speed = rows_per_second(placement, max(t.rows for t in tables), tables[0].dim, _device()) if measure else None
            costs.append(_cost(tables, placement, hot, available, speed))
    return costs


def check_fit(path: str | os.PathLike[str], placement: TableConfig, out: str | os.PathLike[str] | None = None) -> None:
    """Refuse a placement for which this machine has no room.

    Args:
        path: folder of the memory.
        placement: where its rows shall live.
        out: folder of a copy in the placement's format, whose bytes count where row files go to the same disk. Row files that an unfinished
            placing into it left are no hindrance.

    Raises:
        TableError: with the bytes needed and available.
        ConfigError: the memory's rows cannot be placed so, or the row files would lie where others do, or inside the memory's folder.
    """
    saved = _saved(path)
    tables = saved.tables
    left = [] if placement.path is None else _check_row_files(path, tables, placement.path, out)
    if saved.verified and placement.tier != "device":
        raise ConfigError(
            f"tier: got {placement.tier!r}, expected 'device': of a taught memory only written rows are stored "
            f"({sum(t.rows for t in tables):,} here), so they are small."
        )
    most = max(table.rows for table in tables)
    if (placement.hot_rows or 0) > most:
        raise ConfigError(f"hot_rows: got {placement.hot_rows:,}, expected at most the {most:,} rows of a layer.")
    hot = [placement.hot_rows or 0] * len(tables)
    available = _available(Path(placement.path or path))
    available["disk"] = (available["disk"] or 0) + sum(file.stat().st_size for file in left)  # they go first
    cost = _cost(tables, placement, hot, available, None)
    form = row_format(placement.dtype)
    copied = 0
    if placement.path is not None and out is not None and _disk(Path(out)) == _disk(Path(placement.path)):
        copied = saved.size + sum(table.bytes_in(form) - table.nbytes for table in tables)
    for place, beside in (("device", 0), ("host", 0), ("disk", copied)):
        needed, free = getattr(cost, f"{place}_bytes") + beside, cost.available[place]
        if free is not None and needed > free:
            raise TableError(
                f"tier {placement.tier!r} with {placement.dtype} rows needs {needed:,} bytes ({place}), {free:,} are available; "
                "choose another tier or a smaller dtype (`engram place` lists what they cost)."
            )


def _cost(
    tables: list[StoredTable], placement: TableConfig, hot: list[int], available: dict[str, int | None], speed: float | None
) -> PlacementCost:
    form = row_format(placement.dtype)
    size = sum(table.bytes_in(form) for table in tables)
    few = sum(min(n, table.rows) * form.row_bytes(table.dim) for n, table in zip(hot, tables))
    used = {"device": 0, "host": 0, "disk": 0}
    if placement.tier == "device":
        used["device"] = size
    elif placement.tier == "mmap":
        # Read where it lies, or in files of its own.
        used["disk"] = 0 if placement.path is None and form == tables[0].form else size
    else:
        used["disk" if placement.path is not None else "host"] = size
        used["device"] = few if placement.tier == "hybrid" else 0
    fits = all(free is None or used[place] <= free for place, free in available.items())
    if _device() == "cpu" and available["host"] is not None:  # one memory for both
        fits = fits and used["device"] + used["host"] <= available["host"]
    return PlacementCost(placement.tier, form.name, used["device"], used["host"], used["disk"], speed, fits, available)


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _existing(folder: Path) -> Path:
    while not folder.exists():
        folder = folder.parent
    return folder


def _disk(folder: Path) -> int:
    return _existing(folder.absolute()).stat().st_dev


def _available(folder: Path) -> dict[str, int | None]:
    folder = _existing(folder)
    host = available_memory()
    device = torch.cuda.mem_get_info()[0] if _device() == "cuda" else host
    return {"device": device, "host": host, "disk": shutil.disk_usage(folder).free}


@torch.no_grad()
def count_rows_read(path: str | os.PathLike[str], tokenizer: Any, texts: Iterable[str]) -> dict[int, AccessCounts]:
    """How often texts ask for each row of a saved memory, per layer; hashing alone, no model runs.

    Args:
        path: folder of the memory.
        tokenizer: the one it was made for.
        texts: what to read.

    Raises:
        FingerprintError: the tokenizer is another one.
        DataError: one text in place of several.
    """
    refuse_one_text(texts, "count_rows_read")
    description = read_description(path)
    mapping = build_mapping(EngramConfig.from_dict(description["engram_config"]), tokenizer)
    if mapping.fingerprint != description.get("fingerprint"):
        raise FingerprintError(f"the memory in {path} was made with another tokenizer; give its base model (--model).")
    offsets = {}
    for layer_id in mapping.config.layer_ids:
        ends = torch.tensor(mapping.head_sizes(layer_id)).cumsum(0)
        offsets[layer_id] = torch.cat([ends.new_zeros(1), ends[:-1]])
    counts = {layer_id: AccessCounts() for layer_id in offsets}
    before = mapping.config.max_ngram_size - 1
    for text in texts:
        for ids, history in windows_of(tokenizer, text, before):
            for layer_id, rows in mapping.hash(ids, history).items():
                counts[layer_id].add(rows + offsets[layer_id])
    return counts


def windows_of(tokenizer: Any, text: str, before: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """A text of any length in pieces: raw ids ``[1, T]``, and up to ``before`` ids that come before them."""
    ids = torch.tensor([tokenizer(text, verbose=False)["input_ids"]], dtype=torch.int64)
    for start in range(0, ids.shape[1], _WINDOW):
        yield ids[:, start : start + _WINDOW], ids[:, max(0, start - before) : start]


def place_memory(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    placement: TableConfig,
    hot: Mapping[int, Tensor] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ConversionReport:
    """Save a memory again in the format of a placement, which it is then loaded with unless another is asked for.

    With a ``path`` the row files are written too, so that the first load maps them as they are. Row files inside the memory's folder or
    beside it are found again when both are moved together; others are looked for where they were written.

    The memory appears when all is written. An error leaves nothing; what a killed run leaves is removed when the same is asked for again.

    Args:
        source: folder of the memory.
        out: folder of the new one; may not hold a memory.
        placement: where the rows shall live.
        hot: hot rows per layer, the most frequent first.
        progress: called with (bytes done, of all).

    Raises:
        ConfigError, CheckpointError, TableError: as ``check_fit`` and ``convert_memory``, or a row file exists already.
    """
    check_target(source, out)
    check_fit(source, placement, out)
    row_files = placement.path
    with lock_store(out), nullcontext() if row_files is None else lock_store(row_files):
        if row_files is not None:
            placement = replace(placement, path=_saved_path(row_files, out))
        fields = {name: value for name, value in asdict(placement).items() if value is not None and name in PLACED_FIELDS}
        tensors = {f"placement.{layer_id}.hot_ids": rows for layer_id, rows in (hot or {}).items()}
        written = _RowFiles(row_files, out, progress)
        try:
            report = convert_memory(source, out, placement.dtype, progress, {"placement": fields}, tensors, written.write)
        except BaseException:  # Ctrl-C too
            if not (Path(out) / DESCRIPTION_NAME).exists():
                written.remove()
            raise
        written.finish()
        return report


def _saved_path(row_files: str, memory: str | os.PathLike[str]) -> str:
    """How a memory's description names the folder of its row files: relative to the memory where the two may be moved as one."""
    folder, home = Path(row_files).resolve(), Path(memory).resolve()
    return os.path.relpath(folder, home) if folder.is_relative_to(home) or folder.parent == home.parent else str(folder)


def _check_row_files(
    source: str | os.PathLike[str], tables: list[StoredTable], folder: str, out: str | os.PathLike[str] | None
) -> list[Path]:
    """Row files in ``folder`` that are in the way and nobody's: an unfinished placing into ``out`` left them.

    Raises:
        ConfigError: others are in the way, or the folder cannot be one for row files.
    """
    if Path(folder).resolve().is_relative_to(Path(source).resolve()):
        raise ConfigError(f"path: got {folder}, inside the memory that is read; expected a folder of the row files' own.")
    if Path(folder).exists() and not Path(folder).is_dir():
        raise ConfigError(f"path: got {folder}, which is a file; expected a folder for the row files.")
    found = [file for file in (row_file(folder, table.layer_id) for table in tables) if file.exists()]
    complete = out is None or (Path(out) / DESCRIPTION_NAME).exists()
    for file in found:
        if complete or not left_by_placing(file, _on_behalf_of(out)):
            raise ConfigError(f"{file} exists already; choose another folder for the row files.")
    return found


def _on_behalf_of(out: str | os.PathLike[str] | None) -> str:
    """How a row file's note names the memory that it is being written for."""
    return str(Path(out or ".").resolve())


class _RowFiles:
    """Row files of a memory that is being saved, written from its weights before it appears.

    Args:
        folder: where; None for no row files at all.
        memory: folder of the memory.
        progress: called with (bytes done, of all).
    """

    def __init__(self, folder: str | None, memory: str | os.PathLike[str], progress: Callable[[int, int], None] | None) -> None:
        self.folder, self.memory, self.progress = folder, memory, progress
        self.stamps: dict[Path, str] = {}

    def write(self, tables: list[StoredTable], tensors: TensorReader) -> None:
        """Write all of them, in the format in which the rows are saved, block by block. What stands there already is not replaced, but for
        what an earlier run for the same memory left.

        Raises:
            ConfigError: a row file is there.
            CheckpointError, TableError: one cannot be written.
        """
        if self.folder is None:
            return
        for table in tables:
            left = row_file(self.folder, table.layer_id)
            if left_by_placing(left, _on_behalf_of(self.memory)):
                remove_row_file(left)
        done, total = 0, sum(table.nbytes for table in tables)

        def show(written: int) -> None:
            nonlocal done
            done += written
            if self.progress is not None:
                self.progress(done, total)

        for table in tables:
            self._write_one(row_file(self.folder, table.layer_id), table, tensors, show)

    def _write_one(self, file: Path, table: StoredTable, tensors: TensorReader, show: Callable[[int], None]) -> None:
        cursors, size = row_file_layout(table.rows, table.dim, table.form)
        stamp = row_stamp(tensors.file.name, table.layer_id, table.form.name)
        try:
            with new_row_file(file, size, stamp, _on_behalf_of(self.memory)) as opened:
                for _, values, scales in table.blocks(tensors):
                    parts = [part.contiguous().reshape(-1).view(torch.uint8) for part in (values, scales) if part is not None]
                    for cursor, part in zip(cursors, parts):
                        opened.seek(cursor)
                        opened.write(part.numpy().data)
                    cursors = tuple(cursor + len(part) for cursor, part in zip(cursors, parts))
                    show(sum(len(part) for part in parts))
        except FileExistsError:
            raise ConfigError(f"{file} exists already; choose another folder for the row files.") from None
        except OSError as error:
            if isinstance(error, CheckpointError):  # the rows could not be read
                raise
            raise CheckpointError(
                f"cannot write {file} ({table.nbytes:,} bytes): {error}; free space or choose another folder."
            ) from error
        self.stamps[file] = stamp
        note_form(file, table.form.name, table.rows, table.dim)

    def remove(self) -> None:
        """Remove what was written."""
        for file in self.stamps:
            remove_row_file(file)

    def finish(self) -> None:
        """Note that they belong to a memory that is there."""
        for file, stamp in self.stamps.items():
            with suppress(TableError):  # the note that is there is true too
                stamp_rows(file, stamp)
