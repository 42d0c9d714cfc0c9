"""A saved memory: a JSON description, a safetensors file and perhaps a ledger, replaced together or not at all.

The description names its other files. Saving writes those under new names first, then replaces the description in one rename: a
reader, or a machine that loses power, sees all of the old or all of the new, never a mixture.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engram.checkpoint.stream import TensorReader, TensorSpec, as_parts, read_header, write_tensors
from engram.errors import CheckpointError, TableError
from engram.tables import FORMATS

__all__ = [
    "DESCRIPTION_NAME",
    "FORMAT_VERSION",
    "again_if_saved",
    "lock_store",
    "open_tensors",
    "read_description",
    "read_ledger",
    "read_tensors",
    "saved_version",
    "stream_store",
    "sync_to_disk",
    "tensor_offsets",
    "write_atomically",
    "write_json_atomically",
    "write_store",
    "write_text_atomically",
]

DESCRIPTION_NAME = "engram.json"
FORMAT_VERSION = 1
_WEIGHTS_PREFIX = "engram-"
_WEIGHTS_SUFFIX = ".safetensors"
_LEDGER_SUFFIX = ".ledger.json"
_TEMPORARY_SUFFIX = ".tmp"
_PENDING_SUFFIX = ".pending.tmp"
_LOCK_NAME = ".engram.lock"
_EXPECTED = "expected the folder of a saved memory (`engram teach`, `engram train`, save_pretrained)."
_CHECKED_BYTES = 256 << 20
"""Files up to this size carry a checksum; reading all of a larger table just to check it would defeat mapping it."""
_ATTEMPTS = 100
"""How often a lock is taken anew whose file somebody removed meanwhile."""
_READS = 4
"""How often a memory is read anew that others save meanwhile."""
_FIELDS = {
    "engram_config": dict,
    "weights": dict,
    "ledger": dict,
    "placement": dict,
    "base_model": dict,
    "hash_spec": dict,
    "fingerprint": str,
    "reader_sha256": str,
    "layer_classes": dict,
    "mapping_class": str,
    "multipliers": dict,
    "vocab_size": int,
    "table_dtype": str,
}
"""Types of a description's fields; all may be missing but the first two."""
Read = TypeVar("Read")


@contextmanager
def lock_store(path: str | os.PathLike[str]) -> Iterator[None]:
    """Hold the folder ``path`` for changing what is saved in it; the lock goes with the process, however it ends. A thread that holds it may
    take it again.

    Raises:
        CheckpointError: another process or thread holds it, or the folder cannot be written.
    """
    folder = Path(path)
    new = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        lock = _acquired(folder)
    except Timeout:
        raise CheckpointError(
            f"the memory in {folder} is locked: another process is changing it. Wait until it is done, then try again."
        ) from None
    except OSError as error:
        if isinstance(error, FileExistsError | NotADirectoryError):
            reason = "it, or a folder that it is to be in, is a file or a link to nothing"
        else:
            reason = f"{error.strerror}"
        raise CheckpointError(f"cannot write the folder {folder}: {reason}; choose a folder that can be written.") from error
    try:
        yield
    finally:
        try:
            if new and {file.name for file in folder.iterdir()} <= {_LOCK_NAME}:  # nothing came of it: leave nothing behind
                _discard(folder / _LOCK_NAME)  # while it is held: afterwards it may be somebody else's
                for place in new:
                    place.rmdir()
        except OSError:  # a folder that others use by now stays
            pass
        finally:
            lock.release()


def _acquired(folder: Path) -> FileLock:
    """The lock of a folder, which is made if it is missing."""
    for _ in range(_ATTEMPTS):
        folder.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):  # somebody removed the folder just now
            lock = FileLock(folder.resolve() / _LOCK_NAME, is_singleton=True)
            lock.acquire(timeout=0)
            if _has_its_name(lock):
                return lock
            lock.release()  # of a file that its last holder removed: others lock the one that has the name by now
    raise OSError(errno.ESTALE, f"{_LOCK_NAME} is another file at every look")


def _has_its_name(lock: FileLock) -> bool:
    """Whether the file that is held is the one that others would try to lock."""
    handle = lock._context.lock_file_fd  # filelock has no public name for it
    with suppress(FileNotFoundError):
        return handle is None or os.path.samestat(os.stat(lock.lock_file), os.fstat(handle))
    return False


