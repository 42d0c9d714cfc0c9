import dataclasses
import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from engram import CheckpointError, ConfigError, DataError
from engram.data.corpus import build_corpus
from engram.evaluation import bits_per_byte
from engram.training import pretrain as pretraining
from engram.training.pretrain import pretrain, read_recipe
from engram.training.safe_trainer import last_checkpoint

RECIPES = Path(__file__).parents[2] / "recipes"


# The others are read by whom they are for, in tests/data and tests/experiments.
@pytest.mark.parametrize("name", ["base_model", "tiny_pretrain"])
def test_every_recipe_of_pretraining_parses(name):
    read_recipe(RECIPES / f"{name}.yaml")


def test_no_recipe_is_read_by_nobody():
    kinds = {p.stem for p in RECIPES.glob("*.yaml") if not p.name.startswith(("sweep_", "train_"))}
    assert kinds == {"base_model", "tiny_pretrain", "corpus_python"}


@pytest.fixture
def recipe():
    return read_recipe(RECIPES / "tiny_pretrain.yaml")


def test_a_run_writes_a_model_that_loads(recipe, tmp_path, monkeypatch):
    target = pretrain(recipe, tmp_path / "run", RECIPES)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(target), AutoTokenizer.from_pretrained(target)
    assert model.dtype == torch.bfloat16
    text = "Déjà vu\n\tdef f(x): return x + 12  # ok"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    assert tokenizer(text)["input_ids"][0] == tokenizer.bos_token_id == tokenizer.eos_token_id == 0
    report = json.loads((target / "training.json").read_text())
    assert report["tokens_seen"] == 20 * 4 * 64
    assert report["parameters"] == model.num_parameters()
    assert report["loss"][0]["loss"] > report["loss"][-1]["loss"]
    assert 0 < bits_per_byte(model.float(), tokenizer, ["The capital of France is Paris."]) < 9
    assert not {p.suffix for p in (tmp_path / "run").rglob("*")} & {".pt", ".pth", ".bin", ".pkl"}
    with pytest.raises(CheckpointError, match="another recipe"):
        pretrain(dataclasses.replace(recipe, seed=1), tmp_path / "run", RECIPES)
    with pytest.raises(CheckpointError, match="resume it"):
        pretrain(recipe, tmp_path / "run", RECIPES, resume=False)
    corpus = build_corpus(recipe.corpus, RECIPES)
    changed = dataclasses.replace(corpus, train=[*corpus.train[1:], dataclasses.replace(corpus.train[0], text="Changed.")])
    monkeypatch.setattr(pretraining, "build_corpus", lambda *_: changed)
    with pytest.raises(CheckpointError, match="other text"):
        pretrain(recipe, tmp_path / "run", RECIPES)


def test_resuming_is_exact(recipe, tmp_path):
    whole = pretrain(recipe, tmp_path / "a", RECIPES)
    pretrain(recipe, tmp_path / "b", RECIPES)
    newest = last_checkpoint(tmp_path / "b" / "checkpoints")
    assert newest.name == "checkpoint-20"
    (newest / "trainer_state.json").unlink()  # as if killed while saving
    assert last_checkpoint(tmp_path / "b" / "checkpoints").name == "checkpoint-10"
    again = pretrain(recipe, tmp_path / "b", RECIPES)
    assert (again / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    losses = [json.loads((p / "training.json").read_text())["loss"][-1] for p in (whole, again)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"layers": 3}, ConfigError, "unknown key.*layers"),
        ({"steps": 0}, ConfigError, "steps: got 0"),
        ({"warmup_steps": 30}, ConfigError, "warmup_steps"),
        ({"corpus": {"texts": [{"file": "a"}]}}, ConfigError, "unknown key.*file"),
        ({"corpus": {"stdlib": True}}, ConfigError, "unknown key.*stdlib"),
        ({"corpus": None}, ConfigError, "'corpus'"),
        ({"seed": -1}, ConfigError, "seed: got -1"),
        ({"steps": "a"}, ConfigError, "steps: got 'a', expected int"),
        ({"bf16": 1}, ConfigError, "bf16: got 1, expected bool"),
        ({"corpus": {"texts": None}}, ConfigError, "texts: got None"),
        ({"corpus": {"texts": [5]}}, ConfigError, "texts: got"),
        ({"corpus": {"texts": [{"weight": 2}]}}, ConfigError, "path"),
        ({"corpus": {"standard_library": True, "test_percent": "x"}}, ConfigError, "corpus"),
    ],
)
def test_bad_recipes(tmp_path, change, error, message):
    fields = {**yaml.safe_load((RECIPES / "tiny_pretrain.yaml").read_text()), **change}
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(fields))
    with pytest.raises(error, match=message):
        read_recipe(file)


def test_missing_recipe(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        read_recipe(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(DataError, match="cannot read recipe"):
        read_recipe(tmp_path / "bad.yaml")
