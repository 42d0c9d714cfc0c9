"""A model and its memory divided between two processes by FSDP, held against one process that has all of it."""

import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import AutoModelForCausalLM

from engram import (
    AttachError,
    CheckpointError,
    ConfigError,
    EngramAdamW,
    EngramModel,
    EngramMuon,
    TableConfig,
    get_engram_model,
    replicate_tables,
)
from engram.distributed import is_divided, own_part, process_count, process_rank, whole
from engram.models import shard_model
from engram.models.identity import attached_identity
from engram.optim import build_param_groups, clip_grad_norm_
from engram.testing import assert_close, play_scenarios, run_processes, tiny_config, tiny_model, tiny_tokenizer
from tests.training.test_several_processes import (
    Rows,
    assert_curves_agree,
    assert_figures_agree,
    curve,
    figures,
    rows_of,
    run,
    trainer_for,
)
from tests.versions import needs_torch_2_7

pytestmark = [pytest.mark.slow, needs_torch_2_7("shard_model refuses it")]

RUNS = {
    "memory alone": {},
    "tables alone": {"train_reader": False},
    "backbone": {"train_backbone": True},
    "backbone, divided tables": {"train_backbone": True, "table": {"sharded": True}},
    "backbone by Muon": {"train_backbone": True, "backbone_optimizer": "muon"},
    "backbone, checkpointed": {"train_backbone": True, "activation_checkpointing": True},
    "evaluated before": {"train_backbone": True, "first": "evaluate"},
    "several streams": {"train_backbone": True, "model_type": "deepseek_v4"},
}

# What the processes do ----------------------------------------------------------------------------------------------------------------


def weights_of(memory):
    return {name: whole(p.detach()).clone() for name, p in memory.named_parameters() if "embedding.weight" not in name}


def runs(folder):
    results = {}
    for name, options in RUNS.items():
        trainer = run(folder / name, shard=True, **options)
        results[name] = {
            "curve": curve(trainer),
            "figures": figures(trainer),
            "rows": rows_of(trainer.memory),
            "weights": weights_of(trainer.memory),
            "held_out": trainer.evaluate()["eval_loss"],
        }
    return results


def divided(folder):
    """What each process holds; the second one begins with other weights."""
    torch.manual_seed(process_rank())
    memory = get_engram_model(tiny_model(), tiny_config(), tiny_tokenizer(), TableConfig(dtype="bfloat16"))
    expected = attached_identity(memory) if process_rank() == 0 else None
    with torch.no_grad():
        memory.base_model.get_input_embeddings().weight[0, 0] += process_rank()
    replicate_tables(memory)
    assert shard_model(memory) is memory
    tables = {name for name, _ in memory.named_parameters() if "multi_head_embedding" in name}
    own = {name: own_part(p).numel() / p.numel() for name, p in memory.named_parameters() if name not in tables}
    found = {
        "share": sum(own.values()) / len(own),
        "tables": [is_divided(p) for name, p in memory.named_parameters() if name in tables],
        "identity": attached_identity(memory),
        "expected": expected,
    }
    on_top = tiny_config(layer_ids=[0], seed=1)
    for call in (
        memory.unload,
        lambda: shard_model(memory),
        lambda: get_engram_model(memory, on_top, tiny_tokenizer()),
        lambda: memory.push_to_hub("me/mine"),
    ):
        with pytest.raises((AttachError, ConfigError)) as error:
            call()
        found.setdefault("refused", []).append(str(error.value))
    return found


def resumed(folder):
    """A run, and the same from the middle on, by a model that was evaluated before."""
    results = {}
    for name, table in (("copies", {}), ("parts", {"sharded": True})):
        options = {"train_backbone": True, "shard": True, "memory_dropout": 0.5, "save_total_limit": 2}
        first = trainer_for(folder / name, table, **options)
        first.train()
        second = trainer_for(folder / name, table, **options)
        second.evaluate()
        second.train(resume_from_checkpoint=str(folder / name / "checkpoint-4"))
        results[name] = {"whole": curve(first), "resumed": curve(second), "weights": weights_of(second.memory)}
        results[name]["same"] = all(map(torch.equal, weights_of(first.memory).values(), weights_of(second.memory).values()))
    first.evaluate()
    first.save_model(str(folder / "saved"))
    results["rows"] = rows_of(first.memory)
    return results


