import json
import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from torch.utils.data import Dataset

from engram import ConfigError, EngramTrainer, EngramTrainingArguments
from engram.optim import EngramAdamW
from engram.testing import assert_close, tiny_memory, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")


class Rows(Dataset):
    def __init__(self, count=48, length=12, extra=False):
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(2, 300, (count, length), generator=generator)
        self.extra = extra

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        return {"input_ids": self.ids[i], "labels": self.ids[i]}


def make(tmp_path, memory=None, callbacks=(), **changes):
    memory = memory or tiny_memory(speak=False)
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
    return EngramTrainer(
        memory, EngramTrainingArguments(**{**fields, **changes}), train_dataset=Rows(), callbacks=list(callbacks)
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


@pytest.mark.parametrize("bf16", [False, True])
def test_accumulation_equals_one_big_batch(tmp_path, bf16):
    runs = []
    for size, accumulate in ((8, 1), (2, 4)):
        trainer = make(
            tmp_path,
            tiny_memory(tiny_model()),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulate,
            max_steps=3,
            bf16=bf16,
            learning_rate=1e-3,
        )
        trainer.train()
        runs.append(losses(trainer))
    assert_close(torch.tensor(runs[1]), torch.tensor(runs[0]), 2e-2 if bf16 else 1e-4)


def test_gradient_checkpointing_changes_nothing(tmp_path):
    runs = []
    for checkpointing in (False, True):
        trainer = make(
            tmp_path, tiny_memory(tiny_model()), train_backbone=True, activation_checkpointing=checkpointing, max_steps=4
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
    whole = make(tmp_path / "a", tiny_memory(tiny_model(attention_dropout=0.1), speak=False), **options)
    whole.train()
    checkpoint = tmp_path / "a" / "run" / "checkpoint-4"
    again = make(tmp_path / "b", tiny_memory(tiny_model(attention_dropout=0.1), speak=False), **options)
    again.train(resume_from_checkpoint=str(checkpoint))
    assert losses(again)[-4:] == losses(whole)[-4:]
    for (name, a), (_, b) in zip(whole.model.named_parameters(), again.model.named_parameters()):
        assert torch.equal(a, b), name
    suffixes = {p.suffix for p in checkpoint.rglob("*") if p.is_file()}
    assert not suffixes & {".pt", ".pth", ".bin", ".pkl"}


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
    return subprocess.run(
        [sys.executable, "-c", _KILLED, str(tmp_path), str(step), how], capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_kill_and_interrupt(tmp_path):
    whole = make(tmp_path / "whole", tiny_memory(tiny_model(), speak=False))
    whole.train()
    killed = run_and_stop(tmp_path / "k", 5, "SIGKILL")
    assert killed.returncode == -signal.SIGKILL
    again = make(tmp_path / "k", tiny_memory(tiny_model(), speak=False))
    again.train(resume_from_checkpoint=str(tmp_path / "k" / "run" / "checkpoint-3"))
    assert losses(again)[-5:] == losses(whole)[-5:]
    stopped = run_and_stop(tmp_path / "i", 5, "SIGINT")
    assert stopped.returncode == 0, stopped.stderr
    assert "stopped at step" in stopped.stderr
    found = sorted(os.listdir(tmp_path / "i" / "run"))
    last = found[-1]
    state = json.loads((tmp_path / "i" / "run" / last / "trainer_state.json").read_text())
    again = make(tmp_path / "i", tiny_memory(tiny_model(), speak=False))
    again.train(resume_from_checkpoint=str(tmp_path / "i" / "run" / last))
    rest = 8 - state["global_step"]
    assert losses(again)[-rest:] == losses(whole)[-rest:]


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
    from transformers import TrainingArguments

    with pytest.raises(ConfigError, match="expected EngramTrainingArguments"):
        EngramTrainer(memory, TrainingArguments(output_dir=str(tmp_path), report_to=[]))


def test_the_tokenizer_is_saved_with_a_checkpoint(tmp_path):
    trainer = make(tmp_path)
    trainer.processing_class = tiny_tokenizer()
    trainer.save_model(str(tmp_path / "out"))
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert (tmp_path / "out" / "engram.json").is_file()
