"""Layers without a gate, with one gate for all streams, or with fewer orders: against the formulas, and in every chunking."""

import pytest
import torch
import torch.nn.functional as F

from engram import CheckpointError, ConfigError, EngramConfig, EngramState
from engram.hashing import build_mapping, hash_reference
from engram.hashing.layout import prime_walk
from engram.layers import Engram
from engram.native.read import read_streams
from engram.ops.reference import (
    causal_depthwise_conv_reference,
    context_gate_reference,
    lookup_rows_reference,
    rms_norm_reference,
)
from engram.tables import ABSENT
from engram.testing import assert_close, tiny_config, tiny_tokenizer
from tests.layers import test_verified
from tests.layers.test_engram import inputs, make_layer, randomise
from tests.layers.test_few_positions import calls, needs_core  # noqa: F401

VARIANTS = {
    "add": {"fuse": "add"},
    "concat": {"fuse": "concat"},
    "shared gate": {"branch_gates": False},
    "shared concat": {"fuse": "concat", "branch_gates": False},
    "one order": {"layer_orders": {1: [3]}},
    "two of three orders": {"layer_orders": {1: [4, 2]}, "max_ngram_size": 4, "engram_vocab_size": 200, "fuse": "add"},
}
variants = pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
streams = pytest.mark.parametrize("branches", [1, 4])


def by_the_formulas(layer, hidden, ids, parameters):
    """The layer's output from its parameters by name, one stream after the other."""
    config, layer_id = layer.config, layer.layer_id
    hidden = hidden.unsqueeze(2) if hidden.dim() == 3 else hidden
    mapping = layer.mapping
    canonical = mapping.compressed_tokenizer.lookup_table[ids.numpy()]
    walk = enumerate(prime_walk(config)[layer_id], start=2)
    primes = [of_order if order in config.orders_of(layer_id) else [] for order, of_order in walk]
    indices = torch.from_numpy(hash_reference(canonical, mapping.layer_multipliers[layer_id], primes, mapping.pad_id))
    starts = [0, *torch.tensor([p for of_order in primes for p in of_order]).cumsum(0)[:-1].tolist()]
    table = parameters["multi_head_embedding.embedding.weight"]
    e = lookup_rows_reference(table, indices + torch.tensor(starts)).flatten(2)
    value = e @ parameters["value_proj.weight"].T + parameters["value_proj.bias"]
    eps, outputs = torch.finfo(torch.float32).eps, []
    for m in range(hidden.shape[2]):
        own = m if config.branch_gates else 0
        if config.fuse == "add":
            outputs.append(value)
            continue
        query = rms_norm_reference(hidden[:, :, m], parameters[f"norm2.{own}.weight"], eps)
        if config.fuse == "concat":
            left, right = parameters[f"concat_projs.{own}.weight"].split(hidden.shape[-1], dim=1)
            outputs.append(query @ left.T + value @ right.T)
            continue
        key = e @ parameters[f"key_projs.{own}.weight"].T + parameters[f"key_projs.{own}.bias"]
        key = rms_norm_reference(key, parameters[f"norm1.{own}.weight"], eps)
        outputs.append(context_gate_reference(query, key, "signed_sqrt") * value)
    normed = [rms_norm_reference(v, parameters[f"short_conv.norms.{m}.weight"], 1e-5) for m, v in enumerate(outputs)]
    taps = parameters["short_conv.conv.weight"].squeeze(1)
    smooth = F.silu(causal_depthwise_conv_reference(torch.cat(normed, dim=-1), taps, config.max_ngram_size))
    return torch.stack(outputs, dim=2) + smooth.unflatten(-1, (hidden.shape[2], -1))


