"""`engram sweep`: many small trainings that answer one question, resumable at any moment."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from engram.cli.outputs import check_writable, command_line, made_with, print_whole
from engram.cli.settings import read_settings
from engram.errors import first_of

if TYPE_CHECKING:
    from engram.experiments import SweepRecipe

__all__ = ["sweep_command"]

_CHANGES_NAMED = 5
_ALONE = {"allocation": "experts alone", "slots": "no memory"}


def sweep_command(
    recipe: Annotated[Path, typer.Argument(help="YAML recipe of a sweep; 'engram recipe sweep' writes one.")],
    out: Annotated[Path, typer.Option(help="Run folder: data, and a folder for each point; finished points are skipped.")],
    json_out: Annotated[
        Path | None, typer.Option("--json", help="Result file; points that it already holds are not run again.")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Points at a time. Default: one per core; on a GPU one.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads of each point.")] = 1,
    changes: Annotated[
        list[str] | None, typer.Option("--set", help="Change a field of the base, e.g. --set tokens=200000; may be repeated.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=0, help="Start at most this many points of each stage; 0 only sums up what is finished.")
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="List the points with their sizes and stop.")] = False,
    retry: Annotated[bool, typer.Option("--retry", help="Run points again whose loss became NaN or infinite.")] = False,
    tuning_only: Annotated[bool, typer.Option("--tuning-only", help="Choose learning rates and stop.")] = False,
) -> None:
    """Run all trainings of a sweep and sum them up.

    Learning rates are chosen first; the summary has intervals. The same command resumes a sweep that was stopped.
    """
    from engram.checkpoint import sole_writer
    from engram.experiments import read_sweep, run_sweep

    sweep = read_sweep(recipe, read_settings(changes))
    if plan:
        _show_plan(sweep)
        return
    check_writable(json_out)
    place = json_out or out / "sweep.json"
    with sole_writer(place, f"writing {place}"):
        known = _known(place)
        _refuse_another(place, known, sweep.name)
        aside = _tell_of_kept_aside(sweep, known, place if json_out else out, bool(json_out))
        result = run_sweep(
            sweep,
            recipe.parent,
            out,
            known if json_out else {},  # without a file of its own, what counts is in the folder
            workers=workers or max(1, _workers() // threads),
            threads=threads,
            show=lambda line: print(line, file=sys.stderr, flush=True),
            save=lambda found: _write(place, found, _command(recipe, place, changes)),
            retry=retry,
            tuning_only=tuning_only,
            limit=limit,
        )
    _show_summary(result)
    kept = f" ({aside} of another recipe are kept aside)" if aside else ""
    print(f"{len(result['points'])} of {result['expected_points']} points{kept}; written to {place}")
    if result["failures"]:
        for failure in result["failures"]:
            print(f"failed: {failure['point']}: {failure['error']}", file=sys.stderr)
        raise typer.Exit(1)


def _tell_of_kept_aside(sweep: SweepRecipe, known: dict[str, Any], place: Path, in_file: bool) -> int:
    """How many points of another recipe there are; says before hours of work where they are kept and how they come back."""
    from engram.experiments.sweep import changes_since, kept_aside

    aside = len(kept_aside(sweep, known))
    if aside:
        changed = changes_since(sweep, known)
        differs = f" ({first_of(changed, _CHANGES_NAMED, '; ')})" if changed else ""
        where, option = ("under other_points", "--json") if in_file else ("in their folders", "--out")
        print(
            f"{place} holds {aside} points of another recipe{differs}, those that chose learning rates included. They are kept {where}, and "
            f"nothing below is of them: the earlier recipe takes them up again. Give this one another {option} to keep the two apart.",
            file=sys.stderr,
            flush=True,
        )
    return aside


def _workers() -> int:
    import torch

    return 1 if torch.cuda.is_available() else max(1, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1)


def _refuse_another(file: Path, known: dict[str, Any], name: str) -> None:
    from engram.errors import CheckpointError

    if known and known["sweep"] != name:
        raise CheckpointError(
            f"{file} is the result of sweep {known['sweep']!r}, expected {name!r}; choose another --out or --json (nothing was overwritten)."
        )


def _known(file: Path) -> dict[str, Any]:
    """The result in a file, if there is one: a damaged file is not written over.

    Raises:
        DataError: it holds something else, or points that are none.
    """
    from engram.errors import DataError

    if not file.is_file() or not file.stat().st_size:
        return {}
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        result = None
    if not isinstance(result, dict) or "sweep" not in result:
        raise DataError(f"{file} is no result of a sweep; choose another file for --json (nothing was overwritten).")
    if wrong := _wrong_points(result):
        raise DataError(
            f"{file} is a result of a sweep with {wrong}; expected it as engram sweep wrote it: mend it, or choose another file for --json "
            "(nothing was overwritten)."
        )
    return result


_OF_A_POINT = ("digest", "labels", "seed", "learning_rate", "validation", "test", "counts")


def _wrong_points(result: dict[str, Any]) -> str:
    """What makes a result useless to go on from; empty for a good one."""
    if not isinstance(result.get("data", {}), dict):
        return "no mapping 'data'"
    for part in ("points", "tuning", "other_points"):
        entries = result.get(part, [])
        if not isinstance(entries, list):
            return f"no list of {part!r}"
        for number, entry in enumerate(entries):
            lacking = [key for key in _OF_A_POINT if not isinstance(entry, dict) or key not in entry]
            if lacking:
                return f"{part}[{number}] that lacks {', '.join(lacking)}"
    return ""


def _command(recipe: Path, file: Path, changes: list[str] | None) -> str:
    """What to type for the same result."""
    options = [("out", "RUN"), ("json", file), *(("set", change) for change in changes or ())]
    return command_line("sweep", str(recipe), options=options)


def _write(file: Path, result: dict[str, Any], command: str) -> None:
    from engram.checkpoint import write_json_atomically

    write_json_atomically(file, {"command": command, **made_with(), **result})


def _show_summary(result: dict[str, Any]) -> None:
    """A line for each arm or share; everything else is in the file. Nothing while there are no points."""
    from rich import box
    from rich.table import Table

    lines = list(_lines(result["question"], result["summary"]))
    if not lines:
        return
    several = len({setting for setting, *_ in lines}) > 1
    reference = _ALONE.get(result["question"]) or result["recipe"].get("reference", "reference")
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), show_edge=False)
    for heading in (*(["setting"] if several else []), "share of experts" if result["question"] == "allocation" else "arm"):
        table.add_column(heading, no_wrap=True)
    for heading in ("seeds", "test loss", "95 % interval", f"difference to {reference}", "95 % interval"):
        table.add_column(heading, justify="right", no_wrap=True)
    for setting, label, loss, difference in lines:
        names = (setting, label) if several else (label,)
        table.add_row(*names, str(loss["n"]), f"{loss['mean']:.4f}", _ends(loss, ""), _mean(difference), _ends(difference, "+"))
    print_whole(table)


def _lines(question: str, summary: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any], dict[str, Any] | None]]:
    """Setting, arm or share, its test loss and its difference to what the others are compared with."""
    if question == "slots":
        if summary.get("none"):
            yield "all", "no memory", summary["none"], None
        for row in summary.get("curve", ()):
            yield "all", f"{row['slots']:,} slots", row["loss"], row["against_none"]
    elif question == "allocation":
        for budget, found in summary.items():
            for row in found["curve"]:
                yield budget, f"{100 * row['rho']:.1f} %", row["loss"], row["against_experts_alone"]
    else:
        for setting, arms in summary.items():
            for label, arm in arms.items():
                yield setting, label, arm["loss"], arm["against_reference"]


def _mean(difference: dict[str, Any] | None) -> str:
    return "" if difference is None else f"{difference['mean']:+.4f}"


def _ends(found: dict[str, Any] | None, sign: str) -> str:
    """The interval; a dash where one seed gives none."""
    if found is None:
        return ""
    return "–" if found["low"] is None else f"[{found['low']:{sign}.4f}, {found['high']:{sign}.4f}]"


def _show_plan(sweep: SweepRecipe) -> None:
    from rich.table import Table

    from engram.experiments import predict_counts, predict_flops

    table = Table(title=f"{sweep.name}: seeds {', '.join(map(str, sweep.seeds))}", title_justify="left")
    for name in (
        *sweep.variants,
        "total",
        "active",
        "exact rho",
        "experts",
        "rows per head",
        "operations/token",
        "steps",
        "tokens",
    ):
        table.add_column(name, justify="left" if name in sweep.variants else "right")
    for labels in sweep.combinations():
        point = sweep.recipe_of(labels, sweep.seeds[0]).solved()
        counts = predict_counts(point.backbone, point.engram)
        rows = "/".join(f"{n:,}" for n in point.engram.engram_vocab_size) if point.engram else "-"  # type: ignore[union-attr]
        sizes = (f"{counts.total:,}", f"{counts.active:,}", f"{counts.rho:.3f}")
        experts = str(point.backbone.n_routed_experts if point.backbone.has_experts else 0)
        flops = predict_flops(point.backbone, point.engram, point.data.seq_len)
        table.add_row(
            *labels.values(), *sizes, experts, rows, f"{flops:,}", f"{point.steps:,}", f"{point.steps * point.batch_tokens:,}"
        )
    print_whole(table)
    tuning = sum(len(points) for points in sweep.tuning_points().values())
    points = len(list(sweep.combinations())) * len(sweep.seeds)
    print(f"{points} points, and {tuning} to choose learning rates")
