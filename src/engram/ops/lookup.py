"""Row look-up whose gradient holds the touched rows only."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

__all__ = ["lookup_rows"]


def lookup_rows(weight: Tensor, row_ids: Tensor) -> Tensor:
    """Rows ``[..., dim]`` of ``weight [rows, dim]``; the gradient of ``weight`` is a sparse tensor of the rows read.

    A dense gradient would make every training step cost as much as the whole table.
    """
    return F.embedding(row_ids, weight, sparse=True)
