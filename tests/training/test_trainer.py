import json
import os
import random
import signal
import subprocess
import sys
import textwrap

import numpy
import pytest
import torch
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.loss.loss_utils import ForCausalLMLoss

from engram import (
    CheckpointError,
    ConfigError,
    EngramConfig,
    EngramModel,
    EngramTrainer,
    EngramTrainingArguments,
    TableConfig,
    get_engram_model,
)
from engram.optim import EngramAdamW
from engram.testing import assert_close, tiny_config, tiny_memory, tiny_model, tiny_tokenizer
from engram.training import kept_memory, safe_trainer
from engram.training.guards import is_complete
from engram.training.lean_loss import causal_lm_loss
from engram.training.safe_trainer import SaveOnInterrupt, last_checkpoint
from engram.training.stops import STOPS, give_back, signals_given_back
from tests.children import run_python
from tests.versions import needs_checkpointing

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")


class Rows(Dataset):
    """Random texts; with ``extra`` a mask and a column that no model takes, with ``masked`` a number of labels that varies by row."""

    def __init__(self, count=48, length=12, extra=False, masked=False):
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(2, 300, (count, length), generator=generator)
        self.extra, self.masked = extra, masked

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        labels = self.ids[i].clone()
        if self.masked:
            labels[: 1 + 5 * i % 10] = -100
        extra = {"attention_mask": torch.ones_like(labels), "source": torch.tensor(i)} if self.extra else {}
        return {"input_ids": self.ids[i], "labels": labels, **extra}


def fields_for(tmp_path, **changes):
    fields = {
        "output_dir": str(tmp_path / "run"),
        "max_steps": 8,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "lr_scheduler_type": "constant",
    }
    return {**fields, **changes}


def make(tmp_path, memory=None, callbacks=(), data=None, held_out=None, **changes):
    return EngramTrainer(
        memory or tiny_memory(speak=False),
        EngramTrainingArguments(**fields_for(tmp_path, **changes)),
        train_dataset=data or Rows(),
        eval_dataset=held_out,
        callbacks=list(callbacks),
    )


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_training_learns_and_leaves_the_base_alone(tmp_path):
    memory = tiny_memory(tiny_model(), speak=False)
    before = {name: p.clone() for name, p in memory.base_model.state_dict().items()}
    trainer = make(tmp_path, memory, max_steps=60, learning_rate=3e-2)
    trainer.train()
    history = losses(trainer)
    assert sum(history[-5:]) < 0.95 * sum(history[:5])
    assert isinstance(trainer.optimizer.optimizer, EngramAdamW)
    assert all(torch.equal(p, before[name]) for name, p in memory.base_model.state_dict().items())


def test_table_rows_never_touched_are_never_changed(tmp_path):
    memory = tiny_memory(speak=False, table_init="normal")
    tables = {k: e.multi_head_embedding.embedding.weight.detach().clone() for k, e in memory.engrams.items()}
    make(tmp_path, memory).train()
    touched = {str(k): set() for k in memory.engram_config.layer_ids}
    for layer_id, ids in memory.mapping.hash(Rows().ids).items():
        touched[str(layer_id)] = set(memory.engrams[str(layer_id)].multi_head_embedding.row_ids(ids).flatten().tolist())
    for key, engram in memory.engrams.items():
        changed = (engram.multi_head_embedding.embedding.weight.detach() != tables[key]).any(1).nonzero().flatten().tolist()
        assert changed
        assert set(changed) <= touched[key]


@pytest.mark.parametrize(("bf16", "masked"), [(False, False), (False, True), (True, False)])
def test_accumulation_equals_one_big_batch(tmp_path, bf16, masked):
    runs = []
    for size, accumulate in ((8, 1), (2, 4)):
        trainer = make(
            tmp_path,
            tiny_memory(tiny_model()),
            data=Rows(masked=masked),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulate,
            max_steps=3,
            bf16=bf16,
            learning_rate=1e-3,
        )
        trainer.train()
        runs.append(losses(trainer))
    assert_close(torch.tensor(runs[1]), torch.tensor(runs[0]), 2e-2 if bf16 else 1e-4)


