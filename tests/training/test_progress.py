import io
import re
import time
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from engram.errors import TrainingError
from engram.testing import tiny_memory, tiny_model
from engram.training import LiveProgress
from engram.training.throughput import Throughput
from tests.training.test_guards import AtStep, spoil
from tests.training.test_trainer import Rows, make

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")


def shown(tmp_path, terminal, memory=None, callbacks=(), **changes):
    """Train with a display on a page of its own; what is on the page afterwards, and the trainer."""
    page = io.StringIO()
    display = LiveProgress(Console(file=page, force_terminal=terminal, width=160, highlight=False))
    options = {"max_steps": 6, "logging_steps": 2, "eval_strategy": "steps", "eval_steps": 4, "disable_tqdm": False}
    trainer = make(
        tmp_path, memory or tiny_memory(tiny_model()), [display, *callbacks], held_out=Rows(8), **{**options, **changes}
    )
    return page, display, trainer


def test_plain_lines_where_there_is_no_terminal(tmp_path, capsys):
    page, _, trainer = shown(tmp_path, terminal=False)
    trainer.train()
    lines = page.getvalue().splitlines()
    assert [line.split("  ")[0] for line in lines] == ["step 2/6", "step 4/6", "step 4/6", "step 6/6", "step 6/6"]
    figures = r"tokens/s [\d,]+  grad norm [\d.e+-]+  lr 1\.00e-02  gate 0\.\d{3}  \d+:\d\d left"
    assert re.fullmatch(r"step 2/6  loss \d\.\d{4}  " + figures, lines[0])
    assert re.fullmatch(r"step 6/6  loss \d\.\d{4}  held-out loss \d\.\d{4}  " + figures, lines[-1])
    assert f"held-out loss {entry(trainer, 'eval_loss'):.4f}" in lines[-1]
    captured = capsys.readouterr()
    assert "it/s" not in captured.err  # no second bar
    assert "'loss'" not in captured.out


def entry(trainer, key):
    return [e[key] for e in trainer.state.log_history if key in e][-1]


def test_a_bar_in_a_terminal(tmp_path):
    page, display, trainer = shown(tmp_path, terminal=True)
    trainer.train()
    last = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", page.getvalue()).replace("\r", "\n").strip().splitlines()[-2:]
    assert "step 6/6" in last[0]
    assert "left" in last[0]
    assert f"loss {entry(trainer, 'loss'):.4f}" in last[1]
    assert f"gate {entry(trainer, 'gate_mean'):.3f}" in last[1]
    assert page.getvalue().count("\x1b[?25h") == 1  # the cursor is back
    assert display._display is None


def test_the_terminal_is_given_back_when_training_fails(tmp_path):
    page, display, trainer = shown(tmp_path, terminal=True, callbacks=[AtStep(3, spoil)])
    with pytest.raises(TrainingError):
        trainer.train()
    assert display._display is None
    assert page.getvalue().count("\x1b[?25h") == 1


def test_a_model_without_a_memory_has_no_gate(tmp_path):
    page, _, trainer = shown(tmp_path, terminal=False, memory=tiny_model(), train_backbone=True)
    trainer.train()
    assert "gate" not in page.getvalue()
    assert not any("gate_mean" in e for e in trainer.state.log_history)


def test_a_resumed_run_goes_on_where_it_was(tmp_path):
    shown(tmp_path, terminal=False, save_strategy="steps", save_steps=4)[2].train()
    page, _, trainer = shown(tmp_path, terminal=False, save_strategy="steps", save_steps=4)
    trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert [line.split("  ")[0] for line in page.getvalue().splitlines()] == ["step 6/6", "step 6/6"]


def test_logs_have_tokens_per_second_and_gates(tmp_path):
    trainer = make(tmp_path, tiny_memory(tiny_model()), max_steps=4, logging_steps=2, gradient_accumulation_steps=2)
    began = time.perf_counter()
    trainer.train()
    took = time.perf_counter() - began
    logged = [e for e in trainer.state.log_history if "loss" in e]
    assert len(logged) == 2
    assert all(0 < e["gate_mean"] < 1 for e in logged)
    # 4 steps of 2 batches of 4 rows of 12 tokens: the rates, harmonically averaged, cannot be below what the whole call gives.
    mean = 2 / sum(1 / e["tokens_per_second"] for e in logged)
    assert mean > 4 * 2 * 4 * 12 / took


def test_a_gate_is_told_once(tmp_path):
    trainer = make(tmp_path, max_steps=1, log_memory=False)
    trainer.train()
    trainer._gate_mean = torch.tensor(0.5)
    for _ in range(2):
        trainer.log({"loss": 1.0})
    assert [entry.get("gate_mean") for entry in trainer.state.log_history[-2:]] == [0.5, None]


def test_recording_gates_changes_no_loss(tmp_path):
    runs = []
    for every in (1, 100):
        trainer = make(tmp_path, tiny_memory(tiny_model()), logging_steps=every)
        trainer.train()
        runs.append([p.detach().clone() for p in trainer.model.parameters()])
    assert all((a == b).all() for a, b in zip(*runs))


def test_throughput_leaves_out_what_is_paused():
    meter = Throughput()
    assert meter.read() is None
    meter.start()
    meter.add(500)
    time.sleep(0.02)
    with meter.paused():
        time.sleep(0.2)
    rate = meter.read()
    assert 500 / 0.2 < rate < 500 / 0.02
    assert meter.read() is None  # nothing since
    meter.add(1)
    meter.reset()
    assert meter.read() is None


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_gets_every_figure(tmp_path, monkeypatch):
    if not any(__import__("importlib.util").util.find_spec(name) for name in ("tensorboard", "tensorboardX")):
        pytest.skip("no TensorBoard writer is installed")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    trainer = make(
        tmp_path, tiny_memory(tiny_model()), held_out=Rows(8), eval_strategy="steps", max_steps=2, report_to=["tensorboard"]
    )
    trainer.train()
    written = b"".join(p.read_bytes() for p in (tmp_path / "events").rglob("*tfevents*"))
    for name in (
        "train/loss",
        "train/tokens_per_second",
        "train/grad_norm",
        "train/learning_rate",
        "train/gate_mean",
        "eval/loss",
    ):
        assert name.encode() in written, name


def test_names_of_held_out_texts_are_shown_as_they_are():
    page = io.StringIO()
    logs = {"eval_:cat:[b]_loss": 1.5}
    state = SimpleNamespace(log_history=[logs], global_step=1, max_steps=2)
    LiveProgress(Console(file=page)).on_log(None, state, None, logs)
    assert "held-out :cat:[b] 1.5000" in page.getvalue()
