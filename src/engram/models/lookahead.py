"""What the blocks of a forward pass will read, found and fetched when it starts: addresses depend on token ids alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from engram.tables import ABSENT, RowHandle, RowPrefetcher

if TYPE_CHECKING:
    from engram.models.engram_model import EngramModel

__all__ = ["find_verified", "prefetch_rows"]


def prefetch_rows(
    memory: EngramModel, hash_ids: dict[int, Tensor], prefetcher: RowPrefetcher, without: set[int]
) -> dict[int, RowHandle]:
    """Start fetching the rows of all layers, those of the lowest first; layers from which it does not pay are left out.

    Args:
        memory: whose tables are read.
        hash_ids: head indices ``[B, T, H]`` per layer.
        prefetcher: fetches.
        without: layers that shall fetch for themselves (checkpointed ones: what is recomputed must not be kept).
    """
    if torch.compiler.is_compiling():
        return {}
    handles = {}
    for layer in sorted(set(hash_ids) - without):
        handle = memory.engrams[str(layer)].prefetch(hash_ids[layer], prefetcher)
        if handle is not None:
            handles[layer] = handle
    return handles


def find_verified(
    memory: EngramModel,
    ids: Tensor,
    history: Tensor | None,
    mask: Tensor | None,
    route: Tensor | None,
    wait: bool = True,
) -> tuple[dict[int, Tensor | None], dict[int, int]]:
    """Verified rows that positions read, for all layers, and how many positions read any.

    On the CPU the native core searches layer by layer. Elsewhere the n-grams of all layers are hashed together, and the host waits for
    the device once, for the counts: whoever knows them needs no other wait to pick the positions.

    Args:
        memory: whose tables are searched.
        ids: raw ids ``[B, T]``.
        history: raw ids ``[B, X]`` that came before.
        mask: ``[B, T]``, zero at padding, which reads nothing.
        route: bool ``[B]``, which sequences may read; None stands for all.
        wait: whether to ask the device for the counts; without, every position counts as one that may read.

    Returns:
        Slots ``[B, T, H]`` per layer, None for a layer in which nothing is read; and the counts, where they are known.
    """
    written = {int(layer): e for layer, e in memory.engrams.items() if e.table.stored_rows > 0}
    slots: dict[int, Tensor | None] = dict.fromkeys(map(int, memory.engrams))
    native = memory.mapping.kernel_for(ids) is not None
    hashed = {} if native or not written else memory.mapping.hash_with_tags(ids, history, mask)
    for layer, engram in written.items():
        if native:
            found = engram.find(ids, history, mask)
        else:
            device = engram.multi_head_embedding.offsets.device
            row_ids, tags = (x.to(device) for x in hashed[layer])
            found = engram.find_slots(row_ids, tags, None if mask is None else mask.to(device))
        if found is not None and route is not None:
            found = found.masked_fill(~route.to(found.device)[:, None, None], ABSENT)
        slots[layer] = found
    if native:
        return slots, {}
    # A layer in which nothing is written has none, or as many as all: known either way, so that nobody need ask the device.
    counts = {**dict.fromkeys(slots, 0), **_counts(slots, ids.device)} if wait else dict.fromkeys(slots, ids.numel())
    return {layer: found if counts.get(layer) else None for layer, found in slots.items()}, counts


def _counts(slots: dict[int, Tensor | None], device: torch.device) -> dict[int, int]:
    """Positions per layer in which anything was found; the one place where the host waits."""
    counts = {layer: (found != ABSENT).any(dim=-1).sum().to(device) for layer, found in slots.items() if found is not None}
    return dict(zip(counts, torch.stack(list(counts.values())).tolist())) if counts else {}
