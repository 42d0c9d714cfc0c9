"""How many parameters of each kind a model with a memory has, and how many of them would be trained."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import nn

from engram.models.identity import adapter_parameters
from engram.models.quantised import parameter_count

if TYPE_CHECKING:
    from engram.models.engram_model import EngramModel

__all__ = ["parameters_by_kind"]


def parameters_by_kind(memory: EngramModel) -> dict[str, tuple[int, int]]:
    """Per kind how many parameters would be trained, and how many there are: ``tables``, ``reader``, ``base``, and ``adapters`` of peft where
    there are any.
    """
    engrams = memory.engrams.values()
    adapters = {id(p) for p in adapter_parameters(memory.base_model).values()}
    rows = sum(engram.table.stored_rows * memory.engram_config.head_dim for engram in engrams)
    counts = {
        "tables": (_count(p for engram in engrams for p in engram.table.parameters())[0], rows),
        "reader": _count(p for engram in engrams for p in engram.reader_parameters()),
    }
    if adapters:
        counts["adapters"] = _count(p for p in memory.base_model.parameters() if id(p) in adapters)
    return {**counts, "base": _count(p for p in memory.base_model.parameters() if id(p) not in adapters)}


def _count(parameters: Iterable[nn.Parameter]) -> tuple[int, int]:
    """Those that would be trained, and all."""
    sizes = [(parameter_count(p), p.requires_grad) for p in parameters]
    return sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes)
