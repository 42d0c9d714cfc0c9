from collections import OrderedDict

import numpy as np
import pytest

from engram.analysis import row_usage, row_zipf
from engram.analysis.addresses import NOTHING, ngram_codes, rows_read
from engram.analysis.rows import expected_usage, head_usage
from engram.analysis.zipf import fit_zipf, reuse_distances
from engram.errors import ConfigError
from engram.testing import tiny_memory
from tests.analysis.helpers import TEXTS, make_sample
from tests.editing.helpers import FACTS, make_editor


def lru_hits(accesses, size):
    """The cache itself."""
    cache, hits = OrderedDict(), 0
    for row in accesses:
        if row in cache:
            hits += 1
            cache.move_to_end(row)
        else:
            cache[row] = None
            if len(cache) > size:
                cache.popitem(last=False)
    return hits


@pytest.mark.parametrize("length", [1, 2, 63, 1000])
def test_reuse_distances_are_those_of_a_cache(length):
    accesses = np.random.default_rng(length).zipf(1.3, size=length) % 40
    distances = reuse_distances(accesses)
    assert len(distances) == length - len(set(accesses.tolist()))
    for size in (1, 2, 7, 20, 40):
        assert (distances < size).sum() == lru_hits(accesses.tolist(), size)


def test_reuse_distances_of_known_sequences():
    assert reuse_distances(np.array([3, 3, 3])).tolist() == [0, 0]
    assert reuse_distances(np.array([1, 2, 3, 1, 2, 3])).tolist() == [2, 2, 2]
    assert reuse_distances(np.array([1, 2, 2, 1])).tolist() == [0, 1]
    assert reuse_distances(np.array([5, 6])).tolist() == []


def test_exponents_are_found():
    rank = np.arange(1, 20_001)
    for exponent in (0.7, 1.0, 1.4):
        fit = fit_zipf(np.round(1e7 * rank**-exponent))
        assert fit["exponent"] == pytest.approx(exponent, abs=0.01)
        assert fit["r2"] > 0.999
    assert fit_zipf(np.array([9, 1, 1]))["exponent"] is None
    assert fit_zipf(np.full(50, 7))["exponent"] == pytest.approx(0, abs=1e-9)


