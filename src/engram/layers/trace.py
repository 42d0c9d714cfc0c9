"""What a layer tells of a forward pass."""

from __future__ import annotations

from torch import Tensor

__all__ = ["GraphTrace", "note"]


class GraphTrace(dict[str, Tensor]):
    """A trace whose tensors keep their graph, so that gradients pass through them; those of a plain dict are detached."""


def note(trace: dict[str, Tensor] | None, **tensors: Tensor) -> None:
    """Put tensors into a trace, if there is one, by their names."""
    if trace is not None:
        keep = isinstance(trace, GraphTrace)
        trace.update({name: tensor if keep else tensor.detach() for name, tensor in tensors.items()})
