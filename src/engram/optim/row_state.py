"""What an optimiser remembers about the rows of a table: named buffers that grow with the rows ever touched."""

from __future__ import annotations

import mmap
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engram.errors import CheckpointError, ConfigError
from engram.native.rows import claim_slots

__all__ = ["ROW_STATES", "RowMoments", "check_row_state", "rows_by_reference"]

_FIRST_CAPACITY = 1024
_WORTH_RESERVING = 1 << 16  # bytes; less than that is copied sooner than mapped
_MAP_NORESERVE = 0x4000  # Linux; the mmap module does not name it everywhere
_PER_VALUE, _PER_ROW = True, False
_by_reference = ContextVar("rows_by_reference", default=False)

ROW_STATES: dict[str, dict[str, bool]] = {
    "adam": {"exp_avg": _PER_VALUE, "exp_avg_sq": _PER_VALUE},
    "rowwise_adam": {"exp_avg": _PER_VALUE, "exp_avg_sq_of_row": _PER_ROW},
    "rowwise_adagrad": {"square_sum_of_row": _PER_ROW},
}
"""Kinds of row state: the names of their buffers, and whether one holds a number per value or one per row.

No two kinds have the same names, so a saved state tells its kind.
"""


def check_row_state(kind: object) -> None:
    """Refuse a kind of row state that does not exist.

    Raises:
        ConfigError: with the kinds there are.
    """
    if kind not in ROW_STATES:
        raise ConfigError(f"EngramAdamW: got row_state={kind!r}, expected one of {', '.join(ROW_STATES)}.")


@contextmanager
def rows_by_reference() -> Iterator[None]:
    """Inside, ``RowMoments.state_dict`` gives the buffers themselves, which the next step changes: for a caller who writes them at once."""
    before = _by_reference.set(True)
    try:
        yield
    finally:
        _by_reference.reset(before)


