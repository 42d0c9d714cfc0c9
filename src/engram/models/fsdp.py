"""A model and its memory divided between processes by FSDP, for base models of which not every device can hold a copy."""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from engram.distributed import everywhere_equal, is_fully_sharded, process_count, put_apart
from engram.errors import AttachError, ConfigError
from engram.models.architectures import find_decoder
from engram.models.attaching import check_topmost
from engram.tables import EmbeddingTable, copy_all_but_tables, row_parameters

if TYPE_CHECKING:
    from engram.models.engram_model import EngramModel

__all__ = ["shard_model"]

_SAMPLED = 64
_CALLED = ("generate",)
"""Methods of a memory that call its base model without going through ``forward``."""


def shard_model(memory: EngramModel, **options: Any) -> EngramModel:
    """Divide base model and readers between all processes (FSDP2, ``torch.distributed.fsdp.fully_shard``), and pass the tables by.

    Each process holds its part of every parameter, frozen ones too, and of the optimiser's state for it; a block's parameters are put
    together while it computes. Where processes come with other weights the first one's are taken. Tables are what they were: copies, if
    ``replicate_tables`` made them such before (``EngramTrainer`` does), or parts (``TableConfig(sharded=True)``). After this make the
    trainer or the optimiser: ``EngramAdamW``, or ``EngramMuon``, which puts each matrix together to orthogonalise it. All processes call
    ``memory``, and not its base model, together, and save together.

    Args:
        memory: a memory on a model, the topmost if there are several; every process has its weights whole (on the CPU, if they are large) and
            keeps its part of them, on its device.
        options: of ``fully_shard``: ``mesh`` (all processes if not given), ``mp_policy``, ``reshard_after_forward``, ``offload_policy``.

    Returns:
        ``memory``.

    Raises:
        ConfigError: there is one process only, or a torch that cannot pass parameters by (before 2.7).
        AttachError: the memory was unloaded, another one is attached on top of it, or it is divided already.
    """
    if process_count() == 1:
        raise ConfigError(
            "shard_model: got one process, expected several (torchrun --nproc-per-node N) after torch.distributed.init_process_group."
        )
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    if "ignored_params" not in inspect.signature(fully_shard).parameters:
        raise ConfigError("shard_model: this torch's fully_shard cannot pass tables by, expected torch 2.7 or later.")
    decoder = find_decoder(memory.base_model)
    check_topmost(decoder, memory)
    if is_fully_sharded(memory):
        raise AttachError("shard_model: this memory and its model are divided already.")
    tables = {p for module in memory.modules() if isinstance(module, EmbeddingTable) for p in module.parameters()}
    if not everywhere_equal(_corner(memory)):
        copy_all_but_tables(memory)
    for block in decoder.blocks:
        fully_shard(block, **options)
    fully_shard(memory, ignored_params=tables, **options)
    memory.register_forward_hook(_apart_unless_trained)
    for name in _CALLED:
        register_fsdp_forward_method(memory, name)
        setattr(memory, name, _apart_after(memory, getattr(memory, name)))
    device = next(iter(decoder.blocks.parameters())).device  # FSDP has taken its parts there
    for module in memory.modules():
        if isinstance(module, EmbeddingTable):
            module.to(device)  # one that lives elsewhere stays there
    return memory


def _apart_unless_trained(memory: nn.Module, _: Any, output: Any) -> None:
    """FSDP leaves the root's parameters together for a backward pass. After a pass without gradients none comes, and what is set for the
    copies, or read from them once the parts were stepped, would be lost, or old.
    """
    if not torch.is_grad_enabled():
        put_apart(memory)


def _apart_after(memory: nn.Module, method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def called(*args: Any, **kwargs: Any) -> Any:
        try:
            return method(*args, **kwargs)
        finally:
            put_apart(memory)

    return called


def _corner(memory: EngramModel) -> str:
    """A checksum of the first values of every parameter but tables'."""
    rows, digest = row_parameters(memory), hashlib.sha256()
    for parameter in memory.parameters():
        if id(parameter) not in rows:
            digest.update(parameter.detach().flatten()[:_SAMPLED].float().cpu().numpy().tobytes())
    return digest.hexdigest()
