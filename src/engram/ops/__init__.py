"""Floor 1: the layer's formulas as pure functions, each beside a plain reference."""

from engram.ops.conv import causal_depthwise_conv
from engram.ops.dispatch import gather, kernel_serves
from engram.ops.gate import context_gate
from engram.ops.gated import gate_and_smooth, whole_sequences_serve
from engram.ops.lookup import gradient_at, lookup_rows, read_rows
from engram.ops.read import few_positions_serve

__all__ = [
    "causal_depthwise_conv",
    "context_gate",
    "few_positions_serve",
    "gate_and_smooth",
    "gather",
    "gradient_at",
    "kernel_serves",
    "lookup_rows",
    "read_rows",
    "whole_sequences_serve",
]
