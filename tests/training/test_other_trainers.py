"""Memories trained by transformers' own Trainer, and by TRL's where it is installed."""

import shutil
from pathlib import Path
from types import MethodType, SimpleNamespace

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from engram import AttachError, CheckpointError, ConfigError, EngramModel, EngramTrainer, EngramTrainingArguments, TrainingError
from engram.optim import EngramMuon, build_optimizer, clip_grad_norm_
from engram.testing import tiny_memory, tiny_model, tiny_tokenizer
from engram.training import MemoryCallback, other_trainers
from engram.training.lean_loss import lean_loss
from tests.training.test_trainer import Rows, fields_for, losses
from tests.versions import needs_checkpointing, needs_torch_2_7

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
LR = 1e-2


def make(tmp_path, memory, callbacks=None, optimizer=None, **changes):
    changes = {"max_grad_norm": 0, **changes}
    return Trainer(
        memory.base_model,
        TrainingArguments(**fields_for(tmp_path, **changes)),
        train_dataset=Rows(),
        eval_dataset=Rows(8),
        callbacks=[MemoryCallback(memory)] if callbacks is None else callbacks,
        optimizers=(optimizer or build_optimizer(memory, LR), None),
    )


def parameters(memory):
    return {name: p.detach().clone() for name, p in memory.engrams.named_parameters()}


