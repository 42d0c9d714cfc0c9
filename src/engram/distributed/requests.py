"""Rows asked of the processes that own them, and gradients brought back to them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from engram.distributed.processes import Group, device_of, gathered, process_count, process_rank
from engram.errors import TableError

__all__ = ["RowRequests", "own_rows", "rows_from_all", "rows_of_each"]


def rows_of_each(rows: int, count: int) -> int:
    """How many of ``rows`` each of ``count`` processes has room for: row r is row ``r // count`` of process ``r % count``."""
    return -(-rows // count)


@contextmanager
def _all_taking_part() -> Iterator[None]:
    """
    Raises:
        TableError: an exchange failed, most often because others were not there.
    """
    try:
        yield
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise TableError(
            f"sharded tables: this process could not exchange rows with the others ({reason}). Each holds a part, so that all must look up, "
            "generate, evaluate and save together; a process that ended, or failed, is missing."
        ) from error


class RowRequests:
    """One look-up in a table whose rows are divided between processes: who wants what of whom. All processes make one together.

    Numbers that a process asks for more than once travel once. (Here the host waits for the device: how many rows travel must be known.)

    Args:
        row_ids: int64, any shape, from 0 on and below ``rows``.
        rows: rows of the whole table.
        group: the processes, in the order of their parts.

    Attributes:
        wanted: int64 ``[m]``, numbers within this process's part that others and itself ask for, on the device of the exchange.
    """

    def __init__(self, row_ids: Tensor, rows: int, group: Group = None) -> None:
        self._group, count = group, process_count(group)
        self._shape, self._home = row_ids.shape, row_ids.device
        per = rows_of_each(rows, count)
        numbers = row_ids.reshape(-1).to(device_of(group, row_ids.device))
        # Sorted by owner, so that what goes to one process lies together.
        keys, self._places = ((numbers % count) * per + numbers // count).unique(return_inverse=True)
        asked = torch.bincount(keys // per, minlength=count)
        wanted = torch.empty_like(asked)
        with _all_taking_part():
            dist.all_to_all_single(wanted, asked, group=group)
        self._asked, self._wanted = torch.stack([asked, wanted]).tolist()
        self.wanted = self._exchange(keys % per, self._wanted, self._asked)

    def fetch(self, rows: Tensor) -> Tensor:
        """Rows ``[..., dim]`` in the order of ``row_ids``, on its device.

        Args:
            rows: ``[m, dim]``, the rows of this process that are ``wanted``.
        """
        mine = self._exchange(rows, self._asked, self._wanted)
        return mine[self._places].view(*self._shape, rows.shape[-1]).to(self._home)

    def give_back(self, gradients: Tensor) -> Tensor:
        """What ``gradients [..., dim]`` of the rows that were fetched, here and elsewhere, come to for ``wanted``: float32 ``[m, dim]``."""
        flat = gradients.reshape(-1, gradients.shape[-1]).to(self._places.device, torch.float32)
        summed = flat.new_zeros((sum(self._asked), flat.shape[1])).index_add_(0, self._places, flat)
        return self._exchange(summed, self._wanted, self._asked)

    def _exchange(self, sent: Tensor, received: Sequence[int], sizes: Sequence[int]) -> Tensor:
        """The first ``sizes[0]`` of ``sent`` go to the first process and so on; ``received`` as many come from each."""
        out = sent.new_empty((sum(received), *sent.shape[1:]))
        with _all_taking_part():
            dist.all_to_all_single(out, sent.contiguous(), list(received), list(sizes), group=self._group)
        return out


def rows_from_all(part: Tensor, start: int, stop: int, group: Group = None) -> Tensor:
    """Consecutive rows ``[stop - start, dim]`` of a divided table, on the device of ``part``; all processes ask together.

    Args:
        part: this process's rows ``[n, dim]``.
        start: the first row.
        stop: the row after the last.
        group: the processes.
    """
    count = process_count(group)
    first, last = start // count, rows_of_each(stop, count)
    own = part[first:last].to(device_of(group, part.device))
    with _all_taking_part():
        parts = gathered(own, group)
    rows = parts.transpose(0, 1).reshape(-1, *own.shape[1:])
    return rows[start - first * count : stop - first * count].to(part.device)


def own_rows(start: int, rows: Tensor, group: Group = None) -> tuple[int, Tensor]:
    """Which of consecutive ``rows [n, dim]`` of the whole table belong to this process, and at which of its rows they start."""
    count = process_count(group)
    skipped = (process_rank(group) - start) % count
    return (start + skipped) // count, rows[skipped::count]