@needs_checkpointing
@pytest.mark.parametrize("train_backbone", [False, True])
def test_gradient_checkpointing_changes_nothing(tmp_path, train_backbone):
    runs = []
    for checkpointing in (False, True):
        trainer = make(
            tmp_path,
            tiny_memory(tiny_model()),
            train_backbone=train_backbone,
            activation_checkpointing=checkpointing,
            max_steps=4,
        )
        trainer.train()
        runs.append(losses(trainer))
    assert runs[0] == runs[1]


def test_clipping_includes_the_tables(tmp_path):
    memory = tiny_memory(tiny_model())
    trainer = make(tmp_path, memory, max_steps=1, max_grad_norm=0.01)
    seen = []
    trainer.create_optimizer()
    original = trainer.optimizer.step

    def spy(*args, **kwargs):
        values = [p.grad.coalesce().values() if p.grad.is_sparse else p.grad for p in memory.parameters() if p.grad is not None]
        seen.append(
            (
                float(torch.cat([v.flatten() for v in values]).norm()),
                any(p.grad is not None and p.grad.is_sparse for p in memory.parameters()),
            )
        )
        return original(*args, **kwargs)

    trainer.optimizer.step = spy
    trainer.train()
    assert seen[0][1]
    assert seen[0][0] == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("train_backbone", [False, True])
def test_resuming_gives_the_same_losses_to_the_last_digit(tmp_path, train_backbone):
    options = {"save_strategy": "steps", "save_steps": 4, "train_backbone": train_backbone, "lr_scheduler_type": "cosine"}
    options["memory_dropout"] = 0.5 if train_backbone else 0.0
    whole = make(tmp_path / "a", tiny_memory(tiny_model(attention_dropout=0.1), speak=False), **options)
    whole.train()
    checkpoint = tmp_path / "a" / "run" / "checkpoint-4"
    again = make(tmp_path / "b", tiny_memory(tiny_model(attention_dropout=0.1), speak=False), **options)
    assert 0 < json.loads((checkpoint / "time.json").read_text())["seconds"] < whole.seconds
    (checkpoint / "time.json").write_text('{"seconds": 1000.0}')
    again.train(resume_from_checkpoint=str(checkpoint))
    assert 1000 < again.seconds < 2000
    assert losses(again)[-4:] == losses(whole)[-4:]
    for (name, a), (_, b) in zip(whole.model.named_parameters(), again.model.named_parameters()):
        assert torch.equal(a, b), name
    suffixes = {p.suffix for p in checkpoint.rglob("*") if p.is_file()}
    assert not suffixes & {".pt", ".pth", ".bin", ".pkl"}


def test_a_run_that_is_done_takes_no_step_more(tmp_path):
    """Eight steps end in the middle of an epoch of twelve."""
    first = make(tmp_path, save_strategy="steps", save_steps=8, lr_scheduler_type="constant")
    first.train()
    again = make(tmp_path, save_strategy="steps", save_steps=8, lr_scheduler_type="constant")
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 8
    assert all(map(torch.equal, again.memory.state_dict().values(), first.memory.state_dict().values()))


def test_rows_with_compact_state_and_rounded_by_chance_resume_to_the_last_digit(tmp_path):
    def trainer(name):
        memory = tiny_memory(tiny_model(), speak=False)
        for engram in memory.engrams.values():
            engram.multi_head_embedding.to(torch.bfloat16)
        options = {"table_row_state": "rowwise_adam", "table_stochastic_rounding": True}
        return make(tmp_path / name, memory, save_strategy="steps", save_steps=4, **options)

    whole, again = trainer("a"), trainer("b")
    whole.train()
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "run" / "checkpoint-4"))
    tables = [engram.multi_head_embedding.embedding.weight for engram in whole.memory.engrams.values()]
    assert all(
        t.dtype == torch.bfloat16 and whole.optimizer.optimizer.state[t]["row_moments"].kind == "rowwise_adam" for t in tables
    )
    assert losses(again)[-4:] == losses(whole)[-4:]
    for (name, a), (_, b) in zip(whole.model.named_parameters(), again.model.named_parameters()):
        assert torch.equal(a, b), name
    with pytest.raises(ConfigError, match="table_row_state: got 'adagrad'"):
        make(tmp_path, table_row_state="adagrad").create_optimizer()


