"""The n-gram hash in one Triton launch: compression, mix, modulus and tags for all layers, positions and heads.

Importing this module needs Triton; ``engram.hashing.ngram`` does so only where the ids are on a CUDA device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["hash_ngrams_triton"]

_BLOCK = 64
"""Positions per program; a decoding step of a few hundred sequences still spreads over the device."""

_UNROLLED = 4
"""So many orders are unrolled at a time; a kernel of 31 (a taught memory's) would take a quarter of a minute to compile otherwise."""


@triton.jit
def _token(ids, mask, history, lookup, row_P, at_P, asked_P, length, past, vocabulary, raw_pad, MASKED: tl.constexpr):
    """Canonical ids at positions of a text, some of which lie in what came before, or before its start."""
    here_P = asked_P & (at_P >= 0)
    before_P = asked_P & (at_P < 0) & (at_P + past >= 0)
    id_P = tl.load(ids + (row_P * length + at_P), mask=here_P, other=0)
    earlier_P = tl.load(history + (row_P * past + past + at_P), mask=before_P, other=0)
    id_P = tl.where(here_P, id_P, tl.where(before_P, earlier_P, raw_pad))
    if MASKED:
        real_P = tl.load(mask + (row_P * length + at_P), mask=here_P, other=1)
        id_P = tl.where(real_P != 0, id_P, raw_pad)
    known_P = asked_P & (id_P >= 0) & (id_P < vocabulary)
    return tl.load(lookup + id_P, mask=known_P, other=0)


@triton.jit
def _store_heads(
    mix_P,
    order,
    primes,
    out,
    tags,
    layer,
    place_P,
    asked_P,
    count,
    modulus,
    ORDERS: tl.constexpr,
    HEADS: tl.constexpr,
    TAGGED: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Indices (and tags) of one order's heads out of its mix."""
    head_K = tl.arange(0, BLOCK_K)
    head = order * HEADS + head_K
    width = ORDERS * HEADS
    prime_K = tl.load(primes + (layer * width + head), mask=head_K < HEADS, other=1)
    index_PK = mix_P[:, None] % prime_K[None, :]
    target_PK = (layer * count + place_P)[:, None] * width + head[None, :]
    written_PK = asked_P[:, None] & (head_K < HEADS)[None, :]
    tl.store(out + target_PK, index_PK, mask=written_PK)
    if TAGGED:
        tag_PK = (mix_P[:, None] // prime_K[None, :]) % modulus + 1
        tl.store(tags + target_PK, tag_PK.to(tl.int32), mask=written_PK)


@triton.jit(do_not_specialize=["length", "past", "count"])
def _hash_kernel(
    ids,
    mask,
    history,
    lookup,
    multipliers,
    primes,
    out,
    tags,
    length,
    past,
    count,
    vocabulary,
    raw_pad,
    modulus,
    ORDERS: tl.constexpr,
    HEADS: tl.constexpr,
    MASKED: tl.constexpr,
    TAGGED: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    layer = tl.program_id(1).to(tl.int64)
    place_P = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    asked_P = place_P < count
    row_P = place_P // length
    at_P = place_P % length
    own = multipliers + layer * (ORDERS + 1)
    mix_P = _token(ids, mask, history, lookup, row_P, at_P, asked_P, length, past, vocabulary, raw_pad, MASKED) * tl.load(own)
    for back in tl.range(1, ORDERS + 1, loop_unroll_factor=UNROLL):
        token_P = _token(ids, mask, history, lookup, row_P, at_P - back, asked_P, length, past, vocabulary, raw_pad, MASKED)
        mix_P = mix_P ^ (token_P * tl.load(own + back))
        _store_heads(
            mix_P, back - 1, primes, out, tags, layer, place_P, asked_P, count, modulus, ORDERS, HEADS, TAGGED, BLOCK_K
        )


def hash_ngrams_triton(
    ids: Tensor,
    history: Tensor | None,
    mask: Tensor | None,
    lookup: Tensor,
    multipliers: Tensor,
    primes: Tensor,
    raw_pad: int,
    tag_modulus: int | None,
) -> tuple[Tensor, Tensor | None]:
    """Head indices int64 ``[L, B, T, H]`` and, if a modulus is given, tags int32 of that shape.

    Raw ids outside the vocabulary read no memory and count as canonical id 0: raising would make every hash wait for the device.

    Args:
        ids: integers ``[B, T]``.
        history: integers ``[B, X]`` that came before, or None.
        mask: ``[B, T]``, zero at padding, or None.
        lookup: int64 ``[vocabulary]``, raw id -> canonical id.
        multipliers: int64 ``[L, N]``.
        primes: int64 ``[L, N - 1, K]``.
        raw_pad: raw id that stands before the start and at masked positions.
        tag_modulus: see ``TAG_MODULUS``; None without tags.
    """
    layers, orders, heads = primes.shape
    ids = ids.to(torch.int64).contiguous()
    past = 0 if history is None else history.shape[1]
    history = ids if history is None or past == 0 else history.to(torch.int64).contiguous()
    mask = None if mask is None else (mask != 0).to(torch.int8).contiguous()
    out = torch.empty((layers, *ids.shape, orders * heads), dtype=torch.int64, device=ids.device)
    tags = None if tag_modulus is None else torch.empty(out.shape, dtype=torch.int32, device=ids.device)
    if ids.numel() == 0:
        return out, tags
    _hash_kernel[triton.cdiv(ids.numel(), _BLOCK), layers](
        ids,
        ids if mask is None else mask,
        history,
        lookup,
        multipliers,
        primes,
        out,
        out if tags is None else tags,
        ids.shape[1],
        past,
        ids.numel(),
        lookup.shape[0],
        raw_pad,
        1 if tag_modulus is None else tag_modulus,
        ORDERS=orders,
        HEADS=heads,
        MASKED=mask is not None,
        TAGGED=tags is not None,
        UNROLL=min(orders, _UNROLLED),
        BLOCK=_BLOCK,
        BLOCK_K=triton.next_power_of_2(heads),
        num_warps=2,
        enable_fp_fusion=False,
    )
    return out, tags
