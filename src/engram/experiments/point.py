"""Training and measuring one point of an experiment."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel, TrainerCallback, set_seed

from engram.checkpoint import write_json_atomically
from engram.distributed import is_fully_sharded, process_count, process_rank, saving_together, wait_for_all
from engram.errors import CheckpointError, ConfigError, TrainingError, first_of
from engram.evaluation.versions import made_with
from engram.experiments.arms import base_fields
from engram.experiments.backbone import build_backbone
from engram.experiments.counts import count_model, predict_flops
from engram.experiments.data import PreparedData
from engram.experiments.held_out import measure
from engram.experiments.recipe import PointRecipe
from engram.models import EngramModel, get_engram_model, load_model, shard_model
from engram.models.identity import base_identity, base_of
from engram.models.positions import context_length
from engram.models.quantised import is_quantised
from engram.tables import is_in_parts
from engram.training import EngramTrainer, EngramTrainingArguments
from engram.training.balance import BalanceCallback, find_routers
from engram.training.guards import read_claim
from engram.training.safe_trainer import InOrder, SafeTrainer, last_checkpoint
from engram.training.several import first_process_first
from engram.training.weight_files import gathered_state

__all__ = ["RESULT", "run_point"]

RESULT = "result.json"
"""File of a finished point; where it is, nothing is run again."""

_RECIPE = "recipe.json"
_ROWS = "rows"
_DEFAULT, _NAMED = "the default", 5
_VALIDATION = "eval_validation_loss"


def _build_base(recipe: PointRecipe, tokenizer: Any) -> PreTrainedModel:
    """A fresh backbone of a solved recipe, or the model that it goes on from.

    Raises:
        CheckpointError: a model to go on from cannot be loaded.
        ConfigError: it takes no blocks as long as the recipe's, or is to be trained and quantised.
    """
    set_seed(recipe.seed)
    if recipe.model is None:
        return build_backbone(recipe.backbone, tokenizer)
    model = _load(recipe.model, recipe.data.seq_len)
    if recipe.train_backbone and is_quantised(model):
        raise ConfigError(
            f"PointRecipe.train_backbone: got True with {recipe.model}, whose weights are quantised and cannot be stepped, expected "
            "train_backbone: false with a memory, or a model in full precision."
        )
    return model


def _attach_memory(recipe: PointRecipe, model: PreTrainedModel, tokenizer: Any, out: Path) -> PreTrainedModel | EngramModel:
    """The model with the recipe's memory, if it has one; everything that is trained trainable. Row files are made in ``out`` anew."""
    if recipe.engram is None:
        return model
    pad = {} if tokenizer.pad_token_id is None else {"pad_id": tokenizer.pad_token_id}
    placement = recipe.table
    if placement is not None and placement.tier == "mmap":
        if process_count() > 1:
            raise ConfigError(
                "PointRecipe.table: got tier 'mmap' with several processes, expected 'host' or 'device' (with sharded: true each holds a part)."
            )
        shutil.rmtree(out / _ROWS, ignore_errors=True)  # what an interrupted run left; its checkpoint has them all
        placement = dataclasses.replace(placement, path=str(out / _ROWS))
    memory = get_engram_model(model, recipe.engram.replace(**pad, seed=recipe.seed), tokenizer, placement)
    memory.engrams.requires_grad_(True)
    memory.base_model.requires_grad_(recipe.train_backbone)
    return memory


def _load(name: str, seq_len: int) -> PreTrainedModel:
    model, _ = load_model(name)
    most = context_length(model.config) or seq_len
    if seq_len > most:
        raise ConfigError(f"PointRecipe: got data.seq_len {seq_len}, expected at most the {most} positions of {name}.")
    return model


