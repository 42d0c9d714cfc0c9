"""What a model is made of: parameters by kind and the arithmetic of one token, from sizes alone and from a model that exists.

Definitions (paper, section 3.1). Embeddings and the head are left out everywhere. ``total``: all other parameters, table rows
included. ``active``: those a token is multiplied with: everything but experts that were not chosen and table rows (which are fetched, not
multiplied). ``sparse = total - active``. ``rho``: the share of ``sparse`` that is experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from engram.config import EngramConfig
from engram.errors import ConfigError
from engram.experiments.backbone import BackboneConfig, build_backbone
from engram.hashing.layout import prime_layout
from engram.models import EngramModel, find_decoder
from engram.models.positions import text_config
from engram.models.quantised import parameter_count

__all__ = ["Counts", "count_model", "count_reader", "count_rows", "predict_counts", "predict_flops"]

_CHOSEN = (
    "num_experts_per_tok",
    "top_k_experts",
    "moe_topk",
    "moe_k",
    "num_experts_per_token",
    "experts_per_token",
    "num_selected_experts",
)
"""What configs call the number of experts that a token chooses."""


@dataclass(frozen=True)
class Counts:
    """Parameters of one model, by kind."""

    embedding: int
    """Token embeddings and head (one matrix where they are tied); in no other number."""
    idle_experts: int
    """Parameters of the experts that one token does not choose."""
    rows: int
    """Values in Engram tables."""
    active: int
    """Everything else."""
    active_matrices: int
    """The part of ``active`` in matrices, each of which costs two operations per value and token."""

    @property
    def sparse(self) -> int:
        """``idle_experts + rows``."""
        return self.idle_experts + self.rows

    @property
    def total(self) -> int:
        """``active + sparse``."""
        return self.active + self.sparse

    @property
    def rho(self) -> float:
        """Share of the sparse parameters that is experts; 1 for a model that has none."""
        return self.idle_experts / self.sparse if self.sparse else 1.0

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, derived numbers included."""
        return {**asdict(self), "sparse": self.sparse, "total": self.total, "rho": self.rho}


def count_model(model: nn.Module, experts_per_token: int | None = None) -> Counts:
    """Counts taken from a model that exists.

    Args:
        model: a causal language model, or an ``EngramModel`` on one.
        experts_per_token: routed experts a token chooses; read off the model's config if not given.

    Raises:
        ConfigError: the model has routed experts, and its config does not say how many a token chooses.
    """
    memory = model if isinstance(model, EngramModel) else None
    base: Any = memory.base_model if memory else model
    outside = {id(p) for m in (base.get_input_embeddings(), base.get_output_embeddings()) for p in m.parameters()}
    idle = active = matrices = 0
    routed = _routed(base)
    chosen = _chosen(base, routed, experts_per_token) if routed else {}
    tables = {id(p) for e in memory.engrams.values() for p in e.multi_head_embedding.parameters()} if memory else set()
    for p in model.parameters():
        if id(p) in outside or id(p) in tables:
            continue
        size = parameter_count(p)
        unused = size * (len(p) - chosen[id(p)]) // len(p) if id(p) in routed else 0
        idle += unused
        active += size - unused
        matrices += size - unused if p.dim() >= 2 else 0
    embedding = sum(parameter_count(p) for p in base.parameters() if id(p) in outside)
    rows = sum(e.table.rows * e.config.head_dim for e in memory.engrams.values()) if memory else 0
    return Counts(embedding, idle, rows, active, matrices)


def _routed(base: nn.Module) -> set[int]:
    """Ids of the parameters that have a part for every routed expert: those beside a ``down_proj``, or stacks of matrices."""
    found = set()
    for module in base.modules():
        if hasattr(module, "num_experts"):
            is_stack = hasattr(module, "down_proj")
            found |= {id(p) for p in (module.parameters() if is_stack else _stacks(module))}
    return found


def _stacks(module: Any) -> Iterator[nn.Parameter]:
    return (p for p in module.parameters(recurse=False) if p.dim() == 3 and len(p) == module.num_experts)


def _chosen(base: Any, routed: set[int], given: int | None) -> dict[int, int]:
    """How many experts a token chooses, by the id of each parameter of theirs."""
    config = text_config(base.config)
    told = given or next((value for name in _CHOSEN if (value := getattr(config, name, None)) is not None), None)
    by_layer = list(told) if isinstance(told, (list, tuple)) else None
    if told is None or by_layer == []:
        raise ConfigError(
            f"count_model: got a mixture of experts ({type(base).__name__}) whose config has none of {', '.join(_CHOSEN)}, expected "
            "experts_per_token."
        )
    if by_layer is None:
        return dict.fromkeys(routed, int(told))
    blocks = find_decoder(base).blocks
    return {
        id(p): int(by_layer[min(layer, len(by_layer) - 1)]) for layer, block in enumerate(blocks) for p in block.parameters()
    }


@lru_cache(maxsize=256)
def _count_backbone(config: BackboneConfig) -> Counts:
    with torch.device("meta"):  # sizes without memory
        return count_model(build_backbone(config), config.num_experts_per_tok)


def count_reader(config: EngramConfig, hidden_size: int, streams: int = 1) -> tuple[int, int]:
    """Parameters of all layers' projections, norms and convolutions (equations 3 to 5), and the part of them in matrices."""
    d, own = hidden_size, streams if config.branch_gates else 1
    keys, queries, joints = {"gate": (own, own, 0), "add": (0, 0, 0), "concat": (0, own, own)}[config.fuse]
    everything = matrices = 0
    for layer_id in config.layer_ids:
        weights = (1 + keys) * config.d_mem_of(layer_id) * d + joints * 2 * d * d
        weights += streams * d * config.kernel_size if config.use_conv else 0
        vectors = (keys + queries) * d + ((1 + keys) * d if config.use_bias else 0) + (streams * d if config.use_conv else 0)
        matrices += weights
        everything += weights + vectors
    return everything, matrices


def predict_counts(backbone: BackboneConfig, engram: EngramConfig | None = None) -> Counts:
    """Counts of a model that need not exist."""
    counts = _count_backbone(backbone)
    if engram is None:
        return counts
    streams = backbone.hc_mult if backbone.architecture == "deepseek_v4" else 1
    reader, matrices = count_reader(engram, backbone.hidden_size, streams)
    rows = count_rows(engram) * engram.head_dim
    return Counts(counts.embedding, counts.idle_experts, rows, counts.active + reader, counts.active_matrices + matrices)


def count_rows(config: EngramConfig) -> int:
    """Rows of all tables of a memory."""
    return sum(prime for layer in prime_layout(config).values() for order in layer for prime in order)


def predict_flops(backbone: BackboneConfig, engram: EngramConfig | None, seq_len: int) -> int:
    """Operations of one token's forward pass in matrix products, head excluded; training takes three times as many.

    Two per value of an active matrix, and attention over ``seq_len`` positions, masked ones included (as torch's ``FlopCounterMode``
    counts). Norms, softmax, gates and the mixing of residual streams are left out.
    """
    attention = 2 * 2 * backbone.num_hidden_layers * backbone.num_attention_heads * backbone.head_dim * seq_len
    return 2 * predict_counts(backbone, engram).active_matrices + attention
