"""Tiny random models of every architecture in the table, and a tokenizer trained on a page of text."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerFast

from engram.config import EngramConfig
from engram.models import EngramModel, get_engram_model
from engram.models.bundled import auto_class
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
_MANY_HEADS = {key: value for key, value in _COMMON.items() if key != "num_key_value_heads"}
_HEAD = {"head_dim": 8}
_WINDOW = {"sliding_window": 16}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_LOCAL_MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
_ROUTED_MOE = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "first_k_dense_replace": 1}
_GPT2 = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 256}
_LATENT = {
    **_COMMON,
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
_DEEPSEEK = {**_LATENT, **_ROUTED_MOE, "n_group": 1, "topk_group": 1}
_INDEXER = {"index_n_heads": 2, "index_head_dim": 16, "index_topk": 4}
_DELTA = {
    **_HEAD,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "linear_attention", "full_attention"],
}
_MAMBA = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_expand": 2,
    "mamba_chunk_size": 8,
}
_MAMBA_ALONE = {"hidden_size": 32, "num_hidden_layers": 3, "state_size": 8}
_SHORT_CONV = {"layer_types": ["conv", "full_attention", "conv"]}
_GEMMA4 = {
    **_COMMON,
    **_HEAD,
    **_WINDOW,
    "global_head_dim": 8,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 380,
    "final_logit_softcapping": 30.0,
    "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    "num_kv_shared_layers": 1,
}
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_PATCHES = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "depth": 1,
    "num_heads": 2,
    "embed_dim": 16,
    "out_hidden_size": 32,
    "patch_size": 14,
}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_THREE_AXES = {"mrope_section": [1, 1, 2]}
_PICTURE_TOKENS = {
    "image_token_id": 370,
    "image_token_index": 370,
    "video_token_id": 371,
    "vision_start_token_id": 372,
    "vision_end_token_id": 373,
}


def _with_pictures(text: str, fields: dict[str, Any], vision: dict[str, Any] = _VISION) -> dict[str, Any]:
    """Of a model with a text part of type ``text`` and a part that sees."""
    return {"text_config": {"model_type": text, **fields}, "vision_config": vision, **_PICTURE_TOKENS}


TINY_CONFIGS: dict[str, dict[str, Any]] = {
    "apertus": _COMMON,
    "arcee": _COMMON,
    "bamba": {**_COMMON, **_MAMBA, "attn_layer_indices": [1]},
    "cohere": _COMMON,
    "cohere2": {**_COMMON, **_WINDOW},
    "deepseek_v2": {**_DEEPSEEK, "topk_method": "greedy"},
    "deepseek_v3": _DEEPSEEK,
    "deepseek_v32": {**_DEEPSEEK, **_INDEXER},
    "ernie4_5": {**_COMMON, **_HEAD},
    "ernie4_5_moe": {**_COMMON, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 24, "moe_layer_start_index": 1},
    "exaone4": {**_COMMON, **_WINDOW},
    "exaone_moe": {**_COMMON, **_MOE, **_HEAD, **_WINDOW},
    "falcon_h1": {**_COMMON, **_HEAD, **_MAMBA, "mamba_d_ssm": 64, "lm_head_multiplier": 0.5},
    "gemma": {**_COMMON, **_HEAD},
    "gemma2": {**_COMMON, **_HEAD, **_WINDOW},
    "gemma3_text": {**_COMMON, **_HEAD, **_WINDOW},
    "gemma4_text": _GEMMA4,
    "glm": {**_COMMON, **_HEAD},
    "glm4": {**_COMMON, **_HEAD},
    "glm4_moe": {**_COMMON, **_HEAD, **_ROUTED_MOE},
    "glm4_moe_lite": _DEEPSEEK,
    "glm_moe_dsa": {**_DEEPSEEK, **_INDEXER, "indexer_types": ["full", "shared", "full"]},
    "gpt_oss": {
        **_COMMON,
        **_HEAD,
        **_LOCAL_MOE,
        **_WINDOW,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "granite": {**_COMMON, "logits_scaling": 8.0},
    "granitemoe": {**_COMMON, **_LOCAL_MOE},
    "granitemoehybrid": {
        **_COMMON,
        **_MAMBA,
        **_LOCAL_MOE,
        "shared_intermediate_size": 24,
        "layer_types": ["mamba", "attention", "mamba"],
    },
    "helium": {**_COMMON, **_HEAD},
    "hunyuan_v1_dense": {**_COMMON, **_HEAD},
    "hunyuan_v1_moe": {**_COMMON, **_HEAD, "num_experts": 4, "moe_topk": 2},
    "internlm3": {**_COMMON, **_HEAD},
    "jamba": {
        **_COMMON,
        "num_experts": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    },
    "kimi_linear": {
        **_DEEPSEEK,
        "q_lora_rank": None,
        "num_local_experts": 4,
        "linear_head_dim": 8,
        "linear_num_heads": 4,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    },
    "lfm2": {**_COMMON, **_SHORT_CONV},
    "lfm2_moe": {**_COMMON, **_MOE, **_SHORT_CONV, "num_dense_layers": 1},
    "llama": _COMMON,
    "llama4_text": {**_COMMON, **_HEAD, "num_local_experts": 4, "intermediate_size_mlp": 48},
    "longcat_flash": {
        **{key: value for key, value in _LATENT.items() if key != "num_hidden_layers"},
        **_HEAD,
        "num_layers": 3,
        "n_routed_experts": 4,
        "zero_expert_num": 2,
        "moe_topk": 2,
        "ffn_hidden_size": 48,
        "expert_ffn_hidden_size": 24,
    },
    "mimo_v2_flash": {**_COMMON, **_HEAD, **_WINDOW, **_ROUTED_MOE, "v_head_dim": 8},
    "minicpm3": {**_LATENT, "dim_model_base": 16},
    "minimax_m2": {**_COMMON, **_HEAD, **_LOCAL_MOE},
    "ministral": {**_COMMON, **_HEAD, **_WINDOW},
    "ministral3": {**_COMMON, **_HEAD},
    "mistral": {**_COMMON, "sliding_window": None},
    "mixtral": {**_COMMON, **_LOCAL_MOE, "sliding_window": None},
    "nanochat": _COMMON,
    "nemotron": _COMMON,
    "nemotron_h": {
        **_COMMON,
        **_HEAD,
        "ssm_state_size": 8,
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "n_groups": 1,
        "chunk_size": 8,
        "use_mamba_kernels": False,
        "layers_block_type": ["mamba", "attention", "mlp"],
    },
    "olmo": _COMMON,
    "olmo2": _COMMON,
    "olmo3": {**_COMMON, **_WINDOW},
    "olmo_hybrid": _COMMON,
    "olmoe": {**_COMMON, "num_experts": 4, "num_experts_per_tok": 2},
    "phi": _COMMON,
    "phi3": _COMMON,
    "phi4_multimodal": {
        **_COMMON,
        "vision_config": {**_VISION, "num_hidden_layers": 2, "image_token_id": 370},
        "audio_config": {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_blocks": 1,
            "num_attention_heads": 2,
            "ext_pw_out_channel": 16,
            "depthwise_separable_out_channel": 16,
            "nemo_conv_channels": 16,
            "audio_token_id": 371,
        },
    },
    "phimoe": {**_COMMON, **_LOCAL_MOE},
    "qwen2": _COMMON,
    "qwen2_moe": {**_COMMON, **_MOE, "shared_expert_intermediate_size": 24},
    "qwen3": {**_COMMON, **_HEAD},
    "qwen3_5_moe_text": {**_COMMON, **_MOE, **_DELTA, "shared_expert_intermediate_size": 24},
    "qwen3_5_text": {**_COMMON, **_DELTA},
    "qwen3_moe": {**_COMMON, **_MOE, **_HEAD},
    "qwen3_next": {**_COMMON, **_MOE, **_DELTA, "shared_expert_intermediate_size": 24},
    "seed_oss": {**_COMMON, **_HEAD},
    "smollm3": _COMMON,
    "stablelm": _COMMON,
    "starcoder2": _COMMON,
    "xglm": {"d_model": 32, "ffn_dim": 48, "num_layers": 3, "attention_heads": 4, "max_position_embeddings": 256},
    "zamba2": {
        **_COMMON,
        "n_mamba_heads": 8,
        "mamba_headdim": 8,
        "mamba_d_state": 8,
        "mamba_ngroups": 1,
        "chunk_size": 8,
        "num_mem_blocks": 1,
        "use_mamba_kernels": False,
        "layers_block_type": ["mamba", "hybrid", "mamba"],
    },
    "bloom": {"hidden_size": 32, "n_layer": 3, "n_head": 4},
    "codegen": {**_GPT2, "rotary_dim": 4},
    "falcon": _MANY_HEADS,
    "gpt2": _GPT2,
    "gpt_bigcode": _GPT2,
    "gpt_neo": {
        "hidden_size": 32,
        "num_layers": 3,
        "num_heads": 4,
        "max_position_embeddings": 256,
        "attention_types": [[["global", "local"], 1], [["global"], 1]],
        "window_size": 16,
    },
    "gptj": {**_GPT2, "rotary_dim": 4},
    "dbrx": {
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 3,
        "max_seq_len": 256,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10_000.0, "clip_qkv": 8},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 3, "max_seq_len": 256},
    "mamba": _MAMBA_ALONE,
    "mamba2": {**_MAMBA_ALONE, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8},
    "gemma3": {
        "text_config": {**_COMMON, **_HEAD, **_WINDOW},
        "vision_config": _VISION,
        "mm_tokens_per_image": 4,
        "image_token_index": 370,
        "boi_token_index": 371,
        "eoi_token_index": 372,
    },
    "gemma4": {
        "text_config": _GEMMA4,
        "vision_config": {**_VISION, "num_key_value_heads": 2, "head_dim": 8, "position_embedding_size": 64},
        "image_token_id": 370,
        "boi_token_id": 371,
        "eoi_token_id": 372,
        "video_token_id": 373,
        "audio_token_id": 374,
    },
    "deepseek_v4": {
        **_COMMON,
        **_INDEXER,
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
        "layer_types": ["heavily_compressed_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
        "mlp_layer_types": ["hash_moe", "moe", "moe"],
    },
    "gpt_neox": _MANY_HEADS,
    "opt": {**_COMMON, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "afmoe": {
        **_COMMON,
        **_HEAD,
        **_MOE,
        **_WINDOW,
        "num_dense_layers": 1,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "biogpt": _MANY_HEADS,
    "bitnet": _COMMON,
    "cohere2_moe": {**_COMMON, **_MOE, **_WINDOW},
    "cwm": {**_COMMON, **_HEAD, "rope_parameters": _ROPE},
    "diffllama": {**_COMMON, **_HEAD},
    "doge": {**_COMMON, **_HEAD},
    "dots1": {
        **_COMMON,
        **_HEAD,
        **_ROUTED_MOE,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "layer_types": ["full_attention"] * 3,
    },
    "flex_olmo": {**_COMMON, "num_experts": 4, "num_experts_per_tok": 2},
    "gpt_neox_japanese": {**_MANY_HEADS, "intermediate_multiple_size": 2},
    "granite_swa": {**_COMMON, **_WINDOW},
    "granitemoe_swa": {**_COMMON, **_LOCAL_MOE, **_WINDOW},
    "granitemoeshared": {**_COMMON, **_LOCAL_MOE, "shared_intermediate_size": 24},
    "hy_v3": {**_COMMON, **_HEAD, **_MOE},
    "iquestcoder": _COMMON,
    "jais2": _COMMON,
    "laguna": {**_COMMON, **_HEAD, **_MOE},
    "lfm3": _COMMON,
    "mellum": {**_COMMON, **_HEAD, **_MOE},
    "persimmon": _MANY_HEADS,
    "recurrent_gemma": {**_COMMON, "lru_width": 32, "attention_window_size": 16},
    "solar_open": {**_COMMON, **_HEAD, **_ROUTED_MOE},
    "vaultgemma": {**_COMMON, **_HEAD, **_WINDOW},
    "youtu": _DEEPSEEK,
    "aya_vision": _with_pictures("cohere2", _COMMON),
    "cohere2_vision": _with_pictures("cohere2", _COMMON),
    "gemma4_unified": _with_pictures("gemma4_unified_text", _GEMMA4),
    "glm4v": _with_pictures(
        "glm4v_text", {**_COMMON, "rope_parameters": {**_ROPE, **_THREE_AXES, "partial_rotary_factor": 1.0}}, _PATCHES
    ),
    "idefics3": _with_pictures("llama", _COMMON),
    "internvl": _with_pictures("qwen2", _COMMON, {**_VISION, "image_size": [28, 28], "patch_size": [14, 14]}),
    "lfm2_vl": _with_pictures("lfm2", {**_COMMON, **_SHORT_CONV}),
    "llava": _with_pictures("llama", _COMMON, {"model_type": "clip_vision_model", **_VISION}),
    "llava_next": _with_pictures("llama", _COMMON, {"model_type": "clip_vision_model", **_VISION}),
    "mistral3": _with_pictures("mistral", {**_COMMON, **_HEAD}, {"model_type": "pixtral", **_VISION, "image_size": 56}),
    "paligemma": _with_pictures("gemma", {**_COMMON, **_HEAD}),
    "qwen2_5_vl": _with_pictures("qwen2_5_vl_text", {**_COMMON, "rope_parameters": {**_ROPE, **_THREE_AXES}}, _PATCHES),
    "qwen2_vl": _with_pictures(
        "qwen2_vl_text", {**_COMMON, "rope_parameters": {**_ROPE, **_THREE_AXES}}, {**_PATCHES, "hidden_size": 32}
    ),
    "qwen3_5": _with_pictures("qwen3_5_text", {**_COMMON, **_DELTA}, _PATCHES),
    "qwen3_5_moe": _with_pictures(
        "qwen3_5_moe_text", {**_COMMON, **_DELTA, **_MOE, "shared_expert_intermediate_size": 24}, _PATCHES
    ),
    "qwen3_vl": _with_pictures(
        "qwen3_vl_text",
        {**_COMMON, **_HEAD, "rope_parameters": {**_ROPE, **_THREE_AXES}},
        {**_PATCHES, "deepstack_visual_indexes": [0]},
    ),
    "qwen3_vl_moe": _with_pictures(
        "qwen3_vl_moe_text",
        {**_COMMON, **_HEAD, **_MOE, "rope_parameters": {**_ROPE, **_THREE_AXES}},
        {**_PATCHES, "deepstack_visual_indexes": [0]},
    ),
    "smolvlm": _with_pictures("llama", _COMMON),
    "apertus1p5_text": {**_COMMON, "rope_parameters": _ROPE},
    "apertus1p5": {
        **_with_pictures(
            "apertus1p5_text",
            {**_COMMON, "rope_parameters": _ROPE},
            {"codebook_size": 4, "embed_dim": 8, "base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1},
        ),
        "audio_config": {
            "model_type": "wavtokenizer_encoder",
            "num_filters": 4,
            "hidden_size": 16,
            "codebook_size": 4,
            "codebook_dim": 16,
        },
        "image_token_offset": 360,
        "audio_token_offset": 364,
    },
    "exaone": _COMMON,
    "hy_v4_vl": _with_pictures(
        "hy_v4_vl_text",
        {
            **_DEEPSEEK,
            **_INDEXER,
            "indexer_types": ["full", "shared", "full"],
            "qk_rope_head_dim": 8,
            "rope_parameters": {**_ROPE, **_THREE_AXES},
        },
    ),
    "lara_mini": {
        **_COMMON,
        **_MOE,
        **_DELTA,
        "shared_expert_intermediate_size": 24,
        "sliding_window": 64,
        "layer_types": ["linear_attention", "sliding_attention", "full_attention"],
    },
    "sarvam_mla": _DEEPSEEK,
    "sarvam_moe": {**_COMMON, **_HEAD, **_ROUTED_MOE},
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
    """A random model of an architecture, in evaluation mode, without dropout; ``changes`` are to its text part if it takes pictures too."""
    config = TINY_CONFIGS[model_type]
    ids = {"vocab_size": len(tiny_tokenizer()), "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
    text = {**config.get("text_config", config), **ids, **changes}
    fields = {**config, "text_config": text} if "text_config" in config else text
    torch.manual_seed(seed)
    made = AutoConfig.for_model(model_type, **fields)
    return auto_class(made).from_config(made).eval()


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
