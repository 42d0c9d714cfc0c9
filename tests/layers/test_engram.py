import pytest
import torch

from engram import (
    CheckpointError,
    CompressedTokenizer,
    ConfigError,
    Engram,
    EngramConfig,
    EngramError,
    EngramState,
    NgramHashMapping,
)
from engram.testing import assert_close, tiny_tokenizer
from tests.layers.demo_layer import DemoLayer

D = 24


def make_layer(branches=1, **changes):
    fields = {
        "engram_vocab_size": [200, 300],
        "n_embed_per_ngram": 16,
        "n_head_per_ngram": 4,
        "layer_ids": [1],
        "pad_id": 1,
        "hidden_size": D,
        "hc_mult": branches,
    }
    config = EngramConfig(**{**fields, **changes})
    return Engram(config, NgramHashMapping(config, CompressedTokenizer(tiny_tokenizer())), 1)


def randomise(layer, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    return layer


def inputs(branches=None, batch=2, length=13):
    generator = torch.Generator().manual_seed(1)
    shape = (batch, length, D) if branches is None else (batch, length, branches, D)
    return torch.randn(shape, generator=generator), torch.randint(0, 380, (batch, length), generator=generator)


@pytest.mark.parametrize("branches", [1, 4])
def test_equals_the_demo_from_its_own_weights(branches):
    layer = make_layer(branches)
    torch.manual_seed(3)
    demo = DemoLayer(layer.mapping.head_sizes(1), 32, 4, D, branches, kernel=4, dilation=3)
    layer.load_demo_state_dict(demo.state_dict())
    hidden, ids = inputs(branches)
    hash_ids = layer.mapping.hash(ids)[1]
    ours, theirs = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    got, expected = layer(ours, input_ids=ids), demo(theirs, hash_ids)
    assert_close(got, expected)
    weight = torch.randn(got.shape, generator=torch.Generator().manual_seed(5))
    (got * weight).sum().backward()
    (expected * weight).sum().backward()
    assert_close(ours.grad, theirs.grad, 1e-4)
    other = dict(demo.named_parameters())
    for name, parameter in layer.named_parameters():
        gradient = parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad
        assert_close(gradient, other[name].grad, 1e-4)


def test_table_gradient_holds_touched_rows_only():
    layer = randomise(make_layer())
    hidden, ids = inputs()
    layer(hidden, ids).sum().backward()
    gradient = layer.table.weight.grad
    assert gradient.is_sparse
    touched = layer.multi_head_embedding.row_ids(layer.mapping.hash(ids)[1]).unique()
    assert torch.equal(gradient.coalesce().indices()[0], touched)


def test_three_and_four_dimensions_agree_for_one_branch():
    layer = randomise(make_layer())
    hidden, ids = inputs()
    assert torch.equal(layer(hidden, ids), layer(hidden.unsqueeze(2), ids).squeeze(2))


@pytest.mark.parametrize("branches", [1, 4])
@pytest.mark.parametrize("use_conv", [True, False])
def test_any_chunking_gives_the_same_output(branches, use_conv):
    layer = randomise(make_layer(branches, use_conv=use_conv))
    hidden, ids = inputs(branches, length=29)
    whole = layer(hidden, ids)
    for sizes in ([29], [1] * 29, [10, 19], [3, 1, 12, 13]):
        state, parts, start = EngramState(), [], 0
        for size in sizes:
            parts.append(layer(hidden[:, start : start + size], ids[:, start : start + size], state=state))
            start += size
        assert_close(torch.cat(parts, dim=1), whole)


def test_state_can_go_back_and_be_reordered():
    layer = randomise(make_layer())
    hidden, ids = inputs(length=20)
    state = EngramState()
    layer(hidden[:, :15], ids[:, :15], state=state)
    state.trim(9)
    order = torch.tensor([1, 0])
    state.reorder(order)
    got = layer(hidden[order, 9:], ids[order, 9:], state=state)
    assert_close(got, layer(hidden, ids)[order, 9:])


def test_ids_that_are_written_over_stay_as_they_were_in_a_state():
    layer, (hidden, ids) = randomise(make_layer()), inputs()
    state, one, parts = EngramState(), torch.empty(2, 1, dtype=torch.int64), []
    for place in range(ids.shape[1]):
        one.copy_(ids[:, place : place + 1])
        parts.append(layer(hidden[:, place : place + 1], one, state=state))
    assert_close(torch.cat(parts, dim=1), layer(hidden, ids))


def test_ids_without_addresses_leave_a_state_as_it_was():
    layer, (hidden, ids) = randomise(make_layer()), inputs()
    state = EngramState()
    with pytest.raises(EngramError, match="got id"):
        layer(hidden[:, :1], torch.full((2, 1), 10_000_000), state=state)
    assert_close(layer(hidden, ids, state=state), layer(hidden, ids))


def test_padding_neither_speaks_nor_is_heard():
    layer = randomise(make_layer())
    hidden, ids = inputs(length=11)
    junk = torch.randn(2, 4, D)
    mask = torch.cat([torch.zeros(2, 4), torch.ones(2, 11)], dim=1).long()
    got = layer(torch.cat([junk, hidden], 1), torch.cat([torch.full((2, 4), 50), ids], 1), attention_mask=mask)
    assert_close(got[:, 4:], layer(hidden, ids))


def test_any_number_but_zero_in_a_mask_is_no_padding():
    layer, (hidden, ids) = randomise(make_layer()), inputs()
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[0, :4] = False
    assert torch.equal(layer(hidden, ids, attention_mask=mask * 2), layer(hidden, ids, attention_mask=mask))


def test_zero_tables_say_exactly_nothing():
    layer = make_layer(branches=4)
    hidden, ids = inputs(4)
    assert torch.count_nonzero(layer(hidden, ids)) == 0


def test_plain_gate_is_the_papers():
    plain, signed = randomise(make_layer(gate="plain", use_conv=False)), randomise(make_layer(use_conv=False))
    hidden, ids = inputs()
    traces = {}, {}
    plain(hidden, ids, trace=traces[0])
    signed(hidden, ids, trace=traces[1])
    score = torch.logit(traces[0]["gate"].double())
    expected = torch.sigmoid(score.sign() * score.abs().clamp_min(1e-6).sqrt())
    assert_close(traces[1]["gate"], expected.float(), 1e-4)


def test_half_precision_streams_keep_their_dtype():
    layer = randomise(make_layer())
    hidden, ids = inputs()
    out = layer(hidden.bfloat16(), ids)
    assert out.dtype == torch.bfloat16
    assert_close(out.float(), layer(hidden, ids), 0.05)


def test_bad_input_says_what_to_do():
    layer = make_layer(branches=4)
    hidden, ids = inputs(4)
    with pytest.raises(ConfigError, match=r"got shape \[2, 13, 24\], expected \[B, T, 4, 24\]"):
        layer(hidden[:, :, 0], ids)
    with pytest.raises(ConfigError, match="neither input_ids nor hash_ids"):
        layer(hidden)
    with pytest.raises(ConfigError, match="input_ids: got shape"):
        layer(hidden, ids[:, 1:])
    with pytest.raises(ConfigError, match="hash_ids"):
        layer(hidden, hash_ids=torch.zeros(2, 13, 3, dtype=torch.int64))
    with pytest.raises(ConfigError, match="layer_id: got 7"):
        Engram(layer.config, layer.mapping, 7)
    with pytest.raises(ConfigError, match="hidden_size"):
        Engram(layer.config.replace(hidden_size=None), layer.mapping, 1)


def test_demo_weights_that_do_not_fit_are_refused_whole():
    layer = make_layer()
    good = {k: v.clone() for k, v in layer.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"missing: value_proj\.bias"):
        layer.load_demo_state_dict({k: v for k, v in good.items() if k != "value_proj.bias"})
    with pytest.raises(CheckpointError, match="unknown: extra"):
        layer.load_demo_state_dict({**good, "extra": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"wrong shape: value_proj\.bias"):
        layer.load_demo_state_dict({**good, "value_proj.bias": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="offsets differ"):
        layer.load_demo_state_dict({**good, "multi_head_embedding.offsets": good["multi_head_embedding.offsets"] + 1})
    assert all(torch.equal(v, good[k]) for k, v in layer.state_dict().items())
