"""The Engram layer: look up, gate, smooth (paper equations 2 to 5; branches as in section 2.4), and the variants without a gate or with
one for all streams.

Shape legend: B batch, T positions, M residual streams (branches), d hidden size, H hash heads of this layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from engram.config import EngramConfig, TableConfig
from engram.errors import CheckpointError, ConfigError
from engram.hashing import NgramHashMapping
from engram.layers.conv import ShortConv
from engram.layers.embedding import MultiHeadEmbedding
from engram.layers.fuse import concat_projections, fuse_by_concat, fuse_by_gate
from engram.layers.joined import are_plain, join_projections, project_all, project_together
from engram.layers.reader import seeded_signs
from engram.layers.state import EngramState
from engram.layers.trace import GraphTrace, note
from engram.native.gated import GateOptions
from engram.native.read import read_streams
from engram.ops import few_positions_serve, gate_and_smooth, whole_sequences_serve
from engram.tables import ABSENT, RowHandle, RowPrefetcher

__all__ = ["Engram", "layer_classes"]


class Engram(nn.Module):
    """The memory of one decoder block. Parameter names are those of the paper's public demo.

    A gate of your own is a subclass that overrides ``gated_value``; ``get_engram_model(..., layer_class=...)`` puts it in.

    ``EngramConfig.fuse`` and ``branch_gates`` decide which of ``key_projs``, ``norm1`` (of the key), ``norm2`` (of the hidden state) and
    ``concat_projs`` have members: M of each that is used, one with ``branch_gates=False``, none of those that are not. Beside
    ``value_proj``, table and convolution, which all have, that makes with G = M, or 1 with ``branch_gates=False``: ``gate``
    ``G (d_mem d + d + 2 d)`` parameters (the bias d only with ``use_bias``), ``add`` none, ``concat`` ``G (2 d d + d)``.

    Args:
        config: the memory's identity; ``hidden_size`` must be set, ``hc_mult`` None counts as 1.
        mapping: the addresses.
        layer_id: which of ``config.layer_ids`` this is.
        table_config: where the table lives.
        device: where a table of tier ``device`` is made, which may be larger than host memory; the rest follows by ``to``.

    Raises:
        ConfigError: ``hidden_size`` is missing or ``layer_id`` is not one of the memory's layers.
    """

    def __init__(
        self,
        config: EngramConfig,
        mapping: NgramHashMapping,
        layer_id: int,
        table_config: TableConfig | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if config.hidden_size is None:
            raise ConfigError("EngramConfig.hidden_size: got None, expected the width of the residual stream.")
        if layer_id not in config.layer_ids:
            raise ConfigError(f"layer_id: got {layer_id}, expected one of {list(config.layer_ids)} (EngramConfig.layer_ids).")
        self.config, self.mapping, self.layer_id = config, mapping, layer_id
        self.branches = config.hc_mult or 1
        d, d_mem = config.hidden_size, config.d_mem_of(layer_id)
        own = self.branches if config.branch_gates else 1
        keys, queries, joints = {"gate": (own, own, 0), "add": (0, 0, 0), "concat": (0, own, own)}[config.fuse]
        self.multi_head_embedding = MultiHeadEmbedding(
            mapping.head_sizes(layer_id), config.head_dim, table_config, config.table_init, config.verify_rows, layer_id, device
        )
        self.value_proj = nn.Linear(d_mem, d, bias=config.use_bias)
        self.key_projs = nn.ModuleList(nn.Linear(d_mem, d, bias=config.use_bias) for _ in range(keys))
        self.norm1 = nn.ModuleList(nn.RMSNorm(d, eps=config.norm_eps) for _ in range(keys))  # of the key
        self.norm2 = nn.ModuleList(nn.RMSNorm(d, eps=config.norm_eps) for _ in range(queries))  # of the query
        self.concat_projs = concat_projections(d, joints)
        self.short_conv = (
            ShortConv(d, self.branches, config.kernel_size, config.max_ngram_size, config.conv_norm_eps)
            if config.use_conv
            else None
        )
        if config.use_bias:  # a value bias would speak where nothing is written
            nn.init.zeros_(self.value_proj.bias)
        if config.reader == "seeded":
            self._seed_reader()
        self._join()

    @property
    def table(self) -> Any:
        """Where the layer's rows are: an ``EmbeddingTable``, whatever its place."""
        return self.multi_head_embedding.embedding

    def reader_parameters(self) -> list[nn.Parameter]:
        """Projections, norms and the convolution: all parameters but the table's."""
        in_table = {id(parameter) for parameter in self.multi_head_embedding.parameters()}
        return [parameter for parameter in self.parameters() if id(parameter) not in in_table]

    @property
    def num_heads(self) -> int:
        """Rows read per token, H."""
        return self.config.num_heads_of(self.layer_id)

    @property
    def _projections(self) -> list[nn.Linear]:
        """Value and keys: all read the same rows."""
        return [self.value_proj, *self.key_projs]

    @property
    def seeded_parts(self) -> tuple[nn.Module, ...]:
        """Modules that follow from the seed: never trained and not saved. None of a trained reader."""
        return (self.value_proj, self.key_projs, self.norm1, self.norm2) if self.config.reader == "seeded" else ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self._join()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Copies and pickles have their projections side by side too."""
        super().__setstate__(state)
        self._join()

    def _join(self) -> None:
        """With several keys, have all projections side by side: five small matrix products cost three times one. Two do not, and
        weights that share memory are refused by some ways of saving a module.
        """
        if len(self.key_projs) > 1:
            join_projections(self._projections)

    def _is_plain(self) -> bool:
        """Whether native code may do what class and modules say: the stock formula with a gate, and no adapter, hook, parametrisation or
        other type anywhere.
        """
        return (
            self.config.fuse == "gate"
            and self._has_stock_formula()
            and are_plain(self._projections, nn.Linear)
            and are_plain([*self.norm1, *self.norm2, *(self.short_conv.norms if self.short_conv else ())], nn.RMSNorm)
            and (self.short_conv is None or _is_plain_conv(self.short_conv))
        )

    def _has_stock_formula(self) -> bool:
        """Whether nobody, subclass or instance, has put something else in the place of what native code computes in one go."""
        return all(getattr(type(self), name) is stock and name not in self.__dict__ for name, stock in _FORMULA.items())

    @torch.no_grad()
    def _seed_reader(self) -> None:
        """Random signs for the projections, scaled so that values are as large as the rows they are made of; frozen."""
        for number, projection in enumerate([self.value_proj, *self.key_projs]):
            signs = seeded_signs((self.config.seed, self.layer_id, number), tuple(projection.weight.shape))
            projection.weight.copy_(signs / self.config.n_embed_per_ngram**0.5)
        for part in self.seeded_parts:
            part.requires_grad_(False)

    def forward(
        self,
        hidden_states: Tensor,
        input_ids: Tensor | None = None,
        hash_ids: Tensor | None = None,
        state: EngramState | None = None,
        attention_mask: Tensor | None = None,
        trace: dict[str, Tensor] | None = None,
        slots: Tensor | None = None,
        fetched: RowHandle | None = None,
        found: int | None = None,
    ) -> Tensor:
        """The memory's contribution Y; the caller adds it to the residual stream.

        Args:
            hidden_states: ``[B, T, d]``, or ``[B, T, M, d]`` for M residual streams.
            input_ids: raw token ids ``[B, T]``; or give
            hash_ids: head indices ``[B, T, H]`` computed before (``mapping.hash``), once for all layers.
            state: what came before these positions; it is brought up to date. None means the sequence starts here.
            attention_mask: ``[B, T]``, zero at padding: such positions neither enter n-grams nor contribute.
            trace: a dict that receives ``gate [B, T, M]``, ``value`` (v~) and the incoming ``stream`` (both ``[B, T, M, d]``), detached
                unless it is a ``GraphTrace``. Where nothing gates (``fuse`` is ``add`` or ``concat``) the gate is 1.
            slots: for verified rows, what ``find_slots`` gave for these positions; found here if not given.
            fetched: what ``prefetch`` gave for ``hash_ids``; looked up here if not given.
            found: how many positions have slots, if that is known (or a larger number): the host then need not wait for the device.

        Returns:
            Y in the shape and dtype of ``hidden_states``.

        Raises:
            ConfigError: shapes do not fit, or neither ids are given.
        """
        streams = self._as_streams(hidden_states)
        if attention_mask is not None and attention_mask.dtype != torch.bool:
            attention_mask = attention_mask != 0  # values are multiplied by it
        if self.config.verify_rows:
            if slots is None:
                slots = self._find_here(hidden_states, input_ids, state, attention_mask)
            return self._read_verified(streams, slots, state, trace, found).reshape(hidden_states.shape).to(hidden_states.dtype)
        if hash_ids is None:
            hash_ids = self._hash(hidden_states, input_ids, state, attention_mask)
        elif hash_ids.shape[:2] != hidden_states.shape[:2] or hash_ids.shape[-1] != self.num_heads:
            raise ConfigError(f"hash_ids: got {list(hash_ids.shape)}, expected {[*hidden_states.shape[:2], self.num_heads]}.")
        rows = self.multi_head_embedding(hash_ids, self.value_proj.weight.dtype, fetched)
        if trace is None and few_positions_serve(streams, self.value_proj.weight) and self._is_plain():
            return self._read_few(streams, rows, attention_mask, state).reshape(hidden_states.shape)
        native = state is None and not isinstance(trace, GraphTrace)  # whose gates the native pass keeps to itself
        if native and whole_sequences_serve(streams, self.value_proj.weight) and self._is_plain():
            return self._read_whole(streams, rows, attention_mask, trace).reshape(hidden_states.shape)
        gate, value = self._gated_value(streams, rows)
        if attention_mask is not None:
            value = value * attention_mask[:, :, None, None].to(value.dtype)
        note(trace, gate=gate.squeeze(-1), value=value, stream=streams)
        return self._smooth(value, state).reshape(hidden_states.shape).to(hidden_states.dtype)

    def prefetch(self, hash_ids: Tensor, through: RowPrefetcher) -> RowHandle | None:
        """Start fetching what ``forward`` will read for head indices ``[B, T, H]``; None where that does not pay."""
        return self.multi_head_embedding.prefetch(hash_ids, self.value_proj.weight.dtype, through)

    def find(self, input_ids: Tensor, history: Tensor | None = None, attention_mask: Tensor | None = None) -> Tensor | None:
        """Verified rows that positions read, as slots ``[B, T, H]`` of the table, ``ABSENT`` elsewhere; None if nothing is read at all.

        Args:
            input_ids: raw ids ``[B, T]``.
            history: raw ids ``[B, X]`` that came before.
            attention_mask: ``[B, T]``, zero at padding, which reads nothing.
        """
        if self.table.stored_rows == 0:
            return None
        index = (
            None
            if self.mapping.kernel_for(input_ids) is None
            else self.multi_head_embedding.row_index(self.config.n_head_per_ngram)
        )
        if index is not None:
            return self.mapping.find(self.layer_id, index, input_ids, history, attention_mask)
        device = self.multi_head_embedding.offsets.device
        hash_ids, tags = (x.to(device) for x in self.mapping.hash_with_tags(input_ids, history, attention_mask)[self.layer_id])
        slots = self.find_slots(hash_ids, tags, None if attention_mask is None else attention_mask.to(device))
        return slots if bool((slots != ABSENT).any()) else None

    def find_slots(self, hash_ids: Tensor, tags: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Verified rows that these positions read, as slots ``[B, T, H]`` of the table; ``ABSENT`` where none is theirs.

        Args:
            hash_ids: head indices ``[B, T, H]``.
            tags: tags ``[B, T, H]`` (``mapping.hash_with_tags``).
            attention_mask: ``[B, T]``, zero at padding, which reads nothing.
        """
        slots = self.multi_head_embedding.find(hash_ids, tags)
        if attention_mask is not None:
            slots = slots.masked_fill(attention_mask.unsqueeze(-1) == 0, ABSENT)
        return _longest_only(slots, self.config.n_head_per_ngram) if self.config.longest_only else slots

    def _read_verified(
        self,
        streams: Tensor,
        slots: Tensor,
        state: EngramState | None,
        trace: dict[str, Tensor] | None,
        found: int | None = None,
    ) -> Tensor:
        """The contribution where rows were found, zero elsewhere; without a convolution nothing is computed elsewhere."""
        where = (slots != ABSENT).any(dim=-1)
        at = _positions(where, found)
        # Found positions stand as a batch of one-position sequences: [n, 1, M, d].
        gate, value = self._gated_value(streams[at].unsqueeze(1), self.multi_head_embedding.gather(slots[at].unsqueeze(1)))
        if found is not None:  # there may be positions among them at which nothing was found
            value = value.masked_fill(~where[at][:, None, None, None], 0)
        spread = streams.new_zeros(streams.shape, dtype=value.dtype)
        spread[at] = value.squeeze(1)
        if trace is not None:
            gates = gate.new_zeros((*streams.shape[:3], 1))
            gates[at] = gate.masked_fill(~where[at][:, None, None, None], 0).squeeze(1)
            note(trace, gate=gates.squeeze(-1), value=spread, stream=streams)
        return self._smooth(spread, state)

    def _norms(self) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Norm weights of keys, queries and, if there is one, the convolution."""
        norms: Any = (self.norm1, self.norm2, self.short_conv.norms if self.short_conv is not None else ())
        keys, queries, smoothed = ([norm.weight for norm in group] for group in norms)
        return keys, queries, smoothed

    def _read_few(self, streams: Tensor, rows: Tensor, attention_mask: Tensor | None, state: EngramState | None) -> Tensor:
        """The whole contribution ``[B, T, M, d]`` in two calls, as ``_gated_value`` and ``_smooth`` compute it in twenty."""
        projected = project_together(self._projections, rows)
        if attention_mask is not None:
            projected[..., : streams.shape[-1]] *= attention_mask.unsqueeze(-1).to(projected.dtype)
        keys, queries, smoothed = self._norms()
        conv, past = None, None
        if self.short_conv is not None:
            conv = (self.short_conv.taps.detach(), self.short_conv.dilation, smoothed, self.config.conv_norm_eps)
            past = None if state is None else state.conv.last(self.config.conv_reach)
        eps = torch.finfo(streams.dtype).eps if self.config.norm_eps is None else self.config.norm_eps
        squash = self.config.gate == "signed_sqrt"
        output, normed = read_streams(projected, streams, keys, queries, eps, squash, conv, past)
        if normed is not None and state is not None:
            state.conv.append(normed)
        return output

    def _read_whole(
        self, streams: Tensor, rows: Tensor, attention_mask: Tensor | None, trace: dict[str, Tensor] | None = None
    ) -> Tensor:
        """The whole contribution ``[B, T, M, d]`` of sequences that start here, with gradients, as ``_gated_value`` and ``_smooth`` give it."""
        keys, queries, smoothed = self._norms()
        # As in _gated_value, norms see float32 hidden states.
        eps = torch.finfo(torch.float32).eps if self.config.norm_eps is None else self.config.norm_eps
        options = GateOptions(eps, self.config.gate == "signed_sqrt", self.config.max_ngram_size, self.config.conv_norm_eps)
        taps = None if self.short_conv is None else self.short_conv.conv.weight
        projected = project_all(self._projections, rows)
        norms = [*keys, *queries, *smoothed]
        output = gate_and_smooth(projected, streams, attention_mask, norms, options, taps, trace)
        if trace is not None:
            gate = trace["gate"].unsqueeze(-1)
            value = gate * projected[..., : streams.shape[-1]].unsqueeze(2)
            if attention_mask is not None:
                value = value * attention_mask[:, :, None, None].to(value.dtype)
            note(trace, gate=gate.squeeze(-1), value=value, stream=streams)
        return output

    def _gated_value(self, streams: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """``gated_value`` in the layer's own dtype, its shapes checked: a wrong one would be spread out by broadcasting, unnoticed."""
        rows = rows.to(self.value_proj.weight.dtype)
        gate, value = self.gated_value(streams.to(rows.dtype), rows)
        if gate.shape != (*streams.shape[:3], 1) or value.shape != streams.shape:
            raise ConfigError(
                f"{type(self).__name__}.gated_value: got a gate of shape {list(gate.shape)} and a value of {list(value.shape)}, expected "
                f"{[*streams.shape[:3], 1]} and {list(streams.shape)}: [B, T, M, 1] and [B, T, M, d]."
            )
        return gate, value.to(rows.dtype)

    def gated_value(self, streams: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """How rows enter the residual streams: equations 3 and 4, or what ``EngramConfig.fuse`` puts there. Override it for a gate of your own.

        A subclass's is called in training, decoding, teaching and under ``record()`` alike; native code, which knows the stock formula alone,
        then stands aside. Padding is masked and the convolution added afterwards. A position must not depend on others: decoding gives one at a
        time, and of verified rows only those positions come that read any, as ``[n, 1]``.

        Args:
            streams: hidden states ``[B, T, M, d]``, in the dtype of the layer's weights.
            rows: what was looked up, ``[B, T, d_mem]``, in that dtype too.

        Returns:
            The gate ``[B, T, M, 1]``, which is recorded and used no further, and the gated value v~ ``[B, T, M, d]``, which is added.
        """
        if self.config.fuse == "gate":
            gate = fuse_by_gate(streams, rows, self.key_projs, self.norm1, self.norm2, self.config.gate)
            return gate, gate * self.value_proj(rows).unsqueeze(2)
        value = self.value_proj(rows).to(rows.dtype)
        open_gate = value.new_ones((*streams.shape[:3], 1))
        if self.config.fuse == "add":
            return open_gate, value.unsqueeze(2).expand(streams.shape)
        return open_gate, fuse_by_concat(streams, value, self.concat_projs, self.norm2)

    def _as_streams(self, hidden_states: Tensor) -> Tensor:
        """``[B, T, M, d]`` view of the hidden states."""
        streams = hidden_states.unsqueeze(2) if hidden_states.dim() == 3 and self.branches == 1 else hidden_states
        if streams.dim() != 4 or streams.shape[2:] != (self.branches, self.config.hidden_size):
            expected = f"[B, T, {self.branches}, {self.config.hidden_size}]" + (
                f" or [B, T, {self.config.hidden_size}]" if self.branches == 1 else ""
            )
            raise ConfigError(f"hidden_states: got shape {list(hidden_states.shape)}, expected {expected}.")
        return streams

    def _hash(
        self, hidden_states: Tensor, input_ids: Tensor | None, state: EngramState | None, attention_mask: Tensor | None
    ) -> Tensor:
        input_ids, history = self._checked(hidden_states, input_ids, state)
        hash_ids = self.mapping.hash(input_ids, history, attention_mask)[self.layer_id]
        self._remember(state, input_ids, attention_mask)
        return hash_ids

    def _find_here(
        self, hidden_states: Tensor, input_ids: Tensor | None, state: EngramState | None, attention_mask: Tensor | None
    ) -> Tensor:
        input_ids, history = self._checked(hidden_states, input_ids, state)
        slots = self.find(input_ids, history, attention_mask)
        self._remember(state, input_ids, attention_mask)
        return self.no_slots(*input_ids.shape) if slots is None else slots

    def no_slots(self, batch: int, length: int) -> Tensor:
        """Slots of positions that read nothing."""
        return torch.full((batch, length, self.num_heads), ABSENT, device=self.multi_head_embedding.offsets.device)

    def _checked(
        self, hidden_states: Tensor, input_ids: Tensor | None, state: EngramState | None
    ) -> tuple[Tensor, Tensor | None]:
        """Ids of the right shape and what came before them."""
        if input_ids is None:
            raise ConfigError("Engram.forward: got neither input_ids nor hash_ids; the memory is addressed by token ids.")
        if input_ids.shape != hidden_states.shape[:2]:
            raise ConfigError(f"input_ids: got shape {list(input_ids.shape)}, expected {list(hidden_states.shape[:2])}.")
        return input_ids, None if state is None else state.ids.last(self.config.max_ngram_size - 1)

    def _remember(self, state: EngramState | None, input_ids: Tensor, attention_mask: Tensor | None) -> None:
        """Bring a state up to date, once the ids were found to have addresses; never with the caller's own tensor, into which it may write the
        next ids.
        """
        if state is not None:
            pad_id = self.config.pad_id
            state.ids.append(
                input_ids.clone() if attention_mask is None else input_ids.masked_fill(attention_mask == 0, pad_id)
            )

    def _smooth(self, value: Tensor, state: EngramState | None) -> Tensor:
        """Add the short convolution (equation 5): ``[B, T, M, d]`` to the same shape."""
        if self.short_conv is None:
            return value
        normed = self.short_conv.normalize(value)
        past = None if state is None else state.conv.last(self.config.conv_reach)
        smoothed = value + self.short_conv(normed, past).view_as(value)
        if state is not None:  # last: a state of fixed buffers overwrites its past
            state.conv.append(normed)
        return smoothed

    def load_demo_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Load weights saved by the paper's demo (one layer, its parameter names, no prefix).

        Raises:
            CheckpointError: a parameter is missing, unknown or of another shape; nothing is loaded then.
        """
        own = self.state_dict()
        missing, unknown = sorted(set(own) - set(state_dict)), sorted(set(state_dict) - set(own))
        wrong = [
            f"{name} {list(state_dict[name].shape)} (expected {list(own[name].shape)})"
            for name in own
            if name in state_dict and state_dict[name].shape != own[name].shape
        ]
        if missing or unknown or wrong:
            parts = (("missing", missing), ("unknown", unknown), ("wrong shape", wrong))
            problems = "; ".join(f"{label}: {', '.join(names)}" for label, names in parts if names)
            raise CheckpointError(
                f"demo state dict does not fit this layer: {problems}. Check hc_mult, sizes, use_bias, fuse and branch_gates."
            )
        if not torch.equal(state_dict["multi_head_embedding.offsets"].cpu(), own["multi_head_embedding.offsets"].cpu()):
            raise CheckpointError("demo state dict: head offsets differ; it was made with other table sizes, layers or heads.")
        self.load_state_dict(dict(state_dict))


_FORMULA = {name: getattr(Engram, name) for name in ("gated_value", "_gated_value", "_smooth")}
"""The methods whose work the native paths do in one go."""


def layer_classes(given: type[Engram] | Mapping[int, type[Engram]] | None, layer_ids: Sequence[int]) -> dict[int, type[Engram]]:
    """The class of every layer: one for all, or those given by layer id and ``Engram`` for the others; None is ``Engram`` for all.

    Raises:
        ConfigError: something is no subclass of ``Engram``, or is for a layer that the memory does not have.
    """
    by_layer = given if isinstance(given, Mapping) else dict.fromkeys(layer_ids, Engram if given is None else given)
    fit = all(isinstance(kind, type) and issubclass(kind, Engram) for kind in by_layer.values())
    if not fit or not set(by_layer) <= set(layer_ids):
        raise ConfigError(
            f"layer_class: got {given!r}, expected a subclass of engram.Engram, or {{layer id: subclass}} with ids among {list(layer_ids)}."
        )
    return {layer_id: by_layer.get(layer_id, Engram) for layer_id in layer_ids}


def _is_plain_conv(module: ShortConv) -> bool:
    hooked = module._forward_hooks or module._forward_pre_hooks
    return type(module) is ShortConv and not hooked and are_plain([module.conv], nn.Conv1d)


def _positions(where: Tensor, found: int | None) -> tuple[Tensor, Tensor]:
    """Row and column of the positions ``[B, T]`` that are True; of the first ``found`` in that order if their number is known."""
    if found is None:
        row, column = where.nonzero(as_tuple=True)  # on a GPU the host waits here
        return row, column
    flat = where.flatten().to(torch.uint8).argsort(descending=True, stable=True)[:found]
    return flat // where.shape[1], flat % where.shape[1]


def _longest_only(slots: Tensor, heads: int) -> Tensor:
    """Keep the slots of the longest n-gram found at each position; ``slots [B, T, orders * heads]`` is order-major."""
    by_order = slots.unflatten(-1, (-1, heads))
    found = (by_order != ABSENT).any(dim=-1)
    longer = found.flip(-1).cumsum(-1).flip(-1) - found.long()  # found n-grams that are longer than this one
    return by_order.masked_fill((longer != 0).unsqueeze(-1), ABSENT).flatten(-2)
