"""Where the blocks of each decoder architecture are. One line per architecture; nothing else in the package knows their names."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from torch import nn

from engram.errors import AttachError
from engram.models.positions import text_config

__all__ = ["ARCHITECTURES", "Decoder", "DecoderLayout", "accepts", "find_decoder", "register_architecture"]

_CONFIG_FIELDS = ("hidden_size", "vocab_size", "num_hidden_layers")
"""What the config of a model must say, beside ``model_type``: a memory's width and the model's identity."""


@dataclass(frozen=True)
class DecoderLayout:
    """Attribute paths, dots included, inside a Hugging Face causal language model."""

    decoder: str
    """The module that is given ids and turns them into hidden states (and owns the KV cache argument)."""
    blocks: str
    """The list of decoder blocks inside it."""
    streams: str | None = None
    """Field of the text config that holds the number of residual streams; None means one."""


_LLAMA_LIKE = DecoderLayout("model", "layers")
_GPT2_LIKE = DecoderLayout("transformer", "h")
_MPT_LIKE = DecoderLayout("transformer", "blocks")
_MAMBA_LIKE = DecoderLayout("backbone", "layers")
_WITH_PICTURES = DecoderLayout("model", "language_model.layers")

ARCHITECTURES: dict[str, DecoderLayout] = {
    "afmoe": _LLAMA_LIKE,
    "apertus": _LLAMA_LIKE,
    "apertus1p5_text": _LLAMA_LIKE,
    "arcee": _LLAMA_LIKE,
    "bamba": _LLAMA_LIKE,
    "bitnet": _LLAMA_LIKE,
    "cohere": _LLAMA_LIKE,
    "cohere2": _LLAMA_LIKE,
    "cohere2_moe": _LLAMA_LIKE,
    "cwm": _LLAMA_LIKE,
    "deepseek_v2": _LLAMA_LIKE,
    "deepseek_v3": _LLAMA_LIKE,
    "deepseek_v32": _LLAMA_LIKE,
    "diffllama": _LLAMA_LIKE,
    "doge": _LLAMA_LIKE,
    "dots1": _LLAMA_LIKE,
    "ernie4_5": _LLAMA_LIKE,
    "ernie4_5_moe": _LLAMA_LIKE,
    "exaone": _LLAMA_LIKE,
    "exaone4": _LLAMA_LIKE,
    "exaone_moe": _LLAMA_LIKE,
    "falcon_h1": _LLAMA_LIKE,
    "flex_olmo": _LLAMA_LIKE,
    "gemma": _LLAMA_LIKE,
    "gemma2": _LLAMA_LIKE,
    "gemma3_text": _LLAMA_LIKE,
    "gemma4_text": _LLAMA_LIKE,
    "glm": _LLAMA_LIKE,
    "glm4": _LLAMA_LIKE,
    "glm4_moe": _LLAMA_LIKE,
    "glm4_moe_lite": _LLAMA_LIKE,
    "glm_moe_dsa": _LLAMA_LIKE,
    "gpt_oss": _LLAMA_LIKE,
    "granite": _LLAMA_LIKE,
    "granite_swa": _LLAMA_LIKE,
    "granitemoe": _LLAMA_LIKE,
    "granitemoe_swa": _LLAMA_LIKE,
    "granitemoehybrid": _LLAMA_LIKE,
    "granitemoeshared": _LLAMA_LIKE,
    "helium": _LLAMA_LIKE,
    "hunyuan_v1_dense": _LLAMA_LIKE,
    "hunyuan_v1_moe": _LLAMA_LIKE,
    "hy_v3": _LLAMA_LIKE,
    "internlm3": _LLAMA_LIKE,
    "iquestcoder": _LLAMA_LIKE,
    "jais2": _LLAMA_LIKE,
    "jamba": _LLAMA_LIKE,
    "kimi_linear": _LLAMA_LIKE,
    "laguna": _LLAMA_LIKE,
    "lara_mini": _LLAMA_LIKE,
    "lfm2": _LLAMA_LIKE,
    "lfm2_moe": _LLAMA_LIKE,
    "lfm3": _LLAMA_LIKE,
    "llama": _LLAMA_LIKE,
    "llama4_text": _LLAMA_LIKE,
    "longcat_flash": _LLAMA_LIKE,
    "mellum": _LLAMA_LIKE,
    "mimo_v2_flash": _LLAMA_LIKE,
    "minicpm3": _LLAMA_LIKE,
    "minimax_m2": _LLAMA_LIKE,
    "ministral": _LLAMA_LIKE,
    "ministral3": _LLAMA_LIKE,
    "mistral": _LLAMA_LIKE,
    "mixtral": _LLAMA_LIKE,
    "nanochat": _LLAMA_LIKE,
    "nemotron": _LLAMA_LIKE,
    "nemotron_h": _LLAMA_LIKE,
    "olmo": _LLAMA_LIKE,
    "olmo2": _LLAMA_LIKE,
    "olmo3": _LLAMA_LIKE,
    "olmo_hybrid": _LLAMA_LIKE,
    "olmoe": _LLAMA_LIKE,
    "persimmon": _LLAMA_LIKE,
    "phi": _LLAMA_LIKE,
    "phi3": _LLAMA_LIKE,
    "phi4_multimodal": _LLAMA_LIKE,
    "phimoe": _LLAMA_LIKE,
    "qwen2": _LLAMA_LIKE,
    "qwen2_moe": _LLAMA_LIKE,
    "qwen3": _LLAMA_LIKE,
    "qwen3_5_moe_text": _LLAMA_LIKE,
    "qwen3_5_text": _LLAMA_LIKE,
    "qwen3_moe": _LLAMA_LIKE,
    "qwen3_next": _LLAMA_LIKE,
    "recurrent_gemma": _LLAMA_LIKE,
    "sarvam_mla": _LLAMA_LIKE,
    "sarvam_moe": _LLAMA_LIKE,
    "seed_oss": _LLAMA_LIKE,
    "smollm3": _LLAMA_LIKE,
    "solar_open": _LLAMA_LIKE,
    "stablelm": _LLAMA_LIKE,
    "starcoder2": _LLAMA_LIKE,
    "vaultgemma": _LLAMA_LIKE,
    "xglm": _LLAMA_LIKE,
    "youtu": _LLAMA_LIKE,
    "zamba2": _LLAMA_LIKE,
    "bloom": _GPT2_LIKE,
    "codegen": _GPT2_LIKE,
    "falcon": _GPT2_LIKE,
    "gpt2": _GPT2_LIKE,
    "gpt_bigcode": _GPT2_LIKE,
    "gpt_neo": _GPT2_LIKE,
    "gptj": _GPT2_LIKE,
    "dbrx": _MPT_LIKE,
    "mpt": _MPT_LIKE,
    "mamba": _MAMBA_LIKE,
    "mamba2": _MAMBA_LIKE,
    "apertus1p5": _WITH_PICTURES,
    "aya_vision": _WITH_PICTURES,
    "cohere2_vision": _WITH_PICTURES,
    "gemma3": _WITH_PICTURES,
    "gemma4": _WITH_PICTURES,
    "gemma4_unified": _WITH_PICTURES,
    "glm4v": _WITH_PICTURES,
    "internvl": _WITH_PICTURES,
    "lfm2_vl": _WITH_PICTURES,
    "llava": _WITH_PICTURES,
    "llava_next": _WITH_PICTURES,
    "mistral3": _WITH_PICTURES,
    "paligemma": _WITH_PICTURES,
    "qwen2_5_vl": _WITH_PICTURES,
    "qwen2_vl": _WITH_PICTURES,
    "qwen3_5": _WITH_PICTURES,
    "qwen3_5_moe": _WITH_PICTURES,
    "qwen3_vl": _WITH_PICTURES,
    "qwen3_vl_moe": _WITH_PICTURES,
    "biogpt": DecoderLayout("biogpt", "layers"),
    "deepseek_v4": DecoderLayout("model", "layers", streams="hc_mult"),
    "gpt_neox": DecoderLayout("gpt_neox", "layers"),
    "gpt_neox_japanese": DecoderLayout("gpt_neox_japanese", "layers"),
    "hy_v4_vl": DecoderLayout("model", "language_model.layers", streams="hc_mult"),
    "idefics3": DecoderLayout("model", "text_model.layers"),
    "opt": DecoderLayout("model.decoder", "layers"),
    "smolvlm": DecoderLayout("model", "text_model.layers"),
}
"""``config.model_type`` -> layout. Grown by ``register_architecture`` only."""


@dataclass(frozen=True)
class Decoder:
    """The parts of one model that a memory hooks into."""

    module: nn.Module
    blocks: nn.ModuleList
    hidden_size: int
    streams: int


def register_architecture(model_type: str, layout: DecoderLayout) -> None:
    """Teach engram where the blocks of another architecture are.

    A transformers model has all else that a memory asks for. A model of your own (any ``nn.Module``) needs

    - ``config`` with ``model_type``, ``hidden_size``, ``vocab_size`` and ``num_hidden_layers``;
    - ``get_input_embeddings()``, whose result has a ``weight [vocabulary, hidden_size]``;
    - a module at ``layout.decoder`` whose ``forward`` takes ``input_ids [B, T]``, first or by name, and in it a ``ModuleList`` at
      ``layout.blocks``, whose members are called with the residual stream ``[B, T, hidden_size]``, first or as ``hidden_states``;
    - padding, if there is any, in the decoder's argument ``attention_mask``, and its past, if it keeps one, in a transformers ``Cache`` by
      one of the names in ``engram.models.cache.CACHE_NAMES``: by another it is not seen, and n-grams begin anew with each call.

    Trainers, evaluation and looks inside call the model with ``input_ids``, ``attention_mask`` and perhaps ``labels``, and read ``logits``
    (and ``loss``) off what it returns.

    Args:
        model_type: the model's ``config.model_type``.
        layout: where decoder and blocks are.

    Raises:
        AttachError: the architecture is known already with another layout.
    """
    if ARCHITECTURES.get(model_type, layout) != layout:
        raise AttachError(f"architecture {model_type!r} is already registered as {ARCHITECTURES[model_type]}.")
    ARCHITECTURES[model_type] = layout


def accepts(module: nn.Module, argument: str) -> bool:
    """Whether a module's ``forward`` can be given an argument by name."""
    parameters = inspect.signature(module.forward).parameters
    return argument in parameters or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())


