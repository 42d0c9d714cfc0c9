"""Floor 5: what a memory does to a model, measured."""

from engram.evaluation.answers import (
    Answer,
    CategoryScore,
    ask,
    check_facts,
    compare_answers,
    score_by_category,
    wilson_interval,
)
from engram.evaluation.bits_per_byte import bits_per_byte
from engram.evaluation.copying import measure_copying
from engram.evaluation.drift import Drift, measure_drift
from engram.evaluation.gains import RoutedKind, TextGain, fit_router_to_texts, measure_gains
from engram.evaluation.long_context import (
    RecallAnswer,
    RecallResult,
    RecallScore,
    measure_recall,
    recall_rows,
    recall_table,
    score_recall,
)
from engram.evaluation.ngram_counts import NgramCounts, mixture_weight
from engram.evaluation.result import EvalResult, FactResult, ShareResult, evaluate_memory, markdown_table
from engram.evaluation.trace import Trace, trace_text

__all__ = [
    "Answer",
    "CategoryScore",
    "Drift",
    "EvalResult",
    "FactResult",
    "NgramCounts",
    "RecallAnswer",
    "RecallResult",
    "RecallScore",
    "RoutedKind",
    "ShareResult",
    "TextGain",
    "Trace",
    "ask",
    "bits_per_byte",
    "check_facts",
    "compare_answers",
    "evaluate_memory",
    "fit_router_to_texts",
    "markdown_table",
    "measure_copying",
    "measure_drift",
    "measure_gains",
    "measure_recall",
    "mixture_weight",
    "recall_rows",
    "recall_table",
    "score_by_category",
    "score_recall",
    "trace_text",
    "wilson_interval",
]
