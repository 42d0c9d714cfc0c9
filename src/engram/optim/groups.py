"""Strict parameter groups: every trainable parameter in exactly one, nothing left behind unnoticed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from engram.errors import ConfigError
from engram.tables import EmbeddingTable

__all__ = ["build_param_groups"]


def build_param_groups(
    model: nn.Module,
    memory: nn.Module | None,
    lr: float,
    table_lr_multiplier: float = 5.0,
    weight_decay: float = 0.0,
    table_weight_decay: float = 0.0,
    backbone_lr: float | None = None,
) -> list[dict[str, Any]]:
    """Groups for an optimiser: ``tables``, ``reader`` and ``backbone``, the latter two split by whether they decay.

    Tables take five times the base learning rate and no weight decay unless told otherwise (paper, training details). Matrices of the
    reader and the backbone decay; norms and biases (fewer than two dimensions) do not. Frozen parameters and empty groups are left out.

    Args:
        model: everything that may be trained.
        memory: the part of ``model`` that is the Engram reader and its tables; None if there is none.
        lr: base learning rate.
        table_lr_multiplier: factor for tables.
        weight_decay: of matrices.
        table_weight_decay: of table rows (touched rows only).
        backbone_lr: of the base model; None means ``lr``.

    Raises:
        ConfigError: nothing is trainable, or ``memory`` has parameters that ``model`` has not.
    """
    tables = {id(p) for m in model.modules() if isinstance(m, EmbeddingTable) for p in m.parameters()}
    reader = {id(p) for p in memory.parameters()} - tables if memory is not None else set()
    names = {id(p): name for name, p in model.named_parameters()}
    strangers = [name for name, p in (memory.named_parameters() if memory is not None else ()) if id(p) not in names]
    if strangers:
        raise ConfigError(f"build_param_groups: {', '.join(strangers[:5])} of the memory are not parameters of the model.")
    settings: Mapping[str, dict[str, float]] = {
        "tables": {"lr": lr * table_lr_multiplier, "weight_decay": table_weight_decay},
        "reader": {"lr": lr, "weight_decay": weight_decay},
        "reader_no_decay": {"lr": lr, "weight_decay": 0.0},
        "backbone": {"lr": lr if backbone_lr is None else backbone_lr, "weight_decay": weight_decay},
        "backbone_no_decay": {"lr": lr if backbone_lr is None else backbone_lr, "weight_decay": 0.0},
    }
    members: dict[str, list[nn.Parameter]] = {name: [] for name in settings}
    for p in model.parameters():
        if not p.requires_grad:
            continue
        kind = "tables" if id(p) in tables else "reader" if id(p) in reader else "backbone"
        members[kind if kind == "tables" or p.dim() >= 2 else f"{kind}_no_decay"].append(p)
    groups = [{"name": name, "params": members[name], **settings[name]} for name in settings if members[name]]
    if not groups:
        raise ConfigError("build_param_groups: no parameter is trainable; set requires_grad on the parts to train.")
    return groups
