"""A `transformers.Trainer` that keeps its state without pickle, stops cleanly when it is told to and at once where nothing can be learnt."""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import SequentialSampler
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import SaveStrategy, rotate_checkpoints
from transformers.utils import logging as hf_logging

from engram.checkpoint import load_tree, save_tree, write_json_atomically
from engram.checkpoint.store import sync_to_disk
from engram.distributed import anywhere, is_fully_sharded, leave_at_exit, process_rank, wait_for_all
from engram.errors import CheckpointError, ConfigError, DataError, TrainingError
from engram.optim import load_own_state, own_state
from engram.tables import is_in_parts, is_sharded
from engram.training.cpu_types import warning_of_slow_bfloat16
from engram.training.examples import OneLength, check_not_empty
from engram.training.guards import (
    check_reports,
    is_complete,
    last_checkpoint,
    no_number,
    remove_incomplete,
    weights_are_finite,
    whole_or_removed,
)
from engram.training.kept_memory import kept_memory
from engram.training.lean_loss import lean_loss
from engram.training.progress import LiveProgress
from engram.training.several import check_processes, check_shared_folder
from engram.training.stops import give_back, listen, say, signals_given_back
from engram.training.throughput import Throughput

__all__ = ["InOrder", "SafeTrainer", "SaveOnInterrupt", "last_checkpoint"]

_OPTIMIZER, _SCHEDULER, _RANDOM, _SCALER = "optimizer", "scheduler", "random_state", "scaler"
_TIME = "time.json"


class InOrder:
    """For a trainer: reads blocks in order. The stream is shuffled already, and a resumed run must see what the first would have seen."""

    train_dataset: Any

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


