"""Between the text that people write and the ids that rows are found by stands the tokenizer."""

import copy

import pytest
from tokenizers import normalizers, pre_tokenizers, processors

from engram import Fact, MemoryEditor
from engram.data import with_chat_prompts
from engram.editing import Ledger
from engram.evaluation import check_facts
from engram.testing import tiny_model, tiny_tokenizer
from tests.editing.helpers import FACTS, make_editor, same, tensors


def other_tokenizer(what):
    """Of the same vocabulary, with other ids for the same text."""
    tokenizer = copy.deepcopy(tiny_tokenizer())
    backend = tokenizer.backend_tokenizer
    if what == "space in front":
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    elif what == "no token in front":
        backend.post_processor = processors.ByteLevel()
    elif what == "token at the end":
        backend.post_processor = processors.TemplateProcessing("$A <|endoftext|>", special_tokens=[("<|endoftext|>", 0)])
    else:
        tokenizer.add_tokens(["KEY"])
    return tokenizer


def folding_editor():
    """Its tokenizer writes compatible signs as one and has a special token of its own."""
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    model = tiny_model(hidden_size=64, intermediate_size=96, vocab_size=len(tokenizer))
    return MemoryEditor.create(model, tokenizer)


def test_answers_that_would_not_be_read_as_written_are_refused_one_by_one():
    editor = folding_editor()
    facts = [
        Fact(("Limit of pump B",), "40 ℃", id="folded"),
        Fact(("Sign of a turn is",), "<|turn|> here", id="special"),
        FACTS[1],
        Fact(("Gap of seal C",), "½ inch", id="half"),
    ]
    report = editor.teach(facts)
    assert report.taught == ["beta"]
    assert report.not_exact.keys() == {"folded", "special", "half"}
    assert "its answer '40 ℃' comes back from the tokenizer as '40 °C'" in report.not_exact["folded"]
    assert "comes back from the tokenizer as 'here'" in report.not_exact["special"]
    assert [answer.exact for answer in check_facts(editor.memory, editor.tokenizer, facts[2:3])] == [True]
    assert all(editor.verify().values())


def test_an_answer_that_would_not_be_read_replaces_nothing():
    editor = folding_editor()
    editor.teach(FACTS)
    before = tensors(editor)
    report = editor.teach([Fact(FACTS[1].prompts, "40 ℃", id="new")], replace_answers=True)
    assert "40 °C" in report.not_exact["new"]
    assert "what the memory said before is kept" in report.not_exact["new"]
    assert same(tensors(editor), before)
    assert [fact.answer for fact in editor.facts] == [fact.answer for fact in FACTS]


def test_an_answer_that_older_versions_took_is_not_exact():
    editor = folding_editor()
    editor.teach(FACTS[1:2])
    ledger = copy.deepcopy(editor.memory.ledger)
    ledger["facts"][0]["answer"] = "⑦319"
    editor.memory.ledger = ledger
    assert editor.verify() == {"beta": False}


@pytest.mark.parametrize("what", ["space in front", "no token in front", "token at the end", "more tokens"])
def test_prompts_that_a_tokenizer_splits_otherwise_are_wrong_and_taught_again(what):
    model = tiny_model(hidden_size=64, intermediate_size=96, vocab_size=len(tiny_tokenizer()) + 8)
    editor = MemoryEditor.create(model, tiny_tokenizer())
    editor.teach(FACTS)
    other = MemoryEditor(editor.memory, other_tokenizer(what))
    stale = [fact_id for fact_id, exact in other.verify().items() if not exact]
    assert stale
    if what == "token at the end":  # which ends answers: nothing can be taught so
        return
    report = other.teach(FACTS)
    assert sorted(report.taught) == sorted(stale)
    assert sorted(report.already_known) == sorted({fact.id for fact in FACTS} - set(stale))
    assert all(other.verify().values())
    asked = check_facts(other.memory, other.tokenizer, FACTS)
    assert all(answer.exact for answer in asked)
    for layer in other.memory.engrams:  # the old rows have left
        owned = {row for fact in FACTS for row in other.rows_of(fact.id)[layer]}
        assert owned == set(other.table(layer).row_ids.tolist())


def test_facts_that_are_fine_stay_known_chat_turns_among_them(tmp_path):
    editor = make_editor()
    editor.tokenizer = copy.deepcopy(editor.tokenizer)
    editor.tokenizer.chat_template = "{{ bos_token }}User: {{ messages[0]['content'] }}\nBot:"
    facts = with_chat_prompts(editor.tokenizer, FACTS[:2])
    editor.teach(facts)
    editor.save(tmp_path / "m")
    loaded = MemoryEditor.load(tiny_model(hidden_size=64, intermediate_size=96), tmp_path / "m", tiny_tokenizer())
    assert loaded.verify() == {"alpha": True, "beta": True}
    report = loaded.teach(facts)
    assert (report.already_known, report.taught) == (["alpha", "beta"], [])
    assert len(Ledger.from_dict(loaded.memory.ledger)) == 2


def test_facts_that_speak_at_the_start_of_an_input_only_are_listed():
    editor = make_editor()
    facts = [
        Fact(("Phone",), "12", id="one word"),
        Fact(("Where in the long green house is the key of alpha 17 kept?",), "box", id="long"),
    ]
    report = editor.teach(facts)
    assert report.at_start_only == ["one word"]
    inside = [Fact((f"Tell me now. {fact.prompts[0]}",), fact.answer) for fact in facts]
    assert [answer.exact for answer in check_facts(editor.memory, editor.tokenizer, inside)] == [False, True]


def test_prompts_that_are_the_same_tokens_are_said_to_be():
    """As with a tokenizer that has one token for all it does not know."""
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer._tokenizer.normalizer = normalizers.Replace("%", "#")
    editor = MemoryEditor.create(tiny_model(), tokenizer)
    prompts = {"h": "Sign #?", "p": "Sign %?"}
    report = editor.teach([Fact((prompt,), fact_id, id=fact_id) for fact_id, prompt in prompts.items()])
    [taught], [(refused, reason)] = report.taught, report.not_exact.items()
    assert {taught, refused} == prompts.keys()
    assert reason == (
        f"the tokenizer makes the same tokens of its prompt and of {prompts[taught]!r}; ask in words that it tells apart"
    )


@pytest.mark.parametrize("ends", [None, 7, [7, 9]])
def test_a_model_that_ends_elsewhere_is_told_of_once(caplog, ends):
    editor = make_editor()
    with caplog.at_level("WARNING", logger="engram"):
        editor.teach(FACTS[:1])
        assert caplog.records == []
        editor.memory.base_model.generation_config.eos_token_id = ends
        editor.teach(FACTS[1:2])
        editor.teach(FACTS[2:3])
    [told] = caplog.records
    assert f"generate() does not stop (generation_config.eos_token_id: {ends})" in told.getMessage()
    editor = make_editor()
    editor.memory.base_model.generation_config.eos_token_id = [7, editor.tokenizer.eos_token_id]
    editor.teach(FACTS[:1])
    assert len(caplog.records) == 1