_KILLED = textwrap.dedent(
    """
    import os, signal, sys
    from pathlib import Path
    from transformers import TrainerCallback
    from tests.training.test_trainer import make, tiny_memory, tiny_model

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == int(sys.argv[2]):
                os.kill(os.getpid(), getattr(signal, sys.argv[3]))

    trainer = make(Path(sys.argv[1]), tiny_memory(tiny_model(), speak=False), [Stop()], save_strategy="steps", save_steps=3)
    trainer.train()
    """
)


def run_and_stop(tmp_path, step, how):
    return run_python("-c", _KILLED, tmp_path, step, how)


@pytest.mark.slow
def test_a_killed_run_goes_on_from_its_last_checkpoint(tmp_path):
    whole = make(tmp_path / "whole", tiny_memory(tiny_model(), speak=False))
    whole.train()
    killed = run_and_stop(tmp_path / "k", 5, "SIGKILL")
    assert killed.returncode == -signal.SIGKILL
    again = make(tmp_path / "k", tiny_memory(tiny_model(), speak=False))
    again.train(resume_from_checkpoint=str(tmp_path / "k" / "run" / "checkpoint-3"))
    assert losses(again)[-5:] == losses(whole)[-5:]


_CLOSED = textwrap.dedent(
    """
    import os, pty, select, subprocess, sys, time
    from pathlib import Path
    screen, terminal = pty.openpty()
    code, folder = sys.argv[1:]
    run = ["import fcntl, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)", code]  # its terminal, with which the system's signal comes
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), terminal)
    child = subprocess.Popen([sys.executable, "-c", chr(10).join(run), folder], start_new_session=True, **streams)
    os.close(terminal)
    while child.poll() is None and not Path(folder, "at step 5").exists():
        if select.select([screen], [], [], 0.05)[0]:
            os.read(screen, 1 << 16)
    os.close(screen)
    sys.exit(child.wait(60))
    """
)
_WATCHED = textwrap.dedent(
    """
    import sys, time
    from pathlib import Path
    from transformers import TrainerCallback
    from engram.training.progress import LiveProgress
    from tests.training.test_trainer import make, tiny_memory, tiny_model

    class Wait(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            if state.global_step == 5:
                Path(sys.argv[1], "at step 5").touch()
                until = time.monotonic() + 30
                while not trainer.interrupt.interrupted and time.monotonic() < until:
                    time.sleep(0.05)

    folder = Path(sys.argv[1])
    trainer = make(folder, tiny_memory(tiny_model(), speak=False), [Wait(), LiveProgress()], save_strategy="steps", save_steps=50)
    trainer.train()
    print("nobody reads this", flush=True)
    """
)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a terminal that can be closed")
def test_a_run_whose_terminal_is_closed_saves_and_ends(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", _CLOSED, _WATCHED, str(tmp_path)], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "checkpoint-6" / "trainer_state.json").exists()


def test_signals_mean_afterwards_what_they_meant_before():
    before = [signal.getsignal(number) for number in STOPS]
    heard = []
    with signals_given_back(lambda number, frame: heard.append(number)):
        signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGHUP)  # the shell's, after the system's
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
    assert heard == [signal.SIGHUP, signal.SIGTERM, signal.SIGTERM]
    assert [signal.getsignal(number) for number in STOPS] == before
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    try:
        with signals_given_back(lambda number, frame: heard.clear()):
            signal.raise_signal(signal.SIGHUP)
        assert (len(heard), signal.getsignal(signal.SIGHUP)) == (3, signal.SIG_IGN)
        give_back({signal.SIGHUP: None})  # as `getsignal` says of what is not Python's
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before[STOPS.index(signal.SIGHUP)])


