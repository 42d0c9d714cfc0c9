"""What is looked at before a memory is attached to a model, and what is done to the model's parameters."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel

from engram.config import EngramConfig, TableConfig
from engram.distributed import is_fully_sharded
from engram.errors import AttachError, ConfigError
from engram.hashing import NgramHashMapping, count_ids
from engram.models.architectures import Decoder, find_decoder
from engram.models.devices import first_real, offloaded_to
from engram.tables import check_room

if TYPE_CHECKING:
    from engram.models.engram_model import EngramModel

__all__ = [
    "ATTACHED",
    "check_fit",
    "check_free",
    "check_tables_fit",
    "check_topmost",
    "device_of",
    "freeze",
    "is_topmost",
    "refuse_fused_head",
    "tell_of_padding",
    "trainable_flags",
]

_LEAST_USED = 0.5
ATTACHED = "_engram_memory"
"""Under this name a decoder keeps the token of the memory that was attached last."""


def check_free(decoder: Decoder, beneath: EngramModel | None) -> None:
    """Refuse a second memory that does not say what it comes on top of, and one on top of a memory that was unloaded or divided.

    Raises:
        AttachError: it is refused.
    """
    if beneath is not None:
        beneath.check_attached()
        if is_fully_sharded(beneath):
            raise AttachError(
                "got a memory that FSDP has divided, expected a whole one: attach all memories before shard_model."
            )
    attached = decoder.module.__dict__.get(ATTACHED)
    if attached is None or (beneath is not None and attached == beneath.owner_token):
        return
    raise AttachError(
        "this model has a memory already; call unload() on that one first. Or give the memory in place of the model, to have one on top of "
        "the other: get_engram_model(memory, ...), MemoryEditor.create(memory, ...), EngramModel.from_pretrained(memory, ...)."
    )


def check_topmost(memory: EngramModel) -> None:
    """Refuse a memory that is not the one that was attached last.

    Raises:
        AttachError: it is refused.
    """
    memory.check_attached()
    if not is_topmost(memory):
        raise AttachError("another memory was attached on top of this one; call unload() on that one first.")


def is_topmost(memory: EngramModel) -> bool:
    """Whether no other memory was attached on top of this one."""
    return find_decoder(memory.base_model).module.__dict__.get(ATTACHED) == memory.owner_token


def check_fit(model: PreTrainedModel, decoder: Decoder, config: EngramConfig, tokenizer: Any) -> None:
    """Refuse a config that is not the model's, and a tokenizer that has ids which the model does not know.

    Raises:
        ConfigError: a field is impossible for this model, or something else than a config or tokenizer was given.
        AttachError: the tokenizer is another model's.
    """
    if not isinstance(config, EngramConfig):
        raise ConfigError(f"config: got {type(config).__name__}, expected an EngramConfig.")
    blocks = len(decoder.blocks)
    outside = [i for i in config.layer_ids if i >= blocks]
    if outside:
        raise ConfigError(f"EngramConfig.layer_ids: got {outside}, expected 0..{blocks - 1}: the model has {blocks} blocks.")
    for field, value in (("hidden_size", decoder.hidden_size), ("hc_mult", decoder.streams)):
        asked = getattr(config, field)
        if asked is not None and asked != value:
            raise ConfigError(
                f"EngramConfig.{field}: got {asked}, expected {value} as in the model (or None to take it from there)."
            )
    if not hasattr(tokenizer, "__len__"):
        raise ConfigError(f"tokenizer: got {type(tokenizer).__name__}, expected the model's Hugging Face tokenizer.")
    embeddings: Any = model.get_input_embeddings()
    vocab = embeddings.weight.shape[0]
    if count_ids(tokenizer) > vocab:
        raise AttachError(
            f"the tokenizer has ids up to {count_ids(tokenizer) - 1}, the model's embeddings {vocab}; is it this model's tokenizer?"
        )
    if count_ids(tokenizer) < _LEAST_USED * vocab:  # some are always left over, to make the number a round one
        logging.getLogger("engram").warning(
            "the tokenizer has %s ids and the model embeddings for %s: is it this model's tokenizer?",
            f"{count_ids(tokenizer):,}",
            f"{vocab:,}",
        )


def check_tables_fit(mapping: NgramHashMapping, devices: dict[int, torch.device], table_config: TableConfig) -> None:
    """Refuse tables that do not fit: on each device those of its layers, in host memory all that live there together.

    Raises:
        TableError: there is less memory than they take.
    """
    config, places = mapping.config, dict[torch.device, list[int]]()
    for layer_id, device in devices.items():
        place = device if table_config.tier == "device" else torch.device("cpu")
        places.setdefault(place, []).append(sum(mapping.head_sizes(layer_id)))
    for place, rows in places.items():
        check_room(rows, config.head_dim, table_config, config.verify_rows, place)


def device_of(block: nn.Module, model: PreTrainedModel, layer_id: int) -> torch.device:
    """Where a block computes. Of one that is offloaded (its weights are on the meta device) accelerate's hooks know.

    Raises:
        AttachError: nobody knows.
    """
    parameter = next(block.parameters(), None)
    embeddings: Any = model.get_input_embeddings()
    own = torch.device("cpu") if parameter is None else parameter.device
    device = first_real([own, *offloaded_to(block), embeddings.weight.device])
    if device is None:
        raise AttachError(
            f"decoder block {layer_id}: got weights on the meta device, expected a device to compute on; load the model with its weights, "
            "or offload it by accelerate (device_map=...), whose hooks say where blocks run."
        )
    return device


def refuse_fused_head(forward: Any) -> None:
    """Refuse the forward pass that TRL's trainers put on the model that they are given: it takes ``base_model`` for a decoder without a head.

    Raises:
        AttachError: it is that one.
    """
    code = getattr(getattr(forward, "__func__", forward), "__code__", None)
    if code is not None and "fused_lm_head" in code.co_varnames:
        raise AttachError(
            "got the memory as the model of a TRL trainer, expected memory.base_model, with optimizers=(engram.optim.build_optimizer(memory, "
            "lr), None) and callbacks=[engram.training.MemoryCallback(memory)], without which nothing is trained or saved."
        )


def tell_of_padding(config: EngramConfig, tokenizer: Any) -> None:
    """Warn, once, where ``pad_id`` was left at its default, the tokenizer's is another, and texts may have the token in them."""
    own, default = getattr(tokenizer, "pad_token_id", None), EngramConfig.pad_id
    added = getattr(tokenizer, "added_tokens_decoder", {})  # special ones among them stand for no text
    if config.pad_id == default and own not in (None, default) and not getattr(added.get(default), "special", False):
        _warn_of_padding(default, own)


@functools.cache
def _warn_of_padding(pad_id: int, own: int) -> None:
    logging.getLogger("engram").warning(
        "EngramConfig.pad_id is %d, the default, and the tokenizer's padding token %d: what stands at the start of a text, or beside padding, "
        "is read as if token %d came before it. Give pad_id=tokenizer.pad_token_id.",
        *(pad_id, own, pad_id),
    )


def freeze(model: PreTrainedModel | EngramModel, adapters: Mapping[str, nn.Parameter]) -> None:
    """Freeze all parameters but those of adapters, which are as trainable as their owner left them."""
    own = {id(parameter) for parameter in adapters.values()}
    for parameter in model.parameters():
        if id(parameter) not in own:
            parameter.requires_grad_(False)


def trainable_flags(model: nn.Module) -> dict[str, bool]:
    """By name, and not by object, so that they hold for a copy of the model too; shared parameters under each of their names."""
    return {name: p.requires_grad for name, p in model.named_parameters(remove_duplicate=False)}
