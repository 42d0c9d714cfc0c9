"""Training by two processes, held against one process with batches twice as large."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset
from transformers import TrainerCallback

from engram import (
    CheckpointError,
    ConfigError,
    EngramAdamW,
    EngramModel,
    EngramTrainer,
    EngramTrainingArguments,
    LiveProgress,
    TableConfig,
    TrainingError,
    get_engram_model,
    replicate_tables,
)
from engram.distributed import process_count, process_rank
from engram.models import shard_model
from engram.optim import build_param_groups, clip_grad_norm_
from engram.tables import ShardedTable
from engram.testing import assert_close, play_scenarios, run_processes, tiny_config, tiny_model, tiny_tokenizer
from engram.training.safe_trainer import last_checkpoint
from engram.training.several import first_process_first
from tests.versions import CAN_CHECKPOINT, FINDS_OTHERS_ON_A_CPU

pytestmark = pytest.mark.slow


class Rows(Dataset):
    """Texts of which some have fewer labels (``masked``), so that a batch counts for more in one process than in the other."""

    def __init__(self, count=64, length=12, masked=True):
        self.masked = masked
        self.ids = torch.randint(2, 300, (count, length), generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        labels = self.ids[i].clone()
        labels[: i % 7 * self.masked] = -100
        return {"input_ids": self.ids[i], "labels": labels}


def trainer_for(folder, table=None, config=None, callbacks=(), memory=None, shard=False, model_type="llama", **changes):
    """Eight steps of eight texts, however many processes there are."""
    batch = 8 // process_count_ahead() // changes.get("gradient_accumulation_steps", 1)
    fields = {
        "max_steps": 8,
        "per_device_train_batch_size": batch,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_steps": 4,
        "report_to": [],
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "seed": 1,
        "disable_tqdm": True,
    }
    args = EngramTrainingArguments(output_dir=str(folder), **{**fields, **changes})
    if memory is None:
        model = tiny_model(model_type)
        torch.manual_seed(process_rank())  # the first one's reader is everybody's
        memory = get_engram_model(model, tiny_config(**config or {}), tiny_tokenizer(), table_config=TableConfig(**table or {}))
    if shard and process_count() > 1:
        shard_model(memory)
    return EngramTrainer(memory, args, train_dataset=Rows(), eval_dataset=Rows(16, masked=False), callbacks=list(callbacks))


def process_count_ahead():
    return int(os.environ.get("WORLD_SIZE", "1"))


def curve(trainer):
    return [(entry["loss"], entry["grad_norm"]) for entry in trainer.state.log_history if "loss" in entry]


def figures(trainer):
    """What is told of the memory's layers."""
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    return [{key: value for key, value in entry.items() if key.startswith("memory/")} for entry in entries]


def assert_figures_agree(found, expected):
    """Those of the first step: later ones drift apart by rounding."""
    assert len(found) == len(expected)
    assert found[0] == pytest.approx(expected[0], rel=5e-3)
    assert found[0]


def assert_curves_agree(found, expected, of_loss, of_norm):
    """Losses and gradient norms step by step, each to a share of what is expected."""
    for (loss, norm), (expected_loss, expected_norm) in zip(found, expected, strict=True):
        assert loss == pytest.approx(expected_loss, rel=of_loss)
        assert norm == pytest.approx(expected_norm, rel=of_norm)


def rows_of(memory):
    tables = [engram.table for engram in memory.engrams.values()]
    return [torch.cat([block.clone() for _, block in table.iter_row_blocks()]) for table in tables]


def first_layer(memory):
    return next(iter(memory.engrams.values()))


RUNS = {
    "copies": {},
    "accumulated": {"gradient_accumulation_steps": 2},
    "tables alone": {"train_reader": False},
    "seeded reader": {"config": {"reader": "seeded", "use_bias": False, "use_conv": False}},
    "backbone": {"train_backbone": True},
    **({"checkpointed": {"activation_checkpointing": True}} if CAN_CHECKPOINT else {}),
    "no clipping": {"max_grad_norm": 0.0},
    "evaluated before": {"first": "evaluate"},
    "tables alone before": {"first": "tables"},
    "memory dropout": {"memory_dropout": 0.5},
    "bfloat16 rows": {"table": {"dtype": "bfloat16"}, "table_stochastic_rounding": True},
    "divided": {"table": {"sharded": True}},
    "divided, in host memory": {"table": {"sharded": True, "tier": "host"}, "gradient_accumulation_steps": 2},
    "divided, tables alone": {"table": {"sharded": True}, "train_reader": False},
    "divided, one number per row": {"table": {"sharded": True}, "table_row_state": "rowwise_adagrad"},
}

