"""How a memory listens to a decoder: two hooks on the decoder, one on every block that has a layer, and nothing else.

Everything is kept in the decoder's own call order: the first hook computes addresses once for all layers and starts to fetch rows that
lie elsewhere, each block's hook adds its layer's output to the residual stream *before* the block (outside its gradient checkpoint, so
a recomputation sees the same input), and the last hook ties the decoding state to the cache that comes out.
"""

from __future__ import annotations

import inspect
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import Cache, CacheLayerMixin

from engram.errors import AttachError
from engram.layers import EngramState, note
from engram.models.cache import (
    CACHE_NAMES,
    CacheState,
    bind_state,
    bound_state,
    cache_in,
    cached_length,
    forget_state,
    state_of,
)
from engram.models.context import ForwardContext, token_mask
from engram.models.lookahead import find_verified, prefetch_rows
from engram.models.packing import find_packing
from engram.models.positions import text_config
from engram.tables import RowPrefetcher

if TYPE_CHECKING:
    from engram.models.architectures import Decoder
    from engram.models.engram_model import EngramModel

__all__ = ["DecoderHooks"]


class DecoderHooks:
    """The hooks of one memory on one decoder; ``remove`` leaves the model as it was."""

    def __init__(self, memory: EngramModel, decoder: Decoder) -> None:
        self._memory = memory
        self._context: ForwardContext | None = None
        self._argument_names = list(inspect.signature(decoder.module.forward).parameters)
        self._handles = [
            decoder.module.register_forward_pre_hook(self._begin, with_kwargs=True),
            decoder.module.register_forward_hook(self._finish, with_kwargs=True),
        ]
        self._prefetcher = RowPrefetcher()
        self._blocks = {layer_id: decoder.blocks[layer_id] for layer_id in memory.engram_config.layer_ids}
        for layer_id, block in self._blocks.items():
            hook = partial(self._add_memory, layer_id)  # unlike a closure it is the copy's own in a copy of the model
            self._handles.append(block.register_forward_pre_hook(hook, with_kwargs=True))

    def remove(self) -> None:
        """Take every hook off again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._prefetcher.close()
        self._context = None

    def _begin(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        self._context = None
        arguments = {**dict(zip(self._argument_names, args)), **kwargs}
        cache = next((arguments[name] for name in CACHE_NAMES if arguments.get(name) is not None), None)
        if not self._memory.is_enabled:
            if cache is not None:
                forget_state(cache, self._memory.owner_token)
            return None
        _refuse_unknown_kind(cache)
        input_ids = arguments.get("input_ids")
        if input_ids is None:
            input_ids = self._memory.given_ids
        if input_ids is None:
            raise AttachError(
                "got inputs_embeds without token ids, but the memory is addressed by token ids: pass input_ids, or in forward "
                "(generate does not take it) engram_input_ids=... beside inputs_embeds, or run inside memory.disable_engram()."
            )
        config = getattr(module, "config", self._memory.base_model.config)
        wants_cache = cache is not None or self._wants_cache(config, arguments.get("use_cache"))
        self._context = self._prepare(input_ids, arguments, cache, wants_cache)
        self._context.cache = cache
        if "logits_to_keep" in kwargs:  # Gemma 4 drops positions half way up, which would hide them from the layers above
            return args, {**kwargs, "logits_to_keep": 0}
        return None

    @staticmethod
    def _wants_cache(config: Any, use_cache: bool | None) -> bool:
        return bool(getattr(text_config(config), "use_cache", False) if use_cache is None else use_cache)

    def _prepare(self, input_ids: Tensor, arguments: dict[str, Any], cache: Cache | None, wants_cache: bool) -> ForwardContext:
        memory, config, static = self._memory, self._memory.engram_config, self._memory.static_decoder
        packing, route = None, self._route(len(input_ids))
        if static is not None:  # fixed shapes: the state is given, and asking the cache for its length would be a wait
            state, mask = static.state, None
        else:
            state, past = _past_in(cache, memory.owner_token)
            given = arguments.get("attention_mask")
            mask = token_mask(given, past, input_ids)
            packing = find_packing(arguments.get("position_ids"), given, past, input_ids, mask)
        ids = self._known(input_ids)
        if packing is not None:
            ids = packing.apart(ids)
            mask = packing.mask if mask is None else packing.mask & packing.apart(mask)
            route = None if route is None else packing.of_rows(route)
        ids = ids if mask is None else ids.masked_fill(~mask, config.pad_id)
        history = None if state is None else state.ids.last(config.max_ngram_size - 1)
        context = self._addresses(ids, history, mask, route)
        context.packing = packing
        if packing is not None:  # which text would go on is not known: nothing is kept, and continuing is refused
            return context
        if wants_cache and state is None:
            state = CacheState(memory.owner_token, tuple(config.layer_ids), memory.rollback_window)
        context.state = state
        return context

    def _known(self, ids: Tensor) -> Tensor:
        """Token ids with ``pad_id`` for those that the embedding got after the memory (``resize_token_embeddings``).

        The mapping itself goes on refusing them: they have no addresses, and facts that are taught with them would share one.
        """
        known = self._memory.mapping.accepted_ids
        if self._memory.base_model.get_input_embeddings().weight.shape[0] <= known:
            return ids
        return ids.masked_fill(ids >= known, self._memory.engram_config.pad_id)

    def _addresses(self, ids: Tensor, history: Tensor | None, mask: Tensor | None, route: Tensor | None) -> ForwardContext:
        """Addresses of all layers with their rows on the way, or for verified rows what was found there."""
        memory, static = self._memory, self._memory.static_decoder
        if not memory.engram_config.verify_rows:
            hash_ids = memory.mapping.hash(ids, history)
            prefetcher = self._prefetcher if static is None else static.prefetcher
            prefetcher.mode = memory.prefetch_rows
            recomputed = {layer for layer, block in self._blocks.items() if _is_recomputed(block)}
            fetched = prefetch_rows(memory, hash_ids, prefetcher, recomputed)
            return ForwardContext(hash_ids, None, ids, mask, None, route, fetched)
        hash_ids = memory.mapping.hash(ids, history) if memory.is_recording else {}
        slots, found = find_verified(memory, ids, history, mask, route, wait=static is None)
        return ForwardContext(hash_ids, slots, ids, mask, None, route, found=found)

    def _route(self, batch: int) -> Tensor | None:
        """The sequences that may read, for a batch in which each may stand several times in a row (beams)."""
        route = self._memory._route
        if route is None or route.shape[0] == batch:
            return route
        if route.shape[0] == 0 or batch % route.shape[0]:
            raise AttachError(f"route: got {route.shape[0]} decisions, expected one for each of {batch} sequences.")
        return route.repeat_interleave(batch // route.shape[0])

    def _add_memory(
        self, layer_id: int, block: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]] | None:
        if not self._memory.is_enabled:
            return None
        if self._context is None:
            raise AttachError(
                f"decoder block {layer_id} ran outside its decoder's forward pass, where the memory has no token ids "
                "(gradient checkpointing needs a transformers version that checkpoints below module hooks, 5.23 or later)."
            )
        if not args and "hidden_states" not in kwargs:
            raise AttachError(
                f"decoder block {layer_id} ({type(block).__name__}) got {', '.join(kwargs) or 'no arguments'}, expected the residual stream "
                "first, or by the name hidden_states."
            )
        hidden_states = args[0] if args else kwargs["hidden_states"]
        packing = self._context.packing
        if packing is None:
            contribution = self._read(layer_id, block, hidden_states)
        else:
            contribution = self._read(layer_id, block, packing.apart(hidden_states))
            contribution = None if contribution is None else packing.together(contribution)
            self._memory.put_together(layer_id, packing)
        if contribution is None:
            return None
        hidden_states = hidden_states + contribution
        return ((hidden_states, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden_states})

    def _read(self, layer_id: int, block: nn.Module, hidden_states: Tensor) -> Tensor | None:
        """What the layer adds to the stream; None when it adds nothing at all."""
        context, engram = self._context, self._memory.engrams[str(layer_id)]
        assert context is not None
        device = hidden_states.device
        mask = None if context.mask is None else context.mask.to(device)
        hash_ids = context.hash_ids[layer_id].to(device) if layer_id in context.hash_ids else None
        trace = self._memory.trace_for(layer_id, hash_ids)
        slots = None
        if context.slots is not None:
            slots = context.slots[layer_id]
            if slots is None and trace is None and engram.short_conv is None and not _is_trained(engram):
                return None
            slots = engram.no_slots(*hidden_states.shape[:2]) if slots is None else slots.to(device)
            if trace is not None:
                trace["slots"] = slots
        layer_state = None if context.state is None else EngramState(conv=context.state.conv[layer_id])
        fetched, found = context.fetched.pop(layer_id, None), context.found.get(layer_id)
        if _is_recomputed(block):
            noted = None if trace is None else type(trace)(trace)  # what a recomputation notes, nobody reads
            arguments = (hidden_states, None, hash_ids, None, mask, noted, slots)  # nor must it see a state grow
            output = checkpoint(engram, *arguments, found=found, use_reentrant=False, preserve_rng_state=False)
            if trace is not None and noted is not None:
                trace.update(noted)
        else:
            output = engram(hidden_states, None, hash_ids, layer_state, mask, trace, slots, fetched, found)
        if context.route is not None and context.slots is None:
            route = context.route.to(device).view(-1, *[1] * (output.dim() - 1))
            output = torch.where(route, output, torch.zeros_like(output))
        note(trace, added=output)
        return output

    def _finish(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        context, self._context = self._context, None
        if context is None or context.state is None:
            return
        if self._memory.static_decoder is not None:
            context.state.ids.append(context.input_ids)
            return
        cache = cache_in(output)
        _refuse_unknown_kind(cache)
        if cache is None:  # with use_cache=False some models fill the cache they are given and return none
            cache = context.cache
        if cache is not None and (cached_length(cache) > 0 if _counts_positions(cache) else cache.has_previous_state()):
            _commit(cache, context)


def _is_trained(engram: Any) -> bool:
    """Whether gradients of a reader are taken: those of a batch that reads nothing are zero, not missing."""
    return torch.is_grad_enabled() and any(parameter.requires_grad for parameter in engram.parameters())


def _is_recomputed(block: nn.Module) -> bool:
    """Whether the block's layer runs under gradient checkpointing, as the block itself does."""
    return bool(getattr(block, "gradient_checkpointing", False)) and block.training and torch.is_grad_enabled()


