import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engram import CheckpointError, ConfigError, native
from engram.checkpoint import load_tree, save_tree
from engram.optim import EngramAdamW, build_param_groups, clip_grad_norm_
from engram.testing import assert_close, tiny_memory, tiny_model


def sparse_gradient(rows, dim, generator, count):
    ids = torch.randint(0, rows, (count,), generator=generator)
    return torch.sparse_coo_tensor(
        ids.unsqueeze(0), torch.randn(count, dim, generator=generator), (rows, dim), check_invariants=True
    )


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 60), st.integers(1, 9), st.integers(0, 10_000))
def test_rows_equal_torchs_sparse_adam(rows, dim, seed):
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(rows, dim, generator=generator)
    ours, theirs = start.clone().requires_grad_(), start.clone().requires_grad_()
    mine, judge = EngramAdamW([ours], lr=0.1, weight_decay=0.0), torch.optim.SparseAdam([theirs], lr=0.1)
    for _ in range(12):
        gradient = sparse_gradient(rows, dim, generator, int(torch.randint(0, 20, (1,), generator=generator)))
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        mine.step()
        judge.step()
    assert_close(ours, theirs)


def test_dense_parameters_are_torchs_adamw():
    torch.manual_seed(0)
    start = torch.randn(7, 5)
    ours, theirs = start.clone().requires_grad_(), start.clone().requires_grad_()
    table = torch.randn(9, 5).requires_grad_()
    mine, judge = EngramAdamW([ours, table], lr=0.1, weight_decay=0.1), torch.optim.AdamW([theirs], lr=0.1, weight_decay=0.1)
    for _ in range(5):
        ours.grad = torch.randn(7, 5)
        theirs.grad = ours.grad.clone()
        table.grad = torch.sparse_coo_tensor([[1]], torch.ones(1, 5), (9, 5), check_invariants=True)
        mine.step()
        judge.step()
    assert torch.equal(ours, theirs)


def test_moments_exist_for_rows_seen_only():
    table = torch.zeros(1_000_000, 4).requires_grad_()
    optimizer = EngramAdamW([table], lr=0.1)
    for rows in ([5, 5, 999_999], [7]):
        table.grad = torch.sparse_coo_tensor([rows], torch.ones(len(rows), 4), table.shape, check_invariants=True)
        optimizer.step()
    moments = optimizer.state[table]["row_moments"]
    assert moments.used == 3
    assert all(len(saved) == 3 for saved in moments.state_dict().values())
    assert torch.nonzero(table.detach().abs().sum(1)).flatten().tolist() == [5, 7, 999_999]


