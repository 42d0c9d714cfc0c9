"""Recall over long text, measured: exact answers, and how likely the right ones were where none is exact."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from engram.data.long_context import RECALL_TASKS, RecallExample, RecallTask, chance_of, encode_example, make_example
from engram.data.long_context_words import Distraction, RecallWords, Split
from engram.errors import ConfigError
from engram.evaluation.answers import ask, wilson_interval
from engram.evaluation.generation import padding_id
from engram.models.cache import cache_argument, cache_in
from engram.models.devices import input_device
from engram.models.identity import base_of
from engram.models.positions import context_length

__all__ = ["RecallAnswer", "RecallResult", "RecallScore", "measure_recall", "recall_rows", "recall_table", "score_recall"]

DEPTH_BINS = 4
"""Depths are reported in so many equal parts of the text."""


@dataclass(frozen=True)
class RecallAnswer:
    """What a model makes of one answer, given the text and the right answers before it."""

    kind: str
    length: int
    depth: float
    expected: str
    exact: bool
    """Whether every token is the most likely one, so that greedy decoding would say it."""
    log_probability: float
    """Mean over the answer's tokens, nats."""
    rank: float
    """Mean rank of the answer's tokens among all tokens; 1 is the most likely."""
    chance: float
    """How likely a noted number copied at random is the right answer (``RecallTask.chance``)."""
    other_value: bool | None = None
    """Whether the model says another number that is noted in the text; None where there is none, or several are asked for."""


@dataclass(frozen=True)
class RecallScore:
    """All answers of one kind and length, at one depth or at all."""

    kind: str
    length: int
    depth: tuple[float, float] | None
    """From and to, as shares of the text; None: all."""
    answers: int
    exact: int
    share: float
    low: float
    high: float
    """Wilson's 95 % interval is ``low`` to ``high``."""
    log_probability: float
    """Mean over the answers, nats per token."""
    log_probability_error: float
    """Standard error of that mean; 0 where there is one answer only."""
    rank: float
    """Mean over the answers."""
    chance: float
    """Share that copying noted numbers at random finds (``RecallTask.chance``), 0 to 1."""
    other_value: int | None
    """Wrong answers that are another number noted in the text: copied, but not what was asked for. None as in ``RecallAnswer``."""

    @classmethod
    def of(cls, answers: Sequence[RecallAnswer], depth: tuple[float, float] | None = None) -> RecallScore:
        """From answers of one kind and length (at least one)."""
        exact = sum(answer.exact for answer in answers)
        low, high = wilson_interval(exact, len(answers))
        likely = torch.tensor([answer.log_probability for answer in answers], dtype=torch.float64)
        others = [answer.other_value for answer in answers if answer.other_value is not None]
        return cls(
            kind=answers[0].kind,
            length=answers[0].length,
            depth=depth,
            answers=len(answers),
            exact=exact,
            share=exact / len(answers),
            low=low,
            high=high,
            log_probability=float(likely.mean()),
            log_probability_error=float(likely.std()) / math.sqrt(len(answers)) if len(answers) > 1 else 0.0,
            rank=sum(answer.rank for answer in answers) / len(answers),
            chance=answers[0].chance,
            other_value=sum(others) if others else None,
        )


