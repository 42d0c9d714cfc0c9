"""What a result was made with."""

from __future__ import annotations

import platform

import torch
import transformers

from engram._version import __version__

__all__ = ["versions"]


def versions() -> dict[str, str]:
    """Versions that a result depends on."""
    return {
        "engram": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
