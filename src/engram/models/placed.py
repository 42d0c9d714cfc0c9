"""Embeddings of a model that has its own n-gram tables, kept where a ``TableConfig`` says: in host memory, in a file, in fewer bits.

Models with hashed n-gram tables of their own have come out (Qwen4-Exp in transformers, whose per-layer embeddings follow the paper). Their
tables are plain ``nn.Embedding``, which have to lie on a device or in memory as a whole. Here they are exchanged for the tables of a memory;
all else of the model, its hash above all, stays as it is.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from huggingface_hub import HfApi
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from engram.checkpoint import TensorReader
from engram.checkpoint.unsaved import bits_equal
from engram.config import TableConfig
from engram.errors import CheckpointError, ConfigError, TableError, reason_of
from engram.models.bundled import auto_class
from engram.models.bundled_files import is_path
from engram.models.devices import first_real, input_device, offloaded_to
from engram.models.positions import text_config
from engram.tables import (
    EmbeddingTable,
    MappedRows,
    build_table,
    check_room,
    is_being_filled,
    row_format,
    row_stamp,
    rows_are,
    stamp_rows,
)

__all__ = ["NGRAM_EMBEDDINGS", "PlacedEmbedding", "load_placed", "place_embeddings"]

NGRAM_EMBEDDINGS = {
    "qwen4_exp": "layers.*.ple.ple_embedding.ngram_embedding",
    "qwen4_exp_text": "layers.*.ple.ple_embedding.ngram_embedding",
}
"""``config.model_type`` -> how the names of a model's n-gram embeddings end (a pattern, ``*`` stands for anything)."""

_ROWS_AT_ONCE = 1 << 16
_SAMPLED_ROWS = 256
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_PART = re.compile(r"shard_(\d+)\.weight")


