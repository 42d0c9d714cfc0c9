"""Stochastic rounding: right on average, harmless to what needs none, the same bits from PyTorch and the native core."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engram import native
from engram.optim import EngramAdamW
from engram.optim.rounding import round_stochastically

DTYPES = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-6, 3e4])
def test_the_expectation_is_the_value(dtype, scale):
    values = torch.randn(8, generator=torch.Generator().manual_seed(0)) * scale
    values = values.clamp(-6e4, 6e4)
    draws = 20_000
    rounded = round_stochastically(values.expand(draws, 8).contiguous(), dtype, torch.arange(draws), seed=3).double()
    ends = torch.stack([rounded.amin(0), rounded.amax(0)])
    assert all(len(column.unique()) <= 2 for column in rounded.T)
    assert bool((ends[0] <= values.double()).all() and (values.double() <= ends[1]).all())
    gap = ends[1] - ends[0]
    # Five standard deviations of a mean of so many draws, each at most half a gap from its mean.
    assert bool(((rounded.mean(0) - values.double()).abs() <= 5 * gap / 2 / draws**0.5).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_neighbouring_values_round_independently(dtype):
    values = torch.full((4000, 64), 1 + 2.0**-8 if dtype == torch.bfloat16 else 1 + 2.0**-11)  # half way
    ups = (round_stochastically(values, dtype, torch.arange(4000), seed=1) > 1).double()
    bound = 5 / 4000**0.5
    assert bool(((ups.mean(0) - 0.5).abs() < bound / 2).all())
    correlation = torch.corrcoef(ups.T) - torch.eye(64, dtype=torch.double)
    assert correlation.abs().max() < bound * 1.2
    other = (round_stochastically(values, dtype, torch.arange(4000), seed=2) > 1).double()
    assert abs((ups == other).double().mean() - 0.5) < 0.02


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_number_that_fits_stays(dtype):
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    kept = round_stochastically(every.float().view(-1, 64), dtype, torch.arange(1024), seed=7).view(-1)
    finite = ~every.isnan()
    assert torch.equal(kept[finite].view(torch.int16), every[finite].view(torch.int16))
    assert kept[~finite].isnan().all()


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**62), st.sampled_from(DTYPES))
def test_finite_values_stay_finite(seed, dtype):
    largest = torch.finfo(dtype).max
    top = torch.tensor([torch.finfo(torch.float32).max, largest * 1.001 if dtype == torch.float16 else 3.3961e38, largest])
    values = torch.cat([top, -top]).repeat(10, 1)
    rounded = round_stochastically(values, dtype, torch.arange(10), seed)
    assert rounded.isfinite().all()
    assert torch.equal(rounded.float().abs(), torch.full_like(values, largest))


def stepped(core, monkeypatch, dtype, rounding=True):
    monkeypatch.setattr(native, "_core", core)
    torch.manual_seed(11)
    table = torch.randn(3000, 33, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    optimizer = EngramAdamW([table], lr=1e-3, row_state="rowwise_adagrad", stochastic_rounding=rounding)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randperm(3000, generator=generator)
    table.grad = torch.sparse_coo_tensor(
        ids[None], torch.randn(3000, 33, generator=generator).to(dtype), (3000, 33), check_invariants=True
    )
    optimizer.step()
    return table.detach()


@pytest.mark.skipif(native.core() is None, reason="the native core is not built")
def test_the_native_core_throws_the_same_dice(monkeypatch):
    core = native.core()
    ours, theirs = stepped(core, monkeypatch, torch.bfloat16), stepped(None, monkeypatch, torch.bfloat16)
    # The float32 rows may differ in the last bit, which turns one throw in tens of thousands.
    assert (ours != theirs).double().mean() < 1e-3
    assert torch.equal(ours, stepped(core, monkeypatch, torch.bfloat16))
    assert (ours != stepped(core, monkeypatch, torch.bfloat16, rounding=False)).double().mean() > 0.05


@pytest.mark.parametrize("dtype", DTYPES)
def test_small_steps_add_up_only_with_it(path, dtype):
    def after(rounding):
        torch.manual_seed(0)
        table = torch.ones(50, 16, dtype=dtype).requires_grad_()
        optimizer = EngramAdamW([table], lr=1e-4, stochastic_rounding=rounding)
        for _ in range(200):
            table.grad = torch.ones(50, 16, dtype=dtype).to_sparse(1)
            optimizer.step()
        return float(table.detach().double().mean())

    assert after(False) == 1.0
    assert after(True) == pytest.approx(1 - 200 * 1e-4, abs=2e-3)


def test_float32_rows_draw_no_numbers():
    table = torch.ones(5, 2).requires_grad_()
    optimizer, before = EngramAdamW([table], stochastic_rounding=True), torch.get_rng_state()
    table.grad = torch.ones(5, 2).to_sparse(1)
    optimizer.step()
    assert torch.equal(torch.get_rng_state(), before)
