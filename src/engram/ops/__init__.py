"""Floor 1: the layer's formulas as pure functions, each beside a plain reference."""

from engram.ops.conv import causal_depthwise_conv
from engram.ops.gate import context_gate
from engram.ops.lookup import lookup_rows
from engram.ops.read import few_positions_serve

__all__ = ["causal_depthwise_conv", "context_gate", "few_positions_serve", "lookup_rows"]
