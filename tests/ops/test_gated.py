"""Gate and convolution of whole sequences, forward and backward, against the equations in double precision."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from engram import native
from engram.native.gated import GatedTask, GateOptions
from engram.ops import causal_depthwise_conv, context_gate, gate_and_smooth, whole_sequences_serve
from engram.testing import HALF_ENOUGH, assert_close

needs_core = pytest.mark.skipif(native.core() is None, reason="the native core is not built")
FLOATS = (torch.float32, torch.bfloat16)


class Case:
    """Random inputs; ``weights`` are the norms and, last, the taps or None."""

    def __init__(self, shape, keys, options, kernel=0, masked=False, types=(torch.float32, torch.float32), seed=0):
        batch, length, branches, dim = shape
        rng = torch.Generator().manual_seed(seed)
        self.options = options
        self.projected = torch.randn(batch, length, (1 + keys) * dim, generator=rng).to(types[0])
        self.streams = torch.randn(shape, generator=rng).to(types[1])
        self.mask = (torch.rand(batch, length, generator=rng) > 0.3).long() if masked else None
        self.norms = [torch.randn(dim, generator=rng) for _ in range(2 * keys + (branches if kernel else 0))]
        self.taps = torch.randn(branches * dim, 1, kernel, generator=rng) if kernel else None
        self.to_out = torch.randn(shape, generator=rng).to(types[1])

    def run(self, function, dtype=None):
        """The result and the gradients of projected, streams, norms and taps, of inputs in ``dtype`` (None: their own)."""
        tensors = [self.projected, self.streams, *self.norms, *([] if self.taps is None else [self.taps])]
        leaves = [(t if dtype is None else t.to(dtype)).clone().requires_grad_() for t in tensors]
        projected, streams, norms = leaves[0], leaves[1], leaves[2 : 2 + len(self.norms)]
        out = function(projected, streams, self.mask, norms, self.options, None if self.taps is None else leaves[-1])
        out.backward(self.to_out.to(out.dtype))
        return [out.detach(), *(leaf.grad for leaf in leaves)]

    def smallest_score(self):
        """Near zero the signed square root is so steep that rounding decides."""
        scores = []
        by_definition(
            self.projected.double(), self.streams.double(), None, [n.double() for n in self.norms], self.options, None, scores
        )
        return float(torch.cat(scores).abs().min())


def by_definition(projected, streams, mask, norms, options, taps, scores=None):
    """Tensor operations stream by stream, as the layer has them."""
    branches, dim = streams.shape[2:]
    value, *keys = projected.split(dim, dim=-1)
    fused = []
    for m in range(branches):
        own = m if len(keys) > 1 else 0
        key = F.rms_norm(keys[own], (dim,), norms[own], options.norm_eps)
        query = F.rms_norm(streams[:, :, m], (dim,), norms[len(keys) + own], options.norm_eps)
        fused.append(context_gate(query, key, "signed_sqrt" if options.signed_sqrt else "plain") * value)
        if scores is not None:
            scores.append((query * key).sum(-1).flatten() / dim**0.5)
    fused = torch.stack(fused, dim=2)
    if mask is not None:
        fused = fused * mask[:, :, None, None]
    if taps is None:
        return fused
    normed = torch.stack(
        [F.rms_norm(fused[:, :, m], (dim,), norms[2 * len(keys) + m], options.conv_eps) for m in range(branches)], dim=2
    )
    smoothed = causal_depthwise_conv(normed.flatten(2), taps.squeeze(1), options.dilation)
    return fused + F.silu(smoothed).view_as(fused)


def assert_equal_parts(got, expected, tolerance=1e-4):
    for one, other in zip(got, expected, strict=True):
        assert_close(one, other, tolerance if one.dtype == torch.float32 else max(HALF_ENOUGH, tolerance))


@needs_core
@settings(max_examples=80, deadline=None)
@given(st.data())
def test_equals_the_equations_in_double_precision(data):
    branches, kernel = data.draw(st.integers(1, 4)), data.draw(st.integers(0, 4))
    shape = (
        data.draw(st.integers(1, 3)),
        data.draw(st.integers(1, 20)),
        branches,
        data.draw(st.sampled_from([1, 7, 16, 24, 63, 100])),
    )
    options = GateOptions(
        data.draw(st.sampled_from([1e-6, 1e-2])),
        data.draw(st.booleans()),
        data.draw(st.integers(1, 4)),
        data.draw(st.sampled_from([1e-5, 1e-1])),
    )
    keys, types = data.draw(st.sampled_from([1, branches])), tuple(data.draw(st.sampled_from(FLOATS)) for _ in range(2))
    case = Case(shape, keys, options, kernel, data.draw(st.booleans()), types, data.draw(st.integers(0, 1000)))
    assume(not options.signed_sqrt or case.smallest_score() > 1e-3)
    assert_equal_parts(case.run(gate_and_smooth), case.run(by_definition, torch.float64))


@needs_core
@pytest.mark.parametrize("length", [255, 256, 257, 530])
def test_long_sequences_are_the_same_in_pieces(length):
    case = Case((2, length, 2, 5), 2, GateOptions(1e-6, False, 3, 1e-5), 4, masked=True)
    assert_equal_parts(case.run(gate_and_smooth), case.run(by_definition, torch.float64))


@needs_core
def test_scores_below_the_floor_get_no_gradient():
    case = Case((1, 6, 1, 8), 1, GateOptions(1e-6, True))
    case.projected[:, :3, 8:] = 0  # keys of zero: scores of zero
    case.projected[:, 3:, 8:] *= 1e-9
    got, expected = case.run(gate_and_smooth), case.run(by_definition, torch.float64)
    assert_equal_parts(got, expected)
    assert torch.count_nonzero(got[2]) == 0


@needs_core
@pytest.mark.parametrize("types", [FLOATS, FLOATS[::-1]])
@pytest.mark.parametrize("kernel", [0, 4])
def test_no_value_is_left_unwritten(types, kernel):
    case = Case((2, 11, 3, 17), 3, GateOptions(1e-6, False, 3, 1e-5), kernel, masked=True, types=types)
    expected = case.run(gate_and_smooth)
    torch.use_deterministic_algorithms(True)  # torch then fills what it allocates with NaN
    try:
        assert torch.isnan(torch.empty(3)).all()
        got = case.run(gate_and_smooth)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))


@needs_core
def test_threads_change_no_bit():
    case = Case((5, 300, 2, 64), 2, GateOptions(1e-6, True, 3, 1e-5), 4, masked=True)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(case.run(gate_and_smooth))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_core
def test_only_what_wants_a_gradient_gets_one_and_only_once():
    case = Case((1, 4, 1, 8), 1, GateOptions(1e-6, False, 3, 1e-5), 2)
    projected = case.projected.clone().requires_grad_()
    out = gate_and_smooth(projected, case.streams, case.mask, case.norms, case.options, case.taps)
    expected = case.run(by_definition)[1]
    (got,) = torch.autograd.grad(out, projected, case.to_out.requires_grad_(), create_graph=True)
    assert_close(got, expected)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        got.sum().backward()


@needs_core
def test_no_positions_are_no_error():
    for shape in ((0, 5, 1, 8), (2, 0, 1, 8)):
        case = Case(shape, 1, GateOptions(1e-6, True, 3, 1e-5), 4)
        out, *gradients = case.run(gate_and_smooth)
        assert out.shape == shape
        assert not any(torch.count_nonzero(gradient) for gradient in gradients)


@needs_core
def test_large_values_come_out_as_from_the_tensor_operations():
    for value in (0.0, 1e-30, 100.0, 1e15, float("inf"), float("nan")):
        case = Case((1, 3, 1, 24), 1, GateOptions(1e-6, True, 3, 1e-5), 2)
        case.streams.fill_(value)
        got, expected = case.run(gate_and_smooth)[0], case.run(by_definition)[0]
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4, equal_nan=True)
        case.taps *= value  # sums of taps that overflow the exponential
        got, expected = case.run(gate_and_smooth)[0], case.run(by_definition)[0]
        assert torch.equal(torch.isfinite(got), torch.isfinite(expected))


@needs_core
def test_foreign_tensors_are_refused():
    case = Case((1, 2, 2, 8), 2, GateOptions(1e-6, True, 3, 1e-5), 3)
    good = [case.projected, case.streams, None, case.norms, case.options, case.taps]
    GatedTask(*good).forward()
    for at, bad in (
        (0, case.projected[..., :-8]),
        (0, case.projected.double()),
        (0, case.projected.expand(2, -1, -1)),
        (1, case.streams.half()),
        (1, case.streams.transpose(1, 2)),
        (2, torch.ones(1, 2, dtype=torch.int64)),
        (2, torch.ones(1, 3)),
        (3, case.norms[1:]),
        (3, [case.norms[0][1:], *case.norms[1:]]),
        (3, [case.norms[0].double(), *case.norms[1:]]),
        (5, None),
        (5, case.taps.squeeze(1)),
        (5, case.taps.bfloat16()),
    ):
        with pytest.raises(ValueError, match="GatedTask"):
            GatedTask(*good[:at], bad, *good[at + 1 :])
    task = GatedTask(*good)
    _, kept = task.forward()
    for wrong in ((kept[..., 1:], case.to_out), (kept, case.to_out.bfloat16()), (kept, case.to_out[:, 1:])):
        with pytest.raises(ValueError, match="GatedTask"):
            task.backward(*wrong)


def test_serves_training_in_two_types_on_the_cpu_with_the_core_only(monkeypatch):
    streams, weight = torch.zeros(1, 2, 1, 4), torch.nn.Parameter(torch.zeros(4, 4))
    assert whole_sequences_serve(streams, weight) == (native.core() is not None)
    with torch.no_grad():
        assert not whole_sequences_serve(streams, weight)
    with torch.autocast("cpu", dtype=torch.float16):
        assert not whole_sequences_serve(streams, weight)
    assert not whole_sequences_serve(streams.double(), weight)
    assert not whole_sequences_serve(streams, weight.bfloat16())
    assert not whole_sequences_serve(streams.to("meta"), weight)
    monkeypatch.setattr(native, "_core", None)
    assert not whole_sequences_serve(streams, weight)
