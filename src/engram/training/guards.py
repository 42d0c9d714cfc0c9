"""What keeps a run from spoiling itself: numbers that are none, disks that are full, reports that nobody can write."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers.trainer import TRAINER_STATE_NAME

from engram.distributed import anywhere, is_divided, own_part
from engram.errors import CheckpointError, ConfigError, TableError, TrainingError
from engram.tables import row_parameters

__all__ = [
    "check_reports",
    "is_complete",
    "last_checkpoint",
    "no_number",
    "read_claim",
    "remove_incomplete",
    "weights_are_finite",
    "whole_or_removed",
]

_PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",)}


def is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint was saved to its end: the trainer's state, written last, is there and whole."""
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return True


def read_claim(file: Path) -> dict[str, Any] | None:
    """What a run's folder says that it is a run of; None, which no recipe equals, for a file that is damaged."""
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return None
    return fields if isinstance(fields, dict) else None


def last_checkpoint(folder: str | os.PathLike[str]) -> Path | None:
    """The newest complete checkpoint in ``folder``; one that a kill cut short does not count."""
    numbered = [p for p in Path(folder).glob("checkpoint-*") if p.name.rpartition("-")[2].isdecimal()]
    newest_first = sorted(numbered, key=lambda p: int(p.name.rpartition("-")[2]), reverse=True)
    return next((p for p in newest_first if is_complete(p)), None)


def remove_incomplete(folder: str | os.PathLike[str]) -> None:
    """Remove what killed saves left of checkpoints: counted among those to keep, they would cost whole ones their place."""
    for place in Path(folder).glob("checkpoint-*"):
        # No other name is a trainer's: what is deleted must be its own.
        if place.name.removeprefix("checkpoint-").isdecimal() and place.is_dir() and not is_complete(place):
            shutil.rmtree(place, ignore_errors=True)


def no_number(what: str, value: float, step: int, lr: float, output_dir: str) -> TrainingError:
    """The error for a loss, gradient norm or weight that is NaN or infinite.

    Args:
        what: what is no number.
        value: what it is.
        step: the step that it happened at, counted from 1.
        lr: learning rate of that step.
        output_dir: where the checkpoints are.
    """
    last = last_checkpoint(output_dir)
    where = f"the last good checkpoint is {last}" if last else f"{output_dir} holds no checkpoint yet"
    return TrainingError(
        f"training stopped at step {step}: {what} is {value} (learning rate {lr:.3g}), expected a finite number; nothing was saved "
        f"since, {where}. Lower the learning rate (in Python max_grad_norm, too), or look for broken examples. The Trainer goes on from a "
        "checkpoint with other settings; `engram train` and `engram sweep` begin anew with another recipe, in a folder of its own."
    )


def weights_are_finite(model: nn.Module) -> bool:
    """Whether all weights that are trained are numbers; of divided ones all processes ask. Tables are passed over: reading one may cost more
    than the whole save.
    """
    tables = row_parameters(model)
    trained = [p for p in model.parameters() if p.requires_grad and id(p) not in tables]
    broken = any(not bool(torch.isfinite(own_part(p)).all()) for p in trained)
    return not (anywhere(broken) if any(map(is_divided, trained)) else broken)


@contextmanager
def whole_or_removed(checkpoint: Path) -> Iterator[None]:
    """While a checkpoint is written: one that cannot be finished is removed, and those before it stay as they are.

    Raises:
        CheckpointError: something could not be written; it names the newest whole checkpoint.
    """
    try:
        yield
    except (OSError, SafetensorError, TableError) as error:  # rows in files may be gone
        shutil.rmtree(checkpoint, ignore_errors=True)
        last = last_checkpoint(checkpoint.parent)
        rest = f"go on from {last}, which is whole" if last else "start again: there is no earlier checkpoint"
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(
            f"cannot write checkpoint {checkpoint}: {reason}; its unfinished files were removed. Free space and {rest}."
        ) from error


def check_reports(args: Any) -> None:
    """Refuse a report that cannot be written because a package is missing.

    Raises:
        ConfigError: it names the extra to install.
    """
    for name in getattr(args, "report_to", None) or ():
        packages = _PACKAGES.get(name, ())
        if packages and not any(importlib.util.find_spec(package) for package in packages):
            raise ConfigError(
                f"report_to: got {name!r}, but the package {packages[0]} is not installed; "
                f"pip install 'engram-memory[{name}]', or leave it out."
            )