class PlacedEmbedding(nn.Module):
    """Stands in the place of an ``nn.Embedding`` ``[rows, dim]``; its rows are a table's, and are not trained.

    Attributes:
        table: where the rows are; no submodule: they are no weights of the model, and ``state_dict`` leaves them out.
        weight: empty, on the meta device; of the shape and type that rows come in.
    """

    table: EmbeddingTable
    weight: Tensor

    def __init__(self, table: EmbeddingTable, dtype: torch.dtype) -> None:
        super().__init__()
        table.requires_grad_(False)
        self.__dict__["table"] = table
        self.weight = torch.empty((table.rows, table.dim), dtype=dtype, device="meta")

    def forward(self, input_ids: Tensor) -> Tensor:
        """Rows ``[..., dim]`` of row numbers ``[...]``, on their device."""
        return self.table.lookup(input_ids.long(), self.weight.dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> PlacedEmbedding:
        """A change of the model's type is one of the type that rows come in; rows of tier ``device`` move with the model."""
        self.weight = self.weight.to(fn(torch.empty(0, dtype=self.weight.dtype)).dtype)
        self.table._apply(_moving_only(fn), recurse)
        return self

    def extra_repr(self) -> str:
        """Shown by ``print(module)``."""
        return self.table.extra_repr()


def _refuse_saving(*_: Any, **__: Any) -> NoReturn:
    """What ``save_pretrained`` of a model is whose embeddings were placed."""
    raise TableError(
        "save_pretrained: got a model whose embeddings were placed (place_embeddings, load_placed), which would be written without them; "
        "expected one that has them. It lies where it was loaded from; adapters (peft) on it are saved as always, other weights by "
        "state_dict()."
    )


def _moving_only(fn: Any) -> Any:
    """What ``fn`` does to a tensor's place; its type stays."""
    return lambda tensor: tensor.to(fn(torch.empty(0, device=tensor.device)).device)


def place_embeddings(
    model: PreTrainedModel, table_config: TableConfig | None = None, names: str | None = None
) -> dict[str, PlacedEmbedding]:
    """Move the n-gram embeddings of a model that is in memory. Answers stay what they were, to the last bit where the format holds the rows.

    Args:
        model: it is changed; the embeddings' own memory is free once nobody else holds them.
        table_config: where rows shall be. With a ``path``, files in that folder, one for each embedding by its place among them.
        names: a pattern of the embeddings' names or of their ends, instead of ``NGRAM_EMBEDDINGS``.

    Returns:
        What stands in the place of each, by name.

    Raises:
        ConfigError: no embedding is called so, or the tables cannot be placed so.
        TableError: there is no room, or files there hold other rows; the model is as it was.
    """
    config = _checked(table_config)
    found = _embeddings(model, names)
    for name, embedding in found.items():
        if embedding.weight.is_meta:
            raise ConfigError(
                f"{name}: got weights on the meta device, expected them in memory; load_placed fills tables from files."
            )
    weights = {name: embedding.weight.detach() for name, embedding in found.items()}
    sources = (
        {name: _digest(weight) for name, weight in weights.items()} if config.path is not None else dict.fromkeys(weights, "")
    )
    tables = _tables(weights, config, sources, {name: weight.device for name, weight in weights.items()})
    for name, weight in weights.items():
        _fill(tables[name], name, sources[name], partial(_blocks_of, weight), config.changed_rows)
    return {name: _put(model, name, tables[name], weights[name].dtype) for name in found}


def load_placed(
    name: str | os.PathLike[str], table_config: TableConfig, names: str | None = None, **options: Any
) -> PreTrainedModel:
    """Load a model whose n-gram embeddings never are in memory as a whole: their rows go from the saved files into tables, block by block.

    Args:
        name: a folder, or a hub name.
        table_config: where rows shall be (see ``place_embeddings``). Files that hold the rows of these very weights already are read as they
            are.
        names: as for ``place_embeddings``.
        options: for ``from_pretrained`` (``dtype``, ``device_map``, ...).

    Raises:
        CheckpointError: the model, or an embedding in its files, is not there.
        ConfigError, TableError: as for ``place_embeddings``.
    """
    placement = _checked(table_config)
    if options.get("output_loading_info"):
        raise ConfigError("output_loading_info: got True, expected to be left out: what was not loaded here is in the tables.")
    folder = _folder_of(os.fspath(name))
    config = _config_of(folder)
    pattern, files = _pattern_of(config, names), _files_of(folder)
    kind, waiting = auto_class(config)._model_mapping[type(config)], dict[str, Tensor]()
    model = _without_embeddings(kind, pattern, waiting).from_pretrained(folder, **options)
    model.__class__ = kind
    dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    # All are found before the first is read.
    parts = {place: _parts_of(place, weight, files) for place, weight in waiting.items()}
    sources = {place: _source_of(saved) for place, saved in parts.items()}
    tables = _tables(waiting, placement, sources, {place: _device_beside(model, place) for place in waiting})
    for place, saved in parts.items():
        _fill(tables[place], place, sources[place], partial(_blocks, saved), placement.changed_rows)
        _put(model, place, tables[place], dtype)
    return model


def _checked(table_config: TableConfig | None) -> TableConfig:
    """Refuse what is no placement, and those that are none for rows that nobody trains.

    Raises:
        ConfigError: so it is.
    """
    config = TableConfig() if table_config is None else table_config
    if not isinstance(config, TableConfig):
        raise ConfigError(f"table_config: got {type(config).__name__}, expected a TableConfig.")
    if config.sharded:
        raise ConfigError("TableConfig.sharded: got True, expected tables that each process has whole.")
    if config.tier == "hybrid":
        raise ConfigError(
            "TableConfig.tier: got 'hybrid', expected 'device', 'host' or 'mmap': nobody counts which rows are hot here."
        )
    if config.tier == "mmap" and config.path is None:
        raise ConfigError("TableConfig: got tier 'mmap' without a path, expected a folder for the files of the rows.")
    return config


def _config_of(folder: Path) -> Any:
    try:
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"cannot load model {str(folder)!r}: {reason_of(error)}. Expected a folder with config.json and safetensors."
        ) from error


