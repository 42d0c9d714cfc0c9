"""Where the blocks of each decoder architecture are. One line per architecture; nothing else in the package knows their names."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from engram.errors import AttachError
from engram.models.positions import text_config

__all__ = ["ARCHITECTURES", "Decoder", "DecoderLayout", "find_decoder", "register_architecture"]


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

ARCHITECTURES: dict[str, DecoderLayout] = {
    "llama": _LLAMA_LIKE,
    "mistral": _LLAMA_LIKE,
    "mixtral": _LLAMA_LIKE,
    "qwen2": _LLAMA_LIKE,
    "qwen2_moe": _LLAMA_LIKE,
    "qwen3": _LLAMA_LIKE,
    "qwen3_moe": _LLAMA_LIKE,
    "gemma": _LLAMA_LIKE,
    "gemma2": _LLAMA_LIKE,
    "gemma3_text": _LLAMA_LIKE,
    "phi": _LLAMA_LIKE,
    "phi3": _LLAMA_LIKE,
    "olmo": _LLAMA_LIKE,
    "olmo2": _LLAMA_LIKE,
    "olmo3": _LLAMA_LIKE,
    "olmoe": _LLAMA_LIKE,
    "smollm3": _LLAMA_LIKE,
    "deepseek_v3": _LLAMA_LIKE,
    "deepseek_v4": DecoderLayout("model", "layers", streams="hc_mult"),
    "gpt2": DecoderLayout("transformer", "h"),
    "gpt_neox": DecoderLayout("gpt_neox", "layers"),
    "opt": DecoderLayout("model.decoder", "layers"),
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

    Raises:
        AttachError: the architecture is known already with another layout.
    """
    if ARCHITECTURES.get(model_type, layout) != layout:
        raise AttachError(f"architecture {model_type!r} is already registered as {ARCHITECTURES[model_type]}.")
    ARCHITECTURES[model_type] = layout


def find_decoder(model: nn.Module) -> Decoder:
    """Locate the decoder of a Hugging Face causal language model.

    Raises:
        AttachError: the architecture is not in the table, or the model does not look as the table says.
    """
    config = getattr(model, "config", None)
    model_type = getattr(config, "model_type", None)
    if config is None or model_type is None:
        raise AttachError(f"got {type(model).__name__}, expected a transformers model with a config (AutoModelForCausalLM).")
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
    text = text_config(config)
    streams = int(getattr(text, layout.streams)) if layout.streams else 1
    return Decoder(module, blocks, int(text.hidden_size), streams)


def _submodule(parent: nn.Module, path: str, model_type: str) -> nn.Module:
    try:
        return parent.get_submodule(path)
    except AttributeError:
        raise AttachError(
            f"{type(parent).__name__} ({model_type}) has no module {path!r}; expected the causal language model "
            "(AutoModelForCausalLM), not its bare decoder and not a wrapper (of a PeftModel, give model.get_base_model())."
        ) from None
