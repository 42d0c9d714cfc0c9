"""The Engram layer: look up, gate, smooth (paper equations 2 to 5; branches as in section 2.4).

Shape legend: B batch, T positions, M residual streams (branches), d hidden size, H hash heads.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from engram.config import EngramConfig, TableConfig
from engram.errors import CheckpointError, ConfigError
from engram.hashing import NgramHashMapping
from engram.layers.conv import ShortConv
from engram.layers.embedding import MultiHeadEmbedding
from engram.layers.state import EngramState
from engram.ops import context_gate

__all__ = ["Engram"]


class Engram(nn.Module):
    """The memory of one decoder block. Parameter names are those of the paper's public demo.

    Args:
        config: the memory's identity; ``hidden_size`` must be set, ``hc_mult`` None counts as 1.
        mapping: the addresses.
        layer_id: which of ``config.layer_ids`` this is.
        table_config: where the table lives.

    Raises:
        ConfigError: ``hidden_size`` is missing or ``layer_id`` is not one of the memory's layers.
    """

    def __init__(
        self, config: EngramConfig, mapping: NgramHashMapping, layer_id: int, table_config: TableConfig | None = None
    ) -> None:
        super().__init__()
        if config.hidden_size is None:
            raise ConfigError("EngramConfig.hidden_size: got None, expected the width of the residual stream.")
        if layer_id not in config.layer_ids:
            raise ConfigError(f"layer_id: got {layer_id}, expected one of {list(config.layer_ids)} (EngramConfig.layer_ids).")
        self.config, self.mapping, self.layer_id = config, mapping, layer_id
        self.branches = config.hc_mult or 1
        d = config.hidden_size
        self.multi_head_embedding = MultiHeadEmbedding(
            mapping.head_sizes(layer_id), config.head_dim, table_config, config.table_init
        )
        self.value_proj = nn.Linear(config.d_mem, d, bias=config.use_bias)
        self.key_projs = nn.ModuleList(nn.Linear(config.d_mem, d, bias=config.use_bias) for _ in range(self.branches))
        self.norm1 = nn.ModuleList(nn.RMSNorm(d, eps=config.norm_eps) for _ in range(self.branches))  # of the key
        self.norm2 = nn.ModuleList(nn.RMSNorm(d, eps=config.norm_eps) for _ in range(self.branches))  # of the query
        self.short_conv = (
            ShortConv(d, self.branches, config.kernel_size, config.max_ngram_size, config.conv_norm_eps)
            if config.use_conv
            else None
        )
        if config.use_bias:  # a value bias would speak where nothing is written
            nn.init.zeros_(self.value_proj.bias)

    def forward(
        self,
        hidden_states: Tensor,
        input_ids: Tensor | None = None,
        hash_ids: Tensor | None = None,
        state: EngramState | None = None,
        attention_mask: Tensor | None = None,
        write_mask: Tensor | None = None,
        trace: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """The memory's contribution Y; the caller adds it to the residual stream.

        Args:
            hidden_states: ``[B, T, d]``, or ``[B, T, M, d]`` for M residual streams.
            input_ids: raw token ids ``[B, T]``; or give
            hash_ids: head indices ``[B, T, H]`` computed before (``mapping.hash``), once for all layers.
            state: what came before these positions; it is brought up to date. None means the sequence starts here.
            attention_mask: ``[B, T]``, zero at padding: such positions neither enter n-grams nor contribute.
            write_mask: bool ``[B, T]``; where it is False no gradient reaches the table (used when teaching).
            trace: a dict that receives ``gate [B, T, M]``, ``value`` and the incoming ``stream`` (both ``[B, T, M, d]``), detached.

        Returns:
            Y in the shape and dtype of ``hidden_states``.

        Raises:
            ConfigError: shapes do not fit, or neither ids are given.
        """
        streams = self._as_streams(hidden_states)
        if hash_ids is None:
            hash_ids = self._hash(hidden_states, input_ids, state, attention_mask)
        elif hash_ids.shape[:2] != hidden_states.shape[:2] or hash_ids.shape[-1] != self.config.num_heads:
            raise ConfigError(
                f"hash_ids: got {list(hash_ids.shape)}, expected {[*hidden_states.shape[:2], self.config.num_heads]}."
            )
        rows = self.multi_head_embedding(hash_ids)
        if write_mask is not None:
            rows = torch.where(write_mask.unsqueeze(-1), rows, rows.detach())
        rows = rows.to(self.value_proj.weight.dtype)
        gate = self._gate(streams.to(rows.dtype), rows)
        value = gate * self.value_proj(rows).unsqueeze(2)
        if attention_mask is not None:
            value = value * attention_mask[:, :, None, None].to(value.dtype)
        if trace is not None:
            trace["gate"], trace["value"], trace["stream"] = gate.detach().squeeze(-1), value.detach(), streams.detach()
        return self._smooth(value, state).reshape(hidden_states.shape).to(hidden_states.dtype)

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
        if input_ids is None:
            raise ConfigError("Engram.forward: got neither input_ids nor hash_ids; the memory is addressed by token ids.")
        if input_ids.shape != hidden_states.shape[:2]:
            raise ConfigError(f"input_ids: got shape {list(input_ids.shape)}, expected {list(hidden_states.shape[:2])}.")
        history = state.ids.last(self.config.max_ngram_size - 1) if state is not None else None
        hash_ids = self.mapping.hash(input_ids, history, attention_mask)[self.layer_id]
        if state is not None:
            masked = input_ids if attention_mask is None else torch.where(attention_mask != 0, input_ids, self.config.pad_id)
            state.ids.append(masked)
        return hash_ids

    def _gate(self, streams: Tensor, rows: Tensor) -> Tensor:
        """Gates ``[B, T, M, 1]``: each stream asks with its own norms and key projection."""
        gates = [
            # Under autocast the projection comes in half precision; the norm and the gate stay in the layer's own.
            context_gate(
                self.norm2[m](streams[:, :, m]), self.norm1[m](self.key_projs[m](rows).to(rows.dtype)), self.config.gate
            )
            for m in range(self.branches)
        ]
        return torch.stack(gates, dim=2)

    def _smooth(self, value: Tensor, state: EngramState | None) -> Tensor:
        """Add the short convolution (equation 5): ``[B, T, M, d]`` to the same shape."""
        if self.short_conv is None:
            return value
        normed = self.short_conv.normalize(value)
        past = None
        if state is not None:
            past = state.conv.last(self.config.conv_reach)
            state.conv.append(normed)
        return value + self.short_conv(normed, past).view_as(value)

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
            raise CheckpointError(f"demo state dict does not fit this layer: {problems}. Check hc_mult, sizes and use_bias.")
        if not torch.equal(state_dict["multi_head_embedding.offsets"].cpu(), own["multi_head_embedding.offsets"].cpu()):
            raise CheckpointError("demo state dict: head offsets differ; it was made with other table sizes, layers or heads.")
        self.load_state_dict(dict(state_dict))
