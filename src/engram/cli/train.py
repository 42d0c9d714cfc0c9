"""`engram train`: one model, with or without a memory, from text to weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from engram.cli.settings import read_settings

__all__ = ["train_command"]


def train_command(
    recipe: Annotated[Path, typer.Argument(help="YAML recipe of one run; 'engram recipe train' writes one.")],
    out: Annotated[Path, typer.Option(help="Run folder: data, checkpoints, result.json, and at the end 'model' and 'memory'.")],
    changes: Annotated[
        list[str] | None, typer.Option("--set", help="Change a field of the recipe, e.g. --set tokens=200000; may be repeated.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed, in place of the recipe's.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads. Default: all cores.")] = None,
    report_to: Annotated[
        list[str] | None, typer.Option(help="Loggers: tensorboard, wandb; may be repeated. Needs the extra of that name.")
    ] = None,
) -> None:
    """Train a memory, with a new model or on an existing one.

    The same command resumes a run that was stopped. To share every batch between processes: torchrun --nproc-per-node 8 -m engram train
    RECIPE --out DIR. With 'table: {sharded: true}' in the recipe each process holds a part of the rows.
    """
    import dataclasses
    from contextlib import nullcontext

    import torch

    from engram.checkpoint import sole_writer
    from engram.cli.corpus import corpus_progress
    from engram.distributed import process_rank
    from engram.experiments import prepare_data, read_point, run_point
    from engram.models.bundled import load_tokenizer
    from engram.training.progress import LiveProgress
    from engram.training.several import first_process_first, set_up_processes

    set_up_processes()
    first = process_rank() == 0
    point = dataclasses.replace(read_point(recipe, read_settings(changes)), keep_model=True)
    if seed is not None:
        point = dataclasses.replace(point, seed=seed)
    if threads:
        torch.set_num_threads(threads)
    with first_process_first(), corpus_progress() as show:
        own = None if point.model is None else load_tokenizer(point.model)
        data = prepare_data(point.data, recipe.parent, out / "data", show, own)
    with sole_writer(out, f"training in {out}") if first else nullcontext():
        result = run_point(point, data, out, [LiveProgress()], report_to or ())
    if first:
        _show(result, out)


def _show(result: dict[str, Any], out: Path) -> None:
    counts = result["counts"]
    print(f"{counts['total']:,} parameters, {counts['active']:,} per token, {counts['table_rows']:,} rows; embeddings left out")
    for half, measured in result["held_out"].items():
        kinds = ", ".join(f"{kind} {entry['loss']:.4f}" for kind, entry in measured["by_kind"].items())
        others = {
            name: result.get(key, {}).get(half) for name, key in (("memory off", "held_out_off"), ("before", "held_out_before"))
        }
        beside = "".join(f", {name} {other['bits_per_byte']:.4f}" for name, other in others.items() if other)
        print(f"{half}: {measured['loss']:.4f} nats per token, {measured['bits_per_byte']:.4f} bits per byte{beside} ({kinds})")
    places = [out / name for name in ("model", "memory", "result.json") if (out / name).exists()]
    print("written: " + ", ".join(map(str, places)))
