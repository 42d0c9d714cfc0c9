"""Floor 3: optimisers for tables and what stands around them."""

from engram.optim.build import build_optimizer
from engram.optim.clip import clip_grad_norm_
from engram.optim.divided_state import load_own_state, own_state
from engram.optim.groups import BACKBONE_OPTIMIZERS, build_param_groups
from engram.optim.matrices import matrices_per_parameter
from engram.optim.muon import EngramMuon
from engram.optim.row_state import ROW_STATES, RowMoments
from engram.optim.sparse_adam import EngramAdamW

__all__ = [
    "BACKBONE_OPTIMIZERS",
    "ROW_STATES",
    "EngramAdamW",
    "EngramMuon",
    "RowMoments",
    "build_optimizer",
    "build_param_groups",
    "clip_grad_norm_",
    "load_own_state",
    "matrices_per_parameter",
    "own_state",
]
