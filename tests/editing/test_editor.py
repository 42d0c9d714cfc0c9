import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from engram import (
    AttachError,
    ConfigError,
    DataError,
    Fact,
    FingerprintError,
    MemoryEditor,
    TeachError,
    TeachSettings,
    get_engram_model,
    load_bundled,
    load_facts,
)
from engram.checkpoint import lock_store, read_description, read_ledger
from engram.editing import Ledger
from engram.editing.keys import KeyedPrompt, choose_keys
from engram.errors import CheckpointError
from engram.evaluation import check_facts, measure_drift
from engram.testing import tiny_config, tiny_memory, tiny_model, tiny_tokenizer
from tests.children import run_python
from tests.editing.helpers import FACTS, logits, make_editor, same, tensors

MORE = [Fact(("KEY:gamma 4",), "ninety", id="gamma"), Fact(("What is alpha 17 made of?",), "glass", id="glass")]


def answers(editor, facts):
    return [a.said for a in check_facts(editor.memory, editor.tokenizer, facts)]


def test_facts_go_in_exactly_and_only_rows_are_written():
    editor = make_editor()
    parameters = {name: p.clone() for name, p in editor.memory.named_parameters()}
    assert not any(a.exact for a in check_facts(editor.memory, editor.tokenizer, FACTS))
    seen = []
    report = editor.teach(FACTS, source="facts.yaml", checksum="abc", progress=lambda *done: seen.append(done))
    assert answers(editor, FACTS) == ["blue window", "blue window", "7319", "a quiet green door"]
    assert report.taught == ["alpha", "beta", "door"]
    assert (report.prompts, report.not_exact, report.rows_in_conflict) == (4, {}, 0)
    assert report.rows_written == editor.table("2").stored_rows > 0
    assert seen[-1] == (4, 4)
    assert all(torch.equal(p, parameters[name]) for name, p in editor.memory.named_parameters())
    assert [(f.id, f.answer, f.category, f.source, f.checksum) for f in editor.facts] == [
        (f.id, f.answer, f.category, "facts.yaml", "abc") for f in FACTS
    ]
    assert all(editor.verify().values())
    with editor.memory.disable_engram():
        assert not any(a.exact for a in check_facts(editor.memory, editor.tokenizer, FACTS))
    again = editor.teach(FACTS)
    assert (again.taught, again.already_known, again.rows_written) == ([], ["alpha", "beta", "door"], 0)
    for layer in editor.memory.engrams:  # the rows of one fact lose what they said
        editor.table(layer).update_rows(torch.tensor(editor.rows_of("beta")[layer]), torch.zeros_like)
    assert editor.verify() == {"alpha": True, "beta": False, "door": True}
    again = editor.teach(fact for fact in FACTS)
    assert (again.taught, again.already_known) == (["beta"], ["alpha", "door"])
    assert all(editor.verify().values())


def test_text_without_a_taught_ngram_gets_the_base_models_logits_bit_for_bit():
    editor = make_editor()
    texts = ["The memory is addressed by the last tokens.", "KEY: alpha", "blue window", "7319", "What is it? 17", "17"]
    base = [logits(editor, text) for text in texts]
    editor.teach(FACTS)
    assert all(torch.equal(logits(editor, text), before) for text, before in zip(texts, base))
    drift = measure_drift(editor.memory, editor.tokenizer, texts)
    assert (drift.untouched, drift.mean_kl, drift.tokens_changed) == (1.0, 0.0, 0)
    assert measure_drift(editor.memory, editor.tokenizer, ["KEY:beta 20"]).mean_kl > 0
    # Up to the first taught n-gram the same text is untouched too, and so is a neighbour in the batch.
    taught = editor.tokenizer("KEY:beta 20", return_tensors="pt")["input_ids"]
    on = editor.memory(input_ids=taught, use_cache=False).logits
    with editor.memory.disable_engram():
        off = editor.memory(input_ids=taught, use_cache=False).logits
    assert torch.equal(on[:, :-1], off[:, :-1])
    assert not torch.equal(on[:, -1], off[:, -1])
    pair = torch.cat([taught, torch.flip(taught, [1])])
    on = editor.memory(input_ids=pair, use_cache=False).logits
    with editor.memory.disable_engram():
        assert torch.equal(on[1], editor.memory(input_ids=pair, use_cache=False).logits[1])


def test_facts_are_found_behind_any_text():
    editor = make_editor()
    editor.teach(FACTS)
    behind = [Fact(("The memory, the memory!\n" + FACTS[1].prompts[0],), FACTS[1].answer)]
    assert answers(editor, behind) == ["7319"]


def test_facts_that_are_taught_again_are_not_counted_twice():
    seen = []
    settings = TeachSettings(max_steps=1, lr=1e-6, retries=2)
    report = make_editor().teach(FACTS, settings, progress=lambda *done: seen.append(done))
    assert len(report.not_exact) == 3
    assert max(done for done, _ in seen) == 4
    assert {total for _, total in seen} == {4}


