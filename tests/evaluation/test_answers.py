"""Asking: nothing of the checkpoint's own generation defaults counts, and no prompt runs into the end of the context."""

import pytest
import torch

from engram import DataError, Fact, MemoryEditor
from engram.evaluation import ask, bits_per_byte, check_facts, evaluate_memory, measure_drift, measure_gains, trace_text
from engram.evaluation.answers import _batches
from engram.testing import tiny_memory, tiny_model, tiny_tokenizer

LONG = Fact(("DOOR:garden",), "0123456789 0123456789 0123456789", id="long")
TEXT = "the text of the memory " * 60


def of_tokens(count, end):
    """A prompt of so many tokens."""
    text = end
    while len(tiny_tokenizer()(text)["input_ids"]) < count:
        text = "~" + text
    assert len(tiny_tokenizer()(text)["input_ids"]) == count
    return text


@pytest.fixture(scope="module")
def learnt():
    """A memory on a model with learnt positions, taught a long answer and one at the end of the context."""
    editor = MemoryEditor.create(tiny_model("gpt2"), tiny_tokenizer(), max_ngram_size=64)
    facts = [
        LONG,
        Fact((of_tokens(248, "DOOR:attic"),), "12", id="far"),
        Fact((of_tokens(251, "DOOR:shed"),), "7", id="further"),
    ]
    assert not editor.teach(facts).not_exact
    return editor, facts


@pytest.mark.parametrize(
    "defaults",
    [
        {"no_repeat_ngram_size": 2},
        {"repetition_penalty": 5.0},
        {"num_beams": 3, "length_penalty": -5.0},
        {"suppress_tokens": list(range(10, 300))},
        {"begin_suppress_tokens": list(range(10, 300))},
        {"bad_words_ids": [[token] for token in range(10, 300)]},
        {"sequence_bias": [[[token], -100.0] for token in range(10, 300)]},
        {"min_new_tokens": 60},
        {"max_length": 3},
        {"forced_eos_token_id": 5, "eos_token_id": 7},
        {"do_sample": True, "temperature": 50.0},
    ],
    ids=lambda defaults: next(iter(defaults)),
)
def test_answers_are_greedy_whatever_the_checkpoint_prefers(learnt, defaults):
    editor, _ = learnt
    config = editor.memory.generation_config
    before = config.to_dict()
    try:
        for name, value in defaults.items():
            setattr(config, name, value)
        asked = config.to_dict()
        assert ask(editor.memory, editor.tokenizer, LONG.prompts, 50) == [LONG.answer]
        assert editor.why(LONG.prompts[0]).answer == LONG.answer
        assert config.to_dict() == asked
    finally:
        for name in defaults:
            setattr(config, name, before[name])


def test_a_prompt_near_the_end_of_the_context_takes_nothing_from_the_others(learnt):
    editor, facts = learnt
    assert [answer.said for answer in check_facts(editor.memory, editor.tokenizer, facts)] == [
        "0123456789 " * 2 + "0123456789",
        "12",
        "7",
    ]
    long = of_tokens(256, "DOOR:roof")
    with pytest.raises(DataError, match=r"prompt '~~~.*got 256 tokens, expected fewer than 256 \(the model's context\)"):
        ask(editor.memory, editor.tokenizer, ["DOOR:garden", long])


def test_rotary_models_answer_beyond_the_length_of_their_training():
    memory = tiny_memory(tiny_model())
    said = ask(memory, tiny_tokenizer(), [of_tokens(300, "DOOR:roof"), "DOOR:garden"], 4)
    assert said[1] == ask(memory, tiny_tokenizer(), ["DOOR:garden"], 4)[0]
    assert len(trace_text(memory, tiny_tokenizer(), of_tokens(300, "DOOR:roof")).tokens) == 300


def test_batches_are_of_one_room():
    encoded = [[0] * length for length in (9, 2, 5, 9, 3, 8)]
    assert list(_batches(encoded, [1, 4, 4, 1, 4, 2], 2)) == [[1, 4], [2], [5], [0, 3]]
    assert list(_batches(encoded, [4] * 6, 4)) == [[1, 4, 2, 5], [0, 3]]


def test_long_texts_are_measured_as_far_as_the_context_goes(learnt):
    editor, facts = learnt
    result = evaluate_memory(editor.memory, editor.tokenizer, facts, {"prose": [TEXT]})
    assert result.latency["ratio"] > 0
    with pytest.raises(DataError, match=r"text 'the text of the memory .*expected at most 256"):
        trace_text(editor.memory, editor.tokenizer, TEXT)


MEASURES = {
    "ask": lambda memory, tokenizer, texts: ask(memory, tokenizer, texts, max_new_tokens=8),
    "measure_drift": lambda memory, tokenizer, texts: measure_drift(memory, tokenizer, texts),
    "bits_per_byte": lambda memory, tokenizer, texts: bits_per_byte(memory, tokenizer, texts),
    "measure_gains": lambda memory, tokenizer, texts: measure_gains(memory, tokenizer, texts),
    "trace_text": lambda memory, tokenizer, texts: trace_text(memory, tokenizer, texts[0]).to_dict(),
}


@pytest.mark.parametrize("measure", MEASURES)
def test_measures_are_of_a_model_that_is_not_being_trained(measure):
    memory = tiny_memory(tiny_model("gpt2"))
    for module in memory.base_model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    expected = MEASURES[measure](memory.eval(), tiny_tokenizer(), ["CAPITAL:France", "one two"])
    memory.train()
    memory.base_model.lm_head.eval()
    modes = [module.training for module in memory.modules()]
    assert MEASURES[measure](memory, tiny_tokenizer(), ["CAPITAL:France", "one two"]) == expected
    assert [module.training for module in memory.modules()] == modes


@pytest.mark.parametrize("measure", ["ask", "measure_drift", "bits_per_byte", "measure_gains"])
def test_one_text_in_place_of_several_is_refused(measure):
    with pytest.raises(DataError, match=rf"{measure}: got one text, expected a list of them; write \[text\]"):
        MEASURES[measure](tiny_memory(), tiny_tokenizer(), "abc")


class WithoutBeginning:
    """A tokenizer that adds no token of its own, as GPT-2's."""

    def __init__(self):
        self.tokenizer = tiny_tokenizer()

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def __call__(self, text, **options):
        return self.tokenizer(text, **{"add_special_tokens": False, **options})


def test_an_empty_text_without_any_token_is_one_clear_error_or_nothing():
    memory, tokenizer = tiny_memory(), WithoutBeginning()
    with pytest.raises(DataError, match="prompt 2 is empty and this tokenizer begins with no token"):
        ask(memory, tokenizer, ["a", ""])
    with pytest.raises(DataError, match="got an empty text, and this tokenizer begins with no token"):
        trace_text(memory, tokenizer, "")
    assert measure_drift(memory, tokenizer, ["", "ab"]).tokens == measure_drift(memory, tokenizer, ["ab"]).tokens > 0
    assert measure_drift(memory, tokenizer, [""]).untouched == 1.0
