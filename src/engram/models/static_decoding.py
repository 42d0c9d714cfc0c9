"""Decoding in which nothing moves: fixed batch, one token per step, every buffer where it was. On CUDA a step is one replayed graph.

The hooks, the hash and the layer are those of every other forward pass; only the state is another: instead of chunks that grow, buffers
that are overwritten, because a graph replays reads and writes of addresses and runs no Python.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import StaticCache

from engram.errors import AttachError, EngramError
from engram.layers import RollingTail
from engram.models.cache import CacheState, cache_argument, forget_state, state_of
from engram.models.positions import text_config
from engram.tables import RowPrefetcher, VerifiedTable
from engram.tables.pinned import nothing_unlocked
from engram.tables.prefetch import not_in_graphs

if TYPE_CHECKING:
    from engram.models.engram_model import EngramModel

__all__ = ["StaticDecoder", "StaticTail"]

_FLAT_MASKS = ("bloom",)
"""Models that compute where tokens are from a mask ``[B, T]``, and so refuse others."""
_WARM_UP = 2
"""Steps before a capture: kernels are compiled and libraries make their workspaces then."""


class StaticTail(RollingTail):
    """The last positions of a sequence in one buffer ``[B, window, ...]`` that never moves; it cannot go back.

    Args:
        past: what came before, ``[B, X, ...]`` of any X, or None.
        window: positions to keep.
        like: a tensor ``[B, 1, ...]`` that gives shape, type and device.
        fill: what stands before the start of the sequence.
    """

    def __init__(self, past: Tensor | None, window: int, like: Tensor, fill: float) -> None:
        super().__init__(window)
        self.buffer = torch.full((like.shape[0], window, *like.shape[2:]), fill, dtype=like.dtype, device=like.device)
        if past is not None and window:
            kept = past[:, -window:]
            self.buffer[:, window - kept.shape[1] :] = kept

    def append(self, chunk: Tensor) -> None:
        """Move on by the positions ``[B, T, ...]``, in place."""
        if self.buffer.shape[1]:
            self.buffer.copy_(torch.cat([self.buffer, chunk], dim=1)[:, -self.buffer.shape[1] :])

    def last(self, count: int) -> Tensor | None:
        """The last ``count`` positions, a view of the buffer: use it before the next ``append``."""
        return self.buffer[:, self.buffer.shape[1] - count :] if count else None

    def trim(self, length: int) -> None:
        """Not possible.

        Raises:
            EngramError: always.
        """
        raise EngramError(
            "StaticTail: fixed buffers keep no more than a step needs and cannot go back; start again with prefill()."
        )

    def map_batch(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Change the batch dimension in place (beams may be reordered, not repeated)."""
        self.buffer.copy_(fn(self.buffer))


