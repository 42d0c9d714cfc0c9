"""Files of a checkpoint that hold what is trained beside the memory: the base model, or adapters on it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from engram.distributed import is_fully_sharded, process_rank, saving_together, whole, write_whole
from engram.errors import CheckpointError
from engram.models.identity import own_names

__all__ = [
    "BACKBONE_WEIGHTS",
    "fill_adapters",
    "gathered_state",
    "load_backbone",
    "save_adapters",
    "save_backbone",
    "whole_adapters",
]

BACKBONE_WEIGHTS = "model.safetensors"


def save_backbone(base: Any, folder: Path) -> None:
    """One file with the weights of a base model, under the names that they have without adapters on it, so that ``from_pretrained`` reads it as
    well as ``load_backbone``. Where the weights are divided between processes all save together, and the first writes.

    Raises:
        CheckpointError: transformers wrote no such file.
    """
    together = is_fully_sharded(base)
    with saving_together(together):
        state = gathered_state(base)
        if not together or process_rank() == 0:
            _write_backbone(base, folder, base.state_dict() if state is None else state)


def _write_backbone(base: Any, folder: Path, state: Mapping[str, Tensor]) -> None:
    file = folder / BACKBONE_WEIGHTS
    own = {own: state[name] for name, own in own_names(base, state).items()}
    with _said_to_be_plain(base):  # the original format renames and splits the experts of MoE models
        base.save_pretrained(folder, state_dict=own, save_original_format=False, max_shard_size="1000TB")
    if not file.is_file():
        raise CheckpointError(
            f"{file} was not written by {type(base).__name__}.save_pretrained; the checkpoint could not be resumed."
        )


@contextmanager
def _said_to_be_plain(base: Any) -> Iterator[None]:
    """A model that transformers divided while it loaded it would be gathered once more, by processes that are not here; of one on which it has
    put adapters (``add_adapter``), those alone would be saved.
    """
    noted = [(vars(at), name) for at, name in ((base.config, "distributed_config"), (base, "_hf_peft_config_loaded"))]
    taken = [(fields, name, fields.pop(name)) for fields, name in noted if fields.get(name)]
    try:
        yield
    finally:
        for fields, name, value in taken:
            fields[name] = value


def gathered_state(base: nn.Module) -> dict[str, Tensor] | None:
    """Whole weights of a model that is divided between processes, in the first one's host memory, as ``save_pretrained`` takes them; None for
    a model that is not divided. All ask.
    """
    if not is_fully_sharded(base):
        return None
    state, seen = base.state_dict(keep_vars=True), dict[int, Tensor]()
    for tensor in state.values():  # a tied one has several names
        if id(tensor) not in seen:
            seen[id(tensor)] = _gathered(tensor)
    return {name: seen[id(tensor)] for name, tensor in state.items()}


def _gathered(tensor: Tensor) -> Tensor:
    """The whole tensor in the first process's host memory; elsewhere it is put together and let go."""
    together = whole(tensor.detach())
    return together.cpu() if process_rank() == 0 else together.new_empty(0)


def load_backbone(base: Any, file: Path) -> bool:
    """Read what ``save_backbone`` wrote into the same model, divided or not, with adapters on it or without. Returns whether adapters were in
    it, as in checkpoints of earlier versions.

    Raises:
        CheckpointError: the file is missing or another model's.
    """
    if not file.is_file():
        raise CheckpointError(
            f"{file} is missing; the checkpoint was made without train_backbone. Resume with the same arguments."
        )
    try:
        return _fill(base, load_file(file))
    except (RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{file} does not fit this base model: {' '.join(str(error).split())[:300]}") from error


def _fill(base: nn.Module, saved: Mapping[str, Tensor]) -> bool:
    """Saved tensors into the parameters and buffers of a model, or into the parts of them; of tied ones one name is saved. Returns whether they
    have the names that adapters on the model give them.
    """
    state = base.state_dict(keep_vars=True)
    own = {own: state[name] for name, own in own_names(base, state).items()}
    with_adapters = not saved.keys() <= own.keys() and saved.keys() <= state.keys()
    wanted = state if with_adapters else own
    names: dict[int, list[str]] = {}
    for name, tensor in wanted.items():
        names.setdefault(id(tensor), []).append(name)
    if unknown := sorted(saved.keys() - wanted.keys()):
        raise RuntimeError(f"{len(unknown)} tensors that it has not, first {unknown[0]}")
    for alike in names.values():
        found = next((saved[name] for name in alike if name in saved), None)
        if found is None or found.shape != wanted[alike[0]].shape:
            raise RuntimeError(f"{alike[0]}: missing or of another shape")
        write_whole(wanted[alike[0]], found)
    return with_adapters


def whole_adapters(adapters: Mapping[str, nn.Parameter], together: bool = False) -> dict[str, Tensor] | None:
    """Parameters of adapters by name, as they are, whole. ``together``: all processes ask, each with its part of them, and the first is told;
    None in the others.
    """
    tensors = {name: (_gathered(p) if together else p.detach()).clone().contiguous() for name, p in adapters.items()}
    return None if together and process_rank() > 0 else tensors


def save_adapters(tensors: dict[str, Tensor], file: Path) -> None:
    """Write them; without any, the file is removed."""
    if tensors:
        save_file(tensors, file)
    else:
        file.unlink(missing_ok=True)  # of an earlier run in this folder


def fill_adapters(adapters: Mapping[str, nn.Parameter], file: Path) -> None:
    """Read what ``save_adapters`` wrote.

    Raises:
        CheckpointError: the file cannot be read, or is of other adapters.
    """
    try:
        saved = load_file(file) if file.is_file() else {}
    except SafetensorError as error:
        raise CheckpointError(f"{file} cannot be read: {error}; resume from an earlier checkpoint.") from error
    wanted = {name: list(parameter.shape) for name, parameter in adapters.items()}
    found = {name: list(values.shape) for name, values in saved.items()}
    if wanted and not file.is_file():
        raise CheckpointError(
            f"{file} is missing: the checkpoint was made without trainable adapters, and here are some. Freeze them, or put the file back."
        )
    if wanted != found:
        differing = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        raise CheckpointError(
            f"{file.parent} was made with other trainable adapters: {len(found)} tensors there, {len(wanted)} here, first {differing[0]}. Put "
            "the same adapters on the base model, trainable, before the trainer is made."
        )
    for name, parameter in adapters.items():
        write_whole(parameter, saved[name])
