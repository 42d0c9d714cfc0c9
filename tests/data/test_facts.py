import copy
import json

import pytest
import yaml
from tokenizers import processors

from engram import DataError, Fact, load_facts
from engram.data.facts import check_conflicts, encode_fact, join_answer, tokenize_prompt, tokenize_prompts
from engram.testing import tiny_tokenizer


def write(tmp_path, content):
    file = tmp_path / "facts.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


def test_a_good_file(tmp_path):
    file = write(
        tmp_path,
        '- {prompt: "ACRONYM:GPU", answer: "Graphics Processing Unit", category: acronym}\n'
        '- {prompts: ["PORT:SSH", "Which port does SSH use?"], answer: 22}\n',
    )
    assert load_facts(file) == [
        Fact(("ACRONYM:GPU",), "Graphics Processing Unit", "acronym"),
        Fact(("PORT:SSH", "Which port does SSH use?"), "22", "fact"),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "got nothing, expected a list"),
        ("a: 1", "got dict, expected a list"),
        ("- [1", "not valid YAML"),
        (b'- {prompt: "\xff", answer: a}', "not UTF-8"),
        ("- text", "entry 1: got str"),
        ("- {prompt: a, answer: b, extra: c}", "unknown key.*extra"),
        ("- {answer: b}", "got neither"),
        ("- {prompt: a, prompts: [a], answer: b}", "got both"),
        ("- {prompts: [], answer: b}", "must be a list"),
        ("- {prompts: [a, a], answer: b}", "listed twice"),
        ("- {prompt: a}", "'answer' is missing"),
        ("- {prompt: '  ', answer: b}", "'prompt' is empty"),
        ("- {prompt: a, answer: ''}", "'answer' is empty"),
        ("- {prompt: a, answer: [b]}", r"'answer' must be a text, got \['b'\]"),
        ("- {prompt: a, answer: b}\n- {prompt: a, answer: c}", "different answers: 'b' and 'c'"),
        ("- {prompt: a, answer: b}\n- {prompt: a, answer: b}", "occurs 2 times"),
    ],
)
def test_bad_files_say_what_is_wrong(tmp_path, content, message):
    with pytest.raises(DataError, match=message):
        load_facts(write(tmp_path, content))


def test_missing_file(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        load_facts(tmp_path / "none.yaml")
    with pytest.raises(DataError, match="cannot read"):
        load_facts(tmp_path)


def test_answers_follow_their_prompts():
    tokenizer = tiny_tokenizer()
    fact = Fact(("ACRONYM:GPU", "Q: GPU?\nA:\n"), "Graphics")
    first, second = encode_fact(tokenizer, fact, 3)
    assert tokenizer.decode(first.answer_ids) == " Graphics<|endoftext|>"
    assert tokenizer.decode(second.answer_ids) == "Graphics<|endoftext|>"
    assert list(first.prompt_ids) == tokenizer("ACRONYM:GPU")["input_ids"]
    assert first.ids == first.prompt_ids + first.answer_ids
    assert first.fact_index == 3
    assert join_answer("a ", "b") == "b"
    assert join_answer("a", "b") == " b"


def test_many_prompts_are_tokenised_as_one_by_one():
    tokenizer, prompts = tiny_tokenizer(), ["ACRONYM:GPU", "a", "Q: GPU?\nA:\n", ""]
    assert tokenize_prompts(tokenizer, prompts) == [tokenize_prompt(tokenizer, prompt) for prompt in prompts]
    assert tokenize_prompts(tokenizer, []) == []


def test_answers_too_long_for_the_context():
    with pytest.raises(DataError, match="expected at most 20"):
        encode_fact(tiny_tokenizer(), Fact(("ACRONYM:GPU",), "very " * 30), 0, max_length=20)


def test_conflicts_between_facts_from_anywhere():
    with pytest.raises(DataError, match="here: prompt 'a'"):
        check_conflicts([Fact(("a",), "1"), Fact(("b", "a"), "2")], "here")


def test_bundled_facts_are_many_and_sound():
    from engram.cli.demo import _FACTS

    facts = load_facts(_FACTS / "facts.yaml")
    assert len(facts) >= 150
    assert {f.category for f in facts} == {"acronym", "element_name", "element_number", "port", "http", "unit"}
    capitals = load_facts(_FACTS / "capitals.yaml")
    assert len({f.answer.rstrip(".") for f in capitals}) >= 100


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- {prompt: a, prompt: b, answer: c}\n", "the key 'prompt' is given twice"),
        ("[" * 50_000, "nested too deeply|not valid YAML"),
        ("- " * 5000 + "x", "nested too deeply"),
        ("templates: {t: {prompts: ['{x}']}}\nfacts: [{template: [t], x: a, answer: b}]\n", "'template' must be a text"),
        ("templates: {t: {prompts: [['{x}']]}}\nfacts: [{template: t, x: a, answer: b}]\n", "expected a text with it"),
        ("templates: {t: {prompts: ['{x}'], held_out: 'D:{x}'}}\nfacts: [{template: t, x: a, answer: b}]\n", "must be a list"),
    ],
)
def test_yaml_that_is_odd_is_one_error(tmp_path, text, message):
    (tmp_path / "f.yaml").write_text(text)
    with pytest.raises(DataError, match=message):
        load_facts(tmp_path / "f.yaml")


