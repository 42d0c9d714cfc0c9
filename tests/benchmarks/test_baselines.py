import json

import pytest
import torch

from engram import Fact, load_bundled, load_facts

FACTS = [
    Fact(("PORT:ssh", "Which port does ssh use?"), "22", "port", ("Tell me the port of ssh, please:",)),
    Fact(("PORT:smtp", "Which port does smtp use?"), "25", "port", ("And by the way: Which port does smtp use?",)),
]


@pytest.fixture(scope="module")
def bundled():
    return load_bundled()


@pytest.fixture
def baselines(call):
    return call("baselines")


def read(path):
    return json.loads(path.read_text())


def dictionary(baselines, bundled, facts, shortest):
    model, tokenizer = bundled
    base = baselines.Model(tokenizer, lambda: baselines.nullcontext(model))
    return base, baselines.SuffixDictionary(tokenizer, facts, shortest, base)


def test_a_dictionary_answers_by_the_longest_end_that_fits_and_leaves_the_rest_to_the_base(baselines, bundled):
    base, ends = dictionary(baselines, bundled, FACTS, 5)
    assert [answer.said for answer in ends.answers(FACTS)] == ["22", "22", "25", "25"]
    own, said = base.answers(FACTS, held_out=True), ends.answers(FACTS, held_out=True)
    assert [answer.said for answer in said] == [own[0].said, "25"]  # the second one ends in a taught prompt
    assert ends.bytes == len(json.dumps([[*key, answer] for key, answer in ends.answer_of.items()], separators=(",", ":")))


def test_ends_are_as_short_as_they_can_be_told_apart(baselines, bundled):
    tokenizer = bundled[1]
    _, ends = dictionary(baselines, bundled, FACTS, 1)
    prompts = [tuple(baselines.tokenize_prompt(tokenizer, prompt)) for fact in FACTS for prompt in fact.prompts]
    for ids in prompts:
        key = max((end for end in ends.answer_of if ids[-len(end) :] == end), key=len)
        others = [other for other in prompts if ends.find(other) != ends.find(ids)]
        assert not any(other[-len(key) :] == key for other in others)
        assert len(key) == 1 or any(other[1 - len(key) :] == key[1:] for other in others)


def test_a_prompt_that_ends_another_one_is_a_key_as_a_whole(baselines, bundled):
    facts = [Fact(("the port of ssh",), "22"), Fact(("not the port of ssh",), "23"), Fact(("neither the port of ssh",), "24")]
    _, ends = dictionary(baselines, bundled, facts, 2)
    assert [answer.said for answer in ends.answers(facts)] == ["22", "23", "24"]


def test_a_dictionary_changes_a_text_only_where_an_end_fits(baselines, bundled):
    base, ends = dictionary(baselines, bundled, FACTS, 5)
    found = baselines.harm(ends, base, ["Some text that has nothing to do with it."])
    assert (found["kl"], found["tokens_changed"], found["untouched"]) == (0.0, 0, 1.0)
    text = "Well. Which port does ssh use? Some text."
    with torch.no_grad():
        spoke = (ends.read(text) != base.read(text)).any(1)
    assert int(spoke.sum()) == 1
    assert 0 < baselines.harm(ends, base, [text])["kl"] < 100


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft asks for it
def test_training_stops_once_all_is_exact(baselines, bundled, monkeypatch):
    monkeypatch.setattr(baselines, "BATCH", 4)
    base, tokenizer = bundled
    work = baselines.Task(60, True)
    for name, lr, replay in (("full fine-tuning", 1e-3, True), ("LoRA", 3e-3, False)):
        part = {"seed": 0, "lr": lr, "replay": replay}
        model, took = baselines.trained(base, tokenizer, name, FACTS, part, 40, work)
        assert took["stopped_exact"]
        assert took["epochs"] < 40
        assert took["loss_last_epoch"] < took["loss_first_epoch"]
        assert all(
            answer.exact for answer in baselines.Model(tokenizer, lambda m=model: baselines.nullcontext(m)).answers(FACTS)
        )


def test_batches_hold_every_row_once(baselines, bundled):
    facts = load_facts(baselines.BUNDLED / "facts.yaml")
    rows = [row for i, fact in enumerate(facts) for row in baselines.encode_fact(bundled[1], fact, i)]
    found = baselines.batches(rows, torch.Generator().manual_seed(0))
    assert len(found) == baselines.steps_of(len(rows))
    assert sorted(row.ids for batch in found for row in batch) == sorted(row.ids for row in rows)


