"""What a result was made with."""

from __future__ import annotations

import os
import platform
from typing import Any

import torch
import transformers

from engram._version import __version__
from engram.distributed import process_count

__all__ = ["made_with", "versions"]


def made_with() -> dict[str, Any]:
    """The device and versions that one run used; a sweep may be run in parts and on several machines."""
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        device = f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    return {"device": device, **_several(), "versions": versions()}


def _several() -> dict[str, int]:
    return {"processes": process_count()} if process_count() > 1 else {}


def versions() -> dict[str, str]:
    """Versions that a result depends on."""
    return {
        "engram": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
