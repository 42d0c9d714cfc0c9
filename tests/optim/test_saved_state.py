import copy
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from engram import CheckpointError, ConfigError
from engram.checkpoint import load_tree, save_tree
from engram.optim import EngramAdamW, own_state


def stepped():
    """An optimiser over a table and a matrix, after one step."""
    table, matrix = nn.Embedding(20, 4, sparse=True), nn.Linear(4, 3, bias=False)
    optimizer = EngramAdamW([{"params": table.parameters()}, {"params": matrix.parameters()}])
    matrix(table(torch.tensor([1, 3]))).sum().backward()
    optimizer.step()
    return optimizer


def without_groups(state):
    del state["param_groups"]


def without_state(state):
    state["state"] = None


def group_without_params(state):
    del state["param_groups"][1]["params"]


def group_without_rate(state):
    del state["param_groups"][0]["lr"]


def one_group_less(state):
    state["param_groups"].pop()


def unknown_parameter(state):
    state["state"][7] = state["state"].pop(1)


def entry_is_a_number(state):
    state["state"][1] = 3


def other_shape(state):
    state["state"][1]["exp_avg"] = torch.zeros(2, 2)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_groups, r"got keys \['state'\]"),
        (without_state, "expected 'state'"),
        (group_without_params, "no list 'params'"),
        (group_without_rate, "no 'lr'"),
        (one_group_less, r"got parameter groups of \[1\] parameters, expected \[1, 1\]"),
        (unknown_parameter, "got parameter 7, expected a dict for each of parameters 0 to 1"),
        (entry_is_a_number, "got a int for parameter 1"),
        (other_shape, r"got exp_avg of shape \[2, 2\] for parameter 1, expected \[3, 4\]"),
    ],
)
def test_a_damaged_state_is_refused_and_changes_nothing(damage, message):
    state = copy.deepcopy(stepped().state_dict())
    damage(state)
    optimizer = stepped()
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(CheckpointError, match=message):
        optimizer.load_state_dict(state)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert all(torch.equal(after["state"][1][name], value) for name, value in before["state"][1].items())


@pytest.mark.parametrize("state", [None, [], {}, {"state": {}}])
def test_what_is_no_state_at_all_is_refused(state):
    with pytest.raises(CheckpointError, match="optimiser state: got"):
        stepped().load_state_dict(state)


@pytest.mark.parametrize("rounding", ["yes", 1, None])
def test_rounding_by_chance_is_true_or_false(rounding):
    p = nn.Parameter(torch.zeros(2, 2))
    with pytest.raises(ConfigError, match="got stochastic_rounding="):
        EngramAdamW([p], stochastic_rounding=rounding)
    with pytest.raises(ConfigError, match="got stochastic_rounding="):
        EngramAdamW([{"params": [p], "stochastic_rounding": rounding}])


def test_files_of_two_saves_are_not_taken_for_one(tmp_path, monkeypatch):
    state = {"step": 1, "a": torch.zeros(2), "b": torch.ones(2)}
    save_tree(tmp_path / "state", state)
    with monkeypatch.context() as patched:
        patched.setattr("engram.checkpoint.tree.write_json_atomically", interrupted)
        with pytest.raises(KeyboardInterrupt):
            save_tree(tmp_path / "state", {"step": 2, "b": torch.zeros(2), "a": torch.ones(2)})
    with pytest.raises(CheckpointError, match="its two files are of different saves"):
        load_tree(tmp_path / "state")
    save_tree(tmp_path / "state", state)
    assert load_tree(tmp_path / "state")["step"] == 1


def test_states_from_before_files_named_each_other_are_read(tmp_path):
    save_tree(tmp_path / "state", {"step": 1, "a": torch.zeros(2)})
    description = json.loads((tmp_path / "state.json").read_text())
    del description["pair"]
    (tmp_path / "state.json").write_text(json.dumps(description))
    save_file(load_file(tmp_path / "state.safetensors"), tmp_path / "state.safetensors")
    assert load_tree(tmp_path / "state")["step"] == 1


def interrupted(*_):
    raise KeyboardInterrupt


def test_states_are_written_without_a_copy_of_their_rows(tmp_path):
    optimizer = stepped()
    moments = optimizer.state[optimizer.param_groups[0]["params"][0]]["row_moments"]
    for by_reference in (True, False):
        state = own_state(optimizer, by_reference)
        entry = next(e["row_moments"] for e in state["state"].values() if "row_moments" in e)
        rows = entry["state"]["exp_avg"] if "state" in entry else entry["exp_avg"]
        assert (rows.data_ptr() == moments.buffers["exp_avg"].data_ptr()) == by_reference
        save_tree(tmp_path / str(by_reference), state)
    one, other = (load_file(tmp_path / f"{name}.safetensors") for name in (True, False))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    stepped().load_state_dict(load_tree(tmp_path / "True"))


def test_every_type_of_tensor_that_files_hold_comes_back(tmp_path):
    tree = {
        "generator": np.arange(3, dtype=np.uint32)[::-1],
        "view": torch.arange(12).reshape(3, 4)[:, 1:3],
        "step": torch.tensor(3.0),
        "none": torch.zeros(0, 4),
        "flags": torch.tensor([True, False]),
    }
    save_tree(tmp_path / "state", tree)
    for name, value in load_tree(tmp_path / "state").items():
        assert np.array_equal(value, tree[name]), name
        assert value.dtype == tree[name].dtype
    for refused in (torch.zeros(2, dtype=torch.complex64), torch.zeros(2, 2).to_sparse()):
        with pytest.raises(CheckpointError, match="cannot save this state without pickle"):
            save_tree(tmp_path / "refused", {"a": refused})
