"""Which parameters of a model are matrices of hidden layers, and how many matrices each of them holds."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from torch import nn

__all__ = ["matrices_per_parameter"]

_ROUTER_NAMES = re.compile(r"(^|\.)(gate|router|shared_expert_gate)$")
_FUSED = "gate_up_proj"


def matrices_per_parameter(model: nn.Module) -> dict[int, int]:
    """For the id of each parameter that Muon may step: how many matrices stand one above the other in it (in each matrix of a stack).

    Those are the weights of hidden layers: matrices ``[out, in]`` and stacks of experts ``[E, out, in]``. AdamW keeps what is no linear map
    between hidden states: embeddings, the output head (tied or not), routers of experts and the mixing of hyper-connections, whose few
    rows are logits; vectors, matrices of a single row, and convolutions.

    Gate and up projections that a model keeps fused (``gate_up_proj``) count as two matrices, so that a model steps alike whether
    it fuses them or not; a block-diagonal layer counts as its blocks. Other fused projections (query, key and value in one) count as one.
    """
    kept = {id(p) for module in _embeddings_and_heads(model) for p in module.parameters(recurse=False)}
    found: dict[int, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.conv._ConvNd) or _is_router(name, module):
            continue
        experts = "Expert" in type(module).__name__
        for own_name, p in module.named_parameters(recurse=False):
            is_weight = (p.dim() == 2 and own_name == "weight") or (p.dim() == 3 and experts and not own_name.endswith("bias"))
            if is_weight and min(p.shape[-2:]) > 1 and id(p) not in kept:
                found[id(p)] = _parts(f"{name}.{own_name}", module, p.shape[-2])
    return found


def _parts(name: str, module: Any, rows: int) -> int:
    if _FUSED in name.split("."):
        # Some models store their experts transposed or the two projections interleaved: not one above the other.
        whole = getattr(module, "is_transposed", False) or not getattr(module, "is_concatenated", True)
        return 1 if whole or rows % 2 else 2
    blocks = getattr(module, "n_groups", 1) if isinstance(module, nn.Linear) else 1
    return blocks if isinstance(blocks, int) and blocks > 0 and rows % blocks == 0 else 1


def _is_router(name: str, module: nn.Module) -> bool:
    return "Router" in type(module).__name__ or _ROUTER_NAMES.search(name) is not None


def _embeddings_and_heads(model: nn.Module) -> Iterator[nn.Module]:
    for module in model.modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            yield module
        with suppress(AttributeError, NotImplementedError, TypeError):  # part of a model that has neither
            head = module.get_output_embeddings()  # type: ignore[operator]
            if isinstance(head, nn.Module):
                yield head
