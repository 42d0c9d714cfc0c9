"""Kernels in Triton: imported when a CUDA tensor first asks for one, and only where Triton is installed.

Set ``ENGRAM_TRITON=0`` to do without; PyTorch then does the same work.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from functools import cache
from typing import Any

__all__ = ["triton_kernel"]


@cache
def triton_kernel(module: str, name: str) -> Any:
    """The launcher ``name`` of ``module``; None without Triton."""
    if os.environ.get("ENGRAM_TRITON", "1") == "0" or importlib.util.find_spec("triton") is None:
        return None
    return getattr(importlib.import_module(module), name)