# What the processes do ----------------------------------------------------------------------------------------------------------------


def runs(folder):
    results = {}
    for name, options in RUNS.items():
        trainer = run(folder / name, **options)
        memory = trainer.memory
        results[name] = {
            "curve": curve(trainer),
            "figures": figures(trainer),
            "rows": rows_of(memory),
            "readers": [p.detach().clone() for n, p in memory.engrams.named_parameters() if "embedding" not in n],
            "held_out": trainer.evaluate()["eval_loss"],
            "divided": any(isinstance(module, ShardedTable) for module in memory.modules()),
        }
        memory.unload()
    return results


def run(folder, first=None, **options):
    """A trainer that has trained; before that something else may have been done with it, or with its memory."""
    trainer = trainer_for(folder, save_strategy="no", **options)
    if first == "evaluate":
        trainer.evaluate()
    if first == "tables":
        trainer_for(folder, memory=trainer.memory, save_strategy="no", train_reader=False, max_steps=2).train()
        trainer = trainer_for(folder, memory=trainer.memory, save_strategy="no")
    trainer.train()
    return trainer


def resumed(folder):
    """A run, and the same from the middle on."""
    results = {}
    for name, table in (("copies", {}), ("divided", {"sharded": True})):
        first = trainer_for(folder / name, table, memory_dropout=0.5, save_total_limit=2)
        first.train()
        whole = curve(first)
        second = trainer_for(folder / name, table, memory_dropout=0.5, save_total_limit=2)
        second.train(resume_from_checkpoint=str(folder / name / "checkpoint-4"))
        results[name] = {
            "whole": whole,
            "resumed": curve(second),
            "rows": all(map(torch.equal, rows_of(first.memory), rows_of(second.memory))),
            "files": sorted(path.name for path in (folder / name / "checkpoint-8").iterdir()),
        }
    first.save_model(str(folder / "memory"))
    results["saved"] = rows_of(first.memory)
    return results


class Interrupts(TrainerCallback):
    """A signal to the second process alone, in the third step."""

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == 2 and process_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def interrupted(folder):
    trainer = trainer_for(folder / "run", callbacks=[Interrupts()])
    trainer.train()
    return {
        "step": trainer.state.global_step,
        "interrupted": trainer.interrupt.interrupted,
        "last": str(last_checkpoint(folder / "run")),
    }


class Spoils(TrainerCallback):
    """A weight that is no number, in the second process alone."""

    def on_step_begin(self, args, state, control, model=None, **_):
        if state.global_step == 2 and process_rank() == 1:
            with torch.no_grad():
                first_layer(model).value_proj.weight.fill_(float("nan"))


def spoilt(folder):
    trainer = trainer_for(folder / "run", callbacks=[Spoils()])
    with pytest.raises(TrainingError) as error:
        trainer.train()
    return str(error.value)


REFUSALS = (
    "fp16: got True with sharded tables",
    "save_on_each_node: got True with sharded tables",
    "not all processes see this folder",
    "push_to_hub: got tables or weights that are divided",
    "each would train alone",
    "in 1 part(s), expected 2",
)


def refusals(folder):
    found = []
    with pytest.raises(ConfigError) as error:
        trainer_for(folder / "a", {"sharded": True}, fp16=True)
    found.append(str(error.value))
    with pytest.raises(ConfigError) as error:
        trainer_for(folder / "a", {"sharded": True}, save_on_each_node=True)
    found.append(str(error.value))
    with pytest.raises(ConfigError) as error:
        trainer_for(folder / f"of-{process_rank()}", {"sharded": True}).train()
    found.append(str(error.value))
    with pytest.raises(ConfigError) as error:
        trainer_for(folder / "a", {"sharded": True}).memory.push_to_hub("me/mine")
    found.append(str(error.value))
    if FINDS_OTHERS_ON_A_CPU:
        trainer_for(folder / "c", use_cpu=False)
        found.append("each would train alone elsewhere")
    else:
        with pytest.raises(ConfigError) as error:
            trainer_for(folder / "c", use_cpu=False)
        found.append(str(error.value))
    trainer_for(folder / "b", save_steps=2, max_steps=2).train()
    with pytest.raises(CheckpointError) as error:
        trainer_for(folder / "b", {"sharded": True}).train(resume_from_checkpoint=True)
    found.append(str(error.value))
    return found


