"""What differs between the versions of libraries that ``make oldest`` and ``make test`` run."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import pytest
from packaging.version import Version
from transformers import CONFIG_MAPPING

from engram.testing import TINY_CONFIGS

_TORCH, _TRANSFORMERS = Version(version("torch")), Version(version("transformers"))
_BROKEN_BEFORE = {"dbrx", "nemotron_h", "olmo_hybrid"}
"""Architectures of which transformers 5.14 runs no tiny model, with a memory or without."""

MODEL_TYPES = sorted(
    t for t in TINY_CONFIGS if t in CONFIG_MAPPING and (Version("5.24") <= _TRANSFORMERS or t not in _BROKEN_BEFORE)
)
"""Architectures that this transformers has."""

CAN_CHECKPOINT = Version("5.23") <= _TRANSFORMERS
needs_checkpointing = pytest.mark.skipif(
    not CAN_CHECKPOINT, reason="transformers before 5.23 checkpoints above a memory's hooks"
)

FINDS_OTHERS_ON_A_CPU = Version("5.24") > _TRANSFORMERS
"""Whether a trainer finds the other processes on a machine without a GPU though ``use_cpu`` is not set."""


def needs_torch_2_7(reason: str) -> Any:
    """A mark for tests of what torch 2.6 cannot do."""
    return pytest.mark.skipif(Version("2.7") > _TORCH, reason=f"torch 2.6: {reason}")
