"""EngramAdamW against its reference and torch: dtypes, mixed gradients, options, hooks, saved states, memory."""

import copy
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engram import CheckpointError, ConfigError
from engram.optim import EngramAdamW, RowMoments
from engram.optim.reference import row_adam_step_reference
from engram.testing import assert_close
from tests.optim.test_optim import sparse_gradient


def rows_gradient(rows, shape, value=1.0):
    return torch.sparse_coo_tensor([rows], torch.full((len(rows), *shape[1:]), value), shape, check_invariants=True)


@pytest.fixture
def nan_in_uninitialised_memory():
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # makes torch.empty return NaN
    yield
    torch.use_deterministic_algorithms(before)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 40), st.integers(1, 9), st.booleans(), st.sampled_from([0.0, 0.3]), st.integers(0, 10_000))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_equal_the_reference(dtype, rows, dim, maximize, decay, seed):
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(rows, dim, generator=generator).to(dtype).requires_grad_()
    expected, moments = table.detach().clone(), [torch.zeros(rows, dim), torch.zeros(rows, dim)]
    optimizer = EngramAdamW([table], lr=0.03, weight_decay=decay, maximize=maximize)
    for step in range(1, 9):
        count = int(torch.randint(0, 20, (1,), generator=generator))
        # Multiples of 1/8: sums of duplicates are exact in every dtype, so only the step itself is compared.
        gradient = sparse_gradient(rows, dim, generator, count)
        ids, values = gradient._indices()[0], (gradient._values() * 8).round().clamp(-30, 30) / 8
        table.grad = torch.sparse_coo_tensor(ids.unsqueeze(0), values.to(dtype), (rows, dim), check_invariants=True)
        optimizer.step()
        row_adam_step_reference(expected, *moments, ids, values, step, 0.03, weight_decay=decay, maximize=maximize)
        # Two float32 computations may round to neighbouring half-precision values: one unit in the last place.
        assert_close(table, expected, max(1e-5, torch.finfo(dtype).eps if dtype != torch.float32 else 0))
        expected.copy_(table.detach())  # so that one flipped last bit is not carried on
    packed = optimizer.state_dict()["state"][0]["row_moments"]
    seen = packed["rows"]
    assert_close(packed["exp_avg"], moments[0][seen])
    assert_close(packed["exp_avg_sq"], moments[1][seen])
    untouched = torch.ones(rows, dtype=torch.bool).index_fill_(0, seen, False)
    assert not moments[1][untouched].any()


def test_the_reference_equals_torchs_sparse_adam():
    generator = torch.Generator().manual_seed(0)
    theirs = torch.randn(12, 3, generator=generator).requires_grad_()
    table, exp_avg, exp_avg_sq = theirs.detach().clone(), torch.zeros(12, 3), torch.zeros(12, 3)
    judge = torch.optim.SparseAdam([theirs], lr=0.1, betas=(0.8, 0.95), eps=1e-6)
    for step in range(1, 21):
        theirs.grad = sparse_gradient(12, 3, generator, step % 7)
        ids, values = theirs.grad._indices()[0], theirs.grad._values().clone()
        row_adam_step_reference(table, exp_avg, exp_avg_sq, ids, values, step, 0.1, (0.8, 0.95), 1e-6)
        judge.step()
        assert_close(table, theirs)


@pytest.mark.usefixtures("nan_in_uninitialised_memory")
def test_growing_buffers_never_show_uninitialised_memory():
    table, judge = torch.zeros(5000, 3).requires_grad_(), torch.zeros(5000, 3).requires_grad_()
    optimizer, theirs = EngramAdamW([table]), torch.optim.SparseAdam([judge])
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        table.grad = sparse_gradient(5000, 3, generator, 700)
        judge.grad = table.grad.clone()
        optimizer.step()
        theirs.step()
    assert optimizer.state[table]["row_moments"].used > 2048  # grew more than once
    assert_close(table, judge)


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"foreach": True}, {"capturable": False, "maximize": True}])
def test_dense_gradients_of_a_table_are_torchs_adamw(options):
    ours, theirs = torch.ones(5, 2).requires_grad_(), torch.ones(5, 2).requires_grad_()
    mine, judge = EngramAdamW([ours], lr=0.1, **options), torch.optim.AdamW([theirs], lr=0.1, **options)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        ours.grad = torch.randn(5, 2, generator=generator)
        theirs.grad = ours.grad.clone()
        mine.step()
        judge.step()
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kinds", ["sdsd", "dsds", "ssdd", "ddss"])
@pytest.mark.parametrize("fused", [None, True])
def test_sparse_and_dense_gradients_may_alternate(kinds, fused):
    """Where every row has a gradient at every step, both kinds of step are the same Adam."""
    start = torch.randn(6, 3, generator=torch.Generator().manual_seed(1))
    ours, theirs = start.clone().requires_grad_(), start.clone().requires_grad_()
    mine, judge = EngramAdamW([ours], lr=0.1, weight_decay=0.01, fused=fused), torch.optim.AdamW([theirs], lr=0.1)
    generator = torch.Generator().manual_seed(0)
    for kind in kinds:
        theirs.grad = torch.randn(6, 3, generator=generator)
        ours.grad = theirs.grad.clone() if kind == "d" else theirs.grad.to_sparse(1)
        mine.step()
        judge.step()
    assert float(mine.state[ours]["step"]) == len(kinds)
    assert_close(ours, theirs)
    twin = start.clone().requires_grad_()  # the mixed state can be saved as well
    again = EngramAdamW([twin], lr=0.1, weight_decay=0.01, fused=fused)
    again.load_state_dict(copy.deepcopy(mine.state_dict()))
    with torch.no_grad():
        twin.copy_(ours)
    for p, optimizer in ((ours, mine), (twin, again)):
        p.grad = rows_gradient([2, 4], (6, 3))
        optimizer.step()
    assert torch.equal(ours, twin)


