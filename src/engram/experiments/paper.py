"""What the paper measured (arXiv:2601.07372): losses in nats per token, shares between 0 and 1."""

from __future__ import annotations

from typing import Any

__all__ = ["PAPER"]

PAPER: dict[str, Any] = {
    "source": "arXiv:2601.07372",
    "allocation": {
        "6e20 FLOPs": {
            "scale": "6e20 FLOPs, 9.9B parameters of which 0.99B active",
            "loss": {1.0: 1.7248, 0.95: 1.7130, 0.85: 1.7095, 0.80: 1.7109, 0.75: 1.7126, 0.60: 1.7136, 0.40: 1.7247},
        },
        "2e20 FLOPs": {"scale": "2e20 FLOPs", "loss": {1.0: 1.8292, 0.85: 1.8155, 0.75: 1.8177, 0.40: 1.8275}},
    },
    "optimum": {"text": (0.75, 0.80), "plotted": 0.85},
    "slots": {"none": 1.808, "loss": {2.6e5: 1.788, 6.5e5: 1.776, 1.3e6: 1.768, 2.6e6: 1.760, 6.5e6: 1.748, 1.0e7: 1.743}},
    "ablation": {
        "none": 1.808,
        "reference": 1.768,
        "layers": {1: 1.773, 2: 1.770, 5: 1.779, 12: 1.782},
        "changes": {
            "branch_gates": ("without branch-specific gates", 0.0064),
            "compression": ("without compression", 0.0057),
            "gating": ("without gating", 0.0046),
            "four_grams": ("with 4-grams at equal budget", 0.0017),
            "convolution": ("without convolution", 0.0005),
        },
    },
    "comparison": {"scale": "27B", "engram": 1.622, "experts": 1.634},
    "tasks": {
        "MMLU": (60.4, 57.4),
        "BBH": (55.9, 50.9),
        "ARC-C": (73.8, 70.1),
        "HumanEval": (40.8, 37.8),
        "MATH": (30.7, 28.3),
    },
    "recall": {"multi_query": (0.970, 0.842), "tracking": (0.890, 0.770)},
    "kept_with_memory_off": {"factual": (0.29, 0.44), "reading": (0.81, 0.93)},
    "similar_layers": (5, 12),
    "throughput": {"4B": -0.019, "8B": -0.028},
}
"""``layers``: one module at that layer, counted from 1. ``tasks`` and ``recall``: with Engram and with experts alone, both of 27B
parameters.
``similar_layers``: this layer with Engram resembles that one with experts alone. ``throughput``: of inference with a table of 100B
parameters in host memory, on an H800, by size of the backbone."""
