import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from engram.training.tokenizer import train_tokenizer

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def read(path):
    return json.loads(path.read_text())


@pytest.mark.parametrize(
    "command",
    [
        "joint_training --quick",
        "joint_training --steps 5",
        "formats --quick",
        "throughput --quick",
        "decode --quick",
        "decode --tokens 200",
        "copying --quick",
        "looks --quick",
        "larger_models --quick",
        "larger_models --facts 3",
        "memory_off --quick",
        "memory_off --seeds 1000",
        "ngram_baseline --quick",
        "gpu --quick",
        "train_step --quick",
        "processes --quick",
        "own_tables --quick",
        "own_tables --gigabytes 1",
        "train_step --kinds sparse",
        "baselines --every 40",
        "baselines --epochs 1",
        "baselines --quick",
        "knowledge --limit 50",
        "routing --every 20",
        "stacked --every 60",
        "long_context --seeds 3",
        "long_context --plain a --joint b",
        "long_context --plain a --joint b --seeds 3 --equal-loss",
        "long_context --plain a b c --joint a b c --seeds 3",
        "long_context --scratch",
        "long_context --quick",
    ],
)
def test_trials_do_not_replace_the_quoted_results(call, command, capsys):
    with pytest.raises(SystemExit):
        call(*command.split())
    assert "--out FILE" in capsys.readouterr().err


def test_trials_go_where_they_are_told(call, tmp_path):
    out = tmp_path / "trial.json"
    call("routing", "--every", 20, "--seeds", 0, "--out", out, one_seed=lambda seed, every: {"every": every})
    assert read(out)["runs"] == [{"seed": 0, "systems": {"every": 20}}]


def test_a_result_is_written_as_those_that_are_there(call, tmp_path):
    there = BENCHMARKS.parent / "results" / "baselines.json"
    call("common").write(tmp_path / "new" / "r.json", read(there))
    assert (tmp_path / "new" / "r.json").read_bytes() == there.read_bytes()
    assert len(list((tmp_path / "new").iterdir())) == 1


def test_a_complete_result_stays_until_the_next_one_is_complete(call, tmp_path):
    write_so_far, out = call("common").write_so_far, tmp_path / "r.json"
    write_so_far(out, {"seed": [0, 1]}, True)
    write_so_far(out, {"seed": [0]}, False)
    assert read(out) == {"seed": [0, 1]}
    assert [path.name for path in tmp_path.glob("*.json")] == ["r.json"]
    assert read(tmp_path / "r.json.partial") == {"seed": [0]}
    write_so_far(out, {"seed": [0, 1, 2]}, True)
    assert read(out) == {"seed": [0, 1, 2]}
    assert list(tmp_path.iterdir()) == [out]


def test_seeds_of_several_calls_are_told_with_what_each_was_made_with(call, tmp_path):
    out, replaced = tmp_path / "r.json", {"one_seed": lambda seed, *_: {"of": seed}}
    call("routing", "--seeds", 2, "--out", out, **replaced)
    first = read(out)
    assert first["seed"] == [2]
    assert "made_with" not in first["runs"][0]
    call("routing", "--seeds", 0, 2, "--out", out, **replaced)
    both = read(out)
    assert list(both) == list(first)
    assert both["seed"] == [0, 2]
    assert both["command"] == "; ".join(f"python benchmarks/routing.py --seeds {seeds} --out {out}" for seeds in ("2", "0 2"))
    assert both["versions"] == first["versions"]
    assert [(run["seed"], run["systems"]) for run in both["runs"]] == [(2, {"of": 2}), (0, {"of": 0})]
    assert both["runs"][0]["made_with"] == {key: first[key] for key in ("command", "hardware", "versions")}
    call("routing", "--seeds", 0, 2, "--out", out, one_seed=None)
    assert read(out) == both


def test_results_from_before_keep_what_they_say(call, tmp_path):
    """The knowledge of the file as a whole goes to its entries when others join them."""
    out, there = tmp_path / "r.json", read(BENCHMARKS.parent / "results" / "routing.json")
    out.write_text(json.dumps({**there, "beside_other_work": True, "versions": {**there["versions"], "torch": "2.0"}}))
    call("routing", "--seeds", 3, "--out", out, one_seed=lambda *_: {})
    now = read(out)
    assert now["seed"] == [0, 1, 2, 3]
    assert now["beside_other_work"]
    assert now["versions"]["torch"].startswith("2.0; ")
    assert [run["made_with"]["versions"]["torch"] == "2.0" for run in now["runs"]] == [True] * 3 + [False]
    assert now["runs"][0]["systems"] == there["runs"][0]["systems"]


def test_points_stay_until_their_like_is_measured_again(call, tmp_path):
    def cut_short(seed, rows, counts, save):
        save([{"seed": seed, "facts": counts[0], "rows_per_head": rows, "tags": tags, "recall": 0.5} for tags in (True, False)])

    out, there = tmp_path / "r.json", read(BENCHMARKS.parent / "results" / "capacity.json")
    out.write_text(json.dumps(there))
    call("capacity", "--facts", 20_000, 300, "--rows", 1 << 31, "--out", out, one_size=cut_short)
    now = read(out)
    measured = [point for point in now["points"] if point["recall"] == 0.5]
    assert len(now["points"]) == len(there["points"]) == 20
    assert {(point["facts"], point["tags"]) for point in measured} == {(300, True), (300, False)}
    assert all(point["made_with"]["command"].endswith(f"--out {out}") for point in measured)
    call("capacity", "--facts", 20_000, "--rows", 1 << 31, "--out", out, one_size=cut_short)
    assert len(read(out)["points"]) == 22


def test_writers_at_the_same_time_lose_nothing(call, tmp_path):
    add_entries, out = call("common").add_entries, tmp_path / "r.json"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda seed: add_entries(out, "runs", [{"seed": seed}], "seed"), range(16)))
    assert read(out)["seed"] == list(range(16))


def test_a_table_larger_than_memory_without_a_limit_is_told_as_such(call, monkeypatch):
    tables = call("readme_tables")
    result = tables.load("larger_than_memory")
    assert "given 512 MB (control group)" in tables.larger_than_memory()
    for variant in result["variants"]:
        variant["memory_limit_bytes"] = None
    monkeypatch.setattr(tables, "load", lambda name: result)
    assert "in a process without a limit" in tables.larger_than_memory()


def test_runs_of_several_pairs_share_one_tokenizer(call, tmp_path):
    runs = [str(tmp_path / name) for name in "abc"]
    for run, text in zip(runs, ("one text", "one text", "another one entirely")):
        train_tokenizer([text], 270, 64).save_pretrained(f"{run}/model")
    shared_tokenizer = call("long_context").shared_tokenizer
    assert shared_tokenizer(runs[:2]).get_vocab()
    with pytest.raises(SystemExit, match=r"c: has another tokenizer than .*a; expected runs that share one"):
        shared_tokenizer(runs)