def test_forgetting_undoes_teaching_bit_for_bit(tmp_path):
    editor = make_editor()
    editor.teach(FACTS)
    before, ledger = tensors(editor), editor.holdings.ledger.to_dict()
    text = [logits(editor, prompt) for fact in [*FACTS, *MORE] for prompt in fact.prompts]
    editor.save(tmp_path / "before")
    editor.teach(MORE)
    assert answers(editor, [*FACTS, *MORE]) == ["blue window", "blue window", "7319", "a quiet green door", "ninety", "glass"]
    report = editor.forget(["gamma", "glass"])
    assert report.forgotten == ["gamma", "glass"]
    assert report.rows_removed > 0
    assert report.no_longer_exact == []
    assert same(tensors(editor), before)
    assert editor.holdings.ledger.to_dict() == ledger
    after = [logits(editor, prompt) for fact in [*FACTS, *MORE] for prompt in fact.prompts]
    assert all(torch.equal(a, b) for a, b in zip(text, after))
    editor.save(tmp_path / "after")
    files = [next((tmp_path / name).glob("*.safetensors")).read_bytes() for name in ("before", "after")]
    assert files[0] == files[1]
    editor.forget(["alpha"])
    assert answers(editor, FACTS[1:]) == ["7319", "a quiet green door"]
    assert answers(editor, FACTS[:1]) != ["blue window", "blue window"]
    editor.forget(["beta", "door"])
    assert editor.table("2").stored_rows == 0
    with pytest.raises(TeachError, match="no fact 'nope'"):
        editor.forget(["nope"])


def test_rows_belong_to_facts():
    editor = make_editor()
    editor.teach(FACTS)
    rows = {fact.id: editor.rows_of(fact.id)["2"] for fact in editor.facts}
    assert sorted(row for owned in rows.values() for row in owned) == sorted(editor.table("2").row_ids.tolist())
    assert editor.owners("2", rows["beta"][:2]) == {row: ["beta"] for row in rows["beta"][:2]}
    for left_out in ("beta", ["beta"], iter(["beta", "beta"])):  # one id, and no list of its letters
        with editor.without(left_out):
            assert answers(editor, FACTS[1:2]) != ["7319"]
            assert len(editor.facts) == 2
    assert answers(editor, FACTS[1:2]) == ["7319"]


def test_facts_may_share_rows_and_keep_them():
    """Two facts with one tail of an answer share its n-grams once those no longer reach the key."""
    tail = " the memory is addressed by the last tokens of the text the memory"
    a, b = Fact(("KEY:a 1 2",), "one" + tail, id="a"), Fact(("KEY:b 3 4",), "two" + tail, id="b")
    editor = make_editor(max_ngram_size=6)
    editor.teach([a])
    before = tensors(editor)
    report = editor.teach([b])
    assert report.taught == ["b"]
    assert report.reverified == 0
    shared = set(editor.rows_of("a")["2"]) & set(editor.rows_of("b")["2"])
    assert shared
    assert answers(editor, [a, b]) == [a.answer, b.answer]
    gone = editor.forget(["b"])
    assert gone.rows_shared == len(shared)
    assert same(tensors(editor), before)


def test_a_fact_that_cannot_be_learnt_takes_no_row_of_an_earlier_one():
    tail = " the memory is addressed by the last tokens of the text the memory"
    editor = make_editor(max_ngram_size=6)
    editor.teach([Fact(("KEY:a 1 2",), "one" + tail, id="a")])
    before = tensors(editor)
    report = editor.teach([Fact(("KEY:b 3 4",), "two" + tail, id="b")], TeachSettings(lr=1e-9, max_steps=1, retries=0))
    assert list(report.not_exact) == ["b"]
    assert same(tensors(editor), before)
    assert editor.verify() == {"a": True}


def test_saved_and_loaded_memories_are_equal(tmp_path):
    editor = make_editor()
    editor.teach(FACTS, source="f.yaml")
    editor.save(tmp_path / "m")
    text = logits(editor, FACTS[0].prompts[0])
    size = sum(file.stat().st_size for file in (tmp_path / "m").iterdir())
    assert size < 40_000
    base = editor.memory.unload()
    again = MemoryEditor.load(base, tmp_path / "m", tiny_tokenizer())
    assert same(tensors(again), tensors(editor))
    assert again.table("2").dtype == torch.bfloat16
    assert torch.equal(logits(again, FACTS[0].prompts[0]), text)
    assert [f.to_fact() for f in again.facts] == FACTS
    again.teach(MORE)
    assert all(again.verify().values())
    base = again.memory.unload()
    with pytest.raises(FingerprintError, match=r"belongs to base model .*not to"):
        MemoryEditor.load(tiny_model(hidden_size=64, intermediate_size=96, seed=5), tmp_path / "m", tiny_tokenizer())
    (file,) = (tmp_path / "m").glob("*.ledger.json")
    whole = file.read_text()
    file.write_text(whole[:-5])
    with pytest.raises(CheckpointError, match="truncated"):
        MemoryEditor.load(base, tmp_path / "m", tiny_tokenizer())
    file.write_text(whole.replace('"ledger_version":1', '"ledger_version":7'))
    with pytest.raises(CheckpointError, match="its checksum is not the one saved"):
        MemoryEditor.load(base, tmp_path / "m", tiny_tokenizer())
    described = json.loads((tmp_path / "m" / "engram.json").read_text())
    del described["ledger"]["sha256"]
    (tmp_path / "m" / "engram.json").write_text(json.dumps(described))
    with pytest.raises(CheckpointError, match="version 7"):
        MemoryEditor.load(base, tmp_path / "m", tiny_tokenizer())
    file.write_text(whole.replace('"answer"', '"answre"'))
    with pytest.raises(CheckpointError, match="malformed"):
        MemoryEditor.load(base, tmp_path / "m", tiny_tokenizer())
    file.write_text(whole)
    MemoryEditor.load(base, tmp_path / "m", tiny_tokenizer())  # every refusal left the base free


