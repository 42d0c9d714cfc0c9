"""Turning a saved memory's rows into another format, block by block: a table of any size costs about 100 MB of memory."""

from __future__ import annotations

import filecmp
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from engram._version import __version__
from engram.checkpoint.base import ADAPTERS_FOLDER, base_name
from engram.checkpoint.store import (
    DESCRIPTION_NAME,
    again_if_saved,
    read_description,
    read_ledger,
    read_tensors,
    stream_store,
)
from engram.checkpoint.stream import TensorReader, TensorSpec
from engram.checkpoint.unsaved import refuse_unsaved_rows
from engram.config import EngramConfig
from engram.errors import CheckpointError, ConfigError, TableError
from engram.tables import RowFormat, row_format

__all__ = ["ConversionReport", "LayerError", "StoredTable", "check_target", "convert_memory", "stored_tables"]

_BLOCK_BYTES = 8 << 20
"""Of float32 values; encoding and measuring a block takes a few times as much."""


@dataclass(frozen=True)
class StoredTable:
    """One layer's rows in a saved memory."""

    layer_id: int
    form: RowFormat
    rows: int
    dim: int

    @property
    def prefix(self) -> str:
        """What the names of its tensors begin with."""
        return f"layers.{self.layer_id}.multi_head_embedding.embedding."

    @property
    def nbytes(self) -> int:
        """Bytes of the rows with their scales."""
        return self.bytes_in(self.form)

    def bytes_in(self, form: RowFormat) -> int:
        """Bytes of the rows in some format."""
        return self.rows * form.row_bytes(self.dim)

    def specs(self, form: RowFormat) -> dict[str, TensorSpec]:
        """The tensors that hold the rows in some format."""
        specs = {f"{self.prefix}weight": TensorSpec(form.dtype, (self.rows, form.width(self.dim)))}
        if form.scale_dtype is not None:
            specs[f"{self.prefix}scales"] = TensorSpec(form.scale_dtype, form.scale_shape(self.rows, self.dim))
        return specs

    def blocks(self, tensors: TensorReader) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        """First row, stored values and scales of some thousand rows at a time."""
        step = max(1, _BLOCK_BYTES // (4 * self.dim))
        for start in range(0, self.rows, step):
            stored = tensors.read(f"{self.prefix}weight", start, start + step)
            yield start, stored, tensors.read(f"{self.prefix}scales", start, start + step) if self.form.quantised else None


def stored_tables(description: Mapping[str, Any], tensors: TensorReader) -> list[StoredTable]:
    """The tables of a saved memory.

    Raises:
        CheckpointError, ConfigError: the description and the tensors do not agree.
    """
    config = EngramConfig.from_dict(description["engram_config"])
    form, tables = row_format(description.get("table_dtype", "float32")), []
    for layer_id in config.layer_ids:
        table = StoredTable(layer_id, form, 0, config.head_dim)
        found = tensors.specs.get(f"{table.prefix}weight")
        if found is None:
            raise CheckpointError(f"{tensors.file}: the rows of layer {layer_id} are missing. Copy the file again.")
        table = StoredTable(layer_id, form, found.shape[0] if found.shape else 0, config.head_dim)
        wrong = [name for name, spec in table.specs(form).items() if tensors.specs.get(name) != spec]
        if wrong:
            raise CheckpointError(f"{tensors.file}: {', '.join(wrong)} does not fit {form.name} rows. Copy the file again.")
        tables.append(table)
    return tables


@dataclass
class LayerError:
    """What the rows of one layer lost on the way."""

    layer_id: int
    rows: int
    bytes_before: int
    bytes_after: int
    max_abs_error: float = 0.0
    rms_error: float = 0.0
    rms_rows: float = 0.0
    """Root mean square of the values before."""

    @property
    def relative_error(self) -> float:
        """``rms_error`` in terms of ``rms_rows``."""
        return self.rms_error / self.rms_rows if self.rms_rows else 0.0

    def add(self, before: Tensor, after: Tensor) -> None:
        """Take another block into account; sums are kept until ``finish``."""
        if before.numel():
            error = (after - before).abs_()
            self.max_abs_error = max(self.max_abs_error, float(error.max()))
            self.rms_error += float(error.double().square_().sum())
            self.rms_rows += float(before.double().square_().sum())

    def finish(self, values: int) -> None:
        """Turn sums into root mean squares."""
        self.rms_error, self.rms_rows = (math.sqrt(x / max(values, 1)) for x in (self.rms_error, self.rms_rows))


@dataclass
class ConversionReport:
    """What a conversion did."""

    source: str
    out: str
    dtype_before: str
    dtype_after: str
    layers: list[LayerError] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields."""
        layers = [{**asdict(layer), "relative_error": layer.relative_error} for layer in self.layers]
        return {**asdict(self), "layers": layers}


def convert_memory(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    dtype: str,
    progress: Callable[[int, int], None] | None = None,
    extra: Mapping[str, Any] | None = None,
    extra_tensors: Mapping[str, Tensor] | None = None,
    finish: Callable[[list[StoredTable], TensorReader], None] | None = None,
) -> ConversionReport:
    """Save a memory again with its rows in another format; everything else is copied as it is, adapters that were trained with it too. No
    model is needed, and a base model that was trained with it stays where it is.

    The new memory appears in ``out`` when it is complete and not before; the source is only read.

    Args:
        source: folder of the memory.
        out: folder of the new one; may not hold a memory.
        dtype: a name in ``FORMATS``. In their own format rows are copied bit for bit.
        progress: called with (bytes of rows done, of all).
        extra: fields to add to the description.
        extra_tensors: small tensors to save beside the others.
        finish: called with the new tables and the file that holds them, before the memory appears in ``out``; an error there undoes it.

    Raises:
        ConfigError: ``out`` holds a memory already.
        TableError: there is no such format, or it cannot hold a value.
        CheckpointError: the source cannot be read, or ``out`` not be written.
    """
    check_target(source, out)
    form = row_format(dtype)
    description, ledger, opened = again_if_saved(source, lambda: _opened(source))  # what is open can be read to its end
    with opened as tensors:
        tables = stored_tables(description, tensors)
        refuse_unsaved_rows(source, description, tables, tensors)
        report = ConversionReport(str(source), str(out), tables[0].form.name, form.name)
        rows = {name for table in tables for name in table.specs(table.form)}
        kept = [name for name in tensors.specs if name not in rows and not name.startswith("placement.")]
        extra_tensors = extra_tensors or {}
        specs = {name: tensors.specs[name] for name in kept} | {n: TensorSpec.of(t) for n, t in extra_tensors.items()}
        for table in tables:
            specs |= table.specs(form)
            report.layers.append(LayerError(table.layer_id, table.rows, table.nbytes, table.bytes_in(form)))

        def parts() -> Iterator[tuple[str, Tensor]]:
            yield from extra_tensors.items()
            for name in kept:
                yield from tensors.parts(name)
            yield from _converted(tensors, tables, form, report.layers, progress)

        dropped = ("format_version", "weights", "ledger", "placement", "base_folder")
        fields = {key: value for key, value in description.items() if key not in dropped}
        fields |= {"library_version": __version__, "table_dtype": form.name, **(extra or {})}
        if name := base_name(source, description):  # from another folder a run's model would not be found
            fields["base_model"] = {**(description.get("base_model") or {}), "name_or_path": name}

        has_adapters = (Path(source) / ADAPTERS_FOLDER).is_dir()

        def finished(weights: Path) -> None:
            if finish is not None:
                with TensorReader(weights) as written:
                    finish(stored_tables(fields, written), written)
            if has_adapters:
                _copy_adapters(Path(source), Path(out))

        try:
            stream_store(out, specs, parts(), fields, ledger, finished)
        except BaseException:
            if has_adapters and not (Path(out) / DESCRIPTION_NAME).exists():
                shutil.rmtree(Path(out) / ADAPTERS_FOLDER, ignore_errors=True)  # the same as the source's: see check_target
            raise
    return report


def _copy_adapters(source: Path, out: Path) -> None:
    """Adapters appear in ``out`` when they are whole; what a killed copy left goes."""
    new, place = out / f".{ADAPTERS_FOLDER}.new", out / ADAPTERS_FOLDER
    for leftover in (new, place):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        shutil.copytree(source / ADAPTERS_FOLDER, new)
        os.replace(new, place)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _holds_the_same(one: Path, other: Path) -> bool:
    """Whether two folders hold the same files, byte for byte."""
    files = [{path.relative_to(folder) for path in folder.rglob("*") if path.is_file()} for folder in (one, other)]
    return files[0] == files[1] and all(filecmp.cmp(one / file, other / file, shallow=False) for file in files[0])


def _opened(source: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Any] | None, TensorReader]:
    description = read_description(source)
    return description, read_ledger(source, description), read_tensors(source, description)


def check_target(source: str | os.PathLike[str], out: str | os.PathLike[str]) -> None:
    """Refuse to write over a memory.

    Raises:
        ConfigError: ``out`` is the source or holds another memory.
    """
    if Path(source).resolve() == Path(out).resolve():
        raise ConfigError(
            f"out: got {out}, the memory that is read; expected another folder, so that the source stays as it is."
        )
    if (Path(out) / DESCRIPTION_NAME).exists():
        raise ConfigError(f"{out} holds a memory already; choose another folder.")
    ours, theirs = Path(source) / ADAPTERS_FOLDER, Path(out) / ADAPTERS_FOLDER
    # The same ones are what a conversion left that was killed before the memory appeared.
    if ours.is_dir() and theirs.exists() and not (theirs.is_dir() and _holds_the_same(ours, theirs)):
        raise ConfigError(f"{out} holds {ADAPTERS_FOLDER!r} of something else, and so does the memory; choose another folder.")


def _converted(
    tensors: TensorReader,
    tables: list[StoredTable],
    form: RowFormat,
    errors: list[LayerError],
    progress: Callable[[int, int], None] | None,
) -> Iterator[tuple[str, Tensor]]:
    """Stored values and scales of all tables in the new format, measured on the way."""
    done, total = 0, sum(table.nbytes for table in tables)
    for table, error in zip(tables, errors):
        for start, stored, scales in table.blocks(tensors):
            before = table.form.decode(stored, scales)
            if form != table.form:
                stored, scales = _encoded(before, form, table.layer_id, start)
            error.add(before, form.decode(stored, scales))
            yield f"{table.prefix}weight", stored
            if scales is not None:
                yield f"{table.prefix}scales", scales
            done += len(stored) * table.form.row_bytes(table.dim)
            if progress is not None:
                progress(done, total)
        error.finish(table.rows * table.dim)


def _encoded(rows: Tensor, form: RowFormat, layer_id: int, start: int) -> tuple[Tensor, Tensor | None]:
    """Rows in another format; an error says where they lie."""
    try:
        return form.encode(rows)
    except TableError as error:
        raise TableError(f"layer {layer_id}, in the rows from {start:,} on: {error}") from None
