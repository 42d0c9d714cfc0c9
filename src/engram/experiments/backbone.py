"""The models that experiments train: DeepSeek-V3, DeepSeek-V4 and Llama of transformers, at any size."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, Self

from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers import __version__ as transformers_version

from engram.errors import ConfigError
from engram.experiments.experts import multiply_as_autocast

__all__ = ["BackboneConfig", "build_backbone"]

Architecture = Literal["llama", "deepseek_v3", "deepseek_v4"]


_MOST = 1 << 31  # far from any model, and near enough for torch to count with


@dataclass(frozen=True)
class BackboneConfig:
    """Sizes of a backbone; fields are transformers' own names.

    Raises:
        ConfigError: a value is impossible.
    """

    architecture: Architecture = "deepseek_v3"
    """``llama``: dense. ``deepseek_v3``: latent attention, a leading dense block, then blocks of shared and routed experts.
    ``deepseek_v4``: hyper-connections (``hc_mult`` residual streams) and experts in every block, with plain sliding attention."""
    vocab_size: int = 2048
    hidden_size: int = 128
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    head_dim: int = 32
    """Width of a head's queries, keys and values; for latent attention half of a key is rotated."""
    kv_lora_rank: int = 64
    """Width of the latent that keys and values are made of (``deepseek_v3``), and of V4's query latent."""
    intermediate_size: int = 384
    """Width of a dense feed-forward block (``llama``: all; ``deepseek_v3``: the leading ones)."""
    moe_intermediate_size: int = 64
    """Width of one expert."""
    n_routed_experts: int = 32
    num_experts_per_tok: int = 2
    n_shared_experts: int = 1
    routed_scaling_factor: float = 1.0
    """What the sum of the chosen experts, whose weights add up to 1, is multiplied by before the shared ones are added (DeepSeek-V3: 2.5)."""
    first_k_dense_replace: int = 1
    """Leading blocks without experts (``deepseek_v3``)."""
    hc_mult: int = 4
    """Residual streams (``deepseek_v4``)."""
    max_position_embeddings: int = 512
    attn_implementation: str = "eager"
    """transformers' name of the attention code: ``eager`` is the fastest for short sequences on a CPU, ``sdpa`` for others."""

    def __post_init__(self) -> None:
        if self.architecture not in ("llama", "deepseek_v3", "deepseek_v4"):
            raise ConfigError(
                f"BackboneConfig.architecture: got {self.architecture!r}, expected 'llama', 'deepseek_v3' or 'deepseek_v4'."
            )
        for f in dataclasses.fields(self):
            value, least = getattr(self, f.name), 0 if f.name == "first_k_dense_replace" else 1
            if f.name not in ("architecture", "attn_implementation", "routed_scaling_factor") and (
                not isinstance(value, int) or isinstance(value, bool) or not least <= value < _MOST
            ):
                raise ConfigError(
                    f"BackboneConfig.{f.name}: got {value!r}, expected an int of at least {least} and below 2**31."
                )
        scale = self.routed_scaling_factor
        if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0 < scale < math.inf:
            raise ConfigError(f"BackboneConfig.routed_scaling_factor: got {scale!r}, expected a positive number.")
        if self.attn_implementation not in ("eager", "sdpa"):
            raise ConfigError(
                f"BackboneConfig.attn_implementation: got {self.attn_implementation!r}, expected 'eager' or 'sdpa'."
            )
        if self.head_dim % 4:
            raise ConfigError(f"BackboneConfig.head_dim: got {self.head_dim}, expected a multiple of 4.")
        if self.architecture == "llama" and self.hidden_size % self.num_attention_heads:
            # transformers refuses it although head_dim is given, so that it need not be.
            raise ConfigError(
                f"BackboneConfig.hidden_size: got {self.hidden_size}, expected a multiple of num_attention_heads = "
                f"{self.num_attention_heads} for 'llama'."
            )
        if self.has_experts and not 2 <= self.num_experts_per_tok <= self.n_routed_experts:
            raise ConfigError(
                f"BackboneConfig: got num_experts_per_tok {self.num_experts_per_tok} of n_routed_experts {self.n_routed_experts}, "
                "expected at least 2 and no more than there are."
            )
        if self.architecture == "deepseek_v3" and self.first_k_dense_replace > self.num_hidden_layers:
            raise ConfigError(
                f"BackboneConfig.first_k_dense_replace: got {self.first_k_dense_replace}, expected at most num_hidden_layers = "
                f"{self.num_hidden_layers}."
            )

    @property
    def expert_blocks(self) -> int:
        """Blocks with routed experts."""
        dense = {"llama": self.num_hidden_layers, "deepseek_v3": self.first_k_dense_replace, "deepseek_v4": 0}
        return self.num_hidden_layers - dense[self.architecture]

    @property
    def has_experts(self) -> bool:
        """Whether any block has routed experts."""
        return self.expert_blocks > 0

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed (and checked again)."""
        return dataclasses.replace(self, **changes)

    def to_transformers(
        self, bos_token_id: int = 0, eos_token_id: int = 0, pad_token_id: int | None = None
    ) -> PreTrainedConfig:
        """The configuration transformers builds the model from.

        Raises:
            ConfigError: the installed transformers lacks the architecture.
        """
        if self.architecture not in CONFIG_MAPPING:
            raise ConfigError(
                f"BackboneConfig.architecture: got {self.architecture!r}, which transformers {transformers_version} does not have yet; update "
                "it, or choose another."
            )
        fields = {**self._common(), **getattr(self, f"_{self.architecture}")()}
        return AutoConfig.for_model(
            self.architecture, **fields, bos_token_id=bos_token_id, eos_token_id=eos_token_id, pad_token_id=pad_token_id
        )

    def _common(self) -> dict[str, Any]:
        names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
        return {"tie_word_embeddings": True, **{name: getattr(self, name) for name in names}}

    def _llama(self) -> dict[str, Any]:
        return {
            "intermediate_size": self.intermediate_size,
            "head_dim": self.head_dim,
            "num_key_value_heads": self.num_attention_heads,
        }

    def _experts(self) -> dict[str, Any]:
        names = (
            "moe_intermediate_size",
            "n_routed_experts",
            "num_experts_per_tok",
            "n_shared_experts",
        )
        scale = float(self.routed_scaling_factor)  # YAML writes 2, of which transformers wants 2.0
        return {**{name: getattr(self, name) for name in names}, "routed_scaling_factor": scale}

    def _deepseek_v3(self) -> dict[str, Any]:
        return {
            **self._experts(),
            "intermediate_size": self.intermediate_size,
            "first_k_dense_replace": self.first_k_dense_replace,
            "num_key_value_heads": self.num_attention_heads,
            "n_group": 1,
            "topk_group": 1,
            "q_lora_rank": None,
            "kv_lora_rank": self.kv_lora_rank,
            # Queries, keys and values of one width: fused attention kernels ask for that.
            "qk_nope_head_dim": self.head_dim // 2,
            "qk_rope_head_dim": self.head_dim // 2,
            "v_head_dim": self.head_dim,
        }

    def _deepseek_v4(self) -> dict[str, Any]:
        return {
            **self._experts(),
            "num_key_value_heads": 1,
            "head_dim": self.head_dim,
            "partial_rotary_factor": 0.5,
            "q_lora_rank": self.kv_lora_rank,
            "o_groups": 2,
            "o_lora_rank": self.kv_lora_rank,
            "hc_mult": self.hc_mult,
            # Without the compressed branches, which need contexts far longer than those of small experiments.
            "layer_types": ["sliding_attention"] * self.num_hidden_layers,
            "mlp_layer_types": ["moe"] * self.num_hidden_layers,
            "sliding_window": self.max_position_embeddings,
        }


def build_backbone(config: BackboneConfig, tokenizer: Any = None) -> PreTrainedModel:
    """A fresh model with random weights (torch's global generator), on the default device.

    Args:
        config: its sizes.
        tokenizer: gives the special token ids; 0 and no padding without one.

    Raises:
        ConfigError: the tokenizer has more ids than ``vocab_size``.
    """
    if tokenizer is None:
        return _fresh(config, config.to_transformers())
    if len(tokenizer) > config.vocab_size:
        raise ConfigError(
            f"BackboneConfig.vocab_size: got {config.vocab_size}, expected at least {len(tokenizer)} (tokenizer)."
        )
    ids = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    return _fresh(config, config.to_transformers(*ids))


def _fresh(config: BackboneConfig, sizes: PreTrainedConfig) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_config(sizes, attn_implementation=config.attn_implementation)
    multiply_as_autocast(model)
    return model
