import dataclasses
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from filelock import FileLock

from engram import CheckpointError, ConfigError, DataError, TrainingError
from engram.checkpoint import sole_writer
from engram.config import EngramConfig
from engram.experiments import BackboneConfig, read_base, read_point, read_sweep, run_point, run_sweep
from engram.experiments import point as point_module
from engram.experiments import sweep as sweep_module
from engram.experiments.data import prepare_data
from engram.experiments.recipe import BudgetRecipe, DataRecipe, PointRecipe
from engram.experiments.summary import summarise
from engram.experiments.sweep import changes_since, kept_aside
from tests.training.paused import Paused

RECIPES = Path(__file__).parents[2] / "recipes"
TINY = RECIPES / "sweep_tiny.yaml"
SIZES = ("total", "active", "flops_per_token")


def tiny(**changes):
    return read_sweep(TINY, changes)


def first_point(sweep):
    return sweep.recipe_of(next(sweep.combinations()), sweep.seeds[0])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The tiny sweep, run once: its folder, its result and what was said."""
    out, said = tmp_path_factory.mktemp("sweep"), []
    result = run_sweep(tiny(), RECIPES, out, workers=2, show=said.append)
    return out, result, said


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("sweep_*.yaml")), ids=lambda path: path.stem)
def test_every_sweep_recipe_is_read_and_every_point_can_be_built(recipe):
    sweep = read_sweep(recipe)
    assert sweep.points(dict.fromkeys(sweep.tuning_points(), 1e-3))


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("train_*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_of_one_run_is_read(recipe):
    assert read_point(recipe).solved().budget is None


@pytest.mark.slow
def test_a_sweep_tunes_runs_and_sums_up(finished):
    _, result, _ = finished
    assert [entry["labels"]["rho"] for entry in result["points"]] == ["1.0", "1.0", "0.6", "0.6"]
    assert {entry["learning_rate"] for entry in result["tuning"]} == {1e-3, 3e-3}
    best = min(result["tuning"], key=lambda entry: entry["validation"]["loss"])["learning_rate"]
    assert {entry["learning_rate"] for entry in result["points"]} == {best}
    assert not {entry["seed"] for entry in result["tuning"]} & {entry["seed"] for entry in result["points"]}
    curve = result["summary"]["all"]["curve"]
    assert [row["loss"]["n"] for row in curve] == [2, 2]
    assert result["failures"] == []
    for entry in result["points"]:
        assert entry["counts"]["total"] == pytest.approx(13728, rel=5e-3)
        assert entry["test"]["tokens"] == sum(kind["tokens"] for kind in entry["test"]["by_kind"].values())
        assert entry["test"]["bits_per_byte"] > 0
        assert entry["curve"][-1][0] == entry["steps"]


@pytest.mark.slow
def test_points_made_on_other_text_are_not_mixed_in(finished, tmp_path):
    out, _, _ = finished
    shutil.copytree(out, tmp_path / "sweep")
    file = next((tmp_path / "sweep" / "points").glob("*/result.json"))
    file.write_text(json.dumps({**json.loads(file.read_text()), "text": "0" * 64}))
    with pytest.raises(CheckpointError, match="made on other text"):
        run_sweep(tiny(), RECIPES, tmp_path / "sweep", show=lambda line: None)


def test_a_finished_sweep_trains_nothing_again(finished, monkeypatch):
    out, result, _ = finished
    monkeypatch.setattr(subprocess, "Popen", None)  # starting a worker would fail
    before = {file: file.stat().st_mtime_ns for file in out.rglob("result.json")}
    again = run_sweep(tiny(), RECIPES, out, show=lambda line: None)
    assert json.loads(json.dumps(again)) == json.loads(json.dumps(result))
    assert {file: file.stat().st_mtime_ns for file in out.rglob("result.json")} == before


@pytest.mark.slow
def test_points_of_a_result_file_are_not_run_again(finished, tmp_path, monkeypatch):
    out, result, _ = finished
    shutil.copytree(out / "data", tmp_path / "data")
    monkeypatch.setattr(subprocess, "Popen", None)
    again = run_sweep(tiny(), RECIPES, tmp_path, json.loads(json.dumps(result)), show=lambda line: None)
    assert again["points"] == json.loads(json.dumps(result["points"]))


@pytest.mark.slow
def test_points_of_a_result_are_kept_whatever_happens(finished, tmp_path):
    """While learning rates are chosen anew, and when the sweep is another than it was."""
    out, result, _ = finished
    shutil.copytree(out / "data", tmp_path / "data")
    known, saved = json.loads(json.dumps(result)), []
    changed = tiny(tokens=2048)
    run_sweep(changed, RECIPES, tmp_path, known, show=lambda line: None, save=saved.append, limit=0)
    everything = {entry["digest"] for entry in result["points"] + result["tuning"]}
    assert saved
    for state in saved:
        assert {entry["digest"] for entry in state["points"] + state["tuning"] + state["other_points"]} == everything
    again = run_sweep(tiny(), RECIPES, tmp_path, json.loads(json.dumps(saved[-1])), show=lambda line: None, limit=0)
    assert [e["digest"] for e in again["points"]] == [e["digest"] for e in result["points"]]
    assert again["other_points"] == []


def test_two_arms_that_are_the_same_run_are_refused(tmp_path):
    variants = {"rho": {"0.6": {"budget.rho": 0.6}, "again": {"budget.rho": 0.6, "learning_rate": 1e-3}}}
    both = dataclasses.replace(tiny(), variants=variants, tune=None, base={**tiny().base, "learning_rate": 1e-3})
    with pytest.raises(ConfigError, match="the same run"):
        run_sweep(both, RECIPES, tmp_path, show=lambda line: None, limit=0)


@pytest.mark.slow
def test_what_is_finished_is_summed_up_while_other_learning_rates_are_undecided(finished, tmp_path):
    """A second budget whose learning rates nobody has chosen yet does not hide the points of the first."""
    out, result, _ = finished
    fields = yaml.safe_load(TINY.read_text())
    fields["variants"] = {"size": {"first": {}, "second": {"tokens": 2048}}, "rho": fields["variants"]["rho"]}
    both = dataclasses.replace(tiny(), variants=fields["variants"])
    shutil.copytree(out / "data", tmp_path / "data")
    again = run_sweep(both, RECIPES, tmp_path, json.loads(json.dumps(result)), show=lambda line: None, limit=0)
    assert [entry["digest"] for entry in again["points"]] == [entry["digest"] for entry in result["points"]]
    assert again["expected_points"] == 8
    assert [rate["at"]["size"] for rate in again["learning_rates"]] == ["first"]


@pytest.mark.slow
def test_results_of_other_text_or_of_another_sweep_are_refused(finished, tmp_path):
    _, result, _ = finished
    with pytest.raises(CheckpointError, match="another file"):
        run_sweep(tiny(), RECIPES, tmp_path, {**result, "sweep": "other"}, show=lambda line: None)
    other = {**result, "data": {"fingerprint": "0" * 64}}
    with pytest.raises(DataError, match=r"other text .* files that the corpus names have changed"):
        run_sweep(tiny(), RECIPES, tmp_path, other, show=lambda line: None)
    assert result["data"]["installed"] == {}  # of this text nothing is read off the installation


def test_other_text_says_what_makes_it_another():
    def why(there, here, recipe=None):
        known = {"data": {"installed": there}, "recipe": (recipe or tiny()).to_dict()}
        return sweep_module._why_other_text(known, tiny(), SimpleNamespace(description={"installed": here}))

    had = {"python": "3.11.7", "click": "8.5.1", "numpy": "2.4.6"}
    told = why(had, {"python": "3.11.7", "click": "8.4.0", "rich": "15"})
    assert told == (
        "read off other versions than are installed here (click 8.5.1, now 8.4.0; numpy 2.4.6, now absent; rich absent, now 15)"
    )
    assert why(had, had) == "the same versions are installed, so files that the corpus names have changed"
    assert "the result is from before versions were written down" in why(None, had)
    assert "the store here is from before versions were written down" in why(had, None)
    other = tiny(**{"data.vocab_size": 290, "data.corpus.held_out_percent": 20})
    assert why(had, {}, other) == (
        "the recipe asks for another (data.corpus.held_out_percent 20, now 30; data.vocab_size 290, now 300)"
    )


def test_a_store_without_versions_leaves_those_of_the_result(tmp_path):
    run = sweep_module.SweepRun(tiny(), RECIPES, tmp_path, {"data": {"installed": {"python": "3"}}})
    for description, found in (
        ({}, {"python": "3"}),
        ({"installed": {}}, {}),
        ({"installed": {"python": "4"}}, {"python": "4"}),
    ):
        assert run._installed(SimpleNamespace(description=description)) == {"installed": found}
    assert sweep_module.SweepRun(tiny(), RECIPES, tmp_path)._installed(SimpleNamespace(description={})) == {}


def test_points_of_another_recipe_are_told_apart_whatever_learning_rate_is_chosen():
    sweep = tiny()
    chosen = sweep.points(dict.fromkeys(sweep.tuning_points(), 1e-3))
    tried = [point for points in sweep.tuning_points().values() for point in points]
    known = {
        "recipe": sweep.to_dict(),
        "points": [{"digest": point.digest} for point in chosen],
        "tuning": [{"digest": point.digest} for point in tried],
    }
    assert kept_aside(sweep, known) == changes_since(sweep, known) == []
    longer = tiny(tokens=2048)
    assert len(kept_aside(longer, known)) == len(chosen) + len(tried)
    assert changes_since(longer, known) == ["tokens 1024, now 2048"]
    fewer = dataclasses.replace(sweep, seeds=(0,))
    assert [entry["digest"] for entry in kept_aside(fewer, known)] == [p.digest for p in chosen if p.seed == 1]
    assert changes_since(fewer, known) == ["other seeds"]
    assert changes_since(fewer, {"recipe": None}) == changes_since(fewer, {}) == []


@pytest.mark.slow
def test_a_killed_point_goes_on_with_the_same_losses_to_the_last_digit(finished, tmp_path):
    out, _, _ = finished
    shutil.copytree(out / "data", tmp_path / "data")
    sweep = tiny(tokens=2560)
    recipe = sweep.recipe_of({"rho": "0.6"}, 0)
    data = prepare_data(recipe.data, RECIPES, tmp_path / "data")
    whole = run_point(recipe, data, tmp_path / "whole")
    folder = tmp_path / "killed"
    folder.mkdir()
    (folder / "task.json").write_text(
        json.dumps({"recipe": recipe.to_dict(), "data": str(tmp_path / "data"), "threads": 1}), encoding="utf-8"
    )
    command = [sys.executable, "-m", "engram.experiments.worker", str(folder)]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_for(lambda: any(folder.glob("checkpoints/checkpoint-*/trainer_state.json")), child)
    finally:
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
    assert not (folder / "result.json").exists()
    resumed = run_point(recipe, data, folder)
    for name in ("held_out", "training_loss", "curve", "counts"):
        assert resumed[name] == whole[name]


def _wait_for(condition, child, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert child.poll() is None or condition(), "the worker ended early"
        assert time.monotonic() < end
        time.sleep(0.002)


@pytest.mark.slow
def test_a_diverging_point_fails_in_words_and_the_others_finish(finished, tmp_path):
    out, _, _ = finished
    shutil.copytree(out / "data", tmp_path / "data")
    fields = yaml.safe_load(TINY.read_text())
    del fields["tune"]
    fields["variants"]["rho"]["0.6"] = {"budget.rho": 0.6, "learning_rate": 1e30}
    fields["seeds"] = [0]
    (tmp_path / "corpus").symlink_to(RECIPES.parent / "corpus")
    (tmp_path / "recipes").mkdir()
    recipe = tmp_path / "recipes" / "sweep.yaml"
    recipe.write_text(yaml.safe_dump(fields))
    result = run_sweep(read_sweep(recipe), recipe.parent, tmp_path, show=lambda line: None)
    assert [entry["labels"]["rho"] for entry in result["points"]] == ["1.0"]
    [failure] = result["failures"]
    assert "rho=0.6" in failure["point"]
    assert "loss" in failure["error"]
    assert "learning rate" in failure["error"]
    for retry, told in ((False, "1 failed before"), (True, "points are finished, 0 to run")):
        said = []
        again = run_sweep(read_sweep(recipe), recipe.parent, tmp_path, show=said.append, limit=0, retry=retry)
        assert again["failures"] == ([] if retry else [failure])
        assert told in said[-1]


@pytest.mark.slow
def test_nothing_is_chosen_without_a_run_that_was_killed(finished, tmp_path, monkeypatch):
    """It may have been the best, and what was trained at another rate would have to be trained again."""
    out, whole, _ = finished
    shutil.copytree(out, tmp_path / "run")
    best = whole["learning_rates"][0]["learning_rate"]
    [killed] = (tmp_path / "run" / "tuning").glob(f"*lr={best:g}*")
    (killed / "result.json").unlink()
    said = []
    with monkeypatch.context() as patched:
        patched.setattr(sweep_module.SweepRun, "_run_one", lambda self, point: {"error": "ended with code -9"})
        result = run_sweep(tiny(), RECIPES, tmp_path / "run", show=said.append)
    assert (result["points"], result["learning_rates"]) == ([], [])
    [failure] = result["failures"]
    assert (failure["error"], failure["for_good"]) == ("ended with code -9", False)
    assert any("no learning rate is chosen at rho=0.6 yet" in line and failure["point"] in line for line in said)
    again = run_sweep(tiny(), RECIPES, tmp_path / "run", known=result, show=said.append)
    assert again["learning_rates"] == whole["learning_rates"]
    assert [entry["test"] for entry in again["points"]] == [entry["test"] for entry in whole["points"]]


def test_a_rate_without_a_loss_is_not_chosen():
    points = next(iter(tiny().tuning_points().values()))
    first, second = (
        {point.digest: {"validation": {"loss": loss}} for point, loss in zip(points, losses)}
        for losses in ((float("nan"), 5.0), (5.0, float("nan")))
    )
    assert [sweep_module._choose(points, found) for found in (first, second)] == [3e-3, 1e-3]
    assert sweep_module._choose(points, {p.digest: {"validation": {"loss": float("nan")}} for p in points}) is None


@pytest.mark.slow
def test_a_run_whose_held_out_loss_is_no_number_leaves_no_result(finished, tmp_path, monkeypatch):
    out, _, _ = finished
    recipe = first_point(tiny())
    data = prepare_data(recipe.data, RECIPES, out / "data")
    nothing = {half: {"loss": float("nan")} for half in ("validation", "test")}
    monkeypatch.setattr(point_module, "_measure_all", lambda *_: nothing)
    with pytest.raises(TrainingError, match="held-out loss is not finite"):
        run_point(recipe, data, tmp_path / "run")
    assert not (tmp_path / "run" / "result.json").exists()


@pytest.mark.slow
def test_a_sweep_that_a_scheduler_stops_leaves_no_worker_and_goes_on(finished, tmp_path):
    out, _, _ = finished
    shutil.copytree(out / "data", tmp_path / "run" / "data")
    states = "run/tuning/*/checkpoints/checkpoint-*/trainer_state.json"
    options = ["--out", str(tmp_path / "run"), "--workers", "2", "--set", "tokens=25600"]
    command = [sys.executable, "-m", "engram.cli.main", "sweep", str(TINY), *options]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    _wait_for(lambda: len({file.parents[2] for file in tmp_path.glob(states)}) == 2, child)
    child.send_signal(signal.SIGTERM)
    _, said = child.communicate(timeout=120)
    assert child.returncode == 130
    assert "the same command goes on" in said
    folders = list(tmp_path.glob("run/tuning/*"))
    for folder in folders:
        with FileLock(folder / ".lock", timeout=0):  # free: its worker has ended
            assert list(folder.glob("checkpoints/checkpoint-*")), said
            assert not (folder / "result.json").exists()
    assert "--set tokens=25600" in json.loads((tmp_path / "run" / "sweep.json").read_text())["command"]


def test_one_sweep_at_a_time_writes_to_a_folder(tmp_path):
    with sole_writer(tmp_path / "run", "sweeping"), pytest.raises(CheckpointError, match="another process is running a sweep"):
        run_sweep(tiny(), RECIPES, tmp_path / "run", show=lambda line: None)
    assert not (tmp_path / "run").exists()


def test_models_side_by_side_are_compared_with_the_one_that_the_recipe_names():
    points = [
        {"labels": {"arm": arm}, "seed": seed, "test": {"loss": loss + seed}, "counts": dict.fromkeys(SIZES, 1)}
        for arm, loss in (("dense", 2.0), ("memory", 1.5))
        for seed in (0, 1)
    ]
    arms = summarise("comparison", points, "memory")["all"]
    assert arms["dense"]["against_reference"]["mean"] == 0.5
    assert arms["memory"]["against_reference"] is None
    assert not any(arm["against_reference"] for arm in summarise("comparison", points)["all"].values())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"question": "why"}, "question"),
        ({"seeds": []}, "seeds"),
        ({"seeds": [1000]}, "other seeds"),
        ({"variants": {}}, "variants"),
        ({"variants": {"rho": {"0.6": {"budjet.rho": 1}}}}, "budjet"),
        ({"variants": {"rho": {"0.6": {"budget.rho": 2.0}}}}, "rho"),
        ({"tune": {"learning_rate": [1e-3], "groups": [{"at": {"rho": "0.7"}}]}}, "not one of the variants"),
        ({"variants": {"rho": {"0.6": {"tokens": 0}}}, "tune": None}, "tokens"),
        ({"base": {"data": {"corpus": {"texts": ["x"]}}}}, "no mapping 'budget'"),
        ({"base": {"data": {"corpus": "../elsewhere.yaml"}}}, "same folder"),
        ({"nonsense": 1}, "nonsense"),
        ({"seeds": ["a"]}, "whole number"),
        ({"seeds": [-1]}, "whole number"),
        ({"seeds": 3}, "expected a list"),
        ({"tune": {"learning_rate": 0.003, "groups": []}}, "expected a list of numbers"),
        ({"tune": {"learning_rate": [], "groups": [{"at": {"rho": "0.6"}}]}}, "at least one learning rate"),
        ({"tune": {"learning_rate": [float("inf")], "groups": []}}, "expected a list of numbers"),
        ({"variants": {"rho": {"0.6": {"learning_rate": float("inf")}}}, "tune": None}, "learning_rate: got inf"),
        ({"variants": {"rho": {"0.6": {"learning_rate": float("nan")}}}, "tune": None}, "learning_rate: got nan"),
        ({"variants": {"rho": {"0.6": {"balance_rate": float("inf")}}}, "tune": None}, "balance_rate: got inf"),
        ({"tune": ["x"]}, "wrong form"),
        ({"variants": {"rho": {"0.6": ["x"]}}, "tune": None}, "wrong form"),
        ({"base": ["x"]}, "expected a mapping as in"),
        ({"variants": ["x"]}, "wrong form"),
        ({"variants": {"rho": {0.6: {"budget.rho": 0.6}}}}, 'expected text: write "0.6"'),
        ({"question": "slots"}, "'rows'"),
        ({"base": None}, "the base has no mapping 'budget'"),
        ({"base": [1]}, r"base: got \[1\], expected a mapping"),
        (
            {"base": {**yaml.safe_load(TINY.read_text())["base"], "seed": 7}},
            "base: got 'seed', expected it in the sweep's 'seeds'",
        ),
        ({"tune": {"learning_rate": [1e-3]}}, r"tune.*groups"),
        ({"tune": {"learning_rate": [1e-3], "groups": []}}, "tune.groups: got none"),
        ({"tune": {"learning_rate": [1e-3], "groups": [{"at": {"rho": "0.6"}}], "seeds": 5}}, "tune.seeds: got 5"),
        ({"tune": {"learning_rate": [1e-3], "groups": [{"at": {"rho": "0.6"}}], "seeds": [-1]}}, r"tune.seeds: got \[-1\]"),
        ({"tune": {"learning_rate": [1e-3], "groups": [{"at": {"rho": "0.6"}, "where": {"rho": "0.6"}}]}}, "groups.where: got"),
        ({"tune": {"learning_rate": [1e-3], "groups": [{"at": {"rho": ["0.6"]}}]}}, "groups.at: got"),
        ({"variants": {"rho": {"1.0": {}, "0.6": {"budget.rho": 0.6}, "same": {"budget.rho": 0.6}}}}, "are the same run"),
        (
            {"variants": {"rho": {"1.0": {}, "0.6": {"budget.rho": 0.6}, "same": {"budget.rho": 0.6}}}, "tune": None},
            "are the same run",
        ),
        ({"reference": "0.6"}, "sweep.reference"),
        ({"question": "ablation"}, "'arm'"),
        ({"variants": {"rho": {"0.6": {"budget.rho": "0.6"}}}, "tune": None}, "BudgetRecipe.rho"),
        ({"variants": {"rho": {"0.6": {"budget.total": "4e6"}}}, "tune": None}, "BudgetRecipe.total"),
        ({"variants": {"rho": {"0.6": {"tokens": 1024.0}}}, "tune": None}, "whole number"),
        ({"variants": {"rho": {"0.6": {"curve_points": 0}}}, "tune": None}, "whole number"),
        ({"variants": {"rho": {"0.6": {"weight_decay": -1}}}, "tune": None}, "weight_decay"),
        ({"variants": {"rho": {"0.6": {"bf16": "no"}}}, "tune": None}, "true or false"),
        ({"variants": {"rho": {"0.6": {"engram": None, "budget.rho": 0.6}}}, "tune": None}, "without a memory"),
        (
            {
                "question": "slots",
                "variants": {
                    "rows": {
                        "none": {"budget.rho": 1.0},
                        "more": {"budget.rho": 0.6},
                        "no": {"budget.rho": 1.0, "learning_rate": 0.1},
                    }
                },
                "tune": None,
            },
            "got no, none without a memory, expected at most one",
        ),
    ],
)
def test_impossible_sweeps_are_refused_before_anything_runs(tmp_path, change, words):
    fields = {**yaml.safe_load(TINY.read_text()), **change}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(fields))
    with pytest.raises((ConfigError, DataError), match=words):
        read_sweep(tmp_path / "sweep.yaml")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"data": None}, "data: got None, expected a mapping"),
        ({"data": {"corpus": None}}, "DataRecipe.corpus"),
        ({"backbone": None}, "backbone: got None, expected a mapping"),
        ({"backbone": {"hidden_size": 10**30}}, "hidden_size: got 10*, expected an int of at least 1 and below"),
        ({"engram": {"layer_ids": 1}}, "layer_ids: got 1"),
        ({"engram": {"layer_ids": [0, 9]}}, r"engram.layer_ids: got \[9\], expected 0..1: backbone.num_hidden_layers is 2"),
    ],
)
def test_impossible_runs_are_refused_too(tmp_path, change, words):
    fields = {**yaml.safe_load((RECIPES / "train_tiny.yaml").read_text()), **change}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(fields))
    with pytest.raises(ConfigError, match=words):
        read_point(tmp_path / "run.yaml")


def test_errors_of_the_library_are_not_put_down_to_the_recipe(monkeypatch):
    def broken(self):
        return [].nothing

    monkeypatch.setattr(PointRecipe, "solved", broken)
    for read, recipe in ((read_point, RECIPES / "train_tiny.yaml"), (read_sweep, TINY)):
        with pytest.raises(AttributeError, match="nothing"):
            read(recipe)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"data": None}, "base.data: got None, expected a mapping"),
        ({"data": {"seq_len": "long"}}, "base.data.seq_len: got 'long'"),
        ({"data": {"vocab_size": "many"}}, "vocab_size"),
        ({"backbone": "deepseek_v3"}, "base.backbone: got 'deepseek_v3', expected a mapping"),
        ({"backbone": None}, "base.backbone: got None"),
        ({"engram": {"layer_ids": 1}}, "layer_ids: got 1"),
        ({"engram": None}, "'engram' mapping"),
    ],
)
def test_impossible_bases_are_refused(tmp_path, change, words):
    fields = yaml.safe_load(TINY.read_text())
    fields["base"] |= change
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(fields))
    with pytest.raises(ConfigError, match=words):
        read_base(tmp_path / "sweep.yaml")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rho": {"1.0": {}, "0.6": {"budget.rho": 0.6, "data.seq_len": 16}}}, "changes 'data', which all points share"),
        ({"rho": {"1.0": {"seed": 3}}}, "got 'seed', expected it in the sweep's 'seeds'"),
    ],
)
def test_variants_share_their_text_and_have_no_seeds_of_their_own(tmp_path, change, words):
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump({**yaml.safe_load(TINY.read_text()), "variants": change, "tune": None}))
    with pytest.raises(ConfigError, match=words):
        read_sweep(tmp_path / "sweep.yaml")
    with pytest.raises(ConfigError, match="--set: got 'seed'"):
        read_sweep(TINY, {"seed": 3})


def test_seeds_are_those_that_all_generators_take():
    with pytest.raises(ConfigError, match=r"PointRecipe.seed: got 4294967296, expected .* below 2\*\*32"):
        dataclasses.replace(first_point(tiny()), seed=1 << 32)
    with pytest.raises(ConfigError, match=r"sweep.seeds: .* below 2\*\*32"):
        dataclasses.replace(tiny(), seeds=(1 << 32,))


def test_what_a_recipe_lacks_is_named(tmp_path):
    for fields, words in (
        ({"tokens": 1000}, "missing key"),
        ({"question": "slots"}, "missing key.* name, .*variants"),
    ):
        (tmp_path / "lacking.yaml").write_text(yaml.safe_dump(fields))
        with pytest.raises(ConfigError, match=words):
            (read_sweep if "question" in fields else read_point)(tmp_path / "lacking.yaml")


def test_numbers_may_be_written_without_a_point(tmp_path):
    text = (RECIPES / "train_tiny.yaml").read_text()
    (tmp_path / "run.yaml").write_text(text.replace("../corpus", str(RECIPES.parent / "corpus")) + "\nlearning_rate: 1e-3\n")
    assert read_point(tmp_path / "run.yaml").learning_rate == 1e-3


def test_measuring_takes_nothing_from_the_tokens_per_second_of_a_point(monkeypatch):
    measured, recipe = Paused({"loss": 3.0}), first_point(tiny())
    monkeypatch.setattr(point_module, "measure", measured)
    curve = point_module._Curve(recipe, SimpleNamespace(held_out={"validation": None}))
    curve.trainer = SimpleNamespace(throughput=measured.throughput, log=lambda logs: None)
    curve.on_step_end(None, SimpleNamespace(global_step=curve.every), SimpleNamespace(should_log=False))
    assert measured.seen == [True]


@pytest.mark.parametrize("due", [True, False])
def test_a_training_loss_that_is_due_is_told_after_a_measurement_too(monkeypatch, due):
    monkeypatch.setattr(point_module, "measure", Paused({"loss": 3.0}))
    curve = point_module._Curve(first_point(tiny()), SimpleNamespace(held_out={"validation": None}))
    control, throughput = SimpleNamespace(should_log=due), point_module.measure.throughput
    curve.trainer = SimpleNamespace(throughput=throughput, log=lambda logs: setattr(control, "should_log", False))
    curve.on_step_end(None, SimpleNamespace(global_step=curve.every), control)
    assert control.should_log == due


def test_a_missing_corpus_is_one_clear_error(tmp_path):
    fields = yaml.safe_load(TINY.read_text())
    fields["base"]["data"]["corpus"]["texts"] = ["nothing/*.txt"]
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(fields))
    with pytest.raises(DataError, match="no file matches"):
        run_sweep(read_sweep(tmp_path / "sweep.yaml"), tmp_path, tmp_path / "out", show=lambda line: None)


def test_a_folder_of_another_point_is_refused(tmp_path):
    recipe = first_point(tiny())
    (tmp_path / "recipe.json").write_text("{}")
    data = SimpleNamespace(store=SimpleNamespace(fingerprint="0"))
    with pytest.raises(CheckpointError, match=r"another recipe; nothing was trained there yet: delete .*recipe.json"):
        run_point(recipe, data, tmp_path)
    assert (tmp_path / "recipe.json").read_text() == "{}"
    for damaged in ('{"identity": ', "[]", "[" * 100_000):
        (tmp_path / "recipe.json").write_text(damaged)
        with pytest.raises(
            CheckpointError, match=r"recipe.json is damaged, .*nothing was trained there yet: delete .*recipe.json"
        ):
            run_point(recipe, data, tmp_path)


def test_a_finished_point_is_not_taken_for_one_on_other_text(tmp_path):
    recipe = first_point(tiny())
    claim = {"identity": recipe.identity(), "text": "1", "recipe": {}}
    (tmp_path / "recipe.json").write_text(json.dumps(claim))
    (tmp_path / "result.json").write_text("{}")
    with pytest.raises(CheckpointError, match="other text"):
        run_point(recipe, SimpleNamespace(store=SimpleNamespace(fingerprint="2")), tmp_path)
    assert run_point(recipe, SimpleNamespace(store=SimpleNamespace(fingerprint="1")), tmp_path) == {}


def test_a_full_disk_ends_the_sweep(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 0))
    with pytest.raises(CheckpointError, match="free on this disk"):
        run_sweep(tiny(), RECIPES, tmp_path)


def test_the_identity_of_a_point_leaves_out_defaults_and_what_has_no_effect():
    base = first_point(tiny())
    changes = ({"save_steps": 7}, {"keep_model": True}, {"keep_checkpoints": True}, {"warmup_share": 0.05})
    same = [first_point(tiny(**change)) for change in changes]
    others = [first_point(tiny(**{key: 3072})) for key in ("tokens", "data.held_out_tokens")]
    others.append(first_point(tiny(**{"engram.use_conv": False})))
    identity = json.dumps(base.identity())
    assert [json.dumps(recipe.identity()) for recipe in same] == [identity] * len(changes)
    assert len({json.dumps(recipe.identity()) for recipe in [base, *others]}) == 4
    assert "use_conv" not in identity  # at its default


def test_defaults_that_no_identity_holds_stay_as_they_were():
    """Change one, and points made with the old would pass for points of the new: leave it, or write the old value into every recipe."""
    kinds = (BackboneConfig, EngramConfig, DataRecipe, BudgetRecipe)
    defaults = [{f.name: f.default for f in dataclasses.fields(kind) if f.default is not dataclasses.MISSING} for kind in kinds]
    defaults[1] = {name: getattr(EngramConfig(), name) for name in defaults[1]}  # some of its fields are written out
    digest = hashlib.sha256(json.dumps(defaults, sort_keys=True).encode()).hexdigest()[:16]
    assert digest == "4bd9e46fce9231b7", defaults


@pytest.mark.slow
def test_a_point_that_cannot_be_written_ends_the_sweep(finished, tmp_path):
    """Whatever the place of the first checkpoint is taken by: the points that follow would meet the same."""
    out, _, _ = finished
    shutil.copytree(out / "data", tmp_path / "data")
    sweep = tiny()
    first = next(iter(sweep.tuning_points().values()))[0]
    folder = tmp_path / "tuning" / f"{first.name}-{first.digest[:6]}"
    folder.mkdir(parents=True)
    (folder / "checkpoints").write_text("in the way")
    with pytest.raises(CheckpointError):
        run_sweep(sweep, RECIPES, tmp_path, show=lambda line: None)
    assert not (folder / "result.json").exists()
    assert not (tmp_path / "points").exists()


def test_names_of_points_are_names_of_folders():
    sweep = tiny()
    names = [point.name for points in sweep.tuning_points().values() for point in points]
    names += [point.name for point in sweep.points({})]
    assert len(set(names)) == len(names) == 6
    assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789=.,+-_") for name in names)


@pytest.mark.parametrize(("bf16", "cuda", "told"), [(True, False, True), (False, False, False), (True, True, False)])
def test_a_sweep_says_what_slows_it(tmp_path, monkeypatch, bf16, cuda, told):
    said = []
    monkeypatch.setattr(sweep_module, "warning_of_slow_bfloat16", lambda what: f"slow; set {what}")
    monkeypatch.setattr(sweep_module.torch.cuda, "is_available", lambda: cuda)
    sweep = tiny(bf16=bf16)
    run = sweep_module.SweepRun(sweep, RECIPES, tmp_path, {}, 1, 1, said.append, lambda result: None, False)
    run._tell_of_slow_types(sweep.points({}))
    assert [line.startswith("slow; set bf16: false") for line in said] == [True] * told
    run._tell_of_slow_types([])
    assert len(said) == told
