"""A model and its memory divided between processes by FSDP, for base models of which not every device can hold a copy."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from engram.distributed import is_divided, is_fully_sharded, process_count, put_apart
from engram.errors import AttachError, ConfigError
from engram.models.architectures import find_decoder
from engram.models.attaching import check_topmost
from engram.tables import EmbeddingTable, are_equal_but_tables, copy_all_but_tables, row_parameters

if TYPE_CHECKING:
    from engram.models.engram_model import EngramModel

__all__ = ["refuse_undivided", "shard_model"]

_CALLED = ("generate",)
"""Methods of a memory that call its base model without going through ``forward``."""


def shard_model(memory: EngramModel, **options: Any) -> EngramModel:
    """Divide base model and readers between all processes (FSDP2, ``torch.distributed.fsdp.fully_shard``), and pass the tables by.

    Each process holds its part of every parameter, frozen ones too, and of the optimiser's state for it; a block's parameters are put
    together while it computes. Where processes come with other weights the first one's are taken. Tables are what they were: copies, if
    ``replicate_tables`` made them such before (``EngramTrainer`` does), or parts (``TableConfig(sharded=True)``). After this make the
    trainer or the optimiser: ``EngramAdamW``, or ``EngramMuon``, which puts each matrix together to orthogonalise it. All processes call
    ``memory``, and not its base model, together, and save together.

    Parameters that are trained together must be of one type in each block, in the rest of the base model, and in the readers.

    A base model that transformers divided while it was loaded (``from_pretrained(..., distributed_config=DistributedConfig(fsdp_size=N))``,
    which never has it whole anywhere) stays as it is; ``options`` are for the readers alone then.

    Args:
        memory: a memory on a model, the topmost if there are several; every process has its weights whole (on the CPU, if they are large) and
            keeps its part of them, on its device.
        options: of ``fully_shard``: ``mesh`` (all processes if not given), ``mp_policy``, ``reshard_after_forward``, ``offload_policy``.

    Returns:
        ``memory``.

    Raises:
        ConfigError: there is one process only, a model without a memory, or a torch that cannot pass parameters by (before 2.7).
        AttachError: the memory was unloaded, another one is attached on top of it, it is divided already, or its base model was divided and
            then called.
    """
    fully_shard = _check(memory)
    decoder = find_decoder(memory.base_model)
    check_topmost(memory)
    if is_fully_sharded(memory):
        raise AttachError("shard_model: this memory and its model are divided already.")
    if _was_called(memory.base_model):
        raise AttachError(
            "shard_model: got a divided base model that was called before, expected one that was just loaded: FSDP takes what is called first "
            "for the outermost."
        )
    tables = [module for module in memory.modules() if isinstance(module, EmbeddingTable)]
    if not are_equal_but_tables(memory):
        copy_all_but_tables(memory)
    inner = _within(options)
    with _buffers_aside(tables):
        if not is_fully_sharded(memory.base_model):
            for block in decoder.blocks:
                fully_shard(block, **inner)
            # In a group of its own, as its type may be another than that of readers. It is put together once a pass, as they are.
            fully_shard(memory.base_model, **{"reshard_after_forward": False, **inner})
        fully_shard(memory, ignored_params={p for table in tables for p in table.parameters()}, **options)
    _guard(memory)
    device = _device_of(memory)
    for table in tables:
        table.to(device)  # one that lives elsewhere stays there
    return memory


def _check(memory: Any) -> Callable[..., Any]:
    """FSDP's function, if all is there that it needs."""
    if not hasattr(memory, "engrams"):
        raise ConfigError(
            f"shard_model: got a {type(memory).__name__}, expected an EngramModel (get_engram_model); to divide a model without a memory use "
            "torch.distributed.fsdp.fully_shard itself."
        )
    if process_count() == 1:
        raise ConfigError(
            "shard_model: got one process, expected several (torchrun --nproc-per-node N) after torch.distributed.init_process_group."
        )
    from torch.distributed.fsdp import fully_shard

    if "ignored_params" not in inspect.signature(fully_shard).parameters:
        raise ConfigError("shard_model: this torch's fully_shard cannot pass tables by, expected torch 2.7 or later.")
    return fully_shard


def _was_called(base: Any) -> bool:
    """Whether FSDP knows a model that it divided for the outermost one, or as part of another."""
    return is_fully_sharded(base) and getattr(base._get_fsdp_state(), "_is_root", None) is not None


def _within(options: dict[str, Any]) -> dict[str, Any]:
    """The options for what is called within the model: the type of what comes out (``output_dtype``) is that of the whole alone."""
    policy = options.get("mp_policy")
    return options if policy is None else {**options, "mp_policy": replace(policy, output_dtype=None)}