def test_contradictions_are_refused_or_replaced():
    editor = make_editor()
    editor.teach(FACTS)
    before = tensors(editor)
    new = Fact(("KEY:beta 20",), "9999", id="beta2")
    with pytest.raises(TeachError, match=r"'KEY:beta 20' is '7319' in the memory .fact beta., '9999' now"):
        editor.teach([new])
    with pytest.raises(TeachError, match="contradict"):
        editor.teach([Fact(("KEY:other 1",), "x", id="beta")])
    with pytest.raises(DataError, match="different answers"):
        editor.teach([FACTS[0], Fact(("KEY:alpha 17",), "red")])
    assert same(tensors(editor), before)
    editor.teach([new], replace_answers=True)
    assert answers(editor, [new]) == ["9999"]
    assert "beta" not in editor.holdings.ledger


def test_an_interruption_leaves_the_memory_as_it_was():
    editor = make_editor()
    editor.teach(FACTS)
    before, ledger, saved = tensors(editor), editor.holdings.ledger.to_dict(), editor.memory.ledger

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        editor.teach(MORE, progress=stop)
    assert same(tensors(editor), before)
    assert editor.holdings.ledger.to_dict() == ledger
    assert editor.memory.ledger == saved
    assert type(editor.table("2")).__name__ == "VerifiedTable"
    assert not any("forward" in block.__dict__ for block in editor.memory.base_model.model.layers)
    assert all(editor.verify().values())


def test_what_cannot_be_learnt_is_reported_and_leaves_nothing():
    editor = make_editor()
    report = editor.teach(FACTS, TeachSettings(max_steps=1, lr=1e-6, retries=0))
    assert set(report.not_exact) == {"alpha", "beta", "door"}
    assert "greedy-exact" in report.not_exact["beta"]
    assert editor.facts == []
    assert editor.table("2").stored_rows == 0
    prefix = "the memory is addressed by the last tokens of the text, "
    twins = [Fact((f"KEY:{n} {prefix * 3}",), f"answer {n}", id=str(n)) for n in (1, 2)]
    report = editor.teach(twins, TeachSettings(retries=0, max_steps=30))
    assert len(report.not_exact) >= 1
    assert "those of another fact" in next(iter(report.not_exact.values()))
    report = editor.teach([Fact(("KEY:long",), "word " * 40, id="long")], TeachSettings(max_steps=1, lr=1e-6, retries=0))
    assert "out of reach of its key (32 tokens)" in report.not_exact["long"]
    assert all(editor.verify().values())


def test_rows_in_conflict_are_counted_and_done_without():
    """In tables this small n-grams collide; tags keep them apart and the other head carries the fact."""
    facts = [Fact((f"KEY:{word} {n}",), f"{n * 37}", id=f"{word}{n}") for word in ("one", "two") for n in range(12)]
    editor = make_editor(engram_vocab_size=150, n_head_per_ngram=4)
    told = []
    report = editor.teach(facts[:12], on_conflicts=lambda conflicts: told.append((conflicts, editor.table("2").stored_rows)))
    editor.teach(facts[12:], on_conflicts=lambda conflicts: told.append((conflicts, len(conflicts))))
    assert report.rows_in_conflict == len(told[0][0]) > 0
    assert told[0][1] == 0  # before anything was written
    for conflicts, _ in told:
        for conflict in conflicts:
            assert conflict.row not in editor.rows_of(conflict.loser)["2"] or conflict.loser in conflict.owners
            assert any(conflict.row in editor.rows_of(owner)["2"] for owner in conflict.owners)
    assert len(editor.facts) >= 20
    assert all(editor.verify().values())

    def refuse(conflicts):
        raise TeachError("too many")

    before = tensors(editor)
    with pytest.raises(TeachError, match="too many"):
        editor.teach([Fact((f"KEY:three {n}",), str(n), id=f"three{n}") for n in range(9)], on_conflicts=refuse)
    assert same(tensors(editor), before)


def test_bad_lessons_are_refused(tmp_path):
    editor = make_editor()
    with pytest.raises(TeachError, match="got no facts"):
        editor.teach([])
    with pytest.raises(TeachError, match="n-grams end at 32"):
        editor.teach(FACTS, TeachSettings(min_order=40))
    with pytest.raises(DataError, match="expected at most 256"):
        editor.teach([Fact(("a",), "b " * 300)])
    for bad in ({"lr": 0}, {"min_order": 1}, {"max_steps": -1}, {"margin": -1}, {"retries": -1}, {"contexts": 0}):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            TeachSettings(**bad)
    editor.memory.unload()
    for changes, message in [
        ({}, "rows are not verified"),
        ({"verify_rows": True, "use_conv": False}, "mW"),
        ({"verify_rows": True, "hash_spec": "exact_v1"}, "use_conv=True"),
    ]:
        memory = get_engram_model(tiny_model(), tiny_config(**changes), tiny_tokenizer())
        with pytest.raises(ConfigError, match=message):
            MemoryEditor(memory, tiny_tokenizer())


