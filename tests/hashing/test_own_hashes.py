"""Hashes of one's own: multipliers that are given, rules that nothing implements, constants that cannot be changed afterwards."""

import copy
import json
import pickle

import numpy as np
import pytest
import torch

from engram import CompressedTokenizer, ConfigError, NgramHashMapping
from engram.hashing import HASH_SPECS, HashSpec, build_mapping, hash_reference, mapping_without_tokenizer, tag_reference
from engram.testing import tiny_tokenizer
from tests.hashing.helpers import small_config

OWN = {1: [3, 5, 7], 15: [11, 2**40 + 1, 13]}
IDS = np.random.default_rng(0).integers(0, 300, (2, 20))


def own_config(**changes):
    return small_config(**{"hash_spec": "exact_given", **changes})


@pytest.mark.parametrize("spec", ["exact_given", "demo_given"])
def test_given_multipliers_make_the_addresses(spec):
    mapping = build_mapping(own_config(hash_spec=spec), tiny_tokenizer(), OWN)
    canonical = mapping.compressed_tokenizer.lookup_table[IDS]
    hashed, tagged = mapping.hash(IDS), mapping.hash_with_tags(torch.from_numpy(IDS))
    for layer, numbers in OWN.items():
        constants = np.array(numbers), mapping.vocab_size_across_layers[layer], mapping.pad_id
        np.testing.assert_array_equal(hashed[layer], hash_reference(canonical, *constants))
        np.testing.assert_array_equal(tagged[layer][1], tag_reference(canonical, *constants))
        assert mapping.layer_multipliers[layer].tolist() == numbers


def test_they_are_in_the_fingerprint_and_survive_json_and_copies():
    mapping = build_mapping(own_config(), tiny_tokenizer(), OWN)
    as_json = json.loads(json.dumps(OWN))  # keys are strings now
    for same in (
        build_mapping(own_config(), tiny_tokenizer(), as_json),
        build_mapping(own_config(), tiny_tokenizer(), {layer: np.array(numbers) for layer, numbers in OWN.items()}),
        copy.deepcopy(mapping),
        pickle.loads(pickle.dumps(mapping)),
    ):
        assert same.fingerprint == mapping.fingerprint
        np.testing.assert_array_equal(same.hash(IDS)[1], mapping.hash(IDS)[1])
    other = build_mapping(own_config(), tiny_tokenizer(), {**OWN, 1: [3, 5, 9]})
    assert other.fingerprint != mapping.fingerprint
    assert not np.array_equal(other.hash(IDS)[1], mapping.hash(IDS)[1])
    alone = mapping_without_tokenizer(own_config(), len(tiny_tokenizer()), OWN)
    np.testing.assert_array_equal(alone.hash(IDS)[15], mapping.hash(IDS)[15])


@pytest.mark.parametrize(
    "given",
    [
        {1: [3, 5, 7]},
        {**OWN, 2: [3, 5, 7]},
        {**OWN, 1: [3, 5]},
        {**OWN, 1: [3, 5, 0]},
        {**OWN, 1: [3, 5, -7]},
        {**OWN, 1: [3, 5, 2**62]},  # times an id that is more than int64 holds
        {**OWN, 1: [3, 5, 7.0]},
        {**OWN, 1: 7},
        [3, 5, 7],
    ],
)
def test_impossible_ones_are_refused(given):
    with pytest.raises(ConfigError, match=r"multipliers: got .* expected {layer: ints} for layers \[1, 15\], 3 each"):
        build_mapping(own_config(), tiny_tokenizer(), given)


def test_they_are_given_where_the_specification_says_so_and_nowhere_else():
    with pytest.raises(ConfigError, match=r"multipliers: got none, .* build_mapping\(config, tokenizer, multipliers="):
        build_mapping(own_config(), tiny_tokenizer())
    for spec, expected in (("exact_v1", "exact_given"), ("demo_v1", "demo_given")):
        with pytest.raises(ConfigError, match=f"got some with hash_spec '{spec}'.*expected hash_spec '{expected}'"):
            build_mapping(own_config(hash_spec=spec), tiny_tokenizer(), OWN)
    with pytest.raises(ConfigError, match=r"expected a CompressedTokenizer; build_mapping\(config, tokenizer\)"):
        NgramHashMapping(own_config(), tiny_tokenizer(), OWN)


def test_rules_that_nothing_implements_are_refused():
    rules = {"ids": "raw", "multipliers": "pcg64_per_layer", "primes": "shared_walk", "boundary": "left_pad"}
    assert HashSpec("mine", **rules) not in HASH_SPECS.values()
    for rule, value in (("ids", "lower"), ("multipliers", "golden"), ("primes", "powers_of_two"), ("boundary", "eos")):
        with pytest.raises(ConfigError, match=f"HashSpec.{rule}: got '{value}', which nothing implements, expected one of '"):
            HashSpec("mine", **{**rules, rule: value})


@pytest.mark.parametrize("asked_before", [False, True])
def test_constants_cannot_be_changed_behind_the_addresses(asked_before):
    mapping = NgramHashMapping(own_config(hash_spec="demo_v1"), CompressedTokenizer(tiny_tokenizer()))
    if asked_before:
        mapping.hash(IDS)
    fingerprint, expected = mapping.fingerprint, copy.deepcopy(mapping).hash(IDS)
    with pytest.raises(TypeError):
        mapping.layer_multipliers[1] = np.array([3, 5, 7])
    with pytest.raises(ValueError, match="read-only"):
        mapping.layer_multipliers[1][:] = 3
    with pytest.raises(AttributeError):
        mapping.layer_multipliers = OWN
    with pytest.raises(TypeError):
        mapping.vocab_size_across_layers[1] = [[7], [11]]
    mapping.vocab_size_across_layers[1][0][0] = 7  # a copy's
    assert mapping.fingerprint == fingerprint
    for layer in (1, 15):
        np.testing.assert_array_equal(mapping.hash(IDS)[layer], expected[layer])


class Reversed(NgramHashMapping):
    """Counts the rows of a head from its end."""

    def hash(self, input_ids, history=None, attention_mask=None):
        hashed = super().hash(input_ids, history, attention_mask)
        sizes = {layer: torch.tensor(self.head_sizes(layer)) - 1 for layer in hashed}
        return {layer: sizes[layer] - rows for layer, rows in hashed.items()}


def test_a_subclass_computes_them_otherwise_and_has_a_fingerprint_of_its_own():
    stock = build_mapping(own_config(hash_spec="exact_v1"), tiny_tokenizer())
    own = Reversed(stock.config, stock.compressed_tokenizer)
    assert own.fingerprint != stock.fingerprint
    ids = torch.from_numpy(IDS)
    assert own.kernel_for(ids) is None
    sizes = torch.tensor(stock.head_sizes(1)) - 1
    assert torch.equal(own.hash(ids)[1], sizes - stock.hash(ids)[1])


def test_a_mapping_of_another_configuration_is_refused():
    mapping = build_mapping(own_config(), tiny_tokenizer(), OWN)
    mapping.check_config(own_config(hidden_size=32, hc_mult=4))
    with pytest.raises(ConfigError, match=r"mapping: made for another configuration \(seed 0, not 1\)"):
        mapping.check_config(own_config(seed=1))
