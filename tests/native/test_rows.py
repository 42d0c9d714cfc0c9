"""Grouping, summing and claiming against PyTorch, and what the wrappers refuse before an address reaches the core."""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engram import native
from engram.native import rows as native_rows

pytestmark = pytest.mark.skipif(native.core() is None, reason="the native core is not built")


def gradient(ids, values, rows):
    return torch.sparse_coo_tensor(ids[None], values, (rows, values.shape[1]), check_invariants=True)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([1, 7, 300, 5000, 1 << 20, (1 << 33) + 5]),
    st.integers(0, 3000),
    st.integers(0, 40),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(0, 10_000),
)
def test_sums_equal_coalesce(rows, count, dim, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(rows, (count,), generator=generator)
    values = torch.randint(-8, 9, (count, dim), generator=generator).to(dtype)  # sums are exact
    got, expected = native_rows.sum_duplicates(gradient(ids, values, rows)), gradient(ids, values.float(), rows).coalesce()
    assert got.is_coalesced()
    assert got.dtype == torch.float32
    assert torch.equal(got.indices(), expected.indices())
    assert torch.equal(got.values(), expected.values())


def test_sums_are_the_same_with_any_number_of_threads():
    generator = torch.Generator().manual_seed(0)
    one = gradient(torch.randint(9000, (20_000,), generator=generator), torch.randn(20_000, 5, generator=generator), 9000)
    before, sums = torch.get_num_threads(), []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        sums.append(native_rows.sum_duplicates(one).values())
    torch.set_num_threads(before)
    assert torch.equal(*sums)


def test_other_gradients_are_left_to_torch():
    ids = torch.tensor([3, 1, 3])
    for values in (
        torch.ones(3, 2, dtype=torch.float64),
        torch.full((3, 2), 40_000.0, dtype=torch.float16),  # their sums are no float16 any more
        torch.ones(2, 3).T.contiguous(),
    ):
        summed = native_rows.sum_duplicates(gradient(ids, values, 5)).to_dense()
        assert torch.equal(summed.double(), gradient(ids, values.double(), 5).to_dense())
    once = gradient(ids, torch.ones(3, 2), 5).coalesce()
    assert native_rows.sum_duplicates(once) is once


def test_slots_are_those_of_pytorch():
    generator = torch.Generator().manual_seed(0)
    state = [[torch.zeros(500, dtype=torch.int32), torch.zeros(500, dtype=torch.int64), 0] for _ in range(2)]
    for _ in range(10):
        rows = torch.randperm(500, generator=generator)[:60]
        for one, claim in zip(state, (native_rows.claim_slots, native_rows._claim_slots_in_pytorch)):
            slots, one[2] = claim(rows, one[0], one[1], one[2])
            assert torch.equal(one[1][slots], rows)
        assert torch.equal(state[0][0], state[1][0])
        assert state[0][2] == state[1][2]


def test_row_numbers_out_of_range_are_named():
    for bad in (5, -1, 1 << 40):
        with pytest.raises(IndexError, match=str(bad)):
            native_rows.RowGroups(torch.tensor([1, bad, 2]), 5)
        with pytest.raises(IndexError):
            native_rows.RowGroups(torch.tensor([1, bad, 2]), 5, unique=True)
    seen, inverse = torch.zeros(5, dtype=torch.int32), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(IndexError, match="7"):
        native_rows.claim_slots(torch.tensor([7]), seen, inverse, 0)
    with pytest.raises(IndexError, match="3"):  # no room
        native_rows.claim_slots(torch.tensor([1, 2, 3]), seen, inverse, 0)


@pytest.mark.parametrize(
    "change",
    [
        {"table": torch.ones(10, 4).T.contiguous().T},
        {"table": torch.ones(10, 4, dtype=torch.float64)},
        {"table": torch.ones(9, 4)},
        {"gradients": torch.ones(3, 4).bfloat16()},
        {"gradients": torch.ones(2, 4)},
        {"gradients": torch.ones(3, 5)},
        {"slots": torch.tensor([0, 1, 6])},
        {"slots": torch.tensor([0, -1, 2])},
        {"slots": torch.tensor([0, 1])},
        {"slots": torch.tensor([0, 1, 2], dtype=torch.int32)},
        {"buffers": {"exp_avg": torch.zeros(6, 4)}},
        {"buffers": {"exp_avg": torch.zeros(6, 4), "exp_avg_sq": torch.zeros(6)}},
        {"buffers": {"exp_avg": torch.zeros(6, 4), "exp_avg_sq": torch.zeros(2, 4)}},
        {"buffers": {"exp_avg": torch.zeros(6, 4), "exp_avg_sq": torch.zeros(6, 4, dtype=torch.float64)}},
        {"buffers": {"exp_avg": torch.zeros(6, 4), "exp_avg_sq": torch.zeros(4, 6).T}},
    ],
)
def test_a_step_with_wrong_tensors_never_reaches_the_core(change):
    good = {
        "table": torch.ones(10, 4),
        "groups": native_rows.RowGroups(torch.tensor([1, 2, 4]), 10),
        "gradients": torch.ones(3, 4),
        "kind": "adam",
        "slots": torch.tensor([0, 1, 2]),
        "buffers": {"exp_avg": torch.zeros(6, 4), "exp_avg_sq": torch.zeros(6, 4)},
        "numbers": (0.1, 0.9, 0.999, 1e-8, 1.0, 1.0),
        "seed": None,
    }
    native_rows.step_rows(**good)
    assert float(good["table"][1, 0]) < 1
    with pytest.raises(ValueError, match="step_rows"):
        native_rows.step_rows(**{**good, **change})


def test_wrong_row_numbers_are_refused():
    for bad in (torch.tensor([1], dtype=torch.int32), torch.tensor([[1]])):
        with pytest.raises(ValueError, match="expected int64"):
            native_rows.RowGroups(bad, 5)
    with pytest.raises(ValueError, match="claim_slots"):
        native_rows.claim_slots(torch.tensor([1]), torch.zeros(5), torch.zeros(5, dtype=torch.int64), 0)
    with pytest.raises(ValueError, match="claim_slots"):
        native_rows.claim_slots(
            torch.tensor([1]), torch.zeros(5, dtype=torch.int32), torch.zeros(10, dtype=torch.int64)[::2], 0
        )


@pytest.mark.skipif(
    "libasan" in os.environ.get("LD_PRELOAD", ""), reason="the address sanitiser ends the process where memory cannot be had"
)
@pytest.mark.parametrize("threads", [1, 2])
def test_memory_that_cannot_be_had_is_an_error_on_every_thread(threads):
    with pytest.raises(MemoryError):
        native.core().sum_rows(0, 0, 0, 1 << 20, 0, 0, 1 << 48, 0, threads)  # scratch comes before the first address is used
    with pytest.raises(MemoryError):
        native.core().group_rows(0, 1 << 50, 1 << 50, 0, 0, 0)
    ids = torch.tensor([3, 3, 5])
    assert torch.equal(
        native_rows.sum_duplicates(gradient(ids, torch.ones(3, 2), 9)).values(), torch.tensor([[2.0, 2], [1, 1]])
    )
