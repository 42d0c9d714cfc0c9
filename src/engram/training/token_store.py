"""The token store of a corpus, with a tokenizer trained on that very corpus where none is given."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from engram.data.corpus import SPLITS, CorpusRecipe, DocumentStream, SourceDigest, split_of
from engram.data.store import STORE_NAME, TokenStore, build_store
from engram.errors import ConfigError, EngramError
from engram.training.tokenizer import SMALLEST_VOCABULARY, train_tokenizer

__all__ = ["prepare_store"]

_UNLIMITED = 1 << 30  # the tokenizer serves models of any length


def prepare_store(
    recipe: CorpusRecipe,
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    vocab_size: int,
    show: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> TokenStore:
    """Train a byte-level BPE tokenizer on the corpus's training side and build its token store; open what is there if it is the same.

    Args:
        recipe: the sources.
        folder: what the recipe's paths are relative to.
        out: folder of the store.
        vocab_size: tokens, the two special ones and 256 bytes included.
        show: called with what is done, bytes read so far and in all.

    Raises:
        ConfigError: the vocabulary is too small.
        DataError, FingerprintError, CheckpointError: as for ``build_store``.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise ConfigError(
            f"vocab_size: got {vocab_size}, expected at least {SMALLEST_VOCABULARY} (256 bytes and two special tokens)."
        )
    stream = DocumentStream(recipe, Path(folder))
    sources = stream.digest()
    training = {"vocab_size": vocab_size, "recipe": recipe.to_dict(), "source_files": asdict(sources)}
    tokenizer = _trained_before(Path(out), training)
    if tokenizer is None:
        texts = _training_texts(stream, sources, lambda done, total: show("tokenizer", done, total))
        tokenizer = train_tokenizer(texts, vocab_size, _UNLIMITED)
    note = {"trained_tokenizer": {"vocab_size": vocab_size}}
    return build_store(recipe, tokenizer, folder, out, lambda done, total: show("tokens", done, total), note)


def _trained_before(out: Path, training: dict[str, Any]) -> Any | None:
    """The tokenizer in ``out`` if training it anew would give the same one."""
    if not (out / STORE_NAME).exists():
        return None
    store = TokenStore(out)
    made_of = {name: store.description["identity"].get(name) for name in ("recipe", "source_files")}
    if {**store.description.get("trained_tokenizer", {}), **made_of} != training:
        return None
    try:
        return store.load_tokenizer()
    except EngramError:
        return None


def _training_texts(stream: DocumentStream, sources: SourceDigest, show: Callable[[int, int], None]) -> Iterator[str]:
    counts = dict.fromkeys(SPLITS, 0)
    for document in stream:
        split = split_of(document, stream.recipe)
        counts[split] += 1
        if split == "train":
            yield document.text
        show(stream.bytes_read, sources.bytes)
    if not counts["train"]:
        raise stream.nothing_to_train_on(counts["held_out"])
    show(sources.bytes, sources.bytes)
