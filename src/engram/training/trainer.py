"""Training a memory (and, if wanted, its backbone) with `transformers.Trainer`."""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_model
from transformers import TrainingArguments
from transformers.utils import find_labels

from engram.errors import CheckpointError, ConfigError
from engram.models import EngramModel
from engram.optim import EngramAdamW, build_param_groups, clip_grad_norm_
from engram.training.safe_trainer import SafeTrainer

__all__ = ["EngramTrainer", "EngramTrainingArguments"]

_BACKBONE = "backbone"
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
    train_tables: bool = field(default=True, metadata={"help": "Whether table rows are trained."})
    train_reader: bool = field(default=True, metadata={"help": "Whether projections, norms and the convolution are trained."})
    train_backbone: bool = field(
        default=False, metadata={"help": "Whether the base model is trained too; it is frozen otherwise."}
    )
    backbone_lr: float | None = field(
        default=None, metadata={"help": "Learning rate of the base model; the base one if not given."}
    )


class EngramTrainer(SafeTrainer):
    """Trainer for an ``EngramModel``, in one process.

    Tables get their own learning rate and a row-sparse Adam, gradient clipping includes the sparse part, checkpoints hold the memory
    as ``save_pretrained`` writes it (and the backbone, when that is trained), and resuming is exact.

    Raises:
        ConfigError: the model is not an ``EngramModel``, or nothing would be trained.
    """

    def __init__(self, model: EngramModel, args: EngramTrainingArguments, **kwargs: Any) -> None:
        if not isinstance(model, EngramModel):
            raise ConfigError(f"EngramTrainer: got a {type(model).__name__}, expected an EngramModel (get_engram_model).")
        if not isinstance(args, EngramTrainingArguments):
            raise ConfigError(f"EngramTrainer: got {type(args).__name__}, expected EngramTrainingArguments.")
        _set_trainable(model, args)
        super().__init__(model=model, args=args, **kwargs)
        self._introspect_base(model.base_model)

    _signature_columns: Any
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
        """The model that is trained."""
        return cast(EngramModel, self.model)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """``EngramAdamW`` over ``build_param_groups``, unless an optimiser was given.

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
                self.memory,
                self.memory.engrams,
                lr=args.learning_rate,
                table_lr_multiplier=args.table_lr_multiplier,
                weight_decay=args.weight_decay,
                table_weight_decay=args.table_weight_decay,
                backbone_lr=args.backbone_lr,
            )
            self.optimizer = EngramAdamW(
                groups,
                lr=args.learning_rate,
                betas=(args.adam_beta1, args.adam_beta2),
                eps=args.adam_epsilon,
                fused=asked == "adamw_torch_fused" or None,
                row_state=args.table_row_state,
                stochastic_rounding=args.table_stochastic_rounding,
            )
        return self.optimizer

    def _clip_grad_norm(self, model: Any) -> torch.Tensor:
        return clip_grad_norm_(model.parameters(), self.args.max_grad_norm)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        return clip_grad_norm_(model.parameters(), float("inf")) if grad_norm is None else grad_norm

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            names = list(inspect.signature(self.memory.base_model.forward).parameters)
            self._signature_columns = [*names, "engram_input_ids", "label", "label_ids", *self.label_names]

    def _save_weights(self, folder: Path) -> None:
        self.memory.save_pretrained(folder)
        if self.args.train_backbone:  # type: ignore[attr-defined]
            # One file under the module's own names, so that load_model finds them again; from_pretrained reads it as well. The
            # original format renames and splits the experts of MoE models.
            self.memory.base_model.save_pretrained(folder / _BACKBONE, save_original_format=False, max_shard_size="1000TB")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        if self.args.train_backbone:  # type: ignore[attr-defined]
            _load_backbone(self.memory.base_model, folder / _BACKBONE / "model.safetensors")
        self.memory.load_memory(folder)

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        self._load_from_checkpoint(self.state.best_model_checkpoint)


def _set_trainable(model: EngramModel, args: EngramTrainingArguments) -> None:
    if not (args.train_tables or args.train_reader or args.train_backbone):
        raise ConfigError(
            "EngramTrainingArguments: train_tables, train_reader and train_backbone are all False; nothing to train."
        )
    tables = {id(p) for engram in model.engrams.values() for p in engram.multi_head_embedding.parameters()}
    for parameter in model.engrams.parameters():
        parameter.requires_grad_(args.train_tables if id(parameter) in tables else args.train_reader)
    model.base_model.requires_grad_(args.train_backbone)


def _load_backbone(base: Any, weights: Path) -> None:
    if not weights.is_file():
        raise CheckpointError(
            f"{weights} is missing; the checkpoint was made without train_backbone. Resume with the same arguments."
        )
    try:
        load_model(base, weights)
    except (RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{weights} does not fit this base model: {' '.join(str(error).split())[:300]}") from error
