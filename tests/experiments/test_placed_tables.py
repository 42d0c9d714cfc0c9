"""`engram train` with the memory's rows elsewhere than on the model's device."""

import dataclasses
from pathlib import Path

import pytest
from transformers import TrainerCallback

from engram import CheckpointError, ConfigError, EngramAdamW, TableConfig
from engram.checkpoint import sole_writer
from engram.experiments import BackboneConfig, read_point, read_sweep, run_point
from engram.experiments.data import prepare_data
from tests.cli.test_cli import invoke

RECIPES = Path(__file__).parents[2] / "recipes"
TINY = read_point(RECIPES / "train_tiny.yaml")
PLACES = {"host": {}, "mmap": {"resident_bytes": 1 << 20}, "hybrid": {"hot_rows": 20}}


def placed(tier, **changes):
    return dataclasses.replace(TINY, table=TableConfig(tier=tier, **{**PLACES[tier], **changes}), save_steps=4)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return prepare_data(TINY.data, RECIPES, tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def on_device(text, tmp_path_factory):
    return run_point(TINY, text, tmp_path_factory.mktemp("device"))


def losses(result):
    return result["training_loss"], result["curve"], result["held_out"]


@pytest.mark.parametrize("tier", PLACES)
def test_rows_elsewhere_give_the_same_run(tier, text, on_device, tmp_path):
    assert losses(run_point(placed(tier), text, tmp_path / "run")) == losses(on_device)
    assert sorted(file.name for file in (tmp_path / "run").iterdir()) == ["recipe.json", "result.json"]


@pytest.mark.parametrize("kept", [False, True])
def test_checkpoints_stay_where_the_recipe_says_so(kept, text, tmp_path):
    recipe = dataclasses.replace(TINY, save_steps=4, tokens=1024, keep_checkpoints=kept)
    result = run_point(recipe, text, tmp_path)
    assert run_point(recipe, text, tmp_path) == result  # finished: read back
    found = sorted(folder.name for folder in tmp_path.glob("checkpoints/*"))
    assert found == (["checkpoint-4", "checkpoint-8"] if kept else [])


class _Stop(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            raise RuntimeError("the light went out")


@pytest.mark.parametrize("step", [2, 7])  # before the first checkpoint and after it, when the files are ahead of it
def test_a_run_over_row_files_that_was_stopped_goes_on_exactly(step, text, on_device, tmp_path):
    with pytest.raises(RuntimeError, match="the light went out"):
        run_point(placed("mmap"), text, tmp_path, [_Stop(step)])
    assert (tmp_path / "rows").is_dir()
    assert losses(run_point(placed("mmap"), text, tmp_path)) == losses(on_device)


def test_rows_in_half_the_bytes_are_trained_and_kept_so(text, tmp_path, monkeypatch):
    seen = []

    def recorded(*args, row_state, stochastic_rounding, **others):
        seen.append({"row_state": row_state, "stochastic_rounding": stochastic_rounding})
        return EngramAdamW(*args, row_state=row_state, stochastic_rounding=stochastic_rounding, **others)

    monkeypatch.setattr("engram.training.trainer.EngramAdamW", recorded)
    options = {
        "keep_model": True,
        "table_row_state": "rowwise_adagrad",
        "table_stochastic_rounding": True,
        "optimizer": "adamw",
    }
    run_point(dataclasses.replace(placed("mmap", dtype="bfloat16"), **options), text, tmp_path)
    assert seen == [{"row_state": "rowwise_adagrad", "stochastic_rounding": True}]
    assert '"table_dtype": "bfloat16"' in (tmp_path / "memory" / "engram.json").read_text()


def test_another_run_in_the_folder_keeps_its_rows(text, tmp_path):
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "layer-1.rows").write_text("a day's work")
    (tmp_path / "recipe.json").write_text('{"identity": "another"}')
    changes = {"model": "bundled", "backbone": BackboneConfig(), "train_backbone": False, "optimizer": "adamw"}
    on_bundled = dataclasses.replace(placed("mmap"), **changes)
    for recipe in (placed("mmap"), on_bundled):
        with pytest.raises(CheckpointError, match="holds a run of another recipe"):
            run_point(recipe, text, tmp_path)
    assert (tmp_path / "rows" / "layer-1.rows").read_text() == "a day's work"


def test_the_type_of_rows_is_part_of_what_a_run_is_and_their_place_is_not():
    assert placed("mmap").identity() == placed("hybrid").identity() == TINY.identity()
    assert placed("host", dtype="float16").identity()["table"] == {"dtype": "float16"}
    assert placed("hybrid").to_dict()["table"] == {"tier": "hybrid", "hot_rows": 20}


@pytest.mark.parametrize("name", ["sweep_tiny", "sweep_ablation"])
def test_arms_of_a_sweep_that_have_no_memory_do_without(name):
    table = {"tier": "host", "dtype": "float16"}
    sweep = read_sweep(RECIPES / f"{name}.yaml", {"table": table})
    assert any(point.recipe.solved().engram is None for point in sweep.points({}))
    assert all(point.recipe.table == TableConfig(**table) for point in sweep.points({}))


def test_two_runs_in_one_folder_do_not_meet(text, tmp_path, monkeypatch, capsys):
    with sole_writer(tmp_path / "run", "training there"):
        code, _, err = invoke(monkeypatch, capsys, "train", RECIPES / "train_tiny.yaml", "--out", tmp_path / "run")
    assert (code, "another process is training in" in err) == (1, True)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("{tier: mmap, path: here}", "table: got {'path': 'here'"),
        ("{tier: mmap, files: {1: [rows, [0]]}}", "unknown key.*files"),
        ("{dtype: int8}", "table.dtype: got 'int8', expected one of float32, bfloat16, float16"),
        ("{tier: cloud}", "tier: got 'cloud'"),
        ("{shelf: 3}", "unknown key"),
        ("mmap", "got 'mmap', expected a mapping"),
        ("{tier: host}\ntable_row_state: diary", "table_row_state: got 'diary', expected one of adam"),
        ("{tier: host}\ntable_stochastic_rounding: 1.5", "table_stochastic_rounding: got"),
    ],
)
def test_places_that_cannot_be_trained_are_refused(table, message, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text((RECIPES / "train_tiny.yaml").read_text() + f"table: {table}\n")
    with pytest.raises(ConfigError, match=message):
        read_point(recipe)
