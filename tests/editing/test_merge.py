import json

import pytest
import torch

from engram import CheckpointError, ConfigError, Fact, FingerprintError, TeachSettings
from engram.checkpoint import DESCRIPTION_NAME, read_description, write_store
from engram.editing import diff_memories, merge, merge_memories
from engram.editing.merge import StoredMemory
from engram.errors import EngramError, MergeConflictError
from tests.editing.helpers import FACTS, make_editor, same, tensors
from tests.models.test_files import mutations

A = [FACTS[0], FACTS[1]]
B = [FACTS[2], Fact(("KEY:gamma 4",), "ninety", id="gamma")]


def saved(path, facts, **changes):
    editor = make_editor(**changes)
    editor.teach(facts)
    editor.save(path)
    return editor


@pytest.fixture
def two(tmp_path):
    return saved(tmp_path / "a", A), saved(tmp_path / "b", B), tmp_path


def test_the_union_holds_both_bit_for_bit(two):
    a, b, tmp_path = two
    report = merge_memories(tmp_path / "a", tmp_path / "b", tmp_path / "c")
    assert (report.facts, report.from_a, report.from_b, report.resolved) == (4, 2, 2, [])
    union = make_editor()
    union.memory.load_memory(tmp_path / "c")
    union = type(union)(union.memory, union.tokenizer)
    assert [f.id for f in union.facts] == ["alpha", "beta", "door", "gamma"]
    assert all(union.verify().values())
    for part in (a, b):
        ids, tags, values = tensors(part)
        slots = union.table("2").find(ids, tags)
        assert torch.equal(union.table("2").gather(slots), values)
    union.forget([fact.id for fact in B])
    assert same(tensors(union), tensors(a))
    a.merge(tmp_path / "b")
    assert [f.id for f in a.facts] == ["alpha", "beta", "door", "gamma"]
    assert all(a.verify().values())
    assert a.diff(tmp_path / "c").equal


def test_memories_with_other_trained_readers_are_not_united(tmp_path):
    for name, factor in (("a", 1), ("b", 2)):
        editor = make_editor(reader="trained", n_embed_per_ngram=48)
        for engram in editor.memory.engrams.values():
            engram.value_proj.weight.data.add_(factor)
        editor.save(tmp_path / name)
    assert diff_memories(tmp_path / "a", tmp_path / "a").equal
    with pytest.raises(FingerprintError, match="differ in reader"):
        merge_memories(tmp_path / "a", tmp_path / "b", tmp_path / "c")


def test_rows_are_listed_for_the_facts_that_own_them(tmp_path):
    editor = saved(tmp_path / "small", FACTS, engram_vocab_size=20)  # small enough for n-grams to meet
    listed = StoredMemory(tmp_path / "small").rows_by_fact()
    assert {fact.id: listed[fact.id] for fact in editor.facts} == {
        fact.id: {layer: rows for layer, rows in editor.rows_of(fact.id).items() if rows} for fact in editor.facts
    }


def test_differences_are_listed(two):
    _, _, tmp_path = two
    found = diff_memories(tmp_path / "a", tmp_path / "b")
    assert (found.only_a, found.only_b, found.conflicts) == (["alpha", "beta"], ["door", "gamma"], [])
    assert found.rows_only_a == StoredMemory(tmp_path / "a").rows(2).row_ids.shape[0]
    assert not found.equal
    assert found.to_dict()["equal"] is False
    assert diff_memories(tmp_path / "a", tmp_path / "a").equal


def test_contradictions_are_refused_or_decided_aloud(tmp_path):
    saved(tmp_path / "a", A)
    saved(tmp_path / "b", [Fact(("KEY:beta 20",), "0000", id="other"), B[1]])
    found = diff_memories(tmp_path / "a", tmp_path / "b")
    assert found.conflicts == [{"prompt": "KEY:beta 20", "a": "7319", "b": "0000"}]
    assert (found.only_a, found.only_b) == (["alpha"], ["gamma"])
    assert found.rows_shared_different + found.rows_in_collision > 0
    with pytest.raises(MergeConflictError, match=r"prompt 'KEY:beta 20': answer '7319' in a, '0000' in b"):
        merge_memories(tmp_path / "a", tmp_path / "b", tmp_path / "c")
    assert not (tmp_path / "c").exists()
    for side, kept, answer in (("a", "beta", "7319"), ("b", "other", "0000")):
        report = merge_memories(tmp_path / "a", tmp_path / "b", tmp_path / side / "c", prefer=side)
        assert "KEY:beta 20" in report.resolved[0]
        union = make_editor()
        union.memory.load_memory(tmp_path / side / "c")
        union = type(union)(union.memory, union.tokenizer)
        assert {f.id for f in union.facts} == {"alpha", "gamma", kept}
        assert union.holdings.ledger[kept].answer == answer
        assert all(union.verify().values())


