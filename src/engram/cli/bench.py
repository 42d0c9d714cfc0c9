"""`engram bench`: how fast the pieces are on this machine, beside the alternatives and the machine's own limits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from engram.cli.outputs import check_folder, check_writable, command_line, print_whole

__all__ = ["bench_command"]


def bench_command(
    names: Annotated[list[str] | None, typer.Argument(help="Benchmarks to run; all if none is named.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes and few rounds: seconds instead of minutes.")] = False,
    rounds: Annotated[
        int | None,
        typer.Option(min=1, help="Rounds, in each of which every alternative runs once. Default: 21; 5 with --quick."),
    ] = None,
    json_out: Annotated[Path | None, typer.Option("--json", help="File for the result.")] = None,
    plots: Annotated[Path | None, typer.Option(help="Folder for pictures (needs matplotlib).")] = None,
    show_list: Annotated[bool, typer.Option("--list", help="List the benchmarks and stop.")] = False,
) -> None:
    """Time hash, gather, tiers and layer on this machine.

    Each alternative is checked for right results before it is timed; alternatives take turns in one process.
    """
    from engram.bench import BENCHMARKS, run_benchmarks
    from engram.checkpoint import write_json_atomically

    if show_list:
        for name, benchmark in BENCHMARKS.items():
            print(f"{name:8} {benchmark.title}")
        return
    check_writable(json_out)
    check_folder(plots)
    result = run_benchmarks(names or list(BENCHMARKS), rounds or (5 if quick else 21), quick, _show)
    options = (("quick", quick), ("rounds", rounds), ("json", json_out))
    result = {"command": command_line("bench", *(names or []), options=options), **result}
    print(f"{result['hardware']}; kernels: {result['instruction_set'] or 'PyTorch alone'}")
    if json_out is not None:
        write_json_atomically(json_out, result)
    if plots is not None:
        from engram.plots import plot_bench

        for path in plot_bench(result, plots):
            print(path)


def _show(name: str, entry: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table(title=f"{name}: {entry['label']}", title_justify="left")
    for heading in ("", "median", "per second", f"times as fast as {entry['baseline']}"):
        table.add_column(heading, justify="left" if not heading else "right")
    for variant, measured in entry["variants"].items():
        ratio = measured["speedup"]
        table.add_row(
            variant,
            _seconds(measured["seconds"]["median"]),
            f"{measured['per_second']:,.0f}",
            f"x{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})",
        )
    print_whole(table)


def _seconds(value: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value * 1e9:.0f} ns"
