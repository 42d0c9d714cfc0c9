from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from engram import DataError
from engram.data.corpus import Document
from engram.data.long_context import RECALL_TASKS, RecallTask, chance_of, make_example
from engram.data.long_context_mix import RecallMix, long_context_mix
from engram.data.long_context_words import Distraction, RecallWords
from engram.data.packing import pack
from engram.errors import ConfigError
from engram.models.bundled import load_tokenizer
from engram.testing.tiny import tiny_tokenizer

TEXTS = [
    "The river ran past the mill, and nobody counted the stones.\nA second line of it.\n" * 40,
    "def f(x):\n    return x\n" * 60,
]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("bundled")


@pytest.fixture(scope="module")
def distraction(tokenizer):
    return Distraction(tokenizer, TEXTS)


@pytest.fixture(scope="module")
def words(tokenizer):
    return RecallWords(tokenizer, "test")


@pytest.fixture
def made(words, distraction):
    def make(seed=0, **task):
        return make_example(RecallTask(**task), words, distraction, seed)

    return make


@pytest.mark.parametrize("kind", RECALL_TASKS)
@pytest.mark.parametrize("length", [160, 300])
def test_an_example_is_as_long_as_asked_and_has_its_answers_in_its_notes(tokenizer, made, kind, length):
    for seed in range(8):
        example = made(seed, kind=kind, length=length)
        assert length - 12 <= len(tokenizer(example.text)["input_ids"]) <= length
        task = RecallTask(kind)
        assert len(example.answers) == len(example.depths) == (task.asked if kind == "multi_query" else 1)
        notes, questions = example.text[: example.text.index("recall:")], example.text[example.text.index("recall:") :]
        for answer in example.expected:
            assert f"= {answer}." in questions
            for number in answer.split(", "):
                assert f" = {number}." in notes
        assert example.text.startswith(example.prompt)
        assert example.prompt.endswith(" =")


def test_the_answer_follows_from_the_notes_alone(made):
    """What a reader with pencil and paper finds, for every kind."""
    for kind in RECALL_TASKS:
        for seed in range(6):
            example = made(seed, kind=kind, length=260)
            notes: dict[str, list[str]] = {}
            answers = []
            for line in example.text.splitlines():
                if line.startswith(("note: ", "recall: ")):
                    name, value = line.partition(": ")[2].removesuffix(".").split(" = ")
                    if line.startswith("note: "):
                        notes.setdefault(name, []).append(value)
                        continue
                    found = notes[name]
                    while found[0] in notes:
                        found = notes[found[0]]
                    answers.append(", ".join(found))
            assert tuple(answers) == example.expected


def copied_at_random(example, rng):
    """Answers of a model that copies numbers noted in the text, whichever are asked for, but not those that were given as answers before."""
    noted = [
        value
        for line in example.text.splitlines()
        if line.startswith("note: ") and (value := line.split(" = ")[1][:-1]).isdigit()
    ]
    said = []
    for answer in example.expected:
        said.append(", ".join(rng.permutation(noted)[: answer.count(",") + 1]))
        noted = [value for value in noted if value != answer] if len(example.expected) > 1 else noted
    return said


@pytest.mark.parametrize(
    ("task", "chance"),
    [
        ({"kind": "needle"}, 1),
        ({"kind": "needle", "distractors": 1}, 1 / 2),
        ({"kind": "multi_key"}, 1 / 4),
        ({"kind": "multi_query"}, 25 / 48),
        ({"kind": "multi_query", "asked": 2, "distractors": 3}, 9 / 40),
        ({"kind": "multi_value"}, 1 / 20),
        ({"kind": "multi_value", "distractors": 1}, 1 / 6),
        ({"kind": "multi_value", "asked": 3, "distractors": 0}, 1 / 6),
        ({"kind": "tracking"}, 1 / 4),
        ({"kind": "tracking", "asked": 3, "distractors": 1}, 1 / 2),
    ],
)
def test_chance_is_what_copying_at_random_finds(made, task, chance):
    assert RecallTask(**task).chance == pytest.approx(chance)
    rng, right, asked = np.random.default_rng(0), 0, 0
    for seed in range(100):
        example = made(seed, length=160, **task)
        assert example.chance == pytest.approx(chance)
        for _ in range(10):
            said = copied_at_random(example, rng)
            right += sum(map(str.__eq__, said, example.expected))
            asked += len(said)
    assert right / asked == pytest.approx(chance, abs=4 * (chance * (1 - chance) / asked) ** 0.5 + 1e-9)


def test_by_default_little_is_found_by_copying_at_random_and_all_kinds_fit_into_96_tokens(tokenizer, made):
    chances = {kind: RecallTask(kind).chance for kind in RECALL_TASKS}
    assert chances == pytest.approx(
        {"needle": 1, "multi_key": 0.25, "multi_query": 25 / 48, "multi_value": 0.05, "tracking": 0.25}
    )
    for kind in RECALL_TASKS:
        for seed in range(20):
            assert len(tokenizer(made(seed, kind=kind, length=96).text)["input_ids"]) <= 96


