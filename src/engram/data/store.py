"""A corpus as token ids on disk: written once in bounded memory, then mapped by every run that trains on it.

A store is a folder: ``tokens.bin`` (ids of all documents, one after another, each document led by the begin token), ``documents.npy`` (where
each document lies, its bytes, weight, kind and side), ``names.jsonl``, the tokenizer, and ``store.json``, which says what all this was made of.
The folder gets its name when it is complete.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from engram.data.corpus import SPLITS, DocumentStream, SourceDigest
from engram.data.recipe import KINDS, CorpusRecipe
from engram.data.sources import installed_versions
from engram.data.store_writer import (
    DOCUMENTS_NAME,
    FORMAT_VERSION,
    NAMES_NAME,
    RECORD,
    STORE_NAME,
    TOKENIZER_NAME,
    TOKENS_NAME,
    appearing_whole,
    fingerprint_of,
    sole_builder,
    write_store_files,
)
from engram.errors import CheckpointError, ConfigError, FingerprintError

__all__ = ["STORE_NAME", "TokenStore", "begin_token", "build_store", "moved_versions", "tokenizer_digest"]

_MOVED_NAMED = 5


class TokenStore:
    """A finished store, its ids mapped and not read.

    Args:
        folder: what ``build_store`` wrote.

    Raises:
        CheckpointError: there is none, or it is truncated or malformed.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(os.path.abspath(folder))  # names are read later, from whatever directory that is
        self.description = _read_description(self.folder)
        try:
            self.fingerprint: str = self.description["fingerprint"]
            self.vocab_size: int = self.description["vocab_size"]
            self.begin_id: int = self.description["begin_id"]
            self.counts: dict[str, dict[str, dict[str, int]]] = self.description["counts"]
            """Documents, UTF-8 bytes and tokens by split and kind."""
            tokens, documents = self.description["tokens"], self.description["documents"]
            self.tokens: np.ndarray = np.memmap(self.folder / TOKENS_NAME, dtype=self.description["dtype"], mode="r")
            """Ids of all documents, ``[tokens]``, uint16 or uint32."""
            self.documents: np.ndarray = np.load(self.folder / DOCUMENTS_NAME, mmap_mode="r", allow_pickle=False)
            """One record per document, ``[documents]``: start, length (tokens), bytes, weight, kind (of ``KINDS``), split (of ``SPLITS``)."""
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise _broken(self.folder, f"it cannot be read ({type(error).__name__}: {error})") from None
        self._check(tokens, documents)
        self._names: list[str] | None = None

    def _check(self, tokens: int, documents: int) -> None:
        records = self.documents
        if records.dtype != RECORD or records.shape != (documents,) or self.tokens.shape != (tokens,):
            raise _broken(
                self.folder, f"expected {tokens} tokens of {documents} documents, got {len(self.tokens)} of {len(records)}"
            )
        ends = records["start"] + records["length"]
        followed = (
            len(records) and records["start"][0] == 0 and ends[-1] == tokens and np.array_equal(ends[:-1], records["start"][1:])
        )
        if not followed or records["length"].min() < 1 or records["weight"].min() < 1:
            raise _broken(self.folder, f"{DOCUMENTS_NAME} does not describe {TOKENS_NAME}")
        if records["kind"].max() >= len(KINDS) or records["split"].max() >= len(SPLITS):
            raise _broken(self.folder, f"{DOCUMENTS_NAME} names unknown kinds")

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder}  # workers map the files themselves

    def __setstate__(self, state: dict[str, Any]) -> None:
        TokenStore.__init__(self, state["folder"])

    def __len__(self) -> int:
        return len(self.documents)

    def split(self, name: str) -> np.ndarray:
        """Numbers of the documents on one side, ``"train"`` or ``"held_out"``, in the store's order."""
        if name not in SPLITS:
            raise ConfigError(f"split: got {name!r}, expected one of {', '.join(SPLITS)}.")
        return np.flatnonzero(self.documents["split"] == SPLITS.index(name))

    def ids(self, document: int) -> np.ndarray:
        """Token ids of one document, begin token first, ``[length]``; a view of the file."""
        record = self.documents[document]
        return self.tokens[record["start"] : record["start"] + record["length"]]

    def kind(self, document: int) -> str:
        """Kind of one document, one of ``KINDS``."""
        return KINDS[self.documents[document]["kind"]]

    @property
    def names(self) -> list[str]:
        """Names of all documents, read when first asked for."""
        if self._names is None:
            try:
                lines = (self.folder / NAMES_NAME).read_text(encoding="utf-8").splitlines()
                self._names = [json.loads(line) for line in lines]
            except (OSError, ValueError, RecursionError) as error:
                raise _broken(self.folder, f"{NAMES_NAME} cannot be read ({error})") from None
            if len(self._names) != len(self):
                raise _broken(self.folder, f"{NAMES_NAME} has {len(self._names)} names, expected {len(self)}")
        return self._names

    @property
    def left_out(self) -> list[str]:
        """Files that gave no document: for every reason how many, and the first few names (stores of earlier versions do not have them)."""
        names, found = self.description.get("skipped_names", {}), []
        for reason, count in self.description.get("skipped_files", {}).items():
            told = [*names.get(reason, ())]
            more = ["..."] if len(told) < count else []
            found.append(f"{count:,} {reason}" + (f" ({', '.join([*told, *more])})" if told else ""))
        return found

    def load_tokenizer(self) -> Any:
        """The tokenizer that made the ids."""
        from engram.models.bundled import load_tokenizer

        return load_tokenizer(str(self.folder / TOKENIZER_NAME))


