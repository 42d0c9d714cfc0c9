"""How prompts are put together in batches, and models that cannot be taught."""

from itertools import pairwise

import pytest
import torch

from engram import Fact, MemoryEditor, TeachError, TeachSettings
from engram.editing import lesson, teaching
from engram.editing.lesson import in_batches
from engram.evaluation import check_facts
from engram.testing import tiny_model, tiny_tokenizer
from tests.editing.helpers import FACTS, make_editor, same, tensors


def test_prompts_of_similar_length_are_batched_as_they_always_were():
    assert in_batches([], 4) == []
    lengths = [(7 * n) % 30 + 10 for n in range(600)]
    order = sorted(range(600), key=lambda i: lengths[i])
    assert in_batches(lengths, 256) == [order[:256], order[256:512], order[512:]]


def test_short_prompts_do_not_pay_for_a_long_one():
    assert in_batches([12] * 28 + [600] + [12] * 29, 256) == [[*range(28), *range(29, 58)], [28]]
    assert in_batches([12] * 3 + [200], 256) == [[0, 1, 2, 3]]  # too few to matter


def test_few_long_prompts_are_read_in_the_streams_of_others_too(monkeypatch):
    seen = []
    original = teaching.optimise_rows
    monkeypatch.setattr(teaching, "optimise_rows", lambda *given: seen.append((given[1], given[7])) or original(*given))
    short = [Fact((f"KEY:word {n}",), f"{n * 37}", id=f"word{n}") for n in range(20)]
    long = Fact(("KEY:the long one",), "a quiet green door and a blue window " * 3, id="long")
    editor = make_editor(max_ngram_size=128)
    facts = [*short, long]
    report = editor.teach(facts, TeachSettings(contexts=3))
    assert report.not_exact == {}
    assert ([len(batch) for batch, _ in seen[:2]], [len(lent) for _, lent in seen[:2]]) == ([20, 1], [0, 3])
    assert all(answer.exact for answer in check_facts(editor.memory, editor.tokenizer, facts))


def test_a_prompt_is_learnt_in_the_streams_of_others_and_then_in_its_own(monkeypatch):
    """It leaves the batch at the first pass in its own stream in which it is right, after as many right ones elsewhere as asked for."""
    lessons, judge, optimise_rows = [], lesson._judge, teaching.optimise_rows

    def judged(upper, members, streams, margin):
        loss, learnt = judge(upper, members, streams, margin)
        lessons[-1].append((members.tolist(), streams.tolist(), learnt.tolist()))
        return loss, learnt

    monkeypatch.setattr(lesson, "_judge", judged)
    monkeypatch.setattr(teaching, "optimise_rows", lambda *given: lessons.append([]) or optimise_rows(*given))
    facts = [Fact((f"KEY:word {n}",), f"{n * 37}", id=f"word{n}") for n in range(12)]
    assert make_editor().teach(facts, TeachSettings(contexts=3)).not_exact == {}
    for passes in lessons:
        right_in_a_row = dict.fromkeys(passes[0][0], 0)
        for (members, streams, learnt), (still, *_) in pairwise(passes):
            for member, stream, right in zip(members, streams, learnt):
                last = right_in_a_row[member] == 3
                assert stream == member or not last
                assert (member not in still) == (last and right)
                right_in_a_row[member] = right_in_a_row[member] + 1 if right else 0
    assert {stream != member for members, streams, _ in lessons[0] for member, stream in zip(members, streams)} == {True, False}


def test_dropout_of_a_model_in_training_does_not_reach_a_lesson():
    def taught(training):
        model = tiny_model(hidden_size=64, intermediate_size=96, attention_dropout=0.5).train(training)
        editor = MemoryEditor.create(model, tiny_tokenizer())
        assert editor.teach(FACTS).not_exact == {}
        assert model.training == training
        assert editor.memory.training == training
        return tensors(editor)

    assert same(taught(True), taught(False))


class _NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden):
        return hidden.clone()

    @staticmethod
    def backward(ctx, gradient):
        return torch.zeros_like(gradient)


@pytest.mark.parametrize("how", ["zero", "none"])
def test_a_model_that_passes_no_gradients_is_refused(how):
    editor = make_editor()
    editor.teach(FACTS[:1])
    before = tensors(editor)
    head = editor.memory.base_model.get_output_embeddings()
    stop = _NoGradient.apply if how == "zero" else torch.Tensor.detach
    with head.register_forward_hook(lambda module, given, logits: stop(logits)):
        with pytest.raises(TeachError, match=r"passes no gradients.*expected weights that gradients pass through"):
            editor.teach(FACTS[1:])
        assert editor.verify() == {"alpha": True}
    assert same(tensors(editor), before)
    assert editor.teach(FACTS[1:]).taught == ["beta", "door"]


def test_answers_that_the_model_gives_anyway_do_not_speak_against_it():
    """Their rows get no gradient, as they are learnt already."""
    editor = make_editor()
    editor.teach(FACTS)
    known = [Fact((f"{FACTS[1].prompts[0]}",), "7319", id="beta"), Fact(("Well then: KEY:beta 20",), "7319", id="longer")]
    report = editor.teach(known)
    assert (report.already_known, report.taught) == (["beta"], ["longer"])


def test_teaching_leaves_gradients_of_a_model_that_is_trained_alone():
    model = tiny_model()
    editor = MemoryEditor.create(model, tiny_tokenizer())
    model.requires_grad_(True)
    ids = torch.randint(5, 300, (2, 8), generator=torch.Generator().manual_seed(0))
    editor.memory(input_ids=ids, labels=ids).loss.backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert before
    assert editor.teach(FACTS).taught
    assert all(torch.equal(p.grad, before[name]) for name, p in model.named_parameters() if name in before)
