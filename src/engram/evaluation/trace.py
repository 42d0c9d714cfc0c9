"""Token by token: which n-grams a memory saw, which rows it read, how far its gates opened."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any

import torch

from engram.data.facts import quoted, tokenize_prompt
from engram.errors import DataError
from engram.models import EngramModel
from engram.models.devices import input_device
from engram.models.mode import evaluation_mode
from engram.models.positions import last_position
from engram.tables import ABSENT

__all__ = ["LayerTrace", "TokenTrace", "Trace", "trace_text"]


@dataclass(frozen=True)
class LayerTrace:
    """What one layer did at one position."""

    layer_id: int
    rows: list[int]
    """Physical row read by every head, order-major."""
    gate: list[float]
    """Gate of every residual stream, 0 to 1; 1 where values are added or concatenated without one (``EngramConfig.fuse``)."""
    value_norm: float
    """Norm of what was added to the residual stream before the convolution (largest stream)."""
    written: bool
    """Whether any of the rows holds something."""


@dataclass(frozen=True)
class TokenTrace:
    """One position."""

    position: int
    token_id: int
    token: str
    canonical_id: int
    ngrams: dict[int, str]
    """Text of the n-gram of each order that ends here and that any layer reads."""
    layers: list[LayerTrace]


@dataclass(frozen=True)
class Trace:
    """One text through one memory."""

    text: str
    output_shape: list[int]
    tables: dict[int, str]
    """Where the rows of each layer live."""
    tokens: list[TokenTrace]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields."""
        return asdict(self)


@torch.no_grad()
def trace_text(memory: EngramModel, tokenizer: Any, text: str) -> Trace:
    """Run ``text`` through the model and record what the memory did at every token.

    Raises:
        DataError: the text is longer than the model has learnt positions for, or is empty and has no token.
    """
    ids, end = tokenize_prompt(tokenizer, text), last_position(memory.config)
    if not ids:
        raise DataError("trace: got an empty text, and this tokenizer begins with no token; expected some text.")
    if end is not None and len(ids) > end:
        raise DataError(
            f"text {quoted(text)}: got {len(ids):,} tokens, expected at most {end:,} (the model's context); shorten it."
        )
    device = input_device(memory)
    with evaluation_mode(memory), memory.record() as recorded:
        logits = memory(input_ids=torch.tensor([ids], device=device), use_cache=False).logits
    canonical, config = memory.mapping.compressed_tokenizer.lookup_table, memory.engram_config
    orders = sorted({order for layer_id in config.layer_ids for order in config.orders_of(layer_id)})
    starts = _starts(ids, config.boundary_ids)
    tokens = [
        TokenTrace(
            position=t,
            token_id=token,
            token=tokenizer.decode([token]),
            canonical_id=int(canonical[token]),
            ngrams={n: tokenizer.decode(ids[t - n + 1 : t + 1]) for n in orders if t - n + 1 >= starts[t]},
            layers=[_layer_trace(memory, layer_id, recorded[layer_id], t) for layer_id in config.layer_ids],
        )
        for t, token in enumerate(ids)
    ]
    tables = {i: memory.engrams[str(i)].table for i in config.layer_ids}
    places = {
        i: f"{table.rows:,} rows x {table.dim} {str(table.dtype).removeprefix('torch.')} on {table.location}"
        for i, table in tables.items()
    }
    return Trace(text, list(logits.shape), places, tokens)


def _starts(ids: Sequence[int], boundaries: Sequence[int]) -> list[int]:
    """For each position the first one that n-grams ending there reach: behind the last boundary."""
    return list(accumulate((t + 1 if token in boundaries else 0 for t, token in enumerate(ids)), max))


def _layer_trace(memory: EngramModel, layer_id: int, recorded: dict[str, torch.Tensor], position: int) -> LayerTrace:
    home: Any = memory.engrams[str(layer_id)].multi_head_embedding
    rows = home.row_ids(recorded["hash_ids"][0, position].to(home.offsets.device))
    value = recorded["value"][0, position].float()
    return LayerTrace(
        layer_id=layer_id,
        rows=rows.tolist(),
        gate=[round(g, 4) for g in recorded["gate"][0, position].float().tolist()],
        value_norm=round(float(value.norm(dim=-1).max()), 4),
        written=_was_written(home, rows, recorded, position),
    )


def _was_written(home: Any, rows: torch.Tensor, recorded: dict[str, torch.Tensor], position: int) -> bool:
    if "slots" in recorded:  # verified rows: only those of this very n-gram count
        return bool((recorded["slots"][0, position] != ABSENT).any())
    return bool(home.embedding.lookup(rows).count_nonzero())