def write_store(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    description: Mapping[str, Any],
    ledger: Mapping[str, Any] | None = None,
) -> None:
    """Save a memory into the folder ``path``, atomically.

    Args:
        path: folder; made if missing. Other files in it are left alone.
        tensors: what to save.
        description: JSON-ready fields; ``format_version``, ``weights`` and ``ledger`` are added.
        ledger: JSON-ready account of what was taught, kept in a file of its own.

    Raises:
        CheckpointError: the folder cannot be written or the disk is full; what was saved before is intact.
    """
    specs = {name: TensorSpec.of(tensor) for name, tensor in tensors.items()}
    stream_store(path, specs, as_parts(tensors), description, ledger)


def stream_store(
    path: str | os.PathLike[str],
    specs: Mapping[str, TensorSpec],
    parts: Iterable[tuple[str, Tensor]],
    description: Mapping[str, Any],
    ledger: Mapping[str, Any] | None = None,
    finish: Callable[[Path], None] | None = None,
) -> None:
    """As ``write_store``, for tensors that come in parts (see ``write_tensors``) and are never in memory whole.

    ``finish`` is called with the weights file when that is on the disk under its final name, and before the description names it: what
    it does belongs to the save, and an error there undoes the save.
    """
    with lock_store(path):  # two savers would clear each other's files away
        _write_locked(Path(path), specs, parts, description, ledger, finish)


def _write_locked(
    folder: Path,
    specs: Mapping[str, TensorSpec],
    parts: Iterable[tuple[str, Tensor]],
    description: Mapping[str, Any],
    ledger: Mapping[str, Any] | None,
    finish: Callable[[Path], None] | None,
) -> None:
    name = f"{_WEIGHTS_PREFIX}{secrets.token_hex(6)}"
    weights, account = folder / f"{name}{_WEIGHTS_SUFFIX}", folder / f"{name}{_LEDGER_SUFFIX}"
    temporary, pending = folder / f".{weights.name}{_TEMPORARY_SUFFIX}", folder / f".{name}{_PENDING_SUFFIX}"
    replaced: set[str] = set()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder)  # they may fill the disk
        replaced = _named_files(folder) or set()
        pending.write_text(json.dumps(sorted(replaced)), encoding="utf-8")  # what a kill leaves is ours to remove, nothing else
        write_tensors(temporary, specs, parts)
        os.replace(temporary, weights)
        files = {"weights": _finished(weights)}
        if ledger is not None:
            account.write_text(json.dumps(ledger, ensure_ascii=False, separators=(",", ":")), encoding="utf-8")
            files["ledger"] = _finished(account)
        if finish is not None:
            finish(weights)
        _replace(folder / DESCRIPTION_NAME, _as_json({"format_version": FORMAT_VERSION, **description, **files}))
    except BaseException as error:  # Ctrl-C while writing too: leave no half file behind
        if weights.name in (_named_files(folder) or ()):  # it came after the save was done
            _discard(*(folder / file for file in replaced), pending)
            raise
        _discard(temporary, weights, account, pending)
        if isinstance(error, OSError) and not isinstance(error, CheckpointError):
            raise CheckpointError(
                f"cannot save the memory to {folder}: {error}. Nothing saved before was changed; free space or choose another folder."
            ) from error
        raise
    _discard(*(folder / file for file in replaced), pending)


def write_json_atomically(path: Path, fields: Mapping[str, Any]) -> None:
    """Replace ``path`` by the JSON of ``fields`` in one rename, on disk before it returns."""
    write_atomically(path, _as_json(fields))


def write_text_atomically(path: Path, text: str) -> None:
    """Replace ``path`` by ``text`` in UTF-8 in one rename, on disk before it returns."""
    write_atomically(path, text.encode("utf-8"))


def _as_json(fields: Mapping[str, Any]) -> bytes:
    return (json.dumps(fields, indent=2) + "\n").encode()


def write_atomically(path: Path, content: bytes) -> None:
    """Replace ``path`` by ``content`` in one rename, on disk before it returns.

    Of a link it is the target that is replaced. What is no regular file (a pipe, a device) is written into.
    """
    if path.exists() and not path.is_file():
        path.write_bytes(content)
        return
    _replace(Path(os.path.realpath(path)), content)


