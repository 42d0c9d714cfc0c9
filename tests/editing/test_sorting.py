"""A lesson beside a memory: what is known, joined, contradicted and new."""

from hypothesis import given, settings
from hypothesis import strategies as st

from engram import Fact
from engram.editing.keys import KeyedPrompt
from engram.editing.ledger import Ledger, LedgerFact
from engram.editing.sorting import in_parts, sort_out


def held(name, answer, *prompts):
    return LedgerFact(name, answer, "fact", tuple(KeyedPrompt(text, (1,), (2,)) for text in prompts))


def fact(name, answer, *prompts):
    return Fact(prompts, answer, id=name)


def outcome(ledger, *facts):
    found = sort_out(Ledger(ledger), facts)
    return {name: (new.answer, set(new.prompts)) for name, new in found.new.items()}, found


def test_a_fact_whose_holder_must_leave_is_not_known():
    new, found = outcome([held("A", "X", "p1", "p2")], fact("f", "X", "p1"), fact("g", "Y", "p2"))
    assert new == {"f": ("X", {"p1"}), "g": ("Y", {"p2"})}
    assert (found.already_known, found.leaving["g"]) == ([], ["A"])
    assert "go too" not in found.contradictions[0]


def test_of_two_that_replace_one_the_first_has_its_name():
    lesson = [Fact(("p1",), "Y"), Fact(("p2",), "Z")]
    new, _ = outcome([held("A", "X", "p1", "p2")], *lesson)
    assert new == {"A": ("Y", {"p1"}), lesson[1].id: ("Z", {"p2"})}


def test_long_texts_are_cut_where_they_are_told():
    long = "0 919 838 " * 50
    _, found = outcome([held("A", long, "p1")], fact("f", "no", "p1"))
    assert found.contradictions == [f"'p1' is '{long[:60]}...{long[-15:]}' in the memory (fact A), 'no' now"]


def test_facts_that_share_holders_are_one():
    ledger = [held("A", "X", "p1"), held("B", "X", "p2", "p4")]
    new, found = outcome(ledger, fact("f", "X", "p1", "p2", "p3"), fact("g", "X", "p4", "p5"))
    assert new == {"A": ("X", {"p1", "p2", "p3", "p4", "p5"})}
    assert found.joined == {"f": "A", "g": "A", "B": "A"}
    assert sorted(found.leaving["A"]) == ["A", "B"]


def test_other_answers_are_never_joined():
    new, found = outcome([held("k", "X", "p1")], fact("k", "Y", "q"), fact("z", "X", "p1", "p2"))
    assert new == {"k": ("Y", {"q"}), "z": ("X", {"p1", "p2"})}
    assert len(found.contradictions) == 1
    new, _ = outcome([held("A", "X", "p1", "p2")], fact("f", "X", "p1", "p3"), fact("g", "Y", "p2"))
    assert new == {"f": ("X", {"p1", "p3"}), "g": ("Y", {"p2"})}


def test_what_is_held_but_no_longer_answered_is_taught_again():
    ledger = Ledger([held("A", "X", "p1", "p2"), held("B", "Y", "q")])
    lesson = [fact("f", "X", "p1"), fact("g", "Y", "q")]
    assert sort_out(ledger, lesson).holding == ["A", "B"]
    found = sort_out(ledger, lesson, stale=["A"])
    assert found.already_known == ["g"]
    assert {name: set(new.prompts) for name, new in found.new.items()} == {"A": {"p1", "p2"}}
    assert found.leaving == {"A": ["A"]}


def test_parts_of_a_long_lesson_do_what_the_whole_would():
    ledger = Ledger([held("A", "X", "p1", "p2"), held("B", "Y", "q")])
    lesson = [fact("f", "X", "p1"), fact("n1", "Z", "r1"), fact("n2", "Z", "r2"), fact("g", "Y", "p2"), fact("n3", "Z", "r3")]
    parts = in_parts(ledger, lesson, 1)  # apart, the first would find p1 known, and g would then take A away whole
    assert [[f.id for f in part] for part in parts] == [["f", "g"], ["n1"], ["n2"], ["n3"]]
    assert [len(part) for part in in_parts(ledger, lesson, 3)] == [3, 2]
    assert in_parts(ledger, lesson, 100) == [[lesson[0], lesson[3], lesson[1], lesson[2], lesson[4]]]
    many = [fact(f"n{n}", "Z", f"r{n}") for n in range(20_000)]  # groups are found in one walk
    assert sum(map(len, in_parts(ledger, many, 1000))) == 20_000


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_afterwards_every_prompt_has_the_answer_of_the_lesson_and_one_owner(data):
    prompts = [f"p{n}" for n in range(7)]

    def some(names):
        free, facts = list(prompts), []
        for name in names:
            chosen = data.draw(st.lists(st.sampled_from(free), min_size=1, max_size=3, unique=True)) if free else []
            free = [p for p in free if p not in chosen]
            if chosen:
                facts.append((name, data.draw(st.sampled_from("XY")), chosen))
        return facts

    before = [held(name, answer, *texts) for name, answer, texts in some("ABC")]
    lesson = [fact(name, answer, *texts) for name, answer, texts in some(data.draw(st.permutations("ABCdef")))]
    if not lesson:
        return
    found = sort_out(Ledger(before), lesson)
    gone = {name for names in found.leaving.values() for name in names}
    after = [h.to_fact() for h in before if h.id not in gone] + list(found.new.values())
    assert len({f.id for f in after}) == len(after)
    owners = [(text, f) for f in after for text in f.prompts]
    assert len({text for text, _ in owners}) == len(owners)
    answers = {text: f.answer for text, f in owners}
    assert all(answers[text] == f.answer for f in lesson for text in f.prompts)
    opposed = {
        h.id
        for h in before
        for f in lesson
        if h.answer != f.answer and (h.id == f.id or {p.text for p in h.prompts} & set(f.prompts))
    }
    kept = [h for h in before if h.id not in opposed]
    assert all(answers[p.text] == h.answer for h in kept for p in h.prompts)
    assert bool(found.contradictions) == bool(opposed)
