"""Large outputs whose memory is used again, once nobody can see it any more."""

import gc

import pytest
import torch

from engram.ops import lookup_rows, outputs

CPU = torch.device("cpu")
LARGE = (1 << 23,)  # 32 MB of float32


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch):
    monkeypatch.setattr(outputs, "_free", [])


def new(shape=LARGE, dtype=torch.float32):
    return outputs.new_output(shape, dtype, CPU)


def test_memory_is_used_again_when_the_last_tensor_in_it_is_gone():
    first, second = new(), new()
    place, view = first.data_ptr(), first[5:9].view(2, 2)
    first.fill_(1)
    assert place % 64 == 0
    assert second.data_ptr() != place
    del first
    third = new().fill_(2)  # the view still sees the first
    assert third.data_ptr() != place
    assert bool((view == 1).all())
    del view
    again = new((1 << 22, 4), torch.bfloat16)
    assert again.data_ptr() == place
    assert (again.shape, again.dtype, again.is_contiguous()) == ((1 << 22, 4), torch.bfloat16, True)


def test_a_graph_keeps_what_its_backward_pass_reads():
    table = torch.ones(4, 64, requires_grad=True)
    row_ids = torch.zeros(1 << 17, dtype=torch.int64)
    loss = lookup_rows(table, row_ids).square().sum()
    gc.collect()
    new().fill_(7)  # would fall on the saved rows, were they free
    loss.backward()
    assert table.grad.to_dense()[0].tolist() == [2.0 * len(row_ids)] * 64


@pytest.mark.parametrize("rows", [1 << 10, 1 << 17])
def test_rows_may_be_changed_in_place_whatever_their_number(rows):
    table = torch.ones(4, 64, requires_grad=True)
    found = lookup_rows(table, torch.zeros(rows, dtype=torch.int64))
    found.mul_(2)
    found.sum().backward()
    assert float(table.grad.to_dense()[0, 0]) == 2 * rows
    with torch.no_grad():
        plain = lookup_rows(table, torch.zeros(rows, dtype=torch.int64))
    plain.add_(torch.ones((), requires_grad=True)).detach_().zero_()


def test_little_is_kept_and_nothing_that_does_not_fit():
    kept = [new() for _ in range(4)]
    kept.clear()
    assert len(outputs._free) == 2
    larger = new((5 << 21,))
    assert outputs._free == []
    del larger
    assert len(outputs._free) == 1
    new((1 << 25,))  # more than twice as large as what is free
    assert [len(each) // 4 >> 23 for each in outputs._free] == [4]


@pytest.mark.parametrize("shape", [(0,), (3, 5), ((1 << 26) + 1,)])
def test_small_and_very_large_ones_are_left_to_pytorch(shape):
    assert new(shape).shape == shape
    assert outputs._free == []
