"""Training a memory, a memory and its backbone, or a backbone alone with `transformers.Trainer`."""

from __future__ import annotations

import functools
import inspect
import logging
import math
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel, TrainingArguments
from transformers.utils import find_labels

from engram.checkpoint import ADAPTERS_FOLDER, BACKBONE_FOLDER, read_description
from engram.distributed import is_fully_sharded, process_count, put_apart, saving_together, sum_everywhere
from engram.errors import CheckpointError, ConfigError
from engram.models import EngramModel
from engram.models.base_check import has_other_adapters
from engram.models.files import save_memory
from engram.models.fsdp import refuse_undivided
from engram.models.identity import active_adapters, adapter_kinds, adapter_parameters, base_of
from engram.models.peft_files import refuse_merged, save_for_peft
from engram.models.quantised import is_quantised, refusal_of_training
from engram.optim import BACKBONE_OPTIMIZERS, ROW_STATES, EngramAdamW, EngramMuon, build_param_groups, clip_grad_norm_
from engram.tables import Replicas, copy_all_but_tables, replicate_tables, row_parameters
from engram.training.safe_trainer import SafeTrainer
from engram.training.telemetry import MemoryTelemetry
from engram.training.weight_files import (
    BACKBONE_WEIGHTS,
    fill_adapters,
    load_backbone,
    save_adapters,
    save_backbone,
    whole_adapters,
)

__all__ = ["EngramTrainer", "EngramTrainingArguments"]

_ADAPTERS = "engram_adapters.safetensors"
_ADAMW = ("adamw_torch", "adamw_torch_fused")


@dataclass
class EngramTrainingArguments(TrainingArguments):
    """`TrainingArguments` with what an Engram memory adds."""

    table_lr_multiplier: float = field(
        default=5.0, metadata={"help": "Tables' learning rate as a multiple of the base one (paper: 5)."}
    )
    table_weight_decay: float = field(default=0.0, metadata={"help": "Weight decay of touched table rows (paper: none)."})
    table_row_state: str = field(
        default="adam",
        metadata={
            "help": "What the optimiser remembers per table row: adam, rowwise_adam (half of it) or rowwise_adagrad (one number)."
        },
    )
    table_stochastic_rounding: bool = field(
        default=False,
        metadata={"help": "Whether rows of bfloat16 or float16 tables are rounded by chance, so that small steps count."},
    )
    memory_dropout: float = field(
        default=0.0,
        metadata={
            "help": "Share of training sequences that do not read the memory, so that the model is of use without it too."
        },
    )
    log_memory: bool = field(
        default=True,
        metadata={
            "help": "Whether log entries hold figures of each layer of the memory: gates, what is added, gradients, rows touched "
            "(MemoryTelemetry)."
        },
    )
    keep_memory: bool = field(
        default=True,
        metadata={
            "help": "Whether memory that steps on the CPU free stays with the process until training ends: faster, as the system need not "
            "map and clear it for every step."
        },
    )
    train_tables: bool = field(default=True, metadata={"help": "Whether table rows are trained."})
    train_reader: bool = field(default=True, metadata={"help": "Whether projections, norms and the convolution are trained."})
    train_backbone: bool = field(
        default=False,
        metadata={
            "help": "Whether the base model is trained too; otherwise it is frozen, but for adapters on it that are trainable already."
        },
    )
    backbone_lr: float | None = field(
        default=None, metadata={"help": "Learning rate of the base model, or of the adapters on it; the base one if not given."}
    )
    backbone_optimizer: str = field(
        default="adamw",
        metadata={"help": "What steps the matrices of hidden layers when the base model is trained: adamw or muon (paper)."},
    )


