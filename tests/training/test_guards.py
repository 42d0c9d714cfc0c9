import errno
import os
import resource
import shutil
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from transformers import TrainerCallback, TrainingArguments

from engram import CheckpointError, ConfigError, EngramTrainingArguments, TableConfig, get_engram_model
from engram.errors import TrainingError
from engram.testing import tiny_config, tiny_memory, tiny_model, tiny_tokenizer
from engram.training import guards
from engram.training.guards import last_checkpoint, weights_are_finite
from engram.training.safe_trainer import SafeTrainer
from tests.training.test_trainer import Rows, fields_for, losses, make
from tests.versions import needs_torch_2_7

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")


class AtStep(TrainerCallback):
    """Does something before a step (counted from 1) is taken."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_begin(self, args, state, control, model=None, **_):
        if state.global_step + 1 == self.step:
            self.action(model)


def spoil(model):
    """A weight that is no number, as an overflow leaves one."""
    with torch.no_grad():
        next(p for p in model.parameters() if p.dim() == 1)[0] = float("nan")


def explode(model):
    """A finite loss with an infinite gradient."""
    parameter = next(p for p in model.parameters() if p.requires_grad and p.dim() == 1)
    parameter.register_hook(lambda grad: grad + float("inf"))


def checkpoints(tmp_path):
    return sorted(p.name for p in (tmp_path / "run").glob("checkpoint-*"))


def plain(tmp_path, callbacks, **changes):
    """A trainer for any model, without a memory and without Engram's arguments."""
    args = TrainingArguments(**fields_for(tmp_path, **changes))
    return SafeTrainer(model=tiny_model(), args=args, train_dataset=Rows(), callbacks=callbacks)


def engram(tmp_path, callbacks, **changes):
    return make(tmp_path, tiny_memory(tiny_model()), callbacks, **changes)


@pytest.mark.parametrize("build", [plain, engram])
@pytest.mark.parametrize("filtered", [True, False])
@pytest.mark.parametrize(("spoiling", "what"), [(spoil, "the loss is nan"), (explode, "the gradient norm is (inf|nan)")])
def test_what_is_no_number_ends_the_run_at_once(tmp_path, build, spoiling, what, filtered):
    trainer = build(tmp_path, [AtStep(4, spoiling)], save_strategy="steps", save_steps=1, logging_nan_inf_filter=filtered)
    message = rf"stopped at step 4: {what} \(learning rate 0\.01\).* the last good checkpoint is .*checkpoint-3\."
    with pytest.raises(TrainingError, match=message):
        trainer.train()
    assert trainer.state.global_step == 3
    assert checkpoints(tmp_path) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    assert len(losses(trainer)) == 3


def test_without_clipping_the_gradient_is_watched_too(tmp_path):
    with pytest.raises(TrainingError, match=r"stopped at step 2: the gradient norm.*holds no checkpoint yet"):
        make(tmp_path, tiny_memory(tiny_model()), [AtStep(2, explode)], max_grad_norm=0.0).train()


@needs_torch_2_7("AdamW itself refuses such a step")
def test_weights_that_are_no_numbers_are_not_saved(tmp_path):
    """A step of 1e39 leaves float32, while loss and gradient of that step were still finite."""
    trainer = make(tmp_path, tiny_memory(tiny_model()), learning_rate=1e39, save_strategy="steps", save_steps=1)
    with pytest.raises(TrainingError, match=r"stopped at step 1: a weight is nan.*holds no checkpoint yet"):
        trainer.train()
    assert checkpoints(tmp_path) == []
    assert not weights_are_finite(trainer.model)


def test_a_gradient_scaler_deals_with_infinities_itself(tmp_path):
    trainer = make(tmp_path)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu")
    assert trainer._get_grad_norm(trainer.model, torch.tensor(float("inf"))) == float("inf")


@pytest.mark.parametrize("max_grad_norm", [1e-3, 0.0])
def test_scaled_gradients_are_clipped_and_told_by_their_true_size(tmp_path, monkeypatch, max_grad_norm):
    """As in float16, where a loss is scaled up so that small gradients are not lost."""

    def norms(name, scale):
        seen = []

        class Look(TrainerCallback):
            def on_pre_optimizer_step(self, args, state, control, model=None, **_):
                grads = [
                    p.grad.coalesce().values() if p.grad.is_sparse else p.grad for p in model.parameters() if p.grad is not None
                ]
                seen.append(float(torch.stack([grad.norm() for grad in grads]).norm()))

        torch.manual_seed(0)
        trainer = make(tmp_path / name, callbacks=[Look()], max_steps=3, max_grad_norm=max_grad_norm)
        if scale:
            monkeypatch.setattr(trainer.accelerator.state, "_mixed_precision", "fp16")
            trainer.accelerator.native_amp = True
            trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
        trainer.train()
        return seen, [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]

    plain, scaled = norms("plain", False), norms("scaled", True)
    for a, b in zip(plain, scaled):
        assert b == pytest.approx(a, rel=0.2)  # float16 rounds; the scale is 65,536


def test_batches_divided_between_gpus_by_one_process_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(EngramTrainingArguments, "n_gpu", property(lambda self: 2))
    with pytest.raises(ConfigError, match="torchrun --nproc-per-node 2, or choose one GPU with CUDA_VISIBLE_DEVICES"):
        make(tmp_path)