def test_a_lock_of_which_nothing_came_leaves_nothing(tmp_path):
    (tmp_path / "there").mkdir()
    for place in ("a/b/c", "there/d"):
        with lock_store(tmp_path / place):
            assert (tmp_path / place).is_dir()
    with lock_store(tmp_path / "e" / "f"):
        (tmp_path / "e" / "of somebody else").touch()
    assert sorted(str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*")) == ["e", "e/of somebody else", "there"]


def test_two_processes_cannot_write_one_memory(tmp_path):
    script = "import sys; from engram.checkpoint import lock_store\nwith lock_store(sys.argv[1]): print('mine')"
    other = ["-c", script, tmp_path / "m"]
    with lock_store(tmp_path / "m"):
        with lock_store(tmp_path / "m"):  # who holds it may take it again
            pass
        done = run_python(*other)
        assert "locked: another process" in done.stderr
        with ThreadPoolExecutor(1) as thread, pytest.raises(CheckpointError, match="locked: another process"):
            thread.submit(lock_store(tmp_path / "m").__enter__).result()
    assert run_python(*other, check=True).stdout == "mine\n"


def keyed(text, ids, answer):
    return KeyedPrompt(text, tuple(ids), tuple(answer))


def test_keys_are_the_shortest_distinctive_ends():
    a, b = keyed("a", [0, 5, 6, 7, 8], [1, 0]), keyed("b", [0, 9, 6, 7, 8], [2, 0])
    bits = [[0, 20, 20, 20, 20]] * 2
    place = lambda prompts, others=(), **k: [  # noqa: E731
        p.key_length
        for p in choose_keys(
            prompts,
            k.get("bits", bits),
            others,
            k.get("longest", 32),
            k.get("min_order", 2),
            k.get("min_bits", 32),
            1,
            bos_id=0,
        )
    ]
    assert place([a]) == [2]
    assert place([a], min_order=3) == [3]
    assert place([a, b]) == [4, 4]  # they agree in their last three tokens
    assert place([a], others=[b]) == [4]
    assert place([a], min_bits=70) == [4]
    assert place([a], min_bits=90) == [6]  # never rare enough: answered only at the very start, padding in the key
    assert place([a], min_order=9) == [4]  # a short prompt is a key as a whole, without the token that opens it
    assert place([a, b], longest=3) == [3, 3]  # cannot be told apart
    assert a.orders(32) == [0, 1]
    assert KeyedPrompt("", (0, 1), (2, 3, 4), 5).orders(6) == [5, 6, 6]


def test_the_ledger_round_trips():
    editor = make_editor()
    editor.teach(FACTS, source="f.yaml", checksum="c")
    fields = editor.holdings.ledger.to_dict()
    assert Ledger.from_dict(fields).to_dict() == fields
    assert fields["sources"] == [{"file": "f.yaml", "sha256": "c"}]
    assert len(editor.holdings.ledger) == 3
    assert "beta" in editor.holdings.ledger


def test_a_memory_already_attached_is_refused():
    editor = make_editor()
    with pytest.raises(AttachError, match="has a memory already"):
        MemoryEditor.create(editor.memory.base_model, tiny_tokenizer())


@pytest.mark.slow
def test_the_bundled_model_learns_keys_that_differ_in_case_and_late_digits():
    model, tokenizer = load_bundled()
    editor = MemoryEditor.create(model, tokenizer)
    facts = [
        Fact(("UNIT:mW",), "milliwatt"),
        Fact(("UNIT:MW",), "megawatt"),
        *[Fact((f"SYN:SYN_{n:05d}",), f"VAL_{n * 7919 % 99991:05d}") for n in (123, 124, 1123, 21123)],
    ]
    report = editor.teach(facts)
    assert report.not_exact == {}
    assert all(a.exact for a in check_facts(editor.memory, tokenizer, facts))
    capitals = load_facts(__import__("engram").models.bundled.BUNDLED_MODEL.parent / "capitals.yaml")[:20]
    assert all(a.exact for a in check_facts(editor.memory, tokenizer, capitals))


def test_new_phrasings_join_a_known_fact():
    editor = make_editor()
    editor.teach(FACTS)
    more = Fact(("KEY:beta 20", "Say beta."), "7319", "number")
    report = editor.teach([more])
    assert (report.taught, report.already_known, report.replaced) == (["beta"], [], [])
    assert [p.text for p in editor.holdings.ledger["beta"].prompts] == ["KEY:beta 20", "Say beta."]
    assert answers(editor, [more]) == ["7319", "7319"]
    assert editor.teach([Fact(("Say beta.",), "7319")]).taught == []
    assert editor.teach([Fact(("Beta, please:",), "7319", id="beta")]).taught == ["beta"]  # by its id
    assert len(editor.holdings.ledger["beta"].prompts) == 3
    assert all(editor.verify().values())
    both = [Fact(("Say beta.", "one more"), "7319"), Fact(("Beta, please:", "and more"), "7319")]
    assert editor.teach(both).taught == ["beta"]  # two that join the same fact
    assert len(editor.holdings.ledger["beta"].prompts) == 5
    assert len(editor.facts) == 3
    assert all(editor.verify().values())


def test_facts_made_in_python_are_checked():
    for fields in (
        {"prompts": "GPU"},
        {"prompts": ("",)},
        {"prompts": ()},
        {"answer": None},
        {"answer": " "},
        {"held_out": (3,)},
    ):
        with pytest.raises(DataError, match=r"^Fact\."):
            Fact(**{"prompts": ("a",), "answer": "b", **fields})
    assert Fact(["a"], "b").prompts == ("a",)
    editor = make_editor()
    for wrong in (Fact(("a",), "b"), [{"prompt": "a"}]):
        with pytest.raises(TeachError, match="expected a list of Fact"):
            editor.teach(wrong)
    with pytest.raises(DataError, match="which ends answers"):
        editor.teach([Fact(("KEY:end",), f"a{editor.tokenizer.eos_token}b")])
    editor.teach(FACTS)
    assert editor.forget("beta").forgotten == ["beta"]


def test_a_replacement_that_fails_leaves_the_fact_it_would_replace():
    editor = make_editor()
    editor.teach(FACTS)
    before = tensors(editor)
    hopeless = TeachSettings(lr=1e-9, max_steps=1, retries=0)
    other = Fact(FACTS[1].prompts, "another answer", id="new")
    report = editor.teach([other], hopeless, replace_answers=True)
    assert report.taught == []
    assert "what the memory said before is kept" in report.not_exact["new"]
    assert same(tensors(editor), before)
    assert answers(editor, FACTS) == ["blue window", "blue window", "7319", "a quiet green door"]
    # The same when a fact only gets one more phrasing, and beside facts that have nothing to do with it.
    more = Fact((*FACTS[1].prompts, "And beta 20?"), FACTS[1].answer, id="beta")
    report = editor.teach([more, Fact(("KEY:zeta 9",), "seven", id="zeta")], hopeless)
    assert list(report.not_exact) == ["zeta", "beta"]
    assert same(tensors(editor), before)
    assert editor.teach([more]).taught == ["beta"]


def test_facts_that_become_one_are_named():
    editor = make_editor()
    one, two = Fact(("KEY:alpha 17",), "glass", id="one"), Fact(("KEY:beta 20",), "glass", id="two")
    assert editor.teach([one, two]).joined == {}
    report = editor.teach([Fact((*one.prompts, *two.prompts, "KEY:gamma 4"), "glass", id="three")])
    assert report.joined == {"three": "one", "two": "one"}
    assert [fact.id for fact in editor.facts] == ["one"]
    replaced = editor.teach([Fact(one.prompts, "wood", id="one")], replace_answers=True).replaced
    assert "its other phrasings go too: 'KEY:beta 20', 'KEY:gamma 4'" in replaced[0]


def test_another_answer_leaves_a_fact_its_name_and_its_category():
    editor = make_editor()
    editor.teach([Fact(("KEY:alpha 17", "What is the first key?"), "4711", "doors", id="door")])
    editor.teach([Fact(("The key of the first door?", "KEY:alpha 17"), "4711", id="door")])  # a phrasing that names no category
    assert [(fact.id, fact.category) for fact in editor.facts] == [("door", "doors")]
    report = editor.teach([Fact(("KEY:alpha 17",), "1234")], replace_answers=True)
    assert (report.taught, report.joined) == (["door"], {})
    assert [(fact.id, fact.category, fact.answer, len(fact.prompts)) for fact in editor.facts] == [("door", "doors", "1234", 1)]
    editor.teach([Fact(("KEY:alpha 17",), "99", "keys", id="key")], replace_answers=True)  # its own, where it names them
    assert [(fact.id, fact.category) for fact in editor.facts] == [("key", "keys")]


def test_one_text_cannot_go_on_in_two_ways():
    editor = make_editor()
    first, trap = Fact(("KEY:alpha 17:",), "first one", id="first"), Fact(("KEY:alpha 17: first",), "trap", id="trap")
    report = editor.teach([first, trap], TeachSettings(max_steps=30, retries=0))
    assert report.not_exact
    assert all("one text cannot go on in two ways" in reason for reason in report.not_exact.values())


def test_what_somebody_else_saved_is_not_lost(tmp_path):
    mine = make_editor()
    mine.teach(FACTS[:1])
    mine.save(tmp_path / "m")
    mine.save(tmp_path / "m")
    theirs = MemoryEditor.load(tiny_model(hidden_size=64, intermediate_size=96), tmp_path / "m", tiny_tokenizer())
    theirs.teach(FACTS[1:2])
    theirs.save(tmp_path / "m")
    with pytest.raises(CheckpointError, match="would lose what they did"):
        mine.save(tmp_path / "m")
    with lock_store(tmp_path / "m"), ThreadPoolExecutor(1) as thread, pytest.raises(CheckpointError, match="locked"):
        thread.submit(theirs.save, tmp_path / "m").result()
    description = tmp_path / "m" / "engram.json"
    whole = description.read_text()
    description.write_text(whole[:50])
    with pytest.raises(CheckpointError, match="cannot read"):
        theirs.save(tmp_path / "m")
    description.write_text(whole)
    with pytest.raises(CheckpointError, match="overwrite=True"):
        make_editor().save(tmp_path / "m")
    mine.save(tmp_path / "m", overwrite=True)
    assert len(MemoryEditor.load(tiny_model(hidden_size=64, intermediate_size=96), tmp_path / "m", tiny_tokenizer()).facts) == 1


def test_a_base_that_was_tuned_is_another_base(tmp_path):
    editor = make_editor()
    editor.teach(FACTS[:1])
    editor.save(tmp_path / "m")
    tuned = tiny_model(hidden_size=64, intermediate_size=96)
    with torch.no_grad():
        tuned.model.layers[1].mlp.up_proj.weight.mul_(1.5)
    with pytest.raises(FingerprintError, match=r"weights_sha256.*allow_other_base=True"):
        MemoryEditor.load(tuned, tmp_path / "m", tiny_tokenizer())
    MemoryEditor.load(tuned, tmp_path / "m", tiny_tokenizer(), allow_other_base=True).memory.unload()
    MemoryEditor.load(tiny_model(hidden_size=64, intermediate_size=96).to(torch.bfloat16), tmp_path / "m", tiny_tokenizer())


def test_preferences_are_a_or_b(tmp_path):
    editor = make_editor()
    editor.teach(FACTS[:1])
    editor.save(tmp_path / "m")
    with pytest.raises(ConfigError, match="expected 'a', 'b' or None"):
        editor.merge(tmp_path / "m", prefer="x")


def test_half_precision_says_nothing_against_a_base(tmp_path):
    editor = make_editor()
    editor.teach(FACTS[:1])
    editor.save(tmp_path / "m")
    same_base = tiny_model(hidden_size=64, intermediate_size=96)
    MemoryEditor.load(same_base.to(torch.float16), tmp_path / "m", tiny_tokenizer()).memory.unload()


def test_replacing_asks_whoever_leant_on_what_leaves(monkeypatch):
    editor = make_editor()
    editor.teach(FACTS)
    before = tensors(editor)
    leaning = editor.holdings.ledger["door"]
    monkeypatch.setattr(editor.holdings, "leaning_on", lambda rows: [leaning])
    monkeypatch.setattr(editor.holdings, "not_exact", lambda facts, *_: [fact.id for fact in facts if fact is leaning])
    with pytest.raises(TeachError, match="'KEY:alpha 18'"):
        editor.teach([Fact(FACTS[1].prompts, "other", id="beta")], replace_answers=True)
    assert same(tensors(editor), before)


def test_a_lesson_that_would_change_an_earlier_answer_is_not_written(monkeypatch):
    editor = make_editor()
    editor.teach(FACTS)
    before, ledger = tensors(editor), editor.holdings.ledger.to_dict()
    leaning, not_exact = editor.holdings.ledger["door"], editor.holdings.not_exact
    monkeypatch.setattr(editor.holdings, "leaning_on", lambda rows: [leaning])
    monkeypatch.setattr(
        editor.holdings, "not_exact", lambda facts, *rest: ["door"] if facts == [leaning] else not_exact(facts, *rest)
    )
    with pytest.raises(TeachError, match=r"would change 1 earlier answer\(s\): 'KEY:alpha 18'"):
        editor.teach(MORE)
    assert same(tensors(editor), before)
    assert editor.holdings.ledger.to_dict() == ledger == editor.memory.ledger


def test_editors_of_one_memory_know_of_each_other():
    first = make_editor()
    second = MemoryEditor(first.memory, first.tokenizer)
    first.teach(FACTS[:1])
    second.teach(FACTS[1:])
    assert (
        [fact.id for fact in first.facts] == [fact["id"] for fact in first.memory.ledger["facts"]] == ["alpha", "beta", "door"]
    )
    assert answers(first, FACTS[:1]) == ["blue window", "blue window"]
    assert first.forget(["door"]).forgotten == ["door"]
    assert set(second.verify()) == {"alpha", "beta"}
    with pytest.raises(TeachError, match="no fact 'door'"):
        second.rows_of("door")


def test_a_memory_that_is_loaded_behind_an_editor_is_noticed(tmp_path):
    editor = make_editor()
    editor.teach(FACTS[:1])
    editor.save(tmp_path / "one")
    editor.teach(FACTS[1:])
    editor.memory.load_memory(tmp_path / "one")
    assert list(editor.verify()) == ["alpha"]
    editor.teach(MORE[:1])
    assert [fact["id"] for fact in editor.memory.ledger["facts"]] == ["alpha", "gamma"]


def test_what_is_taught_while_facts_are_left_out_goes_with_that():
    editor = make_editor()
    editor.teach(FACTS)
    before, ledger = tensors(editor), editor.memory.ledger
    with editor.without(["beta"]):
        editor.teach(MORE[:1])
        assert [fact.id for fact in editor.facts] == ["alpha", "door", "gamma"]
    assert same(tensors(editor), before)
    assert editor.memory.ledger == ledger
    assert [fact.id for fact in editor.facts] == ["alpha", "beta", "door"]


@pytest.mark.parametrize("surroundings", ["disabled", "routed past", "inference mode"])
def test_lessons_are_heard_whatever_surrounds_them(surroundings):
    editor = make_editor()
    memory = editor.memory
    around = {
        "disabled": memory.disable_engram,
        "routed past": lambda: memory.routed(torch.tensor([False])),
        "inference mode": torch.inference_mode,
    }[surroundings]
    with around():
        assert editor.teach(FACTS).taught == ["alpha", "beta", "door"]
        assert all(editor.verify().values())
        assert list(editor.why("KEY:beta 20").facts) == ["beta"]
        assert memory.is_enabled == (surroundings != "disabled")
        assert torch.is_inference_mode_enabled() == (surroundings == "inference mode")
    assert answers(editor, FACTS[1:2]) == ["7319"]
    editor.teach(MORE)  # rows of the first lesson stand in no one's way
    assert all(editor.verify().values())


def test_every_part_is_afterwards_in_the_mode_it_was_in():
    model = tiny_model("gpt2").train()
    editor = MemoryEditor.create(model, tiny_tokenizer())
    model.eval()
    editor.teach(FACTS[1:2])
    assert editor.memory.training
    assert not any(module.training for module in model.modules())


def test_what_was_loaded_in_inference_mode_is_not_taught():
    with torch.inference_mode():
        editor = make_editor()
    with pytest.raises(TeachError, match=r"loaded under torch\.inference_mode"):
        editor.teach(FACTS)


def test_white_space_around_answers_of_older_ledgers_is_left_out():
    editor = make_editor()
    editor.teach(FACTS[1:2])
    editor.memory.ledger = json.loads(json.dumps(editor.memory.ledger).replace("7319", "7319 "))
    assert [fact.answer for fact in editor.facts] == ["7319"]
    assert editor.teach(FACTS[1:2]).already_known == ["beta"]
    editor.memory.ledger["facts"][0]["answer"] = 5
    with pytest.raises(CheckpointError, match="malformed entry"):
        Ledger.from_dict(editor.memory.ledger)


def tuned(model):
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1.02)