@pytest.mark.slow
@pytest.mark.parametrize("signal_name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_an_interrupted_run_saves_and_goes_on(tmp_path, signal_name):
    whole = make(tmp_path / "whole", tiny_memory(tiny_model(), speak=False))
    whole.train()
    stopped = run_and_stop(tmp_path / "i", 5, signal_name)
    assert stopped.returncode == 0, stopped.stderr
    assert "stopped at step" in stopped.stderr
    found = sorted(os.listdir(tmp_path / "i" / "run"))
    last = found[-1]
    state = json.loads((tmp_path / "i" / "run" / last / "trainer_state.json").read_text())
    again = make(tmp_path / "i", tiny_memory(tiny_model(), speak=False))
    again.train(resume_from_checkpoint=str(tmp_path / "i" / "run" / last))
    rest = 8 - state["global_step"]
    assert losses(again)[-rest:] == losses(whole)[-rest:]


@pytest.mark.parametrize("placement", [TableConfig(dtype="int8"), TableConfig(tier="mmap")])
def test_rows_that_are_only_read_are_not_trained_by_mistake(tmp_path, placement):
    memory = tiny_memory(tiny_model())
    memory.save_pretrained(tmp_path / "m")
    memory.unload()
    memory = EngramModel.from_pretrained(tiny_model(), tmp_path / "m", tiny_tokenizer(), placement)
    with pytest.raises(ConfigError, match=r"train_tables: got True with the rows of layer 0 in .* which are only read"):
        make(tmp_path, memory)
    make(tmp_path, memory, train_tables=False).train()


def test_a_seeded_reader_stays_as_its_seed_says(tmp_path):
    seeded = {"reader": "seeded", "use_bias": False, "use_conv": False}
    memory = tiny_memory(tiny_model(), speak=False, **seeded)
    make(tmp_path, memory, max_steps=6, learning_rate=3e-2).train()
    memory.save_pretrained(tmp_path / "m")
    ids = Rows().ids[:4]
    with torch.no_grad():
        expected = memory.eval()(input_ids=ids).logits
        memory.unload()
        again = EngramModel.from_pretrained(tiny_model(), tmp_path / "m", tiny_tokenizer()).eval()
        assert torch.equal(again(input_ids=ids).logits, expected)
    moved = tiny_memory(tiny_model(), speak=False, **seeded)
    with torch.no_grad():
        moved.engrams["2"].value_proj.weight[0, 0] *= 1.01
    with pytest.raises(CheckpointError, match="layer 2: got a trained reader"):
        moved.save_pretrained(tmp_path / "moved")
    assert not (tmp_path / "moved").exists()


def test_taught_rows_are_not_trained_by_mistake(tmp_path):
    config = EngramConfig.for_teaching(layer_ids=(2,), pad_id=1)
    taught = get_engram_model(tiny_model(), config, tiny_tokenizer())
    with pytest.raises(ConfigError, match=r"taught memory .* use MemoryEditor\.teach"):
        make(tmp_path, taught)
    with pytest.raises(ConfigError, match=r"nothing to train|no parameter is trainable"):
        make(tmp_path, taught, train_tables=False).train()


def test_a_reader_is_trained_over_rows_mapped_in_place_and_goes_on_from_its_checkpoints(tmp_path):
    memory = tiny_memory(tiny_model())
    memory.save_pretrained(tmp_path / "m")
    options = {"train_tables": False, "save_strategy": "steps", "save_steps": 4, "max_steps": 8}

    def trainer(**changes):
        placed = EngramModel.from_pretrained(tiny_model(), tmp_path / "m", tiny_tokenizer(), TableConfig(tier="mmap"))
        return make(tmp_path, placed, **{**options, **changes})

    first = trainer()
    first.train()
    again = trainer()
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert losses(again)[-4:] == losses(first)[-4:]
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 4, "output_dir": str(tmp_path / "best")}
    trainer(held_out=Rows(8), **best).train()
    other = tiny_memory(tiny_model(), seed=1)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"and .* holds others"):
        again.model.load_memory(tmp_path / "other")


