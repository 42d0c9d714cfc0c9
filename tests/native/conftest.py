import pytest
import torch


@pytest.fixture(autouse=True)
def two_threads():
    """However many the whole run has: work is shared here wherever it is large enough."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
