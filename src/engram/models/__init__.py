"""Floor 4: Hugging Face models with a memory. The first floor that may import transformers."""

from typing import TYPE_CHECKING

from engram.lazy import loaded_on_use

if TYPE_CHECKING:
    from engram.models.architectures import ARCHITECTURES, DecoderLayout, find_decoder, register_architecture
    from engram.models.bundled import load_bundled, load_model
    from engram.models.engram_model import EngramModel, get_engram_model
    from engram.models.fsdp import shard_model
    from engram.models.peft_files import load_adapters
    from engram.models.placed import PlacedEmbedding, load_placed, place_embeddings
    from engram.models.router import EngramRouter, LearnedRouter, Router, RouteRule
    from engram.models.static_decoding import StaticDecoder
    from engram.models.transfer import TransferredLayer, transfer_memory

_HOMES = {
    "ARCHITECTURES": "engram.models.architectures",
    "DecoderLayout": "engram.models.architectures",
    "EngramModel": "engram.models.engram_model",
    "EngramRouter": "engram.models.router",
    "LearnedRouter": "engram.models.router",
    "PlacedEmbedding": "engram.models.placed",
    "RouteRule": "engram.models.router",
    "Router": "engram.models.router",
    "StaticDecoder": "engram.models.static_decoding",
    "TransferredLayer": "engram.models.transfer",
    "find_decoder": "engram.models.architectures",
    "get_engram_model": "engram.models.engram_model",
    "load_adapters": "engram.models.peft_files",
    "load_bundled": "engram.models.bundled",
    "load_model": "engram.models.bundled",
    "load_placed": "engram.models.placed",
    "place_embeddings": "engram.models.placed",
    "register_architecture": "engram.models.architectures",
    "shard_model": "engram.models.fsdp",
    "transfer_memory": "engram.models.transfer",
}

__all__ = sorted(_HOMES)

__getattr__ = loaded_on_use(__name__, _HOMES)


def __dir__() -> list[str]:
    return __all__
