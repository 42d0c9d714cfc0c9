"""Which base model a command takes for a memory, and which folders it finds memories and models in."""

import json
import shutil

import pytest

from engram import get_engram_model
from engram.checkpoint import DESCRIPTION_NAME, read_description
from engram.testing import tiny_config, tiny_model, tiny_tokenizer
from tests.cli.test_cli import invoke


@pytest.fixture
def run(tmp_path):
    """A run folder as `engram train` leaves it: the model has had no name yet when its memory is saved."""
    model, tokenizer = tiny_model(), tiny_tokenizer()
    memory = get_engram_model(model, tiny_config(table_init="normal"), tokenizer)
    model.save_pretrained(tmp_path / "run" / "model")
    tokenizer.save_pretrained(tmp_path / "run" / "model")
    memory.save_pretrained(tmp_path / "run" / "memory")
    assert not read_description(tmp_path / "run" / "memory")["base_model"]["name_or_path"]
    return tmp_path / "run"


@pytest.fixture
def no_bundled(monkeypatch):
    """The bundled model is loaded for nobody who did not name it."""
    monkeypatch.setattr("engram.models.bundled.BUNDLED_MODEL", "/nowhere/bundled")


def test_a_memory_knows_its_model_from_every_directory(world, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(world)
    code, _, err = invoke(monkeypatch, capsys, "teach", "one.yaml", "--memory", tmp_path / "m", "--model", "base")
    assert code == 0, err
    named = read_description(tmp_path / "m")["base_model"]["name_or_path"]
    assert named == str(world / "base")
    monkeypatch.chdir(tmp_path)
    assert invoke(monkeypatch, capsys, "ask", "KEY:beta 20", "--memory", "m")[:2] == (0, "7319\n")


def test_a_name_that_is_no_models_folder_stays_as_it_is(tmp_path, monkeypatch):
    from engram.models.identity import base_identity

    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt2").mkdir()  # not a model: what is meant is the hub's
    (tmp_path / "bundled").mkdir()
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "bundled" / "config.json").write_text("{}")
    model = tiny_model()
    for name in ("gpt2", "bundled", "owner/model", ""):
        model.config._name_or_path = name
        assert base_identity(model)["name_or_path"] == name


@pytest.mark.parametrize("command", [["ask", "the memory", "--memory"], ["place", "--hot-from", "t", "--hot-rows", 2]])
def test_a_model_that_has_gone_is_said_at_once_with_the_way_out(run, monkeypatch, capsys, command):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", None)  # nobody is asked
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", None)
    monkeypatch.chdir(run)
    (run / "t").write_text("the memory")
    description = json.loads((run / "memory" / DESCRIPTION_NAME).read_text())
    description["base_model"]["name_or_path"] = "/gone/model"
    (run / "memory" / DESCRIPTION_NAME).write_text(json.dumps(description))
    (run / "memory").rename(run / "m")
    code, out, err = invoke(monkeypatch, capsys, *command, "m")
    assert (code, out) == (1, "")
    assert "cannot load model '/gone/model': there is no such folder" in err
    assert "if that has moved, say where with --model" in err


def run_commands(run, tmp_path):
    texts = tmp_path / "texts.yaml"
    texts.write_text(json.dumps({"some": ["The memory is in.", "KEY"], "more": ["A window.", "beta"]}))
    hidden_in = tmp_path / "hidden_in.yaml"
    hidden_in.write_text(json.dumps({"some": ["the memory is addressed by the last tokens.\n" * 40]}))
    (tmp_path / "t").write_text("The memory is addressed by the last tokens.")
    return {
        "ask": ("ask", "the memory", "--max-new-tokens", 2, "--memory", run),
        "trace": ("trace", "the memory", "--memory", run),
        "route": ("route", run, texts),
        "place": ("place", run, "--json", "--hot-from", tmp_path / "t", "--hot-rows", 2),
        "convert": ("convert", run, "--dtype", "int8", "--out", tmp_path / "c", "--text", tmp_path / "t"),
        "recall": ("recall", "--memory", run, "--tasks", "needle", "--lengths", 180, "--examples", 1, "--texts", hidden_in),
        "look": ("look", run, "--what", "gates", "--texts", texts, "--out", tmp_path / "look", "--length", 8),
    }


@pytest.mark.parametrize("folder", ["", "memory"])
@pytest.mark.parametrize("command", ["ask", "trace", "route", "place", "convert", "recall", "look"])
def test_the_memory_of_a_run_is_read_with_the_model_beside_it(run, no_bundled, monkeypatch, capsys, tmp_path, command, folder):
    """Also where the whole run was moved to."""
    moved = tmp_path / "elsewhere"
    run.rename(moved)
    code, _, err = invoke(monkeypatch, capsys, *run_commands(moved / folder, tmp_path)[command])
    assert code == 0 or "the memory helps" in err, err
    assert "Traceback" not in err


