import importlib
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def call(monkeypatch):
    """Call a benchmark's ``main`` with these arguments and return its module; without arguments only import it."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def called(name, *arguments, **replaced):
        module = importlib.import_module(name)
        for attribute, value in replaced.items():
            monkeypatch.setattr(module, attribute, value)
        if arguments:
            monkeypatch.setattr(sys, "argv", [f"benchmarks/{name}.py", *map(str, arguments)])
            module.main()
        return module

    return called
