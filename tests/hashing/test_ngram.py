import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engram import CompressedTokenizer, ConfigError, EngramConfig, NgramHashMapping
from engram.hashing import build_mapping, get_hash_spec, hash_reference, mapping_without_tokenizer, tag_reference
from engram.testing import tiny_tokenizer
from tests.hashing.helpers import small_config


class Vocabulary:
    """A tokenizer of given texts, for random vocabularies."""

    def __init__(self, texts):
        self.texts = texts

    def __len__(self):
        return len(self.texts)

    def decode(self, ids, skip_special_tokens=True):
        return "".join(self.texts[i] for i in ids)

    def convert_ids_to_tokens(self, i):
        return f"raw{i}"


# Below 8192 kernels divide in integers.
SIZES = st.one_of(st.integers(1, 5000), st.integers(8192, 10**6), st.integers(2**31, 2**33))


@st.composite
def cases(draw):
    size = draw(st.integers(2, 60))
    order = draw(st.integers(2, 8))
    texts = draw(st.lists(st.text(min_size=1, max_size=3), min_size=size, max_size=size))
    layers = draw(st.lists(st.integers(0, 40), min_size=1, max_size=3, unique=True))
    some = st.sets(st.integers(2, order), min_size=1)
    config = EngramConfig(
        engram_vocab_size=draw(st.lists(SIZES, min_size=order - 1, max_size=order - 1)),
        max_ngram_size=order,
        n_embed_per_ngram=8,
        n_head_per_ngram=draw(st.sampled_from([1, 2, 4, 8])),
        layer_ids=layers,
        layer_orders=draw(st.none() | st.dictionaries(st.sampled_from(layers), some)),
        pad_id=draw(st.integers(0, size - 1)),
        boundary_ids=draw(st.just([]) | st.lists(st.integers(0, size - 1), max_size=size // 4, unique=True)),
        seed=draw(st.integers(0, 2**31)),
    )
    batch, length, past = draw(st.integers(0, 3)), draw(st.integers(0, 13)), draw(st.integers(0, 9))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    ids = rng.integers(0, size, (batch, past + length))
    mask = (rng.random((batch, length)) > 0.3).astype(np.int64)
    return Vocabulary(texts), config, ids, past, mask


@settings(max_examples=60, deadline=None)
@given(cases())
def test_fast_path_equals_the_definition(case):
    vocabulary, config, ids, past, mask = case
    mapping = NgramHashMapping(config, CompressedTokenizer(vocabulary))
    table = mapping.compressed_tokenizer.lookup_table
    history, new = ids[:, :past], ids[:, past:]
    for masks in (None, mask):
        got = mapping.hash(new, history=history, attention_mask=masks)
        as_tensors = mapping.hash(
            torch.from_numpy(new), torch.from_numpy(history), None if masks is None else torch.from_numpy(masks)
        )
        for layer in config.layer_ids:
            expected = hash_reference(
                table[new],
                mapping.layer_multipliers[layer],
                mapping.vocab_size_across_layers[layer],
                mapping.pad_id,
                table[history],
                masks,
                np.isin(
                    np.hstack([history, new if masks is None else np.where(masks, new, config.pad_id)]), config.boundary_ids
                ),
            )
            assert isinstance(got[layer], np.ndarray)
            assert got[layer].dtype == np.int64
            np.testing.assert_array_equal(got[layer], expected)
            np.testing.assert_array_equal(as_tensors[layer].numpy(), expected)


@settings(max_examples=40, deadline=None)
@given(cases())
def test_tags_equal_their_definition(case):
    vocabulary, config, ids, past, mask = case
    config = config.replace(hash_spec="exact_v1", boundary_ids=())
    mapping = build_mapping(config, vocabulary)
    history, new = ids[:, :past], ids[:, past:]
    arguments = torch.from_numpy(new), torch.from_numpy(history), torch.from_numpy(mask)
    plain = mapping.hash(*arguments)
    for layer, (indices, tags) in mapping.hash_with_tags(*arguments).items():
        constants = mapping.layer_multipliers[layer], mapping.vocab_size_across_layers[layer], config.pad_id
        np.testing.assert_array_equal(tags.numpy(), tag_reference(new, *constants, history, mask))
        assert torch.equal(indices, plain[layer])
        assert tags.dtype == torch.int32
        assert tags.numel() == 0 or int(tags.min()) >= 1


def test_index_and_tag_tell_every_ngram_from_every_other():
    """All 3-grams over 60 tokens, 216,000 of them, in 1,009 rows: no two agree in row and tag."""
    config = EngramConfig(
        engram_vocab_size=[5, 1000], n_embed_per_ngram=1, n_head_per_ngram=1, layer_ids=[0], hash_spec="exact_v1", pad_id=0
    )
    mapping = build_mapping(config, Vocabulary([str(i) for i in range(60)]))
    every = torch.cartesian_prod(*[torch.arange(60)] * 3)
    indices, tags = mapping.hash_with_tags(every)[0]
    assert len(torch.stack([indices[:, 2, 1], tags[:, 2, 1].long()]).unique(dim=1)[0]) == 60**3


def test_exact_ids_keep_case_apart_and_know_their_tokenizer():
    config = EngramConfig(
        engram_vocab_size=[50, 50], n_embed_per_ngram=4, n_head_per_ngram=1, layer_ids=[0], hash_spec="exact_v1", pad_id=0
    )
    exact, compressed = (
        build_mapping(config, Vocabulary("amM")),
        build_mapping(config.replace(hash_spec="demo_v1"), Vocabulary("amM")),
    )
    assert len(exact.compressed_tokenizer) == 3
    assert len(compressed.compressed_tokenizer) == 2
    ids = torch.tensor([[0, 1], [0, 2]])
    assert torch.equal(*compressed.hash(ids)[0])
    assert not torch.equal(*exact.hash(ids)[0])

    class Renamed(Vocabulary):
        def convert_ids_to_tokens(self, i):
            return f"other{i}"

    assert build_mapping(config, Renamed("amM")).fingerprint != exact.fingerprint
    alone = mapping_without_tokenizer(config, 3)
    assert torch.equal(alone.hash(ids)[0], exact.hash(ids)[0])
    with pytest.raises(ConfigError, match="compresses ids"):
        mapping_without_tokenizer(config.replace(hash_spec="demo_v1"), 3)


def make_mapping(**changes):
    return NgramHashMapping(small_config(**changes), CompressedTokenizer(tiny_tokenizer()))


def test_behind_a_boundary_addresses_are_those_of_a_text_that_begins_there():
    mapping, plain = make_mapping(boundary_ids=[7, 9]), make_mapping()
    before, behind = [[20, 21, 22]], [[23, 24, 25, 26]]
    for boundary in (7, 9):
        ids = np.array([[*before[0], boundary, *behind[0]]])
        for layer, hashed in mapping.hash(ids).items():
            np.testing.assert_array_equal(hashed[:, :3], plain.hash(np.array(before))[layer])
            np.testing.assert_array_equal(hashed[:, 4:], plain.hash(np.array(behind))[layer])
            np.testing.assert_array_equal(hashed[:, 3:4], plain.hash(np.array([[mapping.config.pad_id]]))[layer])
    assert mapping.fingerprint != plain.fingerprint
    assert mapping.fingerprint == make_mapping(boundary_ids=[9, 7]).fingerprint
    with pytest.raises(ConfigError, match="where n-grams have tags"):
        mapping.hash_with_tags(torch.from_numpy(ids))
    assert mapping.config == make_mapping(boundary_ids=[9, 7]).config
    assert mapping.windows(torch.from_numpy(ids)).shape == (1, 8, 3)
    assert mapping.windows(torch.empty((2, 0), dtype=torch.int64)).shape == (2, 0, 3)
    with pytest.raises(ConfigError, match="boundary_ids: got 100000, expected ids of the tokenizer"):
        make_mapping(boundary_ids=[100_000])


@pytest.mark.parametrize("wrong", ["5,7", None, {3: 1}, 5, [1, 1], [-1], [True], ["7"], b"57"])
def test_boundaries_that_are_no_list_of_ids_are_refused(wrong):
    with pytest.raises(ConfigError, match=r"EngramConfig\.boundary_ids: got .*, expected a list of token ids"):
        small_config(boundary_ids=wrong)


def test_an_order_left_out_of_a_layer_moves_no_other_address():
    full, fewer = make_mapping(), make_mapping(layer_orders={1: [3]})
    assert fewer.vocab_size_across_layers[1] == [[], [701, 709, 719, 727]]
    assert fewer.vocab_size_across_layers[15] == full.vocab_size_across_layers[15]
    assert fewer.head_sizes(1) == [701, 709, 719, 727]
    ids = np.random.default_rng(0).integers(0, 300, (2, 20))
    for arguments in ((ids,), (ids[:, 4:], ids[:, :4], ids[:, 4:] > 30)):
        every, some = full.hash(*arguments), fewer.hash(*arguments)
        assert list(some) == list(every)
        np.testing.assert_array_equal(some[1], every[1][..., 4:])
        np.testing.assert_array_equal(some[15], every[15])
    other = make_mapping(layer_orders={1: [2]}), make_mapping(layer_orders={15: [3]})
    assert len({mapping.fingerprint for mapping in (full, fewer, *other)}) == 4
    assert make_mapping(layer_orders={1: [3, 2]}).fingerprint == full.fingerprint


def test_arrays_have_the_addresses_of_tensors_in_layers_without_some_orders_too():
    mapping = make_mapping(layer_orders={1: [3]})
    ids = np.random.default_rng(0).integers(0, 300, (2, 20))
    expected = mapping.hash(torch.from_numpy(ids))
    for _ in range(2):
        got = mapping.hash(ids)
        for layer, hashed in expected.items():
            np.testing.assert_array_equal(got[layer], hashed.numpy())


def test_chunks_with_history_equal_the_whole():
    mapping = make_mapping(max_ngram_size=3)
    ids = np.random.default_rng(0).integers(0, 300, (3, 40))
    whole = mapping.hash(ids)
    for cut in (1, 2, 17, 39):
        parts = mapping.hash(ids[:, :cut]), mapping.hash(ids[:, cut:], history=ids[:, :cut])
        for layer in (1, 15):
            np.testing.assert_array_equal(np.concatenate([p[layer] for p in parts], axis=1), whole[layer])


def test_left_padding_does_not_enter_an_ngram():
    mapping = make_mapping()
    ids = np.random.default_rng(0).integers(2, 300, (1, 9))
    padded = np.concatenate([np.full((1, 4), 77), ids], axis=1)  # 77 is not pad_id: the mask alone must do it
    mask = np.array([[0] * 4 + [1] * 9])
    for layer, expected in mapping.hash(ids).items():
        np.testing.assert_array_equal(mapping.hash(padded, attention_mask=mask)[layer][:, 4:], expected)


def test_multipliers_and_primes_of_demo_v1():
    mapping = make_mapping(seed=7)
    vocab = len(mapping.compressed_tokenizer)
    bound = max(1, (np.iinfo(np.int64).max // vocab) // 2)
    for layer in (1, 15):
        expected = np.random.default_rng(7 + 10007 * layer).integers(0, bound, size=3, dtype=np.int64) * 2 + 1
        np.testing.assert_array_equal(mapping.layer_multipliers[layer], expected)
    primes = [p for layer in (1, 15) for order in mapping.vocab_size_across_layers[layer] for p in order]
    assert len(set(primes)) == len(primes)
    assert mapping.vocab_size_across_layers[1][0] == [503, 509, 521, 523]  # the first primes from 500 on
    assert mapping.vocab_size_across_layers[1][1] == [701, 709, 719, 727]
    assert mapping.vocab_size_across_layers[15][0] == [541, 547, 557, 563]  # the walk is shared: none is used twice
    assert mapping.vocab_size_across_layers[15][1] == [733, 739, 743, 751]


def test_demo_sizes_need_no_overflow():
    largest = 129279
    bound = max(1, (np.iinfo(np.int64).max // 99000) // 2)
    assert largest * (2 * (bound - 1) + 1) > 0  # python ints
    mapping = make_mapping()
    for multiplier in mapping.layer_multipliers.values():
        assert all(int(m) * (len(mapping.compressed_tokenizer) - 1) <= np.iinfo(np.int64).max for m in multiplier)


def test_fingerprint_tells_every_identity_apart():
    base = make_mapping().fingerprint
    assert make_mapping().fingerprint == base
    for change in (
        {"seed": 1},
        {"pad_id": 0},
        {"layer_ids": [1, 14]},
        {"engram_vocab_size": [500, 701 + 8]},
        {"n_head_per_ngram": 8},
    ):
        assert make_mapping(**change).fingerprint != base
    other = NgramHashMapping(make_mapping().config, CompressedTokenizer(Vocabulary([str(i) for i in range(400)])))
    assert other.fingerprint != base


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (np.array([[0, 5000]]), "got id 5000, expected 0..379"),
        (np.array([[-1, 5]]), "got id -1"),
        (np.array([1, 2]), "expected integers of shape"),
        (np.array([[0.5]]), "expected integers"),
    ],
)
def test_impossible_ids_are_refused(ids, message):
    with pytest.raises(ConfigError, match=message):
        make_mapping().hash(ids)


def test_impossible_shapes_and_names_are_refused():
    mapping, ids = make_mapping(), np.zeros((2, 3), dtype=np.int64)
    with pytest.raises(ConfigError, match="history"):
        mapping.hash(ids, history=np.zeros((1, 2), dtype=np.int64))
    with pytest.raises(ConfigError, match="attention_mask"):
        mapping.hash(ids, attention_mask=np.ones((2, 4)))
    with pytest.raises(ConfigError, match="hash_spec"):
        get_hash_spec("nope")
    for pad_id in (len(tiny_tokenizer()), 4000):
        with pytest.raises(ConfigError, match="pad_id"):
            make_mapping(pad_id=pad_id)


def test_mapping_survives_copying():
    import copy

    mapping = make_mapping()
    ids = torch.arange(10).view(1, 10)
    before = mapping.hash(ids)[1]
    assert torch.equal(copy.deepcopy(mapping).hash(ids)[1], before)


@pytest.mark.parametrize("spec", ["demo_v1", "exact_v1"])
def test_ids_beyond_the_tokenizer_count_as_padding_once_they_are_accepted(spec):
    mapping, vocabulary = make_mapping(hash_spec=spec), len(tiny_tokenizer())
    ids = torch.tensor([[3, vocabulary, 5, vocabulary + 9, 7]])
    as_padding = ids.masked_fill(ids >= vocabulary, mapping.config.pad_id)
    expected, fingerprint = mapping.hash_with_tags(as_padding), mapping.fingerprint
    with pytest.raises(ConfigError, match=f"expected 0..{vocabulary - 1}"):
        mapping.hash(ids)
    mapping.accept_ids(vocabulary + 10)
    assert mapping.fingerprint == fingerprint
    for layer, (hashed, tags) in mapping.hash_with_tags(ids).items():
        assert torch.equal(hashed, expected[layer][0])
        assert torch.equal(tags, expected[layer][1])
        assert torch.equal(mapping.hash(ids)[layer], hashed)
        assert torch.equal(mapping.hash_plain(ids)[layer], hashed)
        assert (mapping.hash(ids.numpy())[layer] == hashed.numpy()).all()
    with pytest.raises(ConfigError, match=f"got id {vocabulary + 10}, expected 0..{vocabulary + 9}"):
        mapping.hash(ids + 1)
    mapping.accept_ids(5)  # never fewer than the tokenizer has
    assert torch.equal(mapping.hash(as_padding)[1], expected[1][0])


def test_a_mapping_and_its_tokenizer_say_what_they_are():
    config = small_config()
    mapping = build_mapping(config, tiny_tokenizer())
    rows = sum(sum(mapping.head_sizes(layer)) for layer in config.layer_ids)
    ids = mapping.compressed_tokenizer
    assert repr(ids) == f"CompressedTokenizer(ids={len(ids.lookup_table)}, canonical_ids={len(ids)})"
    assert repr(mapping) == (
        f"NgramHashMapping(hash_spec='demo_v1', layers={list(config.layer_ids)}, orders=2..{config.max_ngram_size}, "
        f"heads={config.num_heads}, rows={rows})"
    )
    assert repr(mapping_without_tokenizer(config.replace(hash_spec="exact_v1"), 50).compressed_tokenizer).startswith(
        "ExactTokenizer(ids=50,"
    )
