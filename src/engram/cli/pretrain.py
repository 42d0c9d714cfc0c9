"""`engram pretrain`: a small language model from text files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["pretrain_command"]


def pretrain_command(
    recipe: Annotated[
        Path,
        typer.Argument(
            help="YAML recipe; recipes/base_model.yaml of the repository makes the first stage of the bundled model."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Run folder: checkpoints, and the finished model in its folder 'model'.")],
    restart: Annotated[
        bool, typer.Option(help="Start from scratch instead of resuming; an error if the folder holds an earlier run.")
    ] = False,
) -> None:
    """Train a tokenizer and a small Llama model from text files.

    The same command resumes a run that was stopped.
    """
    from engram.training.pretrain import pretrain, read_recipe

    target = pretrain(read_recipe(recipe), out, folder=recipe.parent, resume=not restart)
    print(f"model written to {target}")
