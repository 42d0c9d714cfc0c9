"""A saved memory: one JSON description and one safetensors file, replaced as a pair or not at all.

The description names its weights file. Saving writes new weights under a new name first, then replaces the description in one
rename: a reader, or a machine that loses power, sees the old pair or the new pair, never a mixture.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from engram.errors import CheckpointError

__all__ = ["DESCRIPTION_NAME", "FORMAT_VERSION", "open_tensors", "read_description", "write_json_atomically", "write_store"]

DESCRIPTION_NAME = "engram.json"
FORMAT_VERSION = 1
_WEIGHTS_PREFIX = "engram-"
_WEIGHTS_SUFFIX = ".safetensors"


def write_store(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
    """Save a memory into the folder ``path``, atomically.

    Args:
        path: folder; made if missing. Other files in it are left alone.
        tensors: what to save.
        description: JSON-ready fields; ``format_version`` and ``weights`` are added.

    Raises:
        CheckpointError: the folder cannot be written or the disk is full; what was saved before is intact.
    """
    folder = Path(path)
    weights = folder / f"{_WEIGHTS_PREFIX}{secrets.token_hex(6)}{_WEIGHTS_SUFFIX}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, weights)
        _sync(weights)
        entry = {"file": weights.name, "bytes": weights.stat().st_size}
        write_json_atomically(folder / DESCRIPTION_NAME, {"format_version": FORMAT_VERSION, **description, "weights": entry})
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            weights.unlink(missing_ok=True)
        raise CheckpointError(
            f"cannot save the memory to {folder}: {error}. Nothing saved before was changed; free space or choose another folder."
        ) from error
    except BaseException:  # Ctrl-C while writing: leave no half file behind
        with suppress(OSError):
            weights.unlink(missing_ok=True)
        raise
    _remove_stale_weights(folder, keep=weights.name)


def write_json_atomically(path: Path, fields: Mapping[str, Any]) -> None:
    """Replace ``path`` by the JSON of ``fields`` in one rename, on disk before it returns."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def read_description(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The JSON description of the memory saved in the folder ``path``.

    Raises:
        CheckpointError: there is no memory, or its description is malformed or of a newer format.
    """
    file = Path(path) / DESCRIPTION_NAME
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"no memory in {path}: {DESCRIPTION_NAME} is missing; expected a folder made by save_pretrained."
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {file}: {error}. Restore it from a backup or save the memory again.") from error
    if not isinstance(fields, dict) or fields.get("format_version") != FORMAT_VERSION:
        got = fields.get("format_version") if isinstance(fields, dict) else type(fields).__name__
        raise CheckpointError(
            f"{file}: got format version {got!r}, expected {FORMAT_VERSION}; upgrade engram to read newer files."
        )
    return fields


@contextmanager
def open_tensors(path: str | os.PathLike[str], description: Mapping[str, Any]) -> Iterator[Any]:
    """The memory's tensors as an open safetensors file (``keys()``, ``get_slice(name)``, ``get_tensor(name)``).

    Raises:
        CheckpointError: the weights file is missing, truncated or not a safetensors file.
    """
    try:
        name, expected = str(description["weights"]["file"]), int(description["weights"]["bytes"])
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(f"{path}/{DESCRIPTION_NAME}: the entry 'weights' is malformed; save the memory again.") from None
    file = Path(path) / name
    if Path(name).name != name:
        raise CheckpointError(f"{path}/{DESCRIPTION_NAME}: weights file {name!r} lies outside the folder; refused.")
    if not file.is_file():
        raise CheckpointError(f"{file} is missing; expected {expected} bytes of weights beside {DESCRIPTION_NAME}.")
    size = file.stat().st_size
    if size != expected:
        raise CheckpointError(
            f"{file}: got {size} bytes, expected {expected}; the file is truncated or from another save. Copy it again."
        )
    try:
        opened = safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is not a readable safetensors file: {error}. Copy it again.") from error
    with opened as tensors:
        yield tensors


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove_stale_weights(folder: Path, keep: str) -> None:
    for file in folder.glob(f"{_WEIGHTS_PREFIX}*{_WEIGHTS_SUFFIX}"):
        if file.name != keep:
            with suppress(OSError):
                file.unlink()
