"""Triton kernels without a GPU: a second copy of their module, made while Triton's interpreter is on."""

import importlib.util
import os

import pytest


def load(name):
    """The module ``name`` with interpreted kernels; the tests that ask for it are skipped where Triton is missing."""
    pytest.importorskip("triton", reason="Triton is not installed")
    spec = importlib.util.find_spec(name)
    module = importlib.util.module_from_spec(spec)
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is made, not when it runs
    try:
        spec.loader.exec_module(module)
    finally:
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before
    return module