def _replace(path: Path, content: bytes) -> None:
    """Replace what has the name ``path``, be it a link: a description that leads into another memory or a hub's cache is not ours to write."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.write_bytes(content)
        sync_to_disk(temporary)
        os.replace(temporary, path)
        with suppress(OSError):  # some file systems have no sync for folders; the file itself is written
            sync_to_disk(path.parent)
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
    except RecursionError:
        raise CheckpointError(
            f"cannot read {file}: it is nested too deeply. Restore it from a backup or save the memory again."
        ) from None
    except FileNotFoundError:
        raise CheckpointError(f"no memory in {path}: {DESCRIPTION_NAME} is missing; {_EXPECTED}") from None
    except NotADirectoryError:
        raise CheckpointError(f"no memory in {path}: it is a file, {_EXPECTED}") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {file}: {error}. Restore it from a backup or save the memory again.") from error
    if not isinstance(fields, dict) or fields.get("format_version") != FORMAT_VERSION:
        if not isinstance(fields, dict) or "format_version" not in fields:
            raise CheckpointError(f"{file} does not describe a memory; restore it from a backup or save the memory again.")
        got = fields["format_version"]
        raise CheckpointError(
            f"{file}: got format version {got!r}, expected {FORMAT_VERSION}; upgrade engram to read newer files."
        )
    _check_fields(fields, file)
    return fields


def _check_fields(fields: dict[str, Any], file: Path) -> None:
    """Refuse a description without the fields that every memory has, or with one of another type: what reads them may rely on that."""
    missing = [name for name in ("engram_config", "weights") if name not in fields]
    wrong = [
        f"{name} is {type(fields[name]).__name__}, expected {wanted.__name__}"
        for name, wanted in _FIELDS.items()
        if name in fields and (not isinstance(fields[name], wanted) or isinstance(fields[name], bool))
    ]
    if not (missing or wrong):
        if fields.get("table_dtype", "float32") not in FORMATS:
            wrong.append(f"table_dtype is {fields['table_dtype']!r}, expected one of {', '.join(FORMATS)}")
        if not 1 <= fields.get("vocab_size", 1) < 1 << 31:
            wrong.append(f"vocab_size is {fields['vocab_size']}, expected 1 to 2^31 - 1")
        if not isinstance(fields.get("base_model", {}).get("name_or_path") or "", str):
            wrong.append("the name of base_model is no text")
        beneath = fields.get("base_model", {}).get("memory")
        while beneath is not None and not wrong:
            if not isinstance(beneath, dict) or not isinstance(beneath.get("folder") or "", str):
                wrong.append("the memory beneath base_model is no mapping with the name of a folder")
            else:
                beneath = beneath.get("memory")
    if missing or wrong:
        problems = "; ".join([*(f"no {name!r}" for name in missing), *wrong])
        raise CheckpointError(f"{file} is malformed: {problems}. Restore it from a backup or save the memory again.")


def again_if_saved(path: str | os.PathLike[str], read: Callable[[], Read]) -> Read:
    """What ``read`` gives, which reads the memory saved in the folder ``path``. If it fails because another process saved meanwhile, and so
    cleared away what was being read, it is called again.

    Raises:
        Exception: what ``read`` raised.
    """
    for _ in range(_READS - 1):
        version = _version_of(path)
        try:
            return read()
        except (OSError, TableError):
            if _version_of(path) == version:
                raise
    return read()


def _version_of(path: str | os.PathLike[str]) -> str | None:
    """Of the memory saved there; None if it cannot be read, which whoever reads all of it will say better."""
    with suppress(CheckpointError):
        return saved_version(path)
    return None


def saved_version(path: str | os.PathLike[str]) -> str | None:
    """A name that every save gives anew, or None if there is no memory in the folder ``path``.

    Raises:
        CheckpointError: there is one that cannot be read.
    """
    if not (Path(path) / DESCRIPTION_NAME).exists():
        return None
    try:
        return str(read_description(path)["weights"]["file"])
    except (KeyError, TypeError):
        raise CheckpointError(
            f"{path}/{DESCRIPTION_NAME} is malformed. Restore it from a backup or choose another folder."
        ) from None


@contextmanager
def open_tensors(path: str | os.PathLike[str], description: Mapping[str, Any]) -> Iterator[Any]:
    """The memory's tensors as an open safetensors file (``keys()``, ``get_slice(name)``, ``get_tensor(name)``).

    Raises:
        CheckpointError: the weights file is missing, truncated or not a safetensors file.
    """
    file = _named_file(path, description, "weights")
    try:
        opened = safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is not a readable safetensors file: {error}. Copy it again.") from error
    with opened as tensors:
        yield tensors


def tensor_offsets(path: str | os.PathLike[str], description: Mapping[str, Any]) -> dict[str, tuple[str, int]]:
    """Where each tensor lies, by name: the file and the first byte in it (safetensors: a length, a JSON header, then the data).

    Raises:
        CheckpointError: the weights file is missing or malformed.
    """
    file = _named_file(path, description, "weights")
    return {name: (str(file), place) for name, place in read_header(file)[1].items()}


def read_tensors(path: str | os.PathLike[str], description: Mapping[str, Any]) -> TensorReader:
    """The memory's tensors, to be read in parts.

    Raises:
        CheckpointError: the weights file is missing, truncated or not a safetensors file.
    """
    return TensorReader(_named_file(path, description, "weights"))


def read_ledger(path: str | os.PathLike[str], description: Mapping[str, Any]) -> dict[str, Any] | None:
    """The ledger saved with the memory, or None if it has none.

    Raises:
        CheckpointError: the file is missing, truncated or malformed.
    """
    if "ledger" not in description:
        return None
    file = _named_file(path, description, "ledger")
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read {file}: {error}. Copy it again.") from error
    if not isinstance(fields, dict):
        raise CheckpointError(f"{file}: got {type(fields).__name__}, expected a ledger. Copy it again.")
    return fields


def _named_file(path: str | os.PathLike[str], description: Mapping[str, Any], entry: str) -> Path:
    """The file that an entry of the description names, checked for place and size."""
    try:
        name, expected = str(description[entry]["file"]), int(description[entry]["bytes"])
    except (KeyError, TypeError, ValueError, OverflowError):
        raise CheckpointError(f"{path}/{DESCRIPTION_NAME}: the entry {entry!r} is malformed; save the memory again.") from None
    file = Path(path) / name
    if Path(name).name != name or "\0" in name:
        raise CheckpointError(f"{path}/{DESCRIPTION_NAME}: {entry} file {name!r} lies outside the folder; refused.")
    try:
        size = file.stat().st_size if file.is_file() else None
    except OSError as error:  # a name that is too long, say
        raise CheckpointError(f"cannot read {file}: {error.strerror}. Copy the memory again.") from error
    if size is None:
        raise CheckpointError(f"{file} is missing; expected {expected} bytes of {entry} beside {DESCRIPTION_NAME}.")
    if size != expected:
        raise CheckpointError(
            f"{file}: got {size} bytes, expected {expected}; the file is truncated or from another save. Copy it again."
        )
    if "sha256" in description[entry] and _checked_digest(file) != description[entry]["sha256"]:
        raise CheckpointError(f"{file}: its checksum is not the one saved; the file was damaged or changed. Copy it again.")
    return file


def _finished(file: Path) -> dict[str, Any]:
    """The description's entry of a file that is now safely on disk."""
    sync_to_disk(file)
    entry: dict[str, Any] = {"file": file.name, "bytes": file.stat().st_size}
    if entry["bytes"] <= _CHECKED_BYTES:
        entry["sha256"] = _digest(file)
    return entry