def test_weight_decay_reaches_touched_rows_only():
    table = torch.ones(4, 2).requires_grad_()
    optimizer = EngramAdamW([table], lr=0.1, weight_decay=0.5)
    table.grad = torch.sparse_coo_tensor([[2]], torch.zeros(1, 2), (4, 2), check_invariants=True)
    optimizer.step()
    assert_close(table, torch.tensor([[1.0, 1.0], [1.0, 1.0], [0.95, 0.95], [1.0, 1.0]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_survives_saving_exactly(tmp_path, dtype):
    generator = torch.Generator().manual_seed(0)
    table, dense = torch.randn(70_000, 3, dtype=torch.float32).to(dtype).requires_grad_(), torch.randn(4).requires_grad_()
    optimizer = EngramAdamW([table, dense], lr=0.1)

    def steps(opt, tensors, rng, count=4):
        for _ in range(count):
            tensors[0].grad = sparse_gradient(70_000, 3, rng, 50).to(dtype)
            tensors[1].grad = torch.randn(4, generator=rng)
            opt.step()

    steps(optimizer, (table, dense), generator)
    save_tree(tmp_path / "state", optimizer.state_dict())
    assert not list(tmp_path.glob("*.pt"))
    twins = [t.detach().clone().requires_grad_() for t in (table, dense)]
    twin = EngramAdamW(twins, lr=0.5)
    twin.load_state_dict(load_tree(tmp_path / "state"))
    later = generator.get_state()
    steps(optimizer, (table, dense), generator)
    generator.set_state(later)
    steps(twin, twins, generator)
    assert torch.equal(table, twins[0])
    assert torch.equal(dense, twins[1])
    assert twin.param_groups[0]["lr"] == 0.1


def test_dense_gradient_of_a_table_still_works():
    table = torch.zeros(5, 2).requires_grad_()
    optimizer = EngramAdamW([table], lr=0.1)
    table.grad = torch.ones(5, 2)
    optimizer.step()
    assert bool((table < 0).all())


def test_closure_is_called():
    parameter = torch.ones(2).requires_grad_()
    optimizer = EngramAdamW([parameter], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = (parameter**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 2.0


@pytest.mark.parametrize("max_norm", [0.5, 1e9])
def test_clipping_sees_the_sparse_part(max_norm):
    generator = torch.Generator().manual_seed(0)
    dense, table = torch.randn(3, 4).requires_grad_(), torch.randn(20, 4).requires_grad_()
    dense.grad, table.grad = torch.randn(3, 4, generator=generator), sparse_gradient(20, 4, generator, 30)
    twins = [dense.detach().clone().requires_grad_(), table.detach().clone().requires_grad_(), torch.ones(2).requires_grad_()]
    twins[0].grad, twins[1].grad = dense.grad.clone(), table.grad.to_dense()
    expected = torch.nn.utils.clip_grad_norm_(twins, max_norm)
    assert_close(clip_grad_norm_([dense, table, torch.ones(2).requires_grad_()], max_norm), expected)
    assert_close(dense.grad, twins[0].grad)
    assert_close(table.grad.to_dense(), twins[1].grad)
    assert clip_grad_norm_([torch.ones(2).requires_grad_()], 1.0) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("with_core", [True, False])
def test_sums_of_many_duplicates_are_clipped_exactly(monkeypatch, dtype, with_core):
    """In 16 bits a sum of ones ends at 256 or 2048, and three finite gradients may make an infinite one."""
    if not with_core:
        monkeypatch.setattr(native, "_core", None)
    for value, count in ((1.0, 5000), (30_000.0, 3)):
        table = torch.zeros(4, 2, dtype=dtype, requires_grad=True)
        ids, values = torch.full((1, count), 2), torch.full((count, 2), value, dtype=dtype)
        norm = 2**0.5 * values[0, 0].double() * count
        for limit in (float("inf"), 1.0):
            table.grad = torch.sparse_coo_tensor(ids, values.clone(), (4, 2), check_invariants=True)
            assert_close(clip_grad_norm_([table], limit), norm.float())
            sums = table.grad._values().double().sum(0)
            assert_close(sums, torch.full((2,), 1.0).double() * (norm if limit > 1 else 1) / 2**0.5, torch.finfo(dtype).eps)


def test_steps_of_double_rows_are_not_rounded():
    rows = [torch.full((3, 2), 1 / 3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    for each, optimizer in zip(rows, (EngramAdamW(rows[:1], lr=1e-12), torch.optim.SparseAdam(rows[1:], lr=1e-12))):
        each.grad = torch.sparse_coo_tensor([[1]], torch.ones(1, 2, dtype=torch.float64), (3, 2), check_invariants=True)
        optimizer.step()
    assert_close(rows[0] - 1 / 3, rows[1] - 1 / 3, 1e-3)


def test_clipping_takes_a_single_parameter():
    parameter = torch.ones(2).requires_grad_()
    parameter.grad = torch.tensor([3.0, 4.0])
    assert clip_grad_norm_(parameter, float("inf")) == 5
    assert parameter.grad.tolist() == [3.0, 4.0]
    clip_grad_norm_(parameter, 1.0)
    assert_close(parameter.grad, torch.tensor([0.6, 0.8]))


def test_groups_are_strict_and_complete():
    memory = tiny_memory(tiny_model())
    groups = {g["name"]: g for g in build_param_groups(memory, memory.engrams, lr=1e-3, weight_decay=0.1)}
    assert set(groups) == {"tables", "reader", "reader_no_decay"}
    assert groups["tables"]["lr"] == 5e-3
    assert groups["tables"]["weight_decay"] == 0
    assert groups["reader"]["weight_decay"] == 0.1
    assert all(p.dim() < 2 for p in groups["reader_no_decay"]["params"])
    memory.base_model.requires_grad_(True)
    groups = build_param_groups(memory, memory.engrams, lr=1e-3, backbone_lr=1e-5)
    assert {g["name"] for g in groups} == {"tables", "reader", "reader_no_decay", "backbone", "backbone_no_decay"}
    grouped = [id(p) for g in groups for p in g["params"]]
    assert sorted(grouped) == sorted(id(p) for p in memory.parameters())
    assert next(g["lr"] for g in groups if g["name"] == "backbone") == 1e-5
    same = build_param_groups(memory, memory, lr=1e-3, backbone_lr=1e-5)  # the memory itself will do
    assert [(g["name"], len(g["params"])) for g in same] == [(g["name"], len(g["params"])) for g in groups]
    with pytest.raises(ConfigError, match="not parameters of the model"):
        build_param_groups(memory, copy.deepcopy(memory.engrams), lr=1e-3)
    memory.requires_grad_(False)
    with pytest.raises(ConfigError, match="no parameter is trainable"):
        build_param_groups(memory, memory.engrams, lr=1e-3)


def test_a_backbone_may_have_a_learning_rate_of_zero():
    memory = tiny_memory(tiny_model())
    memory.base_model.requires_grad_(True)
    groups = build_param_groups(memory, memory, lr=1e-3, backbone_lr=0.0)
    assert {g["lr"] for g in groups if g["name"].startswith("backbone")} == {0.0}


def test_a_parameter_shared_between_two_kinds_is_refused_by_name():
    memory = tiny_memory(tiny_model())
    memory.base_model.extra = torch.nn.Module()
    memory.base_model.extra.weight = next(iter(memory.engrams.values())).value_proj.weight
    with pytest.raises(ConfigError, match=r"extra\.weight is shared between backbone and reader"):
        build_param_groups(memory, memory.engrams, lr=1e-3)
    memory.base_model.extra.weight.requires_grad_(False)
    assert {g["name"] for g in build_param_groups(memory, memory.engrams, lr=1e-3)} == {"tables", "reader", "reader_no_decay"}


def test_tied_weights_of_one_kind_are_one_member():
    memory = tiny_memory(tiny_model(tie_word_embeddings=True))
    memory.requires_grad_(True)
    members = [id(p) for g in build_param_groups(memory, memory.engrams, lr=1e-3) for p in g["params"]]
    assert len(members) == len(set(members)) == len(list(memory.parameters()))


def test_what_cannot_be_saved_or_is_malformed_is_one_error(tmp_path):
    for tree in (np.array(["a"]), torch.eye(2).to_sparse(), {"f": print}):
        with pytest.raises(CheckpointError, match="without pickle"):
            save_tree(tmp_path / "bad", tree)
    save_tree(tmp_path / "state", {"a": 1})
    for malformed in ("[1]", '{"tree": {"__kind__": "dict", "items": [[{"__kind__": "dict", "items": []}, 1]]}}'):
        (tmp_path / "state.json").write_text(malformed)
        with pytest.raises(CheckpointError, match="cannot read the saved state"):
            load_tree(tmp_path / "state")