def test_what_to_train_is_chosen_by_the_arguments(tmp_path):
    memory = tiny_memory(tiny_model())
    make(tmp_path, memory, train_reader=False)
    assert {n.split(".")[-2] for n, p in memory.named_parameters() if p.requires_grad} == {"embedding"}
    make(tmp_path, memory, train_tables=False)
    assert not any("embedding.weight" in n for n, p in memory.engrams.named_parameters() if p.requires_grad)
    with pytest.raises(ConfigError, match="nothing to train"):
        make(tmp_path, memory, train_tables=False, train_reader=False)
    with pytest.raises(ConfigError, match="expected an EngramModel"):
        make(tmp_path, tiny_model())
    with pytest.raises(ConfigError, match="expected EngramTrainingArguments"):
        EngramTrainer(memory, TrainingArguments(output_dir=str(tmp_path), report_to=[]))


def test_dropped_sequences_train_the_backbone_alone(tmp_path):
    def run(share):
        torch.manual_seed(0)
        memory = tiny_memory(tiny_model())
        before = {name: p.clone() for name, p in memory.engrams.named_parameters()}
        trainer = make(tmp_path, memory, train_backbone=True, memory_dropout=share, table_weight_decay=0.0, weight_decay=0.0)
        routes = []
        original = memory.routed
        memory.routed = lambda route: routes.append(route) or original(route)
        trainer.train()
        changed = {name for name, p in memory.engrams.named_parameters() if not torch.equal(p, before[name])}
        return losses(trainer), changed, routes

    all_dropped, changed, routes = run(1 - 2**-50)  # as good as always
    assert not changed
    assert not any(route.any() for route in routes)
    plain_model = tiny_model()
    arguments = EngramTrainingArguments(**fields_for(tmp_path, train_backbone=True))
    plain = EngramTrainer(plain_model, arguments, train_dataset=Rows())
    plain.train()
    assert all_dropped == pytest.approx(losses(plain), rel=1e-4)
    half, changed, routes = run(0.5)
    assert changed
    dropped = 1 - torch.cat(routes).float().mean()
    assert 0.2 < dropped < 0.8  # of 32 sequences
    never, _, routes = run(0.0)
    assert routes == [None] * 8
    assert half != never != all_dropped
    for share in (-0.1, 1.0, True):
        with pytest.raises(ConfigError, match="memory_dropout"):
            make(tmp_path, memory_dropout=share)


def test_the_tokenizer_is_saved_with_a_checkpoint(tmp_path):
    trainer = make(tmp_path)
    trainer.processing_class = tiny_tokenizer()
    trainer.save_model(str(tmp_path / "out"))
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert (tmp_path / "out" / "engram.json").is_file()


def test_columns_that_the_base_model_does_not_take_are_left_out(tmp_path):
    runs = []
    for extra in (False, True):
        trainer = make(tmp_path, tiny_memory(tiny_model()), data=Rows(extra=extra), max_steps=2)
        trainer.train()
        runs.append(losses(trainer))
    assert_close(torch.tensor(runs[1]), torch.tensor(runs[0]))


def test_evaluation_reports_the_loss_of_the_model(tmp_path):
    memory, held_out = tiny_memory(tiny_model()), Rows(8)
    reported = make(tmp_path, memory).evaluate(held_out)["eval_loss"]
    with torch.no_grad():
        expected = memory(input_ids=held_out.ids, labels=held_out.ids).loss
    assert reported == pytest.approx(float(expected), rel=1e-5)


