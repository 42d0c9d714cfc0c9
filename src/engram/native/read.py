"""Gate and convolution of a few positions in one native call."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from engram.native import core

__all__ = ["read_streams"]


def read_streams(
    projected: Tensor,
    streams: Tensor,
    key_norms: Sequence[Tensor],
    query_norms: Sequence[Tensor],
    norm_eps: float,
    signed_sqrt: bool,
    conv: tuple[Tensor, int, Sequence[Tensor], float] | None,
    past: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Gated values, with the convolution added, of M streams; and the convolution's inputs.

    Args:
        projected: ``[B, T, (1 + K) * d]``: the value, then K keys: one per stream, or one for all.
        streams: hidden states ``[B, T, M, d]``.
        key_norms: K weights ``[d]``.
        query_norms: K weights ``[d]``.
        norm_eps: epsilon of both.
        signed_sqrt: whether the gate's score is squashed by its signed square root.
        conv: weight ``[M * d, kernel]``, dilation, M norm weights ``[d]`` and their epsilon; or None.
        past: the convolution's inputs ``[B, H, M * d]`` before these positions, or None.

    Returns:
        ``[B, T, M, d]`` and, with a convolution, ``[B, T, M * d]``.

    Raises:
        ValueError: a tensor is not float32 on the CPU, or of another shape, or norms are missing.
    """
    batch, length, branches, dim = streams.shape
    projected, streams = projected.contiguous(), streams.contiguous()
    weights = [*key_norms, *query_norms, *(conv[2] if conv else ())]
    kernel, keys = conv[0].shape[1] if conv else 0, len(key_norms)
    if keys not in (1, branches) or len(query_norms) != keys:
        raise ValueError(f"read_streams: got {keys} key norms and {len(query_norms)} query norms for {branches} streams.")
    shaped = [(projected, (batch, length, (1 + keys) * dim)), *((weight, (dim,)) for weight in weights)]
    if conv:
        shaped.append((conv[0], (branches * dim, kernel)))
    if past is not None:
        shaped.append((past, (batch, past.shape[1], branches * dim)))
    for tensor, shape in [(streams, streams.shape), *shaped]:
        _check(tensor, shape, tensor is not past)
    out = torch.empty_like(streams)
    normed = streams.new_empty((batch, length, branches * dim)) if conv else None
    for m in range(branches):
        own = m if keys > 1 else 0
        key = projected[..., (1 + own) * dim :]
        _core_call(projected, key, streams, key_norms[own], query_norms[own], norm_eps, signed_sqrt, conv, past, out, normed, m)
    return out, normed


def _core_call(projected, key, streams, key_norm, query_norm, norm_eps, signed_sqrt, conv, past, out, normed, m) -> None:
    batch, length, branches, dim = streams.shape
    skip = m * dim * 4  # bytes of the streams before this one
    smoothing = (0,) * 11
    if conv is not None:
        weight, dilation, norms, eps = conv
        kernel = weight.shape[1]
        before = (0, 0, 0, 0) if past is None else (past.data_ptr() + skip, past.shape[1], past.stride(0), past.stride(1))
        place = (normed.data_ptr() + skip, branches * dim)
        smoothing = (weight.data_ptr() + skip * kernel, kernel, dilation, norms[m].data_ptr(), _bits(eps), *place, *before)
    core().read_stream(
        *(batch, length, dim),
        *(projected.data_ptr(), key.data_ptr(), projected.shape[-1]),
        *(streams.data_ptr() + skip, branches * dim),
        *(key_norm.data_ptr(), query_norm.data_ptr(), _bits(norm_eps), signed_sqrt),
        *(out.data_ptr() + skip, branches * dim),
        *smoothing,
    )


def _check(tensor: Tensor, shape: tuple[int, ...], contiguous: bool) -> None:
    fits = tensor.shape == torch.Size(shape) and tensor.dtype == torch.float32 and tensor.device.type == "cpu"
    dense = tensor.is_contiguous() if contiguous else tensor.stride(-1) == 1
    if not fits or not dense:
        raise ValueError(
            f"read_streams: got {tensor.dtype} {list(tensor.shape)} on {tensor.device}, expected contiguous float32 {list(shape)} on the CPU."
        )


def _bits(value: float) -> int:
    return int.from_bytes(struct.pack("<d", value), "little", signed=True)