@streams
@variants
def test_output_and_gradients_are_those_of_the_formulas(branches, changes):
    layer = randomise(make_layer(branches, **changes))
    hidden, ids = inputs(None if branches == 1 else branches)
    ours, theirs = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    copies = {name: p.detach().clone().requires_grad_() for name, p in layer.named_parameters()}
    got, expected = layer(ours, ids), by_the_formulas(layer, theirs, ids, copies).view(hidden.shape)
    assert_close(got, expected)
    weight = torch.randn(got.shape, generator=torch.Generator().manual_seed(5))
    (got * weight).sum().backward()
    (expected * weight).sum().backward()
    if layer.config.fuse == "add":
        assert ours.grad is None  # nothing looks at the hidden state
        assert theirs.grad is None
    else:
        assert_close(ours.grad, theirs.grad, 1e-4)
    for name, parameter in layer.named_parameters():
        gradient = parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad
        assert torch.count_nonzero(gradient), name
        assert_close(gradient, copies[name].grad, 1e-4)


@streams
@variants
@pytest.mark.parametrize("use_conv", [True, False])
def test_any_chunking_gives_the_same_output(branches, changes, use_conv):
    layer = randomise(make_layer(branches, use_conv=use_conv, **changes))
    hidden, ids = inputs(branches, length=29)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    whole = layer(hidden, ids, attention_mask=mask).detach()
    assert not torch.count_nonzero(whole[1, :4]) or use_conv
    for sizes in ([1] * 29, [10, 19], [3, 1, 12, 13]):
        with torch.no_grad():  # short chunks take the short way where there is one
            state, parts, start = EngramState(), [], 0
            for size in sizes:
                part = slice(start, start + size)
                parts.append(layer(hidden[:, part], ids[:, part], state=state, attention_mask=mask[:, part]))
                start += size
        assert_close(torch.cat(parts, dim=1), whole)


def names(branches, **changes):
    return {name for name, _ in make_layer(branches, **changes).named_parameters()}


def test_only_parameters_that_are_used_exist():
    full = names(4)
    gate = {n for n in full if n.startswith(("key_projs", "norm1", "norm2"))}
    assert names(4, fuse="add") == full - gate
    queries, joints = {f"norm2.{m}.weight" for m in range(4)}, {f"concat_projs.{m}.weight" for m in range(4)}
    assert names(4, fuse="concat") == full - gate | queries | joints
    assert names(4, branch_gates=False) == {n for n in full if n not in gate or ".0." in n}
    assert names(4, fuse="concat", branch_gates=False) == full - gate | {"norm2.0.weight", "concat_projs.0.weight"}
    assert names(1, branch_gates=False) == names(1)


def test_a_layer_is_as_wide_as_its_orders():
    layer = make_layer(1, layer_orders={1: [3]})
    assert (layer.num_heads, layer.value_proj.in_features, layer.key_projs[0].in_features) == (4, 16, 16)
    assert layer.table.rows == sum(make_layer().mapping.head_sizes(1)[4:])
    hidden, ids = inputs()
    with pytest.raises(ConfigError, match=r"hash_ids: got \[2, 13, 8\], expected \[2, 13, 4\]"):
        layer(hidden, hash_ids=make_layer().mapping.hash(ids)[1])


@streams
def test_one_shared_gate_is_equal_gates(branches):
    shared, own = randomise(make_layer(branches, branch_gates=False)), randomise(make_layer(branches))
    state = {k: v for k, v in shared.state_dict().items() if not k.startswith(("key_projs", "norm1", "norm2"))}
    for name, tensor in own.state_dict().items():
        kind, _, rest = name.partition(".")
        if kind in ("key_projs", "norm1", "norm2"):
            state[name] = shared.state_dict()[f"{kind}.0.{rest.partition('.')[2]}"]
        assert state[name].shape == tensor.shape
    own.load_state_dict(state)
    hidden, ids = inputs(branches)
    traces = {}, {}
    assert_close(shared(hidden, ids, trace=traces[0]), own(hidden, ids, trace=traces[1]))
    assert_close(traces[0]["gate"], traces[1]["gate"])
    assert branches == 1 or not torch.allclose(traces[0]["gate"][..., 0], traces[0]["gate"][..., 1])


