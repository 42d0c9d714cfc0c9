"""The text of an experiment: tokenised once, shared by all its points, its held-out half for choosing apart from that for reporting."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from engram.data.blocks import HeldOutBlocks, TrainingBlocks
from engram.data.store import TokenStore, build_store
from engram.distributed import process_rank
from engram.experiments.recipe import DataRecipe
from engram.training.token_store import prepare_store

__all__ = ["HALVES", "PreparedData", "load_data", "prepare_data"]

HALVES = {"validation": 0, "test": 1}
"""Every second held-out document (or file: ``DataRecipe.held_out_by``): one half chooses settings, the other reports."""

_FEWEST_FILES = 5
_LARGEST_SHARE = 0.5


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
    """Build the token store of a recipe in ``out``, or open it if it is there; warn of files left out of it and of held-out text of few files.

    Args:
        recipe: text, and how it is cut.
        folder: what the recipe's paths are relative to.
        out: folder of the store.
        show: called with what is done, what of it, and of how much.
        tokenizer: the tokenizer of a model that exists; without it one of ``recipe.vocab_size`` is trained on the text.

    Raises:
        ConfigError, DataError, FingerprintError, CheckpointError: as for ``prepare_store``, ``build_store`` and ``HeldOutBlocks``.
    """
    if tokenizer is None:
        store = prepare_store(recipe.corpus, folder, out, recipe.vocab_size, show)
    else:
        store = build_store(recipe.corpus, tokenizer, folder, out, lambda done, total: show("tokens", done, total))
    data = PreparedData(store, recipe.seq_len, recipe.held_out_tokens, recipe.held_out_by)
    if process_rank() == 0:
        _warn_of_files_left_out(recipe, store)
        _warn_of_unused_ids(recipe, data, tokenizer is not None)
        _warn_of_few_texts(recipe, data)
    return data


def _warn_of_files_left_out(recipe: DataRecipe, store: TokenStore) -> None:
    """Of folders alone: a named file that cannot be used is an error, and nobody chose the files of the Python installation."""
    if recipe.corpus.folders and store.left_out:
        logging.getLogger("engram").warning("files left out of the text: %s", ", ".join(store.left_out))


def _warn_of_unused_ids(recipe: DataRecipe, data: PreparedData, given: bool) -> None:
    """Where the text was too short for a vocabulary of the size that was asked for: the model has embeddings that nothing uses."""
    if not given and (made := len(data.tokenizer)) < recipe.vocab_size:
        logging.getLogger("engram").warning(
            "data.vocab_size: got %s, but the text gives a vocabulary of %s; the model's embeddings have the larger size. Lower it, or "
            "add text.",
            f"{recipe.vocab_size:,}",
            f"{made:,}",
        )


def _warn_of_few_texts(recipe: DataRecipe, data: PreparedData) -> None:
    """Where a loss says more about some text of a half than about text."""
    told = [f"{half}: {reason}" for half, blocks in data.held_out.items() if (reason := _why_few(blocks, data.held_out_tokens))]
    if told:
        cut = "" if data.held_out_by == "file" else "set data.held_out_by: file, "
        logging.getLogger("engram").warning(
            "losses on so little held-out text say little about other text (%s); %sraise corpus.held_out_percent (now %d) or "
            "data.held_out_tokens (now %d), split large files into many, or add text.",
            "; ".join(told),
            cut,
            recipe.corpus.held_out_percent,
            recipe.held_out_tokens,
        )


def _why_few(blocks: HeldOutBlocks, wanted: int) -> str:
    """What makes a half of the held-out text too small a sample of it, where so many tokens were wanted; empty if nothing does."""
    found = blocks.composition
    lengths = blocks.store.documents["length"]
    measured, passed_over = (int(lengths[documents].sum()) for documents in (blocks.documents, blocks.passed_over))
    has_only_crumbs = passed_over > measured and 2 * measured < wanted
    if found["files"] >= _FEWEST_FILES and found["largest_share"] <= _LARGEST_SHARE and not has_only_crumbs:
        return ""
    share = f"{100 * found['largest_share']:.0f} % of the bytes in {found['largest']}"
    reason = f"{measured:,} tokens of {found['files']} files, {share}"
    if passed_over:
        reason += f", and {len(blocks.passed_over)} larger documents of {passed_over:,} tokens passed over"
    return reason


def load_data(recipe: DataRecipe, out: Path) -> PreparedData:
    """Open a token store that ``prepare_data`` built; sources are not looked at again."""
    return PreparedData(TokenStore(out), recipe.seq_len, recipe.held_out_tokens, recipe.held_out_by)
