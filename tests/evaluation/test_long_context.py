import json
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from engram import DataError
from engram.data.long_context import RecallTask, make_example
from engram.data.long_context_words import Distraction, RecallWords
from engram.errors import ConfigError
from engram.evaluation import RecallAnswer, RecallScore, ask, measure_recall, recall_table, score_recall, wilson_interval
from engram.testing.tiny import tiny_memory, tiny_model, tiny_tokenizer

TEXTS = ["the memory is addressed by the last tokens of the text.\n" * 40]
TOKENIZER = tiny_tokenizer()


def examples(count=4, kind="needle", length=150):
    words, distraction = RecallWords(TOKENIZER, "test"), Distraction(TOKENIZER, TEXTS)
    return [make_example(RecallTask(kind, length - 3 * i), words, distraction, i) for i in range(count)]


def without_cache(model, example):
    """Log-probabilities of the answers, digit by digit, from one pass over the one text."""
    ids = TOKENIZER(example.text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        likely = model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
    offsets = TOKENIZER(example.text, return_offsets_mapping=True)["offset_mapping"]
    found = []
    for first, end in example.answers:
        own = [i for i, (a, b) in enumerate(offsets) if first <= a < b <= end]
        found.append((likely[[i - 1 for i in own], ids[0, own]].mean().item(), TOKENIZER.decode(ids[0, own])))
    return found


@pytest.mark.parametrize("model", [tiny_model(), tiny_model("gpt2"), tiny_memory()], ids=["llama", "gpt2", "memory"])
@pytest.mark.parametrize("kind", ["needle", "multi_query", "multi_value"])
def test_scores_are_those_of_a_plain_pass_over_each_text(model, kind):
    """Padding, batching and the cache change nothing; the answers' tokens are the right ones."""
    asked = examples(kind=kind, length=220)
    answers = score_recall(model, TOKENIZER, asked, batch_size=3)
    expected = [pair for example in asked for pair in without_cache(model, example)]
    assert [answer.expected for answer in answers] == [text for _, text in expected]
    assert [answer.log_probability for answer in answers] == pytest.approx([likely for likely, _ in expected], abs=1e-4)
    assert not any(answer.exact for answer in answers)
    assert all(1 <= answer.rank <= len(TOKENIZER) for answer in answers)


def test_exact_is_what_greedy_decoding_says():
    """A model that has learnt the ends of two of three texts by heart."""
    model, asked = tiny_model(seed=1).train(), examples(3, length=120)
    batch = TOKENIZER([example.text for example in asked[:2]], return_tensors="pt", padding=True)
    labels = batch["input_ids"].clone()
    labels[:, :-8] = -100  # padding is on the left
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(60):
        optimizer.zero_grad()
        model(**batch, labels=labels, use_cache=False).loss.backward()
        optimizer.step()
    model.eval()
    answers = score_recall(model, TOKENIZER, asked)
    assert [answer.exact for answer in answers] == [True, True, False]
    assert [answer.rank == 1 for answer in answers] == [True, True, False]
    assert min(answer.log_probability for answer in answers[:2]) > -0.5
    said = ask(model, TOKENIZER, [example.prompt for example in asked], max_new_tokens=4)
    assert [text.startswith(example.expected[0]) for text, example in zip(said, asked)] == [True, True, False]


def test_a_measurement_counts_every_answer_once():
    model, seen = tiny_model(), []
    result = measure_recall(model, TOKENIZER, TEXTS, ["needle", "multi_query"], [200, 230], examples=4, progress=seen.append)
    assert sum(seen) == 16
    overall = [score for score in result.scores if score.depth is None]
    assert [(s.kind, s.length, s.answers) for s in overall] == [
        ("needle", 200, 4),
        ("needle", 230, 4),
        ("multi_query", 200, 16),
        ("multi_query", 230, 16),
    ]
    parts = [score for score in result.scores if score.depth is not None and (score.kind, score.length) == ("needle", 200)]
    assert [(score.depth, score.answers) for score in parts] == [((i / 4, (i + 1) / 4), 1) for i in range(4)]
    assert sum(part.log_probability for part in parts) / 4 == pytest.approx(overall[0].log_probability)
    fields = result.to_dict()
    assert json.loads(json.dumps(fields)) == fields
    again = measure_recall(model, TOKENIZER, TEXTS, ["needle", "multi_query"], [200, 230], examples=4, batch_size=3)
    assert [s.log_probability for s in again.scores] == pytest.approx([s.log_probability for s in result.scores], abs=1e-4)
    table = recall_table({"one": fields, "two": fields})
    assert table.count("\n") == 10
    for name in ("one", "two"):
        assert f"\n| needle | 200 | 4 | 100.0 % | {name} | 0.0 % | 0.0-49.0 % |" in table
    assert [(score.chance, score.other_value) for score in overall] == [(1.0, None)] * 2 + [(pytest.approx(25 / 48), None)] * 2


def test_a_score_adds_up_its_answers():
    answers = [RecallAnswer("multi_key", 100, i / 10, "123", i < 8, -i / 10, 1 + i, 0.25, i == 8) for i in range(10)]
    score = RecallScore.of(answers)
    assert (score.exact, score.answers, score.share, score.rank) == (8, 10, 0.8, 5.5)
    assert (score.low, score.high) == wilson_interval(8, 10)
    assert score.log_probability == pytest.approx(-0.45)
    assert score.log_probability_error == pytest.approx(0.0957427, abs=1e-6)  # standard deviation 0.30277 over the root of 10
    assert (score.chance, score.other_value) == (0.25, 1)
    assert RecallScore.of([replace(answer, other_value=None) for answer in answers]).other_value is None


class Copies:
    """Says the first number that is noted, whichever is asked for."""

    def __init__(self, tokenizer):
        self.tokenizer, self.inner, self.config = tokenizer, tiny_model(), tiny_model().config
        self.generation_config = self.inner.generation_config

    def get_input_embeddings(self):
        return self.inner.get_input_embeddings()

    def forward(self, input_ids, past_key_values=None, use_cache=True, attention_mask=None):
        """Whole texts only: the cache is what was read before."""
        seen = input_ids if past_key_values is None else torch.cat([past_key_values, input_ids], dim=1)
        logits = torch.zeros(*input_ids.shape, len(self.tokenizer))
        for row, ids in enumerate(seen.tolist()):
            first = seen.shape[1] - input_ids.shape[1]
            for place in range(input_ids.shape[1]):
                logits[row, place, self._next(self.tokenizer.decode(ids[: first + place + 1], skip_special_tokens=True))] = 9.0
        return SimpleNamespace(logits=logits, past_key_values=seen)

    __call__ = forward

    def generate(self, input_ids, attention_mask, generation_config):
        for _ in range(generation_config.max_new_tokens):
            input_ids = torch.cat([input_ids, self.forward(input_ids).logits[:, -1:].argmax(-1)], dim=1)
        return input_ids

    def _next(self, text):
        number = re.search(r"= (\d+)\.", text).group(1) if re.search(r"= (\d+)\.", text) else "0"
        begun = re.search(r"recall: \w+ =( ?\d*)$", text)
        rest = f" {number}."[len(begun.group(1)) :] if begun else "."
        return self.tokenizer(rest, add_special_tokens=False)["input_ids"][0]


def test_numbers_that_were_copied_though_others_were_asked_for_are_counted():
    asked = examples(24, "tracking", 240)
    answers = score_recall(Copies(TOKENIZER), TOKENIZER, asked)
    noted = [re.search(r"= (\d+)\.", example.text).group(1) for example in asked]
    assert [answer.exact for answer in answers] == [first == example.expected[0] for first, example in zip(noted, asked)]
    score = RecallScore.of(answers)
    assert 0 < score.exact < 24
    assert score.other_value == 24 - score.exact
    assert score.chance == 0.25
    ignorant = score_recall(tiny_model(), TOKENIZER, asked[:2])
    assert [answer.other_value for answer in ignorant] == [False, False]
    needle = score_recall(Copies(TOKENIZER), TOKENIZER, examples(2))
    assert [(answer.exact, answer.other_value) for answer in needle] == [(True, None), (True, None)]


def test_results_that_do_not_say_their_chance_are_shown_with_that_of_their_defaults():
    """Those before chance was written down had two chains and one other value."""
    told = {"length": 100, "depth": None, "answers": 4, "exact": 2, "share": 0.5, "low": 0.1, "high": 0.9}
    scores = [{**told, "kind": kind, "log_probability": -1.0, "rank": 2.0} for kind in ("tracking", "multi_value")]
    table = recall_table({"one": {"scores": [*scores, {**scores[0], "chance": 0.25}]}})
    assert [line.split("|")[4].strip() for line in table.splitlines()[2:]] == ["50.0 %", "16.7 %", "25.0 %"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"kinds": ["needle", "hay"]}, "tasks: got hay, expected some of needle"),
        ({"kinds": []}, "tasks: got none"),
        ({"lengths": [100, 257, 999]}, "lengths: got 257, 999, expected at most 256"),
        ({"lengths": []}, "lengths: got none"),
        ({"examples": 0}, "examples: got 0"),
    ],
)
def test_impossible_measurements_are_refused(wrong, message):
    with pytest.raises(ConfigError, match=message):
        measure_recall(tiny_model(), TOKENIZER, TEXTS, **{"lengths": [200], **wrong})


def test_a_tokenizer_without_places_is_refused():
    class Slow:
        pad_token_id = 0

    with pytest.raises(DataError, match="load its fast version"):
        score_recall(tiny_model(), Slow(), examples(1))
