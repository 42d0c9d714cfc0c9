"""The kinds of row state against their references, with and without the native core; what is saved of them; what is refused."""

import copy
import pickle

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engram import CheckpointError, ConfigError, native
from engram.checkpoint import load_tree, save_tree
from engram.optim import ROW_STATES, EngramAdamW, RowMoments, clip_grad_norm_, row_state
from engram.optim.reference import row_adam_step_reference, rowwise_adagrad_step_reference, rowwise_adam_step_reference
from engram.testing import assert_close
from tests.optim.test_optim import sparse_gradient
from tests.optim.test_sparse_adam import rows_gradient

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def reference_step(kind, table, state, ids, values, step, lr, **options):
    if kind == "adam":
        row_adam_step_reference(table, state["exp_avg"], state["exp_avg_sq"], ids, values, step, lr, **options)
    elif kind == "rowwise_adam":
        rowwise_adam_step_reference(table, state["exp_avg"], state["exp_avg_sq_of_row"], ids, values, step, lr, **options)
    else:
        rowwise_adagrad_step_reference(table, state["square_sum_of_row"], ids, values, lr, **options)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(1, 600), st.integers(1, 70), st.booleans(), st.sampled_from([0.0, 0.3]), st.booleans(), st.integers(0, 10_000)
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ROW_STATES)
def test_every_path_equals_the_reference(path, kind, dtype, rows, dim, maximize, decay, clipped, seed):
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(rows, dim, generator=generator).to(dtype).requires_grad_()
    expected = table.detach().clone()
    state = {name: torch.zeros((rows, dim) if per_value else rows) for name, per_value in ROW_STATES[kind].items()}
    optimizer = EngramAdamW([table], lr=0.03, weight_decay=decay, maximize=maximize, row_state=kind)
    for step in range(1, 5):
        count = int(torch.randint(0, 500, (1,), generator=generator))
        gradient = sparse_gradient(rows, dim, generator, count)
        # Multiples of 1/8: sums of duplicates are exact in every dtype, so only the step itself is compared.
        ids, values = gradient._indices()[0], (gradient._values() * 8).round().clamp(-15, 15) / 8
        table.grad = torch.sparse_coo_tensor(ids.unsqueeze(0), values.to(dtype), (rows, dim), check_invariants=True)
        if clipped:
            clip_grad_norm_([table], float("inf"))
        optimizer.step()
        reference_step(kind, expected, state, ids, values, step, 0.03, weight_decay=decay, maximize=maximize)
        # Two float32 computations may round to neighbouring half-precision values: one unit in the last place.
        assert_close(table, expected, max(1e-5, torch.finfo(dtype).eps if dtype != torch.float32 else 0))
        expected.copy_(table.detach())  # so that one flipped last bit is not carried on
    packed = optimizer.state_dict()["state"][0]["row_moments"]
    for name, full in state.items():
        assert_close(packed[name], full[packed["rows"]])
        assert not full[torch.ones(rows, dtype=torch.bool).index_fill_(0, packed["rows"], False)].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ROW_STATES)
def test_what_is_not_finite_passes_through_alike(monkeypatch, kind, dtype):
    results = []
    for core in (native.core(), None):
        monkeypatch.setattr(native, "_core", core)
        generator = torch.Generator().manual_seed(0)
        table = torch.randn(6, 20, generator=generator).to(dtype).requires_grad_()
        optimizer = EngramAdamW([table], lr=0.1, row_state=kind, stochastic_rounding=True)
        torch.manual_seed(5)
        for bad in (float("nan"), float("inf"), -float("inf"), 1e30, 1.0):
            values = torch.randn(4, 20, generator=generator)
            values[1, 3] = bad
            table.grad = torch.sparse_coo_tensor([[1, 4, 2, 1]], values.to(dtype), (6, 20), check_invariants=True)
            optimizer.step()
        moments = optimizer.state[table]["row_moments"].state_dict()
        results.append([table.detach().float(), *moments.values()])
    assert results[0][0].isnan().any()
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, equal_nan=True, rtol=0.01, atol=1e-5)