@contextmanager
def files_up_to(size):
    """The system refuses to write files larger than this; Python ignores the signal and the write fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def snapshot(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("size", [2_000, 20_000, 100_000])
def test_a_checkpoint_that_does_not_fit_leaves_the_one_before(tmp_path, size):
    def build():
        options = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1, "train_backbone": True, "max_steps": 6}
        options["log_memory"] = False  # what is printed goes into a file too, which the limit is for as well
        return make(tmp_path, tiny_memory(tiny_model(), speak=False), [*waiting], **options)

    waiting = []
    whole = build()
    whole.train()
    expected = losses(whole)
    shutil.rmtree(tmp_path / "run")

    limit = files_up_to(size)
    waiting.append(AtStep(4, lambda model: limit.__enter__()))
    trainer = build()
    try:
        with pytest.raises(CheckpointError) as caught:
            trainer.train()
    finally:
        limit.__exit__(None, None, None)
    assert "File too large" in str(caught.value)
    assert "checkpoint-4: " in str(caught.value)
    assert f"go on from {tmp_path / 'run' / 'checkpoint-2'}, which is whole" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert checkpoints(tmp_path) == ["checkpoint-2"]
    waiting.clear()
    again = build()
    again.train(resume_from_checkpoint=True)
    assert losses(again)[-4:] == expected[-4:]


def test_a_full_disk_at_the_very_end_of_a_checkpoint(tmp_path, monkeypatch):
    """The trainer's state is written last, by transformers."""
    trainer = engram(tmp_path, [], save_strategy="steps", save_steps=2, max_steps=4)
    trainer.train()
    earlier = snapshot(tmp_path / "run" / "checkpoint-2")
    again = engram(tmp_path, [], save_strategy="steps", save_steps=3, max_steps=4)

    def full(self, path):
        raise OSError(errno.ENOSPC, "No space left on device", path)

    monkeypatch.setattr("transformers.trainer_callback.TrainerState.save_to_json", full)
    with pytest.raises(CheckpointError, match=r"checkpoint-3: .*No space left on device.*go on from .*checkpoint-4"):
        again.train()
    assert checkpoints(tmp_path) == ["checkpoint-2", "checkpoint-4"]
    assert snapshot(tmp_path / "run" / "checkpoint-2") == earlier


def test_a_state_file_that_was_cut_short_is_no_checkpoint(tmp_path):
    for number in (2, 10):
        folder = tmp_path / f"checkpoint-{number}"
        folder.mkdir()
        (folder / "trainer_state.json").write_text('{"global_step": ' + str(number) + "}")
    (tmp_path / "checkpoint-old").mkdir()
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    (tmp_path / "checkpoint-10" / "trainer_state.json").write_text('{"global_st')
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    with pytest.raises(CheckpointError, match="cut short"):
        make(tmp_path, nn_memory()).train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))


def nn_memory():
    return tiny_memory(tiny_model(), speak=False)


@pytest.mark.parametrize(("report", "extra"), [("tensorboard", "tensorboard"), ("wandb", "wandb")])
def test_a_report_whose_package_is_missing_is_refused(tmp_path, monkeypatch, report, extra):
    monkeypatch.setattr(guards.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=rf"got '{report}'.*pip install 'engram-memory\[{extra}\]'"):
        make(tmp_path, report_to=[report])


def test_frozen_weights_are_not_looked_at():
    model = nn.Linear(2, 2)
    spoil(model)
    assert not weights_are_finite(model)
    assert weights_are_finite(model.requires_grad_(False))


class AfterStep(TrainerCallback):
    """Does something once a step (counted from 1) is taken, and before it is saved."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            self.action()


def in_row_files(tmp_path, change):
    """A run with rows in files, one of which is changed before the second checkpoint."""
    placed = TableConfig(tier="mmap", path=str(tmp_path / "rows"))
    memory = get_engram_model(tiny_model(), tiny_config(), tiny_tokenizer(), placed)
    changed = AfterStep(4, lambda: change(tmp_path / "rows" / "layer-2.rows"))
    return make(tmp_path, memory, [changed], save_strategy="steps", save_steps=2, max_steps=4)


def test_a_checkpoint_whose_rows_are_cut_short_is_removed(tmp_path):
    trainer = in_row_files(tmp_path, lambda file: os.truncate(file, 100))
    with pytest.raises(CheckpointError, match=r"checkpoint-4: .*layer-2.rows.*go on from .*checkpoint-2"):
        trainer.train()
    assert checkpoints(tmp_path) == ["checkpoint-2"]


def test_a_checkpoint_whose_rows_are_there_without_a_name_is_whole(tmp_path):
    in_row_files(tmp_path, lambda file: file.unlink()).train()
    assert checkpoints(tmp_path) == ["checkpoint-2", "checkpoint-4"]
    read_anew = TableConfig(tier="mmap", path=str(tmp_path / "other"))
    memory = get_engram_model(tiny_model(), tiny_config(), tiny_tokenizer(), read_anew)
    memory.load_memory(tmp_path / "run" / "checkpoint-4")


def test_what_a_kill_left_of_a_checkpoint_costs_no_whole_one_its_place(tmp_path, monkeypatch):
    """Where times of files say nothing, the numbers decide which checkpoints are old."""
    monkeypatch.setattr("transformers.trainer_utils.os.path.getmtime", lambda path: 0.0)
    saving = {"save_strategy": "steps", "save_total_limit": 1}
    make(tmp_path, max_steps=2, save_steps=2, **saving).train()
    half = tmp_path / "run" / "checkpoint-4"
    half.mkdir()
    (half / "engram.json").write_text("{}")
    (tmp_path / "run" / "checkpoint-of-mine").mkdir()
    make(tmp_path, max_steps=3, save_steps=3, **saving).train(resume_from_checkpoint=True)
    assert checkpoints(tmp_path) == ["checkpoint-3", "checkpoint-of-mine"]
    assert last_checkpoint(tmp_path / "run") == tmp_path / "run" / "checkpoint-3"