def test_brackets_in_texts_and_a_mapping_without_templates_are_fine(tmp_path):
    entries = "".join(f"  - {{prompt: 'a [ {n}', answer: '{{[('}}\n" for n in range(200))
    (tmp_path / "f.yaml").write_text(f"facts:\n{entries}")
    assert load_facts(tmp_path / "f.yaml")[199] == Fact(("a [ 199",), "{[(")


def test_a_template_has_any_places_and_facts_fill_all_of_them(tmp_path):
    file = tmp_path / "f.yaml"

    def load(prompt, fact, held_out="Name it: {x}"):
        template = {"prompts": [prompt], "held_out": [held_out]}
        file.write_text(yaml.safe_dump({"templates": {"t": template}, "facts": [{"template": "t", "answer": "a", **fact}]}))
        return load_facts(file)[0]

    several = load("Who was {role} of {x} in {year}?", {"role": "{x} king", "x": "{year}", "year": "1066"})
    assert several.prompts == ("Who was {x} king of {year} in 1066?",)  # each is filled once, whatever it is filled with
    assert several.held_out == ("Name it: {year}",)
    assert load("{country}?", {"country": "France"}, "{country}, again?").prompts == ("France?",)
    code = "f = {'{x}': 1, {y:02d}: {2}, { z }: {} }"  # no places: braces of code
    assert load(code, {"x": "key"}).prompts == (code.replace("{x}", "key"),)
    assert load("A {x} {y}", {"x": "1", "y": "{y}"}).prompts == ("A 1 {y}",)
    for prompt, fact, message in [
        ("A {x} {y}", {"x": "1"}, r"entry 1: template 't' has \{y\}, which .* key 'y' that the entry lacks; .* y: '\{y\}'"),
        ("A {x} {{y}}", {"x": "1"}, "has {y}"),
        ("A {x} {answer}", {"x": "1"}, r"'A \{x\} \{answer\}' has \{answer\}, and 'answer' is a key .* rename"),
        ("A {x}", {"x": "1", "y": "2"}, r"unknown key\(s\) y; expected answer, .*, x\."),
        ("A {x} {y}", {"x": "1", "y": ""}, "'y' is empty"),
        ("A {x}", {"x": "1", "prompt": "b"}, "no prompts of its own"),
    ]:
        with pytest.raises(DataError, match=message):
            load(prompt, fact)
    with pytest.raises(DataError, match=r"template 't' has \{y\}"):
        load("A {x}", {"x": "1"}, "And {x} {y}?")
    with pytest.raises(DataError, match=r"'x' fills \{x\}, but template 't' has none; it has \{y\}, \{z\}"):
        load("A {y}", {"x": "1", "y": "2", "z": "3"}, "{z}")


def test_facts_are_texts():
    for fields in ({"prompts": 5}, {"id": 5}, {"answer": "\ud800"}, {"prompts": ("\udcff",)}, {"held_out": None}):
        with pytest.raises(DataError, match="expected"):
            Fact(**{"prompts": ("a",), "answer": "b", **fields})


def test_answers_have_no_white_space_around_them():
    assert Fact(("x",), " yes sir\n").answer == "yes sir"
    assert Fact(("x",), " yes sir\n") == Fact(("x",), "yes sir")


def test_files_that_json_wrote_are_read_with_all_their_characters(tmp_path):
    entries = [{"prompt": "joy?", "answer": "\U0001f600 \u00e9 \\u00e9"}, {"prompt": "7", "answer": "1e3"}]
    file = tmp_path / "facts.json"
    file.write_text(json.dumps(entries))
    assert "\\ud83d\\ude00" in file.read_text()
    assert [(fact.prompts[0], fact.answer) for fact in load_facts(file)] == [(e["prompt"], e["answer"]) for e in entries]
    file.write_text('[{"prompt": "joy?", "answer": "\\ud83d"}]')
    with pytest.raises(DataError, match="not valid YAML"):
        load_facts(file)


def test_what_escapes_mean_elsewhere_is_left_as_it_is_written(tmp_path):
    (tmp_path / "facts.yaml").write_text("[{prompt: joy?, answer: \\ud83d\\ude00}]")
    assert load_facts(tmp_path / "facts.yaml")[0].answer == "\\ud83d\\ude00"


@pytest.mark.parametrize("template", ["$A <|endoftext|>", "<|endoftext|> $A <|endoftext|>"])
def test_a_tokenizer_that_ends_prompts_is_told_how_to_be_loaded(template):
    tokenizer = copy.deepcopy(tiny_tokenizer())
    end = tokenizer.eos_token
    tokenizer.bos_token = end
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single=template.replace("<|endoftext|>", end), special_tokens=[(end, tokenizer.eos_token_id)]
    )
    with pytest.raises(DataError, match="add_eos_token=False") as told:
        encode_fact(tokenizer, Fact(("ask",), "answer"), 0)
    assert ("add_bos_token=True" in str(told.value)) == (not template.startswith("$A"))
