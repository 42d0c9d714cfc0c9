"""Saving and loading a whole memory."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from engram._version import __version__
from engram.checkpoint import open_tensors, read_description, write_store
from engram.config import EngramConfig
from engram.errors import CheckpointError, ConfigError, FingerprintError
from engram.hashing import CompressedTokenizer, NgramHashMapping
from engram.models.identity import base_identity, identity_mismatch

if TYPE_CHECKING:
    from engram.models.engram_model import EngramModel

__all__ = ["check_memory", "load_memory", "save_memory"]


def save_memory(memory: EngramModel, path: str | os.PathLike[str]) -> None:
    """Write ``engram.json`` (what it is) and one safetensors file (its tensors) as one atomic pair."""
    description = {
        "library_version": __version__,
        "engram_config": memory.engram_config.to_dict(),
        "hash_spec": memory.mapping.spec.to_dict(),
        "fingerprint": memory.mapping.fingerprint,
        "base_model": base_identity(memory.base_model),
    }
    write_store(path, _tensors(memory), description)


def check_memory(
    model: PreTrainedModel, path: str | os.PathLike[str], tokenizer: Any, allow_other_base: bool
) -> NgramHashMapping:
    """Check a saved memory's description against a model and tokenizer, touching neither; returns its addresses.

    Raises:
        CheckpointError, ConfigError, FingerprintError: as ``EngramModel.from_pretrained``.
    """
    description = read_description(path)
    config = _config_of(description, path)
    compressed = CompressedTokenizer(tokenizer)
    if config.pad_id >= len(compressed.lookup_table):
        _check_fingerprint(description, "a smaller vocabulary", path)
    mapping = NgramHashMapping(config, compressed)
    _check_fingerprint(description, mapping.fingerprint, path)
    _check_base(description, model, path, allow_other_base)
    return mapping


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
    own = _tensors(memory)
    with open_tensors(path, description) as tensors:
        names = set(tensors.keys())
        if names != set(own):
            missing, unknown = sorted(set(own) - names), sorted(names - set(own))
            raise CheckpointError(f"{path}: weights do not fit; missing: {missing or 'none'}, unknown: {unknown or 'none'}.")
        for name, tensor in own.items():
            shape = list(tensors.get_slice(name).get_shape())
            if shape != list(tensor.shape):
                raise CheckpointError(f"{path}: {name} has shape {shape}, expected {list(tensor.shape)}.")
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(tensors.get_tensor(name))


def _tensors(memory: EngramModel) -> dict[str, Tensor]:
    """Every tensor of the memory under ``layers.{layer_id}.{the demo's name}``; head offsets follow from the config."""
    return {
        f"layers.{layer_id}.{name}": tensor
        for layer_id, engram in memory.engrams.items()
        for name, tensor in engram.state_dict().items()
        if not name.endswith("multi_head_embedding.offsets")
    }


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