@dataclass
class RecallResult:
    """One measurement; ``to_dict`` is JSON-ready."""

    scores: list[RecallScore]
    """By kind and length: all depths together first, then each depth that was asked."""
    examples: int
    """Texts per kind and length."""
    seed: int
    split: str
    provenance: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain fields."""
        fields = asdict(self)
        for score in fields["scores"]:
            score["depth"] = None if score["depth"] is None else list(score["depth"])
        return fields


def measure_recall(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    kinds: Sequence[str] = ("needle", "multi_query", "tracking"),
    lengths: Sequence[int] = (256, 512),
    examples: int = 64,
    seed: int = 0,
    split: Split = "test",
    digits: int = 3,
    batch_size: int = 16,
    progress: Callable[[int], None] | None = None,
) -> RecallResult:
    """Ask a model for what is noted in long texts; depths are spread evenly over the examples.

    Args:
        model: a causal language model, with or without a memory.
        tokenizer: its tokenizer.
        texts: what notes are hidden in.
        kinds: some of ``RECALL_TASKS``.
        lengths: tokens per example.
        examples: texts per kind and length.
        seed: of the examples; the same seed gives every model the same ones.
        split: names and numbers that training uses (``train``) or never uses (``test``).
        digits: digits per number.
        batch_size: texts per forward pass.
        progress: called with the number of texts scored since the last call.

    Raises:
        ConfigError: a kind is unknown, or a length is beyond the model's positions.
        DataError: a length is too short for a kind, or there is too little text.
    """
    kinds, lengths = tuple(dict.fromkeys(kinds)), tuple(dict.fromkeys(lengths))  # named twice, asked once
    _check(model, kinds, lengths, examples, batch_size)
    words, distraction = RecallWords(tokenizer, split, digits), Distraction(tokenizer, texts)
    groups = [
        [
            make_example(RecallTask(kind, length, depth=(i + 0.5) / examples), words, distraction, (seed, length, i))
            for i in range(examples)
        ]
        for kind in kinds
        for length in lengths
    ]  # all of them before the first forward pass, so that a length without room is an error of the first second
    scores: list[RecallScore] = []
    for group in groups:
        scores += _scores(score_recall(model, tokenizer, group, batch_size, progress))
    return RecallResult(scores, examples, seed, split)


def recall_rows(results: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of results (``to_dict``) by name, a row per kind, length and name: exact answers with Wilson's 95 % interval,
    log-probability of the right answers (nats per token) and their rank.

    Beside them stands what copying noted numbers at random would find.
    """
    headings = ["task", "tokens", "answers", "at random", "memory", "exact", "95 %", "log p", "rank"]
    rows = []
    for scores in zip(*(result["scores"] for result in results.values())):
        for name, s in zip(results, scores):
            if s["depth"] is None:
                asked = [s["kind"], str(s["length"]), str(s["answers"]), f"{100 * chance_of(s):.1f} %", name]
                exact = [f"{100 * s['share']:.1f} %", f"{100 * s['low']:.1f}-{100 * s['high']:.1f} %"]
                rows.append([*asked, *exact, f"{s['log_probability']:.2f}", f"{s['rank']:.1f}"])
    return headings, rows


def recall_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """``recall_rows`` as Markdown."""
    headings, rows = recall_rows(results)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (headings, ["---"] * len(headings), *rows))


@torch.no_grad()
def score_recall(
    model: Any,
    tokenizer: Any,
    examples: Sequence[RecallExample],
    batch_size: int = 16,
    progress: Callable[[int], None] | None = None,
) -> list[RecallAnswer]:
    """Score every answer of every example, in order.

    The text before the first answer goes into the KV cache, of which no logits are kept; questions and answers follow in one pass.
    An answer whose tokens are all the most likely ones is what greedy decoding would say, because up to each of them the model has
    read the same. Where another noted number might be copied in place of the right one, models that are wrong are asked what they say.

    Args:
        model: a causal language model, with or without a memory.
        tokenizer: its tokenizer, of the kind that knows where in the text a token stands.
        examples: made by ``make_example``.
        batch_size: texts per forward pass.
        progress: called with the number of texts scored since the last call.

    Raises:
        DataError: the tokenizer does not know where tokens stand.
    """
    device = input_device(model)
    pad = padding_id(tokenizer)
    answers: list[RecallAnswer] = []
    for start in range(0, len(examples), batch_size):
        batch = examples[start : start + batch_size]
        rows = [encode_example(tokenizer, example) for example in batch]
        longest = max(len(ids) for ids, _ in rows)
        tail = max(len(ids) - spans[0][0] for ids, spans in rows) + 1  # from the token that predicts the first answer's first
        ids = torch.tensor([[pad or 0] * (longest - len(ids)) + ids for ids, _ in rows], device=device)
        mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids, _ in rows], device=device)
        logits = _tail_logits(model, ids, mask, tail)
        found: list[tuple[RecallExample, RecallAnswer]] = []
        for row, (example, (own, spans)) in enumerate(zip(batch, rows)):
            for span, expected, depth in zip(spans, example.expected, example.depths):
                first = span[0] - len(own) + tail - 1
                scored = logits[row, first : first + span[1] - span[0]].float()
                right = torch.tensor(own[span[0] : span[1]], device=device)
                found.append((example, _answer(example, depth, expected, scored, right)))
        answers += _with_others(model, tokenizer, found)
        if progress is not None:
            progress(len(batch))
    return answers


