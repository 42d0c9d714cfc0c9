"""Floor 3: the Engram layer and its parts."""

from engram.layers.conv import ShortConv
from engram.layers.embedding import MultiHeadEmbedding
from engram.layers.engram import Engram, layer_classes
from engram.layers.reader import seeded_signs
from engram.layers.state import EngramState, RollingTail
from engram.layers.trace import GraphTrace, note

__all__ = [
    "Engram",
    "EngramState",
    "GraphTrace",
    "MultiHeadEmbedding",
    "RollingTail",
    "ShortConv",
    "layer_classes",
    "note",
    "seeded_signs",
]