class SaveOnInterrupt(TrainerCallback):
    """Ctrl-C, the SIGTERM of a scheduler, or a terminal that is closed ends training after the running step, with a checkpoint; a second one
    ends it at once.

    Stopping between steps is what makes the checkpoint exact: within one, gradients are half accumulated or half applied.
    """

    def __init__(self) -> None:
        self.interrupted = False
        self._previous: dict[signal.Signals, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Listen for signals."""
        self.interrupted = False
        if threading.current_thread() is threading.main_thread():
            self._previous = listen(self._on_signal)

    def _on_signal(self, number: int, frame: Any) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True
        if process_rank() == 0:
            say("\nstopping after this step; press Ctrl-C again to stop at once")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Ask for a checkpoint and the end once the step is whole; a signal to one of several processes stops all at the same step."""
        self.interrupted = anywhere(self.interrupted)
        if self.interrupted:
            control.should_save = True
            control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Give signals back and say where to go on."""
        give_back(self._previous)
        self._previous = {}
        if self.interrupted and state.is_world_process_zero:
            say(f"stopped at step {state.global_step}; resume from {args.output_dir}/checkpoint-{state.global_step}")


class SafeTrainer(Trainer):
    """Trainer whose checkpoints are safetensors and JSON.

    Optimiser, scheduler and random generators are restored exactly, so a resumed run has the losses the first would have had (the first average
    logged after a stop covers the steps since). On the CPU, memory that steps free is kept until the end (``kept_memory``); not if the
    arguments have a ``keep_memory`` that is false.

    Of several processes (``torchrun``, ``accelerate launch``) the first writes and shows what all have in common; each adds its own random
    generators to a checkpoint. A run resumed by as many processes is exact; others may go on from it too.

    A loss or gradient norm that is NaN or infinite ends the run before the step is taken; a checkpoint that cannot be written is removed and
    those before it stay. Logs have ``tokens_per_second`` (positions, padding included; evaluation and saving do not count).

    Raises:
        ConfigError: there are several GPUs that one process would divide a batch between, or several processes that the arguments do not
            know of.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        check_reports(_given(args, kwargs, 1, "args"))
        super().__init__(*args, **kwargs)
        check_processes(self.args)
        if self.args.world_size > 1:
            leave_at_exit()
        if _given(args, kwargs, 2, "data_collator") is None:
            self.data_collator = OneLength(self.data_collator)
        self.throughput = Throughput()
        self._started, self._seconds_before = time.monotonic(), 0.0
        self._limit: dict[str, Any] = {}  # the argument, while it is put aside
        self.args.logging_nan_inf_filter = False  # a loss that is no number never gets that far, and asking costs a wait
        self.interrupt = SaveOnInterrupt()
        self.add_callback(self.interrupt)
        if self._displays():
            for plain in (ProgressCallback, PrinterCallback):
                self.remove_callback(plain)
        if not self.is_world_process_zero():
            for display in self._displays():
                self.remove_callback(display)

    optimizer: Any
    lr_scheduler: Any

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As ``transformers.Trainer.train``.

        Args:
            resume_from_checkpoint: a checkpoint's folder; True for the newest complete one in ``output_dir``.
            *args: as for ``transformers.Trainer``.
            **kwargs: as for ``transformers.Trainer``.

        Raises:
            CheckpointError: there is no complete checkpoint to resume from, or one could not be written.
            DataError: there are no examples, or a batch cannot be made of them because they have several lengths.
            TrainingError: the loss, the gradient norm or the weights became NaN or infinite.
        """
        check_not_empty(self.train_dataset)
        self._warn_of_slow_types()
        if self.args.world_size > 1:
            # An evaluation before has left a note by which accelerate would take the model for one that DDP has.
            vars(self.model).pop("_is_accelerate_prepared", None)
            if self._is_divided and self.args.save_strategy != SaveStrategy.NO:
                check_shared_folder(Path(self.args.output_dir or "."))
        self.throughput.reset()
        self._started, self._seconds_before = time.monotonic(), 0.0
        try:
            with signals_given_back(), kept_memory(self._keeps_memory()), lean_loss(self._model_with_loss()):
                return super().train(_complete_checkpoint(resume_from_checkpoint, self.args.output_dir), *args, **kwargs)
        finally:
            for display in self._displays():
                display.close()

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # Resumed from the last checkpoint: transformers would take one step more.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _warn_of_slow_types(self) -> None:
        warning = warning_of_slow_bfloat16("bf16: false") if self.args.bf16 and self.args.device.type == "cpu" else None
        if warning:
            logging.getLogger("engram").warning(warning)

    def _model_with_loss(self) -> Any:
        return self.model

    def _keeps_memory(self) -> bool:
        return self.args.device.type == "cpu" and getattr(self.args, "keep_memory", True)

    @property
    def seconds(self) -> float:
        """Wall time since training began, that of the runs it was resumed from included."""
        return self._seconds_before + time.monotonic() - self._started

    def _displays(self) -> list[LiveProgress]:
        return [callback for callback in self.callback_handler.callbacks if isinstance(callback, LiveProgress)]

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """As ``transformers.Trainer.training_step``, counted.

        Raises:
            TrainingError: the loss is NaN or infinite.
        """
        if self.args.world_size > 1 and not self._is_parallel(model):
            raise ConfigError(
                f"training: got a {type(model).__name__} in several processes, expected DistributedDataParallel, which keeps weights equal; "
                "or a memory that shard_model divided; FSDP by accelerate, which would divide tables too, and DeepSpeed are not supported."
            )
        self.throughput.start()
        try:
            loss = super().training_step(model, inputs, num_items_in_batch)
        except ValueError as error:
            if "did not return a loss" not in str(error):
                raise
            raise DataError(
                f"got examples of {', '.join(inputs)}, from which the model computes no loss, expected labels among them: the ids themselves, "
                "-100 where nothing is to be learnt (engram.data.packing.pack makes them)."
            ) from error
        ids = inputs.get("input_ids")
        if isinstance(ids, torch.Tensor):
            self.throughput.add(ids.numel())
        if anywhere(not torch.isfinite(loss)):
            raise self._no_number("the loss of a process" if self.args.world_size > 1 else "the loss", float(loss))
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        # In float16 the gradient scaler looks for infinities, leaves the step out and lowers its scale.
        if getattr(self.accelerator, "scaler", None) is None and norm is not None and not torch.isfinite(torch.as_tensor(norm)):
            raise self._no_number("the gradient norm", float(norm))
        return norm

    def _is_parallel(self, model: Any) -> bool:
        """Whether gradients of ``model``, as it was prepared for training, are averaged over the processes."""
        inner = getattr(model, "_orig_mod", model)
        return isinstance(inner, DistributedDataParallel) or is_fully_sharded(inner)

    def _no_number(self, what: str, value: float, step: int | None = None) -> TrainingError:
        step = self.state.global_step + 1 if step is None else step
        return no_number(what, value, step, self._get_learning_rate(), str(self.args.output_dir))

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As ``transformers.Trainer.evaluate``."""
        with self.throughput.paused():
            return super().evaluate(*args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As ``transformers.Trainer.log``; a training loss comes with tokens per second."""
        if "loss" in logs and (rate := self.throughput.read()) is not None:
            logs["tokens_per_second"] = round(rate * self.args.world_size, 1)
        super().log(logs, *args, **kwargs)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        # The state file, written last, marks a checkpoint as complete. One of an earlier run in the same folder must not vouch for
        # files that a kill cuts short now.
        folder = Path(self._get_output_dir(trial=trial), f"checkpoint-{self.state.global_step}")
        assert self.model is not None
        with self.throughput.paused():
            if not weights_are_finite(self.model):
                raise self._no_number("a weight", float("nan"), self.state.global_step)
            if not self.args.should_save:
                super()._save_checkpoint(model, trial)  # of which this process writes its random generators alone
                return
            limit = self.args.save_total_limit
            with whole_or_removed(folder), _no_bars_for_files(), self._nothing_deleted():
                (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
                self._remove_other_parts(folder)
                super()._save_checkpoint(model, trial)
                _sync_all(folder)
            best = self.state.best_model_checkpoint
            if limit:
                remove_incomplete(folder.parent)
            rotate_checkpoints(str(folder.parent), save_total_limit=limit, best_model_checkpoint=best, use_mtime=True)

    @contextmanager
    def _nothing_deleted(self) -> Iterator[None]:
        """Inside, older checkpoints stay: transformers deletes them when the new one is written, which is before it is on the disk."""
        self._limit, self.args.save_total_limit = {"save_total_limit": self.args.save_total_limit}, None
        try:
            yield
        finally:
            self.args.save_total_limit, self._limit = self._limit["save_total_limit"], {}

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.args.should_save or self._is_divided:
            own = self._own_file(_OPTIMIZER) if self._is_divided else _OPTIMIZER
            save_tree(os.path.join(output_dir, own), own_state(self.optimizer, by_reference=True))
        if not self.args.should_save:
            return  # every process has the same
        save_tree(os.path.join(output_dir, _SCHEDULER), _plain(self.lr_scheduler.state_dict()))
        write_json_atomically(Path(output_dir, _TIME), {"seconds": round(self.seconds, 3), "divided": self._divided_parts})

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self._check_parts(checkpoint)
            own = self._own_file(_OPTIMIZER) if self._is_divided else _OPTIMIZER
            load_own_state(self.optimizer, load_tree(os.path.join(checkpoint, own)))
            self.lr_scheduler.load_state_dict(load_tree(os.path.join(checkpoint, _SCHEDULER)))
            file = Path(checkpoint, _TIME)
            if file.is_file():  # checkpoints of earlier versions have none
                self._seconds_before = float(json.loads(file.read_text(encoding="utf-8"))["seconds"])

    def _save_rng_state(self, output_dir: str) -> None:
        os.makedirs(output_dir, exist_ok=True)
        state = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
        if torch.cuda.is_available():
            state["cuda"] = torch.cuda.get_rng_state_all()
        save_tree(os.path.join(output_dir, self._own_file(_RANDOM)), state)
        wait_for_all()  # the first process says next that the checkpoint is complete

    @property
    def _is_divided(self) -> bool:
        """Whether each process holds a part of some table, or of the weights: a checkpoint needs all of them."""
        assert self.model is not None
        return is_in_parts(self.model)

    @property
    def _divided_parts(self) -> list[str]:
        """What of the model each process holds a part of."""
        model: Any = self.model
        return [name for name, is_so in (("tables", is_sharded(model)), ("weights", is_fully_sharded(model))) if is_so]

    def _own_file(self, name: str) -> str:
        """What each process has for itself; that of the first has the name it has when there is one process."""
        return name if self.args.process_index == 0 else f"{name}_{self.args.process_index}"

    def _check_parts(self, checkpoint: str) -> None:
        """Refuse the optimiser's state of tables or weights that were divided otherwise, or between another number of processes."""
        saved, wanted = len(list(Path(checkpoint).glob(f"{_OPTIMIZER}*.json"))), self.args.world_size if self._is_divided else 1
        if saved not in (0, wanted):  # without any, reading it says what is missing
            raise CheckpointError(
                f"{checkpoint} holds the optimiser's state in {saved} part(s), expected {wanted}: sharded tables and weights are resumed by as "
                "many processes as trained them. Start so many, or load the memory (from_pretrained) and train it anew."
            )
        file, present = Path(checkpoint, _TIME), self._divided_parts
        if file.is_file():  # checkpoints of earlier versions have none, or do not say
            saved_parts = json.loads(file.read_text(encoding="utf-8")).get("divided", present)
            if saved_parts != present:
                told = [" and ".join(parts) or "nothing" for parts in (saved_parts, present)]
                raise CheckpointError(
                    f"{checkpoint} was made with {told[0]} divided between processes, here is {told[1]}; the optimiser's state would not fit. "
                    "Divide the model as before, or load the memory (from_pretrained) and train it anew."
                )

    def _remove_other_parts(self, folder: Path) -> None:
        """What an earlier run of more processes left in the folder of a checkpoint."""
        for name, parts in ((_OPTIMIZER, self.args.world_size if self._is_divided else 1), (_RANDOM, self.args.world_size)):
            for file in folder.glob(f"{name}_*"):
                number = file.stem.rpartition("_")[2]
                if number.isdecimal() and int(number) >= parts:
                    file.unlink()

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        file = os.path.join(checkpoint, self._own_file(_RANDOM))
        if self.args.process_index > 0 and not os.path.exists(f"{file}.json"):
            return  # made by fewer processes: this one draws as it would in a new run
        state = load_tree(file)
        random.setstate(state["python"])
        np.random.set_state(state["numpy"])
        torch.set_rng_state(state["torch"])
        if torch.cuda.is_available() and "cuda" in state:
            torch.cuda.set_rng_state_all(state["cuda"])

    def _save_scaler(self, output_dir: str) -> None:
        scaler = getattr(self.accelerator, "scaler", None)  # there is one in float16 only
        if scaler is not None and self.args.should_save:
            save_tree(os.path.join(output_dir, _SCALER), scaler.state_dict())

    def _load_scaler(self, checkpoint: str | None) -> None:
        scaler = getattr(self.accelerator, "scaler", None)
        if scaler is not None and checkpoint is not None:
            scaler.load_state_dict(load_tree(os.path.join(checkpoint, _SCALER)))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As ``Trainer.save_model``; of what is divided between processes all save their parts, where some versions of transformers call the
        first process alone.
        """
        if self.args.should_save or not self._is_divided:
            super().save_model(output_dir, _internal_call)
            return
        self._save(output_dir)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self.args.should_save:
            if self._is_divided:
                self._save_weights(Path(output_dir or self.args.output_dir or "."))  # sends its part to the first
            return
        folder = Path(output_dir or self.args.output_dir or ".")
        folder.mkdir(parents=True, exist_ok=True)
        self._save_weights(folder)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        write_json_atomically(folder / "training_args.json", json.loads(self.args.to_json_string()) | self._limit)

    def _save_weights(self, folder: Path) -> None:
        self.accelerator.unwrap_model(self.model, keep_torch_compile=False).save_pretrained(folder)


def _given(args: tuple[Any, ...], kwargs: Mapping[str, Any], place: int, name: str) -> Any:
    """An argument of a call, by its name or by its place; None if it was left out."""
    return kwargs.get(name, args[place] if len(args) > place else None)


@contextmanager
def _no_bars_for_files() -> Iterator[None]:
    """transformers draws a bar for every file it writes, over whatever shows the run's own progress."""
    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            hf_logging.enable_progress_bar()


def _sync_all(folder: Path) -> None:
    """Return when all files of a checkpoint, and their names, are on the disk."""
    below = sorted(folder.rglob("*"))
    for file in below:
        if file.is_file():
            sync_to_disk(file)
    for place in (*(path for path in below if path.is_dir()), folder, folder.parent):
        with suppress(OSError):  # some file systems have no sync for folders
            sync_to_disk(place)


def _plain(state: dict[str, Any]) -> dict[str, Any]:
    """A scheduler's state without the lambdas it was built from; the trainer builds those again from its arguments."""
    return {key: value for key, value in state.items() if key != "lr_lambdas"} | {
        "lr_lambdas": [None] * len(state.get("lr_lambdas", []))
    }


def _complete_checkpoint(asked: str | bool | None, output_dir: str | None) -> str | None:
    """The folder to resume from, known to be complete; None for a fresh start."""
    if asked is None or asked is False:
        return None
    if asked is True:
        found = last_checkpoint(output_dir or ".")
        if found is None:
            raise CheckpointError(
                f"{output_dir} holds no complete checkpoint to resume from; train without resume_from_checkpoint. (Rows in files that "
                "a stopped run has trained are not those it began with: delete its row files first.)"
            )
        return str(found)
    if not is_complete(Path(asked)):
        raise CheckpointError(
            f"{asked} is no complete checkpoint ({TRAINER_STATE_NAME} is missing or cut short); "
            "resume from an earlier one, or pass True for the newest."
        )
    return str(asked)
