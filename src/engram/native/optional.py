"""Kernels in Triton: imported when a CUDA tensor first asks for one, and only where Triton is installed.

Set ``ENGRAM_TRITON=0`` to do without; PyTorch then does the same work.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
from functools import cache
from typing import Any

import torch

from engram.errors import reason_of

__all__ = ["triton_kernel"]


@cache
def triton_kernel(module: str, name: str) -> Any:
    """The launcher ``name`` of ``module``; None without Triton, or where it cannot launch anything."""
    if os.environ.get("ENGRAM_TRITON", "1") == "0" or importlib.util.find_spec("triton") is None or not _can_launch():
        return None
    return getattr(importlib.import_module(module), name)


@cache
def _can_launch() -> bool:
    """Whether Triton has its driver, which it compiles at the first use; without a C compiler, say, it has none, and that is said once."""
    if not torch.cuda.is_available():  # its interpreter, if anything
        return True
    try:
        _ = importlib.import_module("triton.runtime").driver.active
    except Exception as error:
        logging.getLogger("engram").warning(
            "Triton cannot be used here (%s): PyTorch does its work, more slowly. ENGRAM_TRITON=0 silences this.",
            reason_of(error),
        )
        return False
    return True