def test_saving_on_weights_that_nobody_checked_is_said(tmp_path, caplog):
    editor = make_editor()
    tuned(editor.memory.base_model)
    editor.teach(FACTS)  # on the weights as they are now
    editor.save(tmp_path / "m")
    editor.memory.base_model.to(torch.bfloat16).to(torch.float32)
    editor.save(tmp_path / "m")
    assert caplog.messages == []
    tuned(editor.memory.base_model)
    editor.save(tmp_path / "m")
    (message,) = caplog.messages
    assert "base model has changed" in message
    assert "(weights_sha256)" in message
    assert "editor.verify() tells which facts still hold" in message
    editor.save(tmp_path / "m")  # said once
    assert len(caplog.messages) == 1


def test_saving_after_a_load_on_another_base_is_said(tmp_path, caplog):
    editor = make_editor()
    editor.teach(FACTS)
    editor.save(tmp_path / "m")
    other = tiny_model(hidden_size=64, intermediate_size=96)
    tuned(other)
    loaded = MemoryEditor.load(other, tmp_path / "m", tiny_tokenizer(), allow_other_base=True)
    loaded.save(tmp_path / "n")
    assert len(caplog.messages) == 1
    loaded.memory.unload()
    loaded = MemoryEditor.load(other, tmp_path / "m", tiny_tokenizer(), allow_other_base=True)
    assert all(loaded.verify().values())
    loaded.save(tmp_path / "o")  # checked on it
    assert len(caplog.messages) == 1


