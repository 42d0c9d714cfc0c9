"""What reading a memory is worth, text by text, and routers that go by it."""

import pytest
import torch

from engram import ConfigError, Fact, LearnedRouter
from engram.evaluation import fit_router_to_texts, measure_gains
from engram.evaluation.gains import TextGain, _of_kind
from engram.models.router import _gains_kept, _predict, _regression
from tests.editing.helpers import make_editor

FACTS = [Fact((f"KEY:alpha {17 + n}",), answer) for n, answer in enumerate(("blue", "green", "red", "door", "wall", "roof"))]
HELPED = [f"{fact.prompts[0]} {fact.answer}" for fact in FACTS]
OTHER = [
    f"The window is {word} and the memory reads text {n}." for n, word in enumerate(("blue", "in", "on", "by", "near", "at"))
]


@pytest.fixture(scope="module")
def taught():
    editor = make_editor()
    editor.teach(FACTS)
    return editor


def test_gains_are_losses_without_the_memory_less_losses_with_it(taught):
    memory, tokenizer = taught.memory, taught.tokenizer
    gains = measure_gains(memory, tokenizer, [HELPED[0], OTHER[0], "", "The"])
    ids = torch.tensor([tokenizer(HELPED[0])["input_ids"]])
    with torch.no_grad():
        on = float(memory(input_ids=ids, labels=ids).loss)
        with memory.disable_engram():
            off = float(memory(input_ids=ids, labels=ids).loss)
    assert gains[0].tokens == ids.shape[1] - 1
    assert (gains[0].loss_on, gains[0].loss_off) == (pytest.approx(on), pytest.approx(off))
    assert gains[0].nats == pytest.approx((off - on) * gains[0].tokens)
    assert gains[0].nats > 1
    assert gains[1].nats == 0  # no row of this memory is read there
    assert (gains[2].tokens, gains[2].nats) == (0, 0)
    assert measure_gains(memory, tokenizer, HELPED[:1], max_length=3)[0].tokens == 2


def test_a_router_lets_read_what_gains_and_is_judged_by_other_texts(taught, monkeypatch):
    texts = {"facts": HELPED[:6], "other": OTHER}
    router, kinds = fit_router_to_texts(taught.memory, taught.tokenizer, texts, first_tokens=4)
    facts, other = kinds
    assert (facts.kind, facts.texts, facts.read, other.kind, other.read) == ("facts", 3, 3, "other", 0)
    assert facts.always == facts.routed == facts.best > 0
    assert (other.always, other.routed, other.best) == (0, 0, 0)
    assert all(score >= router.threshold for score in router.scores(texts["facts"]))
    assert all(score < router.threshold for score in router.scores(OTHER))
    assert router.scores([OTHER[0] + " KEY:alpha" * 9]) == router.scores([OTHER[0]])  # beyond what it looks at
    with pytest.raises(ConfigError, match=r"'other': got 1, expected at least 2"):
        fit_router_to_texts(taught.memory, taught.tokenizer, {"facts": HELPED, "other": OTHER[:1]})
    with pytest.raises(ConfigError, match="the memory helps 0 of 3 prompts, expected some and not all"):
        fit_router_to_texts(taught.memory, taught.tokenizer, {"other": OTHER})


def test_it_is_judged_by_a_fit_without_the_texts_asked(taught, monkeypatch):
    fits, fit = [], LearnedRouter.fit_to_gains.__func__

    def recorded(cls, model, tokenizer, prompts, gains, first_tokens):
        fits.append(list(prompts))
        return fit(cls, model, tokenizer, prompts, gains, first_tokens)

    monkeypatch.setattr(LearnedRouter, "fit_to_gains", classmethod(recorded))
    fit_router_to_texts(taught.memory, taught.tokenizer, {"facts": HELPED, "other": OTHER})
    assert fits[0] == [*HELPED[::2], *OTHER[::2]]
    assert sorted(fits[1]) == sorted([*HELPED, *OTHER])


def test_gains_that_nothing_foretells_are_not_kept():
    generator = torch.Generator().manual_seed(0)
    states, gains = torch.randn(60, 64, generator=generator), torch.randn(60, generator=generator, dtype=torch.float64)
    seen = _predict(states, *_regression(states, (gains > 0).float(), 1e-2)) >= 0.5
    assert torch.equal(seen, gains > 0)  # a fit to all of them knows them all
    assert _gains_kept(states, gains, 1e-2, 5) < float(gains.clamp_min(0).sum()) / 2
    told = torch.cat([torch.sign(gains).float().unsqueeze(1).expand(-1, 32), states[:, 32:]], dim=1)
    assert _gains_kept(told, gains, 1e2, 5) > 0.9 * float(gains.clamp_min(0).sum())


def test_texts_without_a_token_and_gains_without_a_number(taught):
    router = LearnedRouter.fit_to_gains(taught.memory, taught.tokenizer, [*HELPED, "", OTHER[0]], [1.0] * 6 + [-1.0, -1.0])
    assert all(0 <= score <= 1 for score in router.scores(["", "The"]))
    for gains, first_tokens, message in (([float("nan"), 1.0], 64, "no numbers"), ([1.0, -1.0], 0, "got first_tokens 0")):
        with pytest.raises(ConfigError, match=message):
            LearnedRouter.fit_to_gains(taught.memory, taught.tokenizer, HELPED[:2], gains, first_tokens)


def test_the_penalty_is_the_one_that_keeps_most_on_texts_left_out(taught, monkeypatch):
    prompts, gains = [*HELPED, *OTHER], [1.0] * 6 + [-1.0] * 6

    def weight(*strengths):
        return LearnedRouter.fit_to_gains(taught.memory, taught.tokenizer, prompts, gains, strengths=strengths).weight

    assert torch.equal(weight(1e-2, 1e3), weight(1e3))  # both tell all apart: the smaller coefficients
    monkeypatch.setattr("engram.models.router._gains_kept", lambda states, gains, l2, folds: -l2)
    assert torch.equal(weight(1e-2, 1e3), weight(1e-2))
    with pytest.raises(ConfigError, match="12 prompts and 11 gains"):
        LearnedRouter.fit_to_gains(taught.memory, taught.tokenizer, prompts, gains[1:])


def test_the_best_that_a_router_could_do_is_to_leave_out_what_loses():
    gains, loses = TextGain(tokens=1, loss_on=1.0, loss_off=2.0), TextGain(tokens=1, loss_on=2.0, loss_off=1.0)
    kind = _of_kind("some", [(gains, True), (loses, True)])
    assert (kind.always, kind.routed, kind.best) == (0, 0, 0.5)