@needs_core
def test_the_short_way_serves_shared_gates_and_passes_by_what_it_cannot(calls):  # noqa: F811
    hidden, ids = inputs(4, batch=1, length=3)
    with torch.no_grad():
        for changes in ({"fuse": "add"}, {"fuse": "concat"}):
            randomise(make_layer(4, **changes))(hidden, ids)
            assert not calls
        for changes in ({"branch_gates": False}, {"layer_orders": {1: [3]}}):
            layer = randomise(make_layer(4, **changes))
            assert_close(layer(hidden, ids), layer(hidden, ids, trace={}))
        assert len(calls) == 2


@needs_core
def test_keys_for_some_streams_only_are_refused():
    norm, streams_ = torch.ones(8), torch.zeros(1, 1, 4, 8)
    for keys, queries in ((2, 2), (1, 4), (4, 1)):
        with pytest.raises(ValueError, match="read_streams"):
            read_streams(torch.zeros(1, 1, 8 * (1 + keys)), streams_, [norm] * keys, [norm] * queries, 1e-6, True, None, None)


@streams
@variants
def test_zero_tables_say_exactly_nothing(branches, changes):
    layer = make_layer(branches, **changes)
    assert torch.count_nonzero(layer(*inputs(branches))) == 0


@streams
def test_concat_starts_as_add_and_everything_in_it_learns(branches):
    layers = [make_layer(branches, fuse=fuse, use_conv=False) for fuse in ("concat", "add")]
    state = randomise(layers[1]).state_dict()
    assert not layers[0].load_state_dict(state, strict=False).unexpected_keys
    hidden, ids = inputs(branches)
    assert_close(layers[0](hidden, ids), layers[1](hidden, ids))
    new = make_layer(branches, fuse="concat")  # rows are zero
    optimiser = torch.optim.SGD([p for n, p in new.named_parameters() if "embedding" not in n], lr=0.1)
    tables = torch.optim.SparseAdam([new.table.weight], lr=0.1)
    for _ in range(2):
        new.zero_grad()
        (new(hidden, ids) - hidden).square().mean().backward()
        optimiser.step()
        tables.step()
    for projection in new.concat_projs:
        assert all(torch.count_nonzero(half) for half in projection.weight.grad.split(hidden.shape[-1], dim=1))
    assert torch.count_nonzero(new.value_proj.weight.grad)


@variants
def test_half_precision_and_autocast_keep_the_streams_dtype(changes):
    layer = randomise(make_layer(4, **changes))
    hidden, ids = inputs(4)
    expected = layer(hidden, ids)
    assert_close(layer(hidden.bfloat16(), ids).float(), expected, 0.05)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = layer(hidden, ids)
    assert got.dtype == torch.float32
    assert_close(got, expected, 0.05)


def test_where_nothing_gates_the_gate_is_one():
    for changes in ({"fuse": "add"}, {"fuse": "concat"}):
        layer, trace = randomise(make_layer(4, **changes)), {}
        hidden, ids = inputs(4)
        layer(hidden, ids, trace=trace)
        assert trace["gate"].shape == (2, 13, 4)
        assert (trace["gate"] == 1).all()
        assert trace["value"].shape == hidden.shape


@streams
def test_verified_rows_are_added_where_they_are_found_and_only_there(branches):
    layer = test_verified.make_layer(branches, fuse="add", reader="seeded")
    hidden, ids = test_verified.inputs(branches)
    test_verified.write(layer, ids, [4, 7], 3)
    trace, found = {}, torch.zeros(11, dtype=torch.bool)
    found[[4, 7]] = True
    got = layer(hidden, ids, trace=trace).view(11, branches, -1)
    slots = layer.find(ids)
    assert torch.equal((slots != ABSENT).any(-1)[0], found)
    expected = layer.value_proj(layer.multi_head_embedding.gather(slots))[0]
    assert_close(got, expected.unsqueeze(1).expand_as(got) * found[:, None, None])
    assert torch.equal(trace["gate"][0], found[:, None].expand(-1, branches).float())