def run_point(
    recipe: PointRecipe,
    data: PreparedData,
    out: Path,
    callbacks: Sequence[TrainerCallback] = (),
    report_to: Sequence[str] = (),
) -> dict[str, Any]:
    """Train, measure and write ``out/result.json``; a finished point is read back, an interrupted one goes on exactly.

    Several processes (set up before, all calling this) share every batch; all measure, the first writes.

    Args:
        recipe: what to train.
        data: what on.
        out: the point's folder.
        callbacks: of the trainer, a ``LiveProgress`` for instance.
        report_to: loggers of transformers, ``tensorboard`` or ``wandb``.

    Raises:
        CheckpointError: ``out`` holds another recipe.
        ConfigError: the budget cannot be met, or a batch not be divided between the processes.
    """
    solved = recipe.solved()
    present = {"identity": recipe.identity(), "text": data.store.fingerprint, "recipe": recipe.to_dict()}
    base = None
    if recipe.model is not None:  # a name says where a model lies, not what it is
        base = _build_base(solved, data.tokenizer)
        present["model"] = base_identity(base)["weights_sha256"]
        count_model(base)  # what cannot be counted is told now, and not when all is trained
    present = json.loads(json.dumps(present))
    with first_process_first():
        _claim(out, present)
    if (out / RESULT).is_file():
        _clear(out, recipe.keep_checkpoints)
        return json.loads((out / RESULT).read_text(encoding="utf-8"))
    if base is None:
        base = _build_base(solved, data.tokenizer)
    model = _attach_memory(solved, base, data.tokenizer, out)
    divided = solved.shard_model and process_count() > 1
    if divided:
        shard_model(cast(EngramModel, model))
    # A new memory is empty: this is what the model was without it.
    before = None
    if solved.model is not None:
        if torch.cuda.is_available() and not divided:  # where the trainer takes it: both are measured alike
            nn.Module.to(model, "cuda")
        before = _measure_all(model, data, solved.bf16)
    curve = _Curve(solved, data)
    trainer = _trainer(solved, data, model, out, [curve, *callbacks], report_to)
    curve.trainer = trainer
    last = last_checkpoint(out / "checkpoints")
    trainer.train(resume_from_checkpoint=str(last) if last else None)
    if trainer.interrupt.interrupted:
        raise KeyboardInterrupt(f"stopped at step {trainer.state.global_step}; the same command goes on from there")
    result = _result(solved, data, model, trainer)
    if before is not None:
        result["held_out_before"] = before
    if solved.memory_dropout and isinstance(model, EngramModel):
        with model.disable_engram():
            result["held_out_off"] = _measure_all(model, data, solved.bf16)
    if recipe.keep_model:
        _keep(model, data, out, solved.train_backbone)
    if process_rank() == 0:
        write_json_atomically(out / RESULT, {**result, **present})
    _clear(out, recipe.keep_checkpoints)
    wait_for_all()
    return json.loads((out / RESULT).read_text(encoding="utf-8"))


def _claim(out: Path, recipe: dict[str, Any]) -> None:
    """One folder holds one run: of one recipe, whatever has no effect on the result aside, on one text. The first process writes so."""
    file = out / _RECIPE
    if file.is_file():
        instead = (
            "choose another folder"
            if _has_begun(out)
            else f"nothing was trained there yet: delete {file}, or choose another folder"
        )
        found = read_claim(file)
        if found is None:
            raise CheckpointError(
                f"{file} is damaged, and says no longer what the run there is of; {instead} (nothing was overwritten)."
            )
        for name, what in (("identity", "of another recipe"), ("text", "on other text"), ("model", "from another model")):
            if found.get(name) != recipe.get(name):
                raise CheckpointError(
                    f"{out} holds a run {what}{_told(found, recipe, name)}; {instead} (nothing was overwritten)."
                )
    if process_rank() > 0:
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_json_atomically(file, recipe)
    except OSError as error:
        raise CheckpointError(f"cannot write to {out}: {error.strerror}.") from None


