"""Equations 3 to 5 of whole sequences in one go, for training: the same formulas as ``context_gate`` and ``causal_depthwise_conv``.

As tensor operations they are some thirty passes over memory each way, which cost a small model more than the layer's matrix products.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from engram.native import core, have_addresses
from engram.native.gated import GatedTask, GateOptions

__all__ = ["gate_and_smooth", "whole_sequences_serve"]

_TYPES = (torch.float32, torch.bfloat16)


def whole_sequences_serve(streams: Tensor, weight: Tensor) -> bool:
    """Whether ``gate_and_smooth`` can take the place of the tensor operations: gradients are recorded, the hidden states
    ``[B, T, M, d]`` are float32 or bfloat16 on the CPU, the layer's ``weight`` is float32, what it makes under autocast is no other type
    than those two, and no graph is being traced.
    """
    return (
        core() is not None
        and torch.is_grad_enabled()
        and have_addresses(streams, weight)
        and streams.device.type == weight.device.type == "cpu"
        and streams.dtype in _TYPES
        and weight.dtype == torch.float32
        and (not torch.is_autocast_enabled("cpu") or torch.get_autocast_dtype("cpu") in _TYPES)
    )


def gate_and_smooth(
    projected: Tensor,
    streams: Tensor,
    mask: Tensor | None,
    norms: Sequence[Tensor],
    options: GateOptions,
    taps: Tensor | None = None,
    trace: dict[str, Tensor] | None = None,
) -> Tensor:
    """Gated values, with the convolution added, in shape and type of ``streams``. Gradients reach all but the mask, once.

    Args:
        projected: ``[B, T, (1 + K) * d]``: the value, then K keys: one per stream, or one for all.
        streams: hidden states ``[B, T, M, d]``.
        mask: ``[B, T]``, factors of the value, or None.
        norms: weights ``[d]``: K of the keys, K of the hidden states, with a convolution M of its input.
        options: epsilons, kind of gate, dilation.
        taps: the convolution's weight ``[M * d, 1, kernel]``, or None.
        trace: a dict that receives ``gate [B, T, M]``, float32.
    """
    if mask is not None:
        mask = mask.detach().to(torch.float32).contiguous()
    result: Tensor = _GateAndSmooth.apply(projected, streams, mask, options, taps, trace, *norms)
    return result


class _GateAndSmooth(torch.autograd.Function):
    @staticmethod
    def forward(
        context: Any,
        projected: Tensor,
        streams: Tensor,
        mask: Tensor | None,
        options: GateOptions,
        taps: Tensor | None,
        trace: dict[str, Tensor] | None,
        *norms: Tensor,
    ) -> Tensor:
        projected, streams = projected.contiguous(), streams.contiguous()
        out, kept = GatedTask(projected, streams, mask, norms, options, taps).forward()
        if trace is not None:
            trace["gate"] = GatedTask.gates(kept)
        context.options = options
        context.save_for_backward(projected, streams, mask, taps, kept, *norms)
        return out

    @staticmethod
    @once_differentiable
    def backward(context: Any, to_out: Tensor) -> tuple[Tensor | None, ...]:
        projected, streams, mask, taps, kept, *norms = context.saved_tensors
        task = GatedTask(projected, streams, mask, norms, context.options, taps)
        to_projected, to_streams, to_norms, to_taps = task.backward(kept, to_out.contiguous(), context.needs_input_grad[1])
        return to_projected, to_streams, None, None, to_taps, None, *to_norms