def test_results_from_before_chance_was_written_down_keep_their_own(made):
    assert chance_of({"kind": "tracking", "chance": 0.25}) == 0.25
    found = {kind: chance_of({"kind": kind}) for kind in RECALL_TASKS}
    assert found == pytest.approx(
        {"needle": 1, "multi_key": 1 / 4, "multi_query": 25 / 48, "multi_value": 1 / 6, "tracking": 1 / 2}
    )


def test_other_numbers_are_known_where_one_is_asked_for(made):
    for kind, others in (("needle", 0), ("multi_key", 3), ("multi_query", 0), ("multi_value", 0), ("tracking", 3)):
        example = made(kind=kind, length=160)
        assert len(set(example.others)) == others
        assert not set(example.others) & set(example.expected)
        assert all(f" = {number}." in example.prompt for number in example.others)


class SaysTheSame:
    """A tokenizer whose ids say no less when there are fewer of them."""

    def __init__(self, tokenizer):
        self.tokenizer, self.said = tokenizer, None

    def __call__(self, *args, **kwargs):
        return self.tokenizer(*args, **kwargs)

    def decode(self, ids):
        self.said = self.said or self.tokenizer.decode(ids) + " and so on"
        return self.said


def test_an_example_is_never_longer_than_asked(tokenizer, words):
    example = make_example(RecallTask(length=120, depth=1.0), words, Distraction(SaysTheSame(tokenizer), TEXTS), 0)
    assert len(tokenizer(example.text)["input_ids"]) <= 120


def test_depth_is_where_the_note_stands(made):
    for kind in ("needle", "multi_key", "tracking"):
        places = []
        for depth in (0.0, 0.5, 1.0):
            example = made(kind=kind, length=400, depth=depth, distractors=0)
            context = example.text[: example.text.index("recall:")]
            places.append(context.index("note: ") / len(context))
            assert example.depths == (depth,)
        assert places[0] == 0
        assert 0.4 < places[1] < 0.6
        assert places[2] > 0.85


def test_the_same_seed_gives_the_same_text(made):
    texts = [made(seed, kind="multi_query").text for seed in (1, 1, 2, (1, 2))]
    assert texts[0] == texts[1]
    assert len(set(texts)) == 3


@pytest.mark.parametrize("which", ["bundled", "tiny"])
def test_training_and_testing_share_no_name_and_no_number(tokenizer, which):
    of = tokenizer if which == "bundled" else tiny_tokenizer()
    train, test = RecallWords(of, "train"), RecallWords(of, "test")
    assert not set(train.names) & set(test.names)
    assert not set(train.numbers) & set(test.numbers)
    assert len(train.numbers) + len(test.numbers) == 900
    assert min(len(train.names), len(test.names)) > 50
    if which == "bundled":
        assert all(len(of(f" {name}", add_special_tokens=False)["input_ids"]) == 1 for name in test.names)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"kind": "haystack"}, "expected one of needle, multi_key"),
        ({"length": 0}, "positive number of tokens"),
        ({"depth": 1.5}, "expected 0..1"),
        ({"asked": 2}, "RecallTask.asked: got 2, expected 1"),
        ({"kind": "tracking", "asked": 0}, "expected at least 1"),
        ({"distractors": -1}, "expected 0 or more"),
    ],
)
def test_impossible_tasks_are_refused(wrong, message):
    with pytest.raises(ConfigError, match=message):
        RecallTask(**wrong)


def test_what_cannot_be_made_is_said(tokenizer, made):
    with pytest.raises(DataError, match="multi_query: a length of 40 tokens has no room"):
        made(kind="multi_query", length=40)
    with pytest.raises(DataError, match=r"expected at least \d+; give more text"):
        made(length=100_000)
    with pytest.raises(DataError, match="names to draw from"):
        made(kind="multi_key", length=9000, distractors=5000)
    with pytest.raises(DataError, match="got no text"):
        Distraction(tokenizer, [])
    with pytest.raises(ConfigError, match="'train' or 'test'"):
        RecallWords(tokenizer, "both")


def blocks(tokenizer, seq_len=96, count=30):
    return pack([Document(str(i), text) for i, text in enumerate(TEXTS)], tokenizer, seq_len, count, seed=0)


