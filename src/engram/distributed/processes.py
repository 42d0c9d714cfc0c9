"""Processes that train together (``torch.distributed``), and small things that they agree on.

Without a process group, or with one of a single process, every function gives back what it was given and nobody is asked.
"""

from __future__ import annotations

import atexit
import functools
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from engram.errors import CheckpointError

__all__ = [
    "Group",
    "agreed_number",
    "anywhere",
    "device_of",
    "everywhere_equal",
    "from_first",
    "gathered",
    "group_apart",
    "group_for",
    "leave_at_exit",
    "process_count",
    "process_rank",
    "saving_together",
    "shard_group",
    "shard_parameter",
    "share_parameter",
    "sum_everywhere",
    "unshare_parameter",
    "wait_for_all",
    "warn_of_own_steps",
]

Group = Any
"""A ``torch.distributed.ProcessGroup``, or None for all processes. (The class itself is missing from builds without distributed.)"""

_A_MOMENT = 0.1
"""Seconds in which threads that wait for Python to let go of a tensor get their turn; once it is shutting down they would be cut off."""
_SHARED, _SHARDED = "_engram_shared", "_engram_sharded"


def process_count(group: Group = None) -> int:
    """How many processes there are; 1 where ``torch.distributed`` was not set up."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def process_rank(group: Group = None) -> int:
    """Which of them this one is, from 0."""
    return dist.get_rank(group) if process_count(group) > 1 else 0


def device_of(group: Group, preferred: torch.device) -> torch.device:
    """Where tensors must lie to be exchanged: ``preferred``, if the group's backend takes them from there (NCCL takes none of the CPU's)."""
    backend = str(dist.get_backend(group))
    if backend == "nccl" and preferred.type == "cpu":
        return torch.device("cuda", torch.cuda.current_device())
    return preferred


def group_for(device: torch.device, group: Group = None) -> Group:
    """The processes of ``group`` in which tensors of ``device`` are exchanged where they lie: for those of the CPU one of gloo's, if ``group``
    is NCCL's. It is made once; all must ask.
    """
    nccl = device.type == "cpu" and str(dist.get_backend(group)) == "nccl"
    return _another(group or dist.group.WORLD, "gloo") if nccl else group


def group_apart(group: Group = None) -> Group:
    """The same processes as a group of their own, made once, for what goes on within a backward pass: there DDP sends gradients whenever
    they are complete, and two kinds of messages in one group would have to come in one order everywhere. All must ask.
    """
    return _another(group or dist.group.WORLD, None)


@functools.cache
def _another(group: Group, backend: str | None) -> Group:
    ranks = dist.get_process_group_ranks(group)
    return dist.new_group(ranks, backend=backend, use_local_synchronization=group is not dist.group.WORLD)


def anywhere(flag: bool, group: Group = None) -> bool:
    """Whether ``flag`` is true in any process; all must ask."""
    if process_count(group) == 1:
        return flag
    told = torch.tensor(int(flag), device=device_of(group, torch.device("cpu")))
    dist.all_reduce(told, op=dist.ReduceOp.MAX, group=group)
    return bool(told)


@contextmanager
def saving_together(together: bool) -> Iterator[None]:
    """What is saved inside is saved when any process leaves; where one fails all do, and none waits for it.

    Args:
        together: whether this is asked of all processes; otherwise each is for itself.

    Raises:
        CheckpointError: in the others, if one failed.
    """
    try:
        yield
    except BaseException:
        if together:
            anywhere(True)
        raise
    if together and anywhere(False):
        raise CheckpointError("another process could not save its part; it says why.")


def everywhere_equal(value: Any, group: Group = None) -> bool:
    """Whether all processes gave an equal ``value`` (anything that pickles); all must ask."""
    count = process_count(group)
    if count == 1:
        return True
    values: list[Any] = [None] * count
    dist.all_gather_object(values, value, group=group)
    return all(other == values[0] for other in values)


def from_first(tensor: Tensor, group: Group = None) -> Tensor:
    """The first process's ``tensor``, of the same shape, type and device as one's own; all must ask."""
    if process_count(group) == 1:
        return tensor
    sent = tensor.detach().to(device_of(group, tensor.device)).clone()
    dist.broadcast(sent, src=0 if group is None else dist.get_global_rank(group, 0), group=group)
    return sent.to(tensor.device)


def gathered(tensor: Tensor, group: Group = None) -> Tensor:
    """``[processes, ...]``: the tensors of all processes, of one shape and type, lying where the group exchanges them; all must ask."""
    found = tensor.new_empty((process_count(group), *tensor.shape))
    dist.all_gather(list(found.unbind(0)), tensor.contiguous(), group=group)
    return found


def wait_for_all(group: Group = None) -> None:
    """Return when every process has come here."""
    if process_count(group) > 1:
        nccl = str(dist.get_backend(group)) == "nccl"  # which would guess the device otherwise
        dist.barrier(group, device_ids=[torch.cuda.current_device()] if nccl else None)


def sum_everywhere(number: Tensor, group: Group = None) -> Tensor:
    """The sum over all processes of a tensor of one shape and type; all must ask."""
    if process_count(group) == 1:
        return number
    told = number.detach().to(device_of(group, number.device), copy=True)
    dist.all_reduce(told, group=group)
    return told.to(number.device)


def share_parameter(parameter: Tensor, group: Group = None) -> None:
    """Note that all processes of ``group`` hold ``parameter`` and step it alike: what they would draw by chance they must agree on."""
    setattr(parameter, _SHARED, (group,))


def unshare_parameter(parameter: Tensor) -> None:
    """Every process steps ``parameter`` by itself again."""
    if hasattr(parameter, _SHARED):
        delattr(parameter, _SHARED)


def agreed_number(number: int, parameter: Tensor) -> int:
    """``number`` (below 2**63) of the first process that holds ``parameter``; one's own where it is not shared."""
    shared = getattr(parameter, _SHARED, None)
    return number if shared is None else int(from_first(torch.tensor(number, dtype=torch.int64), *shared))


def warn_of_own_steps(parameter: Tensor) -> None:
    """Say that several processes each step a table of their own, which is hardly ever meant."""
    if process_count() > 1 and getattr(parameter, _SHARED, None) is None and shard_group(parameter) is None:
        logging.getLogger("engram").warning(
            "%d processes, and each trains a table of its own: their memories will differ. Use EngramTrainer, or call replicate_tables before "
            "DistributedDataParallel.",
            process_count(),
        )


def shard_parameter(parameter: Tensor, group: Group = None) -> None:
    """Note that ``parameter`` is this process's part of one that is divided over ``group``."""
    setattr(parameter, _SHARDED, (group,))


def shard_group(parameter: Tensor) -> tuple[Group] | None:
    """The group over which a parameter is divided, in a tuple; None if it is whole."""
    return getattr(parameter, _SHARDED, None)


@functools.cache
def leave_at_exit() -> None:
    """Have this process take leave of the others when the program ends.

    Without it gloo's threads now and then abort a process that is done (torch 2.13: a program of thirty all-reduces, in 6 of 10 runs), and
    launchers take the run for failed. NCCL is left to itself: its leave waits for the others.
    """
    if process_count() > 1 and "nccl" not in str(dist.get_backend()):
        atexit.register(_leave)


def _leave() -> None:
    if dist.is_initialized():
        time.sleep(_A_MOMENT)
        dist.destroy_process_group()
