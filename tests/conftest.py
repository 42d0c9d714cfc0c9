import pytest

from engram.testing import tiny_memory


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
