"""The text of an experiment: tokenised once, shared by all its points, its held-out half for choosing apart from that for reporting."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from engram.data.blocks import HeldOutBlocks, TrainingBlocks
from engram.data.store import TokenStore, build_store
from engram.experiments.recipe import DataRecipe
from engram.training.token_store import prepare_store

__all__ = ["HALVES", "PreparedData", "load_data", "prepare_data"]

HALVES = {"validation": 0, "test": 1}
"""Every second held-out document (or file: ``DataRecipe.held_out_by``): one half chooses settings, the other reports."""


@dataclass(frozen=True)
class PreparedData:
    """A token store and how it is cut."""

    store: TokenStore
    seq_len: int
    held_out_tokens: int
    held_out_by: str = "document"

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer that made the ids."""
        return self.store.load_tokenizer()

    @cached_property
    def held_out(self) -> dict[str, HeldOutBlocks]:
        """Both halves."""
        limit = max(1, self.held_out_tokens // self.seq_len)
        by_file = self.held_out_by == "file"
        return {half: HeldOutBlocks(self.store, self.seq_len, limit, (n, len(HALVES)), by_file) for half, n in HALVES.items()}

    def train(self, blocks: int, seed: int) -> TrainingBlocks:
        """Training blocks in the order of a seed."""
        return TrainingBlocks(self.store, self.seq_len, blocks, seed)


def prepare_data(
    recipe: DataRecipe,
    folder: Path,
    out: Path,
    show: Callable[[str, int, int], None] = lambda what, done, total: None,
    tokenizer: Any = None,
) -> PreparedData:
    """Build the token store of a recipe in ``out``, or open it if it is there.

    Args:
        recipe: text, and how it is cut.
        folder: what the recipe's paths are relative to.
        out: folder of the store.
        show: called with what is done, what of it, and of how much.
        tokenizer: the tokenizer of a model that exists; without it one of ``recipe.vocab_size`` is trained on the text.

    Raises:
        ConfigError, DataError, FingerprintError, CheckpointError: as for ``prepare_store`` and ``build_store``.
    """
    if tokenizer is None:
        store = prepare_store(recipe.corpus, folder, out, recipe.vocab_size, show)
    else:
        store = build_store(recipe.corpus, tokenizer, folder, out, lambda done, total: show("tokens", done, total))
    return PreparedData(store, recipe.seq_len, recipe.held_out_tokens, recipe.held_out_by)


def load_data(recipe: DataRecipe, out: Path) -> PreparedData:
    """Open a token store that ``prepare_data`` built; sources are not looked at again."""
    return PreparedData(TokenStore(out), recipe.seq_len, recipe.held_out_tokens, recipe.held_out_by)
