"""A gate of one's own: asked wherever the layer computes, never passed by for a native path."""

import copy
import types

import pytest
import torch
from torch import nn

from engram import ConfigError, Engram, EngramState
from engram.layers import ShortConv, layer_classes
from engram.testing import assert_close
from tests.layers import test_verified
from tests.layers.test_engram import inputs, make_layer, randomise


class Doubled(Engram):
    """Gates and values twice as large."""

    def gated_value(self, streams, rows):
        gate, value = super().gated_value(streams, rows)
        return 2 * gate, 2 * value


class Open(Engram):
    """A gate of one learnt number, and parameters that the stock layer does not have."""

    def __init__(self, *args):
        super().__init__(*args)
        self.openness = nn.Parameter(torch.tensor(0.25))

    def gated_value(self, streams, rows):
        gate = self.openness.expand(*streams.shape[:3], 1)
        return gate, gate * self.value_proj(rows).unsqueeze(2)


def of_class(kind, branches=1, **changes):
    """A random layer without a convolution, so that its output is linear in the gated value, and the same of a class."""
    stock = randomise(make_layer(branches, **{"use_conv": False, **changes}))
    own = copy.deepcopy(stock)
    own.__class__ = kind
    return stock, own


def outputs(layer, hidden, ids):
    """Of all paths: training, prefill, one position after the other, and recorded."""
    found = [layer(hidden, ids).detach()]
    with torch.no_grad():
        found.append(layer(hidden, ids))
        found.append(layer(hidden, ids, trace={}))
        state = EngramState()
        found.append(torch.cat([layer(hidden[:, [t]], ids[:, [t]], state=state) for t in range(hidden.shape[1])], dim=1))
    return found


@pytest.mark.parametrize("branches", [1, 4])
def test_every_path_asks_it(branches):
    stock, own = of_class(Doubled, branches)
    hidden, ids = inputs(branches)
    for plain, doubled in zip(outputs(stock, hidden, ids), outputs(own, hidden, ids)):
        assert_close(doubled, 2 * plain)
    trace = {}
    own(hidden, ids, trace=trace)
    assert trace["gate"].max() > 1


def test_one_that_is_put_on_a_layer_or_on_the_class_is_asked_too(monkeypatch):
    hidden, ids = inputs()
    stock, own = of_class(Engram)
    own.gated_value = types.MethodType(_doubled, own)
    for plain, doubled in zip(outputs(stock, hidden, ids), outputs(own, hidden, ids)):
        assert_close(doubled, 2 * plain)
    expected = [2 * plain for plain in outputs(stock, hidden, ids)]
    monkeypatch.setattr(Engram, "gated_value", _doubled)
    for got, wanted in zip(outputs(stock, hidden, ids), expected):
        assert_close(got, wanted)


_stock_gate = Engram.gated_value


def _doubled(self, streams, rows):
    gate, value = _stock_gate(self, streams, rows)
    return 2 * gate, 2 * value


def test_an_override_by_the_private_name_is_not_passed_by_either():
    class Private(Engram):
        def _gated_value(self, streams, rows):
            gate, value = super()._gated_value(streams, rows)
            return gate, 2 * value

    stock, own = of_class(Private)
    hidden, ids = inputs()
    for plain, doubled in zip(outputs(stock, hidden, ids), outputs(own, hidden, ids)):
        assert_close(doubled, 2 * plain)


def test_a_convolution_of_ones_own_is_asked():
    class Loud(ShortConv):
        def forward(self, normed, past=None):
            return 2 * super().forward(normed, past)

    layer = randomise(make_layer())
    hidden, ids = inputs()
    for change in (
        lambda conv: setattr(conv, "__class__", Loud),
        lambda conv: conv.register_forward_hook(lambda module, args, out: 2 * out),
    ):
        own = copy.deepcopy(layer)
        change(own.short_conv)
        found = outputs(own, hidden, ids)
        assert not torch.allclose(found[0], layer(hidden, ids), atol=1e-3)
        for other in found[1:]:
            assert_close(other, found[0])


def test_verified_rows_go_through_it():
    stock = test_verified.make_layer()
    hidden, ids = test_verified.inputs()
    test_verified.write(stock, ids, [4, 7], 3)
    own = copy.deepcopy(stock)
    own.__class__ = Doubled
    plain, doubled = stock(hidden, ids), own(hidden, ids)
    assert torch.count_nonzero(plain)
    assert_close(doubled, 2 * plain)


def test_what_it_holds_itself_gets_gradients():
    config, mapping = make_layer().config, make_layer().mapping
    layer = randomise(Open(config, mapping, 1))
    hidden, ids = inputs()
    layer(hidden, ids).sum().backward()
    assert layer.openness.grad
    assert layer.value_proj.weight.grad.abs().sum() > 0
    assert layer.table.weight.grad.is_sparse
    assert layer.key_projs[0].weight.grad is None


def test_a_wrong_shape_is_one_clear_error():
    class Flat(Engram):
        def gated_value(self, streams, rows):
            return torch.ones(streams.shape[:3]), self.value_proj(rows)

    _, own = of_class(Flat, branches=4)
    with pytest.raises(ConfigError, match=r"Flat.gated_value: got a gate of shape \[2, 13, 4\] .* expected \[2, 13, 4, 1\]"):
        own(*inputs(4))


def test_classes_of_layers():
    assert layer_classes(None, (1, 3)) == {1: Engram, 3: Engram}
    assert layer_classes(Open, (1, 3)) == {1: Open, 3: Open}
    assert layer_classes({3: Open}, (1, 3)) == {1: Engram, 3: Open}
    for wrong in (nn.Linear, Open.gated_value, "Open", {2: Open}, {1: None}):
        with pytest.raises(ConfigError, match=r"layer_class: got .* expected a subclass of engram.Engram"):
            layer_classes(wrong, (1, 3))
