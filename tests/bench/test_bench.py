import dataclasses
import json

import pytest

from engram import ConfigError
from engram.bench import BENCHMARKS, Benchmark, Setting, run_benchmark, run_benchmarks, take_turns
from engram.errors import BenchError
from engram.plots import ResultFile, draw_result, plot_bench, plot_steps


def setting(**changes):
    fields = {
        "label": "one",
        "calls": {"a": lambda: None, "b": lambda: None},
        "baseline": "a",
        "amount": 10,
        "verify": lambda: None,
    }
    return Setting(**{**fields, **changes})


def test_nothing_wrong_is_timed():
    called = []
    wrong = setting(calls={"a": lambda: called.append(1)}, verify=lambda: "a gives other rows")
    with pytest.raises(BenchError, match="a gives other rows"):
        run_benchmark("x", Benchmark("t", "rows", lambda quick: iter([wrong])), 3, True)
    assert not called


def test_alternatives_take_turns_and_the_first_round_is_thrown_away():
    order = []
    calls = {name: (lambda name=name: order.append(name)) for name in "abc"}
    seconds = take_turns(setting(calls=calls, before=lambda: order.append("-")), 2)
    assert {name: len(times) for name, times in seconds.items()} == {"a": 2, "b": 2, "c": 2}
    rounds = ["".join(order).replace("-", "")[3 * i : 3 * i + 3] for i in range(3)]
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds)
    assert "".join(order).count("-") == 9


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_finds_its_alternatives_equal(name):
    for each in BENCHMARKS[name].settings(True):
        assert each.verify() is None
        assert each.baseline in each.calls


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_gate_turns_red_when_something_is_wrong(name, monkeypatch):
    from engram.bench import gather, hashing, layer, tiers

    def off_by_one(lookup):
        return lambda *args: lookup(*args) + 1

    monkeypatch.setattr(gather, "lookup_rows", off_by_one(gather.lookup_rows))
    monkeypatch.setattr(gather.RowFormat, "read", off_by_one(gather.RowFormat.read))
    monkeypatch.setattr(hashing.NgramHashMapping, "hash_plain", lambda *_: {1: 0, 15: 0})
    monkeypatch.setattr(layer.Engram, "_read_few", lambda self, streams, *_: streams)
    for table in (tiers.DeviceTable, tiers.MmapTable):
        monkeypatch.setattr(table, "lookup", off_by_one(table.lookup))
    settings = list(BENCHMARKS[name].settings(True))
    # One token has a way of its own.
    assert all(each.verify() is not None for each in (settings[:1] if name == "layer" else settings))


def test_the_result_is_json_and_can_be_drawn(tmp_path):
    seen = []
    result = run_benchmarks(["hash", "layer"], 2, True, lambda name, entry: seen.append(name))
    again = json.loads(json.dumps(result))
    assert again["hardware"]
    assert again["versions"]["torch"]
    hashed = again["benchmarks"]["hash"]["settings"]
    assert [entry["amount"] for entry in hashed] == [1, 64, 2048]
    assert hashed[0]["variants"]["NumPy, as the demo"]["speedup"]["median"] == 1
    assert seen == ["hash"] * 3 + ["layer"] * 2
    assert all(path.stat().st_size > 1000 for path in plot_bench(again, tmp_path))
    drawn = draw_result(ResultFile("another_machine", "bench", again), tmp_path)  # beside those, not over them
    assert [picture.path.name for picture in drawn] == ["another_machine_hash.png", "another_machine_layer.png"]


def test_unknown_names_are_refused():
    with pytest.raises(ConfigError, match="expected some of hash"):
        run_benchmarks(["hahs"], 1, True)


def test_settings_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        setting().label = "other"


def test_steps_can_be_drawn(tmp_path):
    seconds = {"median": 1.0, "min": 0.9, "max": 1.2}
    entries = [{"kind": "sparse", "rows_per_layer": rows, "seconds": seconds} for rows in (100, 1000)]
    assert plot_steps(entries, {"sparse": "row-sparse Adam"}, tmp_path / "s.png").stat().st_size > 1000
