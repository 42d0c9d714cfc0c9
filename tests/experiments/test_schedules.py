"""Learning rates of recipes."""

import dataclasses
import itertools
from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from engram import ConfigError
from engram.experiments import prepare_data, read_point, run_point
from engram.experiments.point import _schedule

RECIPES = Path(__file__).parents[2] / "recipes"


def recipe(**changes):
    return read_point(RECIPES / "train_tiny.yaml", {"tokens": 2560, "batch_size": 4, "data.seq_len": 32, **changes})  # 20 steps


def shares(tmp_path, point):
    """The learning rate of each step, as a share of the recipe's."""
    arguments = TrainingArguments(str(tmp_path), learning_rate=point.learning_rate, max_steps=point.steps, **_schedule(point))
    trainer = Trainer(torch.nn.Linear(1, 1), arguments)
    trainer.create_optimizer_and_scheduler(point.steps)
    rates = []
    for _ in range(point.steps + 1):
        rates.append(trainer.lr_scheduler.get_last_lr()[0] / point.learning_rate)
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    return rates


@pytest.mark.parametrize("kind", ["cosine", "constant", "linear", "wsd"])
def test_rates_rise_and_end_where_the_recipe_says(tmp_path, kind):
    changes = {
        "lr_scheduler": kind,
        "warmup_share": 0.1,
        "min_lr_ratio": 0.2,
        **({"decay_share": 0.5} if kind == "wsd" else {}),
    }
    found = shares(tmp_path, recipe(**changes))
    assert found[0] < found[2] == 1
    assert found[-1] == pytest.approx(1 if kind == "constant" else 0.2)
    middle = {"cosine": (0.6, 0.9), "constant": (1, 1), "linear": (0.6, 0.65), "wsd": (1, 1)}[kind]
    assert middle[0] <= found[10] <= middle[1]
    steps = [a - b for a, b in itertools.pairwise(found[2:])]
    assert all(step >= -1e-9 for step in steps)
    if kind == "linear":
        assert max(steps) == pytest.approx(min(steps))


def test_without_a_schedule_rates_are_those_that_results_were_made_with():
    point = recipe()
    assert _schedule(point) == {
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": point.min_lr_ratio},
        "warmup_steps": round(point.warmup_share * point.steps),
    }
    assert point.identity() == recipe(lr_scheduler="cosine", decay_share=0.2).identity()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lr_scheduler": "step"}, "lr_scheduler: got 'step', expected one of cosine, constant, linear, wsd"),
        ({"lr_scheduler": ["wsd"]}, r"lr_scheduler: got \['wsd'\]"),
        ({"decay_share": 2}, "decay_share: got 2, expected 0 to 1"),
        ({"decay_share": 0.5}, "decay_share: got 0.5 with lr_scheduler .cosine., which has none, expected wsd"),
        ({"lr_scheduler": "wsd", "warmup_share": 0.5, "decay_share": 0.6}, "expected at most 1 together"),
    ],
)
def test_impossible_schedules_are_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        recipe(**changes)


@pytest.mark.parametrize("kind", ["constant", "linear", "wsd"])
def test_a_stopped_run_goes_on_at_the_rates_it_would_have_had(tmp_path, kind):
    point = dataclasses.replace(recipe(lr_scheduler=kind, decay_share=0.5 if kind == "wsd" else 0.2, tokens=1024), save_steps=3)
    data = prepare_data(point.data, RECIPES, tmp_path / "data")

    class StopInTheMiddle(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == 6:
                raise KeyboardInterrupt

    whole = run_point(point, data, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run_point(point, data, tmp_path / "stopped", [StopInTheMiddle()])
    resumed = run_point(point, data, tmp_path / "stopped")
    for name in ("held_out", "training_loss", "curve"):
        assert resumed[name] == whole[name]