def test_caches_of_every_size():
    memory, sample = tiny_memory(), make_sample()
    result = row_zipf(memory, sample)
    assert result["row_bytes"] == 4 * 4
    for layer, entry in result["layers"].items():
        flat = rows_read(memory, sample)[int(layer)].reshape(-1)
        assert entry["accesses"] == len(flat) == sample.tokens * 8
        assert entry["rows_read"] == len(np.unique(flat))
        cache = entry["cache"]
        assert cache["lfu"][-1] == 1.0
        assert cache["lru"][-1] == pytest.approx(1 - entry["rows_read"] / entry["accesses"], abs=1e-6)
        for place in (0, len(cache["rows"]) // 2):
            size = cache["rows"][place]
            assert cache["lru"][place] == pytest.approx(lru_hits(flat.tolist(), size) / len(flat), abs=1e-6)
            counts = np.sort(np.unique(flat, return_counts=True)[1])[::-1]
            assert cache["lfu"][place] == pytest.approx(counts[:size].sum() / len(flat), abs=1e-6)
        needed = entry["needed"]["lfu"]["0.5"]
        assert counts[:needed].sum() >= len(flat) / 2 > counts[: needed - 1].sum()
        assert entry["needed"]["lru"]["0.95"] is None


def test_usage_of_a_head_counted_by_hand():
    """n-grams 0 and 1 share row 7, 2 has row 8 to itself; 0 occurs three times."""
    found = head_usage(np.array([7, 7, 7, 7, 8, 8]), np.array([0, 0, 0, 1, 2, 2]), size=10)
    assert found == {
        "ngrams": 3,
        "used_rows": 2,
        "used_share": 0.2,
        "ngrams_per_used_row": 1.5,
        "sharing_ngrams": pytest.approx(2 / 3),
        "sharing_accesses": pytest.approx(4 / 6),
    }


def test_expectation_is_met_by_even_hashing():
    random = np.random.default_rng(0)
    found = [head_usage(random.integers(0, 500, size=400), np.arange(400), 500) for _ in range(60)]
    expected = expected_usage(500, 400)
    for key in ("used_rows", "used_share", "ngrams_per_used_row"):
        assert np.mean([f[key] for f in found]) == pytest.approx(expected[key], rel=0.01)
    assert np.mean([f["sharing_ngrams"] for f in found]) == pytest.approx(expected["sharing"], rel=0.03)
    assert expected_usage(1, 3) == {"used_rows": 1.0, "used_share": 1.0, "ngrams_per_used_row": 3.0, "sharing": 1.0}


def test_equal_numbers_are_equal_ngrams():
    memory, sample = tiny_memory(max_ngram_size=4, engram_vocab_size=[300] * 3), make_sample(length=16)
    codes = ngram_codes(memory, sample)
    canonical, pad = memory.mapping.compressed_tokenizer.lookup_table, memory.mapping.pad_id
    for order, code in codes.items():
        grams = []
        for window in sample.windows:
            ids = [pad] * 3 + [int(canonical[i]) for i in window.ids]
            grams += [tuple(ids[t + 4 - order : t + 4]) for t in range(len(window.ids))]
        assert len(set(grams)) == len(set(code.tolist()))
        assert len(set(zip(grams, code.tolist()))) == len(set(grams))


def test_equal_ngrams_behind_boundaries_read_equal_rows():
    memory, sample = tiny_memory(boundary_ids=list(range(2, 300, 4)), engram_vocab_size=90_001), make_sample()
    rows = rows_read(memory, sample)[2]
    for order, code in ngram_codes(memory, sample).items():
        first = (order - 2) * 4
        pairs = set(zip(code.tolist(), map(tuple, rows[:, first : first + 4].tolist())))
        assert len(pairs) == len(set(code.tolist())) == len({read for _, read in pairs})


def test_usage_of_a_memory():
    memory, sample = tiny_memory(), make_sample()
    result = row_usage(memory, sample)
    assert set(result["layers"]) == {"0", "2"}
    heads = result["layers"]["2"]["heads"]
    assert [(h["order"], h["head"]) for h in heads] == [(n, k) for n in (2, 3) for k in range(4)]
    assert heads[4]["ngrams"] > heads[0]["ngrams"]  # there are more trigrams than bigrams
    for head in heads:
        assert head["used_share"] == pytest.approx(head["expected"]["used_share"], abs=0.1)
    assert result["layers"]["2"]["used_rows"] == len(np.unique(rows_read(memory, sample)[2]))


def test_every_layer_is_counted_by_its_own_orders():
    memory, sample = tiny_memory(layer_orders={0: [3], 2: [2]}), make_sample()
    layers, plain = row_usage(memory, sample)["layers"], row_usage(tiny_memory(), sample)["layers"]
    assert {head["order"] for head in layers["0"]["heads"]} == {3}
    assert {head["order"] for head in layers["2"]["heads"]} == {2}
    assert layers["0"]["heads"][0]["ngrams"] == plain["0"]["heads"][4]["ngrams"]
    assert layers["2"]["heads"][0]["ngrams"] == plain["2"]["heads"][0]["ngrams"]


def test_verified_rows_are_read_by_their_owners_only():
    editor = make_editor()
    editor.teach(FACTS)
    from engram.analysis import sample_texts

    texts = {"taught": ["KEY:beta 20 7319"], **TEXTS}
    sample = sample_texts(editor.tokenizer, texts, 400, 32)
    with pytest.raises(ConfigError, match="verified"):
        row_usage(editor.memory, sample)
    read = next(iter(rows_read(editor.memory, sample).values()))
    taught = sum(len(window.ids) for window in sample.windows if window.kind == "taught")
    windows = np.repeat([window.kind == "taught" for window in sample.windows], [len(w.ids) for w in sample.windows])
    assert (read[windows] != NOTHING).any()
    assert (read[~windows] == NOTHING).all()
    assert windows.sum() == taught
    layer = next(iter(row_zipf(editor.memory, sample)["layers"].values()))
    assert layer["accesses"] == (read != NOTHING).sum() > 0
