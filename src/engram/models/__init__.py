"""Floor 4: Hugging Face models with a memory. The first floor that may import transformers."""

from engram.models.architectures import ARCHITECTURES, DecoderLayout, find_decoder, register_architecture
from engram.models.bundled import load_bundled, load_model
from engram.models.engram_model import EngramModel, get_engram_model
from engram.models.router import EngramRouter, LearnedRouter, Router, RouteRule
from engram.models.static_decoding import StaticDecoder

__all__ = [
    "ARCHITECTURES",
    "DecoderLayout",
    "EngramModel",
    "EngramRouter",
    "LearnedRouter",
    "RouteRule",
    "Router",
    "StaticDecoder",
    "find_decoder",
    "get_engram_model",
    "load_bundled",
    "load_model",
    "register_architecture",
]
