"""Threads that use one memory take turns: nobody reads another's addresses, switches or defaults."""

import copy
import io
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from engram import Fact
from engram.evaluation import ask
from engram.testing import tiny_tokenizer
from tests.editing.helpers import make_editor

WHO = {name: f"{number}{number}{number}" for number, name in enumerate("ABCDEF")}
OTHER = "The memory is addressed by the last tokens."


@pytest.fixture
def impatient():
    """Threads that are changed as often as can be."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.fixture(scope="module")
def editor():
    editor = make_editor()
    facts = [Fact((f"Password of user {name}?",), answer, id=name) for name, answer in WHO.items()]
    assert not editor.teach(facts).not_exact
    return editor


def generated(memory, text, **options):
    ids = tiny_tokenizer()(text, return_tensors="pt")["input_ids"]
    out = memory.generate(input_ids=ids, max_new_tokens=6, do_sample=False, **options)[0, ids.shape[1] :]
    return tiny_tokenizer().decode(out, skip_special_tokens=True).strip()


@pytest.mark.parametrize("use_cache", [True, False])
def test_every_thread_gets_its_own_answers(editor, impatient, use_cache):
    with ThreadPoolExecutor(4) as pool:
        said = list(
            pool.map(lambda name: generated(editor.memory, f"Password of user {name}?", use_cache=use_cache), [*WHO] * 3)
        )
    alone = [generated(editor.memory, f"Password of user {name}?", use_cache=use_cache) for name in WHO] * 3
    assert said == alone
    assert all(text.startswith(answer) for text, answer in zip(said, [*WHO.values()] * 3))


def test_a_switch_is_its_threads_alone(editor, impatient):
    ids = tiny_tokenizer()(OTHER, return_tensors="pt")["input_ids"]
    asked = [f"Password of user {name}?" for name in WHO]

    @torch.no_grad()
    def off(_):
        with editor.memory.disable_engram():
            return [generated(editor.memory, asked[0]), editor.memory(input_ids=ids, use_cache=False).logits]

    with ThreadPoolExecutor(4) as pool:
        offs = [pool.submit(off, n) for n in range(4)]
        ons = [pool.submit(ask, editor.memory, editor.tokenizer, asked) for _ in range(3)]
        explained = pool.submit(editor.why, asked[1])
        assert all(future.result() == [*WHO.values()] for future in ons)
        text, logits = off(0)
        assert all(future.result()[0] == text and torch.equal(future.result()[1], logits) for future in offs)
        assert explained.result().facts


def test_teaching_waits_for_those_who_ask(editor, impatient):
    with ThreadPoolExecutor(3) as pool:
        taught = pool.submit(editor.teach, [Fact(("Password of the cellar?",), "9944", id="cellar")])
        said = [pool.submit(generated, editor.memory, f"Password of user {name}?") for name in WHO]
        assert [future.result()[:3] for future in said] == [*WHO.values()]
        assert not taught.result().not_exact
    assert ask(editor.memory, editor.tokenizer, ["Password of the cellar?"]) == ["9944"]
    editor.forget("cellar")


def test_copies_and_pickles_have_turns_of_their_own(editor):
    twin = copy.deepcopy(editor.memory)
    assert twin.turns is not editor.memory.turns
    with editor.memory.turns, ThreadPoolExecutor(1) as pool:
        assert pool.submit(generated, twin, "Password of user A?").result().startswith("000")
    torch.save(editor.memory.turns, io.BytesIO())