class RowMoments:
    """The state of one table's rows that have ever had a gradient, in growing compact buffers.

    Args:
        table: ``[rows, ...]``.
        kind: a name of ``ROW_STATES``, which says what buffers there are.

    Attributes:
        kind: as given.
        used: rows seen; only the first ``used`` entries of the buffers below are meaningful.
        slot_of_row: int32 ``[rows]``, 1 + position of the row's state, 0 if it has none; on the CPU lazily mapped memory, so an
            untouched region of the table costs nothing here either.
        row_of_slot: int64 ``[capacity]``, the inverse, so that saving need not scan the whole table.
        buffers: by name, float32 ``[capacity, dim]`` or ``[capacity]``.
    """

    def __init__(self, table: Tensor, kind: str = "adam") -> None:
        check_row_state(kind)
        self.kind, self.used = kind, 0
        self._shape, self._device = table.shape, table.device
        self._clear()

    def _clear(self) -> None:
        self.used = 0
        self.slot_of_row = _lazy_zeros(self._shape[0], self._device)
        self.row_of_slot = torch.empty(0, dtype=torch.int64, device=self._device)
        self.buffers = {
            name: torch.empty((0, *tail), dtype=torch.float32, device=self._device) for name, tail in self._tails().items()
        }

    def _tails(self) -> dict[str, tuple[int, ...]]:
        """Shape of one row's entry in each buffer."""
        return {name: tuple(self._shape[1:]) if per_value else () for name, per_value in ROW_STATES[self.kind].items()}

    def slots(self, rows: Tensor) -> Tensor:
        """Positions of the state of ``rows`` (int64 ``[n]``, no row twice); new rows start with zeros."""
        self._make_room(self.used + rows.numel())
        start = self.used
        try:
            slots, used = claim_slots(rows, self.slot_of_row, self.row_of_slot, start)
            # Reserved memory is zero, but reading a page before it is written costs a second fault.
            for buffer in self.buffers.values():
                buffer[start:used] = 0
        except BaseException:
            self._give_back(rows)
            raise
        self.used = used
        return slots

    def _give_back(self, rows: Tensor) -> None:
        """Take slots beyond ``used`` from rows again, where Ctrl-C came before they counted: the next row would get the same."""
        known = rows[(rows >= 0) & (rows < self._shape[0])]
        self.slot_of_row[known[self.slot_of_row[known] > self.used]] = 0

    def _make_room(self, needed: int) -> None:
        """Room for ``needed`` rows, which counts every row of a step as new, so that finding and numbering rows is one pass."""
        capacity, table_rows = self.row_of_slot.shape[0], self._shape[0]
        if min(needed, table_rows) <= capacity or (capacity == 0 and self._reserve()):
            return
        # Doubling: a row is copied a bounded number of times on average.
        larger = min(max(needed, 2 * capacity, _FIRST_CAPACITY), table_rows)
        self.row_of_slot = self._grown(self.row_of_slot, larger)
        self.buffers = {name: self._grown(buffer, larger) for name, buffer in self.buffers.items()}

    def _reserve(self) -> bool:
        """Try to have address space for the whole table, so that growing copies nothing: pages are taken when they are written."""
        if self._device.type != "cpu":
            return False
        rows = _reserved_memory((self._shape[0],), torch.int64)
        buffers = {name: _reserved_memory((self._shape[0], *tail), torch.float32) for name, tail in self._tails().items()}
        found = {name: buffer for name, buffer in buffers.items() if buffer is not None}
        if rows is None or len(found) < len(buffers):
            return False
        self.row_of_slot, self.buffers = rows, found
        return True

    def _grown(self, old: Tensor, capacity: int) -> Tensor:
        new = torch.empty((capacity, *old.shape[1:]), dtype=old.dtype, device=old.device)
        new[: self.used] = old[: self.used]
        return new

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: the rows seen, not the address space."""
        return {"shape": self._shape, "device": self._device, "kind": self.kind, "state": self.state_dict()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.kind, self._shape, self._device = state["kind"], state["shape"], state["device"]
        self._clear()
        self.load_state_dict(state["state"])

    def state_dict(self) -> dict[str, Tensor]:
        """Compact tensors: the rows seen, in slot order, and their buffers by name."""
        names = {"rows": self.row_of_slot, **self.buffers}
        found = {name: tensor[: self.used] for name, tensor in names.items()}
        return found if _by_reference.get() else {name: tensor.clone() for name, tensor in found.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what ``state_dict`` gave, exactly.

        Raises:
            CheckpointError: the state is malformed, of another kind, or belongs to a table of another shape; nothing is changed then.
        """
        self._check(state)
        self._clear()
        slots = self.slots(state["rows"].to(self._device))
        for name, buffer in self.buffers.items():
            buffer[slots] = state[name].to(self._device, torch.float32)

    def _check(self, state: dict[str, Tensor]) -> None:
        if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
            raise CheckpointError(
                "optimiser state: got a row state that is no mapping of tensors; resume from an earlier checkpoint."
            )
        names = set(state) - {"rows"}
        if "rows" not in state or names != set(self.buffers):
            saved = next((kind for kind, buffers in ROW_STATES.items() if set(buffers) == names), f"buffers {sorted(names)}")
            raise CheckpointError(
                f"optimiser state: got row state {saved}, expected {self.kind}; make the optimiser with the row_state it was saved with."
            )
        rows, table_rows = state["rows"], self.slot_of_row.shape[0]
        if rows.dtype != torch.int64 or rows.dim() != 1:
            raise CheckpointError(
                f"optimiser state: got row numbers {rows.dtype} {list(rows.shape)}, expected int64 [n]; resume from an earlier checkpoint."
            )
        got = {name: tuple(state[name].shape) for name in self.buffers}
        expected = {name: (rows.numel(), *buffer.shape[1:]) for name, buffer in self.buffers.items()}
        highest = int(rows.max()) if rows.numel() else 0
        outside = highest >= table_rows or (rows.numel() > 0 and int(rows.min()) < 0)
        if got != expected or outside or rows.unique().numel() != rows.numel():
            raise CheckpointError(
                f"optimiser state: got {got} for rows up to {highest}, expected {expected} for different rows below {table_rows}; "
                "it belongs to another table."
            )


def _lazy_zeros(rows: int, device: torch.device) -> Tensor:
    """int32 zeros; on the CPU from ``calloc``, whose pages exist once touched (``torch.zeros`` writes them all)."""
    if device.type != "cpu":
        return torch.zeros(rows, dtype=torch.int32, device=device)
    return torch.from_numpy(np.zeros(rows, dtype=np.int32))


def _reserved_memory(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
    """Zeros whose pages exist once written and count for nothing before; None where the system does not offer that."""
    size = torch.Size(shape).numel() * dtype.itemsize
    if sys.platform != "linux" or size < _WORTH_RESERVING or not _address_space_is_free():
        return None
    with suppress(OSError, ValueError, OverflowError):
        pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
        return torch.frombuffer(pages, dtype=dtype).view(shape)
    return None


def _address_space_is_free() -> bool:
    """Whether reserving costs nothing: no limit on a process's addresses, and no strict accounting of memory promised."""
    import resource

    with suppress(OSError):
        strict = Path("/proc/sys/vm/overcommit_memory").read_text().strip() == "2"
        return not strict and resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY
    return False
