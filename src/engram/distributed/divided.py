"""Models and tensors that FSDP has divided between processes (``FSDPModule``, ``torch.distributed.tensor.DTensor``)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["is_divided", "is_fully_sharded", "own_part", "part_from", "part_of", "put_apart", "whole", "write_whole"]


def is_divided(tensor: Tensor) -> bool:
    """Whether a tensor is one of which each process holds a part. (The class is not asked for: importing it takes as long as this library.)"""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Any) -> Tensor:
    """All of a divided tensor, in every process, all of which must ask; others are given back as they are."""
    return tensor.full_tensor() if is_divided(tensor) else tensor


def own_part(tensor: Any) -> Tensor:
    """This process's part of a divided tensor, in the same memory; others are given back as they are."""
    return tensor.to_local() if is_divided(tensor) else tensor


@torch.no_grad()
def part_of(tensor: Tensor, like: Any) -> Tensor:
    """``tensor``, which every process holds whole, divided as ``like`` is; given back as it is if that is whole. Nothing is sent."""
    if not is_divided(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


@torch.no_grad()
def write_whole(tensor: Any, values: Tensor) -> None:
    """Write ``values``, which every process holds whole, into a tensor of that shape, divided or not."""
    own_part(tensor).copy_(own_part(part_of(values.to(tensor.device), tensor)))


def part_from(part: Tensor, like: Any) -> Tensor:
    """A tensor of which this process holds ``part``, divided as ``like`` is and of its shape; ``part`` itself if that is whole."""
    if not is_divided(like):
        return part
    from torch.distributed.tensor import DTensor

    part = part.to(like.device)
    return DTensor.from_local(part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride())


def is_fully_sharded(model: nn.Module) -> bool:
    """Whether FSDP has divided a model's parameters; by the class's name, for the same reason."""
    return any(kind.__name__ == "FSDPModule" for kind in type(model).__mro__)


def put_apart(model: nn.Module) -> None:
    """Let every process hold its part of the parameters again where FSDP left them together, as it does with the outermost ones after a
    forward pass that no backward pass follows. Until then they are copies, and what is written to them is lost.
    """
    module: Any
    for module in model.modules():
        if is_fully_sharded(module):
            module.reshard()
