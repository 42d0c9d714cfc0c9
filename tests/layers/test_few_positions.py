"""The short way of a decoding step against the tensor operations that define it."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from engram import EngramState, native
from engram.layers.joined import join_projections, project_together
from engram.native.read import read_streams
from engram.testing import EXACT_ENOUGH, assert_close
from tests.layers.test_engram import make_layer, randomise

needs_core = pytest.mark.skipif(native.core() is None, reason="the native core is not built")
HEADS = 8  # of `make_layer`: two orders, four heads


@pytest.fixture
def calls(monkeypatch):
    """Counts calls of the short way."""
    from engram.layers import engram

    counted = []
    monkeypatch.setattr(engram, "read_streams", lambda *args: counted.append(1) or read_streams(*args))
    return counted


def steps(layer, hidden, hash_ids, mask, sizes):
    """The layer's output over chunks of the given sizes, the state carried along."""
    state, parts, start = EngramState(), [], 0
    for size in sizes:
        part = slice(start, start + size)
        here = None if mask is None else mask[:, part]
        parts.append(layer(hidden[:, part], hash_ids=hash_ids[:, part], state=state, attention_mask=here))
        start += size
    return torch.cat(parts, dim=1)


def moved_by_rounding(layer, *args):
    """How far the tensor operations' own output moves, in units of `assert_close`, when every weight is off by one rounding.

    A key of one or two elements may all but cancel, and the norm then blows up what was lost: no two orders of summation agree there.
    """
    expected = steps(layer, *args).detach()
    eps, generator = torch.finfo(torch.float32).eps, torch.Generator().manual_seed(0)
    moved = 0.0
    for _ in range(4):
        nudged = copy.deepcopy(layer)
        with torch.no_grad():
            for p in nudged.parameters():
                p.mul_(1 + eps * (2 * torch.randint(2, p.shape, generator=generator) - 1))
        moved = max(moved, float((steps(nudged, *args).detach() - expected).abs().max()))
    return moved / max(1.0, float(expected.abs().max()))


@needs_core
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_equals_the_tensor_operations(data):
    branches, width = data.draw(st.sampled_from([1, 2, 4])), data.draw(st.sampled_from([1, 7, 16, 24, 63, 100]))
    layer = make_layer(
        branches,
        hidden_size=width,
        gate=data.draw(st.sampled_from(["signed_sqrt", "plain"])),
        use_bias=data.draw(st.booleans()),
        use_conv=data.draw(st.booleans()),
        norm_eps=data.draw(st.sampled_from([None, 1e-3])),
        kernel_size=data.draw(st.integers(1, 4)),
    )
    randomise(layer, data.draw(st.integers(0, 1000)))
    rng = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    sizes = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=8))
    batch, length = data.draw(st.integers(1, 3)), sum(sizes)
    shape = (batch, length, width) if branches == 1 else (batch, length, branches, width)
    hidden = torch.randn(shape, generator=rng) * 10 ** data.draw(st.integers(-3, 3))
    hash_ids = torch.randint(200, (batch, length, HEADS), generator=rng)
    mask = (torch.rand(batch, length, generator=rng) > 0.3).long() if data.draw(st.booleans()) else None
    expected = steps(layer, hidden, hash_ids, mask, sizes).detach()  # with gradients: the tensor operations
    with torch.no_grad():
        got = steps(layer, hidden, hash_ids, mask, sizes)
    assert_close(got, expected, max(EXACT_ENOUGH, 2 * moved_by_rounding(layer, hidden, hash_ids, mask, sizes)))


def test_rounding_moves_a_well_conditioned_layer_too_little_to_matter():
    layer = randomise(make_layer())
    generator = torch.Generator().manual_seed(0)
    hidden, hash_ids = torch.randn(2, 9, 24, generator=generator), torch.randint(200, (2, 9, HEADS), generator=generator)
    assert 2 * moved_by_rounding(layer, hidden, hash_ids, None, [9]) < EXACT_ENOUGH


@needs_core
def test_serves_few_positions_without_gradients_only(calls):
    layer = randomise(make_layer())
    hidden, hash_ids = torch.randn(1, 40, 24), torch.randint(200, (1, 40, HEADS))
    layer(hidden[:, :1], hash_ids=hash_ids[:, :1])
    with torch.no_grad():
        layer(hidden, hash_ids=hash_ids)
        layer(hidden[:, :1], hash_ids=hash_ids[:, :1], trace={})
        with torch.autocast("cpu", dtype=torch.bfloat16):
            layer(hidden[:, :1], hash_ids=hash_ids[:, :1])
        copy.deepcopy(layer).bfloat16()(hidden[:, :1].bfloat16(), hash_ids=hash_ids[:, :1])
        layer(hidden[:, :0], hash_ids=hash_ids[:, :0])
        assert not calls
        layer(hidden[:, :1], hash_ids=hash_ids[:, :1])
    assert calls


