"""Answers whose tokens the model cannot tell from others."""

import pytest
import torch

from engram import Fact, MemoryEditor, load_bundled
from engram.editing.spelling import Speller
from engram.evaluation import check_facts
from engram.testing import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def bundled():
    return load_bundled()


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_tokens_that_the_model_never_met_are_spelt_in_smaller_ones(bundled):
    model, tokenizer = bundled
    answers = [ids_of(tokenizer, text) for text in (" LETTER DZZHE", " LETTER SMALL", " the aaaaaaaa")]
    spelt = Speller(model, tokenizer).spell(answers)
    assert tokenizer.convert_ids_to_tokens(spelt[0])[-3:] == ["Z", "Z", "HE"]
    assert spelt[1] == tuple(answers[1])
    assert [tokenizer.decode(ids) for ids in spelt] == [" LETTER DZZHE", " LETTER SMALL", " the aaaaaaaa"]


def test_such_answers_are_taught_exactly(bundled):
    model, tokenizer = bundled
    facts = [
        Fact(("UNICODE:U+052A",), "CYRILLIC CAPITAL LETTER DZZHE", id="dzzhe"),
        Fact(("CODE:x1",), "aaaaaaaa aaaaaaaa aaaaaaaa PPPP", id="repeated"),  # 7 tokens, spelt in more
    ]
    editor = MemoryEditor.create(model, tokenizer)
    try:
        assert editor.teach(facts).not_exact == {}
        assert all(answer.exact for answer in check_facts(editor.memory, tokenizer, facts))
        assert editor.teach(facts).already_known == ["dzzhe", "repeated"]
    finally:
        editor.memory.unload()


def test_what_cannot_be_spelt_otherwise_is_named(bundled):
    model, tokenizer = bundled
    editor = MemoryEditor.create(model, tokenizer)
    try:
        reason = editor.teach([Fact(("KEY:beep of the terminal",), "\x07\x08\x07", id="beep")]).not_exact["beep"]
    finally:
        editor.memory.unload()
    assert "tokens that the model cannot tell from others" in reason


def test_rows_that_are_alike_are_found_without_training_text():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    answer = ids_of(tokenizer, "blue window")
    assert Speller(model, tokenizer).unsayable(answer) == []
    with torch.no_grad():
        rows = model.get_output_embeddings().weight
        rows[answer[0]] = rows[answer[0] + 1]
    assert Speller(model, tokenizer).unsayable(answer) == answer[:1]


def test_a_model_without_output_embeddings_is_taken_to_say_everything(bundled):
    model, tokenizer = bundled
    speller = Speller(model.model, tokenizer)
    assert speller.spell([[1, 2], [3]]) == [(1, 2), (3,)]
    assert speller.unsayable([1, 2]) == []
