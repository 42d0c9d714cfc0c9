import pytest

from engram import DataError, Fact
from tests.editing.helpers import FACTS, make_editor


def test_every_hit_is_explained():
    editor = make_editor()
    editor.teach(FACTS)
    found = editor.why("KEY:beta 20")
    assert found.answer == "7319"
    assert list(found.facts) == ["beta"]
    assert found.facts["beta"] > 1
    speaking = [token for token in found.tokens if token.hits]
    said = "".join(token.says for token in speaking)
    assert said == " 7319" + editor.tokenizer.eos_token
    rows = sorted(row for token in speaking for hit in token.hits for row in hit.rows)
    assert rows == editor.rows_of("beta")["2"]
    for token in speaking:
        (hit,) = token.hits
        assert hit.facts == ["beta"]
        assert 0 < hit.gate[0] < 1
        assert token.kl > 0
    for token in found.tokens:
        if not token.hits and token.position < speaking[0].position:
            assert (token.logit_change, token.kl, token.says) == (0.0, pytest.approx(0, abs=1e-9), token.says_off)
    assert found.to_dict()["facts"] == found.facts
    assert all(editor.verify().values())  # explaining changes nothing


def test_a_prompt_nobody_taught():
    editor = make_editor()
    editor.teach(FACTS)
    found = editor.why("The memory", max_new_tokens=4)
    assert found.facts == {}
    assert not any(token.hits for token in found.tokens)


def test_rows_of_others_are_counted():
    facts = [Fact((f"KEY:one {n}",), f"{n * 37}", id=f"one{n}") for n in range(12)]
    editor = make_editor(engram_vocab_size=30)
    editor.teach(facts)
    found = editor.why("The memory is addressed by the last tokens of the text.", max_new_tokens=1)
    assert sum(token.foreign_rows for token in found.tokens) > 0
    assert not any(token.hits for token in found.tokens)


def test_an_answer_ends_where_the_context_does():
    editor = make_editor()
    context = editor.memory.config.max_position_embeddings
    prompt = "word " * context
    while len(editor.tokenizer(prompt)["input_ids"]) > context - 2:
        prompt = prompt[5:]
    found = editor.why(prompt, max_new_tokens=50)
    assert len(found.tokens) <= context
    with pytest.raises(DataError, match=rf"expected fewer than {context} \(the model's context\)"):
        editor.why("word " * context)


def test_the_longest_fact_is_said_to_its_end():
    editor = make_editor(max_ngram_size=64)
    fact = Fact(("KEY:list 4",), " ".join(f"{n * 37}" for n in range(12)), id="list")
    assert editor.teach([fact]).taught == ["list"]
    assert len(editor.facts[0].prompts[0].answer_ids) > 32
    assert editor.why("KEY:list 4").answer == fact.answer
    assert len(editor.why("KEY:list 4", max_new_tokens=3).answer) < len(fact.answer)
