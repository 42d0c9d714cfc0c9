"""Tables of which every process of a training run holds a copy."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from engram.distributed import (
    Group,
    average_rows,
    everywhere_equal,
    from_first,
    group_for,
    is_divided,
    leave_at_exit,
    process_count,
    share_parameter,
    unshare_parameter,
)
from engram.errors import TableError
from engram.tables.base import EmbeddingTable
from engram.tables.sharded import ShardedTable

__all__ = ["Replicas", "are_equal_but_tables", "copy_all_but_tables", "replicate_tables"]

_SAMPLED = 4096
"""Rows by which copies are compared."""
_BLOCK = 1 << 16
_WHOLE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Whole numbers by their bytes."""
_IGNORED_BY_DDP = "_ddp_params_and_buffers_to_ignore"


class Replicas:
    """The trained tables of a model as copies that stay equal; ``replicate_tables`` makes it.

    Attributes:
        tables: the tables by their names in the model.
    """

    def __init__(self, tables: dict[str, EmbeddingTable], group: Group) -> None:
        self.tables, self._group = tables, group
        self._handles: list[Any] = []
        self._taken: dict[str, Tensor] = {}
        self._pass: int | None = None

    def are_equal(self) -> bool:
        """Whether all processes hold the same rows, judged by a sample of each table; all must ask."""
        return everywhere_equal({name: _digest(table) for name, table in self.tables.items()}, self._group)

    def remove(self) -> None:
        """Gradients are each process's own again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for table in self.tables.values():
            unshare_parameter(table.weight)

    def _listen(self) -> None:
        for name, table in self.tables.items():
            self._handles.append(table.weight.register_hook(partial(self._take, name)))
            share_parameter(table.weight, group_for(table.weight.device, self._group))

    def _take(self, name: str, gradient: Tensor) -> Tensor:
        """Keep a table's gradient until the backward pass is through, and let none through until then.

        Exchanged in the midst of it, rows and DDP's own gradients would go out in an order that differs between processes: DDP sends what is
        complete, and gradients of tables in host memory have a thread of their own.
        """
        current = torch._C._current_graph_task_id()
        if current != self._pass:  # what a pass that failed has left is forgotten
            self._pass, self._taken = current, {}
            torch.autograd.Variable._execution_engine.queue_callback(self._exchange)
        self._taken[name] = gradient
        return _nothing_like(gradient)

    def _exchange(self) -> None:
        """At the end of a backward pass: the mean over all processes is added to what each has."""
        taken, self._taken, self._pass = self._taken, {}, None
        for name, table in self.tables.items():
            weight = table.weight
            gradient = taken.get(name)
            if gradient is None:  # read in another process, it may be
                gradient = _no_rows(weight)
            mean = average_rows(gradient, group_for(weight.device, self._group))
            before = weight.grad
            weight.grad = mean if before is None or (before.is_sparse and before._nnz() == 0) else before + mean


def replicate_tables(model: nn.Module, group: Group = None) -> Replicas:
    """Make the trained tables of ``model`` copies that stay equal in all processes of ``group``, each of which calls this.

    DistributedDataParallel cannot: it would make the gradients of all rows dense. From here on every backward pass ends by averaging the
    gradients of the rows that were read (``engram.distributed.average_rows``), and DDP, if ``model`` is given to it afterwards, passes
    the tables by; those too that are divided between the processes and need no copies (``TableConfig(sharded=True)``). Rows of the first
    process are copied to the others if they differ. ``EngramTrainer`` calls this; loops of your own do so after choosing what is trained
    and before DDP. Every process must run a backward pass through the memory at every step, or the others wait for it.

    Args:
        model: an ``EngramModel``, or any module with tables in it; all that is trained among them counts.
        group: a ``torch.distributed`` process group; all processes if not given. With one process nothing is done.

    Raises:
        TableError: the processes do not have the same tables.
    """
    found = {name: module for name, module in model.named_modules() if isinstance(module, EmbeddingTable)}
    trained = _trained(found)
    replicas = Replicas(trained, group)
    if process_count(group) == 1:
        return replicas
    leave_at_exit()
    shapes = {name: (table.rows, table.dim, str(table.dtype)) for name, table in trained.items()}
    if not everywhere_equal(shapes, group):
        raise TableError(
            f"replicate_tables: got tables {shapes} here and others elsewhere, expected the same in every process."
        )
    if not replicas.are_equal():
        for table in trained.values():
            _copy_from_first(table, group)
    replicas._listen()
    _hide_from_ddp(model, found)
    return replicas


@torch.no_grad()
def copy_all_but_tables(model: nn.Module, group: Group = None) -> None:
    """Every process gets the first one's parameters and buffers, as DDP would have it, but for those of tables and what FSDP has divided."""
    for tensor in _all_but_tables(model):
        tensor.copy_(from_first(tensor, group))


