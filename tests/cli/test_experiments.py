"""`engram budget`, `engram train` and `engram sweep` as a user meets them."""

import json
import re
from pathlib import Path

import pytest
import yaml

from engram.experiments import read_sweep
from tests.cli.test_cli import invoke
from tests.plots import made_up

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
    same = json.loads((tmp_path / "same.json").read_text())
    assert same["allocations"] == written["allocations"]  # 32 are the recipe's
    assert written["command"].startswith("engram budget --total 13.73k --active 5264 --rho 1,0.6 --tokens 1M --recipe ")
    assert "--seq-len" not in written["command"]
    assert f"--seq-len 32 --json {tmp_path / 'same.json'}" in same["command"]
    assert written["backbone"]["hidden_size"] == 16
    assert written["engram"]["layer_ids"] == [1]
    assert "intermediate_size" not in written["backbone"]  # each allocation has its own
    assert written["versions"]["engram"]
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


@pytest.mark.parametrize("active", ["416k", "390k"])
def test_the_budget_in_the_help_is_met_without_a_recipe(monkeypatch, capsys, active):
    code, out, err = invoke(monkeypatch, capsys, "budget", "--total", "4.3M", "--active", active)
    assert (code, err) == (0, "")
    assert "4 blocks of width 96" in out


def test_a_budget_that_cannot_be_met_names_the_way_to_other_sizes(monkeypatch, capsys):
    _, _, err = invoke(monkeypatch, capsys, "budget", "--total", "4.3M", "--active", "10k")
    assert "without --recipe (4 blocks of width 96): for others, write a recipe with `engram recipe sweep --out FILE`" in err
    _, _, err = invoke(monkeypatch, capsys, "budget", "--total", "4.3M", "--active", "10k", "--recipe", SWEEP)
    assert "one with --recipe" not in err.replace("without --recipe", "")
    assert "backbone.num_hidden_layers in the recipe" in err
    _, _, err = invoke(monkeypatch, capsys, "budget", "--total", "1k", "--active", "1M")
    assert "--recipe" not in err


def test_a_budget_far_too_large_for_the_width_is_warned_of_and_its_numbers_are_whole(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "40")
    code, out, err = invoke(monkeypatch, capsys, "budget", "--total", "27B", "--active", "4B", "--rho", "1", "--tokens", "270B")
    assert code == 0
    assert "…" not in out
    assert re.search(r"│ 27,000,0\d\d,\d{3} │ 3,99\d,\d{3},\d{3} │ ", out)
    assert "do not suit 4 blocks of width 96" in err
    assert "a width of about 9,129" in err
    assert "--recipe" in err


def test_a_plan_shows_what_is_trained(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("COLUMNS", "40")
    _, out, _ = invoke(monkeypatch, capsys, "sweep", SWEEP, "--out", tmp_path / "run", "--plan", "--set", "tokens=1100")
    header = next(line for line in out.splitlines() if "operations/token" in line)
    names = [name.strip() for name in header.strip("┃").split("┃")]
    assert len(set(names)) == len(names)
    assert "1,024" in out  # 8 steps of 4 x 32
    assert "1,100" not in out
    assert "…" not in out


def sweep_of(monkeypatch, capsys, tmp_path, result):
    """`engram sweep` with a result in place of training."""
    monkeypatch.setattr("engram.experiments.run_sweep", lambda *arguments, **options: result)
    return invoke(monkeypatch, capsys, "sweep", SWEEP, "--out", tmp_path / "run", "--json", tmp_path / "r.json")


def test_a_sweep_ends_with_a_table(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("COLUMNS", "40")
    result = made_up.allocation()
    code, out, _ = sweep_of(monkeypatch, capsys, tmp_path, result)
    assert code == 0
    assert "{" not in out
    row = next(row for row in result["summary"]["large"]["curve"] if row["label"] == "80%")
    loss, difference = row["loss"], row["against_experts_alone"]
    told = [
        *("large", "80.0", "%", "3", f"{loss['mean']:.4f}", f"[{loss['low']:.4f},", f"{loss['high']:.4f}]"),
        *(f"{difference['mean']:+.4f}", f"[{difference['low']:+.4f},", f"{difference['high']:+.4f}]"),
    ]
    assert told in [line.split() for line in out.splitlines()]
    assert "difference to experts alone" in out
    assert out.splitlines()[-1].startswith("48 of 48 points; written to ")
    for other, words in (
        (made_up.slots((0,)), ["no memory", "1,000 slots", "difference to no memory", "–"]),
        (made_up.ablation(), ["no gating", "difference to reference"]),
    ):
        _, out, _ = sweep_of(monkeypatch, capsys, tmp_path, other)
        assert all(word in out for word in words)
    nothing = made_up.sweep("slots", {"rows": {"none": {}}}, [])
    assert sweep_of(monkeypatch, capsys, tmp_path, nothing)[1].startswith("0 of 3 points; written")


@pytest.mark.parametrize("in_file", [True, False])
def test_points_of_another_recipe_are_told_of(monkeypatch, capsys, tmp_path, in_file):
    """The file names points of another number of tokens: they are kept, and nothing that is shown is of them."""
    entry = dict.fromkeys(("labels", "seed", "learning_rate", "validation", "test", "counts"))
    before = {**read_sweep(SWEEP).to_dict()}
    known = {"sweep": "tiny", "recipe": before, "points": [{**entry, "digest": str(n)} for n in range(4)]}
    file = tmp_path / ("r.json" if in_file else "run/sweep.json")
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(known))
    monkeypatch.setattr(
        "engram.experiments.run_sweep", lambda *arguments, **options: made_up.sweep("slots", {"rows": {"none": {}}}, [])
    )
    options = ("--json", file) if in_file else ()
    code, out, err = invoke(monkeypatch, capsys, "sweep", SWEEP, "--out", tmp_path / "run", "--set", "tokens=2048", *options)
    assert code == 0
    assert "holds 4 points of another recipe (tokens 1024, now 2048)" in err
    assert "the earlier recipe takes them up again" in err
    assert f"another {'--json' if in_file else '--out'} to keep" in err
    assert "0 of 3 points (4 of another recipe are kept aside); written" in out


def test_a_plan_lists_all_points_and_trains_nothing(monkeypatch, capsys, tmp_path):
    code, out, err = invoke(monkeypatch, capsys, "sweep", SWEEP, "--out", tmp_path / "run", "--plan")
    assert (code, err) == (0, "")
    assert "4 points, and 2 to choose learning rates" in out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--set", "tokens"), "expected FIELD=VALUE"),
        (("--set", "tokens=[1"), "cannot read the value of --set tokens"),
        (("--set", "tokens=2024-99-99"), "cannot read the value of --set tokens: a value is not what it looks like"),
        (("--set", "nothing.here=1"), "no mapping 'nothing'"),
        (("--set", "budget.rho=7"), "rho"),
        (("--set", "tokns=5"), "--set: got 'tokns', expected a field of the base"),
        (("--set", "tokns=5"), "Did you mean tokens?"),
        (("--set", "backbone.hiden_size=5"), "expected a field of the base in backbone"),
        (("--set", "backbone.hiden_size=5"), "Did you mean backbone.hidden_size?"),
    ],
)
def test_impossible_changes_are_one_clear_error(monkeypatch, capsys, tmp_path, options, words):
    code, _, err = invoke(monkeypatch, capsys, "sweep", SWEEP, "--out", tmp_path / "run", *options)
    assert code == 2
    assert words in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("notes", ["my notes", "[" * 100_000])
