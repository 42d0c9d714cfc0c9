"""Losses on held-out text, by kind of text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from engram.data.blocks import IGNORED, HeldOutBlocks
from engram.models.devices import input_device
from engram.models.mode import evaluation_mode

__all__ = ["measure"]


@torch.no_grad()
def measure(model: nn.Module, blocks: HeldOutBlocks, every: int = 1, batch_size: int = 32) -> dict[str, Any]:
    """Mean negative log-likelihood per predicted token.

    Args:
        model: a causal language model; left in the mode it was in.
        blocks: what to predict; each block starts afresh.
        every: measure every so many blocks only.
        batch_size: blocks per forward pass.

    Returns:
        ``loss`` (nats per token), ``tokens``, ``by_kind`` with loss and tokens of each kind of text; and ``bits_per_byte`` where all blocks are
        measured.
    """
    device = input_device(model)
    indices, losses = list(range(0, len(blocks), every)), []
    with evaluation_mode(model):
        for start in range(0, len(indices), batch_size):
            losses += _losses(model, [blocks[i] for i in indices[start : start + batch_size]], device)
    sums = blocks.sum_by_kind(losses, indices)
    nats, tokens = (sum(pair[n] for pair in sums.values()) for n in (0, 1))
    result = {
        "loss": nats / tokens,
        "tokens": tokens,
        "by_kind": {kind: {"loss": total / count, "tokens": count} for kind, (total, count) in sums.items()},
    }
    return result if every > 1 else {**result, "bits_per_byte": nats / math.log(2) / sum(blocks.bytes_by_kind.values())}


def _losses(model: nn.Module, items: Sequence[dict[str, torch.Tensor]], device: torch.device) -> list[torch.Tensor]:
    """Loss of each position but the first, ``[seq_len - 1]`` for each block; 0 where none is to be predicted."""
    ids, labels = (torch.stack([item[name] for item in items]).to(device) for name in ("input_ids", "labels"))
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    return list(F.cross_entropy(logits.transpose(1, 2), labels[:, 1:], ignore_index=IGNORED, reduction="none"))
