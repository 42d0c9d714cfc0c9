import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engram import EngramError, TableConfig, TableError
from engram.layers import RollingTail
from engram.ops import causal_depthwise_conv, context_gate, lookup_rows
from engram.ops.lookup import gradient_at
from engram.ops.reference import (
    causal_depthwise_conv_reference,
    context_gate_reference,
    lookup_rows_reference,
    rms_norm_reference,
)
from engram.tables import DeviceTable, build_table
from engram.testing import assert_close


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 3),
    st.integers(1, 63),
    st.integers(1, 9),
    st.integers(1, 6),
    st.integers(1, 5),
    st.integers(0, 20),
    st.integers(0, 9999),
)
def test_convolution_equals_the_library_one(batch, length, channels, kernel, dilation, cut, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, length, channels, generator=generator, dtype=torch.float64)
    weight = torch.randn(channels, kernel, generator=generator, dtype=torch.float64)
    grads, outs = [], []
    for fn in (causal_depthwise_conv, causal_depthwise_conv_reference):
        a, w = x.clone().requires_grad_(), weight.clone().requires_grad_()
        out = fn(a, w, dilation)
        (out * out).sum().backward()
        grads.append((a.grad, w.grad))
        outs.append(out)
    assert_close(outs[0], outs[1], 1e-9)
    for got, expected in zip(*grads):
        assert_close(got, expected, 1e-9)
    cut = min(cut, length)
    parts = [
        causal_depthwise_conv(x[:, :cut], weight, dilation),
        causal_depthwise_conv(x[:, cut:], weight, dilation, past=x[:, :cut]),
    ]
    assert_close(torch.cat(parts, dim=1), outs[0], 1e-9)


@pytest.mark.parametrize("kind", ["plain", "signed_sqrt"])
def test_gate_equals_its_reference(kind):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(5, 7, 33, generator=generator, dtype=torch.float64) for _ in range(2))
    a1, a2 = a.clone().requires_grad_(), a.clone().requires_grad_()
    got, expected = context_gate(a1, b, kind), context_gate_reference(a2, b, kind)
    assert_close(got, expected, 1e-9)
    got.sum().backward()
    expected.sum().backward()
    assert_close(a1.grad, a2.grad, 1e-8)


def test_rms_norm_reference_is_torchs():
    x, w = torch.randn(4, 9), torch.rand(9)
    norm = torch.nn.RMSNorm(9, eps=1e-5)
    with torch.no_grad():
        norm.weight.copy_(w)
    assert_close(norm(x), rms_norm_reference(x, w, 1e-5))


def test_lookup_equals_its_reference_gradient_included():
    table = torch.randn(50, 4)
    ids = torch.tensor([[3, 3, 49], [0, 7, 3]])
    one, two = table.clone().requires_grad_(), table.clone().requires_grad_()
    (lookup_rows(one, ids) ** 2).sum().backward()
    (lookup_rows_reference(two, ids) ** 2).sum().backward()
    assert_close(one.grad.to_dense(), two.grad)


@pytest.mark.parametrize(("dtype", "rows"), [(torch.float32, 2), (torch.bfloat16, 3)])
def test_a_gradient_is_summed_before_it_is_sent_if_nothing_is_lost_by_that(dtype, rows):
    values = torch.tensor([[1.0, 2], [3, 4], [5, 6]], dtype=dtype)
    gradient = torch.sparse_coo_tensor(torch.tensor([[7, 2, 7]]), values, (9, 2), check_invariants=False)
    assert gradient_at(gradient, gradient.device) is gradient
    sent = gradient_at(gradient, torch.device("meta"))
    assert (sent.device.type, sent.dtype, sent.shape, sent.is_coalesced()) == ("meta", dtype, (9, 2), dtype == torch.float32)
    assert (sent._indices().shape, sent._values().shape) == ((1, rows), (rows, 2))


