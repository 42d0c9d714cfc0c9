"""Recipes to start from, for a user's own text: commented YAML, in which little is filled in. The rest is for its owner to change."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from engram.config import EngramConfig, common_layers
from engram.data.recipe import CorpusRecipe, FolderSource, TextSource
from engram.data.sources import list_sources
from engram.errors import ConfigError, DataError
from engram.models.architectures import find_decoder
from engram.models.bundled_files import BUNDLED_NAME
from engram.models.positions import within_context

__all__ = ["STARTERS", "STARTER_KINDS", "OwnText", "find_texts", "memory_for", "rows_in_words", "starter_text"]

STARTERS = Path(__file__).parent / "starters"
"""Their folder. Each is a whole recipe as it stands; the text it names is not there."""
STARTER_KINDS = ("train", "sweep")

_ROWS_PER_HEAD = 20_000
_LARGEST_WIDTH = EngramConfig.n_embed_per_ngram
_LEAST_WIDTH = 4
_MANY_HEADS_FROM = 256
_LENGTH = 256
_FLOAT32 = 4


@dataclass(frozen=True)
class OwnText:
    """Where text of the user's lies, as a recipe says it."""

    folders: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)


def find_texts(given: Sequence[str], folder: str | os.PathLike[str]) -> OwnText:
    """What a recipe in ``folder`` says of folders, files and patterns that were named from the current folder.

    Raises:
        DataError: there is no such thing, or no text in it.
    """
    found = OwnText()
    for name in given:
        _check(name)
        (found.folders if os.path.isdir(name) else found.texts).append(_seen_from(folder, name))
    return found


def _check(name: str) -> None:
    """Refuse what `engram corpus` would find no file in."""
    if os.path.isdir(name):
        _check_finds(
            lambda: CorpusRecipe(folders=(FolderSource(name),)),
            f"texts: got folder {name!r} without a file that ends in {', '.join(FolderSource.suffixes)}, expected at least one: name files "
            "that end otherwise by a pattern, such as 'FOLDER/*.jsonl'.",
        )
    else:
        _check_finds(
            lambda: CorpusRecipe(texts=(TextSource(name),)),
            f"texts: got {name!r}, and there is nothing of that name; expected a folder, a file or a pattern that matches files: correct it "
            "(it is looked for from the current folder).",
        )


def _check_finds(made: Callable[[], CorpusRecipe], otherwise: str) -> None:
    try:
        next(list_sources(made(), Path()))
    except (ConfigError, DataError):
        raise DataError(otherwise) from None


def _seen_from(folder: str | os.PathLike[str], name: str) -> str:
    """The name relative to a folder; a whole path if the folder is reached through a link, where `..` leads to two places."""
    here, there, literal = os.getcwd(), os.path.abspath(folder), os.path.exists(name)
    if not literal:  # what is put in front of a pattern, or taken off it, is none
        here, there = glob.escape(here), glob.escape(there)
    whole = os.path.normpath(os.path.join(here, name))
    return whole if os.path.realpath(folder) != os.path.abspath(folder) else os.path.relpath(whole, there)


def starter_text(kind: str, own: OwnText | None = None, model: str | None = None) -> str:
    """A recipe as YAML.

    Args:
        kind: one of ``STARTER_KINDS``.
        own: where the text is; without it a folder is named that has to be changed.
        model: for ``train``, a model that exists, which gets a memory and stays as it is: a folder, a hub name or ``bundled``.

    Raises:
        ConfigError: there is no such kind, or it has no place for a model.
        DataError: a name cannot be written.
        CheckpointError, AttachError: the model cannot be read, or no memory be attached to it.
    """
    if kind not in STARTER_KINDS:
        raise ConfigError(f"kind: got {kind!r}, expected one of {', '.join(STARTER_KINDS)}.")
    if model is not None and kind != "train":
        raise ConfigError(
            f"model: got {model!r} for a {kind}, whose points start from fresh backbones; expected it with 'train', or none."
        )
    name = kind if model is None else "train_model"
    text = (STARTERS / f"{name}.yaml").read_text(encoding="utf-8")
    if model is not None:
        text = _with_model(text, model)
    return _with_texts(text, own) if own is not None and (own.folders or own.texts) else text


def _with_texts(text: str, own: OwnText) -> str:
    """The line that names a folder replaced by what there is."""
    parts = {"folders": own.folders, "texts": own.texts}

    def lists(line: re.Match[str]) -> str:
        return "\n".join(f"{line[1]}{name}:{_listed(paths, line[1])}" for name, paths in parts.items() if paths)

    return re.sub(r"^( *)folders: .*$", lists, text, flags=re.MULTILINE)


def _listed(paths: Sequence[str], indent: str) -> str:
    return "".join(f"\n{indent}  - {_quoted(path)}" for path in paths)


def _quoted(text: str) -> str:
    """Text in double quotes, in one line, whatever is in it.

    Raises:
        DataError: it has bytes that are no text.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(f"recipe: got the name {text!a}, expected one in UTF-8, as recipes are: rename it.") from None
    return yaml.safe_dump(text, default_style='"', width=len(text) * 16 + 80, allow_unicode=True).rstrip("\n")


def _with_model(text: str, name: str) -> str:
    """Filled in for a model; one that lies here by its whole path, for a relative one would be so to where training is started."""
    from engram.models.bundled import load_without_weights  # transformers, which a new model's recipe does not need

    model = load_without_weights(name)
    decoder = find_decoder(model)
    memory = memory_for(decoder.hidden_size, len(decoder.blocks))
    values = {
        "seq_len": within_context(model.config, _LENGTH),
        "model": _quoted(os.path.abspath(name) if name != BUNDLED_NAME and os.path.isdir(name) else name),
        "n_embed_per_ngram": memory.n_embed_per_ngram,
        "n_head_per_ngram": memory.n_head_per_ngram,
        "layer_ids": list(memory.layer_ids),
    }
    for key, value in values.items():
        text = _with_value(text, key, str(value))
    return re.sub(r"All rows together: [^;]*", f"All rows together: {rows_in_words(memory)}", text)


def _with_value(text: str, key: str, value: str) -> str:
    """Another value in the line of a field; its comment stays."""
    line = re.compile(rf"^( *{key}: ).*?(  #.*)?$", re.MULTILINE)
    return line.sub(lambda found: found[1] + value + (found[2] or ""), text)


def memory_for(hidden_size: int, blocks: int) -> EngramConfig:
    """The memory that a starter gives to a model: rows of each order a quarter as wide as the model, up to the paper demo's width."""
    width = _LEAST_WIDTH
    while width < _LARGEST_WIDTH and 8 * width <= hidden_size:
        width *= 2
    return EngramConfig(
        engram_vocab_size=_ROWS_PER_HEAD,
        n_embed_per_ngram=width,
        n_head_per_ngram=8 if width >= _MANY_HEADS_FROM else 4,
        layer_ids=common_layers(blocks),
        use_bias=False,
    )


def rows_in_words(memory: EngramConfig) -> str:
    """What the rows of a memory come to; heads get a few more rows than asked for, which are left out."""
    sizes: Any = memory.engram_vocab_size
    of_order = dict(zip(memory.orders, sizes))
    rows = sum(of_order[order] * memory.n_head_per_ngram for layer in memory.layer_ids for order in memory.orders_of(layer))
    numbers = rows * memory.head_dim
    return f"{rows:,} of {memory.head_dim} numbers, {numbers:,} parameters, {_in_bytes(numbers * _FLOAT32)}"


def _in_bytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
