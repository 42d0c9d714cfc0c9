"""Strict parameter groups: every trainable parameter in exactly one, nothing left behind unnoticed."""

from __future__ import annotations

from typing import Any

from torch import nn

from engram.distributed import put_apart
from engram.errors import ConfigError
from engram.optim.matrices import matrices_per_parameter
from engram.tables import EmbeddingTable

__all__ = ["BACKBONE_OPTIMIZERS", "build_param_groups"]

BACKBONE_OPTIMIZERS = ("adamw", "muon")
"""What may step the matrices of hidden layers."""


def build_param_groups(
    model: nn.Module,
    memory: nn.Module | None,
    lr: float,
    table_lr_multiplier: float = 5.0,
    weight_decay: float = 0.0,
    table_weight_decay: float = 0.0,
    backbone_lr: float | None = None,
    backbone_optimizer: str = "adamw",
) -> list[dict[str, Any]]:
    """Groups for an optimiser: ``tables``, ``reader`` and ``backbone``, the latter two split by whether they decay.

    Tables take five times the base learning rate and no weight decay unless told otherwise (paper, training details). Matrices of the
    reader and the backbone decay; norms and biases (fewer than two dimensions) do not. Frozen parameters and empty groups are left out.

    With ``backbone_optimizer="muon"`` the matrices of hidden layers (``matrices_per_parameter``) come in groups of their own,
    ``backbone_muon`` and ``reader_muon``, marked for ``EngramMuon``; a number after the name says how many matrices each parameter
    holds. The reader's projections W_K and W_V are among them: they are linear maps into the residual stream like any other, and
    the paper keeps Adam for embeddings alone.

    Args:
        model: everything that may be trained.
        memory: the ``EngramModel``, or its ``engrams``: reader and tables; None if there is none.
        lr: base learning rate.
        table_lr_multiplier: factor for tables.
        weight_decay: of matrices.
        table_weight_decay: of table rows (touched rows only).
        backbone_lr: of the base model, adapters on it included; None means ``lr``.
        backbone_optimizer: ``adamw`` or ``muon``; the latter needs ``EngramMuon``.

    Raises:
        ConfigError: nothing is trainable, ``memory`` has parameters that ``model`` has not, or a trainable parameter is shared between
            two kinds and so belongs to no one group; or the optimiser is unknown.
    """
    if backbone_optimizer not in BACKBONE_OPTIMIZERS:
        raise ConfigError(f"backbone_optimizer: got {backbone_optimizer!r}, expected one of {', '.join(BACKBONE_OPTIMIZERS)}.")
    put_apart(model)  # an optimiser of parameters that FSDP left together would step copies
    memory = getattr(memory, "engrams", memory)  # of the whole all parameters would be the reader's
    kinds = _kinds_of_parameters(model, memory)
    base_lr = lr if backbone_lr is None else backbone_lr
    settings = {
        "tables": {"lr": lr * table_lr_multiplier, "weight_decay": table_weight_decay},
        "reader": {"lr": lr, "weight_decay": weight_decay},
        "reader_no_decay": {"lr": lr, "weight_decay": 0.0},
        "backbone": {"lr": base_lr, "weight_decay": weight_decay},
        "backbone_no_decay": {"lr": base_lr, "weight_decay": 0.0},
    }
    matrices = matrices_per_parameter(model) if backbone_optimizer == "muon" else {}
    members: dict[str, list[nn.Parameter]] = {name: [] for name in settings}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        kind, *others = sorted(kinds[id(p)])
        if others:
            raise ConfigError(
                f"build_param_groups: {name} is shared between {kind} and {', '.join(others)}, expected one of them; untie it or freeze it."
            )
        if kind != "tables" and id(p) in matrices:
            group = _muon_group(kind, matrices[id(p)])
            settings.setdefault(group["name"], {**settings[kind], **group})
            members.setdefault(group["name"], []).append(p)
        else:
            members[kind if kind == "tables" or p.dim() >= 2 else f"{kind}_no_decay"].append(p)
    groups = [{"name": name, "params": members[name], **settings[name]} for name in settings if members[name]]
    if not groups:
        raise ConfigError("build_param_groups: no parameter is trainable; set requires_grad on the parts to train.")
    return groups


def _muon_group(kind: str, parts: int) -> dict[str, Any]:
    return {"name": f"{kind}_muon" + (f"_{parts}" if parts > 1 else ""), "algorithm": "muon", "parts": parts}


def _kinds_of_parameters(model: nn.Module, memory: nn.Module | None) -> dict[int, set[str]]:
    """For the id of each parameter, the kinds of the modules that hold it: ``tables``, ``reader``, ``backbone``."""
    tables = {id(part) for m in model.modules() if isinstance(m, EmbeddingTable) for part in m.modules()}
    reader = {id(m) for m in memory.modules()} if memory is not None else set()
    kinds: dict[int, set[str]] = {}
    for module in model.modules():
        kind = "tables" if id(module) in tables else "reader" if id(module) in reader else "backbone"
        for p in module.parameters(recurse=False):
            kinds.setdefault(id(p), set()).add(kind)
    strangers = [name for name, p in memory.named_parameters() if id(p) not in kinds] if memory is not None else []
    if strangers:
        raise ConfigError(f"build_param_groups: {', '.join(strangers[:5])} of the memory are not parameters of the model.")
    return kinds
