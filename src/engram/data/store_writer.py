"""Writing a token store: in bounded memory, under a temporary name, by one process at a time."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from engram.checkpoint import sole_writer, write_json_atomically
from engram.data.corpus import SPLITS, DocumentStream, SourceDigest, split_of
from engram.data.recipe import KINDS, CorpusRecipe
from engram.data.sources import Document
from engram.errors import CheckpointError, DataError
from engram.hashing import count_ids

__all__ = [
    "DOCUMENTS_NAME",
    "FORMAT_VERSION",
    "NAMES_NAME",
    "RECORD",
    "STORE_NAME",
    "TOKENIZER_NAME",
    "TOKENS_NAME",
    "appearing_whole",
    "fingerprint_of",
    "sole_builder",
    "write_store_files",
]

STORE_NAME = "store.json"
FORMAT_VERSION = 1
TOKENS_NAME, DOCUMENTS_NAME, NAMES_NAME, TOKENIZER_NAME = "tokens.bin", "documents.npy", "names.jsonl", "tokenizer"
"""The other files; little-endian, the same on every machine."""
RECORD = np.dtype([("start", "<i8"), ("length", "<i8"), ("bytes", "<i8"), ("weight", "<i4"), ("kind", "u1"), ("split", "u1")])
_BATCH_CHARACTERS = 1 << 18
_BATCH_DOCUMENTS = 64


def fingerprint_of(identity: Mapping[str, Any]) -> str:
    """SHA-256 of what a store was made of."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


@contextmanager
def sole_builder(out: Path) -> Iterator[None]:
    """Lock the name ``out``, and remove what builds that were killed have left beside it."""
    with sole_writer(out, f"building {out}"):
        for left in out.parent.glob(f".{glob.escape(out.name)}.*.tmp"):
            shutil.rmtree(left, ignore_errors=True)
        yield


@contextmanager
def appearing_whole(out: Path) -> Iterator[Path]:
    """A temporary folder that becomes ``out``, which is no link, at the end; or nothing.

    Raises:
        CheckpointError: it cannot be written, or ``out`` is a folder that nothing can replace.
    """
    temporary = out.with_name(f".{out.name}.{secrets.token_hex(4)}.tmp")
    _check_replaceable(out, temporary)
    try:
        temporary.mkdir()
        yield temporary
        if out.is_dir():
            out.rmdir()  # empty, as was checked
        temporary.rename(out)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"cannot write the token store {out}: {error.strerror or error}. Nothing was left behind; free space or choose another folder."
        ) from None
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _check_replaceable(out: Path, aside: Path) -> None:
    """Fail before the work and not after it: a folder that cannot be moved (a mount point) cannot be replaced either."""
    if not out.is_dir():
        return
    try:
        out.rename(aside)
        aside.rename(out)
    except OSError as error:
        raise CheckpointError(
            f"cannot put a token store in the place of the folder {out} ({error.strerror}; a mount point?); choose a folder inside it, such "
            f"as {out / 'store'}."
        ) from None


def write_store_files(
    folder: Path,
    stream: DocumentStream,
    tokenizer: Any,
    identity: Mapping[str, Any],
    sources: SourceDigest,
    show: Callable[[int, int], None],
    note: Mapping[str, Any],
) -> None:
    """Write all files of a store into ``folder``; ``build_store`` says what the arguments are.

    Raises:
        DataError: a source cannot be used, changed while it was read, or nothing is left to train on.
        OSError: the disk is full.
    """
    vocab_size, begin = count_ids(tokenizer), identity["tokenizer"]["begin_id"]
    dtype = "<u2" if vocab_size <= 1 << 16 else "<u4"
    chunks: list[np.ndarray] = []
    start = 0
    _save_tokenizer(tokenizer, folder / TOKENIZER_NAME)
    with open(folder / TOKENS_NAME, "wb") as tokens, open(folder / NAMES_NAME, "w", encoding="utf-8") as names:
        for batch in _batches(stream):
            texts = [document.text for document in batch]
            # Text that looks like a special token is text: nothing in a file may fake the start of a document.
            encoded = tokenizer(texts, add_special_tokens=False, verbose=False, split_special_tokens=True)["input_ids"]
            records = np.zeros(len(batch), dtype=RECORD)
            for record, document, ids in zip(records, batch, encoded):
                tokens.write(np.asarray([begin, *ids], dtype=dtype).tobytes())
                names.write(json.dumps(document.name) + "\n")
                _fill(record, document, stream.recipe, start, len(ids) + 1)
                start += len(ids) + 1
            chunks.append(records)
            show(stream.bytes_read, sources.bytes)
        for file in (tokens, names):
            file.flush()
            os.fsync(file.fileno())
    if stream.read != sources:
        raise DataError("corpus: files changed while they were read; run it again when nothing writes to them.")
    records = np.concatenate(chunks) if chunks else np.zeros(0, dtype=RECORD)
    if not (records["split"] == SPLITS.index("train")).any():
        raise stream.nothing_to_train_on(len(records))
    show(sources.bytes, sources.bytes)
    with open(folder / DOCUMENTS_NAME, "wb") as file:
        _save_array(file, records)
    write_json_atomically(
        folder / STORE_NAME,
        {
            "fingerprint": fingerprint_of(identity),
            "identity": identity,
            "dtype": dtype,
            "vocab_size": vocab_size,
            "begin_id": begin,
            "documents": len(records),
            "tokens": start,
            "counts": _counts(records),
            "duplicates": {"exact": stream.duplicates, "near": stream.near_duplicates},
            "skipped_files": dict(sorted(stream.skipped.items())),
            **({"skipped_names": dict(sorted(stream.skipped_names.items()))} if stream.skipped else {}),
            **note,
        },
    )


def _save_tokenizer(tokenizer: Any, folder: Path) -> None:
    try:
        tokenizer.save_pretrained(folder)
    except OSError:
        raise
    except Exception as error:  # the tokenizers library has no class of its own for a full disk
        raise OSError(str(error)) from None


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= _BATCH_CHARACTERS or len(batch) >= _BATCH_DOCUMENTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _fill(record: Any, document: Document, recipe: CorpusRecipe, start: int, length: int) -> None:
    record["start"], record["length"], record["bytes"] = start, length, len(document.text.encode())
    record["weight"], record["kind"] = document.weight, KINDS.index(document.kind)
    record["split"] = SPLITS.index(split_of(document, recipe))


def _save_array(file: BinaryIO, records: np.ndarray) -> None:
    np.lib.format.write_array(file, records, allow_pickle=False)
    file.flush()
    os.fsync(file.fileno())


def _counts(records: np.ndarray) -> dict[str, dict[str, dict[str, int]]]:
    counts: dict[str, dict[str, dict[str, int]]] = {}
    for number, split in enumerate(SPLITS):
        counts[split] = {}
        for kind_number, kind in enumerate(KINDS):
            chosen = records[(records["split"] == number) & (records["kind"] == kind_number)]
            if len(chosen):
                sizes = {"documents": len(chosen), "bytes": int(chosen["bytes"].sum()), "tokens": int(chosen["length"].sum())}
                counts[split][kind] = sizes
    return counts