def drifted(folder):
    """A row that only one process has changed."""
    trainer, said = trainer_for(folder / "run", max_steps=1, save_steps=1), []

    class Drifts(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **_):
            with torch.no_grad():
                first_layer(model).table.weight[0] += process_rank()

    trainer.add_callback(Drifts())
    import logging

    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("engram").addHandler(handler)
    trainer.train()
    return said


def shown(folder):
    """Standard error of a run with a live display."""
    trainer = trainer_for(folder / "run", callbacks=[LiveProgress()], save_strategy="no")
    trainer.train()
    return [type(callback).__name__ for callback in trainer.callback_handler.callbacks]


def stacked(folder):
    """A divided memory on top of a divided one, and a whole one on that; all are saved by all processes."""
    below = trainer_for(folder / "a", {"sharded": True}).memory
    config, sharded = tiny_config(layer_ids=[0], seed=1), TableConfig(sharded=True)
    middle = get_engram_model(below, config, tiny_tokenizer(), table_config=sharded)
    top = get_engram_model(middle, tiny_config(layer_ids=[0], seed=2), tiny_tokenizer())
    for number, (name, memory) in enumerate({"below": below, "middle": middle, "top": top}.items()):
        with torch.no_grad():
            for engram in memory.engrams.values():
                engram.table.weight.fill_(1.0 + number)
        memory.save_pretrained(folder / name)
    return {"logits": top(input_ids=torch.arange(5, 17)[None]).logits.detach()}


def fails_first(folder):
    """The first process cannot do what is to be done once."""
    with pytest.raises((OSError, TrainingError)) as error, first_process_first():
        raise OSError("the disk is full")
    return str(error.value)


def own_loop(folder):
    """Without a trainer: the parts by themselves."""
    torch.manual_seed(0)
    memory = get_engram_model(tiny_model(), tiny_config(), tiny_tokenizer(), table_config=TableConfig(sharded=False))
    replicate_tables(memory)
    model = DistributedDataParallel(memory) if process_count() > 1 else memory
    optimizer, losses = EngramAdamW(build_param_groups(memory, memory.engrams, lr=1e-2), lr=1e-2), []
    data, count = Rows(), process_count()
    for step in range(4):
        own = [8 * step + 8 // count * process_rank() + i for i in range(8 // count)]
        ids = torch.stack([data[i]["input_ids"] for i in own])
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return {"losses": losses, "rows": rows_of(memory)}


SCENARIOS = {
    f.__name__: f for f in (runs, resumed, interrupted, spoilt, refusals, drifted, shown, stacked, fails_first, own_loop)
}

# What comes of it ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def seen(folder):
    return run_processes("tests.training.test_several_processes", folder)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_that_of_one_process_with_batches_twice_as_large(seen, tmp_path, name):
    trainer = run(tmp_path, **RUNS[name])
    first, second = (result["runs"][name] for result in seen)
    assert first["divided"] == name.startswith("divided")
    assert first["curve"] == second["curve"]
    assert first["figures"] == second["figures"]
    assert_figures_agree(first["figures"], figures(trainer))
    half = "bfloat16" in name  # rounded by other dice
    assert_curves_agree(first["curve"], curve(trainer), *((1e-2, 2e-1) if half else (1e-4, 2e-3)))
    for own, other in zip(first["rows"] + first["readers"], second["rows"] + second["readers"], strict=True):
        assert torch.equal(own, other)
    if not half:
        for own, expected in zip(first["rows"], rows_of(trainer.memory), strict=True):
            assert float((own - expected).abs().mean()) < 1e-4
    assert first["held_out"] == second["held_out"] == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-2 if half else 1e-4)


