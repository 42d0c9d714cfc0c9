"""Which checkpoints benchmarks/copying.py pairs."""

import importlib
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def copying(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("copying")


def run(model, losses, seed=0):
    return [{"model": model, "seed": seed, "step": 10 * n, "held_out_loss": loss} for n, loss in enumerate(losses, start=1)]


def steps(pairs):
    return [(pair["seed"], pair["dense"]["step"], pair["engram"]["step"]) for pair in pairs]


def test_a_loss_is_smoothed_by_its_neighbours_and_ends_have_none(copying):
    found = copying.smoothed(reversed(run("dense", [4.0, 3.0, 3.5, 3.4, 3.9])))
    assert [(entry["step"], entry["held_out_loss"], entry["smoothed_loss"]) for entry in found] == [
        (20, 3.0, 3.5),
        (30, 3.5, 3.4),
        (40, 3.4, 3.5),
    ]
    assert copying.smoothed(run("dense", [4.0, 3.0])) == []


def test_the_latest_pair_that_is_equal_by_its_own_loss_and_smoothed_is_chosen(copying):
    dense = run("dense", [4.4, 4.2, 4.0, 3.9, 3.8])
    engram = run("engram", [4.4, 4.2, 4.0, 3.8, 3.6])
    (pair,) = copying.equal_pairs([*dense, *engram])
    assert (pair["dense"]["step"], pair["engram"]["step"]) == (30, 30)
    assert pair["dense"]["smoothed_loss"] == pair["engram"]["smoothed_loss"] == 4.0
    # 3.8 at the end of one run has no two neighbours, so that it is not known to be more than a swing.


def test_checkpoints_that_are_equal_by_a_swing_are_no_pair(copying):
    engram = run("engram", [4.2, 4.1, 4.0, 3.9, 3.8])
    swings = run("dense", [4.6, 4.5, 3.9, 4.4, 4.3])  # its third is as low as the other's fourth for once
    assert copying.equal_pairs([*swings, *engram]) == []
    level = run("dense", [4.1, 4.2, 3.9, 3.0, 3.9])  # equal to the other's fourth when smoothed, by a loss that is not
    assert steps(copying.equal_pairs([*level, *engram])) == [(0, 30, 40)]


def test_a_seed_without_a_pair_is_left_out_and_told(copying, capsys):
    losses = [4.2, 4.1, 4.0]
    entries = [*run("dense", losses), *run("engram", losses), *run("dense", losses, 1), *run("engram", [5.0, 5.0, 5.0], 1)]
    assert steps(copying.equal_pairs(entries)) == [(0, 20, 20)]
    assert "seed 1: no two checkpoints are within 0.01 nats" in capsys.readouterr().out
