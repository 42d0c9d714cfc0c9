"""`engram train` with a model that exists instead of a fresh backbone."""

import dataclasses
from pathlib import Path

import pytest
import torch

from engram import CheckpointError, ConfigError, EngramModel, load_bundled
from engram.config import EngramConfig
from engram.experiments import BackboneConfig, read_point, read_sweep, run_point
from engram.experiments.backbone import build_backbone
from engram.experiments.data import prepare_data
from engram.experiments.held_out import measure
from engram.experiments.recipe import BudgetRecipe
from engram.hashing.layout import prime_layout
from engram.models import load_model

RECIPES = Path(__file__).parents[2] / "recipes"
MEMORY = EngramConfig(engram_vocab_size=500, n_embed_per_ngram=16, n_head_per_ngram=2, layer_ids=(1,))
TEXT = dataclasses.replace(read_point(RECIPES / "train_tiny.yaml").data, seq_len=64)


def recipe(**changes):
    fields = {"data": TEXT, "model": "bundled", "train_backbone": False, "engram": MEMORY, "tokens": 4096, "batch_size": 4}
    fields |= {"optimizer": "adamw", "backbone": BackboneConfig(), "bf16": False}  # many CPUs only emulate it
    return dataclasses.replace(read_point(RECIPES / "train_tiny.yaml"), **{**fields, **changes})


@pytest.fixture(scope="module")
def memory_run(tmp_path_factory):
    """A memory trained on the bundled model: its folder, its text, its result."""
    out = tmp_path_factory.mktemp("memory")
    data = prepare_data(TEXT, RECIPES, out / "data", tokenizer=load_bundled()[1])
    return out, data, run_point(recipe(keep_model=True, learning_rate=5e-3, memory_dropout=0.1), data, out)


@pytest.mark.slow
def test_a_memory_is_trained_on_a_model_that_stays_as_it_is(memory_run):
    out, data, result = memory_run
    base, tokenizer = load_bundled()
    assert result["held_out_before"]["test"] == measure(base, data.held_out["test"])
    assert result["held_out"]["test"]["loss"] < result["held_out_before"]["test"]["loss"]
    assert result["held_out_off"] == result["held_out_before"]
    assert not (out / "model").exists()
    weights = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    again = EngramModel.from_pretrained(base, out / "memory", tokenizer)
    assert measure(again, data.held_out["test"]) == result["held_out"]["test"]
    with again.disable_engram():
        assert measure(again, data.held_out["test"]) == result["held_out_before"]["test"]
    assert all(torch.equal(weights[name], tensor) for name, tensor in again.unload().state_dict().items())
    assert result["counts"]["table_rows"] == sum(sum(map(sum, layer)) for layer in prime_layout(MEMORY).values())
    assert result["counts"]["rho"] == 0
    assert "experts" not in result["counts"]


@pytest.mark.slow
def test_a_model_that_was_trained_here_is_trained_on(memory_run, tmp_path):
    _, data, _ = memory_run
    base, tokenizer = load_bundled()
    base.save_pretrained(tmp_path / "mine")
    tokenizer.save_pretrained(tmp_path / "mine")
    mine = recipe(model=str(tmp_path / "mine"), train_backbone=True, engram=None, tokens=512, keep_model=True)
    result = run_point(mine, data, tmp_path / "run")
    trained, _ = load_model(str(tmp_path / "run" / "model"))
    assert measure(trained, data.held_out["test"])["loss"] == pytest.approx(result["held_out"]["test"]["loss"], rel=1e-3)
    assert result["held_out"] != result["held_out_before"]
    assert not (tmp_path / "run" / "memory").exists()


def test_a_frozen_mixture_of_experts_keeps_its_balance_too(memory_run, tmp_path):
    _, data, _ = memory_run
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "n_routed_experts": 4,
        "moe_intermediate_size": 16,
        "intermediate_size": 32,
    }
    sizes |= {"num_attention_heads": 2, "head_dim": 16, "kv_lora_rank": 16, "vocab_size": len(data.tokenizer)}
    base = build_backbone(BackboneConfig(**sizes), data.tokenizer)
    base.save_pretrained(tmp_path / "experts")
    data.tokenizer.save_pretrained(tmp_path / "experts")
    mine = recipe(model=str(tmp_path / "experts"), tokens=512, balance_rate=1.0, memory_dropout=0.1, bf16=True)
    result = run_point(mine, data, tmp_path / "run")
    with torch.autocast("cpu", torch.bfloat16):  # what trains in half precision is judged in it
        assert result["held_out_before"]["test"] == measure(load_model(str(tmp_path / "experts"))[0], data.held_out["test"])
    assert result["expert_load_max"] is None
    assert result["held_out_off"] == result["held_out_before"]
    base.model.embed_tokens.weight.data += 1
    base.save_pretrained(tmp_path / "experts")
    with pytest.raises(CheckpointError, match="from another model"):  # of the same name
        run_point(mine, data, tmp_path / "run")


def test_what_cannot_be_trained_is_refused(tmp_path, memory_run):
    _, data, _ = memory_run
    budget = BudgetRecipe(total=10_000, active=5_000, rho=1.0)
    for changes, words in (
        ({"model": ""}, "PointRecipe.model"),
        ({"model": 3}, "PointRecipe.model"),
        ({"budget": budget}, "one or the other"),
        ({"backbone": BackboneConfig(hidden_size=32)}, "one or the other"),
        ({"engram": None}, "nothing would be trained"),
        ({"optimizer": "muon"}, "'adamw'"),
        ({"model": None}, "train_backbone"),
        ({"train_backbone": "no"}, "true or false"),
        ({"memory_dropout": 1.0}, "share below 1"),
        ({"memory_dropout": -0.1}, "at least 0"),
    ):
        with pytest.raises(ConfigError, match=words):
            recipe(**changes)
    with pytest.raises(ConfigError, match="1024 positions of bundled"):
        run_point(recipe(data=dataclasses.replace(TEXT, seq_len=2048), tokens=16384), data, tmp_path / "long")
    with pytest.raises(CheckpointError, match="nowhere"):
        run_point(recipe(model="./nowhere"), data, tmp_path / "missing")


def test_sweeps_start_from_fresh_backbones(tmp_path):
    text = (RECIPES / "sweep_tiny.yaml").read_text().replace("  budget:", "  model: bundled\n  budget:")
    (tmp_path / "sweep.yaml").write_text(text)
    with pytest.raises(ConfigError, match="one or the other"):
        read_sweep(tmp_path / "sweep.yaml")
    with pytest.raises(ConfigError, match="use engram train"):
        read_sweep(RECIPES / "sweep_dense.yaml", {"model": "bundled", "backbone": {}, "engram": {"layer_ids": [1]}})


def test_options_that_came_later_change_no_identity():
    identity = read_point(RECIPES / "train_tiny.yaml").identity()
    assert not {"model", "train_backbone", "memory_dropout", "lr_scheduler", "decay_share"} & set(identity)
    assert {"model", "train_backbone"} <= set(recipe().identity())