def test_weights_of_the_demo_do_not_fit_other_variants():
    demo = make_layer(4).state_dict()
    for changes in ({"fuse": "add"}, {"fuse": "concat"}, {"branch_gates": False}):
        with pytest.raises(CheckpointError, match="Check hc_mult, sizes, use_bias, fuse and branch_gates"):
            make_layer(4, **changes).load_demo_state_dict(demo)


@pytest.mark.parametrize("branches", [None, 4])
def test_raw_ids_are_no_compression(branches):
    """``exact_v1`` in a jointly trained layer: as ``demo_v1`` over raw ids, trained and in any chunking."""
    config = tiny_config(hash_spec="exact_v1", hidden_size=24, hc_mult=branches)
    layer = randomise(Engram(config, build_mapping(config, tiny_tokenizer()), 0))
    hidden, ids = inputs(branches)
    mapping = layer.mapping
    raw = hash_reference(ids.numpy(), mapping.layer_multipliers[0], mapping.vocab_size_across_layers[0], config.pad_id)
    assert torch.equal(mapping.hash(ids)[0], torch.from_numpy(raw))
    whole = layer(hidden, ids)
    whole.sum().backward()
    touched = layer.multi_head_embedding.row_ids(torch.from_numpy(raw)).unique()
    assert torch.equal(layer.table.weight.grad.coalesce().indices()[0], touched)
    state = EngramState()
    with torch.no_grad():
        parts = [layer(hidden[:, t : t + 1], ids[:, t : t + 1], state=state) for t in range(13)]
    assert_close(torch.cat(parts, dim=1), whole)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fuse": "sum"}, "fuse: got 'sum', expected 'gate', 'add' or 'concat'"),
        ({"branch_gates": 1}, "branch_gates: got 1, expected True or False"),
        ({"fuse": "add", "branch_gates": False}, "branch_gates: got False, expected True when fuse is 'add'"),
        ({"fuse": "concat", "verify_rows": True}, "fuse: got 'concat', expected 'gate' or 'add' when verify_rows"),
        ({"fuse": "concat", "reader": "seeded", "use_bias": False, "use_conv": False}, "when reader is 'seeded'"),
        ({"layer_orders": {1: [2]}, "verify_rows": True}, "layer_orders: got .*, expected None when verify_rows is on"),
        ({"layer_orders": {3: [2]}}, r"layer_orders: got \{3: \[2\]\}, expected .*layers among layer_ids \[1, 15\]"),
        ({"layer_orders": {1: []}}, "at least one order from 2 to max_ngram_size = 3"),
        ({"layer_orders": {1: [2, 2]}}, "none twice"),
        ({"layer_orders": {1: [4]}}, "at least one order from 2"),
        ({"layer_orders": {1: "23"}}, "at least one order from 2"),
        ({"layer_orders": {1: 2}}, "layer_orders: got {1: 2}, expected {layer: orders}"),
        ({"layer_orders": 2}, "layer_orders: got 2, expected {layer: orders}"),
        ({"layer_orders": [[1, [2]], [1, [3]]]}, "each once"),
    ],
)
def test_impossible_variants_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        EngramConfig(**changes)


def test_orders_by_layer_are_kept_in_one_form():
    assert EngramConfig(max_ngram_size=4).engram_vocab_size == (646_400,) * 3
    config = EngramConfig(max_ngram_size=4, engram_vocab_size=50, layer_orders={15: [4, 2], 1: [2, 3, 4]})
    assert config.layer_orders == ((15, (2, 4)),)
    assert (config.orders_of(1), config.orders_of(15)) == ((2, 3, 4), (2, 4))
    assert (config.num_heads_of(15), config.d_mem_of(15), config.d_mem) == (16, 1024, 1536)
    assert config.to_dict()["layer_orders"] == {"15": [2, 4]}
    assert EngramConfig.from_dict(config.to_dict()) == config == config.replace(seed=0)
    assert hash(config) == hash(config.replace())
    assert EngramConfig(layer_orders={1: (3, 2), 15: (2, 3)}) == EngramConfig()
