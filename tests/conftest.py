import pytest

from engram.testing import tiny_memory


@pytest.fixture
def saved(tmp_path):
    memory = tiny_memory()
    memory.save_pretrained(tmp_path / "memory")
    memory.unload()
    return tmp_path / "memory"
