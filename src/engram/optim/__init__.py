"""Floor 3: optimisers for tables."""

from engram.optim.clip import clip_grad_norm_
from engram.optim.groups import build_param_groups
from engram.optim.sparse_adam import EngramAdamW, RowMoments

__all__ = ["EngramAdamW", "RowMoments", "build_param_groups", "clip_grad_norm_"]
