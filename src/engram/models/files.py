"""Saving and loading a whole memory."""

from __future__ import annotations

import hashlib
import os
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from engram._version import __version__
from engram.checkpoint import open_tensors, read_description, read_ledger, write_store
from engram.config import EngramConfig, TableConfig
from engram.errors import CheckpointError, ConfigError, FingerprintError
from engram.hashing import NgramHashMapping, build_mapping
from engram.models.identity import base_identity, identity_mismatch
from engram.tables import VerifiedTable

if TYPE_CHECKING:
    from engram.models.engram_model import EngramModel

__all__ = ["check_memory", "load_memory", "save_memory"]

_READER = ("value_proj.", "key_projs.", "norm1.", "norm2.")


def save_memory(memory: EngramModel, path: str | os.PathLike[str]) -> None:
    """Write ``engram.json`` (what it is), one safetensors file (its tensors) and its ledger if it has one, all or nothing."""
    description = {
        "library_version": __version__,
        "engram_config": memory.engram_config.to_dict(),
        "hash_spec": memory.mapping.spec.to_dict(),
        "fingerprint": memory.mapping.fingerprint,
        "vocab_size": len(memory.mapping.compressed_tokenizer.lookup_table),
        "table_dtype": memory.table_config.dtype,
        "base_model": base_identity(memory.base_model),
    }
    if memory.engram_config.reader == "seeded":
        description["reader_sha256"] = _reader_digest(memory)
    write_store(path, _tensors(memory), description, memory.ledger)


def check_memory(
    model: PreTrainedModel, path: str | os.PathLike[str], tokenizer: Any, allow_other_base: bool
) -> tuple[NgramHashMapping, TableConfig]:
    """Check a saved memory's description against a model and tokenizer, touching neither; returns its addresses and its placement.

    Raises:
        CheckpointError, ConfigError, FingerprintError: as ``EngramModel.from_pretrained``.
    """
    description = read_description(path)
    config = _config_of(description, path)
    if hasattr(tokenizer, "__len__") and config.pad_id >= len(tokenizer):
        _check_fingerprint(description, "a smaller vocabulary", path)
    mapping = build_mapping(config, tokenizer)
    _check_fingerprint(description, mapping.fingerprint, path)
    _check_base(description, model, path, allow_other_base)
    return mapping, TableConfig(dtype=description.get("table_dtype", "float32"))


def load_memory(memory: EngramModel, path: str | os.PathLike[str], allow_other_base: bool = False) -> None:
    """Fill ``memory`` from the folder ``path``; every check comes before the first write."""
    description = read_description(path)
    saved = _config_of(description, path)
    if saved != memory.engram_config:
        fields = saved.to_dict()
        present = memory.engram_config.to_dict()
        differing = [f"{k}: saved {fields[k]!r}, present {present[k]!r}" for k in fields if fields[k] != present[k]]
        raise ConfigError(
            f"the memory in {path} has another configuration: {'; '.join(differing)}. Use EngramModel.from_pretrained."
        )
    _check_fingerprint(description, memory.mapping.fingerprint, path)
    _check_base(description, memory.base_model, path, allow_other_base)
    ledger = read_ledger(path, description)
    if saved.reader == "seeded" and description.get("reader_sha256") != _reader_digest(memory):
        raise CheckpointError(
            f"{path}: the reader that follows from seed {saved.seed} is not the one this memory was taught with; the description was "
            "changed by hand, or NumPy's PCG64 generator was. Restore the folder from a backup."
        )
    own = _tensors(memory)
    with open_tensors(path, description) as tensors:
        names = set(tensors.keys())
        if names != set(own):
            missing, unknown = sorted(set(own) - names), sorted(names - set(own))
            raise CheckpointError(f"{path}: weights do not fit; missing: {missing or 'none'}, unknown: {unknown or 'none'}.")
        for name, tensor in own.items():
            shape = list(tensors.get_slice(name).get_shape())
            if shape[_fixed(saved, name) :] != list(tensor.shape)[_fixed(saved, name) :]:
                raise CheckpointError(f"{path}: {name} has shape {shape}, expected {list(tensor.shape)}.")
        with torch.no_grad():
            if saved.verify_rows:
                _fill_verified_tables(memory, {name: tensors.get_tensor(name) for name in own if ".embedding." in name}, path)
            for name, tensor in own.items():
                if not (saved.verify_rows and ".embedding." in name):
                    tensor.copy_(tensors.get_tensor(name))
    memory.ledger = ledger


