"""Row gradients of several processes made one."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from engram.distributed.processes import Group, device_of, gathered, process_count
from engram.native.rows import sum_duplicates

__all__ = ["average_rows"]


@torch.no_grad()
def average_rows(gradient: Tensor, group: Group = None) -> Tensor:
    """The mean over all processes of a table's gradient, as DDP has it of dense ones; every process gets the same, to the last bit.

    What travels are the rows that were read: each process sends its own, padded to the longest list. A dense gradient is averaged whole.

    Args:
        gradient: ``[rows, dim]``, sparse in its rows; every process of the group must come with one of this shape and type.
        group: the processes; all of them if not given.

    Returns:
        A sparse gradient in which a row may come as often as there are processes (more often in 16 bits, whose sums are taken in float32
        by whoever steps the rows); ``gradient`` itself where there is one process only.
    """
    count = process_count(group)
    if count == 1:
        return gradient
    place = device_of(group, gradient.device)
    if not gradient.is_sparse:
        mean = gradient.to(place, copy=True)
        dist.all_reduce(mean, group=group)
        return mean.div_(count).to(gradient.device)
    rows, values = _own_rows(gradient)
    lengths = _lengths(rows.numel(), place, group)
    all_rows, all_values = (_from_all(part.to(place), lengths, group).to(gradient.device) for part in (rows, values))
    return torch.sparse_coo_tensor(all_rows.unsqueeze(0), all_values.div_(count), gradient.shape, check_invariants=False)


def _own_rows(gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Row numbers ``[n]`` and gradients ``[n, dim]`` to send: summed by row, unless that would need a wider type."""
    if gradient.dtype == torch.float32:
        gradient = sum_duplicates(gradient)
    return gradient._indices()[0], gradient._values()


def _lengths(own: int, place: torch.device, group: Group) -> list[int]:
    """How many rows each process has."""
    return gathered(torch.tensor(own, device=place), group).tolist()


def _from_all(own: Tensor, lengths: list[int], group: Group) -> Tensor:
    """``[n, ...]`` of every process, one after the other, whatever n is in each."""
    longest = max(lengths)
    padded = own.new_zeros((longest, *own.shape[1:]))
    padded[: len(own)] = own
    return torch.cat([part[:length] for part, length in zip(gathered(padded, group), lengths)])