@needs_core
def test_adapters_hooks_and_other_types_are_not_passed_by(calls):
    hidden, hash_ids = torch.randn(1, 1, 24), torch.randint(200, (1, 1, HEADS))

    class Doubled(nn.Linear):
        def forward(self, rows):
            return 2 * super().forward(rows)

    def adapted(change):
        layer = randomise(make_layer())
        change(layer)
        expected = layer(hidden, hash_ids=hash_ids).detach()
        with torch.no_grad():
            assert torch.equal(layer(hidden, hash_ids=hash_ids), expected)

    def subclass(layer):
        layer.value_proj.__class__ = Doubled

    adapted(subclass)
    adapted(lambda layer: layer.key_projs[0].register_forward_hook(lambda module, args, out: out + 1))
    adapted(lambda layer: layer.norm1[0].register_forward_pre_hook(lambda module, args: (3 * args[0],)))
    adapted(lambda layer: layer.norm2[0].register_forward_hook(lambda module, args, out: -out))
    assert not calls


@needs_core
def test_extreme_values_come_out_as_from_the_tensor_operations():
    layer = randomise(make_layer())
    hash_ids = torch.randint(200, (1, 1, HEADS))
    for value in (0.0, 1e-30, 1e18, float("inf"), float("nan")):
        hidden = torch.full((1, 1, 24), value)
        expected = layer(hidden, hash_ids=hash_ids).detach()
        with torch.no_grad():
            torch.testing.assert_close(layer(hidden, hash_ids=hash_ids), expected, rtol=1e-4, atol=1e-4, equal_nan=True)


@needs_core
def test_foreign_tensors_are_refused():
    projected, streams, norm = torch.zeros(1, 1, 16), torch.zeros(1, 1, 1, 8), torch.ones(8)
    good = [projected, streams, [norm], [norm], 1e-6, True, None, None]
    read_streams(*good)
    for at, bad in (
        (0, projected[..., 1:]),
        (0, projected.double()),
        (1, streams.half()),
        (2, [norm[1:]]),
        (3, [norm.double()]),
    ):
        with pytest.raises(ValueError, match="expected contiguous float32"):
            read_streams(*good[:at], bad, *good[at + 1 :])
    conv = (torch.zeros(8, 3), 2, [norm], 1e-5)
    with pytest.raises(ValueError, match="read_streams"):
        read_streams(*good[:6], conv, torch.zeros(1, 4, 7))
    with pytest.raises(ValueError, match="read_streams"):
        read_streams(*good[:6], (torch.zeros(3, 8).T, 2, [norm], 1e-5), None)


def lie_side_by_side(layer):
    parts = [layer.value_proj.weight, *(key.weight for key in layer.key_projs)]
    sizes = [part.numel() * part.element_size() for part in parts]
    return all(b.data_ptr() - a.data_ptr() == size for a, b, size in zip(parts, parts[1:], sizes))


def test_projections_lie_side_by_side_whatever_happens_to_the_layer(tmp_path):
    layer = randomise(make_layer(4))
    assert not lie_side_by_side(make_layer(1))  # two products are as good as one
    others = [
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        copy.deepcopy(layer).half(),
        copy.deepcopy(layer).double(),
    ]
    rows = torch.randn(3, 32)
    for other in (layer, *others):
        assert lie_side_by_side(other)
        assert {name for name, _ in other.named_parameters()} == {name for name, _ in layer.named_parameters()}
    for other in others[:2]:
        assert other.value_proj.weight.data_ptr() != layer.value_proj.weight.data_ptr()
        assert torch.equal(project_together(other._projections, rows), project_together(layer._projections, rows))
    with torch.no_grad():
        layer.key_projs[2].weight.mul_(2)  # training or loading changes parameters in place: nothing is stale
    separately = torch.cat([projection(rows) for projection in layer._projections], dim=-1)
    assert_close(project_together(layer._projections, rows), separately)


def test_projections_that_were_moved_apart_are_applied_one_by_one():
    projections = [nn.Linear(5, 4), nn.Linear(5, 4), nn.Linear(5, 4)]
    rows = torch.randn(2, 5)
    separately = torch.cat([projection(rows) for projection in projections], dim=-1)
    assert torch.equal(project_together(projections, rows), separately)
    join_projections(projections)
    assert_close(project_together(projections, rows), separately)
    projections[1].weight = nn.Parameter(projections[1].weight.detach().clone())
    assert torch.equal(project_together(projections, rows), separately)