def test_the_mix_keeps_every_block_and_spreads_the_others_evenly(tokenizer):
    base = blocks(tokenizer)
    mix = long_context_mix(base, tokenizer, TEXTS, share=0.25, seed=3)
    assert len(mix) == 40
    got, kept = (
        [mix[i] for i in range(40)],
        {tuple(block["input_ids"].tolist()) for block in map(base.__getitem__, range(len(base)))},
    )
    plain = [i for i in range(40) if tuple(got[i]["input_ids"].tolist()) in kept]
    assert np.bincount(np.array(plain) // 4).tolist() == [3] * 10
    assert all(torch.equal(got[i]["input_ids"], base[n]["input_ids"]) for n, i in enumerate(plain))
    again = long_context_mix(base, tokenizer, TEXTS, share=0.25, seed=3)
    assert all(torch.equal(got[i]["input_ids"], again[i]["input_ids"]) for i in reversed(range(40)))
    assert all(block["input_ids"].shape == block["labels"].shape == (96,) for block in got)
    with pytest.raises(IndexError):
        mix[40]


def test_a_share_that_is_rounded_up_asks_for_no_block_too_many():
    mix = RecallMix(list(range(71)), SimpleNamespace(block=lambda number: None), 0.29)
    got = [mix[i] for i in range(len(mix))]
    assert [block for block in got if block is not None][-1] == 70


@pytest.mark.parametrize(("blocks", "share"), [(71, 0.29), (399, 0.58), (10, 0.0), (100, 0.99)])
def test_every_block_comes_once_whatever_the_share(blocks, share):
    mix = RecallMix(range(blocks), SimpleNamespace(block=lambda number: None), share)
    found = [mix[i] for i in range(len(mix))]
    assert [block for block in found if block is not None] == list(range(blocks))
    assert abs(found.count(None) - share * len(mix)) < 1


def test_recall_blocks_use_training_words_alone(tokenizer):
    mix = long_context_mix(blocks(tokenizer, 256, 3), tokenizer, TEXTS, share=0.9, repeats=0, seed=0)
    names, numbers = set(), set()
    for i in range(len(mix)):
        for line in tokenizer.decode(mix[i]["input_ids"]).splitlines():
            if line.startswith(("note: ", "recall: ")) and line.endswith(".") and " = " in line:
                name, value = line.partition(": ")[2].removesuffix(".").split(" = ")
                names.add(name)
                numbers |= {part for part in value.split(", ") if part.isdigit()}
    test = RecallWords(tokenizer, "test")
    assert len(names) > 50
    assert not names & set(test.names)
    assert not numbers & set(test.numbers)


def test_repeated_stretches_say_everything_twice(tokenizer):
    mix = long_context_mix(blocks(tokenizer, 96, 2), tokenizer, TEXTS, share=0.8, repeats=1, seed=0)
    allowed = {
        i
        for name in RecallWords(tokenizer, "train").names
        for i in tokenizer(f" {name}", add_special_tokens=False)["input_ids"]
    }
    allowed |= {i for digit in "0123456789" for i in tokenizer(digit, add_special_tokens=False)["input_ids"]}
    whole = 0
    for i in (0, 2, 3):
        ids, labels = mix[i]["input_ids"].tolist(), mix[i]["labels"].tolist()
        starts = [n for n, token in enumerate(ids) if token == tokenizer.bos_token_id]
        for first, end in pairwise(starts):  # the last stretch may be cut
            half = (end - first - 1) // 2
            assert ids[first + 1 : first + 1 + half] == ids[first + 1 + half : end]
            assert set(ids[first + 1 : end]) <= allowed
            assert labels[first:end] == [-100] * (half + 2) + ids[first + 2 + half : end]
            whole += 1
    assert whole > 0


def test_labels_of_recall_blocks_are_the_answers(tokenizer):
    """Written out, what counts is numbers; other text stands at the end of a block only, where no question fits any more."""
    mix = long_context_mix(blocks(tokenizer, 256, 2), tokenizer, TEXTS, share=0.8, repeats=0, seed=0)
    for i in (0, 2, 3):
        ids, labels = mix[i]["input_ids"], mix[i]["labels"]
        assert torch.equal(labels[labels != -100], ids[labels != -100])
        end = int((ids == tokenizer.bos_token_id).nonzero()[-1])
        said = tokenizer.decode(labels[:end][labels[:end] != -100])
        assert set(said) <= set("0123456789, ")
        assert said.replace(",", "").replace(" ", "") == "".join(
            line.partition(" = ")[2].removesuffix(".").replace(", ", "")
            for line in tokenizer.decode(ids[:end]).splitlines()
            if line.startswith("recall: ")
        )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"share": 1.0}, "share: got 1.0, expected 0 to below 1"),
        ({"repeats": 2}, "repeats: got 2, expected 0 to 1"),
        ({"kinds": ("hay",)}, "kinds: got hay"),
        ({"kinds": ()}, "kinds: got none"),
    ],
)
def test_impossible_mixes_are_refused(tokenizer, wrong, message):
    with pytest.raises(ConfigError, match=message):
        long_context_mix(blocks(tokenizer), tokenizer, TEXTS, **wrong)


def test_blocks_too_short_for_recall_are_refused(tokenizer):
    with pytest.raises(ConfigError, match="got blocks of 16 tokens"):
        long_context_mix(blocks(tokenizer, 16), tokenizer, TEXTS)