@torch.compiler.disable
def _commit(cache: Cache, context: ForwardContext) -> None:
    on_cuda = context.input_ids.device.type == "cuda"
    # The caller may write the next ids into its tensor.
    context.state.ids.append(context.input_ids if on_cuda else context.input_ids.clone())
    if on_cuda:
        context.state.own()
    bind_state(cache, context.state)


def _past_in(cache: Cache | None, owner: str) -> tuple[CacheState | None, int]:
    """The state bound to a cache, None for a new one, and the positions in the cache.

    A cache of recurrent states alone (Mamba's) keeps no count. Nothing can be taken back from it, so the state's own count is the truth.

    Raises:
        AttachError: the cache holds positions that this memory has not seen.
    """
    if cache is None:
        return None, 0
    if _counts_positions(cache):
        return state_of(cache, owner), cached_length(cache)
    if not cache.has_previous_state():  # new, or reset
        return None, 0
    state = bound_state(cache, owner)
    if state is None or any(getattr(layer, "record_past", False) for layer in cache.layers):
        raise AttachError(
            "the cache holds positions that this memory has not seen, or records them so that some can be taken back, which does not show in "
            "a cache of recurrent states. Start with an empty cache, or run the whole prompt with the memory on."
        )
    state.trim(state.ids.length)  # a pass that failed on the way may have added to convolutions
    return state, state.ids.length


def _counts_positions(cache: Cache) -> bool:
    layers = getattr(cache, "layers", ())
    return not layers or any(isinstance(layer, CacheLayerMixin) for layer in layers)


def _refuse_unknown_kind(cache: Any) -> None:
    """Only transformers' own caches tell the memory when beams are reordered or positions dropped."""
    if type(cache).__name__ == "PagedAttentionCache":
        raise AttachError(
            "got a paged cache (continuous batching): requests share a row there, and the memory cannot tell them apart; use generate, or "
            "memory.disable_engram()."
        )
    if cache is not None and not isinstance(cache, Cache):
        raise AttachError(
            f"got a cache of class {type(cache).__name__}, which the memory cannot follow; expected a transformers Cache. Pass "
            "use_cache=False, or run inside memory.disable_engram() or after unload()."
        )