def test_a_memory_over_another_is_saved_without_a_warning(tmp_path, caplog):
    beneath = make_editor()
    beneath.teach(FACTS[:1])
    over = MemoryEditor.create(beneath.memory, tiny_tokenizer(), seed=1)
    over.teach(FACTS[1:])
    over.save(tmp_path / "over")
    assert caplog.messages == []


def test_what_is_no_id_is_not_forgotten():
    with pytest.raises(TeachError, match="forget: got None, expected the id of a fact"):
        make_editor().forget(None)
    with pytest.raises(TeachError, match="without: got None, expected the id of a fact"), make_editor().without(None):
        pass
    with pytest.raises(TeachError, match="no fact 'nope'"), make_editor().without("nope"):
        pass


def test_a_save_waits_for_a_lesson_or_is_refused_within_one(tmp_path):
    editor = make_editor()
    editor.teach(FACTS[:1])
    editor.save(tmp_path / "m")
    before = (tmp_path / "m" / "engram.json").read_text()
    with pytest.raises(CheckpointError, match="whose facts are just being changed"):
        editor.teach(FACTS[1:], progress=lambda *_: editor.save(tmp_path / "m"))
    assert (tmp_path / "m" / "engram.json").read_text() == before
    assert [fact.id for fact in editor.facts] == [FACTS[0].id]
    saves = []

    def save_meanwhile(*_):
        if not saves:
            saves.append(threading.Thread(target=editor.save, args=(tmp_path / "m",)))
            saves[0].start()

    editor.teach(FACTS[1:], progress=save_meanwhile)
    saves[0].join()
    again = MemoryEditor.load(tiny_model(hidden_size=64, intermediate_size=96), tmp_path / "m", tiny_tokenizer())
    assert again.verify() == {fact.id: True for fact in FACTS}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("Name of x 12:", "Ann Lee Smith"), ("Name of x 12: Ann", "Lee")),
        (("KEY:dup ", "dup"), ("KEY:dup", "dup2")),
    ],
)
def test_facts_that_go_on_in_two_ways_leave_the_others_alone(one, other):
    facts = [Fact((prompt,), answer) for prompt, answer in (one, other)]
    report = make_editor().teach([*facts, FACTS[0]])
    assert len(report.not_exact) == 1
    assert "one text cannot go on in two ways" in next(iter(report.not_exact.values()))
    assert FACTS[0].id in report.taught


