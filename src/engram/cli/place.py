"""`engram place`: where a memory's rows are, what other places cost, and moving them there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from engram.cli.convert import check_dtype, print_report, progress_bar, read_text
from engram.cli.loading import check_out, open_tokenizer
from engram.cli.outputs import print_folded, print_whole

if TYPE_CHECKING:
    from engram.config import TableConfig
    from engram.models.place import LayerPlace, PlacementCost

__all__ = ["place_command"]

_NOTE = "rows/s: a quick measurement with a small table that is in memory; larger ones are slower"
_TAUGHT = "a taught memory stores written rows alone: so few that they are always on the model's device"


def place_command(
    memory: Annotated[Path, typer.Argument(help="Folder of the memory, or 'bundled'.")],
    tier: Annotated[
        str | None, typer.Option(help="Where to move it: device, host, mmap or hybrid; a taught memory stays on device.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="Format of the rows. Default: as saved.")] = None,
    path: Annotated[
        Path | None,
        typer.Option(
            help="Folder for row files (tiers mmap and hybrid), in which rows can be trained; without it they are read from the saved memory."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the moved memory; without it nothing is written.")] = None,
    hot_rows: Annotated[int | None, typer.Option(min=1, help="Rows per layer that a hybrid keeps on the device.")] = None,
    hot_from: Annotated[Path | None, typer.Option(help="Text file; the rows that it reads most become the hot ones.")] = None,
    resident_bytes: Annotated[
        int | None, typer.Option(min=1, help="Bytes of row files that may be mapped in at a time.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Base model, for its tokenizer. Default: the one the memory was made for.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show where a memory's rows are stored, or move them.

    Without --out: what every tier and format would cost on this machine. With --tier and --out: write a moved copy.
    """
    from engram.models.bundled_files import memory_folder

    _check_options(tier, dtype, out, hot_rows, hot_from, resident_bytes)
    memory = memory_folder(memory)
    if out is not None:
        check_out(out)
    if dtype is not None:
        check_dtype(dtype)
    from engram.models.place import layer_places, placement_costs  # loads transformers

    layers = layer_places(memory)
    fields: dict[str, Any] = {"memory": str(memory), "layers": [vars(layer) for layer in layers]}
    hot = _hot(memory, hot_from, hot_rows or 1, model, fields) if hot_from is not None else None
    if out is None:
        costs = placement_costs(memory, hot_rows, path)
        loads = _loads_with(memory)
        fields |= {"loads_with": loads, "costs": [cost.to_dict() for cost in costs], "note": _NOTE}
        if not as_json:
            _print_layers(layers)
            print("loads with " + ", ".join(f"{name} {value}" for name, value in loads.items()))
            _print_costs(costs)
    else:
        placement = _placement(
            tier or ("hybrid" if hot_from else None), dtype or layers[0].dtype, path, hot_rows, resident_bytes
        )
        fields["moved"] = _move(memory, out, placement, hot, as_json)
    if as_json:
        print(json.dumps(fields, indent=1))
    elif "hot" in fields:
        for layer_id, found in fields["hot"].items():
            share = 100 * found["share_of_look_ups"]
            print(f"layer {layer_id}: {found['rows']:,} of {found['rows_seen']:,} rows seen take {share:.1f} % of the look-ups")


def _check_options(
    tier: str | None,
    dtype: str | None,
    out: Path | None,
    hot_rows: int | None,
    hot_from: Path | None,
    resident_bytes: int | None,
) -> None:
    tiers = ("device", "host", "mmap", "hybrid")
    if tier is not None and tier not in tiers:
        raise typer.BadParameter(f"got {tier!r}, expected one of {', '.join(tiers)}", param_hint="--tier")
    if tier is not None and out is None:
        raise typer.BadParameter("got a tier without --out, expected a folder for the moved memory", param_hint="--tier")
    if dtype is not None and out is None:
        raise typer.BadParameter(
            "got a format without --out, expected a folder for the moved memory; costs are shown for every format",
            param_hint="--dtype",
        )
    if resident_bytes is not None and out is None:
        raise typer.BadParameter(
            "got bytes without --out, expected a folder for the moved memory", param_hint="--resident-bytes"
        )
    if out is not None and tier is None and hot_from is None:
        raise typer.BadParameter(
            "got a folder without --tier; use `engram convert` to change the format alone", param_hint="--out"
        )
    if hot_from is not None and (hot_rows is None or tier not in (None, "hybrid")):
        raise typer.BadParameter("goes with --hot-rows and --tier hybrid", param_hint="--hot-from")
    if hot_rows is not None and tier not in (None, "hybrid"):
        raise typer.BadParameter(f"got rows to keep hot and tier {tier!r}, expected --tier hybrid", param_hint="--hot-rows")
    if tier == "hybrid" and hot_rows is None:
        raise typer.BadParameter("expected a number of rows for --tier hybrid", param_hint="--hot-rows")


