"""Muon and AdamW for the backbone, with a memory and without, by the same trainer."""

import os
import signal
import textwrap
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from engram import ConfigError, EngramTrainer, EngramTrainingArguments
from engram.optim import EngramAdamW, EngramMuon
from engram.testing import tiny_memory, tiny_model
from engram.training.guards import last_checkpoint
from tests.children import run_python
from tests.training.test_trainer import fields_for, losses, make

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")

OPTIMISERS = {"adamw": EngramAdamW, "muon": EngramMuon}


def built(kind, with_memory):
    model = tiny_model(kind, attention_dropout=0.1)
    return tiny_memory(model, speak=False) if with_memory else model


def small_memory():
    return built("deepseek_v3", True)


def full_run(tmp_path, optimizer, model, **changes):
    options = {
        "train_backbone": True,
        "backbone_optimizer": optimizer,
        "lr_scheduler_type": "cosine",
        "bf16": True,
        "weight_decay": 0.1,
    }
    return make(tmp_path, model, **{"save_strategy": "steps", "save_steps": 4, **options, **changes})


@pytest.mark.parametrize("with_memory", [True, False])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resuming_gives_the_same_losses_to_the_last_digit(tmp_path, optimizer, with_memory):
    whole = full_run(tmp_path / "a", optimizer, built("deepseek_v3", with_memory))
    whole.train()
    assert type(whole.optimizer.optimizer) is OPTIMISERS[optimizer]
    again = full_run(tmp_path / "b", optimizer, built("deepseek_v3", with_memory))
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "run" / "checkpoint-4"))
    assert losses(again)[-4:] == losses(whole)[-4:]
    for (name, a), (_, b) in zip(whole.model.named_parameters(), again.model.named_parameters()):
        assert torch.equal(a, b), name


def test_a_plain_model_is_saved_where_from_pretrained_finds_it(tmp_path):
    trainer = full_run(tmp_path, "muon", tiny_model("deepseek_v3"), max_steps=2, save_steps=2)
    trainer.train()
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-2").state_dict()
    assert all(torch.equal(p, found[name]) for name, p in trainer.model.state_dict().items())
    with pytest.raises(ConfigError, match="has no memory"):
        _ = trainer.memory


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_plain_model_trains_as_one_whose_memory_is_silent(tmp_path, optimizer):
    """The baseline differs from the arm with a memory in the memory alone: same groups, same steps, same losses."""
    silent, plain = tiny_memory(tiny_model("mixtral"), speak=False), tiny_model("mixtral")
    options = {"train_tables": False, "train_reader": False, "max_grad_norm": 0.5, "save_strategy": "no", "max_steps": 5}
    runs = [full_run(tmp_path / name, optimizer, m, **options) for name, m in (("silent", silent), ("plain", plain))]
    groups = []
    for trainer in runs:
        trainer.train()
        groups.append([(g["name"], len(g["params"]), g["weight_decay"]) for g in trainer.optimizer.param_groups])
    assert groups[0] == groups[1]
    assert losses(runs[0]) == losses(runs[1])
    for (name, a), b in zip(plain.named_parameters(), silent.base_model.parameters()):
        assert torch.equal(a, b), name


def test_the_learning_rate_in_the_log_is_the_base_one(tmp_path):
    trainer = make(tmp_path, max_steps=1)
    trainer.train()
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(0.05)  # tables
    assert trainer.state.log_history[0]["learning_rate"] == pytest.approx(0.01)


def test_arguments_that_contradict_each_other_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="got 'muon' with train_backbone=False"):
        make(tmp_path, backbone_optimizer="muon")
    with pytest.raises(ConfigError, match="backbone_optimizer: got 'lion'"):
        make(tmp_path, backbone_optimizer="lion", train_backbone=True)
    with pytest.raises(ConfigError, match="got a Linear, expected an EngramModel"):
        EngramTrainer(torch.nn.Linear(2, 2), EngramTrainingArguments(**fields_for(tmp_path, train_backbone=True)))


def test_an_optimiser_of_the_other_kind_does_not_resume(tmp_path):
    full_run(tmp_path, "muon", tiny_model(), max_steps=2, save_steps=2).train()
    other = full_run(tmp_path, "adamw", tiny_model(), max_steps=4, save_steps=2)
    with pytest.raises(OSError, match="optimiser state: got parameter groups"):
        other.train(resume_from_checkpoint=True)


_KILLED = textwrap.dedent(
    """
    import os, sys, time
    from pathlib import Path
    from tests.training.test_backbones import die_while_training

    # One interpreter for all runs: each forked child trains until it is killed.
    for optimizer, moment in (("adamw", "step 6"), ("muon", "step 6"), ("muon", "saving 8")):
        child = os.fork()
        if child == 0:
            die_while_training(Path(sys.argv[1]) / optimizer / moment.replace(" ", "-"), optimizer, moment)
        _, status = os.waitpid(child, 0)
        print("ended by", os.WTERMSIG(status), flush=True)
    """
)


def die_while_training(folder, optimizer, moment):
    """Train until the moment comes, then SIGKILL this process: after a step, or with a checkpoint half written."""
    trainer = full_run(folder, optimizer, small_memory(), max_steps=10, save_steps=4)
    what, number = moment.split()
    inner, method = (trainer, "_save_rng_state") if what == "saving" else (trainer.interrupt, "on_step_end")
    original = getattr(inner, method)

    def kill(*args, **kwargs):
        if trainer.state.global_step == int(number):
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(inner, method, kill)
    trainer.train()
    os._exit(1)


@pytest.mark.slow
def test_killed_at_any_moment_a_run_goes_on_with_the_same_losses(tmp_path):
    done = run_python("-c", _KILLED, tmp_path)
    assert [line for line in done.stdout.splitlines() if "ended by" in line] == 3 * ["ended by 9"], done.stderr
    whole = {}
    for optimizer in ("adamw", "muon"):
        whole[optimizer] = full_run(tmp_path / f"whole-{optimizer}", optimizer, small_memory(), max_steps=10)
        whole[optimizer].train()
    for optimizer, moment in (("adamw", "step-6"), ("muon", "step-6"), ("muon", "saving-8")):
        run = tmp_path / optimizer / moment
        assert last_checkpoint(run / "run") == Path(run, "run", "checkpoint-4")
        again = full_run(run, optimizer, small_memory(), max_steps=10)
        again.train(resume_from_checkpoint=True)
        assert losses(again)[-6:] == losses(whole[optimizer])[-6:]
        for (name, a), (_, b) in zip(whole[optimizer].model.named_parameters(), again.model.named_parameters()):
            assert torch.equal(a, b), name