def test_replay_is_the_training_text_in_a_seeded_order(baselines, bundled):
    work = baselines.Task(60, True)
    one, same, other = (work.replay(bundled[1], 70, seed) for seed in (0, 0, 1))
    assert one.shape == (70, baselines.REPLAYED)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_texts_to_choose_by_are_not_those_reported(baselines):
    work = baselines.Task(1, False)
    assert len(work.texts) == len(work.dev_texts) == 100
    assert not set(work.texts) & set(work.dev_texts)
    assert not {f.id for f in work.capitals} & {f.id for f in work.dev_capitals}


class Measured:
    """Stands for ``measure``: recall and harm by setting, and an end after so many parts."""

    def __init__(self, stop=None):
        self.calls, self.stop = [], stop

    def __call__(self, part, every, quick, epochs):
        if len(self.calls) == self.stop:
            raise KeyboardInterrupt
        self.calls.append((part["system"], part["seed"], part.get("lr"), part.get("replay")))
        lr = part.get("lr", 0)
        exact = 9 if lr == 3e-4 and part["system"] == "LoRA" else 10
        share = {"port": {"prompts": 10, "exact": exact}}
        found = {"categories": share, "categories_held_out": share, "capitals": {"known": 4, "still_right": 3}}
        found |= {"harm": {"kl": 1.0}, "seconds": 2.0, "cpu_seconds": 1.0}
        if lr:
            found["dev"] = {"harm": {"kl": lr - 1e-5 * part["replay"]}}
            found |= {"epochs": 7, "loss_first_epoch": 5.0, "loss_last_epoch": 0.1, "bytes": 1}
        return {**part, **found}


def test_parts_are_kept_and_the_setting_is_chosen_among_the_exact_ones(call, tmp_path):
    out = tmp_path / "r.json"
    out.write_text(json.dumps({"runs": ["of before settings were tried"]}))
    first = Measured(stop=10)
    with pytest.raises(KeyboardInterrupt):
        call("baselines", "--seeds", 0, 1, "--out", out, measure=first)
    assert read(out)["runs"] == ["of before settings were tried"]
    assert len(read(tmp_path / "r.json.partial")["settings"]) == 10
    second = Measured()
    call("baselines", "--seeds", 0, 1, "--out", out, measure=second)
    result = read(out)
    assert not (tmp_path / "r.json.partial").exists()
    assert not set(first.calls) & set(second.calls)
    assert len(result["settings"]) == 12
    assert {part["seed"] for part in result["settings"]} == {0}
    assert result["command"] == f"python benchmarks/baselines.py --seeds 0 1 --out {out}"
    for run in result["runs"]:
        assert list(run["systems"]) == list(call("baselines").ORDER)
        chosen = {name: (run["systems"][name]["lr"], run["systems"][name]["replay"]) for name in ("full fine-tuning", "LoRA")}
        assert chosen == {"full fine-tuning": (1e-4, True), "LoRA": (1e-3, True)}  # 3e-4 harms less, but is not exact
    third = Measured()
    call("baselines", "--seeds", 0, 1, 5, "--out", out, measure=third)
    assert {seed for _, seed, _, _ in third.calls} == {5}
    assert len(third.calls) == 7
    assert read(out)["seed"] == [0, 1, 5]
    assert read(out)["runs"][:2] == result["runs"]


def test_results_of_another_protocol_are_not_gone_on_with(call, tmp_path):
    out = tmp_path / "r.json"
    call("baselines", "--seeds", 0, "--out", out, measure=Measured())
    with pytest.raises(SystemExit, match="was made with"):
        call("baselines", "--seeds", 0, "--epochs", 2, "--out", out, measure=Measured())


def test_the_table_says_which_setting_is_shown(call, tmp_path, monkeypatch):
    out, tables = tmp_path / "r.json", call("readme_tables")
    call("baselines", "--seeds", 0, 1, "--out", out, measure=Measured())
    monkeypatch.setattr(tables, "load", lambda name: read(out))
    text = tables.baselines()
    assert "| suffix dictionary | 10 | 0 |" in text
    assert "full fine-tuning 0.0001 with replay, 7 epochs; LoRA 0.001 with replay, 7 epochs" in text
    assert "time of the processor" in text
