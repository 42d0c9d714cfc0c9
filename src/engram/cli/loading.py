"""Models for commands: which, on which device, in which type."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from engram.cli.outputs import is_terminal
from engram.errors import CheckpointError

if TYPE_CHECKING:
    from engram.editing import MemoryEditor
    from engram.models import EngramModel

__all__ = [
    "AllowOtherBaseOption",
    "DeviceOption",
    "ModelDtypeOption",
    "ModelOption",
    "Running",
    "check_out",
    "is_beneath",
    "open_base",
    "open_beneath",
    "open_editor",
    "open_memory",
    "open_tokenizer",
    "taught_folder",
]

ModelOption = Annotated[
    str | None,
    typer.Option(help="Base model: a folder, a hub name or 'bundled'. Default: the one the memory was made for."),
]
DeviceOption = Annotated[str, typer.Option(help="Device of the model: cpu, cuda, cuda:1, mps.")]
ModelDtypeOption = Annotated[str, typer.Option(help="Data type of the model's weights: float32, bfloat16 or float16.")]
AllowOtherBaseOption = Annotated[
    bool,
    typer.Option(
        "--allow-other-base",
        help="Accept another model of the same sizes than the memory was made for (a fine-tuned one, or with more tokens); what is saved then "
        "belongs to that one.",
    ),
]
_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Running:
    """Where a model runs, in which type, and whether a memory may be read on another than its own, as the options say."""

    device: str = "cpu"
    dtype: str = "float32"
    allow_other_base: bool = False

    def load(self, name: str) -> tuple[Any, Any]:
        """A model and its tokenizer (``models.load_model``), moved there.

        Raises:
            CheckpointError: it cannot be loaded, or does not fit there.
        """
        import torch
        from transformers.utils.logging import disable_progress_bar

        from engram.models import load_model

        self.check()
        if not is_terminal(sys.stderr):
            disable_progress_bar()
        model, tokenizer = load_model(name, getattr(torch, self.dtype))
        return self.place(model, repr(name)), tokenizer

    def place(self, model: Any, name: str) -> Any:
        """A model of the type, moved there.

        Raises:
            CheckpointError: it does not fit there.
        """
        import torch

        try:
            return model.to(self.device)
        except torch.OutOfMemoryError as error:
            raise CheckpointError(
                f"model {name} does not fit on {self.device} in {self.dtype}: {str(error).splitlines()[0]} "
                "Choose --model-dtype bfloat16, or another --device."
            ) from None

    def check(self) -> None:
        """Refuse an unknown type and a device that is not there, before anything is made or loaded."""
        import torch

        if self.dtype not in _DTYPES:
            raise typer.BadParameter(f"got {self.dtype!r}, expected one of {', '.join(_DTYPES)}", param_hint="--model-dtype")
        try:
            torch.ones(1, device=self.device).item()  # on "meta" there is nothing to read
        except (RuntimeError, AssertionError, NotImplementedError) as error:  # PyTorch says so in three ways
            reason = str(error).strip().splitlines()[0]
            raise typer.BadParameter(
                f"got {self.device!r}, expected a device of this machine, such as cpu or cuda: {reason}", param_hint="--device"
            ) from None

    def options(self) -> str:
        """The options of a command line that say the same; empty for the defaults."""
        device = "" if self.device == "cpu" else f" --device {self.device}"
        dtype = "" if self.dtype == "float32" else f" --model-dtype {self.dtype}"
        return device + dtype + (" --allow-other-base" if self.allow_other_base else "")


def taught_folder(memory: Path, hint: str = "--memory") -> Path:
    """Where a memory of facts lies, which the bundled one is not (``models.bundled_files.memory_folder``)."""
    from engram.models.bundled_files import BUNDLED_MEMORY, memory_folder

    folder = memory_folder(memory)
    if folder == BUNDLED_MEMORY:
        raise typer.BadParameter(
            "the bundled memory was trained, not taught, and holds no facts; `engram trace` and `engram look` show what it does. "
            "Expected another folder",
            param_hint=hint,
        )
    return folder


def check_out(folder: Path) -> None:
    """Refuse to write a memory where it would stand in the place of the bundled one, or of the one that a run left."""
    from engram.checkpoint import DESCRIPTION_NAME
    from engram.models.bundled_files import BUNDLED_NAME

    if str(folder) == BUNDLED_NAME:
        raise typer.BadParameter(
            "got 'bundled', which names the memory that ships with engram; expected another folder", param_hint="--out"
        )
    if (folder / "memory" / DESCRIPTION_NAME).exists():
        raise typer.BadParameter(
            f"got {folder}, the folder of a run, whose own memory would not be found any more; expected another folder",
            param_hint="--out",
        )


def open_base(memory: Path, model: str | None, running: Running) -> tuple[Any, Any]:
    """The base model of a saved memory, with the adapters that were trained with it and the memory beneath it if there are any, and its
    tokenizer.

    Args:
        memory: the memory's folder.
        model: what ``--model`` says.
        running: where and how.

    Raises:
        CheckpointError: the model, or the memory beneath, is not where it was, or the adapters do not fit.
    """
    from engram.checkpoint import read_description

    with _named_by(memory, model) as name:
        base, tokenizer = running.load(name)
    description = read_description(memory)
    _add_adapters(base, memory, description)
    beneath = _told_of_beneath(description)
    # A base model that was trained since is another than the one that the memory beneath was made for.
    other = running.allow_other_base or "base_folder" in description
    return (base if beneath is None else _attach_beneath(base, tokenizer, beneath, memory, other)), tokenizer


def _add_adapters(model: Any, memory: Path, description: Mapping[str, Any]) -> None:
    """Put those that lie beside a memory on its base model, unless that has some (``--model`` may name a folder of adapters) or is another,
    such as one into which they were merged.
    """
    if not description.get("trained_beside"):
        return
    from engram.models import load_adapters
    from engram.models.identity import adapter_parameters, base_identity, base_of, identity_mismatch

    base = base_of(model)
    saved = {**(description.get("base_model") or {}), "memory": None}
    if not adapter_parameters(base) and not identity_mismatch(saved, base_identity(base)):
        load_adapters(base, memory)


def _told_of_beneath(description: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a saved memory says of the one on top of which it was made; None if there is none."""
    return (description.get("base_model") or {}).get("memory")