class EngramTrainer(SafeTrainer):
    """Trainer for an ``EngramModel``; or, with ``train_backbone``, for a plain model, which makes it a fair baseline:
    parameter groups, optimiser, clipping and checkpoints are the same code, and only what belongs to the memory is missing.

    Tables get their own learning rate and a row-sparse Adam, gradient clipping includes the sparse part, checkpoints hold the memory
    as ``save_pretrained`` writes it, and resuming is exact. A base model that is trained too is in the folder ``backbone`` beside it, a plain
    model in the checkpoint's own folder, as ``from_pretrained`` reads them.

    Adapters (peft) on the base model that are trainable when the trainer is made are trained as well, at ``backbone_lr`` if that is given.
    They, and frozen ones that are at work, are in its checkpoints and in what ``save_model`` writes: in the folder ``adapters``, as peft reads
    them (``engram.models.load_adapters``). The memory is saved as one that was trained beside them. Weights of a base model in 4 or 8 bits
    stay as they are.

    Several processes divide every batch between them (``torchrun --nproc-per-node N train.py``): the step is that of one process with
    N times the batch. Each holds a copy of the tables, and what travels between them are the gradients of the rows that were read
    (``replicate_tables``). Tables in row files (``tier="mmap"``) need a file for each process. Base models of which not every device can hold
    a copy are divided first (``shard_model``).

    Raises:
        ConfigError: the model is neither, the arguments are not ``EngramTrainingArguments`` or contradict each other, or nothing would be
            trained.
    """

    def __init__(self, model: EngramModel | PreTrainedModel, args: EngramTrainingArguments, **kwargs: Any) -> None:
        if not isinstance(args, EngramTrainingArguments):
            raise ConfigError(f"EngramTrainer: got {type(args).__name__}, expected EngramTrainingArguments.")
        plain = isinstance(model, PreTrainedModel) and args.train_backbone
        if not plain and not isinstance(model, EngramModel):
            raise ConfigError(
                f"EngramTrainer: got a {type(model).__name__}, expected an EngramModel (get_engram_model), or a PreTrainedModel together "
                "with train_backbone=True."
            )
        _check_arguments(args, bool(_trained_adapters(base_of(model))))
        _check_quantised(model, args)
        refuse_merged(base_of(model))
        self._adapters_before = active_adapters(base_of(model))
        if isinstance(model, EngramModel):
            _check_divided(model, args)
        put_apart(model)  # what is set for parameters that FSDP left together would be lost with them
        _set_trainable(model, args)
        if is_fully_sharded(model):
            refuse_undivided(model)
        if args.world_size > 1 and args.ddp_find_unused_parameters is None and not args.train_backbone:
            args.ddp_find_unused_parameters = (
                False  # a memory uses all that it has; DDP would search every pass for what it does not
            )
        super().__init__(model=model, args=args, **kwargs)
        if args.save_on_each_node and self._is_divided:
            raise ConfigError(
                "EngramTrainingArguments.save_on_each_node: got True with sharded tables or weights, expected False: the first process "
                "writes them all."
            )
        if args.fp16 and self._is_divided:
            raise ConfigError(
                "EngramTrainingArguments.fp16: got True with sharded tables or weights, expected bf16 or float32: each process would decide "
                "for itself which steps overflow."
            )
        self._introspect_base(self.backbone)
        self._telemetry = MemoryTelemetry() if args.log_memory and isinstance(model, EngramModel) else None

    _signature_columns: Any
    _gate_mean: torch.Tensor | None = None
    label_smoother: Any

    def _introspect_base(self, base: Any) -> None:
        """What Trainer reads off a model's class and forward signature, read off the base model: ``EngramModel`` hides both."""
        forward = inspect.signature(base.forward).parameters.values()
        takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in forward)
        self.model_accepts_loss_kwargs = getattr(base, "accepts_loss_kwargs", takes_any)
        if self.args.label_names is None:
            self.label_names = find_labels(type(base))  # without labels, evaluation would report no loss
        if self.label_smoother is not None:
            # Trainer shifts labels only for class names that it knows as causal language models.
            self.label_smoother = functools.partial(self.label_smoother, shift_labels=True)

    @property
    def memory(self) -> EngramModel:
        """The model that is trained.

        Raises:
            ConfigError: it is a plain model without a memory.
        """
        if not isinstance(self.model, EngramModel):
            raise ConfigError("EngramTrainer.memory: this trainer's model has no memory.")
        return self.model

    @property
    def backbone(self) -> Any:
        """The base model: that of the memory, or the plain model itself."""
        return base_of(self.model)

    def _model_with_loss(self) -> Any:
        return self.backbone

    _replicas: Replicas | None = None
    _tables_alone = False
    """Whether several processes train nothing but tables, which DDP passes by: it refuses a model in which there is nothing for it to do."""

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As ``SafeTrainer.train``; several processes keep their copies of the tables equal."""
        if isinstance(self.model, EngramModel):
            self.model.trained_beside = adapter_kinds(self.backbone)
            self.model.adapters_sha256 = None  # those that are there when it is saved
        if process_count() == 1 or not isinstance(self.model, EngramModel):
            return super().train(*args, **kwargs)
        divided = is_fully_sharded(self.model)
        self._replicas = replicate_tables(self.model)
        self._tables_alone = _trains_nothing_but_tables(self.model)
        if self._tables_alone and not divided:  # DDP, which would make the rest equal, is not there
            copy_all_but_tables(self.model)
        if self._tables_alone or divided:
            self.accelerator.prepare_model = functools.partial(self.accelerator.prepare_model, evaluation_mode=True)
        try:
            return super().train(*args, **kwargs)
        finally:
            self._replicas.remove()
            self._replicas, self._tables_alone = None, False
            vars(self.accelerator).pop("prepare_model", None)

    def _move_model_to_device(self, model: Any, device: torch.device) -> None:
        if not is_fully_sharded(model):  # of a divided one the parts lie where they shall
            super()._move_model_to_device(model, device)

    def _is_parallel(self, model: Any) -> bool:
        return self._tables_alone or super()._is_parallel(model)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self._replicas is not None and not self._replicas.are_equal():
            logging.getLogger("engram").warning(
                "the copies of the tables in the processes of this run have come to differ; the first one's is saved. Processes on different "
                "hardware round differently: use equal machines."
            )
        super()._save_checkpoint(model, trial)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """``EngramAdamW`` or, with ``backbone_optimizer="muon"``, ``EngramMuon`` over ``build_param_groups``, unless an optimiser was given.

        Raises:
            ConfigError: the arguments ask for another optimiser than AdamW.
        """
        if self.optimizer is None:
            args: Any = self.args
            asked = getattr(args.optim, "value", args.optim)
            if asked not in _ADAMW:
                raise ConfigError(
                    f"EngramTrainingArguments.optim: got {asked!r}, expected one of {', '.join(_ADAMW)} (EngramAdamW is used for "
                    "both, its dense part fused or not), or pass optimizers=(yours, None)."
                )
            groups = build_param_groups(
                cast(torch.nn.Module, self.model),
                self.model.engrams if isinstance(self.model, EngramModel) else None,
                lr=args.learning_rate,
                table_lr_multiplier=args.table_lr_multiplier,
                weight_decay=args.weight_decay,
                table_weight_decay=args.table_weight_decay,
                backbone_lr=args.backbone_lr,
                backbone_optimizer=args.backbone_optimizer,
            )
            kind = EngramMuon if args.backbone_optimizer == "muon" else EngramAdamW
            self.optimizer = kind(
                groups,
                lr=args.learning_rate,
                betas=(args.adam_beta1, args.adam_beta2),
                eps=args.adam_epsilon,
                fused=asked == "adamw_torch_fused" or None,
                row_state=args.table_row_state,
                stochastic_rounding=args.table_stochastic_rounding,
            )
        return self.optimizer

    def _clip_grad_norm(self, model: Any, max_norm: float | None = None) -> torch.Tensor:
        self.accelerator.unscale_gradients()  # of float16: until then they are so many times too large
        if self._telemetry is not None and self._telemetry.is_due:
            self._telemetry.measure_gradients(self.memory)
        return clip_grad_norm_(model.parameters(), self.args.max_grad_norm if max_norm is None else max_norm)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        return super()._get_grad_norm(model, self._clip_grad_norm(model, float("inf")) if grad_norm is None else grad_norm)

    def _get_learning_rate(self) -> float:
        """The base learning rate: tables, which come first, have a multiple of it."""
        groups = self.optimizer.param_groups
        return float(next((group for group in groups if group.get("name") != "tables"), groups[0])["lr"])

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """As ``SafeTrainer.training_step``; sequences are dropped from the memory, and before a log entry the gates are recorded."""
        if not isinstance(self.model, EngramModel):
            return super().training_step(model, inputs, num_items_in_batch)
        route = self._route(inputs)
        with self.model.routed(route):
            return self._memory_step(model, inputs, num_items_in_batch, route)

    def _route(self, inputs: dict[str, Any]) -> torch.Tensor | None:
        """Which sequences of a batch read the memory, ``[B]``; drawn from PyTorch's state, which checkpoints hold."""
        share, ids = self.args.memory_dropout, inputs.get("input_ids")  # type: ignore[attr-defined]
        if not share or ids is None:
            return None
        # Of one draw for all processes each takes its own: the step is that of one process with all their sequences.
        own = slice(self.args.process_index * len(ids), (self.args.process_index + 1) * len(ids))
        return torch.rand(len(ids) * self.args.world_size)[own] >= share

    def _memory_step(
        self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any, route: torch.Tensor | None
    ) -> torch.Tensor:
        every = max(1, self.state.logging_steps)
        if self.memory.is_recording or (self.state.global_step + 1) % every:
            return super().training_step(model, inputs, num_items_in_batch)
        with self.memory.record() as traces:
            loss = super().training_step(model, inputs, num_items_in_batch)
        if self._telemetry is not None:
            self._telemetry.add(self.state.global_step, traces, inputs.get("attention_mask"), route)
            return loss
        gates = [trace["gate"].float().mean() for trace in traces.values() if "gate" in trace]
        self._gate_mean = sum_everywhere(torch.stack(gates).mean()) / process_count() if gates else None
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As ``SafeTrainer.log``; with a memory, a training loss comes with ``gate_mean``. With ``log_memory`` it is the mean over the layers,
        whose figures follow it (``MemoryTelemetry``); without, that of all positions of the step's last batch, padding included.
        """
        if "loss" in logs and self._telemetry is not None:
            figures = self._telemetry.read()
            if means := [value for name, value in figures.items() if name.endswith("/gate_mean")]:
                logs["gate_mean"] = round(sum(means) / len(means), 4)
            logs.update(figures)
        elif "loss" in logs and self._gate_mean is not None:
            logs["gate_mean"] = round(float(self._gate_mean), 4)
            self._gate_mean = None
        super().log(logs, *args, **kwargs)

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            names = list(inspect.signature(self.backbone.forward).parameters)
            self._signature_columns = [*names, "engram_input_ids", "label", "label_ids", *self.label_names]

    def _save_weights(self, folder: Path) -> None:
        if isinstance(self.model, EngramModel):
            save_memory(self.model, folder, with_base=self.args.train_backbone)  # type: ignore[attr-defined]
        divided = is_fully_sharded(cast(torch.nn.Module, self.model))
        if not self.args.should_save and not divided:
            return
        if self.args.train_backbone:  # type: ignore[attr-defined]
            self._save_backbone(self._backbone_folder(folder))
        with saving_together(divided):
            self._save_adapters(folder, divided)

    def _save_backbone(self, folder: Path) -> None:
        save_backbone(self.backbone, folder)
        if not self.args.should_save or not isinstance(self.model, EngramModel):  # which Trainer saves a tokenizer with
            return
        tokenizer = self.model.tokenizer if self.processing_class is None else self.processing_class
        if hasattr(tokenizer, "save_pretrained"):  # others have what a memory asks of one, and no more
            tokenizer.save_pretrained(folder)

    def _save_adapters(self, folder: Path, divided: bool) -> None:
        """Those that are trained, to resume from, and all that are at work as peft reads them."""
        adapters = whole_adapters(adapter_parameters(self.backbone), together=divided)
        if adapters is None:
            return
        had = (folder / _ADAPTERS).is_file()
        save_adapters({name: adapters[name] for name in _trained_adapters(self.backbone)}, folder / _ADAPTERS)
        trained_base = self._backbone_folder(folder) if self.args.train_backbone else None  # type: ignore[attr-defined]
        names = dict.fromkeys(
            [*self._adapters_before, *active_adapters(self.backbone)]
        )  # others may be at work by now, or none
        if not save_for_peft(self.backbone, names, adapters, folder, trained_base) and had:
            shutil.rmtree(folder / ADAPTERS_FOLDER, ignore_errors=True)  # of an earlier run, as that file was

    def _backbone_folder(self, checkpoint: Path) -> Path:
        return checkpoint / BACKBONE_FOLDER if isinstance(self.model, EngramModel) else checkpoint

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        put_apart(cast(torch.nn.Module, self.model))
        had_adapters = False
        if self.args.train_backbone:  # type: ignore[attr-defined]
            had_adapters = load_backbone(self.backbone, self._backbone_folder(folder) / BACKBONE_WEIGHTS)
        if not had_adapters:
            fill_adapters(_trained_adapters(self.backbone), folder / _ADAPTERS)
        if isinstance(self.model, EngramModel):
            if has_other_adapters(read_description(folder), self.model):
                raise CheckpointError(
                    f"{folder} was made with other adapters at work than those on the base model now, or they count for more or less than then "
                    "(lora_alpha). Put the same adapters on the base model before the trainer is made."
                )
            self.model.load_memory(folder, changed_rows="refill")

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        self._load_from_checkpoint(self.state.best_model_checkpoint)


def _trains_nothing_but_tables(model: EngramModel) -> bool:
    rows = row_parameters(model)
    return all(id(p) in rows for p in model.parameters() if p.requires_grad)


def _check_arguments(args: EngramTrainingArguments, has_adapters: bool) -> None:
    if not (args.train_tables or args.train_reader or args.train_backbone or has_adapters):
        raise ConfigError(
            "EngramTrainingArguments: train_tables, train_reader and train_backbone are all False; nothing to train."
        )
    if args.backbone_optimizer not in BACKBONE_OPTIMIZERS:
        raise ConfigError(
            f"EngramTrainingArguments.backbone_optimizer: got {args.backbone_optimizer!r}, expected one of {', '.join(BACKBONE_OPTIMIZERS)}."
        )
    if args.table_row_state not in ROW_STATES:
        raise ConfigError(
            f"EngramTrainingArguments.table_row_state: got {args.table_row_state!r}, expected one of {', '.join(ROW_STATES)}."
        )
    for name in ("table_lr_multiplier", "table_weight_decay"):
        value = getattr(args, name)
        if isinstance(value, bool) or not 0 <= value < math.inf:
            raise ConfigError(f"EngramTrainingArguments.{name}: got {value!r}, expected a number from 0 on.")
    if args.backbone_lr is not None and not (args.train_backbone or has_adapters):
        raise ConfigError(
            f"EngramTrainingArguments.backbone_lr: got {args.backbone_lr!r} with train_backbone=False and no trainable adapters on the base "
            "model, of which it is the rate; set train_backbone, add adapters (peft), or leave it out."
        )
    if isinstance(args.memory_dropout, bool) or not 0 <= args.memory_dropout < 1:
        raise ConfigError(
            f"EngramTrainingArguments.memory_dropout: got {args.memory_dropout!r}, expected a share of at least 0 and below 1."
        )
    if args.backbone_optimizer == "muon" and not args.train_backbone:
        raise ConfigError(
            "EngramTrainingArguments.backbone_optimizer: got 'muon' with train_backbone=False; "
            "a frozen base model needs no optimiser: set train_backbone or leave this at 'adamw'."
        )


def _check_quantised(model: EngramModel | PreTrainedModel, args: EngramTrainingArguments) -> None:
    base = base_of(model)
    if args.train_backbone and is_quantised(base):
        raise ConfigError(
            "EngramTrainingArguments.train_backbone: got True with a quantised base model, whose weights cannot be stepped, expected False: "
            "the memory is trained, and adapters (peft) on the base with it. Or load the model in full precision."
        )
    if because := refusal_of_training(base):
        raise ConfigError(
            f"EngramTrainer: {because}, expected one of bitsandbytes (4 or 8 bits) or in full precision: load the model so."
        )


def _check_divided(model: EngramModel, args: EngramTrainingArguments) -> None:
    if is_fully_sharded(model.base_model) and not is_fully_sharded(model):
        raise ConfigError(
            "EngramTrainer: got a base model that was divided while it was loaded, and readers that each process would train by itself, "
            "expected shard_model(memory) first."
        )


def _set_trainable(model: EngramModel | PreTrainedModel, args: EngramTrainingArguments) -> None:
    """What the arguments say; adapters stay as trainable as they are."""
    if isinstance(model, EngramModel):
        _set_memory_trainable(model, args)
    base = base_of(model)
    adapters = {id(parameter) for parameter in adapter_parameters(base).values()}
    for parameter in base.parameters():
        if id(parameter) not in adapters:
            parameter.requires_grad_(args.train_backbone)


def _set_memory_trainable(model: EngramModel, args: EngramTrainingArguments) -> None:
    if args.train_tables:
        _refuse_untrainable(model)
    for engram in model.engrams.values():
        engram.table.requires_grad_(args.train_tables)
        for parameter in engram.reader_parameters():
            parameter.requires_grad_(args.train_reader)
        for part in engram.seeded_parts:
            part.requires_grad_(False)


def _trained_adapters(base: Any) -> dict[str, torch.nn.Parameter]:
    """Trainable parameters of adapters on a base model, by their names in that."""
    return {name: parameter for name, parameter in adapter_parameters(base).items() if parameter.requires_grad}


def _refuse_untrainable(model: EngramModel) -> None:
    if model.engram_config.verify_rows:
        raise ConfigError(
            "EngramTrainingArguments.train_tables: got True for a taught memory (EngramConfig.verify_rows), whose rows are written fact "
            "by fact; expected train_tables=False. To teach it, use MemoryEditor.teach or `engram teach`."
        )
    for layer_id, engram in model.engrams.items():
        table = engram.table
        if because := getattr(table, "read_only_because", None):
            raise ConfigError(
                f"EngramTrainingArguments.train_tables: got True with the rows of layer {layer_id} in {table.location}, which could not be "
                f"opened for writing: {because} Load the memory again when it can be, or give train_tables=False."
            )
        if not table.can_be_trained:
            raise ConfigError(
                f"EngramTrainingArguments.train_tables: got True with the rows of layer {layer_id} in {table.location} as {table.format_name}, "
                "which are only read; expected float32, bfloat16 or float16 rows that may be written (tier 'mmap' needs a path), or "
                "train_tables=False."
            )
