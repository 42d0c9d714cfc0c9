"""Rows divided between the processes of a training run (as the paper trains: each device holds a part of every table)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Self

import torch
from torch import Tensor, nn

from engram.distributed import (
    Group,
    RowRequests,
    group_apart,
    is_fully_sharded,
    own_rows,
    process_count,
    process_rank,
    rows_from_all,
    rows_of_each,
    shard_parameter,
)
from engram.errors import TableError
from engram.ops import gradient_at
from engram.tables.base import EmbeddingTable, check_place, check_row_ids, refuse_assign, replaced
from engram.tables.device import DeviceTable

__all__ = ["ShardedTable", "is_in_parts", "is_sharded"]

_BLOCK = 1 << 16


class ShardedTable(EmbeddingTable):
    """A table of which every process holds a part: row r is row ``r // N`` of process ``r % N``.

    A look-up asks each row of the process that has it, and the backward pass brings gradients there, averaged over the processes as DDP
    averages others; the optimiser steps what is here. So all processes must look up at the same time, as they do in training, and
    whoever reads the whole table (``iter_row_blocks``, saving) does so in all of them. Values and gradients are those of a whole table.

    Args:
        part: room for this process's rows, ``ceil(rows / N)`` of them.
        rows: rows of the whole table.
        group: a ``torch.distributed`` process group; all processes if not given.

    Raises:
        TableError: the part is of another size.
    """

    def __init__(self, part: DeviceTable, rows: int, group: Group = None) -> None:
        super().__init__()
        self._processes = process_count(group)
        each = rows_of_each(rows, self._processes)
        if part.rows != each:
            raise TableError(f"ShardedTable: got a part of {part.rows} rows, expected {each}.")
        self.rows, self.dim, self.group = rows, part.dim, group
        self.__dict__["part"] = part  # not a submodule: its parameter is registered here, under the name that other tables have
        self.weight = part.weight
        shard_parameter(part.weight, group)

    @property
    def part(self) -> DeviceTable:
        """This process's rows."""
        return self.__dict__["part"]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.part._apply(fn)
        self.weight = self.part.weight
        shard_parameter(self.weight, self.group)
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy's parameter is a part too: copies of tensors forget what was noted on them."""
        super().__setstate__(state)
        shard_parameter(self.weight, self.group)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        """Into the part, which is what a state dict of this process holds.

        Raises:
            TableError: loaded tensors shall take the place of its own (``assign``).
        """
        refuse_assign(state_dict, prefix, local_metadata, "ShardedTable", "its part")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    @property
    def tier(self) -> str:
        """Where the parts are."""
        return self.part.tier

    @property
    def location(self) -> str:
        """Where the rows are, for people."""
        return f"{self.part.location}, part {process_rank(self.group) + 1} of {process_count(self.group)}"

    @property
    def nbytes(self) -> int:
        """Bytes of the rows in this process."""
        return self.part.nbytes

    def is_read_by(self, device: torch.device) -> bool:
        """Never: every look-up waits to learn how many rows travel."""
        return False

    def lookup(self, row_ids: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Rows ``[..., dim]``; gradients reach the parts that they belong to. All processes look up together."""
        if self.weight.requires_grad and torch.is_grad_enabled():
            return _Lookup.apply(self.weight, row_ids, dtype or self.dtype, self)
        rows, _ = self._fetch(row_ids)
        return rows.to(dtype or self.dtype)

    def _fetch(self, row_ids: Tensor) -> tuple[Tensor, RowRequests]:
        if process_count(self.group) != self._processes:
            raise TableError(
                f"ShardedTable: got {process_count(self.group)} process(es), expected the {self._processes} that hold its parts; save the "
                "memory while they are there (trainer.save_model), and load what was saved."
            )
        if row_ids.numel():
            check_row_ids(row_ids, self.rows)
        requests = RowRequests(row_ids, self.rows, group_apart(self.group))
        return requests.fetch(self.part.read(requests.wanted, self.dtype)), requests

    def update_rows(self, row_ids: Tensor, fn: Callable[[Tensor], Tensor]) -> None:
        """Replace rows; every process is given the same numbers and the same function, and does it for its own.

        Raises:
            TableError: as the tables of the parts.
        """
        count = process_count(self.group)
        mine = row_ids % count == process_rank(self.group)
        whole = self.lookup(row_ids).detach()
        new = replaced(whole, fn)
        self.part.update_rows(row_ids[mine] // count, lambda old: new[mine].to(old.device, old.dtype))

    def load_rows(self, start: int, rows: Tensor) -> None:
        """Put rows ``[n, dim]`` at ``start`` and after; every process is given all and keeps its own.

        Raises:
            TableError: they do not fit there, or a value is too large for the table's type.
        """
        check_place(start, rows, self.rows, self.dim)
        first, own = own_rows(start, rows, self.group)
        self.part.load_rows(first, own)

    def iter_row_blocks(self, block_rows: int = _BLOCK) -> Iterator[tuple[int, Tensor]]:
        """Blocks of the whole table, the same in every process; all iterate together."""
        for start in range(0, self.rows, block_rows):
            yield start, rows_from_all(self.weight.detach(), start, min(start + block_rows, self.rows), self.group)

    def stored_blocks(self, block_rows: int = _BLOCK) -> Iterator[tuple[Tensor]]:
        """As ``iter_row_blocks``, for saving."""
        for _, rows in self.iter_row_blocks(block_rows):
            yield (rows,)


def is_sharded(model: nn.Module) -> bool:
    """Whether this process holds only a part of some table of ``model``."""
    return any(isinstance(module, ShardedTable) for module in model.modules())


def is_in_parts(model: nn.Module) -> bool:
    """Whether this process holds only a part of some table of ``model``, or of its weights (FSDP): all save it together."""
    return is_sharded(model) or is_fully_sharded(model)


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, weight: Tensor, row_ids: Tensor, dtype: torch.dtype, table: ShardedTable) -> Tensor:
        rows, context.requests = table._fetch(row_ids)
        context.shape, context.dtype, context.device = weight.shape, weight.dtype, weight.device
        context.processes = process_count(table.group)
        return rows.to(dtype)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        values = (context.requests.give_back(gradients[0]) / context.processes).to(context.dtype)
        numbers = context.requests.wanted.unsqueeze(0)
        gradient = torch.sparse_coo_tensor(numbers, values, context.shape, check_invariants=False)
        return gradient_at(gradient, context.device), None, None, None
