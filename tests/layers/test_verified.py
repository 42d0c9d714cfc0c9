import pytest
import torch

from engram import ConfigError, Engram, EngramConfig, EngramState
from engram.hashing import build_mapping
from engram.layers.reader import seeded_signs
from engram.tables import ABSENT
from engram.testing import assert_close, tiny_tokenizer

D = 24


def make_layer(branches=1, **changes):
    fields = {
        "engram_vocab_size": 300,
        "max_ngram_size": 4,
        "n_embed_per_ngram": 8,
        "n_head_per_ngram": 2,
        "layer_ids": [1],
        "pad_id": 1,
        "hidden_size": D,
        "hc_mult": branches,
        "reader": "trained",
    }
    config = EngramConfig.for_teaching(**{**fields, **changes})
    torch.manual_seed(0)
    layer = Engram(config, build_mapping(config, tiny_tokenizer()), 1)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    return layer


def write(layer, ids, positions, order, seed=0):
    """Give the n-grams of one order that end at these positions of ``ids [1, T]`` random rows; returns them as {row: values}."""
    hash_ids, tags = layer.mapping.hash_with_tags(ids)[1]
    columns = slice((order - 2) * 2, (order - 1) * 2)
    rows = layer.multi_head_embedding.row_ids(hash_ids)[0, positions][:, columns].flatten()
    values = torch.randn(len(rows), 4, generator=torch.Generator().manual_seed(seed))
    layer.table.insert(rows, tags[0, positions][:, columns].flatten(), values)


def inputs(branches=1, length=11):
    generator = torch.Generator().manual_seed(1)
    shape = (1, length, D) if branches == 1 else (1, length, branches, D)
    return torch.randn(shape, generator=generator), torch.randint(2, 300, (1, length), generator=generator)


@pytest.mark.parametrize("branches", [1, 4])
@pytest.mark.parametrize("use_conv", [False, True])
def test_equals_a_dense_layer_that_holds_the_same_rows(branches, use_conv):
    """Tags and convolution are independent switches: with rows that no other n-gram hits, tags change nothing."""
    tagged = make_layer(branches, use_conv=use_conv, longest_only=False)
    hidden, ids = inputs(branches)
    write(tagged, ids, [4, 7], 3)
    write(tagged, ids, [7], 4, seed=1)
    config = tagged.config.replace(verify_rows=False)
    dense = Engram(config, tagged.mapping, 1)
    table = tagged.table
    dense.load_state_dict({k: v for k, v in tagged.state_dict().items() if ".embedding." not in k}, strict=False)
    with torch.no_grad():
        dense.table.weight[table.row_ids] = table.weight
    read = dense.mapping.hash(ids)[1]
    hit = torch.isin(dense.multi_head_embedding.row_ids(read), table.row_ids).sum()
    assert int(hit) == len(table.row_ids)  # no row is read by chance
    assert_close(tagged(hidden, ids), dense(hidden, ids))
    traces = {}, {}
    tagged(hidden, ids, trace=traces[0])
    dense(hidden, ids, trace=traces[1])
    assert_close(traces[0]["value"], traces[1]["value"])
    state, parts = EngramState(), []
    for t in range(11):
        parts.append(tagged(hidden[:, t : t + 1], ids[:, t : t + 1], state=state))
    assert_close(torch.cat(parts, 1), tagged(hidden, ids))


def test_a_foreign_ngram_in_the_same_row_reads_zero():
    layer = make_layer(engram_vocab_size=3, longest_only=False)  # five rows a head: everything collides
    hidden, ids = inputs()
    write(layer, ids, [4], 3)
    out = layer(hidden, ids)
    assert bool((out[0, 4] != 0).any())
    silent = [t for t in range(11) if t != 4]
    assert not bool(out[0, silent].any())
    mask = torch.ones_like(ids)
    mask[0, 4] = 0
    assert not bool(layer(hidden, ids, attention_mask=mask).any())


def test_only_the_longest_ngram_speaks():
    layer, other = make_layer(), make_layer()
    hidden, ids = inputs()
    write(layer, ids, [6], 2)
    write(layer, ids, [6, 8], 4, seed=3)
    write(other, ids, [6, 8], 4, seed=3)
    write(layer, ids, [9], 3, seed=4)
    write(other, ids, [9], 3, seed=4)
    assert torch.equal(layer(hidden, ids), other(hidden, ids))
    slots = layer.find_slots(*layer.mapping.hash_with_tags(ids)[1])
    assert (slots != ABSENT).sum(-1)[0].tolist() == [0, 0, 0, 0, 0, 0, 2, 0, 2, 2, 0]


def test_gradients_reach_what_is_read():
    layer = make_layer()
    hidden, ids = inputs()
    write(layer, ids, [5], 3)
    hidden.requires_grad_()
    layer(hidden, ids).sum().backward()
    assert bool((hidden.grad[0, 5] != 0).any())
    assert not bool(hidden.grad[0, :5].any())


def test_the_seeded_reader_is_the_same_everywhere():
    assert seeded_signs((0, 1, 0), (2, 8)).int().tolist() == KNOWN_SIGNS
    assert set(seeded_signs((3,), (50, 7)).flatten().tolist()) == {1.0, -1.0}
    layer = make_layer(reader="seeded")
    config = layer.config
    again = Engram(config, layer.mapping, 1)
    assert not any(p.requires_grad for p in again.parameters())
    assert torch.equal(again.value_proj.weight.abs().unique(), torch.tensor([config.n_embed_per_ngram**-0.5]))
    with pytest.raises(ConfigError, match="use_bias and use_conv are off"):
        EngramConfig(reader="seeded")
    with pytest.raises(ConfigError, match="verify_rows"):
        EngramConfig(longest_only=True)
    with pytest.raises(ConfigError, match="table_init"):
        EngramConfig(verify_rows=True, table_init="normal")


KNOWN_SIGNS = [[-1, -1, 1, -1, -1, 1, -1, 1], [-1, -1, -1, 1, -1, 1, 1, -1]]
