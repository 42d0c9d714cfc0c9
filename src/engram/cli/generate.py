"""`engram generate`: facts files by the thousand."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["generate_command"]


def generate_command(
    out: Annotated[Path, typer.Argument(help="Facts file to write (YAML).")],
    kind: Annotated[
        list[str] | None,
        typer.Option(
            help="Kind of facts, may be given several times; all if not given: synthetic, unicode, html, mime, errno_text, "
            "errno_number, signal, http_status, codec, locale, opcode."
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most this many facts, in equal parts from all kinds.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the synthetic values.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Overwrite a file that exists.")] = False,
) -> None:
    """Write a facts file from Python's standard library.

    Facts are made from its tables; kind synthetic adds 3,871 made-up pairs.
    """
    from engram.data.generate import write_generated

    if out.exists() and not force:
        raise typer.BadParameter(f"{out} exists; choose another name or overwrite it with --force", param_hint="OUT")
    print(f"{write_generated(out, kind, limit, seed)} facts written to {out}")