def test_label_smoothing_is_that_of_the_base_model(tmp_path):
    """A silent memory changes no logits, so the first loss must be the plain Trainer's; the labels are shifted, that is."""
    ours = make(tmp_path / "a", tiny_memory(tiny_model(), speak=False), label_smoothing_factor=0.1, max_steps=1)
    theirs = Trainer(
        tiny_model(),
        TrainingArguments(**fields_for(tmp_path / "b", label_smoothing_factor=0.1, max_steps=1)),
        train_dataset=Rows(),
    )
    ours.train()
    theirs.train()
    assert losses(ours) == losses(theirs)


class HighestStepIsWorst(TrainerCallback):
    def on_evaluate(self, args, state, control, metrics=None, **_):
        metrics["eval_loss"] = float(state.global_step)


@pytest.mark.parametrize("train_backbone", [False, True])
def test_the_best_model_is_loaded_at_the_end(tmp_path, train_backbone):
    trainer = make(
        tmp_path,
        tiny_memory(tiny_model()),
        [HighestStepIsWorst()],
        held_out=Rows(8),
        max_steps=4,
        train_backbone=train_backbone,
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    found = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer._load_from_checkpoint(trainer.state.best_model_checkpoint)
    assert all(torch.equal(p, found[name]) for name, p in trainer.model.named_parameters())
    trainer._load_from_checkpoint(trainer.state.best_model_checkpoint.replace("checkpoint-2", "checkpoint-4"))
    assert any(not torch.equal(p, found[name]) for name, p in trainer.model.named_parameters())


def half_precision_memory():
    return get_engram_model(tiny_model(attention_dropout=0.1), tiny_config(), tiny_tokenizer(), TableConfig(dtype="bfloat16"))


@needs_checkpointing
def test_resuming_in_the_middle_of_an_epoch_with_everything_on(tmp_path):
    options = {
        "max_steps": -1,
        "num_train_epochs": 2,
        "gradient_accumulation_steps": 3,
        "bf16": True,
        "label_smoothing_factor": 0.1,
        "activation_checkpointing": True,
        "lr_scheduler_type": "cosine",
        "save_strategy": "steps",
        "save_steps": 6,
    }
    whole = make(tmp_path / "a", half_precision_memory(), data=Rows(masked=True), **options)
    whole.train()
    again = make(tmp_path / "b", half_precision_memory(), data=Rows(masked=True), **options)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "run" / "checkpoint-6"))
    assert len(losses(whole)) == 8
    assert losses(again)[-2:] == losses(whole)[-2:]
    for (name, a), (_, b) in zip(whole.model.named_parameters(), again.model.named_parameters()):
        assert torch.equal(a, b), name


def test_a_trained_mixture_of_experts_resumes_and_loads_elsewhere(tmp_path):
    """Saved in the original format, its experts would be split and renamed."""
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "train_backbone": True}
    whole = make(tmp_path / "a", tiny_memory(tiny_model("mixtral")), **options)
    whole.train()
    run = tmp_path / "a" / "run"
    again = make(tmp_path / "b", tiny_memory(tiny_model("mixtral")), **options)
    again.train(resume_from_checkpoint=str(run / "checkpoint-2"))
    assert losses(again)[-2:] == losses(whole)[-2:]
    elsewhere = AutoModelForCausalLM.from_pretrained(run / "checkpoint-4" / "backbone").state_dict()
    assert all(torch.equal(p, elsewhere[name]) for name, p in whole.model.base_model.state_dict().items())
    other = make(tmp_path / "c", tiny_memory(tiny_model("llama")), **options)
    with pytest.raises(CheckpointError, match="does not fit this base model"):
        other.train(resume_from_checkpoint=str(run / "checkpoint-2"))


def test_an_incomplete_checkpoint_is_never_resumed_from(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}
    whole = make(tmp_path, tiny_memory(tiny_model()), **options)
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        whole.train(resume_from_checkpoint=True)
    whole.train()
    run = tmp_path / "run"
    (run / "checkpoint-6" / "trainer_state.json").unlink()
    again = make(tmp_path, tiny_memory(tiny_model()), **options)
    with pytest.raises(CheckpointError, match=r"trainer_state\.json is missing"):
        again.train(resume_from_checkpoint=str(run / "checkpoint-6"))
    again.train(resume_from_checkpoint=True)  # from 4
    assert losses(again)[-2:] == losses(whole)[-2:]


