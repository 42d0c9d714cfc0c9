"""The usual loss of a causal language model in half of the memory, while it is trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from engram.ops.token_loss import sum_of_token_losses

__all__ = ["causal_lm_loss", "lean_loss"]


def causal_lm_loss(
    logits: Tensor,
    labels: Tensor,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """As transformers' ``ForCausalLMLoss``: mean cross-entropy of every next token, or the sum divided by ``num_items_in_batch``.

    Args:
        logits: ``[B, T, V]``.
        labels: int64 ``[B, T]``, not shifted.
        vocab_size: ``V``.
        num_items_in_batch: what the sum is divided by; the number of tokens that are predicted if not given.
        ignore_index: the label that counts as none.
        shift_labels: ``[B, T]``, labels shifted already; ``labels`` are not looked at then.
    """
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    targets = shift_labels.reshape(-1).to(logits.device)
    total = sum_of_token_losses(logits.view(-1, vocab_size), targets, ignore_index)
    if num_items_in_batch is None:
        return total / (targets != ignore_index).sum()
    return total / (num_items_in_batch.to(total.device) if torch.is_tensor(num_items_in_batch) else num_items_in_batch)


@contextmanager
def lean_loss(model: Any) -> Iterator[None]:
    """While it lasts, a model with transformers' usual loss of a causal language model takes ``causal_lm_loss``; another is left alone."""
    usual = isinstance(model, PreTrainedModel) and getattr(model, "loss_type", None) == "ForCausalLM"
    if not usual or model.loss_function is not ForCausalLMLoss:
        yield
        return
    own = "_loss_function" in vars(model)  # where transformers' setter keeps it
    model.loss_function = causal_lm_loss
    try:
        yield
    finally:
        if own:
            model.loss_function = ForCausalLMLoss
        else:
            del model._loss_function
