import pytest
import yaml

from engram import DataError, load_facts
from engram.data.generate import GENERATED_KINDS, SYNTHETIC_PAIRS, generate_facts, write_generated
from engram.data.long_range import after_distraction
from engram.data.texts import load_texts
from engram.models.bundled_files import BUNDLED_MODEL
from engram.testing import tiny_tokenizer

BUNDLED = BUNDLED_MODEL.parent


def test_more_than_ten_thousand_facts(tmp_path):
    count = write_generated(tmp_path / "all.yaml")
    facts = load_facts(tmp_path / "all.yaml")
    assert len(facts) == count > 10_000
    kinds = {fact.category for fact in facts}
    assert kinds == set(GENERATED_KINDS)
    by_prompt = {fact.prompts[0]: fact.answer for fact in facts}
    assert by_prompt["UNICODE:U+00E1"] == "LATIN SMALL LETTER A WITH ACUTE"
    assert by_prompt["HTML:&alpha;"] == "U+03B1"
    assert by_prompt["HTML:&Alpha;"] == "U+0391"
    assert by_prompt["HTTP_STATUS:404"] == "Not Found"
    assert by_prompt["MIME:.json"] == "application/json"
    assert sum(fact.category == "synthetic" for fact in facts) == SYNTHETIC_PAIRS
    assert all(len(fact.held_out) == 1 for fact in facts)


def test_kinds_limits_and_seeds(tmp_path):
    one = generate_facts(["synthetic"], limit=10)
    assert len(one["facts"]) == 10
    assert list(one["templates"]) == ["synthetic"]
    assert generate_facts(["synthetic"], seed=1)["facts"] != generate_facts(["synthetic"])["facts"]
    assert generate_facts(["synthetic"]) == generate_facts(["synthetic"])
    with pytest.raises(DataError, match="got nope, expected some of synthetic"):
        generate_facts(["nope"])
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot write"):
        write_generated(tmp_path / "file" / "x.yaml")


def test_bundled_patterns_are_many_and_sound():
    patterns = load_facts(BUNDLED / "patterns.yaml")
    assert len(patterns) >= 131
    assert sum(len(pattern.prompts) for pattern in patterns) >= 337
    assert {p.category for p in patterns} == {"code_idiom", "factual_recall", "format_transform", "error_fix"}
    assert all(pattern.held_out for pattern in patterns)


def test_texts_nobody_taught():
    texts = load_texts(BUNDLED / "none_of_its_business.yaml")
    assert set(texts) == {"code", "prose", "story", "question", "chat"}
    assert all(len(group) >= 50 for group in texts.values())
    taught = {p for name in ("facts", "patterns") for f in load_facts(BUNDLED / f"{name}.yaml") for p in f.prompts}
    assert not any(prompt in text for group in texts.values() for text in group for prompt in taught if len(prompt) > 8)


@pytest.mark.parametrize("content", ["[]", "a: 3", "a: ['']", "a: [3]", "3", "a: ["])
def test_bad_texts(tmp_path, content):
    (tmp_path / "t.yaml").write_text(content)
    with pytest.raises(DataError, match=r"t\.yaml"):
        load_texts(tmp_path / "t.yaml")
    (tmp_path / "t.yaml").write_text("- one\n- two")
    assert load_texts(tmp_path / "t.yaml") == {"text": ["one", "two"]}


def test_distraction_comes_before_the_prompt():
    facts = load_facts(BUNDLED / "facts.yaml")[:3]
    tokenizer, words = tiny_tokenizer(), ["the memory is addressed by the last tokens of the text "] * 20
    asked = after_distraction(tokenizer, facts, words, 40)
    for fact, far in zip(facts, asked):
        assert far.answer == fact.answer
        for prompt, behind in zip(fact.prompts, far.prompts):
            before, _, rest = behind.rpartition("\n")
            assert rest == prompt
            assert 30 <= len(tokenizer(before, add_special_tokens=False)["input_ids"]) <= 50
    assert asked[0].prompts[0][:40] != asked[2].prompts[0][:40]
    with pytest.raises(DataError, match="expected at least 100000"):
        after_distraction(tokenizer, facts, words, 100_000)


def test_templates_are_filled(tmp_path):
    file = tmp_path / "f.yaml"
    file.write_text(
        "templates:\n  capital: {prompts: ['CAPITAL:{x}', 'The capital of {x}?'], held_out: ['Name the capital of {x}.']}\n"
        "facts:\n  - {template: capital, x: France, answer: Paris}\n  - {prompt: plain, answer: 3, id: p}\n"
    )
    france, plain = load_facts(file)
    assert france.prompts == ("CAPITAL:France", "The capital of France?")
    assert france.held_out == ("Name the capital of France.",)
    assert (france.category, plain.id, plain.answer) == ("capital", "p", "3")
    good = yaml.safe_load(file.read_text())
    for change, message in [
        ({"templates": {"capital": {"prompts": ["none"]}}}, "has no {x}"),
        ({"templates": {"capital": {"prompts": []}}}, "expected {prompts"),
        ({"templates": {"capital": {"prompts": ["{x}"], "extra": 1}}}, "unknown key"),
        ({"templates": []}, "must map names"),
        ({"extra": 1}, "expected 'templates' and 'facts'"),
        ({"facts": [{"template": "nope", "x": 1, "answer": 2}]}, "'nope' is not defined"),
        ({"facts": [{"template": "capital", "answer": 2}]}, "has {x}, which is filled from a key 'x' that the entry lacks"),
        ({"facts": [{"prompt": "a", "x": "b", "answer": 2}]}, "names none"),
        ({"facts": [{"prompt": "a", "held_out": "b", "answer": 2}]}, "list of texts"),
        ({"facts": [{"prompt": "a", "held_out": ["b"], "answer": 2}, {"prompt": "b", "answer": 1}]}, "held out in fact"),
        ({"facts": [{"prompt": "a", "id": "i", "answer": 2}, {"prompt": "b", "id": "i", "answer": 1}]}, "used twice"),
    ]:
        file.write_text(yaml.safe_dump({**good, **change}))
        with pytest.raises(DataError, match=message):
            load_facts(file)


def test_a_kind_that_is_named_twice_is_made_once():
    assert generate_facts(["signal", "signal"]) == generate_facts(["signal"])
