"""Threads that use one memory take turns: nobody reads another's addresses, switches or defaults."""

import copy
import io
import os
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from engram import Fact
from engram.evaluation import ask
from engram.models import StaticDecoder
from engram.testing import tiny_memory, tiny_tokenizer
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


def test_a_pass_waits_until_another_threads_switch_is_given_back(editor):
    ids, started = tiny_tokenizer()(OTHER, return_tensors="pt")["input_ids"], threading.Event()

    @torch.no_grad()
    def read():
        started.set()
        return editor.memory(input_ids=ids, use_cache=False)

    with ThreadPoolExecutor(1) as pool:
        with editor.memory.disable_engram():
            reading = pool.submit(read)
            started.wait()
            with pytest.raises(TimeoutError):
                reading.result(timeout=0.5)
        reading.result(timeout=60)


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


def test_a_decoder_on_fixed_buffers_takes_turns_with_others(impatient):
    memory = tiny_memory()
    prompt, other = (tiny_tokenizer()(text, return_tensors="pt")["input_ids"] for text in (OTHER, "def lookup"))

    def stepped(_=None):
        decoder, tokens = StaticDecoder(memory, 64), []
        logits = decoder.prefill(prompt.repeat(2, 1))
        for _ in range(12):
            tokens.append(logits.argmax(-1).clone())
            logits = decoder.step(tokens[-1])
        return torch.stack(tokens)

    def said(_=None):
        return memory.generate(input_ids=other, max_new_tokens=12, do_sample=False)

    expected = [stepped(), said()]
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(run) for run in (stepped, said) * 4]
        assert all(torch.equal(run.result(), expected[number % 2]) for number, run in enumerate(runs))


def test_a_memory_is_read_anew_between_the_answers_of_others(editor, impatient, tmp_path):
    editor.memory.save_pretrained(tmp_path / "six")
    editor.teach([Fact(("Password of the attic?",), "4499", id="attic")])
    editor.memory.save_pretrained(tmp_path / "seven")

    def load(_):
        for name in ("six", "seven"):
            editor.memory.load_memory(tmp_path / name)

    with ThreadPoolExecutor(2) as pool:
        loads = [pool.submit(load, n) for n in range(10)]
        said = [pool.submit(generated, editor.memory, f"Password of user {name}?") for name in [*WHO] * 3]
        assert [future.result()[:3] for future in said] == [*WHO.values()] * 3
        for future in loads:
            future.result()
    editor.memory.load_memory(tmp_path / "six")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_does_not_wait_for_a_thread_that_had_its_turn():
    memory, taken, done = tiny_memory(), threading.Event(), threading.Event()

    def hold():
        with memory.disable_engram():
            taken.set()
            done.wait()

    with ThreadPoolExecutor(1) as pool:
        pool.submit(hold)
        taken.wait()
        child = os.fork()
        if child == 0:
            try:
                signal.alarm(20)
                with memory.turns:
                    os._exit(0)
            finally:
                os._exit(1)
        done.set()
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_keeps_the_turn_that_its_thread_had():
    memory = tiny_memory()
    with memory.disable_engram():
        child = os.fork()
        if child == 0:
            try:
                os._exit(int(memory.is_enabled))
            finally:
                os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
