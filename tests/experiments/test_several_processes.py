"""`engram train` started by a launcher: two processes, held against one."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from engram import ConfigError, EngramModel, TableConfig
from engram.checkpoint import read_description
from engram.data.recipe import read_yaml
from engram.experiments import point as points
from engram.experiments import prepare_data, read_point, run_point
from engram.experiments.held_out import measure
from tests.versions import needs_torch_2_7

RECIPES = Path(__file__).parents[2] / "recipes"
MIXTURE = """
backbone: {architecture: deepseek_v3, hidden_size: 16, num_hidden_layers: 2, num_attention_heads: 1, kv_lora_rank: 8, intermediate_size: 32,
  moe_intermediate_size: 8, n_routed_experts: 4, num_experts_per_tok: 2, n_shared_experts: 1}
engram: {engram_vocab_size: 100, n_embed_per_ngram: 4, n_head_per_ngram: 1, layer_ids: [1]}
table: {sharded: true}
balance_rate: 0.01
tokens: 1024
batch_size: 4
"""


def recipe_of(folder, *more):
    data = read_yaml(RECIPES / "train_tiny.yaml")["data"]
    data["corpus"]["texts"] = [str(RECIPES / text) for text in data["corpus"]["texts"]]
    file = folder / "recipe.yaml"
    file.write_text("\n".join([f"data: {json.dumps(data)}", MIXTURE, *more]))
    return file


def launched(*command, count=2):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    return subprocess.run(
        [*launcher, "-m", "engram", *map(str, command)], env=environment, capture_output=True, text=True, timeout=240
    )


@pytest.mark.slow
@needs_torch_2_7("shard_model refuses it")
def test_two_processes_train_a_mixture_with_a_divided_memory_as_one_does(tmp_path):
    """The base model divided too; that each process may have a copy of it is tested with the trainer."""
    file, run = recipe_of(tmp_path, "shard_model: true", "keep_model: true", "curve_points: 2"), tmp_path / "two"
    done = launched("train", file, "--out", run)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("written: ") == 1
    recipe = read_point(file)
    one = run_point(recipe, prepare_data(recipe.data, tmp_path, tmp_path / "data"), tmp_path / "one")
    two = json.loads((run / "result.json").read_text())
    assert two["made_with"]["processes"] == 2
    assert "processes" not in one["made_with"]
    assert two["identity"] == one["identity"]
    assert two["counts"] == one["counts"]
    assert two["expert_load_max"] == pytest.approx(one["expert_load_max"], abs=0.3)
    for (step, loss), (same_step, same_loss) in zip(two["training_loss"], one["training_loss"], strict=True):
        assert step == same_step
        assert loss == pytest.approx(same_loss, rel=2e-3)
    assert two["held_out"]["test"]["loss"] == pytest.approx(one["held_out"]["test"]["loss"], rel=2e-3)
    assert read_description(run / "memory")["table_dtype"] == "float32"
    assert not (run / "checkpoints").exists()
    base = AutoModelForCausalLM.from_pretrained(run / "model")
    saved = EngramModel.from_pretrained(base, run / "memory", AutoTokenizer.from_pretrained(run / "model"))
    test = prepare_data(recipe.data, tmp_path, tmp_path / "data").held_out["test"]
    assert measure(saved.eval(), test)["loss"] == pytest.approx(two["held_out"]["test"]["loss"], rel=1e-4)


@pytest.mark.slow
def test_commands_of_one_process_say_so(tmp_path):
    done = launched("sweep", RECIPES / "sweep_tiny.yaml", "--out", tmp_path / "run", count=2)
    assert done.returncode != 0
    assert "engram sweep: got 2 processes, expected one: start it without torchrun" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_batch_that_cannot_be_divided_and_rows_in_files_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(points, "process_count", lambda: 3)
    recipe = read_point(recipe_of(tmp_path))
    with pytest.raises(ConfigError, match="got 4 blocks for 3 processes"):
        points._trainer(recipe.solved(), None, None, tmp_path, [], ())
    mapped = dataclasses.replace(recipe, table=TableConfig(tier="mmap")).solved()
    with pytest.raises(ConfigError, match="got tier 'mmap' with several processes"):
        points._attach_memory(mapped, None, type("Tokenizer", (), {"pad_token_id": None}), tmp_path)


def test_a_model_without_a_memory_is_not_divided(tmp_path):
    with pytest.raises(ConfigError, match="shard_model: got true without a memory"):
        dataclasses.replace(read_point(recipe_of(tmp_path)), engram=None, shard_model=True)
    with pytest.raises(ConfigError, match="shard_model: got 1, expected true or false"):
        read_point(recipe_of(tmp_path, "shard_model: 1"))
