"""Who a base model is, in a few lines of JSON."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from engram.config import EngramConfig
from engram.distributed import whole
from engram.errors import ConfigError
from engram.models.bundled_files import BUNDLED_NAME
from engram.models.positions import text_config
from engram.models.quantised import is_quantised, is_quantised_parameter

__all__ = [
    "active_adapters",
    "adapter_digests",
    "adapter_kinds",
    "adapter_parameters",
    "attached_identity",
    "base_identity",
    "base_of",
    "identity_mismatch",
    "memory_identity",
    "own_names",
]

_SAMPLE_ROWS, _SAMPLE_COLUMNS = 256, 16
_SAMPLED_WEIGHTS = 64
_COMPARED = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "embedding_sha256", "weights_sha256")
_BY_NAME = "weights_by_name_sha256"
"""As ``weights_sha256``, for models in which adapters on single parameters (peft's ``target_parameters``) move those about."""
_HOLD_THE_MODULE = {"base_layer", "original_module", "token_adapter"}


def base_identity(model: nn.Module) -> dict[str, Any]:
    """Name, sizes, a checksum of a corner of the input embeddings and one of a sample of every weight.

    Checksums are taken in bfloat16, so that the same weights loaded as float32 or bfloat16 have the same identity; those of float16 weights
    say nothing about the others, which they round otherwise. Quantised weights are left out, and what is left of a quantised model says nothing
    about one that is not. Adapters of peft on the model do not count: they come and go. Of a model that FSDP has divided all processes ask.
    """
    config: Any = model.config
    text, quantised = text_config(config), is_quantised(model)
    return {
        "name_or_path": _name(config),
        "model_type": config.model_type,
        "vocab_size": int(text.vocab_size),
        "hidden_size": int(text.hidden_size),
        "num_hidden_layers": int(text.num_hidden_layers),
        "float16": model.get_input_embeddings().weight.dtype == torch.float16,  # type: ignore[operator]
        "quantized": quantised,
        "embedding_sha256": _embedding_digest(model),
        **_weights_digests(model, quantised),
    }


def identity_mismatch(saved: dict[str, Any], present: dict[str, Any]) -> list[str]:
    """Fields in which two identities differ, as ``field: saved ... , present ...``; names and unknown checksums do not count."""
    alike = {name: bool(saved.get(name)) == bool(present.get(name)) for name in ("float16", "quantized")}
    comparable = {"embedding_sha256": alike["float16"], "weights_sha256": all(alike.values())}
    return _memory_mismatch(saved.get("memory"), present.get("memory")) + [
        f"{field}: saved with {saved.get(field)!r}, this model has {present.get(field)!r}"
        for field in _COMPARED
        if comparable.get(field, True)
        and saved.get(field) is not None
        and present.get(field) is not None
        and saved[field] != present[field]
        and not (field == "weights_sha256" and saved.get(_BY_NAME, "") == present.get(_BY_NAME))
    ]


def base_of(model: Any) -> Any:
    """The base model of a memory, or of several on top of one another; another model as it is."""
    return model.base_model if hasattr(model, "engrams") else model


def attached_identity(model: Any) -> dict[str, Any]:
    """Who a model is to which a memory is attached: a base model, or a memory on one. Takes milliseconds."""
    if not hasattr(model, "engrams"):
        return base_identity(model)
    return {**base_identity(model.base_model), "memory": memory_identity(model)}


def memory_identity(memory: Any) -> dict[str, Any]:
    """Who a memory is, for one that is attached on top of it: configuration, addresses, checksums of the reader and of a sample of the rows.

    Checksums are taken in bfloat16, and rows of another format say nothing about them.
    """
    reader, rows = hashlib.sha256(), hashlib.sha256()
    for engram in memory.engrams.values():
        table = engram.table
        for parameter in engram.reader_parameters():
            reader.update(_bits(whole(parameter.detach())))
        if memory.engram_config.verify_rows:
            for part in (table.row_ids, table.tags):
                rows.update(part.cpu().numpy().tobytes())
        else:
            places = torch.arange(0, table.rows, max(1, table.rows // _SAMPLE_ROWS))[:_SAMPLE_ROWS]
            rows.update(_bits(table.read(places.to(engram.multi_head_embedding.offsets.device), torch.float32)))
    return {
        "folder": memory.folder,
        "engram_config": memory.engram_config.to_dict(),
        "fingerprint": memory.mapping.fingerprint,
        "table_dtype": memory.table_config.dtype,
        "reader_sha256": reader.hexdigest(),
        "rows_sha256": rows.hexdigest(),
        **({} if memory.beneath is None else {"memory": memory_identity(memory.beneath)}),
    }


def _memory_mismatch(saved: dict[str, Any] | None, present: dict[str, Any] | None) -> list[str]:
    """In what the memories beneath differ; where a memory lies does not count."""
    if saved is None or present is None:
        told = [f"one ({(x.get('folder') or 'not saved')!r})" if x else "none" for x in (saved, present)]
        return [] if saved is present else [f"memory beneath: saved with {told[0]}, this model has {told[1]}"]
    fields = ["engram_config", "fingerprint", "reader_sha256"]
    fields += ["rows_sha256"] if saved.get("table_dtype") == present["table_dtype"] else []
    then, now = ({**memory, "engram_config": _as_read(memory.get("engram_config"))} for memory in (saved, present))
    differing = [field for field in fields if then.get(field) != now[field]]
    found = [f"memory beneath: it differs in {', '.join(differing)}"] if differing else []
    return found + _memory_mismatch(saved.get("memory"), present.get("memory"))


def _as_read(fields: Any) -> Any:
    """A configuration as it is read, in which fields that an older version did not know have their defaults; what is none, as it is."""
    try:
        return EngramConfig.from_dict(fields)
    except (ConfigError, TypeError, AttributeError):
        return fields


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that peft has put into a model, by name; those of the model itself are left out."""
    own = {id(parameter) for parameter in _own_parameters(model).values()}
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) not in own}


def adapter_kinds(model: Any) -> list[str]:
    """What kinds of adapters of peft are on a model (``LORA``), sorted; empty if there are none."""
    if not adapter_parameters(model):
        return []
    kinds = {getattr(config.peft_type, "value", config.peft_type) for config in getattr(model, "peft_config", {}).values()}
    return sorted(map(str, kinds)) or ["adapters"]


def active_adapters(model: nn.Module) -> list[str]:
    """Names of the adapters of peft that are at work in a model."""
    found: dict[str, None] = {}
    for module in model.modules():
        if hasattr(module, "adapter_layer_names") and not getattr(module, "disable_adapters", False):
            names: Any = module.active_adapters
            found |= dict.fromkeys(names)
    return list(found)


def adapter_digests(model: nn.Module) -> list[str]:
    """Who the adapters at work in a model are: for each a checksum of a sample of its parameters and of how strongly it counts. Sorted, so that
    neither their names nor their order matter. Taken in bfloat16, as those of weights are. All processes ask of a model that FSDP has divided.
    """
    parameters = adapter_parameters(model)
    return sorted(_adapter_digest(model, name, parameters) for name in active_adapters(model))


def _adapter_digest(model: nn.Module, adapter: str, parameters: Mapping[str, nn.Parameter]) -> str:
    found = hashlib.sha256()
    for name in sorted(name for name in parameters if adapter in name.split(".")):
        found.update(b"-" if parameters[name].is_meta else _sample(parameters[name]))
    for _, module in sorted(model.named_modules()):
        scaling = getattr(module, "scaling", None)
        if hasattr(module, "adapter_layer_names") and isinstance(scaling, dict) and adapter in scaling:
            found.update(f"{float(scaling[adapter]):.6g} ".encode())
    return found.hexdigest()


def _name(config: Any) -> str:
    """What a model was loaded by. A folder has its whole path: from another directory a relative one would be another, or a hub's name."""
    name = getattr(config, "name_or_path", "") or getattr(config, "_name_or_path", "")
    if not name or name == BUNDLED_NAME or not os.path.isfile(os.path.join(name, "config.json")):
        return name
    return os.path.abspath(name)


def _embedding_digest(model: nn.Module) -> str | None:
    weight: torch.Tensor = model.get_input_embeddings().weight  # type: ignore[operator]
    if weight.is_meta or is_quantised_parameter(weight):
        return None
    return hashlib.sha256(_bits(whole(weight.detach())[:_SAMPLE_ROWS, :_SAMPLE_COLUMNS])).hexdigest()


def _weights_digests(model: nn.Module, quantised: bool) -> dict[str, str | None]:
    """Of some evenly spaced values of every parameter, in the order of the model and in that of their names; None where a parameter is not in
    memory. Those of a quantised model that are quantised are left out: bitsandbytes lays them out anew when the model first runs.
    """
    samples: dict[str, bytes] = {}
    for name, parameter in _own_parameters(model).items():
        if quantised and is_quantised_parameter(parameter):
            continue
        if parameter.is_meta:
            return {"weights_sha256": None, _BY_NAME: None}
        samples[name] = _sample(parameter)
    orders = {"weights_sha256": samples, _BY_NAME: sorted(samples)}
    return {field: hashlib.sha256(b"".join(samples[name] for name in names)).hexdigest() for field, names in orders.items()}


def _own_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters without those of adapters, each once, by the names that they have without adapters."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    found, seen = {}, set[int]()
    for name, own in own_names(model, parameters).items():
        if id(parameters[name]) not in seen:
            seen.add(id(parameters[name]))
            found[own] = parameters[name]
    return found


def own_names(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """What tensors of a model are called without the adapters of peft that are on it, by their names now; those of adapters are left out.

    What peft puts in the place of a module holds the module itself under one of a few names.
    """
    adapted = {name for name, module in model.named_modules(remove_duplicate=False) if hasattr(module, "adapter_layer_names")}
    found = {}
    for name in names:
        parts = name.split(".")
        within = {i for i in range(1, len(parts)) if ".".join(parts[:i]) in adapted}
        if {parts[i] for i in within} <= _HOLD_THE_MODULE:
            found[name] = ".".join(part for i, part in enumerate(parts) if i not in within)
    return found


def _sample(parameter: nn.Parameter) -> bytes:
    flat = whole(parameter.detach()).reshape(-1)
    return _bits(flat[:: max(1, flat.numel() // _SAMPLED_WEIGHTS)][:_SAMPLED_WEIGHTS])


def _bits(values: torch.Tensor) -> bytes:
    # A copy: NumPy would hold on to the memory, and FSDP takes that of weights away and gives it back.
    return values.to("cpu", torch.bfloat16, copy=True).contiguous().view(torch.int16).numpy().tobytes()
