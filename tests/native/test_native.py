"""Every kernel against plain PyTorch, and what it refuses."""

import copy
import gc
import os
import subprocess
import sys
from contextlib import contextmanager
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engram import ConfigError, EngramConfig, native
from engram.hashing import mapping_without_tokenizer
from engram.layers import Engram
from engram.native import optional
from engram.ops import lookup_rows
from engram.tables import ABSENT
from tests.children import run_python
from tests.editing.helpers import FACTS, logits, make_editor

pytestmark = pytest.mark.skipif(native.core() is None, reason="the native core is not built")


@contextmanager
def limited_to(instructions):
    """Kernels as on a machine that has these instructions at best."""
    if not native.core().limit_instruction_set(instructions):
        pytest.skip(f"this machine has no {instructions}")
    try:
        yield
    finally:
        native.core().limit_instruction_set("")


@pytest.fixture
def pytorch_alone(monkeypatch):
    return lambda: monkeypatch.setattr(native, "_core", None)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_verified_rows_are_found_as_pytorch_finds_them(data):
    heads = data.draw(st.sampled_from([1, 2, 3, 8]))
    config = EngramConfig.for_teaching(
        engram_vocab_size=data.draw(st.sampled_from([50, 20_000, 2**31])),
        max_ngram_size=data.draw(st.integers(2, 12)),
        n_head_per_ngram=heads,
        n_embed_per_ngram=2 * heads,
        layer_ids=(0, 3),
        hidden_size=8,
        longest_only=data.draw(st.booleans()),
    )
    vocabulary = data.draw(st.integers(3, 40))
    engram = Engram(config, mapping_without_tokenizer(config, vocabulary), 3)
    rng = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    batch, length = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 300))
    ids = torch.randint(vocabulary, (batch, length), generator=rng)
    history = torch.randint(vocabulary, (batch, data.draw(st.integers(0, 15))), generator=rng)
    mask = torch.rand(batch, length, generator=rng) > 0.2
    hash_ids, tags = engram.mapping.hash_with_tags(ids, history, mask)[3]
    rows = (hash_ids + engram.multi_head_embedding.offsets).flatten()
    chosen = torch.randperm(len(rows), generator=rng)[: data.draw(st.integers(0, 60))]
    written, at = rows[chosen].unique(return_inverse=True)
    # Of several n-grams, one owns the row.
    owner = torch.zeros(len(written), dtype=torch.int32).scatter_(0, at, tags.flatten()[chosen])
    table = engram.table
    table.insert(written, owner, torch.ones(len(written), table.dim))
    expected = engram.find_slots(hash_ids, tags, mask)
    found = engram.find(ids, history, mask)
    if found is None:
        assert not bool((expected != ABSENT).any())
    else:
        assert torch.equal(found, expected)


ANY_PRIMES = [8209, 8221, 65_537, 1_000_003, 16_777_259, 2_147_483_647, 4_294_967_311, 1_099_511_627_791]
ANY_PRIMES += [8231, 8233, 8237, 8243, 16_411, 32_771, 131_101, 1_048_583]
PRIMES_OF_TABLES = [32_771, 32_779, 65_537, 1_000_003, 16_777_259, 1_073_741_827, 2_147_483_629, 2_147_483_647]  # 2^15 to 2^31


