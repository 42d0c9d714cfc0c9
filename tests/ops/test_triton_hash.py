"""The Triton hash equals the plain one; run by Triton's interpreter on CPU tensors, so that no GPU is needed."""

import pytest
import torch

from engram import native
from engram.hashing import build_mapping, mapping_without_tokenizer
from engram.hashing.ngram import TAG_MODULUS
from engram.testing import tiny_config, tiny_tokenizer
from tests.ops import interpreted


@pytest.fixture(scope="module")
def kernel():
    return interpreted.load("engram.hashing.triton_hash").hash_ngrams_triton


@pytest.fixture(autouse=True)
def plain_only(monkeypatch):
    monkeypatch.setattr(native, "_core", None)


def check(kernel, mapping, ids, history=None, mask=None):
    constants = mapping._constants_on(ids.device)
    tensors = (constants.lookup_table, constants.multipliers, constants.primes[:, 0, 0])
    expected = mapping.hash_with_tags(ids, history, mask)
    for modulus in (None, TAG_MODULUS):
        hashed, tags = kernel(ids, history, mask, *tensors, mapping.config.pad_id, modulus)
        for layer, rows in mapping._by_layer(hashed).items():
            assert torch.equal(rows, expected[layer][0])
            assert tags is None or torch.equal(mapping._by_layer(tags)[layer], expected[layer][1])
        assert (tags is None) == (modulus is None)


@pytest.mark.parametrize(
    ("orders", "heads", "size"),
    [(2, 1, 5), (3, 4, 300), (4, 3, 10**6), (9, 8, 2**31), (32, 1, 2**31)],
    ids=["2x1", "3x4", "4x3", "9x8", "32x1"],
)
def test_sizes_and_pasts(kernel, orders, heads, size):
    config = tiny_config(
        max_ngram_size=orders, n_head_per_ngram=heads, n_embed_per_ngram=heads * 4, engram_vocab_size=size, hash_spec="exact_v1"
    )
    mapping = mapping_without_tokenizer(config, 128_000)
    batch = 1 if orders == 32 else 3  # which takes the interpreter its time
    ids = torch.randint(128_000, (batch, 90), generator=torch.Generator().manual_seed(orders))
    mask = (torch.rand(batch, 60, generator=torch.Generator().manual_seed(1)) > 0.3).long()
    check(kernel, mapping, ids[:, 30:], ids[:, :30], mask)
    if orders == 32:
        return
    check(kernel, mapping, ids)
    check(kernel, mapping, ids[:, :1])
    check(kernel, mapping, ids[:, 1:2], ids[:, :1])
    check(kernel, mapping, ids[:, 1:3], ids[:, :0], mask[:, :2])
    check(kernel, mapping, ids[:0])
    check(kernel, mapping, ids[:, 40:41].int(), ids[:, :40].int(), mask[:, :1].bool())


def test_compressed_ids(kernel):
    mapping = build_mapping(tiny_config(), tiny_tokenizer())
    check(kernel, mapping, tiny_tokenizer()(["THE Memory, the memory!"], return_tensors="pt")["input_ids"])


def test_layers_that_read_fewer_orders(kernel):
    mapping = build_mapping(tiny_config(layer_orders={0: [3]}), tiny_tokenizer())
    ids = torch.randint(300, (2, 9), generator=torch.Generator().manual_seed(0))
    check(kernel, mapping, ids[:, 3:], ids[:, :3])


def test_an_unknown_id_reads_no_memory(kernel):
    mapping = mapping_without_tokenizer(tiny_config(hash_spec="exact_v1"), 100)
    constants = mapping._constants_on(torch.device("cpu"))
    tensors = (constants.lookup_table, constants.multipliers, constants.primes[:, 0, 0])
    wild, tame = torch.tensor([[5, 100, -1, 2**40]]), torch.tensor([[5, 0, 0, 0]])
    got, expected = (kernel(ids, None, None, *tensors, 1, None)[0] for ids in (wild, tame))
    assert torch.equal(got, expected)