def adapted(folder, **options):
    """With adapters on the base model, evaluated on the way, the best taken in the end; and the same from the middle on."""
    import peft

    def trainer():
        memory = get_engram_model(tiny_model(), tiny_config(), tiny_tokenizer())
        torch.manual_seed(7)
        peft.get_peft_model(memory.base_model, peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
        often = {"save_steps": 4, "eval_steps": 4, "eval_strategy": "steps", "load_best_model_at_end": True}
        return trainer_for(folder / "run", memory=memory, shard=True, **often, **options)

    first, second = trainer(), trainer()
    first.train()
    second.train(resume_from_checkpoint=str(folder / "run" / "checkpoint-4"))
    return {"whole": curve(first), "resumed": curve(second), "best": first.state.best_model_checkpoint}


def adapted_backbone(folder):
    """The same with the base model trained too, and what its files are without the adapters."""
    found = adapted(folder, train_backbone=True)
    with torch.no_grad():
        base = AutoModelForCausalLM.from_pretrained(folder / "run" / "checkpoint-4" / "backbone")
        return {**found, "answer": base(torch.arange(5, 17)[None]).logits}


def looked_at_before(folder):
    """Weights of the base model, frozen and asked something before, that a trainer made after that leaves as they were."""
    torch.manual_seed(0)
    memory = get_engram_model(tiny_model(), tiny_config(), tiny_tokenizer())
    shard_model(memory)
    with torch.no_grad():
        memory(input_ids=torch.arange(5, 17)[None])
    trainer = trainer_for(folder / "run", memory=memory, train_backbone=True, save_strategy="no", max_steps=2)
    before = weights_of(memory)
    trainer.train()
    after = weights_of(memory)
    return [name for name in after if name.startswith("base_model") and torch.equal(after[name], before[name])]


def looked_at_between(folder):
    """The model is asked before flags are set, between forward and backward pass, and between that and the step."""
    torch.manual_seed(0)
    memory = get_engram_model(tiny_model(), tiny_config(), tiny_tokenizer())
    replicate_tables(memory)
    if process_count() > 1:
        shard_model(memory)
    prompt, data, count, losses = torch.arange(5, 15)[None], Rows(), process_count(), []

    def look():
        with torch.no_grad():
            return float(memory(input_ids=prompt, labels=prompt).loss)

    memory.generate(prompt, max_new_tokens=2, do_sample=False)
    optimizer = EngramAdamW(build_param_groups(memory.requires_grad_(True), memory, lr=1e-2))
    for step in range(3):
        ids = torch.stack([data[8 * step + 8 // count * process_rank() + i]["input_ids"] for i in range(8 // count)])
        loss = memory(input_ids=ids, labels=ids, use_cache=False).loss
        look()
        loss.backward()
        look()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(look())
    return {"losses": losses, "trained": sum(len(group["params"]) for group in optimizer.param_groups)}


def stacked(folder):
    """Two memories divided together: the topmost is saved, the one beneath was before."""
    below = get_engram_model(tiny_model(), tiny_config(), tiny_tokenizer())
    top = shard_model(get_engram_model(below, tiny_config(layer_ids=[0], seed=1), tiny_tokenizer()))
    with torch.no_grad():
        top(input_ids=torch.arange(5, 17)[None])
    top.save_pretrained(folder / "top")
    refused = []
    for call in (below.save_pretrained, below.load_memory):
        with pytest.raises(AttachError) as error:
            call(folder / "below")
        refused.append(str(error.value))
    return refused


def own_loop(folder):
    """Without a trainer, in mixed precision."""
    torch.manual_seed(0)
    memory = get_engram_model(tiny_model(), tiny_config(), tiny_tokenizer()).requires_grad_(True)
    if process_count() > 1:
        replicate_tables(memory)
        shard_model(memory, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    optimizer, losses = EngramMuon(build_param_groups(memory, memory, lr=1e-2, backbone_optimizer="muon")), []
    data, count = Rows(), process_count()
    for step in range(4):
        own = [8 * step + 8 // count * process_rank() + i for i in range(8 // count)]
        ids = torch.stack([data[i]["input_ids"] for i in own])
        with torch.autocast("cpu", torch.bfloat16, enabled=count == 1):
            loss = memory(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        clip_grad_norm_(memory.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    prompt = torch.arange(5, 15)[None]
    return {"losses": losses, "generated": memory.generate(prompt, max_new_tokens=6, do_sample=False)}


SCENARIOS = {
    f.__name__: f
    for f in (runs, divided, resumed, adapted, adapted_backbone, looked_at_before, looked_at_between, stacked, own_loop)
}

# What comes of it ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("divided")


@pytest.fixture(scope="module")
def seen(folder):
    return run_processes("tests.training.test_shard_model", folder)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_that_of_one_process_with_all_of_the_model(seen, tmp_path, name):
    trainer = run(tmp_path, **RUNS[name])
    first, second = (result["runs"][name] for result in seen)
    assert first["curve"] == second["curve"]
    assert_curves_agree(first["curve"], curve(trainer), 1e-3, 2e-2)
    assert first["figures"] == second["figures"]
    assert_figures_agree(first["figures"], figures(trainer))
    expected = weights_of(trainer.memory)
    assert first["weights"].keys() == expected.keys()
    for weight, weights in expected.items():
        assert torch.equal(first["weights"][weight], second["weights"][weight])
        assert float((first["weights"][weight] - weights).abs().mean()) < 1e-3, weight
    for own, other, rows in zip(first["rows"], second["rows"], rows_of(trainer.memory), strict=True):
        assert torch.equal(own, other)
        assert float((own - rows).abs().mean()) < 1e-4
    assert first["held_out"] == second["held_out"] == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-3)


def test_each_process_holds_a_half_of_everything_but_tables(seen):
    for result in (part["divided"] for part in seen):
        assert result["share"] == pytest.approx(0.5, abs=0.02)
        assert result["tables"]
        assert not any(result["tables"])


def test_the_first_process_says_what_the_weights_are(seen):
    assert seen[0]["divided"]["identity"] == seen[1]["divided"]["identity"] == seen[0]["divided"]["expected"]


def test_a_divided_memory_is_not_taken_off_nor_divided_again_nor_built_on_nor_pushed(seen):
    for result in seen:
        taken_off, again, built_on, pushed = result["divided"]["refused"]
        assert "save both and load them anew" in taken_off
        assert "divided already" in again
        assert "before shard_model" in built_on
        assert "push_to_hub: got tables or weights that are divided" in pushed


@pytest.mark.parametrize("name", ["copies", "parts"])
def test_a_resumed_run_is_exact(seen, name):
    for result in (part["resumed"][name] for part in seen):
        assert result["resumed"] == result["whole"]
        assert result["same"]


def test_what_is_saved_is_whole(seen, folder):
    saved = folder / "resumed" / "saved"
    memory = EngramModel.from_pretrained(AutoModelForCausalLM.from_pretrained(saved / "backbone"), saved, tiny_tokenizer())
    for own, expected in zip(rows_of(memory), seen[0]["resumed"]["rows"], strict=True):
        assert torch.equal(own, expected)
    expected = seen[0]["resumed"]["parts"]["weights"]
    for name, weight in weights_of(memory).items():
        assert torch.equal(weight, expected[name]), name


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft asks for it
@pytest.mark.parametrize("scenario", [adapted, adapted_backbone])
def test_adapters_on_a_divided_model_are_trained_as_on_a_whole_one(seen, tmp_path, scenario):
    alone = scenario(tmp_path)
    for result in (part[scenario.__name__] for part in seen):
        assert result["resumed"] == result["whole"]
        if "answer" in alone:
            assert_close(result["answer"], alone["answer"], 2e-2)
        assert Path(result["best"]).name == Path(alone["best"]).name
        assert_curves_agree(result["whole"], alone["whole"], 1e-3, 2e-2)


def test_what_is_set_after_a_forward_pass_holds(seen):
    assert seen[0]["looked_at_before"] == seen[1]["looked_at_before"] == []


def test_a_model_may_be_asked_at_any_time(seen, tmp_path):
    alone = looked_at_between(tmp_path)
    for result in (part["looked_at_between"] for part in seen):
        assert result["trained"] == alone["trained"]
        assert_close(torch.tensor(result["losses"]), torch.tensor(alone["losses"]), 1e-3)


def test_of_a_divided_stack_the_topmost_is_saved(seen, folder):
    for result in seen:
        assert all("expected the topmost" in said for said in result["stacked"])
    assert (folder / "stacked" / "top" / "engram.json").is_file()
    assert not (folder / "stacked" / "below").exists()


def test_a_checkpoint_is_resumed_by_as_many_processes(seen, folder):
    with pytest.raises(CheckpointError, match=r"in 2 part\(s\), expected 1"):
        trainer_for(folder / "resumed" / "copies", train_backbone=True).train(resume_from_checkpoint=True)


def test_a_loop_of_ones_own_does_the_same(seen, tmp_path):
    alone = own_loop(tmp_path)
    losses = torch.tensor([result["own_loop"]["losses"] for result in seen]).mean(dim=0)
    assert_close(losses, torch.tensor(alone["losses"]), 2e-2)
    assert torch.equal(seen[0]["own_loop"]["generated"], seen[1]["own_loop"]["generated"])


def test_one_process_divides_nothing():
    memory = get_engram_model(tiny_model(), tiny_config(), tiny_tokenizer())
    with pytest.raises(ConfigError, match="got one process, expected several"):
        shard_model(memory)


if __name__ == "__main__":
    torch.set_num_threads(1)
    play_scenarios(SCENARIOS, Path(sys.argv[1]))