@torch.no_grad()
def are_equal_but_tables(model: nn.Module, group: Group = None) -> bool:
    """Whether parameters and buffers, but for those of tables, are the same in all processes, by a sum of their bits; all must ask."""
    return everywhere_equal([_sum_of_bits(tensor) for tensor in _all_but_tables(model)], group)


def _all_but_tables(model: nn.Module) -> Iterator[Tensor]:
    tables = [module for module in model.modules() if isinstance(module, EmbeddingTable)]
    passed = {id(tensor) for table in tables for tensor in (*table.parameters(), *table.buffers())}
    return (tensor for tensor in (*model.parameters(), *model.buffers()) if id(tensor) not in passed and not is_divided(tensor))


def _sum_of_bits(tensor: Tensor) -> int:
    """A sum of whole numbers is exact in any order, and the same on every device."""
    values = tensor.detach().contiguous()
    numbers = torch.view_as_real(values) if values.is_complex() else values
    return int(numbers.view(_WHOLE[numbers.element_size()]).sum(dtype=torch.int64))


def _trained(tables: dict[str, EmbeddingTable]) -> dict[str, EmbeddingTable]:
    """Those that are whole and whose rows are stepped, each parameter once: a hybrid's is that of the table in it."""
    seen: set[int] = set()
    trained = {}
    for name, table in tables.items():
        weight = getattr(table, "weight", None)
        divided = isinstance(table, ShardedTable)
        if weight is not None and weight.requires_grad and not divided and id(weight) not in seen:
            seen.add(id(weight))
            trained[name] = table
    return trained


def _no_rows(weight: Tensor) -> Tensor:
    """The gradient of a table of which nothing was read."""
    numbers = torch.zeros((1, 0), dtype=torch.int64, device=weight.device)
    values = torch.zeros((0, weight.shape[1]), dtype=weight.dtype, device=weight.device)
    return torch.sparse_coo_tensor(numbers, values, weight.shape, check_invariants=False)


def _nothing_like(gradient: Tensor) -> Tensor:
    return _no_rows(gradient) if gradient.is_sparse else torch.zeros_like(gradient)


def _hide_from_ddp(model: nn.Module, tables: dict[str, EmbeddingTable]) -> None:
    """DDP asks the module itself what it shall neither average nor send."""
    names = {
        f"{place}.{name}" if place else name
        for place, table in tables.items()
        for name, _ in (*table.named_parameters(), *table.named_buffers())
    }
    setattr(model, _IGNORED_BY_DDP, sorted({*getattr(model, _IGNORED_BY_DDP, ()), *names}))


@torch.no_grad()
def _digest(table: EmbeddingTable) -> str:
    """Of rows at equal distances, and of nothing else: reading all may cost more than the step."""
    rows = torch.linspace(0, table.rows - 1, min(_SAMPLED, table.rows), dtype=torch.float64).long()
    sample = table.read(rows.to(table.weight.device), table.dtype).cpu().contiguous()
    return hashlib.sha256(sample.view(torch.uint8).numpy().tobytes()).hexdigest()


@torch.no_grad()
def _copy_from_first(table: EmbeddingTable, group: Group) -> None:
    for start, rows in table.iter_row_blocks(_BLOCK):
        table.load_rows(start, from_first(rows, group))