def equal(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


@needs_torch_2_7("its fused AdamW rounds otherwise")
@pytest.mark.parametrize(
    "changes",
    [{}, {"gradient_accumulation_steps": 2}, pytest.param({"activation_checkpointing": True}, marks=needs_checkpointing)],
)
def test_another_trainer_trains_as_ours_does(tmp_path, changes):
    theirs, ours = tiny_memory(speak=False), tiny_memory(speak=False)
    trainer = make(tmp_path / "theirs", theirs, optimizer=build_optimizer(theirs, LR, fused=True), **changes)
    with lean_loss(theirs.base_model):  # which rounds otherwise than transformers' loss
        trainer.train()
    reference = EngramTrainer(ours, EngramTrainingArguments(**fields_for(tmp_path / "ours", **changes)), train_dataset=Rows())
    reference.train()
    assert losses(trainer) == losses(reference)
    assert equal(parameters(theirs), parameters(ours))


def test_gradients_are_clipped_together_and_cleared():
    memory = tiny_memory()
    optimizer = build_optimizer(memory, LR, max_grad_norm=0.5)
    norms = []
    optimizer.register_step_pre_hook(lambda *_: norms.append(float(clip_grad_norm_(memory.parameters(), float("inf")))))
    ids = Rows(4).ids
    (100 * memory(input_ids=ids, labels=ids).loss).backward()
    optimizer.step()
    assert norms == [pytest.approx(0.5, rel=1e-4)]
    assert all(p.grad is None for p in memory.parameters())


def test_a_gradient_that_is_no_number_changes_nothing():
    memory, ids = tiny_memory(), Rows(4).ids
    optimizer, before = build_optimizer(memory, LR), parameters(memory)
    (memory(input_ids=ids, labels=ids).loss * float("inf")).backward()
    with pytest.raises(TrainingError, match=r"gradient norm is (nan|inf)"):
        optimizer.step()
    assert equal(parameters(memory), before)


def test_options_reach_groups_and_rows():
    memory = tiny_memory()
    memory.base_model.requires_grad_(True)
    optimizer = build_optimizer(
        memory, LR, table_lr_multiplier=2, backbone_lr=1e-4, row_state="rowwise_adagrad", backbone_optimizer="muon"
    )
    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    assert isinstance(optimizer, EngramMuon)
    assert (rates["tables"], rates["backbone_muon"]) == (2 * LR, 1e-4)
    assert {group["row_state"] for group in optimizer.param_groups} == {"rowwise_adagrad"}
    for wrong in (0, -1, float("inf"), True):
        with pytest.raises(ConfigError, match="max_grad_norm"):
            build_optimizer(memory, LR, max_grad_norm=wrong)


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        control.should_training_stop = state.global_step == self.step


def test_checkpoints_hold_the_memory_and_a_resumed_run_is_the_same(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 3}
    whole = tiny_memory(speak=False)
    first = make(tmp_path / "whole", whole, **saving)
    first.train()
    memory = tiny_memory(speak=False)
    make(tmp_path / "parts", memory, [MemoryCallback(memory), StopAt(4)], **saving).train()
    memory = tiny_memory(speak=False)
    second = make(tmp_path / "parts", memory, **saving)
    second.train(resume_from_checkpoint=True)
    assert losses(second) == losses(first)
    assert equal(parameters(memory), parameters(whole))
    for folder in ("memory", "checkpoint-8/memory"):
        again = EngramModel.from_pretrained(tiny_model(), tmp_path / "parts/run" / folder, tiny_tokenizer())
        assert equal(parameters(again), parameters(whole))


def test_the_memory_of_the_best_checkpoint_is_kept(tmp_path):
    memory, seen = tiny_memory(speak=False), {}

    class Worse(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics, **_):
            seen[state.global_step] = parameters(memory)

    trainer = make(
        tmp_path,
        memory,
        [MemoryCallback(memory), Worse()],
        optimizer=build_optimizer(memory, 3.0),  # so large that the first evaluation is the best
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        max_steps=6,
    )
    trainer.train()
    best = int(trainer.state.best_model_checkpoint.rpartition("-")[2])
    assert best < 6
    assert equal(parameters(memory), seen[best])


def test_a_checkpoint_without_a_memory_is_refused(tmp_path):
    memory = tiny_memory(speak=False)
    make(tmp_path, memory, save_strategy="steps", save_steps=4).train()
    shutil.rmtree(tmp_path / "run/checkpoint-8/memory")
    with pytest.raises(CheckpointError, match=r"checkpoint-8/memory is missing, expected the memory"):
        make(tmp_path, memory).train(resume_from_checkpoint=True)


def test_an_optimiser_that_leaves_the_memory_out_is_refused(tmp_path):
    memory = tiny_memory()
    trainer = Trainer(
        memory.base_model,
        TrainingArguments(**fields_for(tmp_path)),
        train_dataset=Rows(),
        callbacks=[MemoryCallback(memory)],
    )
    with pytest.raises(
        ConfigError, match=r"optimiser without engrams.0.* and \d+ more, which would never be trained, expected"
    ):
        trainer.train()
    late = build_optimizer(memory, LR)
    memory.base_model.get_input_embeddings().weight.requires_grad_(True)
    with pytest.raises(ConfigError, match=r"without base_model\.model\.embed_tokens\.weight, which"):
        make(tmp_path, memory, optimizer=late).train()


def test_the_memory_as_the_model_is_one_clear_error(tmp_path, monkeypatch):
    memory = tiny_memory()
    arguments = TrainingArguments(**fields_for(tmp_path))
    with pytest.raises(ConfigError, match=r"got the memory as the trainer's model, expected memory\.base_model"):
        Trainer(memory, arguments, train_dataset=Rows(), callbacks=[MemoryCallback(memory)])
    with pytest.raises(ConfigError, match="got LlamaForCausalLM, expected an EngramModel"):
        MemoryCallback(memory.base_model)
    monkeypatch.setattr(other_trainers, "process_count", lambda: 2)
    with pytest.raises(ConfigError, match=r"got 2 processes, expected one: .* EngramTrainer trains in several"):
        Trainer(memory.base_model, arguments, train_dataset=Rows(), callbacks=[MemoryCallback(memory)])

    def fused(self, *args, fused_lm_head=False, **kwargs): ...

    with pytest.raises(AttachError, match=r"a TRL trainer, expected memory\.base_model"):
        memory.forward = MethodType(fused, memory)
    memory.forward = memory.forward  # others, such as accelerate's, are taken


def trl_data():
    datasets = pytest.importorskip("datasets")
    rows = [{"prompt": f"door {i}", "chosen": f" {i + 1}", "rejected": " 0", "completion": f" {i + 1}"} for i in range(16)]
    return datasets.Dataset.from_list(rows)


@pytest.mark.filterwarnings("ignore")  # of TRL, whatever its version
@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_trl_trains_and_saves_the_memory(tmp_path, method):
    trl, data = pytest.importorskip("trl"), trl_data()
    from engram import EngramConfig, get_engram_model, load_bundled

    base, tokenizer = load_bundled()
    config = EngramConfig(engram_vocab_size=500, n_embed_per_ngram=32, layer_ids=[1], pad_id=tokenizer.pad_token_id)
    memory = get_engram_model(base, config, tokenizer)
    kinds = {
        "sft": (trl.SFTTrainer, trl.SFTConfig, {}),
        "dpo": (trl.DPOTrainer, trl.DPOConfig, {"ref_model": load_bundled()[0]}),
    }
    trainer_class, arguments_class, more = kinds[method]
    fields = {**fields_for(tmp_path, max_grad_norm=0, max_steps=6), "save_strategy": "steps", "save_steps": 3, "bf16": False}
    columns = ["prompt", "completion"] if method == "sft" else ["prompt", "chosen", "rejected"]

    def train(model, **options):
        trainer = trainer_class(
            model,
            args=arguments_class(**fields),
            train_dataset=data.select_columns(columns),
            processing_class=tokenizer,
            **more,
            **options,
        )
        assert trainer.args.gradient_checkpointing
        trainer.train()
        return losses(trainer)

    with pytest.raises(AttachError, match="TRL trainer"):
        train(memory)
    found = train(memory.base_model, callbacks=[MemoryCallback(memory)], optimizers=(build_optimizer(memory, LR), None))
    assert found[-1] < found[0] - 0.05
    again = EngramModel.from_pretrained(load_bundled()[0], tmp_path / "run/checkpoint-6/memory", tokenizer)
    assert equal(parameters(again), parameters(memory))


def test_nothing_trainable_is_refused():
    memory = tiny_memory()
    memory.requires_grad_(False)
    with pytest.raises(ConfigError, match="no parameter is trainable"):
        build_optimizer(memory, LR)


def test_the_memory_of_another_run_is_not_put_beside_a_checkpoint(tmp_path):
    for name, seed in (("a", 0), ("b", 1)):
        torch.manual_seed(seed)
        make(tmp_path / name, tiny_memory(seed=seed), max_steps=4, save_strategy="steps", save_steps=2, logging_steps=1).train()
    memory = tiny_memory()
    before = {name: x.clone() for name, x in memory.engrams.state_dict().items()}
    with pytest.raises(CheckpointError, match="is of another run than the checkpoint that the trainer resumes from"):
        make(tmp_path / "b", memory, max_steps=4, save_steps=2).train(
            resume_from_checkpoint=str(tmp_path / "a" / "run" / "checkpoint-2")
        )
    assert all(torch.equal(x, before[name]) for name, x in memory.engrams.state_dict().items())


def test_a_memory_that_was_unloaded_is_not_trained(tmp_path):
    memory = tiny_memory()
    memory.unload()
    with pytest.raises(AttachError, match="this memory was unloaded"):
        make(tmp_path, memory).train()


SAVED_ONCE = {"save_strategy": "steps", "save_steps": 3, "save_total_limit": 1, "max_steps": 6}


@pytest.mark.parametrize("killed_in", ["the save", "the move"])
def test_a_kill_while_the_memory_is_saved_loses_no_memory(tmp_path, monkeypatch, killed_in):
    """transformers deletes the checkpoint before when its own part of the new one is written."""

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    memory = tiny_memory(speak=False)
    trainer = make(tmp_path / "parts", memory, **SAVED_ONCE)
    at_step_6 = StopAt(0)
    at_step_6.on_step_begin = lambda args, state, control, **_: (
        monkeypatch.setattr(memory, "save_pretrained", killed)
        if killed_in == "the save"
        else monkeypatch.setattr(other_trainers, "os", SimpleNamespace(replace=killed))
    ) if state.global_step == 5 else None  # fmt: skip
    trainer.add_callback(at_step_6)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    monkeypatch.undo()
    run = tmp_path / "parts" / "run"
    assert [folder.name for folder in run.glob("checkpoint-*")] == [f"checkpoint-{3 if killed_in == 'the save' else 6}"]
    memory = tiny_memory(speak=False)
    make(tmp_path / "parts", memory, **{**SAVED_ONCE, "max_steps": 9}).train(resume_from_checkpoint=True)
    longer = tiny_memory(speak=False)
    make(tmp_path / "longer", longer, **{**SAVED_ONCE, "max_steps": 9}).train()
    assert equal(parameters(memory), parameters(longer))
    assert not list(run.glob(".memory-*"))
    assert Path(memory.folder).name == "memory"


class SaveLate(TrainerCallback):
    """Asks for a checkpoint after the step, as early stopping on a measured loss does."""

    def on_log(self, args, state, control, **_):
        control.should_save = state.global_step == 3


def test_a_memory_that_a_killed_run_left_aside_is_not_taken_for_this_ones(tmp_path):
    left = tmp_path / "run" / ".memory-3"
    tiny_memory(speak=False).save_pretrained(left)
    memory = tiny_memory(speak=False)
    make(tmp_path, memory, [SaveLate(), MemoryCallback(memory)], max_steps=3).train()
    saved = EngramModel.from_pretrained(tiny_model(), tmp_path / "run" / "checkpoint-3" / "memory", tiny_tokenizer())
    assert equal(parameters(saved), parameters(memory))
    assert not left.exists()
