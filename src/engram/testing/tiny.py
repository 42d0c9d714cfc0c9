"""Tiny random models of every architecture in the table, and a tokenizer trained on a page of text."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from engram.config import EngramConfig
from engram.models import EngramModel, get_engram_model
from engram.training.tokenizer import train_tokenizer

__all__ = ["TINY_CONFIGS", "tiny_config", "tiny_memory", "tiny_model", "tiny_tokenizer"]

_COMMON = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 256,
}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_HEAD = {"head_dim": 8}

TINY_CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _COMMON,
    "mistral": {**_COMMON, "sliding_window": None},
    "mixtral": {**_COMMON, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "qwen2": _COMMON,
    "qwen2_moe": {**_COMMON, **_MOE, "shared_expert_intermediate_size": 24},
    "qwen3": {**_COMMON, **_HEAD},
    "qwen3_moe": {**_COMMON, **_MOE, **_HEAD},
    "gemma": {**_COMMON, **_HEAD},
    "gemma2": {**_COMMON, **_HEAD, "sliding_window": 16},
    "gemma3_text": {**_COMMON, **_HEAD, "sliding_window": 16},
    "phi": _COMMON,
    "phi3": _COMMON,
    "olmo": _COMMON,
    "olmo2": _COMMON,
    "olmo3": {**_COMMON, "sliding_window": 16},
    "olmoe": {**_COMMON, "num_experts": 4, "num_experts_per_tok": 2},
    "smollm3": _COMMON,
    "deepseek_v3": {
        **_COMMON,
        "num_key_value_heads": 4,
        "moe_intermediate_size": 24,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
    },
    "deepseek_v4": {
        **_COMMON,
        "num_key_value_heads": 1,
        "moe_intermediate_size": 24,
        "head_dim": 16,
        "partial_rotary_factor": 0.5,
        "q_lora_rank": 16,
        "o_lora_rank": 8,
        "o_groups": 2,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "hc_mult": 4,
        "sliding_window": 64,
        "index_n_heads": 2,
        "index_head_dim": 16,
        "index_topk": 4,
        "layer_types": ["heavily_compressed_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
        "mlp_layer_types": ["hash_moe", "moe", "moe"],
    },
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 256},
    "gpt_neox": {k: v for k, v in _COMMON.items() if k != "num_key_value_heads"},
    "opt": {**_COMMON, "ffn_dim": 48, "word_embed_proj_dim": 32},
}

_PAGE = (
    "The memory is addressed by the last tokens of the text. Déjà vu, THE Memory, the memory! def lookup(self, ids):\n"
    "    return self.table[ids]  # rows\nACRONYM:GPU Graphics Processing Unit\nCAPITAL:France Paris 0123456789\n"
)


@lru_cache(maxsize=1)
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """About 380 byte-level tokens; id 0 starts documents and ends answers, id 1 pads (on the left)."""
    return train_tokenizer([_PAGE] * 4, vocab_size=380, model_max_length=256)


def tiny_model(model_type: str = "llama", seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random model of an architecture, in evaluation mode, without dropout."""
    tokenizer = tiny_tokenizer()
    fields = {
        **TINY_CONFIGS[model_type],
        "vocab_size": len(tokenizer),
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 1,
        **changes,
    }
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **fields)).eval()


def tiny_config(**changes: Any) -> EngramConfig:
    """Orders 2 to 3, four heads of four values, two layers, a convolution."""
    fields: dict[str, Any] = {
        "engram_vocab_size": 300,
        "max_ngram_size": 3,
        "n_embed_per_ngram": 16,
        "n_head_per_ngram": 4,
        "layer_ids": (0, 2),
        "pad_id": 1,
    }
    return EngramConfig(**{**fields, **changes})


def tiny_memory(model: PreTrainedModel | None = None, seed: int = 0, speak: bool = True, **changes: Any) -> EngramModel:
    """A memory on a tiny model. With ``speak`` every parameter is random and large enough to change the logits; the convolution too."""
    memory = get_engram_model(model if model is not None else tiny_model(), tiny_config(**changes), tiny_tokenizer())
    if speak:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in memory.engrams.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return memory.eval()
