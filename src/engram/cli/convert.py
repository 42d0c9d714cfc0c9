"""`engram convert`: a saved memory with its rows in another format, and what that changed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from engram.cli.loading import AllowOtherBaseOption, DeviceOption, ModelDtypeOption, ModelOption, Running, check_out, open_base
from engram.cli.outputs import check_writable, command_line, made_with, new_console, print_whole
from engram.errors import first_of

if TYPE_CHECKING:
    from engram.checkpoint import ConversionReport

__all__ = ["check_dtype", "convert_command", "print_report", "progress_bar", "read_text"]

_LISTED = 20

DtypeOption = Annotated[str, typer.Option(help="Format of the rows: float32, bfloat16, float16, int8, float8 or int4.")]


def convert_command(
    memory: Annotated[Path, typer.Argument(help="Folder of the memory, or 'bundled'.")],
    dtype: DtypeOption,
    out: Annotated[Path, typer.Option(help="Folder of the converted memory.")],
    json_out: Annotated[Path | None, typer.Option("--json", help="File for the error report.")] = None,
    text: Annotated[
        Path | None, typer.Option(help="Held-out text (a file), whose bits per byte are reported before and after.")
    ] = None,
    model: ModelOption = None,
    verify: Annotated[bool, typer.Option(help="Load the base model and ask every taught fact before and after.")] = True,
    device: DeviceOption = "cpu",
    model_dtype: ModelDtypeOption = "float32",
    allow_other_base: AllowOtherBaseOption = False,
) -> None:
    """Save a memory with its rows in another number format.

    Works block by block and reports the error. Exit code 1 if a fact is not exact any more.
    """
    from engram.checkpoint import convert_memory, lock_store, write_json_atomically
    from engram.checkpoint.convert import check_target
    from engram.models.bundled_files import memory_folder

    given = {"dtype": dtype, "out": out, "json": json_out, "text": text, "model": model, "no-verify": not verify}
    memory = memory_folder(memory)
    check_out(out)
    check_dtype(dtype)
    check_writable(json_out)
    running = Running(device, model_dtype, allow_other_base)
    running.check()
    if model is not None and verify:
        from engram.models.bundled import load_tokenizer

        load_tokenizer(model)  # a name that is wrong shows before the work
    held_out = None if text is None else read_text(text)
    check_target(memory, out)
    with lock_store(out):
        check_target(memory, out)  # somebody may have saved one there meanwhile
        with progress_bar("converting") as show:
            report = convert_memory(memory, out, dtype, show)
    fields = report.to_dict()
    print_report(report)
    if verify or held_out is not None:
        fields |= _compare(memory, out, model, held_out, running)
    if json_out is not None:
        command = command_line("convert", str(memory), options=given.items()) + running.options()
        write_json_atomically(json_out, {"command": command, **made_with(), **fields})
    if fields.get("facts", {}).get("lost"):
        raise typer.Exit(1)


def check_dtype(dtype: str) -> None:
    """Refuse an unknown row format as a mistake in the option."""
    from engram.tables import FORMATS

    if dtype not in FORMATS:
        raise typer.BadParameter(f"got {dtype!r}, expected one of {', '.join(FORMATS)}", param_hint="--dtype")


def read_text(file: Path) -> str:
    """The text in a file; a mistake is one line."""
    from engram.errors import DataError

    try:
        content = file.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror}; give a text file.") from None
    except UnicodeDecodeError:
        raise DataError(f"{file}: got bytes that are not UTF-8; save the text as UTF-8.") from None
    if not content.strip():
        raise DataError(f"{file}: got no text, expected some.")
    return content


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar with a rate on standard error; called with (bytes done, bytes in all)."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=new_console(stderr=True)) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def print_report(report: ConversionReport) -> None:
    """What each layer lost, as a table."""
    from rich.table import Table

    table = Table(title=f"{report.source} ({report.dtype_before}) -> {report.out} ({report.dtype_after})")
    for heading in ("layer", "rows", "bytes before", "bytes after", "max abs error", "RMS error", "RMS of rows", "relative"):
        table.add_column(heading, justify="right")
    for layer in report.layers:
        sizes = (f"{n:,}" for n in (layer.rows, layer.bytes_before, layer.bytes_after))
        errors = (f"{x:.4g}" for x in (layer.max_abs_error, layer.rms_error, layer.rms_rows))
        table.add_row(str(layer.layer_id), *sizes, *errors, f"{100 * layer.relative_error:.3g} %")
    print_whole(table)


def _compare(source: Path, out: Path, model: str | None, text: str | None, running: Running) -> dict[str, Any]:
    """Facts that are exact, and bits per byte, before and after. Without a model that can be loaded there is a line instead."""
    from engram.checkpoint import read_description
    from engram.errors import EngramError

    description = read_description(source)
    taught = "ledger" in description and description["engram_config"].get("verify_rows")
    if not taught and text is None:
        return {}
    try:
        base, tokenizer = open_base(source, model, running)
        before, after = (_measure(base, tokenizer, folder, taught, text, running) for folder in (source, out))
    except EngramError as error:
        if text is not None:
            raise
        print(f"not verified: {error}", file=sys.stderr)
        return {"not_verified": str(error)}
    return _differences(before, after)


def _measure(base: Any, tokenizer: Any, folder: Path, taught: bool, text: str | None, running: Running) -> dict[str, Any]:
    from engram.checkpoint import read_description
    from engram.config import TableConfig
    from engram.editing import MemoryEditor
    from engram.evaluation import bits_per_byte
    from engram.models import EngramModel
    from engram.tables import row_format

    description = read_description(folder)
    form = row_format(description.get("table_dtype", "float32"))
    # Rows that were taught are found by tags, which are in memory.
    in_place = not description["engram_config"].get("verify_rows")
    placement = TableConfig(tier="mmap", dtype=form.name) if in_place else None  # type: ignore[arg-type]
    memory = EngramModel.from_pretrained(base, folder, tokenizer, placement, allow_other_base=running.allow_other_base)
    try:
        memory.eval()
        return {
            "facts": MemoryEditor(memory, tokenizer).verify() if taught else None,
            "bits": None if text is None else bits_per_byte(memory, tokenizer, [text]),
        }
    finally:
        memory.unload()


def _differences(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """The comparison as JSON-ready fields, printed too."""
    found: dict[str, Any] = {}
    if before["facts"] is not None:
        was, now = before["facts"], after["facts"]
        lost = [fact_id for fact_id, exact in was.items() if exact and not now[fact_id]]
        found["facts"] = {"facts": len(was), "before": sum(was.values()), "after": sum(now.values()), "lost": lost}
        print(f"facts exact: {sum(was.values())} of {len(was)} before, {sum(now.values())} after")
        if lost:
            print(f"not exact any more: {first_of(lost, _LISTED)}; choose a format with more bits", file=sys.stderr)
    if before["bits"] is not None:
        change = 100 * (after["bits"] / before["bits"] - 1)
        found["bits_per_byte"] = {"before": before["bits"], "after": after["bits"], "change_percent": change}
        print(f"held-out bits per byte: {before['bits']:.5f} before, {after['bits']:.5f} after ({change:+.3f} %)")
    return found
