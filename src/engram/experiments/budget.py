"""Dividing a budget: from total and active parameters and rho to a model (paper, section 3.1).

The number of experts takes rho's share of the sparse parameters, the width of the leading dense block takes up what readers and routers
cost, so that every rho has the same active parameters, and table rows take the rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from engram.config import EngramConfig
from engram.errors import ConfigError
from engram.experiments.backbone import BackboneConfig
from engram.experiments.counts import Counts, count_rows, predict_counts, predict_flops

__all__ = ["TOLERANCE", "Allocation", "allocate"]

TOLERANCE = 0.005
"""Largest accepted mismatch of total parameters, active parameters and operations."""
RHO_TOLERANCE = 0.03
"""Largest accepted distance of a model's share of experts from the one asked for; half an expert in each block cannot be helped."""

_WIDTH_STEP = 4
"""Widths are multiples of this where the tolerance allows it."""


@dataclass(frozen=True)
class Allocation:
    """One way to spend a budget."""

    backbone: BackboneConfig
    engram: EngramConfig | None
    counts: Counts
    asked_rho: float

    def to_dict(self, seq_len: int, tokens: int | None = None) -> dict[str, Any]:
        """JSON-ready figures; with ``tokens`` also the operations of the training run (three times the forward pass)."""
        flops = predict_flops(self.backbone, self.engram, seq_len)
        figures = {
            **self.counts.to_dict(),
            "asked_rho": self.asked_rho,
            "experts": self.backbone.n_routed_experts if self.backbone.has_experts else 0,
            "dense_width": self.backbone.intermediate_size,
            "table_rows": self.counts.rows // self.engram.head_dim if self.engram else 0,
            "rows_per_head": list(self.engram.engram_vocab_size) if self.engram else [],  # type: ignore[arg-type]
            "flops_per_token": flops,
        }
        return figures if tokens is None else {**figures, "training_flops": 3 * flops * tokens}


def allocate(backbone: BackboneConfig, engram: EngramConfig, total: int, active: int, rho: float) -> Allocation:
    """The model that spends ``total`` and ``active`` parameters (embeddings and head excluded) with a share ``rho`` of experts.

    Args:
        backbone: everything but ``n_routed_experts`` and ``intermediate_size``, which are chosen here.
        engram: everything but ``engram_vocab_size``, which is chosen here (the same for all orders); left away at ``rho = 1``.
        total: parameters.
        active: parameters per token.
        rho: share of ``total - active`` given to experts: 1 for no memory, 0 for no experts but those that every token chooses.

    Raises:
        ConfigError: the budget cannot be met within ``TOLERANCE``, or the share within ``RHO_TOLERANCE``; the message says what is missing.
    """
    _check(backbone, total, active, rho)
    memory = engram if rho < 1 else None
    expert = 3 * backbone.hidden_size * backbone.moe_intermediate_size
    idle = round(rho * (total - active) / (backbone.expert_blocks * expert))
    backbone = backbone.replace(n_routed_experts=max(idle, 0) + backbone.num_experts_per_tok)
    backbone = _fit_width(backbone, memory, active)
    if memory is not None:
        room = total - active - predict_counts(backbone).idle_experts
        memory = _fit_rows(memory, room, rho)
    allocation = Allocation(backbone, memory, predict_counts(backbone, memory), rho)
    for name, wanted, got in (("total", total, allocation.counts.total), ("active", active, allocation.counts.active)):
        if abs(got - wanted) > TOLERANCE * wanted:
            raise ConfigError(
                f"budget: got {name} parameters {wanted:,} at rho {rho:g}, but the nearest model has {got:,} "
                f"({100 * (got / wanted - 1):+.2f} %); expected at most {100 * TOLERANCE:g} % off. "
                f"{_advice(name, expert * backbone.expert_blocks)}"
            )
    if abs(allocation.counts.rho - rho) > RHO_TOLERANCE:
        raise ConfigError(
            f"budget: got rho {rho:g}, but the nearest model has {allocation.counts.rho:.3f}, since experts come whole ({expert:,} parameters "
            f"in each of {backbone.expert_blocks} blocks); expected at most {RHO_TOLERANCE:g} off. Make experts smaller "
            "(moe_intermediate_size), raise total, or ask for another rho."
        )
    return allocation


def _check(backbone: BackboneConfig, total: int, active: int, rho: float) -> None:
    if backbone.architecture != "deepseek_v3" or not backbone.expert_blocks or not backbone.first_k_dense_replace:
        raise ConfigError(
            f"budget: got a {backbone.architecture} backbone with {backbone.expert_blocks} blocks of experts, expected deepseek_v3 with "
            "blocks of both kinds: experts are counted out and a dense block takes up the difference."
        )
    if not 0 < active < total:
        raise ConfigError(f"budget: got total {total:,} and active {active:,}, expected 0 < active < total.")
    if not 0 <= rho <= 1:
        raise ConfigError(f"budget: got rho {rho!r}, expected a number from 0 (no idle experts) to 1 (no memory).")


def _fit_width(backbone: BackboneConfig, memory: EngramConfig | None, active: int) -> BackboneConfig:
    """The width of the dense blocks at which active parameters are as asked."""
    per_width = 3 * backbone.hidden_size * backbone.first_k_dense_replace
    least = backbone.replace(intermediate_size=1)
    # Active parameters do not depend on table sizes, which are not known yet and would take time to lay out.
    missing = active - predict_counts(least, memory and memory.replace(engram_vocab_size=2)).active
    step = _WIDTH_STEP if _WIDTH_STEP * per_width <= TOLERANCE * active else 1
    width = step * round((1 + missing / per_width) / step)
    if width < 1:
        raise ConfigError(
            f"budget: got active parameters {active:,}, but everything except the dense feed-forward takes {active - missing:,}; "
            "expected more active parameters, fewer blocks (backbone.num_hidden_layers in the recipe), narrower or fewer experts per token "
            "(moe_intermediate_size, num_experts_per_tok, n_shared_experts) or a smaller memory (engram.n_embed_per_ngram)."
        )
    return backbone.replace(intermediate_size=width)


def _fit_rows(memory: EngramConfig, room: int, rho: float) -> EngramConfig:
    """Rows per head that fill ``room`` values; heads get primes just above, which is corrected for."""
    heads = sum(memory.num_heads_of(layer_id) for layer_id in memory.layer_ids)
    per_row = heads * memory.head_dim
    floor = room // per_row
    for _ in range(4):
        if floor < 2:
            raise ConfigError(
                f"budget: at rho {rho:g} only {max(room, 0):,} values are left for tables, fewer than two rows for each of "
                f"{heads} heads; expected a smaller rho, or rho 1 for none."
            )
        fitted = memory.replace(engram_vocab_size=int(floor))
        excess = count_rows(fitted) * fitted.head_dim - room
        if abs(excess) < per_row:
            break
        floor -= round(excess / per_row)
    return fitted


def _advice(name: str, step: int) -> str:
    if name == "active":
        return "Change the number or width of blocks (backbone.num_hidden_layers, hidden_size)."
    return (
        f"One more expert per block is {step:,} parameters: choose the total so that rho = 1 meets it, or give tables a share."
    )
