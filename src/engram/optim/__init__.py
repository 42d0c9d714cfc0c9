"""Floor 3: optimisers for tables."""

from engram.optim.clip import clip_grad_norm_
from engram.optim.groups import build_param_groups
from engram.optim.row_state import ROW_STATES, RowMoments
from engram.optim.sparse_adam import EngramAdamW

__all__ = ["ROW_STATES", "EngramAdamW", "RowMoments", "build_param_groups", "clip_grad_norm_"]
