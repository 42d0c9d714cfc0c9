"""`engram budget`: what a budget of parameters buys at each division between experts and memory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from engram.cli.outputs import check_writable

if TYPE_CHECKING:
    from engram.config import EngramConfig
    from engram.experiments import Allocation, BackboneConfig

__all__ = ["budget_command"]

_SCALES = {"k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}


def budget_command(
    total: Annotated[str, typer.Option(help="Parameters, embeddings and head left out; 4.3M, 390k and 27B are understood.")],
    active: Annotated[str, typer.Option(help="Parameters per token, counted alike.")],
    rho: Annotated[str, typer.Option(help="Share of the sparse parameters given to experts, or several: 1,0.9,0.8.")] = "1,0.8",
    tokens: Annotated[str | None, typer.Option(help="Training tokens, for the operations of the whole run.")] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(help="Sweep recipe whose base gives backbone and memory; a small DeepSeek-V3 if not given."),
    ] = None,
    seq_len: Annotated[int | None, typer.Option(min=1, help="Positions that attention looks at; the recipe's, or 128.")] = None,
    json_out: Annotated[Path | None, typer.Option("--json", help="File for the figures.")] = None,
) -> None:
    """Divide a budget between experts and memory: experts, rows, exact parameters and operations at equal cost per token."""
    from engram.checkpoint import write_json_atomically
    from engram.experiments import allocate

    check_writable(json_out)
    wanted, per_token, seen = _number(total, "--total"), _number(active, "--active"), tokens and _number(tokens, "--tokens")
    backbone, engram, positions = _base(recipe)
    allocations = [allocate(backbone, engram, wanted, per_token, share) for share in _shares(rho)]
    rows = [allocation.to_dict(seq_len or positions, seen or None) for allocation in allocations]
    _show(rows, allocations[0])
    if json_out is not None:
        write_json_atomically(json_out, {"total": wanted, "active": per_token, "tokens": seen, "allocations": rows})


def _number(text: str, option: str) -> int:
    """A count such as 4.3M."""
    digits, scale = (text[:-1], _SCALES[text[-1].lower()]) if text and text[-1].lower() in _SCALES else (text, 1)
    try:
        value = round(float(digits.replace("_", "")) * scale)
    except (ValueError, OverflowError):
        value = 0
    if value < 1:
        raise typer.BadParameter(f"{option}: got {text!r}, expected a number such as 390000, 390k or 4.3M")
    return value


def _shares(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"--rho: got {text!r}, expected numbers such as 1,0.9,0.8") from None


def _base(recipe: Path | None) -> tuple[BackboneConfig, EngramConfig, int]:
    from engram.config import EngramConfig
    from engram.experiments import BackboneConfig, read_base

    if recipe is None:
        memory = EngramConfig(
            engram_vocab_size=1000, n_embed_per_ngram=32, n_head_per_ngram=2, layer_ids=(1, 2), use_bias=False
        )
        return BackboneConfig(), memory, 128
    return read_base(recipe)


def _show(rows: list[dict[str, Any]], first: Allocation) -> None:
    from rich.console import Console
    from rich.table import Table

    backbone = first.backbone
    print(
        f"{backbone.architecture}, {backbone.num_hidden_layers} blocks of width {backbone.hidden_size}, experts of width "
        f"{backbone.moe_intermediate_size}, {backbone.num_experts_per_tok} of them and {backbone.n_shared_experts} shared per token; "
        f"embeddings and head, left out below: {rows[0]['embedding']:,}"
    )
    table = Table()
    names = ("rho", "asked", "total", "active", "experts", "dense width", "rows", "operations/token", "operations in training")
    for name in names:
        table.add_column(name, justify="right")
    for row in rows:
        training = f"{row['training_flops']:.3g}" if "training_flops" in row else ""
        counts = [f"{row[name]:,}" for name in ("total", "active", "experts", "dense_width", "table_rows", "flops_per_token")]
        table.add_row(f"{row['rho']:.3f}", f"{row['asked_rho']:g}", *counts, training)
    Console(width=120).print(table)
