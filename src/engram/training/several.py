"""Commands that a launcher starts several times over, ``torchrun --nproc-per-node 8 -m engram train ...``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from engram.distributed import anywhere, leave_at_exit, process_count, process_rank
from engram.errors import ConfigError, TrainingError

__all__ = ["first_process_first", "refuse_several", "set_up_processes"]

_PATIENCE = timedelta(hours=6)
"""How long processes wait for one that builds a corpus."""


def _launched() -> int:
    """How many processes a launcher says that it has started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def set_up_processes() -> None:
    """Find the other processes, each on its own device, if a launcher has started several."""
    if _launched() > 1:
        from accelerate import PartialState

        PartialState(cpu=not torch.cuda.is_available())
        leave_at_exit()


def refuse_several(what: str, instead: str) -> None:
    """For commands of one process.

    Raises:
        ConfigError: a launcher has started several.
    """
    if _launched() > 1:
        raise ConfigError(f"{what}: got {_launched()} processes, expected one; {instead}.")


@contextmanager
def first_process_first() -> Iterator[None]:
    """Inside, the first process does what only one may do; the others follow when it is through, and find it done.

    Raises:
        TrainingError: in the others, if the first one failed.
    """
    if process_count() == 1:
        yield
        return
    group = dist.new_group(backend="gloo", timeout=_PATIENCE)
    try:
        if process_rank() == 0:
            failed = True
            try:
                yield
                failed = False
            finally:
                anywhere(failed, group)
        else:
            if anywhere(False, group):
                raise TrainingError("the first process failed; it says why.")
            yield
    finally:
        dist.destroy_process_group(group)
