"""Where parts of a model compute, those that accelerate has offloaded included."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

__all__ = ["first_real", "input_device", "offloaded_to"]


def input_device(model: Any) -> torch.device:
    """Where token ids go: to the input embeddings' device, or if those are offloaded, where they are brought when they are used.

    What nobody knows is ``meta``.
    """
    embeddings = model.get_input_embeddings()
    return first_real([embeddings.weight.device, *offloaded_to(embeddings)]) or embeddings.weight.device


def first_real(devices: Iterable[torch.device]) -> torch.device | None:
    """The first device that holds numbers."""
    return next((device for device in devices if device.type != "meta"), None)


def offloaded_to(part: nn.Module) -> list[torch.device]:
    """Devices to which accelerate brings the weights of a part when it runs, the part's own hook first."""
    hooks = [module._hf_hook for module in part.modules() if hasattr(module, "_hf_hook")]
    each = [single for hook in hooks for single in (hook, *getattr(hook, "hooks", ()))]
    return [torch.device(h.execution_device) for h in each if getattr(h, "execution_device", None) is not None]
