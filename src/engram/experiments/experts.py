"""Experts of fresh models in the type that autocast asks for.

transformers multiplies experts by ``grouped_mm``, which autocast does not know: under it experts of float32 weights go on in float32, on a
GPU one after another and with a wait for their sizes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["grouped_mm_of_autocast", "multiply_as_autocast"]

_NAME = "engram_grouped_mm"
_DEVICES = ["cuda"]
"""Where autocast is followed. On CPUs bfloat16 gains nothing, and runs that were made there shall come back to the last digit."""
_WEIGHTS = ("gate_up_proj", "up_proj", "down_proj")


class _Cast:
    """A module of experts as its forward pass sees it, with weights of another type; gradients reach its own."""

    def __init__(self, experts: nn.Module, dtype: torch.dtype) -> None:
        self._experts, self._dtype = experts, dtype

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._experts, name)
        return value.to(self._dtype) if name in _WEIGHTS else value


def grouped_mm_of_autocast(experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """transformers' ``grouped_mm`` over experts; in autocast's type where that is on, on a GPU.

    Args:
        experts: the module, with weights of all experts side by side.
        hidden_states: ``[tokens, d]``.
        top_k_index: int64 ``[tokens, k]``, the experts of each token.
        top_k_weights: ``[tokens, k]``.

    Returns:
        ``[tokens, d]``, in the type of ``hidden_states``.
    """
    from transformers.integrations.moe import grouped_mm_experts_forward

    kind = hidden_states.device.type
    if kind not in _DEVICES or not torch.is_autocast_enabled(kind):
        return grouped_mm_experts_forward(experts, hidden_states, top_k_index, top_k_weights)
    dtype = torch.get_autocast_dtype(kind)
    seen: Any = _Cast(experts, dtype)
    mixed = grouped_mm_experts_forward(seen, hidden_states.to(dtype), top_k_index, top_k_weights)
    return mixed.to(hidden_states.dtype)


def multiply_as_autocast(model: Any) -> None:
    """Have a model's experts follow autocast, if transformers multiplies them by ``grouped_mm``; otherwise nothing changes."""
    if getattr(model.config, "_experts_implementation", None) != "grouped_mm":
        return
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(_NAME, grouped_mm_of_autocast)
    model.config._experts_implementation = _NAME