@pytest.mark.parametrize("name", ["copies", "divided"])
def test_a_resumed_run_is_exact(seen, name):
    for result in (part["resumed"][name] for part in seen):
        assert result["resumed"] == result["whole"]
        assert result["rows"]
    assert ("optimizer_1.safetensors" in result["files"]) == (name == "divided")
    assert {"random_state.json", "random_state_1.json", "trainer_state.json"} <= set(result["files"])


def test_a_divided_memory_is_saved_whole_and_loads_anywhere(seen, folder, tmp_path):
    memory = EngramModel.from_pretrained(
        tiny_model(), folder / "resumed" / "memory", tiny_tokenizer(), table_config=TableConfig(tier="host")
    )
    for own, expected in zip(rows_of(memory), seen[0]["resumed"]["saved"], strict=True):
        assert torch.equal(own, expected)
        assert own.abs().sum() > 0


def test_a_checkpoint_of_parts_is_resumed_by_as_many_processes(seen, folder, tmp_path):
    with pytest.raises(CheckpointError, match=r"in 2 part\(s\), expected 1"):
        trainer_for(folder / "resumed" / "divided").train(resume_from_checkpoint=True)


def test_a_checkpoint_of_copies_is_resumed_by_one_process(seen, folder, tmp_path):
    trainer = trainer_for(tmp_path, memory_dropout=0.5)
    trainer.train(resume_from_checkpoint=str(folder / "resumed" / "copies" / "checkpoint-4"))
    assert trainer.state.global_step == 8


def test_a_signal_to_one_process_stops_all_after_the_same_step(seen):
    for result in seen:
        assert result["interrupted"]["step"] == 3
        assert result["interrupted"]["interrupted"]
        assert result["interrupted"]["last"].endswith("checkpoint-3")


def test_a_loss_that_is_no_number_in_one_process_stops_all(seen):
    for result in seen:
        assert "step 3" in result["spoilt"]
        assert "the loss of a process" in result["spoilt"]


def test_what_cannot_be_is_refused_in_all_processes(seen):
    for result in seen:
        assert len(result["refusals"]) == len(REFUSALS)
        for said, words in zip(result["refusals"], REFUSALS):
            assert words in said


def test_copies_that_have_come_to_differ_are_told(seen):
    for result in seen:
        assert any("have come to differ" in message for message in result["drifted"])


def test_the_first_process_shows_the_run(seen, folder):
    assert "LiveProgress" in seen[0]["shown"]
    assert "LiveProgress" not in seen[1]["shown"]
    assert "step 8/8" in (folder / "0.txt").read_text()
    assert "step 8/8" not in (folder / "1.txt").read_text()


def test_divided_memories_stack_and_are_saved(seen, folder):
    model = tiny_model()
    for name in ("below", "middle", "top"):
        model = EngramModel.from_pretrained(model, folder / "stacked" / name, tiny_tokenizer())
    logits = model(input_ids=torch.arange(5, 17)[None]).logits.detach()
    assert_close(seen[0]["stacked"]["logits"], logits)


def test_the_others_do_not_go_on_where_the_first_has_failed(seen):
    assert seen[0]["fails_first"] == "the disk is full"
    assert "the first process failed" in seen[1]["fails_first"]


def test_a_loop_of_ones_own_does_the_same(seen, tmp_path):
    alone = own_loop(tmp_path)
    losses = torch.tensor([result["own_loop"]["losses"] for result in seen]).mean(dim=0)
    assert_close(losses, torch.tensor(alone["losses"]), 1e-4)
    for rows, other, expected in zip(seen[0]["own_loop"]["rows"], seen[1]["own_loop"]["rows"], alone["rows"], strict=True):
        assert torch.equal(rows, other)
        assert float((rows - expected).abs().mean()) < 1e-4


def test_parts_that_an_earlier_run_left_are_removed(tmp_path):
    trainer = trainer_for(tmp_path, max_steps=1, save_steps=1)
    stale = tmp_path / "checkpoint-1"
    stale.mkdir()
    for name in ("optimizer_1.json", "random_state_3.safetensors"):
        (stale / name).write_text(json.dumps({}))
    trainer.train()
    assert not any(path.stem.endswith(("_1", "_3")) for path in stale.iterdir())


if __name__ == "__main__":
    torch.set_num_threads(1)
    play_scenarios(SCENARIOS, Path(sys.argv[1]))