def _attach_beneath(base: Any, tokenizer: Any, beneath: dict[str, Any], memory: Path, allow_other_base: bool) -> EngramModel:
    """The memories that a saved one was made on top of, the lowest first."""
    from engram.checkpoint import read_description
    from engram.models import EngramModel

    if beneath.get("memory"):
        base = _attach_beneath(base, tokenizer, beneath["memory"], memory, allow_other_base)
    folder = _find_beneath(beneath, memory)
    _add_adapters(base, folder, read_description(folder))
    return EngramModel.from_pretrained(base, folder, tokenizer, allow_other_base=allow_other_base)


def _find_beneath(beneath: dict[str, Any], memory: Path) -> Path:
    """Where a memory lies on top of which another was made.

    Raises:
        CheckpointError: not where it was, and not beside the other.
    """
    from engram.checkpoint import DESCRIPTION_NAME
    from engram.models.bundled_files import memory_folder

    folder = memory_folder(Path(beneath.get("folder") or ""))
    if beneath.get("folder") and not (folder / DESCRIPTION_NAME).exists():  # both may have moved together
        folder = memory_folder(Path(os.path.abspath(memory)).parent / folder.name)
    if not beneath.get("folder") or not (folder / DESCRIPTION_NAME).exists():
        named = beneath.get("folder")
        where = (
            f"is not in {named!r} any more, nor beside it. Put it back there"
            if named
            else "had not been saved. Save it first, then this one"
        )
        raise CheckpointError(
            f"the memory in {memory} was made on top of another, which {where}, "
            "or load both in Python: EngramModel.from_pretrained(model, BENEATH, tokenizer), then MemoryEditor.load(that, ...)."
        )
    return folder


def is_beneath(over: Path, memory: Path) -> bool:
    """Whether a saved memory says that it was made on top of this one."""
    from engram.checkpoint import read_description
    from engram.models.bundled_files import memory_folder
    from engram.models.files import folder_name

    beneath = _told_of_beneath(read_description(memory)) or {}
    return beneath.get("folder") == folder_name(memory_folder(over))


def open_beneath(over: Path, model: str | None, running: Running) -> tuple[EngramModel, Any]:
    """The memory on top of which another shall be made, on its base model, and its tokenizer."""
    from engram.models.bundled_files import memory_folder

    return open_memory(memory_folder(over), model, running)


def open_tokenizer(memory: Path, model: str | None) -> Any:
    """The tokenizer of a saved memory's base model."""
    from engram.models.bundled import load_tokenizer

    with _named_by(memory, model) as name:
        return load_tokenizer(name)


@contextmanager
def _named_by(memory: Path, model: str | None) -> Iterator[str]:
    """The name of a memory's base model; if that cannot be loaded, the error says who named it."""
    name = _base_name(memory, model)
    try:
        yield name
    except CheckpointError as error:
        hint = "" if model else f" The memory in {memory} names it as its base; if that has moved, say where with --model."
        raise CheckpointError(f"{error}{hint}") from error


def _base_name(memory: Path, model: str | None) -> str:
    """``model`` if it is given, else the model in the memory's run folder, else the one that the memory names.

    Raises:
        CheckpointError: it names none.
    """
    from engram.checkpoint import BACKBONE_FOLDER, base_name, read_description

    if model:
        return model
    description = read_description(memory)
    named = base_name(memory, description)
    beneath = _told_of_beneath(description)
    has_gone = named and Path(named).name == BACKBONE_FOLDER and not os.path.isdir(named)
    if beneath and has_gone:  # with the memory beneath, in whose folder it is
        lowest = _find_beneath(beneath, memory)
        named = base_name(lowest, read_description(lowest))
    if not named:
        raise CheckpointError(
            f"the memory in {memory} does not say what its base model is called, and there is no folder "
            f"{Path(os.path.abspath(memory)).parent / 'model'} with one; say where it is with --model."
        )
    return named


def open_editor(memory: Path, model: str | None, running: Running) -> MemoryEditor:
    """The memory of facts in a folder on its base model, to be asked or changed."""
    from engram.checkpoint import read_description
    from engram.config import EngramConfig
    from engram.editing import MemoryEditor
    from engram.editing.editor import refuse_trained

    refuse_trained(EngramConfig.from_dict(read_description(memory)["engram_config"]))  # before a model is loaded
    base, tokenizer = open_base(memory, model, running)
    return MemoryEditor.load(base, memory, tokenizer, running.allow_other_base)


def open_memory(memory: Path, model: str | None, running: Running) -> tuple[EngramModel, Any]:
    """The memory in a folder, taught or trained, on its base model, and its tokenizer."""
    from engram.models import EngramModel

    base, tokenizer = open_base(memory, model, running)
    return EngramModel.from_pretrained(base, memory, tokenizer, allow_other_base=running.allow_other_base), tokenizer
