import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from engram import CheckpointError, ConfigError, DataError
from engram.data.corpus import build_corpus
from engram.evaluation import bits_per_byte
from engram.evaluation.versions import made_with
from engram.testing import tiny_model, tiny_tokenizer
from engram.training import pretrain as pretraining
from engram.training.pretrain import export_model, pretrain, read_recipe
from engram.training.safe_trainer import last_checkpoint
from tests.training.paused import Paused

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
    assert (report["hardware"], report["versions"]) == (made_with()["device"], made_with()["versions"])
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


def test_a_model_is_put_back_where_its_successor_was_stopped_between_two_names(recipe, tmp_path, monkeypatch):
    target, rename = tmp_path / "model", Path.rename

    def stop(self, to):
        if self.name == ".model.tmp":
            raise KeyboardInterrupt
        return rename(self, to)

    export_model(tiny_model(), tiny_tokenizer(), target, {"number": 1})
    monkeypatch.setattr(Path, "rename", stop)
    with pytest.raises(KeyboardInterrupt):
        export_model(tiny_model(), tiny_tokenizer(), target, {"number": 2})
    monkeypatch.undo()
    assert not target.exists()
    with pytest.raises(CheckpointError, match="holds the model of an earlier run"):
        pretrain(recipe, tmp_path, RECIPES, resume=False)
    assert json.loads((target / "training.json").read_text()) == {"number": 1}
    export_model(tiny_model(), tiny_tokenizer(), target, {"number": 3})
    assert json.loads((target / "training.json").read_text()) == {"number": 3}
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("fresh", [False, True])
def test_a_finished_model_is_not_written_over_though_its_checkpoints_are_gone(recipe, tmp_path, fresh):
    corpus, model = build_corpus(recipe.corpus, RECIPES), tmp_path / "model"
    pretraining._claim_folder(tmp_path, recipe, corpus, fresh=True)  # an empty folder
    pretraining._claim_folder(tmp_path, recipe, corpus, fresh=True)  # one of a run that never came to a checkpoint
    model.mkdir()
    claimed = (tmp_path / "recipe.json").read_text()
    with pytest.raises(CheckpointError, match="nothing was overwritten"):
        pretrain(dataclasses.replace(recipe, seed=1), tmp_path, RECIPES, resume=not fresh)
    assert (tmp_path / "recipe.json").read_text() == claimed
    if fresh:
        with pytest.raises(CheckpointError, match="holds the model of an earlier run"):
            pretraining._claim_folder(tmp_path, recipe, corpus, fresh)
    else:
        pretraining._claim_folder(tmp_path, recipe, corpus, fresh)


@pytest.mark.parametrize(("claimed", "words"), [(None, "no recipe.json"), ("{", "another recipe"), ("{}", "another recipe")])
def test_a_folder_that_nobody_can_tell_the_recipe_of_is_refused(recipe, tmp_path, claimed, words):
    (tmp_path / "model").mkdir()
    if claimed is not None:
        (tmp_path / "recipe.json").write_text(claimed)
    with pytest.raises(CheckpointError, match=words):
        pretrain(recipe, tmp_path, RECIPES)


def test_measuring_takes_nothing_from_the_tokens_per_second(recipe, monkeypatch):
    measured = Paused()
    monkeypatch.setattr(pretraining, "bits_per_byte", measured)
    corpus = SimpleNamespace(held_out=[SimpleNamespace(text="a")])
    measure = pretraining._Measure(SimpleNamespace(recipe=recipe, corpus=corpus, tokenizer=None))
    measure.trainer = SimpleNamespace(throughput=measured.throughput)
    measure.on_step_end(None, SimpleNamespace(global_step=recipe.eval_steps, log_history=[]), None, model=torch.nn.Linear(1, 1))
    assert measured.seen == [True]


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
        ({"num_attention_heads": 3, "num_key_value_heads": 3}, ConfigError, "hidden_size: got 32, expected a multiple of 6"),
        ({"num_attention_heads": 32}, ConfigError, "hidden_size: got 32, expected a multiple of 64"),  # heads of one value
        ({"num_attention_heads": 4, "num_key_value_heads": 3}, ConfigError, "num_key_value_heads: got 3, expected a divisor"),
        ({"seq_len": 129}, ConfigError, "seq_len: got 129, expected at most max_position_embeddings = 128"),
        ({"vocab_size": 257}, ConfigError, "vocab_size: got 257, expected at least 258"),
        ({"decay_steps": -1}, ConfigError, "decay_steps: got -1, expected at least 0"),
        ({"min_lr_ratio": 1.5}, ConfigError, "min_lr_ratio: got 1.5, expected a share"),
        ({"min_lr_ratio": -0.5}, ConfigError, "min_lr_ratio: got -0.5"),
        ({"min_lr_ratio": float("nan")}, ConfigError, "min_lr_ratio: got nan"),
        ({"learning_rate": 0.0}, ConfigError, "learning_rate: got 0.0, expected a finite number above 0"),
        ({"learning_rate": float("inf")}, ConfigError, "learning_rate: got inf"),
        ({"learning_rate": float("nan")}, ConfigError, "learning_rate: got nan"),
        ({"weight_decay": -0.1}, ConfigError, "weight_decay: got -0.1"),
        ({"corpus": {"texts": None}}, ConfigError, "texts: got None"),
        ({"corpus": {"texts": [5]}}, ConfigError, "texts: got"),
        ({"corpus": {"texts": [{"weight": 2}]}}, ConfigError, "path"),
        (
            {"corpus": {"standard_library": True, "test_percent": "x"}},
            ConfigError,
            "test_percent: got .x., expected a whole number",
        ),
    ],
)
def test_bad_recipes(tmp_path, change, error, message):
    fields = {**yaml.safe_load((RECIPES / "tiny_pretrain.yaml").read_text()), **change}
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(fields))
    with pytest.raises(error, match=message):
        read_recipe(file)


def test_zero_is_no_mistake_where_it_means_something(recipe):
    """Also as YAML writes it, without a point."""
    found = dataclasses.replace(recipe, decay_steps=0, min_lr_ratio=0, weight_decay=0)
    assert (found.decay_steps, found.min_lr_ratio, found.weight_decay) == (0, 0, 0)


def test_missing_recipe(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        read_recipe(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(DataError, match="cannot read recipe"):
        read_recipe(tmp_path / "bad.yaml")
