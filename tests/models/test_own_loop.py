"""Training without ``EngramTrainer``: a plain loop, and transformers' own trainer on the base model."""

import pytest
import torch
from transformers import Trainer, TrainingArguments

from engram import EngramAdamW, EngramModel, EngramMuon, get_engram_model
from engram.optim import build_param_groups, clip_grad_norm_
from engram.testing import assert_close, tiny_config, tiny_model, tiny_tokenizer

BLOCK = torch.randint(2, 300, (12,), generator=torch.Generator().manual_seed(0))
ROWS = [{"input_ids": BLOCK, "labels": BLOCK}] * 8
STEPS, LR = 4, 1e-2


def new_memory(**changes):
    torch.manual_seed(0)
    return get_engram_model(tiny_model(), tiny_config(table_init="normal", **changes), tiny_tokenizer()).train()


def optimizer_of(memory):
    return EngramAdamW(build_param_groups(memory, memory, lr=LR))


def tensors(memory):
    return {name: p.detach().clone() for name, p in memory.engrams.named_parameters()}


def plain_steps(memory, optimizer, steps, max_norm=None):
    batch = {"input_ids": BLOCK.expand(2, -1), "labels": BLOCK.expand(2, -1)}
    for _ in range(steps):
        memory(**batch).loss.backward()
        if max_norm is not None:
            clip_grad_norm_(memory.parameters(), max_norm)
        optimizer.step()
        optimizer.zero_grad()
    return tensors(memory)


def transformers_trainer(memory, folder, **options):
    arguments = TrainingArguments(
        folder,
        max_steps=STEPS,
        per_device_train_batch_size=2,
        learning_rate=LR,
        lr_scheduler_type="constant",
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        max_grad_norm=0,
    )
    return Trainer(memory.base_model, arguments, train_dataset=ROWS, **options)


def test_transformers_trainer_alone_trains_nothing_and_says_nothing(tmp_path):
    memory = new_memory()
    before = tensors(memory)
    transformers_trainer(memory, tmp_path).train()
    assert all(torch.equal(values, before[name]) for name, values in tensors(memory).items())


def test_transformers_trainer_with_the_memorys_optimizer_is_the_plain_loop(tmp_path):
    memory = new_memory()
    before, optimizer = tensors(memory), optimizer_of(memory)
    optimizer.register_step_post_hook(lambda done, *_: done.zero_grad())
    transformers_trainer(memory, tmp_path, optimizers=(optimizer, None)).train()
    trained = tensors(memory)
    assert not any(torch.equal(values, before[name]) for name, values in trained.items())
    again = new_memory()
    for name, values in plain_steps(again, optimizer_of(again), STEPS).items():
        assert_close(trained[name], values)


def test_without_the_hook_gradients_of_all_steps_add_up(tmp_path):
    """Trainer clears the gradients of the model that it was given, which are none; the guide says so."""
    memory = new_memory()
    transformers_trainer(memory, tmp_path, optimizers=(optimizer_of(memory), None)).train()
    again = new_memory()
    expected = plain_steps(again, optimizer_of(again), STEPS)
    assert not all(torch.allclose(values, expected[name], atol=1e-4) for name, values in tensors(memory).items())


@pytest.mark.parametrize("muon", [False, True])
def test_a_plain_loop_goes_on_where_it_was_saved(muon, tmp_path):
    def make(memory):
        groups = build_param_groups(memory, memory, lr=LR, backbone_optimizer="muon" if muon else "adamw")
        return (EngramMuon if muon else EngramAdamW)(groups)

    memory = new_memory()
    optimizer = make(memory)
    plain_steps(memory, optimizer, 2, max_norm=1.0)
    memory.save_pretrained(tmp_path / "memory")
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    expected = plain_steps(memory, optimizer, 2, max_norm=1.0)
    memory.unload()
    again = EngramModel.from_pretrained(tiny_model(), tmp_path / "memory", tiny_tokenizer()).train()
    resumed = make(again)
    resumed.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    for name, values in plain_steps(again, resumed, 2, max_norm=1.0).items():
        assert torch.equal(values, expected[name])
