"""An optimiser that looks after a memory by itself, for trainers that know nothing of it."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import nn

from engram.errors import ConfigError, TrainingError
from engram.optim.clip import clip_grad_norm_
from engram.optim.groups import build_param_groups
from engram.optim.muon import EngramMuon
from engram.optim.sparse_adam import EngramAdamW

__all__ = ["build_optimizer"]


def build_optimizer(
    memory: nn.Module,
    lr: float,
    *,
    max_grad_norm: float | None = 1.0,
    table_lr_multiplier: float = 5.0,
    weight_decay: float = 0.0,
    table_weight_decay: float = 0.0,
    backbone_lr: float | None = None,
    backbone_optimizer: str = "adamw",
    **options: Any,
) -> EngramAdamW:
    """The optimiser of all that is trainable in ``memory``, base model included, for a trainer that is not ours:
    ``Trainer(memory.base_model, args, optimizers=(build_optimizer(memory, lr), None))``, and so for TRL's.

    Such a trainer clips and clears the gradients of the model that it was given, in which the memory's are not: they would add up from
    step to step. This optimiser does both at its own steps, over all its parameters together, row-sparse ones included. Give the trainer
    ``max_grad_norm=0``, or a base model that is trained too is clipped twice; the norm it logs is the base model's alone.

    What is to be trained is decided before, by ``requires_grad``; after ``get_engram_model`` that is the memory and nothing else. On a
    GPU move the memory first (``memory.to("cuda")``). In float16 the gradients of steps that the scaler leaves out are cleared by
    ``engram.training.MemoryCallback`` only.

    Args:
        memory: the ``EngramModel``.
        lr: base learning rate. The trainer's schedule scales it; its own ``learning_rate`` is not used.
        max_grad_norm: what the joint norm of all gradients is clipped to; None does not clip.
        table_lr_multiplier: as for ``build_param_groups``, and so are the next four.
        weight_decay: of matrices.
        table_weight_decay: of table rows (touched rows only).
        backbone_lr: of the base model; None means ``lr``.
        backbone_optimizer: ``adamw``, or ``muon`` for an ``EngramMuon``.
        **options: of ``EngramAdamW`` or ``EngramMuon``: ``betas``, ``row_state``, ``stochastic_rounding``, ...

    Raises:
        ConfigError: ``max_grad_norm`` is no positive number, nothing is trainable, or an option is impossible.
        TrainingError: at a step, if gradients are clipped: their norm is NaN or infinite. Nothing is changed then.
    """
    if max_grad_norm is not None and (isinstance(max_grad_norm, bool) or not 0 < max_grad_norm < math.inf):
        raise ConfigError(
            f"build_optimizer: got max_grad_norm={max_grad_norm!r}, expected a positive number, or None to clip nothing."
        )
    groups = build_param_groups(
        memory, memory, lr, table_lr_multiplier, weight_decay, table_weight_decay, backbone_lr, backbone_optimizer
    )
    optimizer = (EngramMuon if backbone_optimizer == "muon" else EngramAdamW)(groups, lr=lr, **options)
    if max_grad_norm is not None:
        optimizer.register_step_pre_hook(functools.partial(_clip, max_grad_norm))
    optimizer.register_step_post_hook(_clear)
    return optimizer


def _clip(max_norm: float, optimizer: torch.optim.Optimizer, *_: Any) -> None:
    norm = clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], max_norm)
    if not torch.isfinite(norm):
        raise TrainingError(f"the gradient norm is {float(norm)}; nothing was changed by this step. Lower the learning rate.")


def _clear(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    optimizer.zero_grad()
