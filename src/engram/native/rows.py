"""Row numbers grouped, gradients summed and rows stepped by the native core, with every address checked here.

Each function says whether the native core can do it; where it cannot, the same is done by PyTorch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engram import native

__all__ = ["RowGroups", "claim_slots", "serves", "step_rows", "sum_duplicates"]

_TYPES = {torch.float32: 0, torch.bfloat16: 1}
_STATES = {"adam": 0, "rowwise_adam": 1, "rowwise_adagrad": 2}


def serves(*tensors: Tensor) -> bool:
    """Whether the kernels can work on these: in memory, contiguous, on the CPU, all float32 or all bfloat16."""
    return (
        native.core() is not None
        and tensors[0].dtype in _TYPES
        and native.have_addresses(*tensors)
        and all(t.device.type == "cpu" and t.is_contiguous() and t.dtype == tensors[0].dtype for t in tensors)
    )


class RowGroups:
    """Which gradients belong to which row.

    Args:
        row_ids: int64 ``[n]`` on the CPU.
        table_rows: rows of the table.
        unique: whether no row comes twice; nothing is sorted then.

    Attributes:
        rows: int64 ``[count]``, no row twice; ascending unless ``unique``.

    Raises:
        IndexError: with the first row number that is out of range.
    """

    def __init__(self, row_ids: Tensor, table_rows: int, unique: bool = False) -> None:
        row_ids = _row_numbers(row_ids)
        self.gradients = n = row_ids.numel()
        self.table_rows = table_rows
        self._starts = self._order = None
        if unique:
            self.rows = row_ids
            if not _all_below(row_ids, table_rows):
                raise IndexError(int(row_ids.max()))
            return
        rows, self._starts, self._order = (torch.empty(size, dtype=torch.int64, device="cpu") for size in (n, n + 1, n))
        count = native.core().group_rows(
            row_ids.data_ptr(), n, table_rows, rows.data_ptr(), self._starts.data_ptr(), self._order.data_ptr()
        )
        if count < 0:
            raise IndexError(int(row_ids[-1 - count]))
        self.rows = rows[:count]

    @property
    def addresses(self) -> tuple[int, int, int, int]:
        """For the kernels."""
        starts, order = (0 if t is None else t.data_ptr() for t in (self._starts, self._order))
        return self.rows.data_ptr(), starts, order, self.rows.numel()


def sum_duplicates(gradient: Tensor) -> Tensor:
    """A sparse gradient without duplicate rows: as ``coalesce``, but types of 16 bits come as float32, in which their sums are taken.

    Args:
        gradient: ``[rows, dim]`` with one sparse dimension.
    """
    values = gradient._values()
    if gradient.is_coalesced() or gradient.sparse_dim() != 1 or values.dim() != 2 or not serves(values.contiguous()):
        wide = torch.promote_types(values.dtype, torch.float32)
        return (gradient if wide == values.dtype else gradient.to(wide)).coalesce()
    values, dim = values.contiguous(), values.shape[1]
    groups = RowGroups(gradient._indices()[0], gradient.shape[0])
    out = torch.empty((groups.rows.numel(), dim), dtype=torch.float32, device="cpu")
    native.core().sum_rows(
        *groups.addresses, values.data_ptr(), _TYPES[values.dtype], dim, out.data_ptr(), torch.get_num_threads()
    )
    indices = groups.rows.unsqueeze(0)
    return torch.sparse_coo_tensor(indices, out, gradient.shape, device=out.device, is_coalesced=True, check_invariants=False)


def claim_slots(rows: Tensor, slot_of_row: Tensor, row_of_slot: Tensor, used: int) -> tuple[Tensor, int]:
    """Slots int64 ``[n]`` of rows, and how many are in use then; a row without one gets the next that is free.

    Args:
        rows: int64 ``[n]``, no row twice.
        slot_of_row: int32 ``[table_rows]``, 1 + slot or 0; written.
        row_of_slot: int64 ``[capacity]``; written.
        used: slots in use.
    """
    if native.core() is None or rows.device.type != "cpu" or slot_of_row.device.type != "cpu":
        return _claim_slots_in_pytorch(rows, slot_of_row, row_of_slot, used)
    rows = _row_numbers(rows)
    if slot_of_row.dtype != torch.int32 or row_of_slot.dtype != torch.int64 or not (0 <= used <= row_of_slot.numel()):
        raise ValueError(
            f"claim_slots: got {slot_of_row.dtype}, {row_of_slot.dtype} and {used} of {row_of_slot.numel()} slots."
        )
    if not (slot_of_row.is_contiguous() and row_of_slot.is_contiguous() and row_of_slot.device.type == "cpu"):
        raise ValueError("claim_slots: expected contiguous tensors on the CPU.")
    slots, n, capacity = torch.empty_like(rows), rows.numel(), row_of_slot.numel()
    seen, inverse = (slot_of_row.data_ptr(), slot_of_row.numel()), (row_of_slot.data_ptr(), capacity)
    now = native.core().claim_slots(rows.data_ptr(), n, *seen, *inverse, used, slots.data_ptr())
    if now < 0:
        raise IndexError(int(rows[-1 - now]))
    return slots, now


def _claim_slots_in_pytorch(rows: Tensor, slot_of_row: Tensor, row_of_slot: Tensor, used: int) -> tuple[Tensor, int]:
    found = slot_of_row[rows]
    new = rows[found == 0]
    now = used + new.numel()
    if new.numel():
        row_of_slot[used:now] = new
        slot_of_row[new] = torch.arange(used + 1, now + 1, dtype=torch.int32, device=new.device)
        found = slot_of_row[rows]
    return found.long() - 1, now


def step_rows(
    table: Tensor,
    groups: RowGroups,
    gradients: Tensor,
    kind: str,
    slots: Tensor,
    buffers: dict[str, Tensor],
    numbers: tuple[float, float, float, float, float, float],
    seed: int | None,
) -> None:
    """Change rows of ``table`` and their state in place, in one pass; duplicate gradients are summed on the way.

    Args:
        table: ``[rows, dim]``, see ``serves``.
        groups: which of the gradients belong to which row.
        gradients: ``[n, dim]`` in the table's type.
        kind: ``adam``, ``rowwise_adam`` or ``rowwise_adagrad``.
        slots: int64 ``[len(groups.rows)]``, where the state of each row is in the buffers.
        buffers: float32, those of the kind, in its order: ``[capacity, dim]`` or, for one number per row, ``[capacity]``.
        numbers: step size, beta1, beta2, eps, what weight decay leaves of a row, sign of the gradient.
        seed: of stochastic rounding of bfloat16; None rounds to nearest.
    """
    dim = table.shape[1]
    expected = {"adam": ((dim,), (dim,)), "rowwise_adam": ((dim,), ()), "rowwise_adagrad": ((),)}[kind]
    shapes = tuple(tuple(buffer.shape[1:]) for buffer in buffers.values())
    rest = (*buffers.values(), slots)
    if not serves(table, gradients) or not all(t.is_contiguous() and t.device.type == "cpu" for t in rest):
        raise ValueError("step_rows: expected contiguous float32 or bfloat16 tensors of one type on the CPU.")
    if shapes != expected or any(buffer.dtype != torch.float32 for buffer in buffers.values()):
        raise ValueError(f"step_rows: got buffers {shapes}, expected float32 {expected} for {kind}.")
    if gradients.shape != (groups.gradients, dim) or table.shape[0] != groups.table_rows:
        raise ValueError(f"step_rows: got gradients {list(gradients.shape)}, expected {[groups.gradients, dim]}.")
    capacity = min(buffer.shape[0] for buffer in buffers.values())
    if slots.shape != groups.rows.shape or slots.dtype != torch.int64 or not _all_below(slots, capacity):
        raise ValueError(f"step_rows: got slots {slots.dtype} {list(slots.shape)}, expected one below {capacity} for each row.")
    *first, second = buffers.values()
    packed = torch.tensor(numbers, dtype=torch.float64, device="cpu")
    native.core().step_rows(
        *groups.addresses,
        table.data_ptr(),
        dim,
        _TYPES[table.dtype],
        gradients.data_ptr(),
        _STATES[kind],
        slots.data_ptr(),
        first[0].data_ptr() if first else 0,
        second.data_ptr(),
        packed.data_ptr(),
        seed is not None,
        seed or 0,
        torch.get_num_threads(),
    )


def _all_below(slots: Tensor, capacity: int) -> bool:
    if slots.numel() == 0:
        return True
    lowest, highest = torch.aminmax(slots)
    return int(lowest) >= 0 and int(highest) < capacity


def _row_numbers(row_ids: Tensor) -> Tensor:
    if row_ids.dtype != torch.int64 or row_ids.dim() != 1 or row_ids.device.type != "cpu":
        raise ValueError(
            f"got row numbers {row_ids.dtype} {list(row_ids.shape)} on {row_ids.device}, expected int64 [n] on the CPU."
        )
    return row_ids.contiguous()
