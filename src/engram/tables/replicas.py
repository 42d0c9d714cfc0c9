"""Tables of which every process of a training run holds a copy."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from engram.distributed import (
    Group,
    average_rows,
    everywhere_equal,
    from_first,
    leave_at_exit,
    process_count,
    shard_group,
    share_parameter,
)
from engram.errors import TableError
from engram.tables.base import EmbeddingTable

__all__ = ["Replicas", "replicate_tables"]

_SAMPLED = 4096
"""Rows by which copies are compared."""
_BLOCK = 1 << 16
_IGNORED_BY_DDP = "_ddp_params_and_buffers_to_ignore"


class Replicas:
    """The trained tables of a model as copies that stay equal; ``replicate_tables`` makes it.

    Attributes:
        tables: the tables by their names in the model.
    """

    def __init__(self, tables: dict[str, EmbeddingTable], group: Group) -> None:
        self.tables, self._group = tables, group
        self._handles: list[Any] = []

    def are_equal(self) -> bool:
        """Whether all processes hold the same rows, judged by a sample of each table; all must ask."""
        return everywhere_equal({name: _digest(table) for name, table in self.tables.items()}, self._group)

    def remove(self) -> None:
        """Gradients are each process's own again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _listen(self) -> None:
        for table in self.tables.values():
            self._handles.append(table.weight.register_hook(_averaging(self._group)))
            share_parameter(table.weight, self._group)


def replicate_tables(model: nn.Module, group: Group = None) -> Replicas:
    """Make the trained tables of ``model`` copies that stay equal in all processes of ``group``, each of which calls this.

    DistributedDataParallel cannot: it would make the gradients of all rows dense. From here on the backward pass itself averages the
    gradients of the rows that were read (``engram.distributed.average_rows``), and DDP, if ``model`` is given to it afterwards, passes
    the tables by; those too that are divided between the processes and need no copies (``TableConfig(sharded=True)``). Rows of the first
    process are copied to the others if they differ. ``EngramTrainer`` calls this; loops of your own do so after choosing what is trained
    and before DDP. Every process must run the same layers at every step, or the others wait for it.

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


def _trained(tables: dict[str, EmbeddingTable]) -> dict[str, EmbeddingTable]:
    """Those that are whole and whose rows are stepped, each parameter once: a hybrid's is that of the table in it."""
    seen: set[int] = set()
    trained = {}
    for name, table in tables.items():
        weight = getattr(table, "weight", None)
        if weight is not None and weight.requires_grad and shard_group(weight) is None and id(weight) not in seen:
            seen.add(id(weight))
            trained[name] = table
    return trained


def _averaging(group: Group) -> Callable[[Tensor], Tensor]:
    return lambda gradient: average_rows(gradient, group)


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