def _placement(
    tier: str | None, dtype: str, path: Path | None, hot_rows: int | None, resident_bytes: int | None
) -> TableConfig:
    from engram.config import TableConfig

    folder = None if path is None else str(path)
    hot = hot_rows if tier == "hybrid" else None
    fields = {"tier": tier, "dtype": dtype, "path": folder, "hot_rows": hot, "resident_bytes": resident_bytes}
    return TableConfig.from_dict(fields)


def _move(memory: Path, out: Path, placement: TableConfig, hot: dict[int, Any] | None, quiet: bool) -> dict[str, Any]:
    from engram.checkpoint import lock_store
    from engram.checkpoint.convert import check_target
    from engram.models.place import check_fit, place_memory

    check_target(memory, out)
    check_fit(memory, placement, out)  # before anything is made or shown
    with lock_store(out), progress_bar("placing") as show:
        report = place_memory(memory, out, placement, hot, show)
    if not quiet:
        print_report(report)
        print(f"{out}: loads with tier {placement.tier!r} unless another is asked for")
    return report.to_dict()


def _hot(memory: Path, file: Path, number: int, model: str | None, fields: dict[str, Any]) -> dict[int, Any]:
    """The rows that a text asks for most, per layer."""
    from engram.models.place import count_rows_read

    text = read_text(file)
    counted = count_rows_read(memory, open_tokenizer(memory, model), [text])
    hot = {layer_id: counts.most_frequent(number) for layer_id, counts in counted.items()}
    fields["hot"] = {
        layer_id: {
            "rows": len(hot[layer_id]),
            "rows_seen": len(counts.rows),
            "share_of_look_ups": float(counts.counts.sort(descending=True).values[:number].sum() / counts.counts.sum()),
        }
        for layer_id, counts in counted.items()
    }
    return hot


def _loads_with(memory: Path) -> dict[str, Any]:
    """Where the rows are when a memory was loaded and nobody asked for another place; row files by their whole path."""
    from engram.checkpoint import placed_folder, read_description

    description = read_description(memory)
    folder = placed_folder(memory, description)
    noted = {"tier": "device", **(description.get("placement") or {})}
    return noted if folder is None else {**noted, "path": str(folder)}


def _print_layers(layers: list[LayerPlace]) -> None:
    from rich.table import Table

    table = Table(title="where the rows are saved")
    for heading in ("layer", "file", "format", "rows", "bytes"):
        table.add_column(heading, justify="left" if heading == "file" else "right")
    for layer in layers:
        table.add_row(
            str(layer.layer_id), f"{layer.file}, byte {layer.offset}", layer.dtype, f"{layer.rows:,}", f"{layer.bytes:,}"
        )
    print_folded(table)


def _print_costs(costs: list[PlacementCost]) -> None:
    from rich.table import Table

    table = Table(title="what it would cost, all layers together")
    for heading in ("tier", "format", "device bytes", "host bytes", "disk bytes", "rows/s", "fits"):
        table.add_column(heading, justify="left" if heading == "tier" else "right")
    for cost in costs:
        sizes = (f"{n:,}" for n in (cost.device_bytes, cost.host_bytes, cost.disk_bytes))
        speed = "" if cost.rows_per_second is None else f"{cost.rows_per_second:,.0f}"
        table.add_row(cost.tier, cost.dtype, *sizes, speed, "yes" if cost.fits else "no")
    print_whole(table)
    free = costs[0].available
    known = (f"{name} {'unknown' if n is None else f'{n:,} bytes'}" for name, n in free.items())
    print(f"available: {', '.join(known)}")
    if all(cost.tier == "device" for cost in costs):
        print(f"{_NOTE}\n{_TAUGHT}")
    else:
        print(f"{_NOTE}; of a hybrid, half of the rows are hot there")