def test_a_save_cut_short_leaves_no_checkpoint_that_looks_complete(tmp_path, monkeypatch):
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    make(tmp_path, tiny_memory(tiny_model()), **options).train()

    def full_disk(folder):
        raise OSError("No space left on device")

    again = make(tmp_path, tiny_memory(tiny_model()), **options)  # writes over the same folders
    monkeypatch.setattr(again, "_save_weights", full_disk)
    with pytest.raises(OSError, match="No space left"):
        again.train()
    assert not (tmp_path / "run" / "checkpoint-2" / "trainer_state.json").exists()
    assert last_checkpoint(tmp_path / "run") == tmp_path / "run" / "checkpoint-4"  # the earlier run's, still whole


class Killed(BaseException):
    """What nobody can answer."""


def test_a_checkpoint_that_is_killed_while_written_over_does_not_look_complete(tmp_path, monkeypatch):
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    make(tmp_path, **options).train()
    checkpoint = tmp_path / "run" / "checkpoint-2"
    assert is_complete(checkpoint)
    again = make(tmp_path, **options)

    def killed(*args, **kwargs):
        raise Killed

    monkeypatch.setattr(again, "_save", killed)
    with pytest.raises(Killed):
        again.train()
    assert checkpoint.is_dir()
    assert not is_complete(checkpoint)


def test_a_checkpoint_is_on_the_disk_before_older_ones_go(tmp_path, monkeypatch):
    synced, at_rotation = set(), []

    def rotate(*args, **kwargs):
        at_rotation.append({file for file in checkpoint.rglob("*") if file.is_file()} - synced)

    checkpoint = tmp_path / "run" / "checkpoint-2"
    monkeypatch.setattr(safe_trainer, "sync_to_disk", lambda file: synced.add(file))
    monkeypatch.setattr(safe_trainer, "rotate_checkpoints", rotate)
    make(tmp_path, save_strategy="steps", save_steps=2, max_steps=2).train()
    assert at_rotation == [set()]
    assert {checkpoint / "trainer_state.json", checkpoint, checkpoint.parent} <= synced


def test_a_second_ctrl_c_stops_at_once():
    callback = SaveOnInterrupt()
    callback._on_signal(signal.SIGINT, None)
    assert callback.interrupted
    with pytest.raises(KeyboardInterrupt):
        callback._on_signal(signal.SIGINT, None)


def test_an_interruption_is_over_when_training_begins_again(tmp_path):
    trainer = make(tmp_path, max_steps=3, save_strategy="steps", save_steps=50)
    stop = AtFirstStep(lambda: signal.raise_signal(signal.SIGTERM))
    trainer.add_callback(stop)
    trainer.train()
    assert trainer.state.global_step == 1
    trainer.remove_callback(stop)
    trainer.train()
    assert trainer.state.global_step == 3


class AtFirstStep(TrainerCallback):
    def __init__(self, action):
        self.action = action

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == 0:
            self.action()


def test_a_failing_training_gives_ctrl_c_back(tmp_path):
    class Broken(Rows):
        def __getitem__(self, i):
            raise RuntimeError("broken row")

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(RuntimeError, match="broken row"):
        make(tmp_path, data=Broken()).train()
    assert signal.getsignal(signal.SIGINT) is before


def test_a_gradient_scaler_is_saved_without_pickle(tmp_path):
    trainer = make(tmp_path, max_steps=1)
    trainer._save_scaler(str(tmp_path))  # none in float32
    assert not list(tmp_path.glob("scaler*"))
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    trainer._save_scaler(str(tmp_path))
    assert {p.suffix for p in tmp_path.glob("scaler*")} == {".json", ".safetensors"}
    saved, trainer.accelerator.scaler = trainer.accelerator.scaler, torch.amp.GradScaler("cpu")
    trainer._load_scaler(str(tmp_path))
    assert trainer.accelerator.scaler.state_dict() == saved.state_dict()


