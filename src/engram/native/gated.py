"""Gate and convolution of whole sequences, forward and backward, by the native core; every address is checked here."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engram.native import core

__all__ = ["GateOptions", "GatedTask"]

_HALF = {torch.float32: 0, torch.bfloat16: 1}
_KEPT, _GATE = 5, 1  # numbers per position and stream that the backward pass is told, and the place of the gate among them


@dataclass(frozen=True)
class GateOptions:
    """What is no tensor.

    Attributes:
        norm_eps: of the norms of key and hidden state.
        signed_sqrt: whether the gate's score is squashed by its signed square root.
        dilation: distance between taps of the convolution.
        conv_eps: of the convolution's norm.
    """

    norm_eps: float
    signed_sqrt: bool
    dilation: int = 1
    conv_eps: float = 0.0


class GatedTask:
    """Equations 3 to 5 after the projections, of sequences that start here; arithmetic is float32.

    Args:
        projected: float32 or bfloat16 ``[B, T, (1 + K) * d]``: the value, then K keys: one per stream, or one for all.
        streams: hidden states, float32 or bfloat16 ``[B, T, M, d]``.
        mask: float32 ``[B, T]``, factors of the value, or None.
        norms: float32 weights ``[d]``: K of the keys, K of the hidden states, with a convolution M of its input.
        options: the rest.
        taps: float32 ``[M * d, 1, kernel]``, the convolution's weight, or None.

    Raises:
        ValueError: a tensor is of another type, shape or layout, or not on the CPU, or norms are missing.
    """

    def __init__(
        self,
        projected: Tensor,
        streams: Tensor,
        mask: Tensor | None,
        norms: Sequence[Tensor],
        options: GateOptions,
        taps: Tensor | None,
    ) -> None:
        batch, length, branches, dim = streams.shape
        keys = projected.shape[-1] // max(dim, 1) - 1
        smoothed = 0 if taps is None else branches
        if keys not in (1, branches) or len(norms) != 2 * keys + smoothed:
            raise ValueError(f"GatedTask: got {keys} keys and {len(norms)} norms for {branches} streams.")
        _check(projected, (batch, length, (1 + keys) * dim), _HALF)
        _check(streams, streams.shape, _HALF)
        for norm in norms:
            _check(norm, (dim,))
        if mask is not None:
            _check(mask, (batch, length))
        kernel = 0
        if taps is not None:
            kernel = taps.shape[-1]
            _check(taps, (branches * dim, 1, kernel))
        self._projected, self._streams, self._norms, self._taps = projected, streams, tuple(norms), taps
        self._table = _addresses(norms)
        self._alive = mask
        self._arguments = (
            *(batch, length, branches, dim, keys),
            *(projected.data_ptr(), _HALF[projected.dtype], streams.data_ptr(), _HALF[streams.dtype], _address(mask)),
            *(self._table.data_ptr(), _bits(options.norm_eps), options.signed_sqrt),
            *(_address(taps), kernel, options.dilation, _bits(options.conv_eps)),
        )

    def forward(self) -> tuple[Tensor, Tensor]:
        """The result, in shape and type of the streams, and what ``backward`` needs to know."""
        out = torch.empty_like(self._streams)
        kept = self._streams.new_empty((*self._streams.shape[:3], _KEPT), dtype=torch.float32)
        core().gated_forward(*self._arguments, out.data_ptr(), kept.data_ptr(), torch.get_num_threads())
        return out, kept

    @staticmethod
    def gates(kept: Tensor) -> Tensor:
        """Gates ``[B, T, M]`` out of what ``forward`` kept."""
        return kept[..., _GATE]

    def backward(
        self, kept: Tensor, to_out: Tensor, for_streams: bool = True
    ) -> tuple[Tensor, Tensor | None, list[Tensor], Tensor | None]:
        """Gradients of ``projected``, ``streams`` (None if not ``for_streams``), ``norms`` and ``taps``.

        Sums over positions do not depend on the number of threads.

        Args:
            kept: from ``forward``.
            to_out: gradient of the result, in its shape and type.
            for_streams: whether the streams want one.
        """
        _check(kept, (*self._streams.shape[:3], _KEPT))
        _check(to_out, self._streams.shape, (self._streams.dtype,))
        to_projected = torch.empty_like(self._projected)
        to_streams = torch.empty_like(self._streams) if for_streams else None
        to_norms = [torch.empty_like(norm) for norm in self._norms]
        to_taps = None if self._taps is None else torch.empty_like(self._taps)
        table = _addresses(to_norms)
        core().gated_backward(
            *self._arguments,
            *(kept.data_ptr(), to_out.data_ptr(), to_projected.data_ptr(), _address(to_streams)),
            *(table.data_ptr(), _address(to_taps), torch.get_num_threads()),
        )
        return to_projected, to_streams, to_norms, to_taps


def _check(
    tensor: Tensor, shape: Sequence[int], types: Sequence[torch.dtype] | dict[torch.dtype, int] = (torch.float32,)
) -> None:
    if (
        tensor.shape != torch.Size(shape)
        or tensor.dtype not in types
        or tensor.device.type != "cpu"
        or not tensor.is_contiguous()
    ):
        expected = " or ".join(str(kind) for kind in types)
        raise ValueError(
            f"GatedTask: got {tensor.dtype} {list(tensor.shape)} on {tensor.device}, expected contiguous {expected} {list(shape)} on the CPU."
        )


def _addresses(tensors: Sequence[Tensor]) -> Tensor:
    return torch.tensor([tensor.data_ptr() for tensor in tensors], dtype=torch.int64, device="cpu")


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _bits(value: float) -> int:
    return int.from_bytes(struct.pack("<d", value), "little", signed=True)