def test_prompts_that_leave_with_a_losing_fact_are_named(tmp_path):
    saved(tmp_path / "a", [Fact(("Code A-3", "What is A-3?"), "green", id="a3")])
    saved(tmp_path / "b", [Fact(("What is A-3?", "Colour of A-3"), "white", id="b3")])
    a, b = "; 'Code A-3' would leave with a's fact", "; 'Colour of A-3' would leave with b's fact"
    with pytest.raises(MergeConflictError, match=rf"answer 'green' in a, 'white' in b{a}{b}"):
        merge_memories(tmp_path / "a", tmp_path / "b", tmp_path / "c")
    for side, told in (("a", b), ("b", a)):
        (line, *_) = merge_memories(tmp_path / "a", tmp_path / "b", tmp_path / side / "c", prefer=side).resolved
        assert line.endswith(f"'white' in b{told}")


def test_a_fact_that_both_hold_is_no_conflict(tmp_path):
    """Both were taught it beside other facts, so its rows differ; the first memory's are taken."""
    a = saved(tmp_path / "a", A)
    saved(tmp_path / "b", [A[1], *B])
    report = merge_memories(tmp_path / "a", tmp_path / "b", tmp_path / "c")
    assert (report.from_a, report.from_b) == (2, 2)
    assert merge_memories(tmp_path / "a", tmp_path / "a", tmp_path / "d").facts == 2
    assert diff_memories(tmp_path / "a", tmp_path / "d").equal
    assert len(a.facts) == 2


def test_two_ngrams_in_one_row_are_a_conflict(tmp_path):
    many = [[Fact((f"KEY:{word} {n}",), f"{n * 37}", id=f"{word}{n}") for n in range(6)] for word in ("one", "two")]
    for name, facts in zip("ab", many):
        saved(tmp_path / name, facts, engram_vocab_size=150, n_head_per_ngram=4)
    assert diff_memories(tmp_path / "a", tmp_path / "b").rows_in_collision > 0
    with pytest.raises(MergeConflictError, match="two n-grams claim it"):
        merge_memories(tmp_path / "a", tmp_path / "b", tmp_path / "c")
    report = merge_memories(tmp_path / "a", tmp_path / "b", tmp_path / "c", prefer="b")
    assert report.from_b == 6
    union = make_editor(engram_vocab_size=150, n_head_per_ngram=4)
    union.memory.load_memory(tmp_path / "c")
    assert all(type(union)(union.memory, union.tokenizer).verify().values())


def test_what_does_not_fit_is_refused(two):
    _, _, tmp_path = two
    saved(tmp_path / "seed", B, seed=3)
    with pytest.raises(FingerprintError, match="engram_config, fingerprint, reader_sha256"):
        merge_memories(tmp_path / "a", tmp_path / "seed", tmp_path / "c")
    with pytest.raises(ConfigError, match="holds a memory already"):
        merge_memories(tmp_path / "a", tmp_path / "b", tmp_path / "seed")
    from engram.testing import tiny_memory

    tiny_memory().save_pretrained(tmp_path / "dense")
    with pytest.raises(ConfigError, match="not taught facts"):
        diff_memories(tmp_path / "a", tmp_path / "dense")


def test_a_memory_saved_before_a_field_existed_is_the_same_kind(two):
    _, _, tmp_path = two
    file = tmp_path / "a" / DESCRIPTION_NAME
    fields = json.loads(file.read_text())
    for name in ("fuse", "branch_gates", "layer_orders"):
        del fields["engram_config"][name]
    file.write_text(json.dumps(fields))
    assert merge_memories(tmp_path / "a", tmp_path / "b", tmp_path / "c").facts == 4
    fields["engram_config"]["gate"] = "plain"
    file.write_text(json.dumps(fields))
    with pytest.raises(FingerprintError, match="differ in engram_config:"):
        merge_memories(tmp_path / "a", tmp_path / "b", tmp_path / "d")


