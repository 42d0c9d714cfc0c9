"""`engram pretrain`: a small language model from text files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["pretrain_command"]


def pretrain_command(
    recipe: Annotated[
        Path,
        typer.Argument(help="YAML recipe; recipes/base_model.yaml of the repository makes what the bundled one went on from."),
    ],
    out: Annotated[Path, typer.Option(help="Run folder: checkpoints, and the finished model in its folder 'model'.")],
    restart: Annotated[bool, typer.Option(help="Refuse to go on from an earlier run (its checkpoints or its model).")] = False,
) -> None:
    """Train a tokenizer and a small Llama-architecture model from text files; goes on where it was stopped."""
    from engram.training.pretrain import pretrain, read_recipe

    target = pretrain(read_recipe(recipe), out, folder=recipe.parent, resume=not restart)
    print(f"model written to {target}")