@contextmanager
def _buffers_aside(tables: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, rows that are buffers (quantised ones) are not there: FSDP would move them to its device, wherever they live."""
    aside = [(module, module._buffers) for table in tables for module in table.modules()]
    for module, _ in aside:
        module._buffers = {}
    try:
        yield
    finally:
        for module, buffers in aside:
            module._buffers = buffers


def _device_of(memory: EngramModel) -> torch.device:
    """Where the model computes; its parts may lie elsewhere (``CPUOffloadPolicy``)."""
    part: Any = next(parameter for parameter in memory.parameters() if is_divided(parameter))
    kind = part.device_mesh.device_type
    return torch.device(kind) if kind == "cpu" else torch.device(kind, torch.get_device_module(kind).current_device())


def _guard(memory: EngramModel) -> None:
    """Have what FSDP does between calls done after each, and calls refused that would leave it in no known state."""
    from torch.distributed.fsdp import register_fsdp_forward_method

    module: Any = memory
    if hasattr(module, "set_reduce_scatter_unused_params"):  # torch 2.13; gradients that one process has and another has not
        module.set_reduce_scatter_unused_params(True)
    memory.register_forward_pre_hook(_Checked(), prepend=True)
    memory.base_model.register_forward_pre_hook(functools.partial(_refuse_alone, memory), prepend=True)
    memory.register_forward_hook(_apart_unless_trained)
    for name in _CALLED:
        register_fsdp_forward_method(memory, name)
        setattr(memory, name, _apart_after(memory, getattr(memory, name)))


class _Checked:
    """A look before each pass, and a closer one before the first that is trained: by then is known what will be."""

    def __init__(self) -> None:
        self._types_known = False

    def __call__(self, memory: nn.Module, _: Any) -> None:
        _refuse_inference_mode()
        if torch.is_grad_enabled() and not self._types_known:
            refuse_undivided(memory)
            _refuse_mixed_types(memory)
            self._types_known = True


def _refuse_inference_mode() -> None:
    """Weights that are put together in it can never be written to again: the next pass outside would fail."""
    if torch.is_inference_mode_enabled():
        raise ConfigError("a divided model: got a call in torch.inference_mode(), expected torch.no_grad().")


def refuse_undivided(memory: nn.Module) -> None:
    """Refuse what would be trained of a divided memory and is not divided: each process would train its own. To be asked while parts lie apart
    (``put_apart``).

    Raises:
        ConfigError: there is something.
    """
    tables = row_parameters(memory)
    left = [n for n, p in memory.named_parameters() if p.requires_grad and id(p) not in tables and not is_divided(p)]
    if left:
        raise ConfigError(
            f"a divided model: got {len(left)} parameters that would be trained and came when it was divided already, first {left[0]}, "
            "expected adapters and layers before shard_model, on a base model that was loaded whole."
        )


def _refuse_mixed_types(memory: nn.Module) -> None:
    """FSDP sends the gradients of a group together."""
    for name, module in memory.named_modules():
        if not is_fully_sharded(module):
            continue
        types = sorted({str(parameter.dtype).removeprefix("torch.") for parameter in _trained_in_group(module)})
        if len(types) > 1:
            raise ConfigError(
                f"shard_model: got parameters of {' and '.join(types)} that are trained together ({name or 'readers'}), expected one type: "
                "load the model in float32, and have it compute in bfloat16 by mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16)."
            )


def _trained_in_group(module: nn.Module) -> Iterator[nn.Parameter]:
    """What is trained of a module, without modules that FSDP has divided by themselves, and without tables."""
    yield from (parameter for parameter in module.parameters(recurse=False) if parameter.requires_grad)
    for child in module.children():
        if not is_fully_sharded(child) and not isinstance(child, EmbeddingTable):
            yield from _trained_in_group(child)


def _refuse_alone(memory: EngramModel, *_: Any) -> None:
    """The base model called by itself: what is put together for the memory's call is in parts then."""
    if any(map(is_divided, memory.engrams.parameters())):
        raise AttachError(
            "got a call of the base model of a divided memory, expected one of the memory, in all processes; inside memory.disable_engram() it "
            "is the base model's."
        )


def _apart_unless_trained(memory: nn.Module, _: Any, output: Any) -> None:
    """FSDP leaves the root's parameters together for a backward pass. After a pass without gradients none comes, and what is set for the
    copies, or read from them once the parts were stepped, would be lost, or old.
    """
    if not torch.is_grad_enabled():
        put_apart(memory)


def _apart_after(memory: nn.Module, method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def called(*args: Any, **kwargs: Any) -> Any:
        _refuse_inference_mode()
        try:
            return method(*args, **kwargs)
        finally:
            put_apart(memory)

    return called