def _told(found: dict[str, Any], recipe: dict[str, Any], name: str) -> str:
    """The fields that an earlier run had otherwise, in brackets, where these are what differs."""
    if name != "identity" or not isinstance(found.get(name), Mapping):
        return ""
    there, here = (base_fields({"base": entry[name]}) for entry in (found, recipe))
    names = [key for key in sorted({*there, *here}) if there.get(key) != here.get(key)]
    if not there or not names:
        return ""
    changes = [f"{key} {there.get(key, _DEFAULT)}, now {here.get(key, _DEFAULT)}" for key in names]
    return f" ({first_of(changes, _NAMED, '; ')})"


def _has_begun(out: Path) -> bool:
    """Whether something was trained in a run's folder."""
    return any((out / name).exists() for name in ("checkpoints", _ROWS, RESULT, "model", "memory"))


def _clear(out: Path, keep_checkpoints: bool) -> None:
    """Take away what only an unfinished run needs."""
    if process_rank() > 0:
        return
    for folder in (_ROWS,) if keep_checkpoints else ("checkpoints", _ROWS):
        shutil.rmtree(out / folder, ignore_errors=True)


class _Trainer(InOrder, EngramTrainer):
    """For models with and without a memory alike."""


class _Curve(TrainerCallback):
    """Validation loss on the way, on a sixteenth of the half."""

    trainer: Any

    def __init__(self, recipe: PointRecipe, data: PreparedData) -> None:
        self.every = max(1, recipe.steps // recipe.curve_points)
        self.blocks = data.held_out["validation"]

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Measure now and then."""
        if state.global_step % self.every == 0:
            with self.trainer.throughput.paused():  # tokens per second are those of training
                loss = measure(model, self.blocks, every=16)["loss"]
            due = control.should_log
            self.trainer.log({_VALIDATION: round(loss, 4)})
            control.should_log = due  # logging takes it back, and the training loss of this step would never be told


def _trainer(
    recipe: PointRecipe,
    data: PreparedData,
    model: Any,
    out: Path,
    callbacks: list[TrainerCallback],
    report_to: Sequence[str],
) -> SafeTrainer:
    if recipe.batch_size % process_count():
        raise ConfigError(
            f"PointRecipe.batch_size: got {recipe.batch_size} blocks for {process_count()} processes, expected as many for each of them."
        )
    arguments: dict[str, Any] = {
        "output_dir": str(out / "checkpoints"),
        "max_steps": recipe.steps,
        "per_device_train_batch_size": recipe.batch_size // process_count(),
        "learning_rate": recipe.learning_rate,
        "adam_beta2": 0.95,
        "weight_decay": recipe.weight_decay,
        "max_grad_norm": 1.0,
        **_schedule(recipe),
        "bf16": recipe.bf16,
        "use_cpu": not torch.cuda.is_available(),
        "logging_steps": max(1, recipe.steps // 50),
        "save_steps": recipe.save_steps,
        "save_total_limit": None if recipe.keep_checkpoints else 1,
        "seed": recipe.seed,
        "report_to": list(report_to),
        "train_backbone": recipe.train_backbone,
        "backbone_optimizer": recipe.optimizer,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    if isinstance(model, EngramModel):
        arguments["table_lr_multiplier"] = recipe.table_lr_multiplier
        for name in ("memory_dropout", "table_row_state", "table_stochastic_rounding"):
            arguments[name] = getattr(recipe, name)
    if recipe.train_backbone and find_routers(model):  # the biases are buffers: nothing else would keep a frozen model as it is
        callbacks = [*callbacks, BalanceCallback(model, recipe.balance_rate)]
    return _Trainer(
        model=model,
        args=EngramTrainingArguments(**arguments),
        train_dataset=data.train(recipe.steps * recipe.batch_size, recipe.seed),
        callbacks=callbacks,
    )


def _schedule(recipe: PointRecipe) -> dict[str, Any]:
    """What transformers calls the recipe's learning rates."""
    warmup = round(recipe.warmup_share * recipe.steps)
    rest = recipe.steps - warmup
    falling = rest if recipe.lr_scheduler == "linear" else min(rest, round(recipe.decay_share * recipe.steps))
    decay = {"num_decay_steps": falling, "min_lr_ratio": recipe.min_lr_ratio}
    kind, options = {
        "cosine": ("cosine_with_min_lr", {"min_lr_rate": recipe.min_lr_ratio}),
        "constant": ("constant_with_warmup", None),
        # transformers' own "linear" knows no rate to end at
        "linear": ("warmup_stable_decay", {**decay, "decay_type": "linear"}),
        "wsd": ("warmup_stable_decay", decay),
    }[recipe.lr_scheduler]
    return {"lr_scheduler_type": kind, "lr_scheduler_kwargs": options, "warmup_steps": warmup}


def _result(recipe: PointRecipe, data: PreparedData, model: Any, trainer: SafeTrainer) -> dict[str, Any]:
    seconds, history = trainer.seconds, trainer.state.log_history
    dataset: Any = trainer.train_dataset
    losses = [(entry["step"], round(entry["loss"], 4)) for entry in history if "loss" in entry]
    if not losses or not all(math.isfinite(loss) for _, loss in losses):
        raise TrainingError(f"training loss is not finite ({losses[-1:]}); lower the learning rate. No result was written.")
    held_out = _measure_all(model, data, recipe.bf16)
    if not all(math.isfinite(half["loss"]) for half in held_out.values()):
        raise TrainingError("held-out loss is not finite; lower the learning rate. No result was written.")
    loads = [entry["expert_load_max"] for entry in history if "expert_load_max" in entry]
    tokens = recipe.steps * recipe.batch_tokens
    return {
        "counts": {**_memory_counts(recipe, model), **_backbone_counts(recipe, tokens)},
        "held_out": held_out,
        "held_out_text": {half: blocks.composition for half, blocks in data.held_out.items()},
        "tokens": tokens,
        "epochs": round(dataset.epochs, 3),
        "steps": recipe.steps,
        "training_loss": losses,
        "curve": [(e["step"], e[_VALIDATION]) for e in history if _VALIDATION in e],
        "expert_load_max": loads[-1] if loads else None,
        "seconds": round(seconds, 1),
        "made_with": made_with(),
    }


def _measure_all(model: Any, data: PreparedData, bf16: bool) -> dict[str, Any]:
    # What was trained keeps the precision of its training; what was not must be measured in the same.
    with torch.autocast(next(model.parameters()).device.type, torch.bfloat16, enabled=bf16):
        return {half: measure(model, blocks) for half, blocks in data.held_out.items()}


def _memory_counts(recipe: PointRecipe, model: Any) -> dict[str, Any]:
    modules = model.engrams.values() if isinstance(model, EngramModel) else ()
    return {
        **count_model(model).to_dict(),
        "table_rows": sum(e.table.rows for e in modules),
        "rows_per_head": list(recipe.engram.engram_vocab_size) if recipe.engram else [],  # type: ignore[arg-type]
    }


def _backbone_counts(recipe: PointRecipe, tokens: int) -> dict[str, Any]:
    """Of a backbone of ours, whose config says all of it."""
    if recipe.model is not None:
        return {}
    flops = predict_flops(recipe.backbone, recipe.engram, recipe.data.seq_len)
    return {
        "experts": recipe.backbone.n_routed_experts if recipe.backbone.has_experts else 0,
        "dense_width": recipe.backbone.intermediate_size,
        "flops_per_token": flops,
        "training_flops": 3 * flops * tokens,
    }


def _keep(model: Any, data: PreparedData, out: Path, train_backbone: bool) -> None:
    """``out/model`` with its tokenizer, if it was trained, and ``out/memory``, if there is one."""
    first, base = process_rank() == 0, base_of(model)
    if train_backbone:
        with saving_together(is_fully_sharded(base)):
            state = gathered_state(base)
            if first:
                base.save_pretrained(out / "model", state_dict=state)
                data.tokenizer.save_pretrained(out / "model")
    if isinstance(model, EngramModel) and (first or is_in_parts(model)):
        model.save_pretrained(out / "memory")
