"""Nested Python state (optimisers, schedulers, random generators) as safetensors + JSON: exact, and without pickle."""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, from_numpy

from engram.checkpoint.store import sync_to_disk, write_json_atomically
from engram.checkpoint.stream import TensorSpec, as_parts, can_be_written, write_tensors
from engram.errors import CheckpointError

__all__ = ["load_tree", "save_tree"]

_TAG = "__kind__"


def save_tree(path: str | os.PathLike[str], tree: Any) -> None:
    """Save dicts, lists, tuples, numbers, texts, None, tensors and arrays as ``path.json`` and ``path.safetensors``.

    Tensors are written part by part: states of optimisers may take most of the memory there is, and are not copied.

    Raises:
        CheckpointError: something else is in the tree, or the files cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    try:
        skeleton = _pack(tree, tensors)
    except (TypeError, RuntimeError) as error:  # an array of texts, a sparse tensor
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"cannot save this state without pickle: {reason}; expected plain values and dense tensors."
        ) from error
    try:
        pair = uuid.uuid4().hex  # in both files: where a save was stopped between them, they are no pair
        specs = {name: TensorSpec.of(tensor) for name, tensor in tensors.items()}
        write_tensors(Path(f"{os.fspath(path)}.safetensors"), specs, as_parts(tensors), {"pair": pair})
        sync_to_disk(f"{os.fspath(path)}.safetensors")
        write_json_atomically(Path(f"{os.fspath(path)}.json"), {"tree": skeleton, "pair": pair})
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error}; free space or choose another folder.") from error


def load_tree(path: str | os.PathLike[str]) -> Any:
    """What ``save_tree`` saved.

    Raises:
        CheckpointError: a file is missing or malformed, or the two are of different saves.
    """
    try:
        with safe_open(f"{os.fspath(path)}.safetensors", "pt") as file:
            names, pair = file.keys(), (file.metadata() or {}).get("pair")
            tensors = {name: file.get_tensor(name) for name in names}
        saved = json.loads(Path(f"{os.fspath(path)}.json").read_text(encoding="utf-8"))
        skeleton = saved["tree"]
        if saved.get("pair") != pair:
            raise ValueError("its two files are of different saves, of which one was stopped on the way")
        return _unpack(skeleton, tensors)
    except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
        raise CheckpointError(f"cannot read the saved state {path}: {error}; resume from an earlier checkpoint.") from error


def _pack(node: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(node, (Tensor, np.ndarray)):
        name = str(len(tensors))
        tensors[name] = tensor = node.detach() if isinstance(node, Tensor) else from_numpy(node.copy())
        if tensor.layout != torch.strided or not can_be_written(tensor.dtype):
            raise TypeError(f"a tensor of type {tensor.dtype} and layout {tensor.layout}")
        return {_TAG: "tensor" if isinstance(node, Tensor) else "array", "name": name}
    if isinstance(node, dict):
        return {_TAG: "dict", "items": [[_pack(k, tensors), _pack(v, tensors)] for k, v in node.items()]}
    if isinstance(node, (list, tuple)):
        items = [_pack(item, tensors) for item in node]
        return items if isinstance(node, list) else {_TAG: "tuple", "items": items}
    if node is None or isinstance(node, (bool, int, float, str)):
        return node
    if isinstance(node, np.generic):
        return node.item()
    raise CheckpointError(f"cannot save a {type(node).__name__} without pickle; expected plain values and tensors.")


def _unpack(node: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(node, list):
        return [_unpack(item, tensors) for item in node]
    if not isinstance(node, dict):
        return node
    kind = node[_TAG]
    if kind == "tensor":
        return tensors[node["name"]]
    if kind == "array":
        return tensors[node["name"]].numpy()
    if kind == "tuple":
        return tuple(_unpack(item, tensors) for item in node["items"])
    return {_unpack(k, tensors): _unpack(v, tensors) for k, v in node["items"]}
