"""A memory in the hands of a trainer that is not ours: transformers' own, and those that are built on it, such as TRL's."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from engram.distributed import process_count
from engram.errors import CheckpointError, ConfigError, first_of
from engram.models import EngramModel
from engram.models.files import folder_name

__all__ = ["MemoryCallback"]

_LISTED = 3
_ASIDE = ".memory-{step}"


class MemoryCallback(TrainerCallback):
    """For the ``callbacks`` of a trainer of ``memory.base_model``: the memory is in every checkpoint, and what would train nothing is refused.

    Use it with ``engram.optim.build_optimizer``. ``checkpoint-N/memory`` beside the trainer's own files and, when training ends,
    ``output_dir/memory`` are folders that ``EngramModel.from_pretrained`` loads. Resuming puts the memory of ``checkpoint-N`` in
    ``output_dir`` back, N being the step that the run goes on from, so a checkpoint of another folder must be copied there first; the
    trainer restores the optimiser, what it remembers of rows included, and the run goes on as if it had not been stopped. With
    ``load_best_model_at_end`` the memory is that of the best checkpoint too.

    Raises:
        ConfigError: when the trainer is made, if its model is the memory itself or there are several processes; when training starts, if its
            optimiser lacks trainable parameters of the memory or of the base model, which would stay as they are without a word.
        CheckpointError: a checkpoint to resume from has no memory, or ``output_dir`` holds another run's of that step.
        AttachError: the memory was unloaded.
    """

    def __init__(self, memory: EngramModel) -> None:
        if not isinstance(memory, EngramModel):
            raise ConfigError(f"MemoryCallback: got {type(memory).__name__}, expected an EngramModel (get_engram_model).")
        self.memory = memory
        self._step_aside: int | None = None

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Refuse the memory as the trainer's model, and several processes."""
        if process_count() > 1:
            raise ConfigError(
                f"MemoryCallback: got {process_count()} processes, expected one: such a trainer averages gradients of the base model "
                "alone, and memories would come to differ. EngramTrainer trains in several."
            )
        if isinstance(model, EngramModel):
            raise ConfigError(
                "MemoryCallback: got the memory as the trainer's model, expected memory.base_model (or, with EngramTrainer, which "
                "takes the memory and saves it by itself, no MemoryCallback)."
            )

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        """See that everything is trained, and go on with the rows of the checkpoint."""
        self.memory.check_attached()
        self._check_optimizer(optimizer)
        if state.global_step > 0:
            folder = _memory_in(args, f"checkpoint-{state.global_step}")
            _check_same(folder.parent, state)
            aside = _aside(args, state.global_step)
            if aside.is_dir() and not folder.is_dir():  # the run was killed between its checkpoint and the memory's place in it
                os.replace(aside, folder)
            self._load(folder)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Forget what a step that was left out (float16) has left in the memory; the trainer does so for the base model's."""
        self.memory.engrams.zero_grad()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Save the memory aside before the trainer saves: when its own checkpoint is whole it deletes older ones, with their memories."""
        if control.should_save and state.is_world_process_zero:
            self._save_aside(args, state.global_step)

    on_epoch_end = on_step_end

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Put the memory into the checkpoint."""
        if not state.is_world_process_zero:
            return
        place, aside = _memory_in(args, f"checkpoint-{state.global_step}"), _aside(args, state.global_step)
        if self._step_aside != state.global_step:  # saving was asked for after the step
            self._save_aside(args, state.global_step)
        shutil.rmtree(place, ignore_errors=True)  # of an earlier run in this folder
        os.replace(aside, place)
        self._step_aside = None
        for leftover in Path(args.output_dir).glob(_ASIDE.format(step="*")):  # of runs that were killed
            shutil.rmtree(leftover, ignore_errors=True)

    def _save_aside(self, args: Any, step: int) -> None:
        folder, aside = self.memory.folder, _aside(args, step)
        shutil.rmtree(aside, ignore_errors=True)
        try:
            self.memory.save_pretrained(aside)
        finally:
            self.memory.folder = folder or folder_name(_memory_in(args, f"checkpoint-{step}"))
        self._step_aside = step

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Save the memory, that of the best checkpoint if the base model is."""
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._load(Path(state.best_model_checkpoint, "memory"))
        if state.is_world_process_zero:
            self.memory.save_pretrained(_memory_in(args))

    def _check_optimizer(self, optimizer: Any) -> None:
        stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
        left = [name for name, p in self.memory.named_parameters() if p.requires_grad and id(p) not in stepped]
        if left:
            raise ConfigError(
                f"MemoryCallback: got an optimiser without {first_of(left, _LISTED)}, which would never be trained, expected "
                "optimizers=(engram.optim.build_optimizer(memory, lr), None), made when adapters are on the base model already; or freeze them."
            )

    def _load(self, folder: Path) -> None:
        if not folder.is_dir():
            raise CheckpointError(
                f"{folder} is missing, expected the memory that MemoryCallback saved beside the checkpoint; put the checkpoint there, or train "
                "from the start."
            )
        self.memory.load_memory(folder, changed_rows="refill")


def _check_same(checkpoint: Path, state: Any) -> None:
    """Refuse to put back the memory of another run's checkpoint of the same step: a trainer does not tell where it resumes from.

    Raises:
        CheckpointError: what was logged up to it is something else than the trainer has read.
    """
    file = checkpoint / "trainer_state.json"
    if file.is_file() and json.loads(file.read_text(encoding="utf-8")).get("log_history") != state.log_history:
        raise CheckpointError(
            f"{checkpoint} is of another run than the checkpoint that the trainer resumes from; expected that one there: copy it into "
            "output_dir, or choose an output_dir of its own."
        )


def _aside(args: Any, step: int) -> Path:
    return Path(args.output_dir, _ASIDE.format(step=step))


def _memory_in(args: Any, *checkpoint: str) -> Path:
    return Path(args.output_dir, *checkpoint, "memory")
