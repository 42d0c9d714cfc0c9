"""Saving and loading a whole memory."""

from __future__ import annotations

import hashlib
import logging
import os
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from engram._version import __version__
from engram.checkpoint import (
    BACKBONE_FOLDER,
    TensorReader,
    open_tensors,
    placed_folder,
    read_description,
    read_ledger,
    saved_version,
    stream_store,
    tensor_offsets,
)
from engram.checkpoint.stream import TensorSpec, as_parts, type_code
from engram.config import EngramConfig, TableConfig
from engram.distributed import is_fully_sharded, process_rank, put_apart, saving_together, whole, write_whole
from engram.errors import AttachError, CheckpointError, ConfigError, FingerprintError, TableError
from engram.hashing import NgramHashMapping, build_mapping, count_ids
from engram.layers import Engram, layer_classes
from engram.models.base_check import adapters_beside, check_base
from engram.models.bundled_files import BUNDLED_MEMORY, BUNDLED_NAME
from engram.models.identity import attached_identity
from engram.models.saved_rows import (
    PLACEMENT,
    TABLE,
    cold_table,
    fill_tables,
    fill_verified_tables,
    gathered_tables,
    promote_rows,
    table_shapes,
)
from engram.tables import (
    MappedRows,
    is_being_filled,
    is_in_parts,
    is_untouched,
    row_file,
    row_file_layout,
    row_format,
    row_stamp,
    stamp_rows,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from engram.models.engram_model import EngramModel

__all__ = ["PLACED_FIELDS", "check_memory", "folder_name", "load_memory", "save_memory", "saved_aside"]

PLACED_FIELDS = {"tier", "path", "hot_rows", "resident_bytes"}
"""Fields of a ``TableConfig`` that a saved memory's placement may have."""
_READER = ("value_proj.", "key_projs.", "norm1.", "norm2.")


def save_memory(memory: EngramModel, path: str | os.PathLike[str], overwrite: bool = False, with_base: bool = False) -> None:
    """Write ``engram.json`` (what it is), one safetensors file (its tensors) and its ledger if it has one, all or nothing.

    Where tables or weights are divided between processes, all save together: the first writes, the others send it what they have.

    Args:
        memory: what to save.
        path: the folder.
        overwrite: also over facts that this memory does not know.
        with_base: note that the base model, which was trained too, is saved into the folder ``backbone`` there.

    Raises:
        CheckpointError: the folder cannot be written or holds facts that were neither read nor written here, a seeded reader was trained, or
            facts are just being taught or forgotten.
        AttachError: the memory lies beneath one that was divided.
    """
    _refuse_beneath_divided(memory)
    together = is_in_parts(memory)
    # A lesson of another thread is waited for; who only reads rows that are stepped need not wait for the save of a large table.
    with memory.turns if memory.engram_config.verify_rows else nullcontext(), saving_together(together):
        if memory.is_being_changed:
            raise CheckpointError(
                "got a memory whose facts are just being changed, expected a save when that is done; nothing was written."
            )
        if not overwrite and not (together and process_rank() > 0):
            _refuse_to_bury(memory, path)
        _save(memory, path, together, with_base)


@contextmanager
def saved_aside(memory: EngramModel) -> Iterator[str]:
    """The memory saved into a folder that is there inside alone; where the memory says that it lies stays what it was."""
    folder = memory.folder
    with TemporaryDirectory() as place:
        try:
            save_memory(memory, place)
            yield place
        finally:
            memory.folder = folder


def _save(memory: EngramModel, path: str | os.PathLike[str], together: bool, with_base: bool) -> None:
    description = {
        "library_version": __version__,
        "engram_config": memory.engram_config.to_dict(),
        "hash_spec": memory.mapping.spec.to_dict(),
        "fingerprint": memory.mapping.fingerprint,
        "vocab_size": len(memory.mapping.compressed_tokenizer.lookup_table),
        "table_dtype": memory.table_config.dtype,
        "base_model": attached_identity(memory.below),
        **_own_parts(memory),
        **({"base_folder": BACKBONE_FOLDER} if with_base else {}),
        **adapters_beside(memory),
    }
    if memory.engram_config.reader == "seeded":
        _check_unmoved(memory)
        description["reader_sha256"] = _reader_digest(memory)
    tensors = {name: whole(tensor) for name, tensor in _tensors(memory).items()}
    parts = _parts(memory, tensors)
    if together and process_rank() > 0:  # the first writes, with rows of this one
        deque(parts, maxlen=0)
        return
    rows = {f"{prefix}weight": table.rows for prefix, table in gathered_tables(memory).items()}
    try:
        specs = {name: _spec(tensor, rows.get(name)) for name, tensor in tensors.items()}
        stream_store(path, specs, parts, description, memory.ledger)
    finally:
        if together:
            deque(parts, maxlen=0)  # what is left if it failed: the others are sending it
    version = saved_version(path)
    memory.known_versions.add(version)
    memory.folder = memory.folder or folder_name(path)
    for layer_id, engram in memory.engrams.items():  # row files hold what was saved
        table = engram.table
        cold = cold_table(table)
        if isinstance(cold, MappedRows) and cold.mode == "r+":
            try:
                cold.flush()
                stamp_rows(cold.path, row_stamp(str(version), layer_id, table.format_name))
            except TableError as error:  # the save is done, whatever became of the file
                logging.getLogger("engram").warning("%s: saved, but not noted beside the row file: %s", os.fspath(path), error)


def _refuse_to_bury(memory: EngramModel, path: str | os.PathLike[str]) -> None:
    """Weights are saved over weights as everywhere. Facts that somebody taught are not made again by another training."""
    try:
        unknown = saved_version(path) not in {None, *memory.known_versions} and "ledger" in read_description(path)
    except CheckpointError:  # what cannot be read is no memory any more
        return
    if unknown:
        raise CheckpointError(
            f"{path} holds facts that this memory does not know; saving over them would lose them. Load them, choose another folder, or pass "
            "overwrite=True."
        )


def _refuse_beneath_divided(memory: EngramModel) -> None:
    """FSDP divides a stack through the topmost memory, and only that one knows when its parts lie together; a base model that was divided while
    it was loaded tells nobody.
    """
    if is_fully_sharded(memory.base_model) and not is_fully_sharded(memory):
        raise AttachError(
            "got a memory beneath one that shard_model divided, expected the topmost (save and load this one before they are divided); or one "
            "on a base model that was divided while it was loaded, expected shard_model(memory) first."
        )


def _spec(tensor: Tensor, rows: int | None) -> TensorSpec:
    """Of a tensor in a file; ``rows``: of the whole table that it is a part of."""
    return TensorSpec.of(tensor) if rows is None else TensorSpec(tensor.dtype, (rows, *tensor.shape[1:]))


def _own_parts(memory: EngramModel) -> dict[str, Any]:
    """What a description says of parts that are not the library's, by class name; nothing of a memory without such."""
    layers = {layer_id: type(engram).__name__ for layer_id, engram in memory.engrams.items() if type(engram) is not Engram}
    mapping, parts = memory.mapping, dict[str, Any]()
    if layers:
        parts["layer_classes"] = layers
    if type(mapping) is not NgramHashMapping:
        parts["mapping_class"] = type(mapping).__name__
    if mapping.spec.multipliers == "given":
        parts["multipliers"] = {str(layer_id): numbers.tolist() for layer_id, numbers in mapping.layer_multipliers.items()}
    return parts


def check_memory(
    model: PreTrainedModel | EngramModel,
    path: str | os.PathLike[str],
    tokenizer: Any,
    allow_other_base: bool,
    placement: TableConfig | None = None,
    mapping: NgramHashMapping | None = None,
    layer_class: type[Engram] | Mapping[int, type[Engram]] | None = None,
) -> tuple[NgramHashMapping, TableConfig]:
    """Check a saved memory's description against a model and tokenizer, touching neither; returns its addresses and its placement.

    The placement is the one asked for, or as it was saved; rows that shall be mapped where they lie are looked up in the saved file.

    Raises:
        CheckpointError, ConfigError, FingerprintError: as ``EngramModel.from_pretrained``.
    """
    description = read_description(path)
    config = EngramConfig.from_dict(description["engram_config"])
    if hasattr(tokenizer, "__len__") and config.pad_id >= (count := count_ids(tokenizer)):
        raise FingerprintError(
            f"the memory in {path} was made with another tokenizer: it pads with token {config.pad_id}, and this one has {count:,} tokens. "
            f"{_belongs_to(description)}"
        )
    _check_layer_classes(description, layer_classes(layer_class, config.layer_ids), path)
    if mapping is None:
        mapping = build_mapping(config, tokenizer, description.get("multipliers"))
    mapping.check_config(config)
    _check_fingerprint(description, mapping, path)
    check_base(description, model, path, allow_other_base)
    saved_dtype = description.get("table_dtype", "float32")
    asked = placement is not None
    if placement is None:
        placement = _saved_placement(description, path, saved_dtype)
    if placement.tier == "mmap" and placement.path is None:
        return mapping, _in_place(placement, description, path, saved_dtype, config)
    if placement.path is not None:
        version = str(description["weights"].get("file"))
        stamps = {layer: row_stamp(version, layer, placement.dtype) for layer in config.layer_ids}
        placement = replace(placement, stamps=stamps)
        if not asked and not config.verify_rows:
            _warn_of_filling(placement, mapping, path)
    return mapping, placement


def _warn_of_filling(placement: TableConfig, mapping: NgramHashMapping, path: str | os.PathLike[str]) -> None:
    """Say that row files which nobody asked for in this load are about to be written, as they are not where the memory was placed."""
    assert placement.path is not None
    form, files, size = row_format(placement.dtype), [], 0
    for layer_id in placement.stamps or {}:
        file = row_file(placement.path, layer_id)
        if not os.path.exists(file) or is_untouched(file) or is_being_filled(file):
            files.append(file.name)
            size += row_file_layout(sum(mapping.head_sizes(layer_id)), mapping.config.head_dim, form)[1]
    if files:
        logging.getLogger("engram").warning(
            "%s: row files that the memory was placed in are missing or unfinished; writing %s bytes of saved rows into %s in %s. To have the "
            "rows elsewhere: in Python by a TableConfig(...) at the load, on the command line by `engram place`.",
            os.fspath(path),
            f"{size:,}",
            ", ".join(files),
            placement.path,
        )


def _saved_placement(description: dict[str, Any], path: str | os.PathLike[str], saved_dtype: str) -> TableConfig:
    """Where the memory was placed (``engram place``); a relative folder of row files is meant from the memory's own."""
    noted = description.get("placement") or {}
    if not noted.keys() <= PLACED_FIELDS:  # which file is read, above all, is not for a description to say
        raise ConfigError(
            f"{path}: got a placement of {', '.join(noted)}, expected some of {', '.join(sorted(PLACED_FIELDS))}."
        )
    placement = TableConfig.from_dict({"dtype": saved_dtype, **noted})
    folder = placed_folder(path, description)
    return placement if folder is None else replace(placement, path=str(folder))


def _in_place(
    placement: TableConfig, description: dict[str, Any], path: str | os.PathLike[str], saved_dtype: str, config: EngramConfig
) -> TableConfig:
    """The placement with the places of all tables in the saved file."""
    if saved_dtype != placement.dtype:
        raise ConfigError(
            f"TableConfig: got tier 'mmap' with dtype {placement.dtype!r} and no path, expected the saved dtype {saved_dtype!r}: "
            "rows are read where they lie. Give a path to make a converted copy."
        )
    offsets = tensor_offsets(path, description)
    parts = ("weight", "scales") if row_format(saved_dtype).quantised else ("weight",)
    names = {layer: [f"layers.{layer}.{TABLE}{part}" for part in parts] for layer in config.layer_ids}
    if config.verify_rows or any(name not in offsets for found in names.values() for name in found):
        return placement  # refused, or found malformed, further on
    files = {layer: (offsets[found[0]][0], tuple(offsets[name][1] for name in found)) for layer, found in names.items()}
    return replace(placement, files=files)


def load_memory(
    memory: EngramModel,
    path: str | os.PathLike[str],
    allow_other_base: bool = False,
    changed_rows: str = "refuse",
    just_checked: bool = False,
) -> None:
    """Fill ``memory`` from the folder ``path``; every check comes before the first write. ``changed_rows``: see ``TableConfig``.
    ``just_checked``: what ``check_memory`` warned of is not told again; everything is checked again, as others may have saved since.
    """
    with memory.turns:
        _load(memory, path, allow_other_base, changed_rows, just_checked)


def _load(
    memory: EngramModel, path: str | os.PathLike[str], allow_other_base: bool, changed_rows: str, just_checked: bool
) -> None:
    from engram.models.attaching import is_topmost  # which imports transformers

    if not is_topmost(memory):
        _refuse_beneath_divided(memory)
    put_apart(memory)
    description = read_description(path)
    saved = EngramConfig.from_dict(description["engram_config"])
    if saved != memory.engram_config:
        fields = saved.to_dict()
        present = memory.engram_config.to_dict()
        differing = [f"{k}: saved {fields[k]!r}, present {present[k]!r}" for k in fields if fields[k] != present[k]]
        raise ConfigError(
            f"the memory in {path} has another configuration: {'; '.join(differing)}. Use EngramModel.from_pretrained."
        )
    _check_layer_classes(description, {layer_id: type(engram) for layer_id, engram in memory.engrams.items()}, path)
    _check_fingerprint(description, memory.mapping, path)
    check_base(description, memory.below, path, allow_other_base, tell=not just_checked)
    ledger = read_ledger(path, description)
    if saved.reader == "seeded" and description.get("reader_sha256") != _reader_digest(memory):
        raise CheckpointError(
            f"{path}: the reader that follows from seed {saved.seed} is not the one this memory was taught with; the description was "
            "changed by hand, or NumPy's PCG64 generator was. Restore the folder from a backup."
        )
    saved_dtype = description.get("table_dtype", "float32")
    own = {name: tensor for name, tensor in _tensors(memory).items() if TABLE not in name}
    with open_tensors(path, description) as tensors:
        _check_tensors(memory, tensors, own, saved_dtype, path)
        with torch.no_grad():
            if saved.verify_rows:
                fill_verified_tables(memory, tensors, saved_dtype, path)
            else:
                # Its pages do not count as the process's own.
                with TensorReader(Path(path) / description["weights"]["file"]) as reader:
                    fill_tables(memory, reader, saved_dtype, changed_rows)
                promote_rows(memory, tensors)
            for name, tensor in own.items():
                write_whole(tensor, tensors.get_tensor(name))
    memory.ledger = ledger
    memory.trained_beside = list(description.get("trained_beside") or [])
    memory.adapters_sha256 = description.get("adapters_sha256")
    memory.known_versions.add(description["weights"]["file"])
    memory.folder = folder_name(path)


def _tensors(memory: EngramModel) -> dict[str, Tensor]:
    """Every tensor of the memory under ``layers.{layer_id}.{the demo's name}``; what follows from the config is left out."""
    derived = ("multi_head_embedding.offsets", *(_READER if memory.engram_config.reader == "seeded" else ()))
    return {
        f"layers.{layer_id}.{name}": tensor
        for layer_id, engram in memory.engrams.items()
        for name, tensor in engram.state_dict().items()
        if not name.startswith(derived)
    }


def _parts(memory: EngramModel, tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Tensors in parts; rows in files block by block and checked, so that a truncated one is an error and a budget of pages is kept, and
    those of other processes as they send them.
    """
    gathered = gathered_tables(memory)
    yield from as_parts({name: tensor for name, tensor in tensors.items() if not name.startswith(tuple(gathered))})
    for prefix, table in gathered.items():
        for block in table.stored_blocks():
            yield from zip((f"{prefix}weight", f"{prefix}scales"), block)


def _check_tensors(
    memory: EngramModel, tensors: Any, own: dict[str, Tensor], saved_dtype: str, path: str | os.PathLike[str]
) -> None:
    """Refuse a file whose names or shapes are not those of this memory."""
    of_tables = table_shapes(memory, saved_dtype)
    expected = {**{name: tuple(t.shape) for name, t in own.items()}, **of_tables}
    names = {name for name in tensors.keys() if not name.startswith(PLACEMENT)}  # noqa: SIM118
    if names != set(expected):
        missing, unknown = sorted(set(expected) - names), sorted(names - set(expected))
        raise CheckpointError(f"{path}: weights do not fit; missing: {missing or 'none'}, unknown: {unknown or 'none'}.")
    for name, wanted in expected.items():
        shape = tensors.get_slice(name).get_shape()
        if len(shape) != len(wanted) or any(size not in (-1, got) for size, got in zip(wanted, shape)):
            raise CheckpointError(
                f"{path}: {name} has shape {list(shape)}, expected {['any' if n == -1 else n for n in wanted]}."
            )
    form = row_format(saved_dtype)
    types = {"row_ids": torch.int64, "tags": torch.int32, "weight": form.dtype, "scales": form.scale_dtype}
    for name in of_tables:
        code, expected_type = tensors.get_slice(name).get_dtype(), types[name.rpartition(".")[2]]
        if expected_type is not None and code != type_code(expected_type):
            raise CheckpointError(
                f"{path}: {name} is of type {code}, expected {type_code(expected_type)}. Copy the file again."
            )


def _check_unmoved(memory: EngramModel) -> None:
    """Refuse to save a seeded reader that was trained by hand: what is loaded again follows from the seed."""
    for layer_id, engram in memory.engrams.items():
        for projection in (engram.value_proj, *engram.key_projs):
            size = whole(projection.weight.detach()).abs()
            if not bool((size == size.flatten()[:1]).all()):
                raise CheckpointError(
                    f"layer {layer_id}: got a trained reader with EngramConfig.reader='seeded', which is not saved; nothing was written. "
                    "Leave it frozen (EngramTrainer does), or make the memory with reader='trained'."
                )


def _reader_digest(memory: EngramModel) -> str:
    digest = hashlib.sha256()
    for engram in memory.engrams.values():
        for projection in (engram.value_proj, *engram.key_projs):
            weight: Tensor = whole(projection.weight.detach())
            digest.update(torch.signbit(weight).cpu().numpy().tobytes() + str(list(weight.shape)).encode())
    return digest.hexdigest()


def _check_layer_classes(description: dict[str, Any], present: Mapping[Any, type], path: str | os.PathLike[str]) -> None:
    """Refuse to read layers of one's own by another class, which would compute something else from them. Those that were saved as ``Engram``,
    or before names were noted, are read by whatever class is given.
    """
    noted, names = description.get("layer_classes", {}), {str(layer_id): kind.__name__ for layer_id, kind in present.items()}
    differing = {layer_id: name for layer_id, name in noted.items() if names.get(layer_id, name) != name}
    if differing:
        saved = ", ".join(f"{name} in layer {layer_id}" for layer_id, name in differing.items())
        here = ", ".join(sorted({names[layer_id] for layer_id in differing}))
        raise ConfigError(
            f"the memory in {path} was saved with layers of a class of its own ({saved}), got {here}. Give the class in Python: "
            "EngramModel.from_pretrained(..., layer_class=THE_CLASS), or {layer id: class}."
        )


def _check_fingerprint(description: dict[str, Any], mapping: NgramHashMapping, path: str | os.PathLike[str]) -> None:
    present, own = mapping.fingerprint, description.get("mapping_class")
    if description.get("fingerprint") != present:
        raise FingerprintError(
            f"the memory in {path} was made with another tokenizer or hash mapping (fingerprint {str(description.get('fingerprint'))[:12]}, "
            f"here {present[:12]}); its rows would be read at wrong addresses. "
            + (
                _belongs_to(description)
                if own in (None, type(mapping).__name__)
                else f"Its mapping is a {own}, got a {type(mapping).__name__}: give it in Python, from_pretrained(..., mapping=...)."
            )
        )


def _belongs_to(description: dict[str, Any]) -> str:
    base = description.get("base_model", {}).get("name_or_path") or "unknown"
    return f"It belongs to base model {base!r}: load that model's tokenizer."


def folder_name(path: str | os.PathLike[str]) -> str:
    """How a memory says where another lies: by its whole path, the one that ships with engram by name."""
    return BUNDLED_NAME if os.path.realpath(path) == os.path.realpath(BUNDLED_MEMORY) else os.path.abspath(path)
