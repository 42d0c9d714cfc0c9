"""Recall over long text: something is noted among other text, and asked for at its end.

The kinds of question follow RULER (arXiv:2404.06654), in a form that small models can learn: a note is one line, and a question is the
beginning of the same line once more, so that what is asked for is the copying of what followed.

    note: river = 4821.            <- somewhere in the text
    ...
    recall: river = 4821.          <- at its end; ``4821`` is the answer

Nothing can be answered from what a model knows: names are paired with numbers by chance, and those used for testing are never used for
training (``RecallWords``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from engram.data.long_context_words import Distraction, RecallWords
from engram.errors import ConfigError, DataError

__all__ = [
    "RECALL_TASKS",
    "RecallExample",
    "RecallTask",
    "asked_more_easily",
    "chance_of",
    "encode_example",
    "make_example",
]

RECALL_TASKS: dict[str, str] = {
    "needle": "one note, asked for once",
    "multi_key": "several notes, one of them asked for",
    "multi_query": "several notes, all asked for one after another",
    "multi_value": "one name noted several times, all its values asked for in their order",
    "tracking": "chains of notes, each naming the one before; the value at the end of one is asked for",
}
"""The kinds of question."""

_IS = " = "


@dataclass(frozen=True)
class RecallTask:
    """What is hidden and how it is asked. ``None`` stands for the kind's own default.

    Raises:
        ConfigError: a value is impossible; the message names the field.
    """

    kind: str = "needle"
    """One of ``RECALL_TASKS``."""
    length: int = 256
    """Tokens of the whole example, questions and answers included; never more, and less by a few only."""
    depth: float | None = None
    """Where the note that is asked for stands (a chain: begins): 0 at the start of the text, 1 right before the question. ``None``:
    drawn by chance. Kinds that ask for several notes spread them evenly instead."""
    asked: int | None = None
    """Notes that are asked for: keys (``multi_query``), values (``multi_value``) or notes in the chain (``tracking``); else 1."""
    distractors: int | None = None
    """Other notes (``tracking``: other chains of the same length) that are not asked for."""

    def __post_init__(self) -> None:
        if self.kind not in RECALL_TASKS:
            raise ConfigError(f"RecallTask.kind: got {self.kind!r}, expected one of {', '.join(RECALL_TASKS)}.")
        if self.length < 1:
            raise ConfigError(f"RecallTask.length: got {self.length}, expected a positive number of tokens.")
        if self.depth is not None and not 0 <= self.depth <= 1:
            raise ConfigError(f"RecallTask.depth: got {self.depth}, expected 0..1 or None.")
        asked, distractors = _DEFAULTS[self.kind]
        object.__setattr__(self, "asked", asked if self.asked is None else self.asked)
        object.__setattr__(self, "distractors", distractors if self.distractors is None else self.distractors)
        if self.asked < 1 or (self.kind in ("needle", "multi_key") and self.asked != 1):  # type: ignore[operator]
            raise ConfigError(f"RecallTask.asked: got {self.asked}, expected {'1' if asked == 1 else 'at least 1'}.")
        if self.distractors < 0:  # type: ignore[operator]
            raise ConfigError(f"RecallTask.distractors: got {self.distractors}, expected 0 or more.")

    @property
    def chance(self) -> float:
        """Share of answers that a model gets right which copies noted numbers at random, whichever are asked for; 0 to 1.

        With ``a`` = ``asked`` and ``d`` = ``distractors``:

        - ``needle`` and ``multi_key``: 1 number of those noted, ``1 / (1 + d)``;
        - ``tracking``: the same, since a chain has one number, at its beginning: ``1 / (1 + d)``, however long chains are;
        - ``multi_query``: 1 of those noted for each answer. Right answers before it stand in the text, and none is asked for twice, so
          the copies are of the rest: the mean of ``1 / (a - j + d)`` over ``j = 0 .. a - 1`` answers given;
        - ``multi_value``: ``a`` different ones of those noted, in the right order, ``d! / (a + d)!``.
        """
        asked, others = int(self.asked or 1), int(self.distractors or 0)
        if self.kind == "multi_value":
            return 1 / math.perm(asked + others, asked)
        if self.kind == "multi_query":
            return sum(1 / (left + others) for left in range(1, asked + 1)) / asked
        return 1 / (1 + others)


# Asked and distractors. The more there are, the less is found by copying at random; with these, every kind fits into 96 tokens.
_DEFAULTS = {"needle": (1, 0), "multi_key": (1, 3), "multi_query": (4, 0), "multi_value": (2, 3), "tracking": (2, 3)}

# What results that do not say their chance were made with.
_EARLIER_DEFAULTS = {**_DEFAULTS, "multi_value": (2, 1), "tracking": (2, 1)}


def chance_of(score: Mapping[str, Any]) -> float:
    """What copying noted numbers at random finds (``RecallTask.chance``), of a score in a result; 0 to 1.

    Args:
        score: as ``RecallScore`` has it. Results from before it had ``chance`` were made with two chains in ``tracking`` and one distractor in
            ``multi_value``; theirs follows from that.

    Raises:
        KeyError: it says neither ``chance`` nor a kind that there is.
    """
    if score.get("chance") is not None:
        return float(score["chance"])
    asked, distractors = _EARLIER_DEFAULTS[score["kind"]]
    return RecallTask(score["kind"], asked=asked, distractors=distractors).chance


def asked_more_easily(score: Mapping[str, Any]) -> bool:
    """Whether a score in a result is from before its kind of question was asked among more notes, as it is by default now."""
    return score.get("chance") is None and _EARLIER_DEFAULTS[score["kind"]] != _DEFAULTS[score["kind"]]


@dataclass(frozen=True)
class RecallExample:
    """A text with answers in it."""

    kind: str
    length: int
    """Tokens asked for."""
    text: str
    answers: tuple[tuple[int, int], ...]
    """Characters of the text that are answers: first, and one past the last."""
    depths: tuple[float, ...]
    """Per answer, the share of the text before the questions that stands before its note (the first of several)."""
    chance: float
    """``RecallTask.chance`` of its task."""
    others: tuple[str, ...] = ()
    """Other noted numbers that might be copied in place of the answer; none where several numbers are asked for."""

    @property
    def prompt(self) -> str:
        """The text up to the first answer, without the space in front of it."""
        return self.text[: self.answers[0][0]].removesuffix(" ")

    @property
    def expected(self) -> tuple[str, ...]:
        """The answers."""
        return tuple(self.text[first:end] for first, end in self.answers)


@dataclass(frozen=True)
class _Plan:
    """Lines to hide, with the depth of each, and what is asked: a name, its answer and the depth of what answers it; ``others`` as an
    example has them.
    """

    notes: list[tuple[float, str]]
    questions: list[tuple[str, str, float]]
    others: tuple[str, ...] = ()


def make_example(task: RecallTask, words: RecallWords, distraction: Distraction, seed: int | Sequence[int]) -> RecallExample:
    """One example; the same arguments give the same text.

    Args:
        task: what is hidden and how it is asked.
        words: names and numbers to use.
        distraction: what it is hidden in; its tokenizer counts the tokens.
        seed: a number, or several that together name the example.

    Raises:
        DataError: the length has no room for notes and questions, or there is too little text to hide them in.
    """
    rng = np.random.default_rng(seed)
    plan = _PLANS[task.kind](rng, words, task)
    notes = sorted(plan.notes, key=lambda note: note[0])
    needed = _count(distraction.tokenizer, _assemble([], notes, plan.questions, distraction)[0])
    if needed > task.length:
        raise DataError(
            f"{task.kind}: a length of {task.length} tokens has no room for its notes and questions, which take {needed}."
        )
    filler = distraction.stretch(rng, task.length - needed)
    text, spans = _assemble(filler, notes, plan.questions, distraction)
    # Text that is cut and joined does not have the sum of its parts' tokens. Without any filler it fits, so this ends.
    while (excess := _count(distraction.tokenizer, text) - task.length) > 0:
        filler = filler[: max(0, len(filler) - excess)]
        text, spans = _assemble(filler, notes, plan.questions, distraction)
    depths = tuple(depth for _, _, depth in plan.questions)
    return RecallExample(task.kind, task.length, text, tuple(spans), depths, task.chance, plan.others)


def encode_example(tokenizer: Any, example: RecallExample) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids of the text, and per answer the first of its tokens and one past the last.

    Raises:
        DataError: the tokenizer does not know where in a text its tokens stand.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise DataError("recall: the tokenizer does not know where in a text its tokens stand; load its fast version.")
    encoded = tokenizer(example.text, return_offsets_mapping=True, verbose=False)
    offsets = encoded["offset_mapping"]
    spans = []
    for first, end in example.answers:
        own = [i for i, (a, b) in enumerate(offsets) if a < end and b > first]
        spans.append((own[0], own[-1] + 1))
    return list(encoded["input_ids"]), spans


def _assemble(
    filler: list[int], notes: list[tuple[float, str]], questions: list[tuple[str, str, float]], distraction: Distraction
) -> tuple[str, list[tuple[int, int]]]:
    lines, done = [], 0
    for depth, note in notes:
        cut = round(depth * len(filler))
        lines += [_plain(distraction, filler[done:cut]), note]
        done = cut
    text = "".join(f"{line}\n" for line in [*lines, _plain(distraction, filler[done:])] if line)
    spans = []
    for name, answer, _ in questions:
        text += f"recall: {name}{_IS}"
        spans.append((len(text), len(text) + len(answer)))
        text += f"{answer}.\n"
    return text, spans


def _plain(distraction: Distraction, ids: list[int]) -> str:
    """Text of a stretch; characters cut in two are left out."""
    return str(distraction.tokenizer.decode(ids)).replace("\ufffd", "").strip("\n") if ids else ""


def _note(name: str, value: str) -> str:
    return f"note: {name}{_IS}{value}."


def _single(rng: np.random.Generator, words: RecallWords, task: RecallTask) -> _Plan:
    others = int(task.distractors or 0)
    names, numbers = words.draw_names(rng, 1 + others), words.draw_numbers(rng, 1 + others)
    depths = [rng.random() if task.depth is None else task.depth, *rng.random(others)]
    notes = [(depth, _note(name, number)) for depth, name, number in zip(depths, names, numbers)]
    return _Plan(notes, [(names[0], numbers[0], depths[0])], tuple(numbers[1:]))


def _several_keys(rng: np.random.Generator, words: RecallWords, task: RecallTask) -> _Plan:
    asked, others = int(task.asked or 1), int(task.distractors or 0)
    names, numbers = words.draw_names(rng, asked + others), words.draw_numbers(rng, asked + others)
    depths = [*_evenly(asked), *rng.random(others)]
    notes = [(depth, _note(name, number)) for depth, name, number in zip(depths, names, numbers)]
    order = rng.permutation(asked)
    return _Plan(notes, [(names[i], numbers[i], depths[i]) for i in order])


def _several_values(rng: np.random.Generator, words: RecallWords, task: RecallTask) -> _Plan:
    asked, others = int(task.asked or 1), int(task.distractors or 0)
    names, numbers = words.draw_names(rng, 1 + others), words.draw_numbers(rng, asked + others)
    depths = [*_evenly(asked), *rng.random(others)]
    owners = [names[0]] * asked + names[1:]
    notes = [(depth, _note(name, number)) for depth, name, number in zip(depths, owners, numbers)]
    return _Plan(notes, [(names[0], ", ".join(numbers[:asked]), depths[0])])


def _chains(rng: np.random.Generator, words: RecallWords, task: RecallTask) -> _Plan:
    links, chains = int(task.asked or 1), 1 + int(task.distractors or 0)
    names, numbers = words.draw_names(rng, links * chains), words.draw_numbers(rng, chains)
    notes = []
    starts = [rng.random() if task.depth is None else task.depth, *rng.random(chains - 1)]
    for chain, (start, number) in enumerate(zip(starts, numbers)):
        own = names[chain * links : (chain + 1) * links]
        depths = [start, *sorted(start + (1 - start) * rng.random(links - 1))]
        notes += [(depth, _note(name, value)) for depth, name, value in zip(depths, own, [number, *own])]
    return _Plan(notes, [(names[links - 1], numbers[0], starts[0])], tuple(numbers[1:]))


_PLANS: dict[str, Callable[[np.random.Generator, RecallWords, RecallTask], _Plan]] = {
    "needle": _single,
    "multi_key": _single,
    "multi_query": _several_keys,
    "multi_value": _several_values,
    "tracking": _chains,
}


def _evenly(count: int) -> list[float]:
    return [(i + 0.5) / count for i in range(count)]


def _count(tokenizer: Any, text: str) -> int:
    return len(tokenizer(text, verbose=False)["input_ids"])