@pytest.mark.parametrize("kind", ROW_STATES)
def test_state_survives_saving_exactly(path, tmp_path, kind):
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(70_000, 3).bfloat16().requires_grad_()
    optimizer = EngramAdamW([table], lr=0.1, row_state=kind, stochastic_rounding=True)

    def steps(opt, tensor, rng):
        for _ in range(4):
            tensor.grad = sparse_gradient(70_000, 3, rng, 50).bfloat16()
            opt.step()

    steps(optimizer, table, generator)
    save_tree(tmp_path / "state", optimizer.state_dict())
    twin = table.detach().clone().requires_grad_()
    again = EngramAdamW([twin], lr=0.5, row_state=kind)
    again.load_state_dict(load_tree(tmp_path / "state"))
    later, chance = generator.get_state(), torch.get_rng_state()
    steps(optimizer, table, generator)
    generator.set_state(later)
    torch.set_rng_state(chance)
    steps(again, twin, generator)
    assert torch.equal(table, twin)
    assert again.param_groups[0]["stochastic_rounding"] is True


def after_one_step(kind, shape=(9, 2)):
    table = torch.ones(shape).requires_grad_()
    optimizer = EngramAdamW([table], lr=0.1, row_state=kind)
    table.grad = rows_gradient([shape[0] - 1, 2], shape)
    optimizer.step()
    return table, optimizer


def test_a_state_of_another_kind_is_refused():
    saved = after_one_step("rowwise_adam")[1].state_dict()
    table, optimizer = after_one_step("rowwise_adagrad")
    before = table.detach().clone()
    with pytest.raises(CheckpointError, match=r"got row_state 'rowwise_adam' for group 0, expected 'rowwise_adagrad'"):
        optimizer.load_state_dict(saved)
    del saved["param_groups"][0]["row_state"]  # as in files written before there were kinds
    with pytest.raises(CheckpointError, match="got row state rowwise_adam, expected rowwise_adagrad"):
        optimizer.load_state_dict(saved)
    assert torch.equal(table, before)
    assert optimizer.state[table]["row_moments"].kind == "rowwise_adagrad"
    with pytest.raises(CheckpointError, match="buffers"):
        RowMoments(table).load_state_dict({"rows": torch.tensor([1]), "exp_avg": torch.ones(1, 2)})
    for malformed in (
        None,
        {"rows": [1]},
        {"rows": torch.tensor([1.0]), "exp_avg": torch.ones(1, 2), "exp_avg_sq": torch.ones(1, 2)},
    ):
        with pytest.raises(CheckpointError, match=r"no mapping of tensors|got row numbers torch.float32 \[1\], expected int64"):
            RowMoments(table).load_state_dict(malformed)
    twice = {"rows": torch.tensor([1, 1]), "square_sum_of_row": torch.ones(2)}
    with pytest.raises(CheckpointError, match="another table"):
        RowMoments(table, "rowwise_adagrad").load_state_dict(twice)


def test_a_state_from_before_there_were_kinds_still_loads():
    table, optimizer = after_one_step("adam")
    saved = optimizer.state_dict()
    for name in ("row_state", "stochastic_rounding"):
        del saved["param_groups"][0][name]
    assert set(saved["state"][0]["row_moments"]) == {"rows", "exp_avg", "exp_avg_sq"}
    twin = table.detach().clone().requires_grad_()
    again = EngramAdamW([twin], lr=0.5, stochastic_rounding=True)
    again.load_state_dict(saved)
    assert again.param_groups[0]["row_state"] == "adam"
    assert again.param_groups[0]["stochastic_rounding"] is True
    for p, opt in ((table, optimizer), (twin, again)):
        p.grad = rows_gradient([2, 3], (9, 2))
        opt.step()
    assert torch.equal(table, twin)


def test_unknown_kinds_and_changes_on_the_way_are_refused():
    table = torch.ones(9, 2).requires_grad_()
    with pytest.raises(ConfigError, match="got row_state='adamw', expected one of adam, rowwise_adam, rowwise_adagrad"):
        EngramAdamW([table], row_state="adamw")
    with pytest.raises(ConfigError, match="got row_state='x'"):
        EngramAdamW([{"params": [table], "row_state": "x"}])
    table, optimizer = after_one_step("rowwise_adam")
    optimizer.param_groups[0]["row_state"] = "adam"
    with pytest.raises(ConfigError, match="cannot change on the way"):
        optimizer.step()


