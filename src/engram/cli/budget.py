"""`engram budget`: what a budget of parameters buys at each division between experts and memory."""

from __future__ import annotations

import math
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from engram.cli.outputs import check_writable, command_line, made_with, print_whole

if TYPE_CHECKING:
    from engram.config import EngramConfig
    from engram.experiments import Allocation, BackboneConfig

__all__ = ["budget_command"]

_PER_BLOCK = 12
"""Active parameters of a usual block, in squares of its width: 4 of attention and 8 of feed-forward."""
_FAR = 4
"""How many times the usual number is too many: twice the width would be usual then."""
_SCALES = {"k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}


def budget_command(
    total: Annotated[str, typer.Option(help="Parameters in all, without embeddings and head, e.g. 390k, 4.3M or 27B.")],
    active: Annotated[str, typer.Option(help="Parameters used per token, counted in the same way, e.g. 416k.")],
    rho: Annotated[str, typer.Option(help="Share of the sparse parameters given to experts, or several: 1,0.9,0.8.")] = "1,0.8",
    tokens: Annotated[str | None, typer.Option(help="Training tokens, for the operations of the whole run.")] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(
            help="Sweep recipe whose base gives backbone and memory; if not given, a small DeepSeek-V3, that of 'engram recipe sweep'."
        ),
    ] = None,
    seq_len: Annotated[
        int | None, typer.Option(min=1, help="Length of a sequence, for the cost of attention. Default: the recipe's, or 128.")
    ] = None,
    json_out: Annotated[Path | None, typer.Option("--json", help="File for the figures.")] = None,
) -> None:
    """Split a parameter budget between experts and memory.

    Experts, rows, exact parameters and operations for each share, at equal cost per token.
    """
    from engram.checkpoint import write_json_atomically

    check_writable(json_out)
    wanted, per_token, seen = _number(total, "--total"), _number(active, "--active"), tokens and _number(tokens, "--tokens")
    backbone, engram, positions = _base(recipe)
    allocations = _allocate(backbone, engram, wanted, per_token, _shares(rho), named=recipe is not None)
    rows = [allocation.to_dict(seq_len or positions, seen or None) for allocation in allocations]
    _show(rows, allocations[0])
    if warning := _unsuited(allocations, named=recipe is not None):
        print(warning, file=sys.stderr)
    if json_out is not None:
        command = _command(total=total, active=active, rho=rho, tokens=tokens, recipe=recipe, seq_len=seq_len, json=json_out)
        figures = {"total": wanted, "active": per_token, "tokens": seen, **_sizes(backbone, engram), "allocations": rows}
        write_json_atomically(json_out, {"command": command, **made_with(), **figures})


def _command(**options: Any) -> str:
    """What to type for the same figures."""
    return command_line("budget", options=((name.replace("_", "-"), value) for name, value in options.items()))


def _sizes(backbone: BackboneConfig, engram: EngramConfig) -> dict[str, Any]:
    """What all allocations share, JSON-ready; what is chosen for each stands there."""
    chosen = ("n_routed_experts", "intermediate_size", "engram_vocab_size")
    parts = {"backbone": asdict(backbone), "engram": engram.to_dict()}
    return {part: {name: value for name, value in fields.items() if name not in chosen} for part, fields in parts.items()}


_MOST = 10**16
"""More parameters than anybody's; torch's own sizes end not far beyond."""


def _number(text: str, option: str) -> int:
    """A count such as 4.3M."""
    digits, scale = (text[:-1], _SCALES[text[-1].lower()]) if text and text[-1].lower() in _SCALES else (text, 1)
    try:
        value = round(float(digits.replace("_", "")) * scale)
    except (ValueError, OverflowError):
        value = 0
    if not 1 <= value <= _MOST:
        raise typer.BadParameter(f"{option}: got {text!r}, expected a number such as 390000, 390k or 4.3M")
    return value


def _shares(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"--rho: got {text!r}, expected numbers such as 1,0.9,0.8") from None


def _base(recipe: Path | None) -> tuple[BackboneConfig, EngramConfig, int]:
    from engram.experiments import read_base
    from engram.experiments.starter import STARTERS

    return read_base(STARTERS / "sweep.yaml" if recipe is None else recipe)


_OWN_BASE = (
    "write a recipe with `engram recipe sweep --out FILE`, change base.backbone in it (hidden_size, num_hidden_layers, moe_intermediate_size, "
    "n_shared_experts) and base.engram (n_embed_per_ngram), and name it with --recipe"
)


def _allocate(
    backbone: BackboneConfig, engram: EngramConfig, total: int, active: int, shares: list[float], named: bool
) -> list[Allocation]:
    """One allocation for each share; a budget that the sizes used without ``--recipe`` cannot meet says that there are others."""
    from engram.errors import ConfigError
    from engram.experiments import allocate

    try:
        return [allocate(backbone, engram, total, active, share) for share in shares]
    except ConfigError as error:
        possible = 0 < active < total and all(0 <= share <= 1 for share in shares)
        if named or not possible:
            raise
        raise ConfigError(
            f"{error} These are the sizes that are used without --recipe ({backbone.num_hidden_layers} blocks of width "
            f"{backbone.hidden_size}): for others, {_OWN_BASE}."
        ) from None


def _unsuited(allocations: list[Allocation], named: bool) -> str:
    """A warning where a budget is far from what a backbone of this width and depth usually has; empty otherwise."""
    backbone, active = allocations[0].backbone, allocations[0].counts.active
    usual = _PER_BLOCK * backbone.num_hidden_layers * backbone.hidden_size**2
    if active <= _FAR * usual:
        return ""
    fitting = math.sqrt(active / (_PER_BLOCK * backbone.num_hidden_layers))
    way = "set base.backbone.hidden_size and num_hidden_layers in the recipe" if named else _OWN_BASE
    return (
        f"warning: {active:,} active parameters do not suit {backbone.num_hidden_layers} blocks of width {backbone.hidden_size}: the dense "
        f"block takes up what is left, {max(a.backbone.intermediate_size for a in allocations):,} wide. As a rule of thumb, active "
        f"parameters are {_PER_BLOCK} x blocks x width x width, {usual:,} here; so many suit a width of about {fitting:,.0f}, or more "
        f"blocks: {way}."
    )


def _show(rows: list[dict[str, Any]], first: Allocation) -> None:
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
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        training = f"{row['training_flops']:.3g}" if "training_flops" in row else ""
        counts = [f"{row[name]:,}" for name in ("total", "active", "experts", "dense_width", "table_rows", "flops_per_token")]
        table.add_row(f"{row['rho']:.3f}", f"{row['asked_rho']:g}", *counts, training)
    print_whole(table)