@pytest.mark.parametrize("command", ["ask", "trace", "route", "place", "convert", "recall", "look"])
def test_a_memory_without_a_known_model_asks_for_one(run, no_bundled, monkeypatch, capsys, tmp_path, command):
    (run / "memory").rename(tmp_path / "m")
    arguments = run_commands(tmp_path / "m", tmp_path)[command]
    code, _, err = invoke(monkeypatch, capsys, *arguments)
    assert code == 1
    assert "does not say what its base model is called" in err
    assert "say where it is with --model" in err
    shutil.rmtree(tmp_path / "c", ignore_errors=True)
    for model in (run, run / "model"):  # a run's folder stands for the model in it
        code, _, err = invoke(monkeypatch, capsys, *arguments, "--model", model)
        assert code == 0 or "the memory helps" in err, err
        shutil.rmtree(tmp_path / "c", ignore_errors=True)


@pytest.mark.parametrize(
    "command", [["why", "x"], ["eval", "--facts", "f.yaml"], ["teach", "f.yaml"], ["facts"], ["forget", "x"]]
)
def test_a_trained_memory_is_refused_before_a_model_is_loaded(run, no_bundled, monkeypatch, capsys, tmp_path, command):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "f.yaml").write_text("- {prompt: a, answer: b}")
    code, out, err = invoke(monkeypatch, capsys, *command, "--memory", run)
    assert (code, out) == (2, "")
    assert "rows are not verified" in err
    assert not (run / DESCRIPTION_NAME).exists()


def test_a_memory_beside_somebodys_model_keeps_its_own(world, taught, monkeypatch, capsys, tmp_path):
    """Only a run's folder, or a memory that names none, takes the model beside it."""
    tiny_model(seed=5, hidden_size=64, intermediate_size=96).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    assert invoke(monkeypatch, capsys, "ask", "KEY:beta 20", "--memory", taught)[:2] == (0, "7319\n")


def test_a_model_trained_on_is_the_one_in_the_run(run, monkeypatch, capsys):
    """Its memory names the model that the run began with."""
    file = run / "memory" / DESCRIPTION_NAME
    description = json.loads(file.read_text())
    description["base_model"]["name_or_path"] = "/began/with"
    file.write_text(json.dumps(description))
    code, _, err = invoke(monkeypatch, capsys, "ask", "the memory", "--max-new-tokens", 2, "--memory", run)
    assert code == 0, err


def test_the_memory_of_a_demo_is_found_by_the_demos_folder(engram, taught, tmp_path):
    (tmp_path / "demo").mkdir()
    taught.rename(tmp_path / "demo" / "memory")
    assert engram("ask", "KEY:beta 20", "--memory", tmp_path / "demo")[:2] == (0, "7319\n")
    assert len(json.loads(engram("facts", "--memory", tmp_path / "demo", "--json")[1])) == 2
    assert engram("teach", "two.yaml", "--memory", tmp_path / "demo")[0] == 0
    assert engram("forget", "gamma", "--memory", tmp_path / "demo")[0] == 0
    assert engram("diff", tmp_path / "demo", tmp_path / "demo")[0] == 0
    assert not (tmp_path / "demo" / DESCRIPTION_NAME).exists()


@pytest.mark.parametrize("began_with", [None, "/began/with"])
def test_a_memory_that_is_placed_or_converted_elsewhere_finds_the_model_of_its_run(
    run, tmp_path, monkeypatch, capsys, began_with
):
    file = run / "memory" / DESCRIPTION_NAME
    description = json.loads(file.read_text())
    description["base_model"]["name_or_path"] = began_with or ""
    file.write_text(json.dumps(description))
    monkeypatch.chdir(tmp_path)
    commands = (("place", run, "--tier", "mmap"), ("convert", run, "--dtype", "int8"))
    for number, command in enumerate(commands):
        assert invoke(monkeypatch, capsys, *command, "--out", f"there/{number}")[0] == 0
        code, _, err = invoke(monkeypatch, capsys, "ask", "the memory", "--max-new-tokens", 2, "--memory", f"there/{number}")
        assert code == 0, err
        code, _, err = invoke(monkeypatch, capsys, *command, "--out", run)
        assert code == 2
        assert "the folder of a run, whose own memory would not be found any more" in err
    assert not (run / DESCRIPTION_NAME).exists()


def test_facts_over_a_memory_move_together_with_it(world, taught, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(world)
    top = tmp_path / "here" / "top"
    code, _, err = invoke(monkeypatch, capsys, "teach", "two.yaml", "--memory", top, "--over", taught)
    assert code == 0, err
    shutil.copytree(taught, tmp_path / "there" / taught.name)
    shutil.move(top, tmp_path / "there" / "top")
    shutil.rmtree(taught)
    code, out, err = invoke(monkeypatch, capsys, "ask", "KEY:beta 20", "--memory", tmp_path / "there" / "top")
    assert (code, out) == (0, "7319\n"), err
