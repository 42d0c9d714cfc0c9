"""Rows carried from one trained memory to another: to tables of another size, to other hash seeds, to other blocks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engram.errors import ConfigError, refuse_one_text
from engram.models.engram_model import EngramModel
from engram.models.place import windows_of
from engram.tables import is_in_parts

__all__ = ["TransferredLayer", "transfer_memory"]

_PENDING = 1 << 18
"""Look-ups that are summed up at a time, at least."""
_SAME = (
    "max_ngram_size",
    "n_embed_per_ngram",
    "n_head_per_ngram",
    "hidden_size",
    "hc_mult",
    "gate",
    "fuse",
    "branch_gates",
    "use_bias",
    "use_conv",
    "kernel_size",
    "reader",
)
"""What both must have alike, so that the reader of one reads the rows of the other."""


@dataclass(frozen=True)
class TransferredLayer:
    """What became of one layer of the new memory."""

    layer_id: int
    rows: int
    """Rows of the table."""
    written: int
    """Rows that some n-gram of the text reads; the others are as they were."""
    look_ups: int
    """Rows read by the text, each time counted."""


@torch.no_grad()
def transfer_memory(
    source: EngramModel, target: EngramModel, tokenizer: Any, texts: Iterable[str], layers: Mapping[int, int] | None = None
) -> list[TransferredLayer]:
    """Give a new memory the reader of a trained one, and each of its rows the mean of what the n-grams that read it read before.

    An address follows from the size of the tables, the seed and the layer, so that rows cannot be copied by number. They are carried by the
    n-grams of a text, best that of the training: where no two of its n-grams share a row of the new tables, the new memory says on it what
    the old one says. N-grams that the text lacks find what the new tables held, zeros as a rule. Go on training from there.

    Args:
        source: the trained memory; it may be unloaded.
        target: a new memory on the same model, with tables of any place and size that can be trained.
        tokenizer: of both.
        texts: one document each.
        layers: ``{layer of the target: layer of the source}``; by default every layer from the one of the same id.

    Returns:
        One entry for each layer of ``target``.

    Raises:
        ConfigError: the readers do not fit each other, a layer has no counterpart, rows of the target cannot be changed, or a memory is a
            taught one or divided between processes.
        DataError: one text in place of several.
    """
    refuse_one_text(texts, "transfer_memory")
    pairs = _pairs(source, target, layers)
    for layer_id, origin in pairs.items():
        reader = {name: x for name, x in source.engrams[str(origin)].state_dict().items() if not name.startswith("multi_head")}
        target.engrams[str(layer_id)].load_state_dict(reader, strict=False)
    carried = {layer_id: _Carried(source, origin, target, layer_id) for layer_id, origin in pairs.items()}
    before = target.engram_config.max_ngram_size - 1
    for text in texts:
        for window, history in windows_of(tokenizer, text, before):
            old, new = (memory.mapping.hash(window, history) for memory in (source, target))
            for layer_id, layer in carried.items():
                layer.add(old[pairs[layer_id]], new[layer_id])
    return [layer.write() for layer in carried.values()]


def _pairs(source: EngramModel, target: EngramModel, layers: Mapping[int, int] | None) -> dict[int, int]:
    """The source's layer for each of the target's, checked.

    Raises:
        ConfigError: as ``transfer_memory``.
    """
    old, new = source.engram_config, target.engram_config
    if old.verify_rows or new.verify_rows:
        raise ConfigError(
            "transfer_memory: got a taught memory, expected trained ones; facts are taught anew: `engram facts --memory OLD --yaml`, then "
            "`engram teach`."
        )
    if is_in_parts(source) or is_in_parts(target):
        raise ConfigError(
            "transfer_memory: got a memory that is divided between processes, expected whole ones: do it in one process."
        )
    closed = [layer_id for layer_id in new.layer_ids if not target.engrams[str(layer_id)].table.can_be_trained]
    if closed:
        raise ConfigError(
            f"transfer_memory: got a new memory whose rows cannot be changed in layer {closed[0]}, expected tables that can be trained: "
            "float32, bfloat16 or float16 rows, in files with a path (TableConfig)."
        )
    differing = [
        f"{name} {getattr(old, name)!r} and {getattr(new, name)!r}"
        for name in _SAME
        if getattr(old, name) != getattr(new, name)
    ]
    if differing:
        raise ConfigError(
            f"transfer_memory: got memories with {'; '.join(differing)}, expected the same: the reader goes along."
        )
    pairs = {layer_id: layer_id for layer_id in new.layer_ids} if layers is None else dict(layers)
    if set(pairs) != set(new.layer_ids) or not set(pairs.values()) <= set(old.layer_ids):
        raise ConfigError(
            f"transfer_memory: got layers {pairs}, expected for each layer of the new memory ({list(new.layer_ids)}) one of the old memory's "
            f"({list(old.layer_ids)})."
        )
    for layer_id, origin in pairs.items():
        if new.orders_of(layer_id) != old.orders_of(origin):
            raise ConfigError(
                f"transfer_memory: layer {layer_id} reads orders {list(new.orders_of(layer_id))}, layer {origin} of the old memory "
                f"{list(old.orders_of(origin))}; expected the same."
            )
    return pairs


class _Carried:
    """One layer's rows on the way: sums over look-ups in float32, of the rows that were looked up, until all is read."""

    def __init__(self, source: EngramModel, origin: int, target: EngramModel, layer_id: int) -> None:
        self.layer_id = layer_id
        self.old, self.new = (m.engrams[str(i)].multi_head_embedding for m, i in ((source, origin), (target, layer_id)))
        self.rows, self.counts = torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64)
        self.sums = torch.empty(0, self.new.embedding.dim)
        self._pending: list[tuple[Tensor, Tensor]] = []

    def add(self, old_hash: Tensor, new_hash: Tensor) -> None:
        """Take in what a text reads: head indices ``[1, T, H]`` in the old and in the new tables."""
        values = self.old.embedding.read(self.old.row_ids(old_hash.to(self.old.offsets.device)), torch.float32)
        self._pending.append(
            (self.new.row_ids(new_hash.to(self.new.offsets.device)).flatten().cpu(), values.flatten(0, -2).cpu())
        )
        if sum(len(rows) for rows, _ in self._pending) > max(_PENDING, len(self.rows)):
            self._sum_up()

    def _sum_up(self) -> None:
        rows = torch.cat([self.rows, *(rows for rows, _ in self._pending)])
        values = torch.cat([self.sums, *(values for _, values in self._pending)])
        counts = torch.cat([self.counts, torch.ones(len(rows) - len(self.counts), dtype=torch.int64)])
        self._pending = []
        self.rows, place = rows.unique(return_inverse=True)
        self.sums = torch.zeros(len(self.rows), values.shape[-1]).index_add_(0, place, values)
        self.counts = torch.zeros(len(self.rows), dtype=torch.int64).index_add_(0, place, counts)

    def write(self) -> TransferredLayer:
        """Put the means into the table, each rounded to its format once."""
        self._sum_up()
        table, device = self.new.embedding, self.new.offsets.device
        for rows, sums, counts in zip(*(x.split(_PENDING) for x in (self.rows, self.sums, self.counts))):
            means = sums / counts.unsqueeze(1)
            table.update_rows(rows.to(device), lambda held, means=means: means.to(held.device))
        return TransferredLayer(self.layer_id, table.rows, len(self.rows), int(self.counts.sum()))