def build_store(
    recipe: CorpusRecipe,
    tokenizer: Any,
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    show: Callable[[int, int], None] = lambda done, total: None,
    note: Mapping[str, Any] | None = None,
) -> TokenStore:
    """Read, deduplicate, split and tokenise a corpus into the folder ``out``; or open what is there, if it was made of the same things.

    Memory holds one file, one batch of its documents and some bytes for every document, never the text.

    Args:
        recipe: the sources.
        tokenizer: a Hugging Face tokenizer with a beginning- or end-of-text token.
        folder: what the recipe's paths are relative to.
        out: folder of the store; made if missing.
        show: called with bytes read so far and in all.
        note: JSON-ready fields for ``store.json`` that do not enter the fingerprint.

    Raises:
        DataError: a source cannot be used, changed while it was read, or nothing is left to train on.
        FingerprintError: ``out`` holds a store made of something else.
        CheckpointError: ``out`` holds something else or a broken store, cannot be written, or another process is building it.
    """
    out = Path(os.path.abspath(out))  # a name of its own, for "." too
    stream = DocumentStream(recipe, Path(folder))
    sources = stream.digest()
    identity = _identity(recipe, tokenizer, sources)
    if (out / STORE_NAME).exists():
        return _open_same(out, identity, recipe)
    _refuse_other_files(out)
    place = Path(os.path.realpath(out))  # a link stays one
    with sole_builder(place):
        if (out / STORE_NAME).exists():  # somebody else was faster
            return _open_same(out, identity, recipe)
        with appearing_whole(place) as temporary:
            made_of = {"installed": installed_versions(recipe), **(note or {})}
            write_store_files(temporary, stream, tokenizer, identity, sources, show, made_of)
    return TokenStore(out)


def begin_token(tokenizer: Any) -> int:
    """The id that leads every document: the beginning-of-text token, or else the end-of-text token.

    Raises:
        ConfigError: the tokenizer has neither.
    """
    found = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if found is None:
        raise ConfigError(
            "tokenizer: got one without a beginning- or end-of-text token, expected one of them to lead documents."
        )
    return int(found)


def tokenizer_digest(tokenizer: Any) -> str:
    """SHA-256 of what decides how a tokenizer encodes plain text; settings of single calls (padding, truncation) do not count."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not hasattr(backend, "to_str"):
        content: dict[str, Any] = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    else:
        content = json.loads(backend.to_str())
        for name in ("padding", "truncation", "post_processor"):  # the last one adds special tokens, which are not asked for
            content.pop(name, None)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode("utf-8", "surrogatepass")).hexdigest()


def _identity(recipe: CorpusRecipe, tokenizer: Any, sources: SourceDigest) -> dict[str, Any]:
    return {
        "format_version": FORMAT_VERSION,
        "recipe": recipe.to_dict(),
        "tokenizer": {"sha256": tokenizer_digest(tokenizer), "begin_id": begin_token(tokenizer)},
        "source_files": asdict(sources),
    }


def _open_same(out: Path, identity: Mapping[str, Any], recipe: CorpusRecipe) -> TokenStore:
    store = TokenStore(out)
    if store.fingerprint != fingerprint_of(identity):
        there = store.description.get("identity", {})
        named = [name.replace("_", " ") for name in identity if there.get(name) != identity[name]]
        differing = [f"{'other' if name.endswith('s') else 'another'} {name}" for name in named]
        moved = moved_versions(store.description.get("installed"), installed_versions(recipe))
        raise FingerprintError(
            f"{out} holds a token store made with {' and '.join(differing)}{moved}; choose another folder, or delete this "
            "one if nothing needs it any more."
        )
    return store


def moved_versions(there: Any, installed: Mapping[str, str]) -> str:
    """Which parts of the Python installation something was made with in another version, in words; nothing where it does not say."""
    if not isinstance(there, dict):
        return ""
    names = sorted(name for name in {*there, *installed} if there.get(name) != installed.get(name))
    moved = [f"{name} {there.get(name, 'absent')}, now {installed.get(name, 'absent')}" for name in names[:_MOVED_NAMED]]
    if len(names) > _MOVED_NAMED:
        moved.append(f"{len(names) - _MOVED_NAMED} more")
    return f" ({'; '.join(moved)})" if moved else ""


def _refuse_other_files(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} exists and is not a token store; choose a folder that is new or empty.")


def _read_description(folder: Path) -> dict[str, Any]:
    file = folder / STORE_NAME
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"no token store in {folder}: {STORE_NAME} is missing; make one with `engram corpus`.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise _broken(folder, f"{STORE_NAME} cannot be read ({error})") from None
    if not isinstance(fields, dict) or not isinstance(fields.get("identity"), dict):
        raise _broken(folder, f"{STORE_NAME} does not describe one")
    version = fields["identity"].get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{file}: got format version {version!r}, expected {FORMAT_VERSION}; upgrade engram or build it again."
        )
    return fields


def _broken(folder: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"the token store {folder} is damaged: {reason}. Delete the folder and build it again.")