def _digest(weight: Tensor) -> str:
    """Of all rows."""
    digest = hashlib.sha256()
    for block in _blocks_of(weight):
        digest.update(block.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _source_of(places: list[tuple[str, Path]]) -> str:
    """A name of these tensors in these files as they are now: of what the files say of themselves, which may be made alike where builds are
    reproducible, and of a sample of the rows.
    """
    told = ", ".join(f"{key} {file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for key, file in places)
    digest = hashlib.sha256(told.encode())
    for key, file in places:
        with TensorReader(file) as reader:
            rows = reader.specs[key].shape[0]
            for row in range(0, rows, max(1, rows // _SAMPLED_ROWS)):
                digest.update(reader.read(key, row, row + 1).contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _pattern_of(config: Any, names: str | None) -> str:
    """How the names of the embeddings end: as was said, or as is known.

    Raises:
        ConfigError: it is no pattern, or nothing is known.
    """
    if names is not None:
        if not isinstance(names, str) or not names:
            raise ConfigError(f"names: got {names!r}, expected a pattern of the embeddings' names, or to be left out.")
        return names
    kinds = [c.model_type for c in (config, text_config(config))]
    known = next((NGRAM_EMBEDDINGS[kind] for kind in kinds if kind in NGRAM_EMBEDDINGS), None)
    if known is None:
        raise ConfigError(
            f"names: got none for a model of type {config.model_type!r}, of which nobody knows n-gram embeddings; expected a pattern of their "
            f"names (known: {', '.join(NGRAM_EMBEDDINGS)})."
        )
    return known


def _embeddings(model: Any, names: str | None) -> dict[str, nn.Embedding]:
    """Embeddings by name whose names end as the pattern says.

    Raises:
        ConfigError: there is none, or one that is more than rows by number.
    """
    pattern = _pattern_of(model.config, names)
    every = {name: module for name, module in model.named_modules() if isinstance(module, nn.Embedding | PlacedEmbedding)}
    found = {name: module for name, module in every.items() if fnmatch.fnmatchcase(name, f"*{pattern}")}
    if not found:
        raise ConfigError(
            f"names: got {pattern!r}, which fits no embedding; expected one of {', '.join(every) or 'none there is'}."
        )
    spoken = {id(part) for part in (model.get_input_embeddings(), model.get_output_embeddings())}
    for name, module in found.items():
        if isinstance(module, PlacedEmbedding):
            raise ConfigError(f"{name}: got an embedding that is placed already; load the model again to place it otherwise.")
        if id(module) in spoken:
            raise ConfigError(f"{name}: got the embeddings of the model's tokens, which its head may share; expected others.")
        if type(module) is not nn.Embedding or module.max_norm is not None:
            kind = type(module).__name__
            raise ConfigError(
                f"{name}: got {kind}, which does more than to give rows by number; expected a plain nn.Embedding."
            )
    return found  # type: ignore[return-value]


def _without_embeddings(kind: Any, pattern: str, waiting: dict[str, Tensor]) -> Any:
    """A model's class that makes it with nothing where the embeddings would be, and notes their shapes."""

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        kind.__init__(self, *args, **kwargs)
        for name, embedding in _embeddings(self, pattern).items():
            waiting[name] = torch.empty(embedding.weight.shape, device="meta")
            _exchange(self, name, nn.Module())

    ignored = [*(getattr(kind, "_keys_to_ignore_on_load_unexpected", None) or []), fnmatch.translate(f"*{pattern}.*")]
    return type(kind.__name__, (kind,), {"__init__": __init__, "_keys_to_ignore_on_load_unexpected": ignored})


def _exchange(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def _put(model: nn.Module, name: str, table: EmbeddingTable, dtype: torch.dtype) -> PlacedEmbedding:
    placed = PlacedEmbedding(table, dtype)
    _exchange(model, name, placed)
    model.__dict__["save_pretrained"] = _refuse_saving
    return placed


def _device_beside(model: PreTrainedModel, name: str) -> torch.device:
    """Where the module that an embedding belongs to computes, or the next around it that has weights."""
    while name:
        name, _, _ = name.rpartition(".")
        parent = model.get_submodule(name)
        device = first_real([*offloaded_to(parent), *(parameter.device for parameter in parent.parameters())])
        if device is not None:
            return device
    return input_device(model)


def _tables(
    weights: dict[str, Tensor], config: TableConfig, sources: dict[str, str], devices: dict[str, torch.device]
) -> dict[str, EmbeddingTable]:
    """Tables for all weights ``[rows, dim]``, refused together if they do not fit. Files that are known to hold the rows already are read by
    any number of processes.
    """
    for dim, device in {(weight.shape[1], devices[name]) for name, weight in weights.items()}:
        together = [len(w) for name, w in weights.items() if (w.shape[1], devices[name]) == (dim, device)]
        check_room(together, dim, config, device=device)
    stamps = {number: row_stamp(sources[name], name, config.dtype) for number, name in enumerate(weights)}
    config = replace(config, stamps=stamps) if config.path is not None else config
    return {
        name: build_table(weight.shape[0], weight.shape[1], config, device=devices[name], layer_id=number)
        for number, (name, weight) in enumerate(weights.items())
    }


def _fill(table: EmbeddingTable, name: str, source: str, blocks: Callable[[], Iterator[Tensor]], changed_rows: str) -> None:
    """Put blocks ``[n, dim]`` into a table one after another, unless its file holds them already.

    Raises:
        TableError: it holds others.
    """
    stamp = row_stamp(source, name, table.format_name)
    if isinstance(table, MappedRows):
        table.flush()
        begin = table.is_new or is_being_filled(table.path)  # what was stopped on the way is begun again
        if rows_are(table.path, stamp) or (changed_rows == "keep" and not begin):
            return
        if not begin and changed_rows != "refill":
            if not _holds(table, blocks()):
                raise TableError(
                    f"{table.path} holds other rows than those of {name}: of another model, or changed since. Delete it if nobody needs "
                    "it, choose another path, or have it written anew by TableConfig(changed_rows='refill')."
                )
            stamp_rows(table.path, stamp)
            return
    start = 0
    with table.filled_with(stamp) if isinstance(table, MappedRows) else nullcontext():
        for block in blocks():
            table.load_rows(start, block)
            start += len(block)


def _holds(table: MappedRows, blocks: Iterator[Tensor]) -> bool:
    """Whether a file has all these rows, as its format stores them: a copy, whose times are others, or the same weights in other files."""
    form, start = row_format(table.format_name), 0
    for block in blocks:
        numbers = torch.arange(start, start + len(block))
        wanted = form.encode(block.float()) if form.quantised else (block.to(form.dtype), None)
        for stored, value in zip(table.read_stored(numbers), wanted):
            if value is not None and (stored is None or not bits_equal(stored, value.to(stored.dtype))):
                return False
        start += len(block)
    return True


def _folder_of(name: str) -> Path:
    """A model's folder; of a hub name what was fetched."""
    if os.path.isdir(name):
        return Path(name)
    if is_path(name):
        raise CheckpointError(
            f"cannot load model {name!r}: there is no such folder. Expected one with config.json and safetensors."
        )
    try:
        return Path(HfApi().snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:  # of a network the client passes on many kinds
        raise CheckpointError(
            f"cannot load model {name!r}: there is no such folder, and from the hub: {reason_of(error)}. Expected a folder with config.json "
            "and safetensors, or a hub name."
        ) from error


def _files_of(folder: Path) -> dict[str, Path]:
    """Files of a saved model by the names of their tensors."""
    if not (folder / _INDEX).is_file() and not (folder / _SINGLE).is_file():
        raise CheckpointError(
            f"{folder}: got no {_SINGLE} and no {_INDEX}, expected a model that save_pretrained wrote as safetensors."
        )
    try:
        if (folder / _INDEX).is_file():
            names = json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"]
            return {key: folder / file for key, file in names.items() if Path(file).name == file}
        with TensorReader(folder / _SINGLE) as tensors:
            return dict.fromkeys(tensors.specs, folder / _SINGLE)
    except (OSError, ValueError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{folder}: its safetensors cannot be read ({error}); expected a model that save_pretrained wrote."
        ) from None


def _parts_of(name: str, weight: Tensor, files: dict[str, Path]) -> list[tuple[str, Path]]:
    """Keys and files of an embedding's rows in their order: one tensor, or parts by number. Files may name it with another beginning."""
    words = name.split(".")
    # The number of a block must be in it: another block's rows would do as well.
    last = next((place for place, word in enumerate(words) if word.isdigit()), len(words) - 1)
    for first in range(last):
        end = ".".join(words[first:]) + "."
        keys = {key: key.partition(end) for key in files if key.startswith(end) or f".{end}" in key}
        if keys:
            break
    else:
        raise CheckpointError(f"{name}: no tensor of the saved model is called so; expected one, or its parts.")
    if len({before for before, _, _ in keys.values()}) > 1:
        raise CheckpointError(
            f"{name}: several tensors of the saved model end so ({', '.join(sorted(keys)[:3])}); expected one."
        )
    ordered = sorted(keys, key=lambda key: int(found[1]) if (found := _PART.fullmatch(keys[key][2])) else -1)
    rows, unknown = 0, [key for key in ordered if keys[key][2] != "weight" and not _PART.fullmatch(keys[key][2])]
    for key in ordered:
        with TensorReader(files[key]) as tensors:
            spec = tensors.specs.get(key)
        if spec is None or not spec.dtype.is_floating_point or spec.shape[1:] != weight.shape[1:]:
            unknown.append(key)
        else:
            rows += spec.shape[0]
    if unknown or rows != len(weight):
        raise CheckpointError(
            f"{name}: got {rows} rows{' and ' + ', '.join(unknown) if unknown else ''} in the saved model, expected floating point tensors of "
            f"{len(weight)} rows of {weight.shape[1]} in all."
        )
    return [(key, files[key]) for key in ordered]


def _blocks_of(weight: Tensor) -> Iterator[Tensor]:
    yield from weight.split(_ROWS_AT_ONCE)


def _blocks(places: list[tuple[str, Path]]) -> Iterator[Tensor]:
    for key, file in places:
        with TensorReader(file) as tensors:
            for start in range(0, tensors.specs[key].shape[0], _ROWS_AT_ONCE):
                yield tensors.read(key, start, start + _ROWS_AT_ONCE)
