"""Which n-grams stand where in a sample, and which rows they read.

Shape legend: T positions of all windows together, H hash heads, N largest order.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from engram.analysis.sample import Sample
from engram.tables import ABSENT

__all__ = ["NOTHING", "found_orders", "ngram_codes", "rows_read"]

NOTHING = -1
"""In place of a row: nothing is read here (verified rows)."""


def ngram_codes(memory: Any, sample: Sample) -> dict[int, np.ndarray]:
    """For each order a number per position, int64 ``[T]``: equal numbers are equal n-grams of canonical ids.

    Positions before a window count as padding, as they do in the hash, and so does what lies behind a boundary.
    """
    mapping = memory.mapping
    canonical = np.asarray(mapping.compressed_tokenizer.lookup_table)
    raw_TN = np.concatenate([mapping.windows(torch.tensor([window.ids]))[0].numpy() for window in sample.windows])
    unique, ids_TN = np.unique(canonical[raw_TN], return_inverse=True)
    ids_TN = ids_TN.reshape(raw_TN.shape)
    code, codes = ids_TN[:, -1], {}
    for order in memory.engram_config.orders:  # an n-gram is the one that is shorter by one, and the id before it
        _, code = np.unique(code * len(unique) + ids_TN[:, -order], return_inverse=True)
        codes[order] = code
    return codes


def rows_read(memory: Any, sample: Sample) -> dict[int, np.ndarray]:
    """Rows that positions read in each layer, int64 ``[T, H]``, heads side by side in one numbering.

    Of verified rows only those found count, by the place where they are stored; elsewhere stands ``NOTHING``.
    """
    read: dict[int, list[np.ndarray]] = {layer: [] for layer in memory.engram_config.layer_ids}
    for window in sample.windows:
        ids = torch.tensor([window.ids])
        hashed = {} if memory.engram_config.verify_rows else memory.mapping.hash(ids)
        for layer in read:
            engram = memory.engrams[str(layer)]
            if memory.engram_config.verify_rows:
                slots = engram.find(ids)
                slots = engram.no_slots(*ids.shape) if slots is None else slots
                read[layer].append(torch.where(slots == ABSENT, NOTHING, slots)[0].cpu().numpy())
            else:
                read[layer].append((hashed[layer] + engram.multi_head_embedding.offsets.cpu())[0].numpy())
    return {layer: np.concatenate(parts) for layer, parts in read.items()}


def found_orders(memory: Any, sample: Sample) -> np.ndarray:
    """The largest order read at each position, int64 ``[T]``: N for ordinary rows; for verified ones what was found, 0 for nothing."""
    config = memory.engram_config
    positions = sum(len(window.ids) for window in sample.windows)
    if not config.verify_rows:
        return np.full(positions, max(max(config.orders_of(layer)) for layer in config.layer_ids))
    largest = np.zeros(positions, dtype=np.int64)
    for layer, rows in rows_read(memory, sample).items():
        by_order = (rows != NOTHING).reshape(positions, -1, config.n_head_per_ngram).any(axis=-1)
        largest = np.maximum(largest, (by_order * np.array(config.orders_of(layer))).max(axis=-1))
    return largest
