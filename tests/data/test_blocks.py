import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from engram import ConfigError, DataError
from engram.data.blocks import IGNORED, HeldOutBlocks, TrainingBlocks, _filled, epoch_order
from engram.data.recipe import KINDS
from engram.data.reference import training_stream
from engram.data.store import TokenStore


@pytest.fixture(scope="module")
def stores(store, small_store):
    return [store, small_store]


def test_an_epochs_order_never_changes():
    assert epoch_order(0, 0, 8).tolist() == PINNED
    for count in (1, 2, 1000):
        assert sorted(epoch_order(5, 3, count)) == list(range(count))
    orders = [epoch_order(seed, epoch, 50).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4


PINNED = [3, 2, 1, 6, 0, 7, 4, 5]


@settings(max_examples=40, deadline=None)
@given(
    which=st.integers(0, 1),
    seq_len=st.sampled_from([1, 2, 7, 63, 64, 1000]),
    blocks=st.integers(1, 25),
    seed=st.integers(0, 1 << 40),
    data=st.data(),
)
def test_blocks_are_the_plain_stream_wherever_reading_starts(stores, which, seq_len, blocks, seed, data):
    store = stores[which]
    training = TrainingBlocks(store, seq_len, blocks, seed)
    stream = training_stream(store, seq_len * blocks, seed)
    first = data.draw(st.integers(0, blocks - 1))
    for index in [*range(first, blocks), *range(first)]:  # as a resumed run does, and then from the start
        block = training[index]
        assert block["input_ids"].tolist() == stream[index * seq_len : (index + 1) * seq_len]
        assert torch.equal(block["labels"], block["input_ids"])
    assert training.epochs == pytest.approx(seq_len * blocks / len_of_epoch(store))


def len_of_epoch(store):
    return sum(len(store.ids(d)) * int(store.documents["weight"][d]) for d in store.split("train"))


def test_an_epoch_has_every_document_as_often_as_it_weighs(store):
    tokens = len_of_epoch(store)
    ids = TrainingBlocks(store, tokens, 2, seed=3)
    for epoch in (0, 1):
        begins = np.flatnonzero(ids[epoch]["input_ids"].numpy() == store.begin_id)
        pieces = sorted(piece.tobytes() for piece in np.split(ids[epoch]["input_ids"].numpy(), begins[1:]))
        wanted = [
            store.ids(d).astype(np.int64).tobytes() for d in store.split("train") for _ in range(store.documents["weight"][d])
        ]
        assert pieces == sorted(wanted)
    assert not torch.equal(ids[0]["input_ids"], ids[1]["input_ids"])


def test_loaders_and_copies_see_the_same_blocks(store):
    training = TrainingBlocks(store, 16, 12, seed=1)
    alone = torch.stack([training[i]["input_ids"] for i in range(12)])
    loaded = torch.cat([batch["input_ids"] for batch in DataLoader(training, batch_size=5)])
    assert torch.equal(alone, loaded)
    copy = pickle.loads(pickle.dumps(training))
    assert torch.equal(copy[7]["input_ids"], alone[7])
    assert torch.equal(training[-1]["input_ids"], alone[11])
    assert len(list(training)) == 12  # iteration ends
    with pytest.raises(IndexError, match="there are 12"):
        training[12]


@pytest.mark.parametrize("seq_len", [2, 7, 64, 5000])
@pytest.mark.parametrize("limit", [None, 1, 5])
def test_held_out_blocks_predict_every_token_once(store, seq_len, limit):
    blocks = HeldOutBlocks(store, seq_len, limit)
    predicted, kinds = [], []
    for index in range(len(blocks)):
        block, kind = blocks[index], blocks.kinds(index)
        assert block["input_ids"].shape == block["labels"].shape == kind.shape == (seq_len,)
        known = block["labels"] != IGNORED
        assert torch.equal(known, kind >= 0)
        assert torch.equal(block["labels"][known], block["input_ids"][known])
        predicted += block["labels"][1:][known[1:]].tolist()
        kinds += kind[1:][known[1:]].tolist()
    documents = blocks.documents
    assert predicted == [i for d in documents for i in store.ids(d)[1:].tolist()]
    assert kinds == [int(store.documents["kind"][d]) for d in documents for _ in store.ids(d)[1:]]
    if limit is None:
        assert set(documents) == set(store.split("held_out"))
    else:
        assert len(documents) == 1 or len(blocks) <= limit


def test_losses_are_summed_by_kind(store):
    blocks = HeldOutBlocks(store, 32)
    indices = range(len(blocks))
    losses = [blocks[i]["input_ids"][1:].float() for i in indices]  # a loss that tells which token it belongs to
    sums = blocks.sum_by_kind(losses, indices)
    assert set(sums) == {"prose", "code"} == set(blocks.bytes_by_kind)
    for kind, (total, tokens) in sums.items():
        own = [d for d in store.split("held_out") if store.kind(d) == kind]
        assert tokens == sum(len(store.ids(d)) - 1 for d in own)
        assert total == sum(int(store.ids(d)[1:].sum()) for d in own)
        assert blocks.bytes_by_kind[kind] == store.counts["held_out"][kind]["bytes"]
    assert set(sums) <= set(KINDS)


def test_impossible_blocks(store, small_store):
    for wrong in ({"seq_len": 0}, {"blocks": 0}, {"seed": -1}):
        with pytest.raises(ConfigError, match=f"{next(iter(wrong))}: got"):
            TrainingBlocks(store, **{"seq_len": 4, "blocks": 2, "seed": 0, **wrong})
    with pytest.raises(DataError, match="holds nothing out"):
        HeldOutBlocks(small_store, 8)
    with pytest.raises(ConfigError, match="expected at least 2"):
        HeldOutBlocks(store, 1)
    with pytest.raises(IndexError):
        HeldOutBlocks(store, 8)[10**6]


def named(store, names):
    """A copy of a store whose held-out documents are called so, over and over."""
    other = TokenStore(store.folder)
    other._names = list(store.names)
    for number, document in enumerate(other.split("held_out")):
        other._names[document] = names[number % len(names)]
    return other


def test_parts_by_file_keep_the_documentation_of_a_program_with_it(store):
    files = ["a.py", "a.py#doc0", "b.py#doc12", "notes#doc.txt", "c.py"]
    other = named(store, files)
    parts = [HeldOutBlocks(other, 16, part=(n, 2), by_file=True) for n in range(2)]
    assert sorted(document for part in parts for document in part.documents) == store.split("held_out").tolist()
    found = [
        {other.names[document].removesuffix("#doc0").removesuffix("#doc12") for document in part.documents} for part in parts
    ]
    assert not found[0] & found[1]
    assert set().union(*found) == {"a.py", "b.py", "notes#doc.txt", "c.py"}
    for part, names in zip(parts, found):
        told = part.composition
        sizes = [
            int(other.documents["bytes"][[d for d in part.documents if other.names[d].startswith(name)]].sum())
            for name in names
        ]
        assert (told["documents"], told["files"]) == (len(part.documents), len(names))
        assert told["largest_share"] == round(max(sizes) / sum(sizes), 4)
        assert told["largest"] in names


def test_no_document_is_more_than_an_eighth_of_what_is_measured_by_file(store):
    lengths = store.documents["length"][store.split("held_out")]
    limit = 8 * int(np.median(lengths)) // 16
    blocks = HeldOutBlocks(store, 16, limit, by_file=True)
    assert store.documents["length"][blocks.documents].max() <= limit * 16 // 8 < lengths.max()
    tiny = HeldOutBlocks(store, 16, 1, by_file=True)  # none is so short: one is taken all the same
    assert len(tiny.documents) == 1


def in_order(store):
    """All held-out documents as they are measured without a limit."""
    return HeldOutBlocks(store, 16).documents


@pytest.mark.parametrize("limit", [1, 3, 10, 40])
def test_by_document_the_first_that_does_not_fit_is_the_end(store, limit):
    """Results were made so: what they were measured on must not change."""
    for n in (0, 1):
        wanted, tokens = [], 0
        for document in in_order(store)[n::2]:
            tokens += store.documents["length"][document]
            if wanted and tokens > limit * 15 + 1:
                break
            wanted.append(document)
        assert HeldOutBlocks(store, 16, limit, (n, 2)).documents.tolist() == wanted


def test_by_file_what_does_not_fit_is_passed_over_and_the_budget_filled(store):
    lengths = store.documents["length"]
    for limit in (12, 20, 40):
        blocks = HeldOutBlocks(store, 16, limit, by_file=True)
        left = limit * 15 + 1 - int(lengths[blocks.documents].sum())
        others = np.setdiff1d(in_order(store), [*blocks.documents, *blocks.passed_over])
        assert left >= 0
        assert not len(others) or lengths[others].min() > left
        assert (lengths[blocks.passed_over] > limit * 16 // 8).all()


def test_by_file_kinds_are_measured_as_they_are_held_out(store):
    lengths, kinds = store.documents["length"], store.documents["kind"]
    small = np.setdiff1d(in_order(store), HeldOutBlocks(store, 16, 40, by_file=True).passed_over)
    measured = HeldOutBlocks(store, 16, 40, by_file=True).documents
    for kind in np.unique(kinds[small]):
        share = [lengths[group[kinds[group] == kind]].sum() / lengths[group].sum() for group in (small, measured)]
        assert share[1] == pytest.approx(share[0], abs=0.15)
    halves = [HeldOutBlocks(store, 16, part=(n, 2), by_file=True) for n in (0, 1)]
    for kind in np.unique(kinds[small]):
        found = [int((kinds[half.documents] == kind).sum()) for half in halves]
        assert abs(found[0] - found[1]) <= 1


def test_by_file_every_file_comes_before_another_has_its_second_document(store):
    other = named(
        store, ["long.txt#0", "long.txt#1", "long.txt#2", "long.txt#3", "a.txt", "long.txt#4", "b.txt#0", "c.py#doc3"]
    )
    blocks = HeldOutBlocks(other, 16, 40, by_file=True)
    for kind in np.unique(other.documents["kind"][blocks.documents]):
        own = [other.names[d].split("#")[0] for d in blocks.documents if other.documents["kind"][d] == kind]
        assert set(own[: len(set(own))]) == set(own)
    whole = HeldOutBlocks(named(store, ["one.txt#0", "one.txt#1"]), 16)
    assert whole.composition["files"] == 1
    with pytest.raises(DataError, match="too few files out for 2 parts; raise held_out_percent, or split"):
        HeldOutBlocks(whole.store, 16, part=(1, 2), by_file=True)


def test_of_documents_that_are_all_too_large_the_shortest_is_measured(store):
    small = HeldOutBlocks(store, 16, 1, by_file=True)
    lengths = store.documents["length"][in_order(store)]
    assert len(small.passed_over) == 0
    assert (
        store.documents["length"][small.documents].sum() <= 16 or lengths.min() == store.documents["length"][small.documents][0]
    )


def test_parts_share_the_held_out_documents_out(store):
    parts = [HeldOutBlocks(store, 16, part=(n, 3)).documents.tolist() for n in range(3)]
    assert sorted(document for part in parts for document in part) == store.split("held_out").tolist()
    for wrong in ((3, 3), (-1, 2), (0, 0)):
        with pytest.raises(ConfigError, match="part: got"):
            HeldOutBlocks(store, 16, part=wrong)
    with pytest.raises(DataError, match="too few documents"):
        HeldOutBlocks(store, 16, part=(999, 1000))


def test_kinds_in_proportion_and_files_in_turn():
    """Four parts of one kind to one of the other; of the file with six documents two, as of that with two; the budget filled to its last."""
    names = [*(f"a#{number}" for number in range(6)), "b#0", "b#1", "c#0", "d#0"]
    documents = {"length": np.full(10, 10), "kind": np.array([0] * 8 + [1] * 2)}
    store = SimpleNamespace(names=names, documents=documents)
    assert _filled(store, np.arange(10), 50).tolist() == [0, 8, 6, 1, 7]