def test_another_optimizer_must_be_passed_in(tmp_path):
    with pytest.raises(ConfigError, match=r"optim: got 'sgd'"):
        make(tmp_path, optim="sgd").create_optimizer()
    memory = tiny_memory(tiny_model())
    own = torch.optim.SGD(memory.engrams.parameters(), lr=0.1)
    args = EngramTrainingArguments(**fields_for(tmp_path, optim="sgd"))
    assert EngramTrainer(memory, args, train_dataset=Rows(), optimizers=(own, None)).create_optimizer() is own


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"table_row_state": "sgd"}, r"EngramTrainingArguments.table_row_state: got 'sgd', expected one of adam"),
        ({"table_lr_multiplier": -1.0}, "table_lr_multiplier: got -1.0, expected a number from 0 on"),
        ({"table_weight_decay": float("nan")}, "table_weight_decay: got nan"),
        ({"backbone_lr": 1e-3}, "backbone_lr: got 0.001 with train_backbone=False"),
    ],
)
def test_impossible_arguments_are_refused_before_training(tmp_path, changes, words):
    with pytest.raises(ConfigError, match=words):
        make(tmp_path, **changes)


class Watches(TrainerCallback):
    """What holds in the middle of a run."""

    def __init__(self, base, fails=False):
        self.base, self.fails, self.seen = base, fails, set()

    def on_step_end(self, args, state, control, **_):
        self.seen.add((self.base.loss_function is causal_lm_loss, kept_memory._users))
        if self.fails:
            raise ValueError("in the middle")


@pytest.mark.parametrize(("plain", "keep"), [(False, True), (False, False), (True, True)])
def test_a_run_keeps_memory_and_spares_it_until_it_ends(tmp_path, plain, keep):
    memory = tiny_memory(tiny_model(), speak=False)
    base = memory.base_model
    watch = Watches(base)
    model = memory.unload() if plain else memory
    make(tmp_path, model, callbacks=[watch], keep_memory=keep, train_backbone=plain, max_steps=2).train()
    assert watch.seen == {(True, int(keep and kept_memory._glibc() is not None))}
    failing = Watches(base, fails=True)
    with pytest.raises(ValueError, match="in the middle"):
        make(tmp_path / "failing", model, callbacks=[failing], keep_memory=keep, train_backbone=plain, max_steps=2).train()
    assert failing.seen == watch.seen
    assert base.loss_function is ForCausalLMLoss
    assert kept_memory._users == 0


def test_the_optimiser_gets_what_the_arguments_say(tmp_path):
    asked = {
        "adam_beta1": 0.8,
        "adam_beta2": 0.9,
        "table_weight_decay": 0.25,
        "weight_decay": 0.125,
        "table_stochastic_rounding": True,
    }
    trainer = make(tmp_path, table_row_state="rowwise_adam", **asked)
    defaults, groups = trainer.create_optimizer().defaults, trainer.optimizer.param_groups
    assert defaults["betas"] == (0.8, 0.9)
    assert (defaults["row_state"], defaults["stochastic_rounding"]) == ("rowwise_adam", True)
    of_tables = [group for group in groups if any(p is table for p in group["params"] for table in tables_of(trainer.model))]
    assert {group["weight_decay"] for group in of_tables} == {0.25}
    assert {group["weight_decay"] for group in groups if group not in of_tables} <= {0.125, 0.0}


def tables_of(memory):
    return [engram.multi_head_embedding.embedding.weight for engram in memory.engrams.values()]


def test_every_source_of_chance_goes_on_where_it_was(tmp_path):
    trainer = make(tmp_path)

    def drawn():
        return random.random(), float(numpy.random.random()), float(torch.rand(()))

    trainer._save_rng_state(str(tmp_path / "checkpoint"))
    expected = drawn()
    trainer._load_rng_state(str(tmp_path / "checkpoint"))
    assert drawn() == expected
