"""Whoever stands between PyTorch and its memory (fake tensors, traces, maps, divided tensors) gets PyTorch's own operations."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from engram import EngramAdamW
from engram.native import have_addresses
from engram.tables import DeviceTable
from tests.children import run_python

IDS = torch.tensor([1, 4, 1])


@pytest.fixture
def table():
    table = DeviceTable(50, 8).requires_grad_(False)
    table.load_rows(0, torch.arange(400.0).view(50, 8))
    return table


def test_fake_tensors_are_not_read(table):
    """In a process of its own: it used to be killed."""
    program = """
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from engram import EngramAdamW
from engram.tables import DeviceTable
with FakeTensorMode(allow_non_fake_inputs=True):
    table = DeviceTable(50, 8)
    rows = table.lookup(torch.tensor([1, 4]))
    rows.sum().backward()
    print(list(rows.shape))
"""
    done = run_python("-c", program)
    assert done.stdout == "[2, 8]\n", done.stderr


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
def test_recorded_and_traced_look_ups_give_rows(table):
    others = torch.tensor([7, 8, 9])
    recorded = make_fx(lambda ids: table.lookup(ids))(IDS)
    assert torch.equal(recorded(others), table.lookup(others))
    traced = torch.jit.trace(Reader(table), IDS, check_trace=False)
    assert torch.equal(traced(others), table.lookup(others))


class Reader(torch.nn.Module):
    def __init__(self, table):
        super().__init__()
        self.table = table

    def forward(self, ids):
        return self.table.lookup(ids)


def test_look_ups_are_mapped_over(table):
    ids = torch.tensor([[4, 5], [6, 7]])
    assert torch.equal(torch.func.vmap(table.lookup)(ids), table.lookup(ids))


def test_what_has_addresses():
    class Mine(torch.Tensor):
        pass

    plain, parameter = torch.zeros(3), torch.nn.Parameter(torch.zeros(3))
    assert have_addresses(plain, parameter)
    assert not have_addresses(plain, plain.as_subclass(Mine))
    with FakeTensorMode():
        assert not have_addresses(plain)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [64, 100_000])
def test_steps_do_not_depend_on_the_default_type(default, rows):
    """A counter in bfloat16 would stop at 256."""

    def trained(dtype):
        torch.set_default_dtype(dtype)
        try:
            table = DeviceTable(rows, 4, dtype=torch.float32)
            optimizer = EngramAdamW(table.parameters(), lr=1e-3)
            for _ in range(300):
                table.lookup(torch.tensor([3, 5])).sum().backward()
                optimizer.step()
                optimizer.zero_grad()
            return table.weight.detach()[:8], optimizer.state[table.weight]["step"]
        finally:
            torch.set_default_dtype(torch.float32)

    (expected, steps), (got, counted) = trained(torch.float32), trained(default)
    assert counted == steps == 300
    assert counted.dtype == torch.float32
    assert torch.equal(got, expected)
