"""Runs that a launcher starts several times over: how the processes find each other, and what they cannot do together."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from engram.distributed import anywhere, leave_at_exit, process_count, process_rank, wait_for_all
from engram.errors import ConfigError, TrainingError

__all__ = ["check_processes", "check_shared_folder", "first_process_first", "set_up_processes"]

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


def check_processes(args: Any) -> None:
    """Refuse processes that do not know of each other, and one for several GPUs: ``nn.DataParallel`` copies the model, hooks and all, into
    threads.
    """
    if process_count() > 1 and args.world_size == 1:  # transformers takes a CPU for one process, if it is not asked for
        raise ConfigError(
            f"training: got {process_count()} processes with arguments by which each would train alone, expected them to share batches; on "
            "CPUs make the arguments with use_cpu=True."
        )
    if args.n_gpu > 1:
        raise ConfigError(
            f"training: got one process and {args.n_gpu} GPUs to divide batches between, expected a process for each: start it with torchrun "
            f"--nproc-per-node {args.n_gpu}, or choose one GPU with CUDA_VISIBLE_DEVICES=0."
        )


def check_shared_folder(folder: Path) -> None:
    """Refuse a folder of checkpoints that not all processes see: each writes a part of them there."""
    mark, first = folder / ".seen-by-all", process_rank() == 0
    if first:
        folder.mkdir(parents=True, exist_ok=True)
        mark.touch()
    wait_for_all()
    hidden = anywhere(not mark.exists())
    if first:
        mark.unlink()
    if hidden:
        raise ConfigError(
            f"{folder}: not all processes see this folder, expected a disk that they share: with sharded tables each writes a part of a "
            "checkpoint."
        )


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