def _tensors(memory: EngramModel) -> dict[str, Tensor]:
    """Every tensor of the memory under ``layers.{layer_id}.{the demo's name}``; what follows from the config is left out."""
    derived = ("multi_head_embedding.offsets", *(_READER if memory.engram_config.reader == "seeded" else ()))
    return {
        f"layers.{layer_id}.{name}": tensor
        for layer_id, engram in memory.engrams.items()
        for name, tensor in engram.state_dict().items()
        if not name.startswith(derived)
    }


def _fixed(config: EngramConfig, name: str) -> int:
    """First dimension of a tensor that its configuration fixes: verified tables hold any number of rows."""
    return 1 if config.verify_rows and ".embedding." in name else 0


def _fill_verified_tables(memory: EngramModel, tensors: dict[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Exchange the rows of every layer; all are checked before the first is changed."""
    new = []
    for layer_id, engram in memory.engrams.items():
        table: VerifiedTable = engram.multi_head_embedding.embedding
        row_ids, tags, weight = (
            tensors[f"layers.{layer_id}.multi_head_embedding.embedding.{n}"] for n in ("row_ids", "tags", "weight")
        )
        count = row_ids.shape[0]
        in_range = count == 0 or (
            int(row_ids[0]) >= 0 and int(row_ids[-1]) < table.rows and bool((row_ids[1:] > row_ids[:-1]).all())
        )
        if not in_range or tags.shape[0] != count or weight.shape[0] != count or (count and int(tags.min()) < 1):
            raise CheckpointError(
                f"{path}: the rows of layer {layer_id} are out of order or out of range. Copy the file again."
            )
        new.append((table, row_ids, tags, weight))
    for table, row_ids, tags, weight in new:
        table.delete(table.row_ids)
        table.insert(row_ids, tags, weight)


def _reader_digest(memory: EngramModel) -> str:
    digest = hashlib.sha256()
    for engram in memory.engrams.values():
        for projection in (engram.value_proj, *engram.key_projs):
            weight: Tensor = projection.weight.detach()
            digest.update(torch.signbit(weight).cpu().numpy().tobytes() + str(list(weight.shape)).encode())
    return digest.hexdigest()


def _config_of(description: dict[str, Any], path: str | os.PathLike[str]) -> EngramConfig:
    fields = description.get("engram_config")
    if not isinstance(fields, dict):
        raise CheckpointError(f"{path}: the description has no 'engram_config'; save the memory again.")
    return EngramConfig.from_dict(fields)


def _check_fingerprint(description: dict[str, Any], present: str, path: str | os.PathLike[str]) -> None:
    if description.get("fingerprint") != present:
        raise FingerprintError(
            f"the memory in {path} was made with another tokenizer or hash mapping (fingerprint {str(description.get('fingerprint'))[:12]}, "
            f"here {present[:12]}); its rows would be read at wrong addresses. It belongs to base model "
            f"{description.get('base_model', {}).get('name_or_path') or 'unknown'!r}: load that model's tokenizer."
        )


def _check_base(
    description: dict[str, Any], model: PreTrainedModel, path: str | os.PathLike[str], allow_other_base: bool
) -> None:
    saved = description.get("base_model") or {}
    differences = identity_mismatch(saved, base_identity(model))
    sizes_differ = any(not d.startswith("embedding_sha256") for d in differences)
    if differences and (sizes_differ or not allow_other_base):
        raise FingerprintError(
            f"the memory in {path} belongs to base model {saved.get('name_or_path') or 'unknown'!r}, "
            f"not to {getattr(model.config, 'name_or_path', '') or type(model).__name__!r}: {'; '.join(differences)}."
            + ("" if sizes_differ else " Pass allow_other_base=True if the weights differ on purpose (a fine-tuned base).")
        )
