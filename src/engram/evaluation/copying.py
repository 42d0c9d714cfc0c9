"""Whether a model copies what stood in its context before: what recall over long text is built on."""

from __future__ import annotations

from typing import Any

import torch

from engram.errors import ConfigError
from engram.models.devices import input_device
from engram.models.mode import evaluation_mode
from engram.models.positions import context_length

__all__ = ["measure_copying"]


@torch.no_grad()
def measure_copying(model: Any, tokens: int = 64, sequences: int = 32, seed: int = 0) -> float:
    """Nats per token by which random tokens cost less when they are shown a second time, in one context.

    Random tokens are told by nothing but their first showing, so a model without a circuit that looks back ("induction heads", Olsson et al.
    2022, arXiv:2209.11895) gains about nothing, one that copies perfectly all that a token costs. A memory of n-grams has no part in it: it
    has never seen these.

    Args:
        model: a causal language model of transformers, with a memory or without.
        tokens: how many are shown twice.
        sequences: how many such contexts are averaged.
        seed: of the tokens, drawn from all that the model has embeddings for.

    Raises:
        ConfigError: ``tokens`` or ``sequences`` is impossible, or two showings are longer than the model's context.
    """
    if tokens < 2 or sequences < 1:
        raise ConfigError(f"measure_copying: got {tokens} tokens in {sequences} sequences, expected at least 2 in at least 1.")
    limit = context_length(model.config)
    if limit is not None and 2 * tokens > limit:
        raise ConfigError(
            f"measure_copying: got {tokens} tokens to show twice, expected at most {limit // 2}: the model has {limit} positions."
        )
    vocabulary = model.get_input_embeddings().weight.shape[0]
    once = torch.randint(vocabulary, (sequences, tokens), generator=torch.Generator().manual_seed(seed))
    ids = torch.cat([once, once], dim=1).to(input_device(model))
    with evaluation_mode(model):
        cost = torch.cat([_costs(model, part) for part in ids.split(8)])
    # The first token of either showing is left out: no context tells it.
    return float(cost[:, : tokens - 1].mean() - cost[:, tokens:].mean())


def _costs(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Nats ``[B, T - 1]`` of every token but the first."""
    logits = model(input_ids=ids).logits[:, :-1].float()
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
