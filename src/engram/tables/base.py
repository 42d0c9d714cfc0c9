"""The one interface behind which rows live."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from engram.errors import TableError
from engram.tables.prefetch import RowPrefetcher

__all__ = [
    "EmbeddingTable",
    "announce_step",
    "check_place",
    "check_row_ids",
    "refuse_assign",
    "replaced",
    "row_parameters",
    "tell_before_steps",
]

_TOLD = "_engram_before_step"


class EmbeddingTable(nn.Module):
    """Rows of one layer's memory, wherever they are stored.

    A layer asks for rows by number and never knows where they live; a new tier is a new subclass and nothing else.
    """

    rows: int
    """Number of rows."""
    dim: int
    """Values per row."""

    weight: Tensor
    """Values of the stored rows, where they are one tensor; a tier that keeps them otherwise says itself what and where they are."""

    @property
    def dtype(self) -> torch.dtype:
        """Storage type of the rows."""
        return self.weight.dtype

    @property
    def value_dtype(self) -> torch.dtype:
        """Type that rows are read in where no other is asked for."""
        return self.dtype

    @property
    def tier(self) -> str:
        """``device``, ``host``, ``mmap`` or ``hybrid`` (see ``TableConfig``)."""
        return "device"

    @property
    def format_name(self) -> str:
        """How rows are stored, by its name in ``FORMATS``."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def can_be_trained(self) -> bool:
        """Whether rows are a parameter that may be written."""
        return True

    @property
    def location(self) -> str:
        """Where the rows are, for people (``cpu``, ``cuda:0``, a file)."""
        return str(self.weight.device)

    @property
    def stored_rows(self) -> int:
        """Rows that take up space."""
        return self.rows

    @abstractmethod
    def lookup(self, row_ids: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Rows ``[..., dim]`` of int64 ``row_ids [...]`` in ``dtype`` (None: ``value_dtype``); gradients reach the touched rows only.

        What this table's ``prefetch`` gave may stand for the numbers; rows then come in the type that was asked for there.
        """

    def read(self, row_ids: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """Rows ``[..., dim]`` on the device of ``row_ids``, into ``out`` (contiguous) if given; no gradient."""
        with torch.no_grad():
            rows = self.lookup(row_ids, dtype)
        return rows if out is None else out.copy_(rows)

    def prefetch(self, row_ids: Tensor, dtype: torch.dtype | None = None, through: RowPrefetcher | None = None) -> Any:
        """Start fetching rows; what comes back may be given to ``lookup`` in place of the numbers.

        Where there is nothing to fetch, or nothing is gained by it, the numbers come back.
        """
        return row_ids

    def is_read_by(self, device: torch.device) -> bool:
        """Whether ``device`` fetches rows by itself, so that a look-up neither waits for it nor keeps the CPU busy."""
        return device.type != "cpu" and self.weight.device == device

    @abstractmethod
    def update_rows(self, row_ids: Tensor, fn: Callable[[Tensor], Tensor]) -> None:
        """Replace ``rows[row_ids]`` by ``fn(rows[row_ids])``; ``row_ids`` ``[n]`` must hold no row twice."""

    @abstractmethod
    def iter_row_blocks(self, block_rows: int = 1 << 16) -> Iterator[tuple[int, Tensor]]:
        """Pairs (first row, rows ``[n, dim]``) over the whole table, for saving and converting without a second copy of it."""

    def load_rows(self, start: int, rows: Tensor) -> None:
        """Put rows ``[n, dim]`` of any floating type at ``start`` and after, in the table's own format; for filling a table from a file."""
        numbers = torch.arange(start, start + rows.shape[0], device=self.weight.device)
        self.update_rows(numbers, lambda old: rows.to(old.device, old.dtype))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """As ``nn.Module``, when rows may be written."""
        if any(name.startswith(prefix) for name in state_dict):
            self._before_writing()
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _before_writing(self) -> None:
        """Called when rows were found fit to be written, before the first of them is."""

    @property
    def nbytes(self) -> int:
        """Bytes of the rows."""
        return self.stored_rows * self.dim * self.dtype.itemsize

    def extra_repr(self) -> str:
        """Shown by ``print(module)``."""
        return f"rows={self.rows}, dim={self.dim}, dtype={self.dtype}, location={self.location}"


def row_parameters(model: nn.Module) -> set[int]:
    """Ids of the parameters of ``model`` that are rows of a table."""
    return {id(p) for module in model.modules() if isinstance(module, EmbeddingTable) for p in module.parameters()}


def tell_before_steps(parameter: Tensor, told: Callable[[], None]) -> None:
    """Have ``told`` called before an optimiser of ours writes rows of ``parameter``."""
    setattr(parameter, _TOLD, told)


def announce_step(parameter: Tensor) -> None:
    """Tell whoever asked (``tell_before_steps``) that rows of ``parameter`` are about to be written."""
    getattr(parameter, _TOLD, _nothing)()


def _nothing() -> None:
    pass


def check_row_ids(row_ids: Tensor, count: int) -> None:
    """Refuse numbers (at least one) that are none of ``count`` rows.

    Raises:
        TableError: there is one.
    """
    low, high = int(row_ids.min()), int(row_ids.max())
    if low < 0 or high >= count:
        raise TableError(f"row_ids: got {low}..{high}, expected 0..{count - 1}.")


def replaced(old: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
    """What ``fn`` makes of rows.

    Raises:
        TableError: it is of another shape.
    """
    new = fn(old)
    if new.shape != old.shape:
        raise TableError(f"update_rows: fn returned shape {list(new.shape)}, expected {list(old.shape)}.")
    return new


def refuse_assign(state_dict: Mapping[str, Any], prefix: str, local_metadata: Mapping[str, Any], table: str, left: str) -> None:
    """Refuse to load tensors in the place of a table's own, where those are more than a tensor.

    Args:
        state_dict: as ``nn.Module._load_from_state_dict`` is given it, and the next two too.
        prefix: what the table's names begin with.
        local_metadata: says whether they shall be assigned.
        table: who refuses, for people.
        left: what would be left.

    Raises:
        TableError: there is one to be assigned.
    """
    if local_metadata.get("assign_to_params_buffers") and any(name.startswith(prefix) for name in state_dict):
        raise TableError(f"{table}: got load_state_dict(assign=True), which would leave {left}; load without assign.")


def check_place(start: int, rows: Tensor, count: int, dim: int) -> None:
    """Refuse rows that do not fit at ``start`` of a table of ``count`` rows.

    Raises:
        TableError: they do not.
    """
    if start < 0 or start + rows.shape[0] > count or rows.shape[1:] != (dim,):
        raise TableError(f"load_rows: got {list(rows.shape)} at row {start}, expected [n, {dim}] up to row {count - 1}.")