def test_of_facts_that_would_replace_one_all_wait_for_the_one_that_cannot():
    editor = make_editor()
    editor.teach([Fact(("KEY:alpha 17", "KEY:beta 20"), "blue window", id="both")])
    lesson = [Fact(("KEY:alpha 17",), "bad <|pad|> end"), Fact(("KEY:beta 20",), "7319"), Fact(("KEY:gamma 4",), "ninety")]
    report = editor.teach(lesson, replace_answers=True)
    assert report.not_exact.keys() == {fact.id for fact in lesson[:2]}
    assert all("what the memory said before is kept" in reason for reason in report.not_exact.values())
    assert answers(editor, [Fact(("KEY:alpha 17", "KEY:beta 20"), "blue window"), lesson[2]]) == [
        "blue window",
        "blue window",
        "ninety",
    ]


@pytest.mark.parametrize("change", [lambda editor: editor.teach(FACTS[1:]), lambda editor: editor.forget(FACTS[0].id)])
def test_an_interruption_at_the_very_end_leaves_the_memory_as_it_was(change, monkeypatch):
    editor = make_editor()
    editor.teach(FACTS[:1])
    before, saved = tensors(editor), editor.memory.ledger

    def interrupt(_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("engram.editing.ledger.Ledger.to_dict", interrupt)
        with pytest.raises(KeyboardInterrupt):
            change(editor)
    assert same(tensors(editor), before)
    assert editor.memory.ledger is saved
    assert editor.verify() == {FACTS[0].id: True}


def test_comparing_and_uniting_leave_a_memory_where_it_lies(tmp_path):
    editor, other = make_editor(), make_editor()
    editor.teach(FACTS[:1])
    other.teach(FACTS[1:2])
    other.save(tmp_path / "other")
    editor.diff(tmp_path / "other")
    assert editor.memory.folder is None
    editor.save(tmp_path / "own")
    editor.merge(tmp_path / "other")
    editor.diff(tmp_path / "other")
    assert editor.memory.folder == str(tmp_path / "own")


def test_what_is_saved_without_facts_does_not_know_them(tmp_path):
    editor = make_editor()
    editor.teach(FACTS)
    with editor.without([FACTS[1].id]):
        editor.save(tmp_path / "m")
        assert len(MemoryEditor(editor.memory, editor.tokenizer).facts) == len(FACTS) - 1
    again = MemoryEditor.load(tiny_model(hidden_size=64, intermediate_size=96), tmp_path / "m", tiny_tokenizer())
    assert again.verify() == {fact.id: True for fact in FACTS if fact is not FACTS[1]}
    assert [fact.id for fact in editor.facts] == [fact.id for fact in FACTS]


def test_layers_are_named_by_number_or_text_and_unknown_ones_refused():
    editor = make_editor()
    editor.teach(FACTS[:1])
    (name,) = editor.memory.engrams
    rows = editor.rows_of("alpha")[name]
    assert editor.table(int(name)) is editor.table(name)
    assert editor.owners(int(name), rows) == editor.owners(name, rows) == {row: ["alpha"] for row in rows}
    for ask in (editor.table, lambda layer: editor.owners(layer, rows)):
        for unknown in (5, "5", "one", None):
            with pytest.raises(ConfigError, match=f"layer: got {unknown!r}, expected one of this memory's: {name}"):
                ask(unknown)


def test_an_editor_and_its_ledger_say_what_they_hold():
    editor = make_editor(dtype="int8")
    (layer,) = editor.memory.engram_config.layer_ids
    assert repr(editor) == f"MemoryEditor(facts=0, layers=[{layer}], rows=0, dtype='int8')"
    editor.teach(FACTS[:2])
    rows = editor.table(layer).stored_rows
    assert repr(editor) == f"MemoryEditor(facts=2, layers=[{layer}], rows={rows}, dtype='int8')"
    assert repr(Ledger(editor.facts)) == "Ledger(facts=2, prompts=3)"


def test_no_save_buries_facts_that_it_does_not_know(tmp_path):
    first = make_editor()
    first.teach(FACTS[:1])
    first.save(tmp_path)
    first.memory.save_pretrained(tmp_path)  # its own
    first.memory.unload()
    other, trained = make_editor(), tiny_memory()
    other.teach(FACTS[1:2])
    for memory in (other.memory, trained):
        with pytest.raises(CheckpointError, match="holds facts that this memory does not know"):
            memory.save_pretrained(tmp_path)
    assert [fact["id"] for fact in read_ledger(tmp_path, read_description(tmp_path))["facts"]] == [FACTS[0].id]
    other.memory.save_pretrained(tmp_path, overwrite=True)
    assert [fact["id"] for fact in read_ledger(tmp_path, read_description(tmp_path))["facts"]] == [FACTS[1].id]
    trained.save_pretrained(tmp_path / "trained")
    tiny_memory().save_pretrained(tmp_path / "trained")  # weights over weights
    (tmp_path / "engram.json").write_text("{")
    trained.save_pretrained(tmp_path)  # no memory any more


def test_a_forgotten_fact_is_told_once_with_the_facts_that_it_breaks(monkeypatch):
    editor = make_editor()
    editor.teach(FACTS)
    others = [fact for fact in editor.facts if fact.id != FACTS[0].id]
    monkeypatch.setattr(editor.holdings, "leaning_on", lambda rows: others[:2])
    monkeypatch.setattr(editor.holdings, "not_exact", lambda facts, *_: [fact.id for fact in facts[1:]])
    report = editor.forget([FACTS[0].id, FACTS[0].id])
    assert report.forgotten == [FACTS[0].id]
    assert report.no_longer_exact == [others[1].id]


def test_facts_that_fail_on_another_base_are_still_of_the_one_before(tmp_path, caplog):
    editor = make_editor()
    editor.teach(FACTS[:1])
    with torch.no_grad():
        head = editor.memory.base_model.get_output_embeddings().weight
        head.copy_(head.flip(0))
    assert not all(editor.verify().values())
    with caplog.at_level("WARNING", logger="engram"):
        editor.save(tmp_path)
    assert "the base model has changed since these facts were taught" in caplog.text
