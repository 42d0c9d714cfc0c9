"""`engram budget`, `engram train` and `engram sweep` as a user meets them."""

import json
import re
from pathlib import Path

import pytest
import yaml

from tests.cli.test_cli import invoke

RECIPES = Path(__file__).parents[2] / "recipes"
SWEEP, TRAIN = RECIPES / "sweep_tiny.yaml", RECIPES / "train_tiny.yaml"


def test_budget_shows_every_share_and_writes_figures(monkeypatch, capsys, tmp_path):
    options = ("--total", "13.73k", "--active", "5264", "--rho", "1,0.6", "--tokens", "1M", "--recipe", SWEEP)
    code, out, err = invoke(monkeypatch, capsys, "budget", *options, "--json", tmp_path / "budget.json")
    assert (code, err) == (0, "")
    assert "deepseek_v3" in out
    written = json.loads((tmp_path / "budget.json").read_text())
    assert [row["asked_rho"] for row in written["allocations"]] == [1.0, 0.6]
    for row in written["allocations"]:
        assert f"{row['total']:,}" in out
        assert row["training_flops"] == 3e6 * row["flops_per_token"]
    invoke(monkeypatch, capsys, "budget", *options, "--seq-len", "32", "--json", tmp_path / "same.json")
    assert json.loads((tmp_path / "same.json").read_text()) == written  # 32 are the recipe's
    invoke(monkeypatch, capsys, "budget", *options, "--seq-len", "64", "--json", tmp_path / "longer.json")
    longer = json.loads((tmp_path / "longer.json").read_text())["allocations"]
    assert all(a["flops_per_token"] > b["flops_per_token"] for a, b in zip(longer, written["allocations"]))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--total", "many", "--active", "1k"), "--total: got 'many'"),
        (("--total", "1M", "--active", "0"), "--active: got '0'"),
        (("--total", "1M", "--active", "100k", "--rho", "half"), "--rho: got 'half'"),
        (("--total", "1k", "--active", "1M"), "0 < active < total"),
        (("--total", "4.3M", "--active", "10k"), "expected more active parameters"),
        (("--total", "4.3M", "--active", "390k", "--recipe", "nowhere.yaml"), "nowhere.yaml does not exist"),
        (("--total", "4.3M", "--active", "390k", "--recipe", RECIPES / "tiny_pretrain.yaml"), "'base' mapping"),
    ],
)
def test_impossible_budgets_are_one_clear_error(monkeypatch, capsys, options, words):
    code, out, err = invoke(monkeypatch, capsys, "budget", *options)
    assert code == 2
    assert out == ""
    assert words in " ".join(re.sub(r"[│╭╮╰╯─]", " ", err).split())
    assert "Traceback" not in err


def test_a_plan_lists_all_points_and_trains_nothing(monkeypatch, capsys, tmp_path):
    code, out, err = invoke(monkeypatch, capsys, "sweep", SWEEP, "--out", tmp_path / "run", "--plan")
    assert (code, err) == (0, "")
    assert "4 points, and 2 to choose learning rates" in out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--set", "tokens"), "expected FIELD=VALUE"),
        (("--set", "nothing.here=1"), "no mapping 'nothing'"),
        (("--set", "budget.rho=7"), "rho"),
    ],
)
def test_impossible_changes_are_one_clear_error(monkeypatch, capsys, tmp_path, options, words):
    code, _, err = invoke(monkeypatch, capsys, "sweep", SWEEP, "--out", tmp_path / "run", *options)
    assert code == 2
    assert words in err
    assert not (tmp_path / "run").exists()


def test_a_file_that_is_no_result_is_not_written_over(monkeypatch, capsys, tmp_path):
    file = tmp_path / "notes.json"
    file.write_text("my notes")
    code, _, err = invoke(monkeypatch, capsys, "sweep", SWEEP, "--out", tmp_path / "run", "--json", file)
    assert code == 2
    assert "nothing was overwritten" in err
    assert file.read_text() == "my notes"


def test_a_run_folder_with_the_result_of_another_sweep_keeps_it(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("engram.experiments.run_sweep", None)
    file = tmp_path / "run" / "sweep.json"
    file.parent.mkdir()
    file.write_text('{"sweep": "slots"}')
    code, _, err = invoke(monkeypatch, capsys, "sweep", SWEEP, "--out", tmp_path / "run")
    assert code == 1
    assert "is the result of sweep 'slots', expected 'tiny'" in err
    assert file.read_text() == '{"sweep": "slots"}'


@pytest.mark.parametrize(
    ("result", "words"),
    [
        ({"points": [{}]}, "points[0] that lacks digest, labels"),
        ({"tuning": ["x"]}, "tuning[0] that lacks digest, labels"),
        ({"points": None}, "no list of 'points'"),
        ({"data": []}, "no mapping 'data'"),
    ],
)
def test_a_result_with_points_that_are_none_is_not_gone_on_from(monkeypatch, capsys, tmp_path, result, words):
    file = tmp_path / "result.json"
    file.write_text(json.dumps({"sweep": "tiny", **result}))
    code, _, err = invoke(monkeypatch, capsys, "sweep", SWEEP, "--out", tmp_path / "run", "--json", file)
    assert code == 2
    assert words in err
    assert "nothing was overwritten" in err
    assert "Traceback" not in err
    assert json.loads(file.read_text()) == {"sweep": "tiny", **result}


@pytest.mark.parametrize("base", [{"data": None}, {"backbone": "deepseek_v3"}])
def test_a_budget_of_a_base_with_wrong_forms_is_one_clear_error(monkeypatch, capsys, tmp_path, base):
    fields = yaml.safe_load(SWEEP.read_text())
    fields["base"] |= base
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(fields))
    options = ("--total", "13.73k", "--active", "5264", "--recipe", tmp_path / "sweep.yaml")
    code, out, err = invoke(monkeypatch, capsys, "budget", *options)
    assert (code, out) == (2, "")
    assert "expected a mapping" in err
    assert "Traceback" not in err


def test_train_keeps_model_and_memory_and_tells_the_losses(monkeypatch, capsys, tmp_path):
    run = tmp_path / "run"
    code, out, _ = invoke(monkeypatch, capsys, "train", TRAIN, "--out", run)
    assert code == 0
    result = json.loads((run / "result.json").read_text())
    assert f"test: {result['held_out']['test']['loss']:.4f} nats per token" in out
    assert (run / "model" / "config.json").is_file()
    assert (run / "memory" / "engram.json").is_file()
    code, again, _ = invoke(monkeypatch, capsys, "train", TRAIN, "--out", run)  # finished: read back
    assert (code, again) == (0, out)


@pytest.mark.slow
def test_train_takes_another_seed(monkeypatch, capsys, tmp_path):
    code, _, _ = invoke(monkeypatch, capsys, "train", TRAIN, "--out", tmp_path / "run", "--seed", "3")
    assert code == 0
    assert json.loads((tmp_path / "run" / "recipe.json").read_text())["recipe"]["seed"] == 3
    code, _, err = invoke(monkeypatch, capsys, "train", TRAIN, "--out", tmp_path / "run")
    assert code == 1
    assert "another recipe" in err


def test_train_refuses_a_folder_of_another_recipe(monkeypatch, capsys, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.json").write_text("{}")
    code, _, err = invoke(monkeypatch, capsys, "train", TRAIN, "--out", run)
    assert code == 1
    assert "another recipe" in err
    assert "Traceback" not in err
