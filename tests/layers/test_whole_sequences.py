"""The layer's native pass for training against its tensor operations, and when it may not take their place."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from engram import EngramState, native
from engram.layers import engram as module
from engram.layers.joined import project_all
from engram.testing import HALF_ENOUGH, assert_close
from tests.layers.test_engram import D, make_layer, randomise

needs_core = pytest.mark.skipif(native.core() is None, reason="the native core is not built")
HEADS = 8  # of `make_layer`: two orders, four heads


@pytest.fixture
def calls(monkeypatch):
    """Counts native passes."""
    counted, real = [], module.gate_and_smooth
    monkeypatch.setattr(module, "gate_and_smooth", lambda *args: counted.append(1) or real(*args))
    return counted


@pytest.fixture
def by_tensors(monkeypatch):
    """Runs a function without the native pass."""

    def run(function, *args):
        with monkeypatch.context() as patch:
            patch.setattr(module, "whole_sequences_serve", lambda *_: False)
            return function(*args)

    return run


def inputs(branches=1, batch=2, length=13):
    rng = torch.Generator().manual_seed(4)
    shape = (batch, length, D) if branches == 1 else (batch, length, branches, D)
    hash_ids = torch.randint(200, (batch, length, HEADS), generator=rng)
    mask = (torch.rand(batch, length, generator=rng) > 0.3).long()
    return torch.randn(shape, generator=rng), hash_ids, mask


def step(layer, hidden, hash_ids, mask, dtype=None, **options):
    """Output and gradients, by name."""
    layer.zero_grad()
    hidden = hidden.clone().requires_grad_()
    with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        out = layer(hidden, hash_ids=hash_ids, attention_mask=mask, **options)
    out.backward(torch.ones_like(out).cumsum(-1) / D)
    gradients = {name: p.grad.to_dense().clone() for name, p in layer.named_parameters() if p.grad is not None}
    return {"output": out.detach(), "hidden_states": hidden.grad, **gradients}


def assert_same(got, expected, tolerance):
    assert set(got) == set(expected)
    for name, tensor in got.items():
        assert tensor.dtype == expected[name].dtype, name
        assert_close(tensor, expected[name], tolerance)


@needs_core
@pytest.mark.parametrize("branches", [1, 3])
@pytest.mark.parametrize(
    "changes",
    [{}, {"use_bias": False}, {"branch_gates": False}, {"use_conv": False}, {"norm_eps": 1e-3}, {"layer_orders": {1: [3]}}],
    ids=str,
)
def test_equals_the_tensor_operations(branches, changes, calls, by_tensors):
    layer = randomise(make_layer(branches, **{"gate": "plain", **changes}))
    hidden, hash_ids, mask = inputs(branches)
    hash_ids = hash_ids[..., : layer.num_heads]
    for dtype, tolerance in ((None, 1e-5), (torch.bfloat16, 4 * HALF_ENOUGH)):
        got = step(layer, hidden, hash_ids, mask, dtype)
        assert calls
        calls.clear()
        assert_same(got, by_tensors(step, layer, hidden, hash_ids, mask, dtype), tolerance)
        assert not calls
    halves = step(layer, hidden.bfloat16(), hash_ids, mask)
    assert_same(halves, by_tensors(step, layer, hidden.bfloat16(), hash_ids, mask), HALF_ENOUGH)


@needs_core
def test_the_signed_root_and_a_mask_of_factors(by_tensors):
    layer = randomise(make_layer())
    hidden, hash_ids, mask = inputs()
    assert_same(*(run(step, layer, hidden, hash_ids, mask * 0.5) for run in (lambda f, *args: f(*args), by_tensors)), 1e-4)


@needs_core
def test_states_and_other_fusions_take_the_tensor_operations(calls):
    hidden, hash_ids, mask = inputs()
    layer = randomise(make_layer())
    layer(hidden, hash_ids=hash_ids, state=EngramState())
    for fuse in ("add", "concat"):
        step(randomise(make_layer(fuse=fuse)), hidden, hash_ids, mask)
    step(randomise(make_layer()).double(), hidden.double(), hash_ids, mask)
    with torch.no_grad():
        layer(hidden.repeat(3, 1, 1), hash_ids=hash_ids.repeat(3, 1, 1))
    assert not calls


@needs_core
@pytest.mark.parametrize("branches", [1, 3])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_a_trace_holds_what_the_tensor_operations_record_and_changes_nothing(branches, dtype, calls, by_tensors):
    layer = randomise(make_layer(branches, gate="plain"))
    hidden, hash_ids, mask = inputs(branches)
    trace, expected = {}, {}
    got = step(layer, hidden, hash_ids, mask, dtype, trace=trace)
    assert calls
    by_tensors(lambda: step(layer, hidden, hash_ids, mask, dtype, trace=expected))
    assert_same(trace, expected, 1e-5 if dtype is None else 4 * HALF_ENOUGH)
    assert not any(tensor.requires_grad for tensor in trace.values())
    without = step(layer, hidden, hash_ids, mask, dtype)
    assert all(torch.equal(got[name], tensor) for name, tensor in without.items())


@needs_core
def test_adapters_and_hooks_are_not_passed_by(calls):
    hidden, hash_ids, mask = inputs()

    class Doubled(nn.Linear):
        def forward(self, rows):
            return 2 * super().forward(rows)

    plain = randomise(make_layer())
    expected = step(plain, hidden, hash_ids, mask)["output"]
    changes = [
        lambda layer: setattr(layer.value_proj, "__class__", Doubled),
        lambda layer: layer.key_projs[0].register_forward_hook(lambda module, args, out: out + 1),
        lambda layer: layer.norm2[0].register_forward_hook(lambda module, args, out: -out),
        lambda layer: layer.short_conv.norms[0].register_forward_pre_hook(lambda module, args: (args[0] + 1,)),
    ]
    calls.clear()
    for change in changes:
        layer = copy.deepcopy(plain)
        change(layer)
        assert not torch.allclose(step(layer, hidden, hash_ids, mask)["output"], expected, atol=1e-3)
    assert not calls


@needs_core
def test_frozen_parts_get_no_gradient(by_tensors):
    layer = randomise(make_layer(2, reader="seeded", gate="plain", use_bias=False, use_conv=False))
    hidden, hash_ids, mask = inputs(2)
    got = step(layer, hidden, hash_ids, mask)
    assert not any(name.startswith(("value_proj", "key_projs", "norm")) for name in got)
    assert_same(got, by_tensors(step, layer, hidden, hash_ids, mask), 1e-4)


@needs_core
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # torch's own compiler asks for it
def test_checkpointed_and_compiled_layers_give_the_same(calls):
    layer = randomise(make_layer())
    hidden, hash_ids, mask = inputs()
    expected = step(layer, hidden, hash_ids, mask)
    parameters = dict(layer.named_parameters())

    def recomputed(hidden, hash_ids, attention_mask):
        return checkpoint(layer, hidden, None, hash_ids, None, attention_mask, use_reentrant=False)

    recomputed.zero_grad, recomputed.named_parameters = layer.zero_grad, parameters.items
    got = step(recomputed, hidden, hash_ids, mask)
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())
    calls.clear()
    # The look-up, whose gradient is sparse, stays out of a graph that is trained.
    compiled = torch.compile(layer, backend="eager")
    compiled.zero_grad = layer.zero_grad
    result = compiled(hidden, hash_ids=hash_ids, attention_mask=mask)
    assert_close(result, expected["output"])
    assert not calls


def test_without_the_core_nothing_changes(monkeypatch):
    layer = randomise(make_layer(2, gate="plain"))
    hidden, hash_ids, mask = inputs(2)
    expected = step(layer, hidden, hash_ids, mask)
    monkeypatch.setattr(native, "_core", None)
    assert_same(step(layer, hidden, hash_ids, mask), expected, 1e-5)


def test_all_projections_at_once_are_each_ones_own():
    for bias in (True, False):
        projections = [nn.Linear(5, 4, bias=bias) for _ in range(3)]
        rows, weight = torch.randn(2, 5, requires_grad=True), torch.randn(2, 12)
        leaves = [rows, *(p for projection in projections for p in projection.parameters())]
        separately = torch.cat([projection(rows) for projection in projections], dim=-1)
        together = project_all(projections, rows)
        assert_close(together, separately)
        for got, expected in zip(*(torch.autograd.grad(out, leaves, weight) for out in (together, separately))):
            assert_close(got, expected)
