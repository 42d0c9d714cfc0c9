from hypothesis import given, settings
from hypothesis import strategies as st

from engram import Fact, load_facts
from engram.data.write_facts import facts_yaml

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.lists(TEXTS, min_size=1, max_size=3, unique=True), TEXTS, TEXTS, st.lists(TEXTS, max_size=2))))
def test_facts_that_are_written_are_read_back(tmp_path_factory, given_facts):
    facts = [
        Fact(
            (f"{number} {prompts[0]}", *(f"{number} {p}" for p in prompts[1:])),
            answer,
            category,
            tuple(held_out),
            f"id {number}",
        )
        for number, (prompts, answer, category, held_out) in enumerate(given_facts)
    ]
    file = tmp_path_factory.mktemp("facts") / "facts.yaml"
    file.write_text(facts_yaml(facts), encoding="utf-8")
    if facts:
        assert load_facts(file) == facts