def find_decoder(model: nn.Module) -> Decoder:
    """Locate the decoder of a Hugging Face causal language model, or of one that has what ``register_architecture`` asks for.

    Raises:
        AttachError: the architecture is not in the table, or the model does not look as the table says.
    """
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):  # a PeftModel has its model's attributes too
        raise AttachError(
            f"got a {type(model).__name__}, expected the model in it: give model.get_base_model(). Its adapters stay in it and at work."
        )
    config: Any = getattr(model, "config", None)
    model_type = getattr(config, "model_type", None)
    if model_type is None:
        raise _lacking(model, ["config.model_type", *_missing(model)])
    layout = ARCHITECTURES.get(model_type)
    if layout is None:
        raise AttachError(
            f"architecture {model_type!r} is not known; known are {', '.join(sorted(ARCHITECTURES))}. "
            "Add it with engram.register_architecture(model_type, DecoderLayout(decoder=..., blocks=...))."
        )
    module = _submodule(model, layout.decoder, model_type)
    blocks = _submodule(module, layout.blocks, model_type)
    if not isinstance(blocks, nn.ModuleList):
        raise AttachError(
            f"{model_type}: {layout.decoder}.{layout.blocks} is a {type(blocks).__name__}, expected a ModuleList."
        )
    if missing := _missing(model):
        raise _lacking(model, missing)
    if not accepts(module, "input_ids"):
        raise _lacking(model, [f"an argument input_ids of {layout.decoder}.forward"])
    text = text_config(config)
    streams = int(getattr(text, layout.streams)) if layout.streams else 1
    return Decoder(module, blocks, int(text.hidden_size), streams)


def _missing(model: nn.Module) -> list[str]:
    """What a model lacks of that which a memory asks of every model."""
    config: Any = getattr(model, "config", None)
    text = None if config is None else text_config(config)
    missing = [f"config.{field}" for field in _CONFIG_FIELDS if getattr(text, field, None) is None]
    try:
        weight = model.get_input_embeddings().weight  # type: ignore[operator]
    except (AttributeError, NotImplementedError):  # the latter is transformers' own answer
        weight = None
    return missing if weight is not None else [*missing, "get_input_embeddings() with a weight"]


def _lacking(model: nn.Module, missing: list[str]) -> AttachError:
    return AttachError(
        f"got a {type(model).__name__} without {', '.join(missing)}; expected a transformers model (AutoModelForCausalLM), or one of your own "
        "that has these (help(engram.register_architecture) lists all)."
    )


def _submodule(parent: nn.Module, path: str, model_type: str) -> nn.Module:
    try:
        return parent.get_submodule(path)
    except AttributeError:
        raise AttachError(
            f"{type(parent).__name__} ({model_type}) has no module {path!r}; expected the causal language model "
            "(AutoModelForCausalLM), not its bare decoder and not a wrapper."
        ) from None