def test_table_rows_are_updated_and_iterated():
    table = DeviceTable(10, 3)
    table.load_rows(0, torch.randn(10, 3))
    before = table.weight.detach().clone()
    table.update_rows(torch.tensor([2, 7]), lambda rows: rows + 1)
    before[[2, 7]] += 1
    assert torch.equal(table.weight, before)
    assert torch.equal(torch.cat([rows for _, rows in table.iter_row_blocks(4)]), before)
    assert table.nbytes == 120
    assert "rows=10" in repr(table)
    assert table.location == "cpu"
    ids = torch.tensor([1])
    assert table.prefetch(ids) is ids
    with pytest.raises(TableError, match=r"got 2..10, expected 0..9"):
        table.update_rows(torch.tensor([2, 10]), lambda rows: rows)
    with pytest.raises(TableError, match="fn returned"):
        table.update_rows(torch.tensor([2]), lambda rows: rows[:, :1])
    assert build_table(4, 2, TableConfig(dtype="bfloat16")).dtype == torch.bfloat16


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(st.integers(1, 5), st.integers(-9, -1)), max_size=200), st.integers(0, 12))
def test_rolling_tail_is_a_list_that_forgets(steps, count):
    tail, plain, value = RollingTail(window=None), [], 0
    for step in steps:
        if step > 0:
            tail.append(torch.arange(value, value + step).view(1, -1, 1))
            plain += range(value, value + step)
            value += step
        else:
            keep = max(0, len(plain) + step)
            tail.trim(keep)
            plain = plain[:keep]
        assert tail.length == len(plain)
        got = tail.last(count)
        assert ([] if got is None else got.flatten().tolist()) == (plain[-count:] if count else [])


def test_a_tail_that_owns_what_it_holds_outlives_the_buffers_it_was_given():
    tail, buffer, expected = RollingTail(), torch.zeros(1, 1, 1), []
    for value in range(12):
        buffer.fill_(value)
        tail.append(buffer)
        expected.append(value)
        if value % 3 == 2:
            assert tail.last(4) is not None  # joins chunks
        tail.own()
        kept = [chunk.data_ptr() for chunk in tail._chunks]
        tail.own()
        assert [chunk.data_ptr() for chunk in tail._chunks] == kept  # nothing is copied twice
    assert tail.last(12).flatten().tolist() == expected


def test_rolling_tail_forgets_behind_its_window_and_says_so():
    tail = RollingTail(window=10)
    for i in range(200):
        tail.append(torch.full((1, 1, 1), i))
    assert tail.kept < 90
    tail.trim(195)
    assert tail.last(3).flatten().tolist() == [192, 193, 194]
    tail.trim(20)
    with pytest.raises(EngramError, match="rollback_window"):
        tail.last(3)
    other = RollingTail()
    other.append(torch.zeros(1, 1, 1))
    with pytest.raises(EngramError, match="batch of 2, expected 1"):
        other.append(torch.zeros(2, 1, 1))


def test_a_tail_that_is_trimmed_beyond_its_end_stays_as_it_is():
    tail = RollingTail()
    tail.append(torch.arange(3).view(1, 3, 1))
    tail.trim(8)
    assert tail.length == 3
    assert tail.last(9).flatten().tolist() == [0, 1, 2]


@pytest.mark.slow
# Torch's own.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning", "ignore:The .grad attribute:UserWarning")
def test_training_compiles():
    """Inductor cannot hold the sparse gradient of a table within a graph."""
    weight = torch.randn(50, 8, requires_grad=True)
    ids = torch.randint(0, 50, (3, 7))

    def loss(weight):
        return (lookup_rows(weight, ids * 1) * torch.linspace(-1, 1, 8)).square().sum()

    expected = torch.autograd.grad(loss(weight), weight)[0]
    found = torch.autograd.grad(torch.compile(loss)(weight), weight)[0]
    assert found.is_sparse
    assert_close(found.to_dense(), expected.to_dense())
