"""Commands that a launcher starts several times over, ``torchrun --nproc-per-node 8 -m engram train ...``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch

from engram.distributed import leave_at_exit, process_rank, wait_for_all
from engram.errors import ConfigError

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

        PartialState(cpu=not torch.cuda.is_available(), timeout=_PATIENCE)
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
    """Inside, the first process does what only one may do; the others follow when it is through, and find it done."""
    if process_rank() > 0:
        wait_for_all()
    try:
        yield
    finally:
        if process_rank() == 0:
            wait_for_all()
