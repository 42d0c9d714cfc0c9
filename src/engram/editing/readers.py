"""A reader fitted to a model: rows that speak in the directions in which the model's words differ most."""

from __future__ import annotations

import torch

from engram.errors import ConfigError
from engram.layers import seeded_signs
from engram.models import EngramModel

__all__ = ["fit_reader_to_head"]


@torch.no_grad()
def fit_reader_to_head(memory: EngramModel) -> None:
    """Point the value projections at the principal directions of the model's output head, and freeze the reader.

    A row then writes straight into the subspace in which logits vary most, so that narrow rows suffice: measured figures are in
    ``results/readers.json``. Unlike a seeded reader this one is saved with the memory, and memories made with it can be merged only
    if they come from one saved reader. Call it before anything is taught.

    Raises:
        ConfigError: the memory's reader is seeded, it holds rows already, or the model has no output head.
    """
    config = memory.engram_config
    if config.reader != "trained":
        raise ConfigError(
            f"fit_reader_to_head: got reader={config.reader!r}, expected 'trained' (a seeded reader follows from its seed alone)."
        )
    if any(getattr(engram.table, "stored_rows", 0) for engram in memory.engrams.values()):
        raise ConfigError("fit_reader_to_head: the memory holds rows, which another reader would misread; fit before teaching.")
    head = memory.base_model.get_output_embeddings()
    if head is None:
        raise ConfigError("fit_reader_to_head: this model has no output embeddings; use reader='seeded'.")
    width = config.n_embed_per_ngram
    words = head.weight.detach().double()
    words = words - words.mean(dim=0)
    strength, directions = torch.linalg.eigh(words.T @ words)
    chosen = directions[:, strength.argsort(descending=True)[:width]]  # [d, width]
    if chosen.shape[1] < width:
        raise ConfigError(f"fit_reader_to_head: n_embed_per_ngram is {width}, expected at most the head's {chosen.shape[1]}.")
    values = (chosen * (chosen.shape[0] / width) ** 0.5).repeat(1, len(config.orders))  # one block per order; RMS is kept
    for layer, engram in memory.engrams.items():
        engram.value_proj.weight.copy_(values)
        for number, projection in enumerate(engram.key_projs, start=1):
            signs = seeded_signs((config.seed, int(layer), number), tuple(projection.weight.shape))
            projection.weight.copy_(signs / width**0.5)
        for part in (engram.value_proj, engram.key_projs, engram.norm1, engram.norm2):
            part.requires_grad_(False)