class StaticDecoder:
    """Decodes a fixed number of sequences, one token each per step, without allocations or waits between steps.

    Steps must be taken with the memory switched on or off as it was for the prompt.

    Args:
        memory: the model with its memory; every layer must attend to the whole sequence.
        max_length: positions of the longest sequence, prompt included.
        capture: whether to replay a CUDA graph; None does on CUDA. Elsewhere steps run as they are, on the same fixed buffers.

    Raises:
        AttachError: the model has windowed or recurrent layers, takes no masks of four dimensions, or lies on several devices.
    """

    def __init__(self, memory: EngramModel, max_length: int, capture: bool | None = None) -> None:
        config = text_config(memory.base_model.config)
        kinds = {*(getattr(config, "layer_types", None) or ()), *(getattr(config, "attention_layers", None) or ())} - {"global"}
        if not kinds and getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
            kinds = {"sliding_attention"}
        if kinds - {"full_attention"}:
            raise AttachError(f"StaticDecoder: got layers of {', '.join(sorted(kinds))}, expected full_attention only.")
        if config.model_type in _FLAT_MASKS:
            raise AttachError(f"StaticDecoder: got a model of type {config.model_type}, which takes no mask for each position.")
        devices = {parameter.device for parameter in memory.base_model.parameters()}
        if len(devices) > 1:  # a graph is of one
            raise AttachError(
                f"StaticDecoder: got a model on {', '.join(sorted(map(str, devices)))}, expected one on a single device; use memory.generate."
            )
        if memory.beneath is not None:
            raise AttachError(
                "StaticDecoder: got a memory on top of another, expected one that is attached to the model itself."
            )
        self._memory, self.max_length, self._capture = memory, max_length, capture
        self.prefetcher = RowPrefetcher(static=True)
        self.state = SimpleNamespace(ids=None, conv={})
        self._graph: Any = None
        self._read_from: list[tuple[int, int, int]] = []

    @torch.no_grad()
    def prefill(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Read prompts ``[B, T]`` (padded on the left) and return the logits ``[B, vocabulary]`` of the token after them."""
        with self._memory.turns:
            return self._prefill(input_ids, attention_mask)

    def _prefill(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        self._graph = None
        self.prefetcher.close()
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        config = self._memory.base_model.config
        self.cache = StaticCache(config=config, max_cache_len=self.max_length)
        logits = self._memory(
            input_ids=input_ids,
            attention_mask=real,
            position_ids=(real.cumsum(1) - 1).clamp(min=0),
            use_cache=True,
            logits_to_keep=1,
            **{cache_argument(self._memory.base_model): self.cache},
        ).logits[:, -1]
        self._take_state(input_ids[:, -1:])
        self.tokens = torch.zeros_like(input_ids[:, -1:])
        self._place = torch.full((1,), input_ids.shape[1], device=input_ids.device)
        self._position = real.sum(1, keepdim=True)
        self._readable = torch.ones((len(real), self.max_length), dtype=torch.bool, device=real.device)
        self._readable[:, : real.shape[1]] = real != 0
        self._columns = torch.arange(self.max_length, device=real.device)
        self.logits = torch.empty_like(logits)
        return logits

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        """Go on by one token per sequence, ``[B]``; the logits ``[B, vocabulary]`` of the next are a buffer, good until the next step.

        The caller sees to it that no sequence becomes longer than ``max_length``: asking the device would be a wait.
        """
        with self._memory.turns:
            self._step(tokens)
        return self.logits

    def _step(self, tokens: Tensor) -> None:
        self.tokens.copy_(tokens.view(-1, 1))
        wanted = self.tokens.device.type == "cuda" if self._capture is None else self._capture
        if self._graph is not None and self._read_from != self._tables():
            self._graph = None  # it would read where rows were
        if wanted and self._graph is None:
            self._read_from = self._tables()
            self._graph = self._captured()
        if self._graph is None:
            self._forward()
        else:
            self._graph.replay()

    def _tables(self) -> list[tuple[int, int, int]]:
        """Where rows are: teaching, forgetting and moving put them elsewhere."""
        tables = [engram.table for engram in self._memory.engrams.values()]
        return [(id(table), getattr(table, "version", 0), table.weight.data_ptr()) for table in tables]

    def _forward(self) -> None:
        """One step, from ``tokens`` to ``logits``: reads and writes of fixed buffers only."""
        memory = self._memory
        readable = self._readable & (self._columns <= self._place)
        dtype = memory.base_model.dtype
        mask = torch.zeros(readable.shape, dtype=dtype, device=readable.device)
        mask = mask.masked_fill_(~readable, torch.finfo(dtype).min)[:, None, None, :]
        memory.static_decoder = self
        try:
            logits = memory(
                input_ids=self.tokens,
                attention_mask=mask,
                position_ids=self._position,
                use_cache=True,
                **{cache_argument(memory.base_model): self.cache},
            ).logits
        finally:
            memory.static_decoder = None
        self.logits.copy_(logits[:, -1])
        self._place.add_(1)
        self._position.add_(1)

    def _take_state(self, like: Tensor) -> None:
        """Buffers in place of the growing state that the prompt left on the cache; a memory that is switched off leaves none."""
        config, self.state = self._memory.engram_config, SimpleNamespace(ids=None, conv={})
        if not self._memory.is_enabled:
            return
        grown = state_of(self.cache, self._memory.owner_token)
        assert isinstance(grown, CacheState)
        reach = config.max_ngram_size - 1
        self.state.ids = StaticTail(grown.ids.last(reach), reach, like, config.pad_id)
        for layer, tail in grown.conv.items():
            past = tail.last(config.conv_reach)
            self.state.conv[layer] = RollingTail(0) if past is None else StaticTail(past, config.conv_reach, past, 0)
        forget_state(self.cache, self._memory.owner_token)  # from here on the cache holds positions that only this object knows

    def _moving(self) -> list[Tensor]:
        """What a step changes besides keys and values, which a later step overwrites."""
        lengths: list[Any] = [getattr(layer, "cumulative_length", None) for layer in self.cache.layers]
        tails = [tail.buffer for tail in (self.state.ids, *self.state.conv.values()) if isinstance(tail, StaticTail)]
        return [self._place, self._position, *(length for length in lengths if isinstance(length, Tensor)), *tails]

    def _check_tables(self) -> None:
        """Refuse rows that pass through the CPU before anything is captured: inside, torch would tell of the capture alone."""
        device = self.tokens.device
        for engram in self._memory.engrams.values() if self._memory.is_enabled else ():
            table = engram.table
            if not isinstance(table, VerifiedTable) and table.tier != "device" and not table.is_read_by(device):
                raise not_in_graphs(table)

    def _captured(self) -> Any:
        """The graph of a step. Steps are taken to make it, so the state is put back after each.

        Raises:
            TableError: the device cannot read a table by itself.
        """
        self._check_tables()
        moving = self._moving()
        before = [tensor.clone() for tensor in moving]

        def put_back() -> None:
            for tensor, saved in zip(moving, before):
                tensor.copy_(saved)

        stream = torch.cuda.Stream(self.tokens.device)
        stream.wait_stream(torch.cuda.current_stream(self.tokens.device))
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                self._forward()
                put_back()
        torch.cuda.current_stream(self.tokens.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.tokens.device), nothing_unlocked(), torch.cuda.graph(graph, stream=stream):
            self._forward()  # recorded, not computed
        return graph