def test_a_file_that_is_no_result_is_not_written_over(monkeypatch, capsys, tmp_path, notes):
    file = tmp_path / "notes.json"
    file.write_text(notes)
    code, _, err = invoke(monkeypatch, capsys, "sweep", SWEEP, "--out", tmp_path / "run", "--json", file)
    assert code == 2
    assert "nothing was overwritten" in err
    assert file.read_text() == notes


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


def test_train_changes_fields_as_a_sweep_does(monkeypatch, capsys, tmp_path):
    run, changes = tmp_path / "run", ("--set", "tokens=1024", "--set", "lr_scheduler=wsd", "--set", "engram.kernel_size=2")
    code, out, _ = invoke(monkeypatch, capsys, "train", TRAIN, "--out", run, *changes)
    assert code == 0
    recipe, result = json.loads((run / "recipe.json").read_text()), json.loads((run / "result.json").read_text())
    assert (recipe["identity"]["tokens"], recipe["identity"]["lr_scheduler"], result["tokens"]) == (1024, "wsd", 1024)
    assert recipe["recipe"]["engram"]["kernel_size"] == 2
    assert invoke(monkeypatch, capsys, "train", TRAIN, "--out", run, *changes)[:2] == (0, out)  # finished: read back
    code, _, err = invoke(monkeypatch, capsys, "train", TRAIN, "--out", run, *changes[:4])
    assert code == 1
    assert "holds a run of another recipe (engram.kernel_size 2, now the default); choose another folder" in err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("tokens", "expected FIELD=VALUE"),
        ("tokens=[", "cannot read the value of --set tokens"),
        ("nothing.here=1", "the recipe has no mapping 'nothing'"),
        ("tokns=5", "--set: got 'tokns', expected a field of the recipe"),
        ("tokns=5", "Did you mean tokens?"),
        ("lr_scheduler=cosin", "PointRecipe.lr_scheduler: got 'cosin', expected one of cosine, constant, linear, wsd."),
    ],
)
def test_impossible_changes_of_a_run_are_one_clear_error(monkeypatch, capsys, tmp_path, change, words):
    code, _, err = invoke(monkeypatch, capsys, "train", TRAIN, "--out", tmp_path / "run", "--set", change)
    assert code == 2
    assert words in " ".join(re.sub(r"[│╭╮╰╯─]", " ", err).split())
    assert not (tmp_path / "run").exists()


def test_train_refuses_a_folder_of_another_recipe(monkeypatch, capsys, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.json").write_text("{}")
    code, _, err = invoke(monkeypatch, capsys, "train", TRAIN, "--out", run)
    assert code == 1
    assert "another recipe" in err
    assert "Traceback" not in err
