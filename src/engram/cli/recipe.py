"""`engram recipe`: a recipe to start from, for text of the user's own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from engram.cli.outputs import command_line

__all__ = ["recipe_command"]


def recipe_command(
    kind: Annotated[
        str,
        typer.Argument(
            help="'train': one run, of a new model with a memory; 'sweep': many, experts or memory for the same cost."
        ),
    ],
    texts: Annotated[
        list[str] | None,
        typer.Option(
            help="Text of yours: a folder, a file, or a pattern in quotes such as 'more/*.txt'; may be repeated. Without any, the recipe "
            "names a folder that you change."
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="(train) A memory for this model, which stays as it is, instead of a new one: a folder, a hub name or 'bundled'."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="File to write, which must not exist. Default: the recipe is printed.")
    ] = None,
) -> None:
    """Write a recipe to start from, for text of your own.

    The file has comments and runs as it is: 'engram corpus' shows what text it reads, 'engram train' or 'engram sweep' runs it.
    """
    if out is not None and (out.exists() or out.is_symlink()):
        raise typer.BadParameter(f"got {out}, which exists; expected a new file: choose another name", param_hint="--out")

    from engram.experiments.starter import find_texts, starter_text

    own = find_texts(texts or (), Path() if out is None else out.parent)
    recipe = starter_text(kind, own, model)
    if out is None:
        print(recipe, end="")
        return
    _write(out, recipe)
    print(f"written: {out}")
    if not texts:
        print("first change 'folders' in it to text of yours (with --texts the recipe names it)")
    print("\n".join(["next:", *(f"  {command}" for command in _next(kind, out, model))]))


def _write(out: Path, recipe: str) -> None:
    from engram.checkpoint import write_text_atomically
    from engram.errors import DataError

    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(out, recipe)
    except OSError as error:
        raise DataError(f"cannot write {out}: {error.strerror}; choose another file.") from None


def _next(kind: str, out: Path, model: str | None) -> Iterator[str]:
    """What to type to run it."""
    run, tokenizer = f"runs/{out.stem}", [("vocab-size", 2048)] if model is None else [("tokenizer", model)]
    yield command_line("corpus", str(out), options=[("out", "runs/corpus"), *tokenizer])
    if kind == "train":
        yield command_line("train", str(out), options=[("out", run)])
        return
    yield command_line("sweep", str(out), options=[("out", run), ("plan", True)])
    yield command_line("sweep", str(out), options=[("out", run), ("json", f"{run}.json")])
