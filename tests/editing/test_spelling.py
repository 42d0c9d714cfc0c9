"""Answers whose tokens the model cannot tell from others."""

from types import SimpleNamespace

import pytest
import torch

from engram import Fact, MemoryEditor, TeachSettings, load_bundled
from engram.editing import spelling
from engram.editing.entries import make_entries
from engram.editing.spelling import Speller
from engram.evaluation import check_facts
from engram.testing import tiny_model, tiny_tokenizer
from tests.editing.helpers import FACTS


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
    assert r"may not be able to tell from others ('\x07', '\x08'): put it in other words" in reason


def test_the_rest_of_an_answer_is_spelt_beside_what_cannot_be(bundled):
    model, tokenizer = bundled
    answer = [*ids_of(tokenizer, " DZZHE \x07"), tokenizer.eos_token_id]
    (spelt,) = Speller(model, tokenizer).spell([answer])
    assert tokenizer.convert_ids_to_tokens(spelt)[:4] == [*tokenizer.convert_ids_to_tokens(answer)[:1], "Z", "Z", "HE"]
    assert tokenizer.decode(spelt) == tokenizer.decode(answer)
    assert tokenizer.eos_token_id not in Speller(model, tokenizer).unsayable(answer)


def test_an_answer_that_would_leave_the_reach_or_the_context_keeps_its_tokens(bundled):
    model, tokenizer = bundled
    editor = MemoryEditor.create(model, tokenizer, max_ngram_size=8)
    try:
        facts = [Fact(("CODE:x1 and more of it",), "aaaaaaaa PPPP")]
        (entry,) = make_entries(editor.memory, tokenizer, Speller(model, tokenizer), facts, [], TeachSettings())
        assert entry.prompts[0].answer_ids[:-1] == tuple(ids_of(tokenizer, " aaaaaaaa PPPP"))
    finally:
        editor.memory.unload()


def test_rows_that_are_alike_are_found_without_training_text():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    answer = ids_of(tokenizer, "blue window")
    assert Speller(model, tokenizer).unsayable(answer) == []
    with torch.no_grad():
        rows = model.get_output_embeddings().weight
        rows[answer[0]] = rows[answer[0] + 1]
    assert Speller(model, tokenizer).unsayable(answer) == answer[:1]


@pytest.mark.parametrize("head", ["none", "wrapped", "packed", "offloaded"])
def test_a_model_whose_output_rows_cannot_be_seen_is_taken_to_say_everything(head):
    model, tokenizer = tiny_model(), tiny_tokenizer()
    rows = model.get_output_embeddings().weight.detach()
    heads = {
        "none": None,
        "wrapped": torch.nn.Sequential(torch.nn.Linear(2, 2)),
        "packed": SimpleNamespace(weight=rows.to(torch.uint8)),
        "offloaded": SimpleNamespace(weight=rows.to("meta")),
    }
    speller = Speller(SimpleNamespace(get_output_embeddings=lambda: heads[head]), tokenizer)
    assert speller.spell([[1, 2], [3]]) == [(1, 2), (3,)]
    assert speller.unsayable([1, 2]) == []


def test_distances_in_parts_are_those_of_the_whole(monkeypatch):
    rows = torch.randn(70, 5, generator=torch.Generator().manual_seed(0))
    expected = torch.cdist(rows, rows).fill_diagonal_(float("inf")).min(dim=1).values
    monkeypatch.setattr(spelling, "_ROWS_AT_ONCE", 16)
    monkeypatch.setattr(spelling, "_BLOCK", 8)
    torch.testing.assert_close(spelling._nearest(rows, torch.arange(70)), expected)


def test_a_vocabulary_that_grew_is_looked_at_again():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    speller = Speller(model, tokenizer)
    assert speller.unsayable([5]) == []
    model.resize_token_embeddings(len(model.get_output_embeddings().weight) + 8)
    with torch.no_grad():
        rows = model.get_output_embeddings().weight
        rows[5] = rows[6]
    assert speller.unsayable([5]) == [5]


def test_a_model_that_cannot_end_an_answer_is_said_to_be_one():
    """Embeddings that are tied, with a row of zeros for padding, which ends answers too."""
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight[tiny_tokenizer().eos_token_id] = 0
    report = MemoryEditor.create(model, tiny_tokenizer()).teach(FACTS[:1], TeachSettings(max_steps=4, retries=0))
    assert "the model cannot end an answer" in report.not_exact[FACTS[0].id]