def _checked_digest(file: Path) -> str:
    try:
        return _digest(file)
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror}. Copy the memory again.") from error


def _digest(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _discard(*files: Path) -> None:
    for file in files:
        with suppress(OSError):
            file.unlink(missing_ok=True)


def sync_to_disk(path: str | os.PathLike[str]) -> None:
    """Return when a file's or folder's content is on the disk."""
    if os.name == "nt" and os.path.isdir(path):
        return  # Windows has no sync for folders, and one for files that may be written only
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _named_files(folder: Path) -> set[str] | None:
    """Files that the description in a folder names; none where there is no description, None where it cannot be read."""
    file = folder / DESCRIPTION_NAME
    if not file.exists():
        return set()
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
        names = {str(entry["file"]) for entry in fields.values() if isinstance(entry, dict) and "file" in entry}
    except (OSError, ValueError, AttributeError, RecursionError):
        return None
    return {name for name in names if Path(name).name == name}


def _remove_leftovers(folder: Path) -> None:
    """Remove what killed saves left beside the memory in a folder: half files, and those listed as pending that no description names.

    Weights that nothing lists are left alone (their description may be on its way: a copy that is not finished), and so is everything
    beside a description that cannot be read.
    """
    keep = _named_files(folder)
    if keep is None:
        return
    for pending in folder.glob(f".{_WEIGHTS_PREFIX}*{_PENDING_SUFFIX}"):
        name = pending.name[1 : -len(_PENDING_SUFFIX)]
        listed = {f"{name}{_WEIGHTS_SUFFIX}", f"{name}{_LEDGER_SUFFIX}"}
        if keep:  # without a description, what was to be replaced may be all there is
            listed |= _replaced(pending)
        _discard(*(folder / file for file in listed - keep))
    _discard(*folder.glob(f".{_WEIGHTS_PREFIX}*{_TEMPORARY_SUFFIX}"))
    _discard(*folder.glob(f".{DESCRIPTION_NAME}.*{_TEMPORARY_SUFFIX}"))  # nobody else is writing one: the folder is locked


def _replaced(pending: Path) -> set[str]:
    try:
        names = json.loads(pending.read_text(encoding="utf-8"))
        return {name for name in names if Path(name).name == name and name.startswith(_WEIGHTS_PREFIX)}
    except (OSError, ValueError, TypeError):  # killed while it was written
        return set()