def test_rows_by_fact_agree_with_the_editor(two):
    a, _, tmp_path = two
    stored = StoredMemory(tmp_path / "a")
    assert stored.rows_by_fact() == {fact.id: a.rows_of(fact.id) for fact in a.facts}


def test_what_contradicts_is_looked_for_once(two, monkeypatch):
    from engram.editing import merge

    calls, look = [], merge._contradictions
    monkeypatch.setattr(merge, "_contradictions", lambda *sides: calls.append(sides) or look(*sides))
    diff_memories(two[2] / "a", two[2] / "b")
    assert len(calls) == 1


def test_a_memory_is_listed_while_somebody_saves(two, monkeypatch):
    a, _, tmp_path = two
    real, saves = merge.read_description, []

    def late(path):
        fields = real(path)
        if not saves:
            saves.append(a.save(path))
        return fields

    monkeypatch.setattr(merge, "read_description", late)
    assert list(StoredMemory(tmp_path / "a").rows_by_fact()) == ["alpha", "beta"]
    assert saves


def test_a_damaged_description_of_a_taught_memory_is_an_error_of_ours(two):
    _, _, tmp_path = two
    whole, refused = json.loads((tmp_path / "a" / DESCRIPTION_NAME).read_text()), 0
    for at, fields in mutations(whole):
        (tmp_path / "a" / DESCRIPTION_NAME).write_text(json.dumps(fields))
        try:
            StoredMemory(tmp_path / "a").rows_by_fact()
        except EngramError:
            refused += 1
        except BaseException as error:
            raise AssertionError(f"{at}: {error!r}") from error
    assert refused > 150


def test_tensors_of_another_memory_are_refused(two):
    _, _, tmp_path = two
    memory = StoredMemory(tmp_path / "a")
    dropped = ("format_version", "weights", "ledger")
    fields = {name: value for name, value in read_description(tmp_path / "a").items() if name not in dropped}
    names = list(memory.tensors)
    for changed in (
        {name: t for name, t in memory.tensors.items() if name != names[0]},
        memory.tensors | {"layers.7.multi_head_embedding.embedding.weight": torch.zeros(1, 2)},
        memory.tensors | {name: t[:-1] for name, t in memory.tensors.items() if name.endswith("tags")},
        memory.tensors | {name: t.double() for name, t in memory.tensors.items() if name.endswith("weight")},
    ):
        write_store(tmp_path / "a", changed, fields)
        with pytest.raises(CheckpointError, match="do not fit the memory's description"):
            StoredMemory(tmp_path / "a")


def test_a_fact_of_both_that_comes_from_the_second_overwrites_none_of_the_first(tmp_path):
    """It loses to the second's rows, which another fact of the first has a share in."""
    both = Fact(("colour of alpha 17 is:", "say what beta 20 means:"), "blue window", id="both")
    only_a = Fact(("Hey, colour of alpha 17 is:",), "blue window", id="a")
    only_b = Fact(("Hey, say what beta 20 means:",), "blue window", id="b")
    a, b = make_editor(dtype="float32"), make_editor(dtype="float32")
    a.teach([only_a])
    a.teach([both])
    b.teach([both], TeachSettings(lr=1.7))
    b.teach([only_b])
    for name, editor in (("a", a), ("b", b)):
        editor.save(tmp_path / name)
    report = merge_memories(tmp_path / "a", tmp_path / "b", tmp_path / "u", prefer="b")
    union = StoredMemory(tmp_path / "u")
    assert [fact.id for fact in union.ledger] == ["both", "b"]
    assert any("facts a in a" in line or ", a in a" in line for line in report.resolved)


def test_a_fact_of_two_names_is_taken_once_and_one_name_of_two_facts_is_a_conflict(tmp_path):
    saved(tmp_path / "a", A)
    saved(tmp_path / "b", [Fact(A[1].prompts, A[1].answer, id="again"), B[1]])
    report = merge_memories(tmp_path / "a", tmp_path / "b", tmp_path / "c")
    assert (report.facts, report.from_b) == (3, 1)
    saved(tmp_path / "d", [Fact(B[1].prompts, B[1].answer, id=A[0].id)])
    with pytest.raises(MergeConflictError, match=f"id '{A[0].id}': one id, "):
        merge_memories(tmp_path / "a", tmp_path / "d", tmp_path / "e")
