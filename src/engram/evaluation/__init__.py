"""Floor 5: what a memory does to a model, measured."""

from engram.evaluation.answers import Answer, CategoryScore, ask, check_facts, score_by_category
from engram.evaluation.bits_per_byte import bits_per_byte
from engram.evaluation.drift import Drift, measure_drift
from engram.evaluation.trace import Trace, trace_text

__all__ = [
    "Answer",
    "CategoryScore",
    "Drift",
    "Trace",
    "ask",
    "bits_per_byte",
    "check_facts",
    "measure_drift",
    "score_by_category",
    "trace_text",
]