def _tail_logits(model: Any, ids: Tensor, mask: Tensor, tail: int) -> Tensor:
    """Logits ``[B, tail, V]`` at the last positions of left-padded rows ``[B, T]``, the others run before them."""
    causal = base_of(model)
    accepted = inspect.signature(causal.forward).parameters
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    split = ids.shape[1] - tail

    def run(first: int, last: int, cache: Any, **options: Any) -> Any:
        if "position_ids" in accepted:  # left padding must not shift learnt positions
            options["position_ids"] = positions[:, first:last]
        return model(
            input_ids=ids[:, first:last],
            attention_mask=mask[:, :last],
            use_cache=True,
            **{cache_argument(causal): cache},
            **options,
        )

    cache = None
    if split > 0:
        cache = cache_in(run(0, split, None, **({"logits_to_keep": 1} if "logits_to_keep" in accepted else {})))
    return run(split, ids.shape[1], cache).logits


def _answer(example: RecallExample, depth: float, expected: str, logits: Tensor, ids: Tensor) -> RecallAnswer:
    """From the logits ``[n, V]`` that predict the answer's tokens ``[n]``."""
    right = logits.gather(-1, ids[:, None])
    likely = logits.log_softmax(-1).gather(-1, ids[:, None])
    return RecallAnswer(
        kind=example.kind,
        length=example.length,
        depth=depth,
        expected=expected,
        exact=bool((logits.argmax(-1) == ids).all()),
        log_probability=float(likely.mean()),
        rank=float(1 + (logits > right).sum(-1).float().mean()),
        chance=example.chance,
    )


def _with_others(model: Any, tokenizer: Any, found: Sequence[tuple[RecallExample, RecallAnswer]]) -> list[RecallAnswer]:
    """The answers, with ``other_value`` where other numbers might have been copied.

    What was scored follows the right answer's tokens. What is said after a wrong one is another text, so the model is let to speak.
    """
    wrong = [example for example, answer in found if example.others and not answer.exact]
    # A token for each digit at most, and one for the space in front of them.
    longest = 1 + max((len(text) for example in wrong for text in (*example.expected, *example.others)), default=0)
    said = iter(ask(model, tokenizer, [example.prompt for example in wrong], longest, max(1, len(wrong))))
    return [
        replace(answer, other_value=not answer.exact and next(said).startswith(example.others)) if example.others else answer
        for example, answer in found
    ]


def _scores(answers: list[RecallAnswer]) -> Iterator[RecallScore]:
    yield RecallScore.of(answers)
    for part in range(DEPTH_BINS):
        own = [answer for answer in answers if min(int(answer.depth * DEPTH_BINS), DEPTH_BINS - 1) == part]
        if own:
            yield RecallScore.of(own, (part / DEPTH_BINS, (part + 1) / DEPTH_BINS))


def _check(model: Any, kinds: Sequence[str], lengths: Sequence[int], examples: int, batch_size: int) -> None:
    unknown = [kind for kind in kinds if kind not in RECALL_TASKS]
    if unknown or not kinds:
        raise ConfigError(f"recall: tasks: got {', '.join(unknown) or 'none'}, expected some of {', '.join(RECALL_TASKS)}.")
    for name, value in (("examples", examples), ("batch_size", batch_size)):
        if value < 1:
            raise ConfigError(f"recall: {name}: got {value}, expected at least 1.")
    limit = context_length(model.config)
    beyond = [length for length in lengths if limit is not None and length > limit]
    if beyond or not lengths:
        got = ", ".join(map(str, beyond)) or "none"
        raise ConfigError(f"recall: lengths: got {got}, expected at most {limit}, the positions of the model.")
