import gc
import os
import signal

import pytest

from engram.testing import tiny_memory

# Compiled tests ask for the right results, not for fast ones: code without vector instructions is compiled in half the time.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "0")
if hasattr(signal, "SIGHUP"):  # tests that nohup has started would inherit it ignored
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture
def saved(tmp_path):
    memory = tiny_memory()
    memory.save_pretrained(tmp_path / "memory")
    memory.unload()
    return tmp_path / "memory"


def pytest_collection_modifyitems(items):
    """Files with slow tests first: where several processes share the work, none is left with them at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish():
    """What was imported stays: without it every collection (transformers' trainer asks for one in each run) looks at it again, 0.2 s each."""
    gc.collect()
    gc.freeze()