@pytest.mark.parametrize("kind", ["rowwise_adam", "rowwise_adagrad"])
def test_dense_and_sparse_gradients_in_turn_need_adam(kind):
    table, optimizer = after_one_step(kind)
    before = table.detach().clone()
    table.grad = torch.ones(9, 2)
    with pytest.raises(ConfigError, match="got a dense gradient for a table with row_state"):
        optimizer.step()
    assert torch.equal(table, before)
    dense = torch.ones(9, 2).requires_grad_()
    optimizer = EngramAdamW([dense], row_state=kind)
    dense.grad = torch.ones(9, 2)
    optimizer.step()
    dense.grad = rows_gradient([1], (9, 2))
    with pytest.raises(ConfigError, match="got a sparse gradient for a table with the moments of a dense gradient"):
        optimizer.step()


def test_groups_choose_for_themselves():
    tables = [torch.ones(9, 2).requires_grad_() for _ in range(3)]
    groups = [{"params": [tables[0]], "row_state": "rowwise_adagrad"}, {"params": [tables[1]]}]
    optimizer = EngramAdamW(groups, lr=0.1, row_state="rowwise_adam")
    optimizer.add_param_group({"params": [tables[2]], "row_state": "adam"})
    for table in tables:
        table.grad = rows_gradient([4], (9, 2))
    optimizer.step()
    assert [optimizer.state[t]["row_moments"].kind for t in tables] == ["rowwise_adagrad", "rowwise_adam", "adam"]
    assert tables[0][4].tolist() == pytest.approx([0.9, 0.9])  # the first step of Adagrad is the learning rate


@pytest.mark.parametrize("reserved", [True, False])
def test_growth_keeps_what_was_there(monkeypatch, path, reserved):
    if not reserved:
        monkeypatch.setattr(row_state, "_reserved_memory", lambda *_: None)
    table = torch.zeros(40_000, 3).requires_grad_()
    twin = table.detach().clone().requires_grad_()
    optimizer, judge = EngramAdamW([table]), torch.optim.SparseAdam([twin])
    generator = torch.Generator().manual_seed(0)
    for _ in range(6):
        table.grad = sparse_gradient(40_000, 3, generator, 3000)
        twin.grad = table.grad.clone()
        optimizer.step()
        judge.step()
    assert_close(table, twin)
    copies = [
        copy.deepcopy(optimizer.state[table]["row_moments"]),
        pickle.loads(pickle.dumps(optimizer.state[table]["row_moments"])),
    ]
    for one in copies:
        assert one.used == optimizer.state[table]["row_moments"].used
        for name, saved in optimizer.state[table]["row_moments"].state_dict().items():
            assert torch.equal(one.state_dict()[name], saved)
            assert saved.data_ptr() != one.state_dict()[name].data_ptr()


def test_autograd_notices_a_step_between_forward_and_backward(path):
    table = torch.ones(5, 2).requires_grad_()
    optimizer = EngramAdamW([table])
    loss = (table * table).sum()
    table.grad = rows_gradient([1], (5, 2))
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_ctrl_c_while_rows_get_their_state_gives_it_back(monkeypatch):
    """Otherwise the next new row would get the same slot, and the two would share moments for good."""
    table = torch.nn.Parameter(torch.zeros(50, 4))
    optimizer = EngramAdamW([table], lr=0.1)

    def step(rows):
        table.grad = torch.sparse_coo_tensor(
            torch.tensor([rows]), torch.ones(len(rows), 4), table.shape, check_invariants=False
        )
        optimizer.step()

    step([0])
    claim = row_state.claim_slots

    def interrupted(*args):
        claim(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(row_state, "claim_slots", interrupted)
        with pytest.raises(KeyboardInterrupt):
            step([7, 0])
    step([9])
    step([7])
    moments = optimizer.state[table]["row_moments"]
    assert moments.state_dict()["rows"].tolist() == [0, 9, 7]
    torch.testing.assert_close(moments.buffers["exp_avg"][: moments.used], torch.full((3, 4), 0.1))


def test_a_saved_state_does_not_change_with_later_steps():
    table = torch.zeros(9, 2, requires_grad=True)
    optimizer = EngramAdamW([table], lr=0.1)

    def step():
        table.grad = rows_gradient([1, 4], table.shape)
        optimizer.step()

    step()
    saved = optimizer.state[table]["row_moments"].state_dict()
    before = copy.deepcopy(saved)
    step()
    assert all(torch.equal(saved[name], before[name]) for name in before)
