import json

import pytest

from engram import ConfigError, DataError, Fact
from engram.evaluation import bits_per_byte, evaluate_memory, markdown_table, measure_copying, measure_drift, wilson_interval
from engram.evaluation.result import _gates, _known, _quiet_text
from engram.plots import plot_capacity, plot_evaluation, plot_gates, plot_shares
from engram.testing import tiny_memory, tiny_model, tiny_tokenizer
from tests.editing.helpers import FACTS, make_editor

TEXTS = {"prose": ["The memory is addressed by the last tokens.", "the text"], "taught": ["KEY:beta 20 7319"]}


@pytest.fixture(scope="module")
def result():
    editor = make_editor()
    editor.teach(FACTS)
    known = [Fact(("KEY:nobody",), "nothing")]
    return evaluate_memory(editor.memory, editor.tokenizer, FACTS, TEXTS, ["some text to predict"], known).to_dict()


def test_one_result_says_it_all(result):
    assert result["recall"] == 1.0
    assert result["recall_held_out"] == 0.0
    assert result["categories"]["colour"]["prompts"] == 3
    assert result["categories"]["colour"]["high"] == 1.0
    assert 0 < result["categories"]["colour"]["low"] < 1
    assert result["harm"]["prose"] == {
        "tokens": result["harm"]["prose"]["tokens"],
        "mean_kl": 0.0,
        "tokens_changed": 0,
        "untouched": 1.0,
    }
    assert result["harm"]["taught"]["mean_kl"] > 0
    harm = result["harm"].values()
    assert result["kl_to_base"] == pytest.approx(sum(h["mean_kl"] * h["tokens"] for h in harm) / sum(h["tokens"] for h in harm))
    assert result["kl_to_base"] > 0
    assert result["bits_per_byte"]["base"] == result["bits_per_byte"]["memory"]
    assert result["known"] == {"prompts": 1, "known": 0, "still_right": 0, "changed": 0}
    assert result["latency"]["ratio"] > 0
    assert result["bytes"]["rows"] > 1000
    assert sum(result["gates"]["taught"][1:]) > 0
    assert [f["exact"] for f in result["facts"]] == [True] * 4 + [False]
    assert result["facts"][-1]["held_out"]
    assert json.loads(json.dumps(result)) == result


class Nobody:
    """A router that lets no prompt read the memory."""

    threshold = 0.5

    def scores(self, prompts):
        return [0.0] * len(prompts)


def test_a_router_decides_about_texts_as_it_does_about_prompts(result):
    editor = make_editor()
    editor.teach(FACTS)
    taught = ["KEY:beta 20 7319"]
    read = evaluate_memory(editor.memory, editor.tokenizer, FACTS[:1], {"taught": taught}, taught).to_dict()
    assert read["bits_per_byte"]["base"] != read["bits_per_byte"]["memory"]
    routed = evaluate_memory(editor.memory, editor.tokenizer, FACTS[:1], {"taught": taught}, taught, router=Nobody()).to_dict()
    assert routed["recall"] == 0
    assert routed["harm"]["taught"] == {**read["harm"]["taught"], "mean_kl": 0.0, "tokens_changed": 0, "untouched": 1.0}
    assert routed["bits_per_byte"] == {"base": read["bits_per_byte"]["base"], "memory": read["bits_per_byte"]["base"]}
    for name, gates in routed["gates"].items():
        assert gates == [sum(read["gates"][name]), *[0] * (len(gates) - 1)] or name == "taught"  # answers differ in length
        assert sum(gates[1:]) == 0


def test_the_time_of_a_token_is_taken_where_nothing_was_taught():
    editor = make_editor()
    editor.teach(FACTS)
    assert _quiet_text(editor.memory, editor.tokenizer, {"a": ["KEY:beta 20 7319"], "b": ["the text"]}) == "the text"
    assert _quiet_text(editor.memory, editor.tokenizer, {"a": ["KEY:beta 20 7319"]}) == "KEY:beta 20 7319"


def test_no_facts_are_one_clear_error():
    editor = make_editor()
    with pytest.raises(DataError, match="got no facts"):
        evaluate_memory(editor.memory, editor.tokenizer, [], TEXTS)


def test_long_texts_are_cut_to_what_the_model_takes():
    memory, tokenizer = tiny_memory(tiny_model("gpt2", n_positions=16)).eval(), tiny_tokenizer()
    long = "the text of the memory " * 20
    assert measure_drift(memory, tokenizer, [long]).tokens == 16
    assert bits_per_byte(memory, tokenizer, [long]) > 0
    with pytest.raises(DataError, match="2 texts without a byte"):
        bits_per_byte(memory, tokenizer, ["", ""])
    with pytest.raises(ConfigError, match="expected at most 8: the model has 16 positions"):
        measure_copying(memory)


def test_tables_and_pictures(result, tmp_path):
    table = markdown_table(result)
    assert "| colour | 3 | 100.0 % |" in table
    assert "0.0 % of 1" in table
    assert "| prose: next tokens changed | 0 of" in table
    paths = plot_evaluation({"one": result, "two": result}, tmp_path)
    paths.append(plot_capacity([{"facts": 10, "rows_per_head": 100, "recall": 1.0, "kl": 0.0}], tmp_path / "c.png"))
    paths.append(plot_shares({"a": {"x": {"share": 0.5, "low": 0.4, "high": 0.6}}}, tmp_path / "s.png", "title"))
    paths.append(plot_gates({"a": {"taught": [1, 2], "untaught": [3, 0]}}, tmp_path / "g.png"))
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


def test_wilsons_interval():
    """Values of the score interval worked out by hand for 95 %."""
    assert wilson_interval(0, 0) == (0.0, 1.0)
    low, high = wilson_interval(8, 10)
    assert (round(low, 4), round(high, 4)) == (0.4902, 0.9433)
    assert wilson_interval(10, 10)[1] == pytest.approx(1.0)
    assert wilson_interval(0, 10)[0] == pytest.approx(0.0)


def test_known_answers_are_those_of_the_model_alone():
    editor = make_editor()
    editor.teach(FACTS)
    taught = [
        Fact((FACTS[0].prompts[0],), FACTS[0].answer),
        Fact((FACTS[0].prompts[0],), "something else"),
        Fact(("KEY:nobody",), "nothing"),
    ]
    expected = {"prompts": 3, "known": 0, "still_right": 0, "changed": 2}
    assert _known(editor.memory, editor.tokenizer, taught, None) == expected
    with editor.memory.disable_engram():
        assert _known(editor.memory, editor.tokenizer, taught, Nobody()) == {**expected, "changed": 0}


def test_gates_that_nobody_reads_are_counted_for_every_layer():
    memory, texts = tiny_memory(), {"prose": ["The memory is addressed by the last tokens.", "the text"]}
    assert len(memory.engrams) > 1
    read, bypassed = (_gates(memory, tiny_tokenizer(), [], texts, router)["untaught"] for router in (None, Nobody()))
    assert sum(read) == sum(bypassed) == bypassed[0] > 0