def test_weight_decay_of_rows_must_be_asked_for():
    def after_one_step(params, **options):
        optimizer = EngramAdamW(params, lr=0.1, **options)
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = rows_gradient([1], (3, 2), 0.0)
        optimizer.step()
        return [float(p[1, 0].detach()) for group in optimizer.param_groups for p in group["params"]]

    def table():
        return torch.ones(3, 2).requires_grad_()

    assert after_one_step([table()]) == [1.0]
    assert after_one_step([table()], weight_decay=0.5) == pytest.approx([0.95])
    groups = [{"params": [table()], "weight_decay": 0.5}, {"params": [table()]}]
    assert after_one_step(groups) == pytest.approx([0.95, 1.0])
    dense, judge = table(), table()
    for p in (dense, judge):
        p.grad = torch.zeros(3, 2)
    EngramAdamW([dense], lr=0.1).step()
    torch.optim.AdamW([judge], lr=0.1).step()
    assert torch.equal(dense, judge)
    assert float(judge[0, 0].detach()) < 1


def test_step_hooks_run_once_whatever_else_lives_in_the_process():
    torch.optim.AdamW([torch.ones(1).requires_grad_()])  # torch wraps `step` on the class when a first one is made
    table = torch.ones(3, 2).requires_grad_()
    optimizer, calls = EngramAdamW([table]), []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    table.grad = rows_gradient([1], (3, 2))
    optimizer.step()
    assert calls == ["before", "after"]
    assert table.grad is not None
    assert table.grad.is_sparse


@pytest.mark.parametrize("option", ["amsgrad", "differentiable"])
def test_options_that_rows_cannot_honour_are_refused(option):
    table = torch.ones(3, 2).requires_grad_()
    table.grad = rows_gradient([1], (3, 2))
    with pytest.raises(ConfigError, match=option):
        EngramAdamW([table], **{option: True}).step()
    table.grad = torch.ones(3, 2).to_sparse()
    with pytest.raises(ConfigError, match="2 sparse dimensions"):
        EngramAdamW([table]).step()


@pytest.mark.parametrize("fused", [None, True])
def test_a_gradient_scaler_changes_nothing(fused):
    results = []
    for scale in (1.0, 1024.0):
        table, dense = torch.ones(6, 2).requires_grad_(), torch.ones(2).requires_grad_()
        optimizer, scaler = EngramAdamW([table, dense], lr=0.1, fused=fused), torch.amp.GradScaler("cpu", init_scale=scale)
        for rows in ([1, 4, 1], [2, 4]):
            loss = (torch.nn.functional.embedding(torch.tensor(rows), table, sparse=True) * dense).square().sum()
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        # Adam's step hardly depends on the scale of a gradient; its moments do.
        results.append(
            [
                optimizer.state[table]["row_moments"].buffers["exp_avg"][:3].clone(),
                optimizer.state[dense]["exp_avg"],
                table,
                dense,
            ]
        )
    for plain, scaled in zip(*results):
        assert_close(plain, scaled)


def test_a_loaded_optimizer_shares_nothing_with_the_one_saved():
    first, second = torch.zeros(4, 2).requires_grad_(), torch.zeros(4, 2).requires_grad_()
    one, two = EngramAdamW([first]), EngramAdamW([second])
    first.grad = rows_gradient([1], (4, 2))
    one.step()
    two.load_state_dict(one.state_dict())
    one.step()
    assert float(two.state[second]["step"]) == 1
    assert not torch.equal(
        one.state[first]["row_moments"].buffers["exp_avg"][:1], two.state[second]["row_moments"].buffers["exp_avg"][:1]
    )
    clone = copy.deepcopy(one)
    clone.add_param_group({"params": [torch.ones(1).requires_grad_()]})
    assert clone.param_groups[0]["decay_rows"] is False


def test_a_state_of_another_table_is_refused():
    big, small = torch.zeros(9, 2).requires_grad_(), torch.zeros(4, 2).requires_grad_()
    one = EngramAdamW([big])
    big.grad = rows_gradient([8], (9, 2))
    one.step()
    with pytest.raises(CheckpointError, match="another table"):
        EngramAdamW([small]).load_state_dict(one.state_dict())
    wide = torch.zeros(9, 3).requires_grad_()
    two = EngramAdamW([wide])
    with pytest.raises(CheckpointError, match="another table"):
        two.load_state_dict(one.state_dict())
    assert not two.state


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads resident memory from /proc")
def test_memory_follows_the_rows_touched():
    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    table = torch.empty(100_000_000, 1)  # never touched, so it costs address space only; its row map would be 400 MB
    before = resident()
    moments = RowMoments(table)
    moments.slots(torch.tensor([3, 99_999_999]))
    again = RowMoments(table)
    again.load_state_dict(moments.state_dict())
    assert resident() - before < 40e6
