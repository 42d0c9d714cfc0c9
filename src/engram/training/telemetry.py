"""What the layers of a memory do in a training step, in figures for the log."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from engram.distributed import shard_group, sum_everywhere
from engram.models import EngramModel
from engram.optim import clip_grad_norm_

__all__ = ["MemoryTelemetry"]

_CLOSED = 0.1
"""A gate below lets next to nothing through."""


class MemoryTelemetry:
    """Figures of one step, over all its batches and processes; the names of each layer's begin with ``memory/layer<id>/``.

    - ``gate_mean``, ``gate_std``: over positions and residual streams.
    - ``gate_closed``: share of gates below 0.1.
    - ``added``: root mean square of what the layer adds to the hidden state over that of the hidden state.
    - ``grad_norm_reader``: of projections, norms and the convolution, before clipping; where they are trained.
    - ``grad_norm_rows``: of the rows that were read, duplicates summed, before clipping; where rows are trained.
    - ``rows_touched``: how many different rows have a gradient that is not zero.

    Positions that are padding, and sequences that do not read (``memory_dropout``), count for nothing. Nothing is computed but from what
    the step has computed anyway, and nothing of the step is changed.
    """

    def __init__(self) -> None:
        self._step: int | None = None
        self._sums: dict[int, Tensor] = {}
        self._norms: dict[str, Tensor] = {}

    @torch.no_grad()
    def add(
        self, step: int, traces: Mapping[int, Mapping[str, Tensor]], mask: Tensor | None = None, route: Tensor | None = None
    ) -> None:
        """Take in what a forward pass recorded.

        Args:
            step: which step it is part of; what another step has left is forgotten.
            traces: from ``EngramModel.record``.
            mask: ``[B, T]``, zero at padding; of another shape it is not heeded.
            route: bool ``[B]``, the sequences that read; all if not given.
        """
        if step != self._step:
            self._step, self._sums, self._norms = step, {}, {}
        for layer_id, trace in traces.items():
            if "gate" in trace and "added" in trace:
                sums = _sums(trace, mask, route)
                self._sums[layer_id] = self._sums[layer_id] + sums if layer_id in self._sums else sums

    @property
    def is_due(self) -> bool:
        """Whether anything was taken in since the last ``read``."""
        return bool(self._sums)

    def measure_gradients(self, memory: EngramModel) -> None:
        """Take in the gradients of a step, when they are whole and before they are clipped; all processes together."""
        for layer_id in self._sums:
            engram = memory.engrams[str(layer_id)]
            table, reader = list(engram.table.parameters()), engram.reader_parameters()
            at = _name(layer_id)
            if any(parameter.requires_grad for parameter in reader):
                self._norms[f"{at}grad_norm_reader"] = clip_grad_norm_(reader, float("inf"))
            if any(parameter.requires_grad for parameter in table):
                self._norms[f"{at}grad_norm_rows"] = clip_grad_norm_(table, float("inf"))
                self._norms[f"{at}rows_touched"] = torch.stack([_rows(parameter) for parameter in table]).sum()

    def read(self) -> dict[str, float]:
        """The figures, which are forgotten then; all processes together."""
        sums, norms, self._sums, self._norms = self._sums, self._norms, {}, {}
        figures: dict[str, float] = {}
        for layer_id, own in sums.items():
            figures |= _figures(_name(layer_id), sum_everywhere(own).tolist())
            figures |= {name: _short(norms[name]) for name in norms if name.startswith(_name(layer_id))}
        return figures


def _name(layer_id: int) -> str:
    return f"memory/layer{layer_id}/"


def _sums(trace: Mapping[str, Tensor], mask: Tensor | None, route: Tensor | None) -> Tensor:
    """Over the positions that count: how many gates, and sums of them, their squares and those that are closed; of squares of what was added
    and of the stream.
    """
    wide = torch.float32 if trace["gate"].device.type == "mps" else torch.float64  # which has no wider type
    gate = trace["gate"].to(wide)
    added, stream = (
        torch.linalg.vector_norm(trace[name].view_as(trace["stream"]), dim=-1, dtype=torch.float32).to(wide).square()
        for name in ("added", "stream")
    )
    counts = torch.ones_like(gate)
    if mask is not None and mask.shape == gate.shape[:2]:
        counts = counts * (mask != 0).to(gate).unsqueeze(-1)
    if route is not None:
        counts = counts * route.to(gate).view(-1, 1, 1)
    return torch.stack([(counts * x).sum() for x in (1, gate, gate.square(), gate < _CLOSED, added, stream)])


def _figures(at: str, sums: list[float]) -> dict[str, float]:
    count, gate, squared, closed, added, stream = sums
    if not count:
        return {}
    mean = gate / count
    figures = {"gate_mean": mean, "gate_std": max(0.0, squared / count - mean**2) ** 0.5, "gate_closed": closed / count}
    if stream:
        figures["added"] = (added / stream) ** 0.5
    return {at + name: _short(value) for name, value in figures.items()}


def _rows(table: Tensor) -> Tensor:
    """How many rows of a table have a gradient that moves them; of one that is divided between processes, all parts together."""
    gradient: Any = table.grad
    if gradient is None:
        number = torch.tensor(0, device=table.device)
    else:
        number = ((gradient.coalesce().values() if gradient.is_sparse else gradient) != 0).any(-1).sum()
    divided = shard_group(table)
    return number if divided is None else sum_everywhere(number, *divided)


def _short(value: float | Tensor) -> float:
    """As many digits as anybody reads."""
    return float(f"{float(value):.4g}") if not isinstance(value, Tensor) or value.is_floating_point() else int(value)
