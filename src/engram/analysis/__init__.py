"""Floor 5: looks inside a model and its memory. Each analysis is a pure function that returns a JSON-ready dict."""

from engram.analysis.cka import cka, soft_alignment
from engram.analysis.gains import gains
from engram.analysis.gates import gates
from engram.analysis.logit_lens import logit_lens
from engram.analysis.look import ANALYSES, look
from engram.analysis.losses import TokenLosses, memory_off, token_losses
from engram.analysis.phrases import phrase_gates
from engram.analysis.rows import row_usage
from engram.analysis.sample import Sample, sample_texts
from engram.analysis.subject import Subject
from engram.analysis.zipf import row_zipf

__all__ = [
    "ANALYSES",
    "Sample",
    "Subject",
    "TokenLosses",
    "cka",
    "gains",
    "gates",
    "logit_lens",
    "look",
    "memory_off",
    "phrase_gates",
    "row_usage",
    "row_zipf",
    "sample_texts",
    "soft_alignment",
    "token_losses",
]