@pytest.mark.parametrize(
    ("heads", "primes"), [(3, ANY_PRIMES), (8, ANY_PRIMES), (16, ANY_PRIMES), (4, PRIMES_OF_TABLES), (8, PRIMES_OF_TABLES)]
)
@pytest.mark.parametrize("instructions", ["portable", "avx2", "avx512"])
def test_quotients_and_remainders_are_exact_where_rounding_is_worst(instructions, heads, primes):
    primes = primes[:heads]
    largest = (1 << 63) - 1
    values = {0, 1, largest, largest - 1}
    for prime in primes:
        for quotient in (1, 2, 3, (1 << 50) // 3, largest // prime, *(largest // prime >> shift for shift in range(1, 50))):
            # Where a quotient changes, and where one that is rounded to the nearest does.
            for edge in (quotient * prime, quotient * prime + prime // 2):
                values |= {v for v in range(edge - 2, edge + 3) if 0 <= v <= largest}
    mixes = sorted(values)
    # Ids stand for the mixes themselves: the one before is multiplied by nothing.
    kernel = native.HashKernel(np.array(mixes), np.array([[1, 0]]), np.array([primes]), heads, 0)
    with limited_to(instructions):
        ids = torch.arange(len(mixes)).unsqueeze(0)
        rows, tags = kernel.hash(ids, None, None, True)
        assert torch.equal(kernel.hash(ids, None, None, False)[0], rows)
    assert rows[0, 0].tolist() == [[mix % prime for prime in primes] for mix in mixes]
    assert tags[0, 0].tolist() == [[mix // prime % (2**31 - 1) + 1 for prime in primes] for mix in mixes]


def test_a_taught_memory_speaks_the_same_with_and_without_the_native_core(pytorch_alone):
    editor = make_editor()
    editor.teach(FACTS)
    texts = ["KEY:alpha 17 blue window", "What is alpha 17?", "nothing of that"]
    fast = [logits(editor, text) for text in texts]
    with editor.memory.record() as traces:
        logits(editor, texts[0])
        fast_slots = traces[2]["slots"]
    pytorch_alone()
    assert all(torch.equal(logits(editor, text), was) for text, was in zip(texts, fast))
    with editor.memory.record() as traces:
        logits(editor, texts[0])
        assert torch.equal(traces[2]["slots"], fast_slots)


def test_a_copied_memory_finds_its_rows_when_the_original_is_gone():
    editor = make_editor()
    editor.teach(FACTS)
    before = logits(editor, "KEY:alpha 17 blue window")
    layer = next(iter(editor.memory.engrams.values()))
    layer.find(torch.tensor([[1, 2, 3]]))  # the index exists
    copied = copy.deepcopy(layer.multi_head_embedding)
    assert copied._index[2].addresses[:2] != layer.multi_head_embedding._index[2].addresses[:2]
    layer.multi_head_embedding = copied
    del layer
    gc.collect()
    assert torch.equal(logits(editor, "KEY:alpha 17 blue window"), before)


def quantised(kind, rows, dim, rng):
    """Random rows of a format, and what they are in float32."""
    if kind == "int8":
        data = torch.randint(-128, 128, (rows, dim), dtype=torch.int8, generator=rng)
        scales = torch.rand(rows, generator=rng)
        return data, scales, data.float() * scales[:, None]
    if kind == "float8":
        data = torch.randint(0, 256, (rows, dim), dtype=torch.uint8, generator=rng).view(torch.float8_e4m3fn)
        scales = torch.randint(100, 150, (rows, (dim + 31) // 32), dtype=torch.uint8, generator=rng)
        factors = torch.exp2(scales.float() - 127).repeat_interleave(32, dim=1)[:, :dim]
        return data, scales, data.float() * factors
    data = torch.randint(0, 256, (rows, dim // 2), dtype=torch.uint8, generator=rng)
    scales = torch.rand(rows, generator=rng)
    halves = torch.stack([data & 15, data >> 4], dim=-1).flatten(1).to(torch.int8)
    return data, scales, torch.where(halves > 7, halves - 16, halves).float() * scales[:, None]


@pytest.mark.parametrize("instructions", ["portable", "avx2", "avx512"])
@settings(max_examples=40, deadline=None)
@given(st.sampled_from(["copy", "bfloat16", "float16", "int8", "float8", "int4"]), st.integers(1, 50), st.data())
def test_rows_are_gathered_as_pytorch_gathers_them(instructions, kind, rows, data):
    dim = (
        data.draw(st.sampled_from([16, 32, 64, 80, 96, 128, 192]))
        if data.draw(st.booleans())
        else 2 * data.draw(st.integers(1, 80))
    )
    rng = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    count = data.draw(st.sampled_from([0, 1, 17, 700, 20_000]))
    row_ids = torch.randint(rows, (count,), generator=rng)
    scales = None
    if kind == "copy":
        table = torch.randn(rows, dim, generator=rng).to(
            data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
        )
        expected = table
    elif kind in ("bfloat16", "float16"):
        table = (torch.randn(rows, dim, generator=rng) * 10.0 ** data.draw(st.integers(-7, 4))).to(getattr(torch, kind))
        expected = table.float()
    else:
        table, scales, expected = quantised(kind, rows, dim, rng)
    out = torch.empty((count, dim), dtype=expected.dtype)
    with limited_to(instructions):
        native.gather_rows(table, row_ids, out, scales, dim)
    torch.testing.assert_close(out, expected[row_ids], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("instructions", ["portable", "avx2", "avx512"])
@pytest.mark.parametrize("dim", [4, 16, 64])  # the first is too short for the vector path
def test_every_half_is_turned_into_a_float_exactly(dim, instructions):
    table = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.float16).view(-1, dim)
    out = torch.empty(len(table), dim)
    with limited_to(instructions):
        native.gather_rows(table, torch.arange(len(table)), out)
    torch.testing.assert_close(out, table.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_outputs_hold_the_rows_and_train_as_small_ones_do(dtype):
    table = torch.randn(50, 64).to(dtype).requires_grad_()
    row_ids = torch.randint(50, (2, 1 << 18 if dtype == torch.bfloat16 else 1 << 17))  # 64 MB
    rows = lookup_rows(table, row_ids)
    assert rows.numel() * rows.element_size() == 1 << 26
    assert rows.data_ptr() % 64 == 0
    assert torch.equal(rows, table.detach()[row_ids])
    rows[:, :3].sum().backward()
    assert torch.equal(table.grad.to_dense()[:, 0].float(), torch.bincount(row_ids[:, :3].flatten(), minlength=50).float())
    rows.detach().add_(1).resize_(5)  # memory like any other


def test_row_numbers_out_of_range_are_named_and_bad_arguments_refused():
    table, out = torch.zeros(5, 8), torch.zeros(3, 8)
    for wrong in (-1, 5, 2**62, -(2**63)):
        with pytest.raises(IndexError, match=str(wrong)):
            native.gather_rows(table, torch.tensor([0, wrong, 1]), out)
    with pytest.raises(ValueError, match="contiguous CPU tensors"):
        native.gather_rows(torch.zeros(8, 5).T, torch.tensor([0, 1, 1]), out)
    with pytest.raises(ValueError, match="int64 row numbers"):
        native.gather_rows(table, torch.tensor([0, 1, 1], dtype=torch.int32), out)
    with pytest.raises(ValueError, match=r"expected float32 \[3, 8\]"):
        native.gather_rows(table.bfloat16(), torch.tensor([0, 1, 1]), out.double())
    with pytest.raises(ValueError, match="expected bfloat16 or float16"):
        native.gather_rows(table.double(), torch.tensor([0, 1, 1]), out)
    with pytest.raises(ValueError, match="do not go together"):
        native.gather_rows(table.to(torch.int8), torch.tensor([0, 1, 1]), out, torch.zeros(4))
    with pytest.raises(ValueError, match="does not make 16 values"):
        native.gather_rows(table, torch.tensor([0, 1, 1]), torch.zeros(3, 16), dim=16)
    with pytest.raises(ValueError, match="one per row"):
        native.gather_rows(table.to(torch.int8), torch.tensor([0, 1, 1]), out, torch.zeros(5, 2))
    with pytest.raises(ValueError, match="one per 32 values"):
        native.gather_rows(table.to(torch.float8_e4m3fn), torch.tensor([0, 1, 1]), out, torch.zeros(5, 2, dtype=torch.uint8))


@pytest.mark.parametrize("wrong", [-1, 40, 2**40, -(2**63)])
def test_ids_out_of_range_are_named(wrong):
    mapping = mapping_without_tokenizer(EngramConfig.for_teaching(hidden_size=8), 40)
    for ids, history in (([[1, wrong]], None), ([[1]], torch.tensor([[wrong]]))):
        with pytest.raises(ConfigError, match=f"got id {wrong}, expected 0..39"):
            mapping.hash(torch.tensor(ids), history)
        with pytest.raises(ConfigError, match=f"got id {wrong}, expected 0..39"):
            mapping.hash_with_tags(torch.tensor(ids), history)


def test_the_library_runs_on_pytorch_alone_and_says_nothing_if_asked_to():
    program = (
        "import engram, engram.native as n; assert n.core() is None and n.instruction_set() is None; engram.load_bundled()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={"ENGRAM_NATIVE": "0", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "native core" not in done.stderr


def test_threads_share_large_inputs():
    mapping = mapping_without_tokenizer(EngramConfig(layer_ids=(0, 1), hidden_size=8, hash_spec="exact_v1"), 1000)
    ids = torch.randint(1000, (3, 5000))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = mapping.hash(ids)
        torch.set_num_threads(5)
        together = mapping.hash(ids)
        table = torch.randn(1000, 64)
        out = torch.empty(3, 20_000, 64)
        row_ids = torch.randint(1000, (3, 20_000))
        native.gather_rows(table, row_ids, out)  # large enough for stores past the cache
        assert torch.equal(out, table[row_ids])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(alone[layer], together[layer]) for layer in (0, 1))


def test_arrays_of_every_kind_are_hashed_as_tensors_are():
    mapping = mapping_without_tokenizer(EngramConfig(layer_ids=(1, 15), hidden_size=8, hash_spec="exact_v1"), 500)
    ids = torch.randint(500, (3, 40), generator=torch.Generator().manual_seed(0))
    expected = {layer: rows.numpy() for layer, rows in mapping.hash(ids).items()}
    array = ids.numpy()
    wide = np.stack([array, array], axis=2)[:, :, 0]  # not contiguous
    for kind in (array, array.astype(np.int32), array.astype(np.int16), wide, np.asfortranarray(array)):
        assert all(np.array_equal(rows, expected[layer]) for layer, rows in mapping.hash(kind).items())
    assert mapping.hash(np.zeros((2, 0), dtype=np.int64))[1].shape == (2, 0, 16)
    for bad, message in (
        (array[0], "input_ids"),
        (array.astype(float), "input_ids"),
        (array + 500, "got id"),
        (-array - 1, "got id"),
    ):
        with pytest.raises(ConfigError, match=message):
            mapping.hash(bad)


@pytest.mark.parametrize("width", [1, 7, 13, 32, 64, 100, 192, 256])
@pytest.mark.parametrize("name", ["portable", "avx2"])
def test_scanning_rows_takes_in_every_byte(width, name):
    rows = torch.randint(0, 256, (50, width), dtype=torch.uint8)
    row_ids = torch.randint(50, (5000,))
    words = np.pad(rows.numpy(), ((0, 0), (0, -width % 8))).view(np.int64)[row_ids.numpy()]
    with limited_to(name):
        assert native.scan_rows(rows, row_ids) == int(np.bitwise_xor.reduce(words, axis=None))
    assert native.scan_rows(rows, torch.tensor([-1, 50, 2**62])) == 0


def test_scanning_refuses_other_tensors():
    rows = torch.zeros(50, 13)
    with pytest.raises(ValueError, match="scan_rows"):
        native.scan_rows(rows.T, torch.arange(5))
    with pytest.raises(ValueError, match="scan_rows"):
        native.scan_rows(rows, torch.arange(5).int())


def test_indices_and_touching_refuse_other_types():
    flags = torch.ones(1, dtype=torch.bool)
    for row_ids, tags in ((torch.zeros(3).short(), torch.zeros(3).int()), (torch.zeros(3).long(), torch.zeros(2).int())):
        with pytest.raises(ValueError, match="RowIndex"):
            native.RowIndex(row_ids, tags, flags)
    for row_ids in (torch.arange(3).int(), torch.arange(6)[::2]):
        with pytest.raises(ValueError, match="touch_rows"):
            native.touch_rows(torch.zeros(9, 4), row_ids, 2)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("first", ["native.gather_rows(table, row_ids, out)", "native.core()"])
def test_a_forked_child_gathers_on_threads_of_its_own(first):
    script = f"""
import os, sys, torch
from engram import native
torch.set_num_threads(2)
table, row_ids, out = torch.randn(1000, 64), torch.randint(1000, (50_000,)), torch.empty(50_000, 64)
torch.randn(1 << 22).exp()  # PyTorch's own threads are there before the fork
{first}
child = os.fork()
if child == 0:
    again = torch.empty(50_000, 64)
    native.gather_rows(table, row_ids, again)
    os._exit(0 if again[-1].equal(table[row_ids[-1]]) else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_a_default_device_does_not_reach_the_native_core():
    """What the core writes to is on the CPU, wherever new tensors would be made: an address of another device would end the process."""
    program = """
import torch
from engram import EngramAdamW, Fact
from engram.tables import HostTable, MmapTable, build_table
from engram import TableConfig
from engram.hashing import build_mapping
from engram.testing import tiny_config, tiny_tokenizer
from tests.editing.helpers import make_editor
editor = make_editor()
editor.teach([Fact(("KEY:alpha",), "42", id="alpha")])
ids = editor.tokenizer("KEY:alpha", return_tensors="pt")["input_ids"]
mapping = build_mapping(tiny_config(), tiny_tokenizer())
plain = mapping.hash(ids)
table = HostTable(100, 16)
optimizer = EngramAdamW(table.parameters(), lr=0.1)
row_ids = torch.tensor([3, 5, 3])
expected = editor.memory(input_ids=ids, use_cache=False).logits
with torch.device("meta"):
    found = mapping.hash(ids)
    loss = table.lookup(row_ids).sum()
    loss.backward()
    optimizer.step()
    logits = editor.memory(input_ids=ids, use_cache=False).logits
    hybrid = build_table(100, 16, TableConfig(tier="hybrid", hot_rows=3), device="cpu")
assert all(torch.equal(found[layer], plain[layer]) for layer in plain)
assert torch.allclose(table.weight[[3, 5]], torch.tensor(-0.1)) and not bool(table.weight[4].any())
assert torch.equal(logits, expected)
print("done")
"""
    done = run_python("-c", program)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


def test_triton_that_has_no_compiler_is_done_without(monkeypatch, caplog):
    """The driver is compiled when it is first asked for."""

    class Runtime:
        @property
        def driver(self):
            raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.\nMore of it")

    imported = optional.importlib.import_module
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(optional.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(optional.importlib, "import_module", lambda n: Runtime() if n == "triton.runtime" else imported(n))
    for cached in (optional.triton_kernel, optional._can_launch):
        monkeypatch.setattr(optional, cached.__name__, cache(cached.__wrapped__))
    with caplog.at_level("WARNING", logger="engram"):
        assert optional.triton_kernel("engram.ops.triton_gather", "gather_rows_triton") is None
        assert optional.triton_kernel("engram.hashing.triton_hash", "hash_ngrams_triton") is None
    assert len(caplog.records) == 1
    assert "Triton cannot be used here (Failed to find C compiler" in caplog.text
