import json

import pytest

from engram import get_engram_model
from engram.analysis import ANALYSES
from engram.models import load_model
from engram.testing import tiny_config, tiny_model, tiny_tokenizer
from tests.analysis.helpers import TEXTS
from tests.cli.test_cli import invoke


@pytest.fixture
def run(tmp_path):
    """A run folder as a training run leaves it: ``model`` and ``memory``."""
    for name, seed in (("run", 0), ("other", 1)):
        tiny_model(seed=seed).save_pretrained(tmp_path / name / "model")
        tiny_tokenizer().save_pretrained(tmp_path / name / "model")
    base, tokenizer = load_model(str(tmp_path / "run" / "model"))
    memory = get_engram_model(base, tiny_config(table_init="normal"), tokenizer)
    memory.save_pretrained(tmp_path / "run" / "memory")
    (tmp_path / "texts.yaml").write_text(json.dumps(TEXTS))
    return tmp_path / "run"


def test_a_run_folder_named_in_three_ways(monkeypatch, capsys, run, tmp_path):
    common = ["--texts", tmp_path / "texts.yaml", "--tokens", 100, "--row-tokens", 100, "--length", 32]
    (tmp_path / "my phrases.txt").write_text("the memory\n")
    phrases = ["--phrases", tmp_path / "my phrases.txt"]
    ways = [[run / "memory", "--model", run / "model", *phrases], [run], ["--model", run]]
    gates = []
    for number, way in enumerate(ways):
        what = [] if number == 0 else ["--what", "gates"]
        out = tmp_path / f"out{number}"
        code, said, err = invoke(monkeypatch, capsys, "look", *way, *what, *common, "--out", out)
        assert code == 0, err
        assert "a part of the text" in said
        result = json.loads((out / "look.json").read_text())
        assert result["model"] == "run"
        gates.append(result["gates"])
        assert (out / "look.html").read_text().startswith("<!doctype html>")
    assert gates[0] == gates[1] == gates[2]
    full = json.loads((tmp_path / "out0" / "look.json").read_text())
    assert set(full) >= set(ANALYSES)
    assert full["phrases"]["phrases"] == {"the memory": 3}
    assert (command := full["provenance"]["command"]).startswith(
        f"engram look {run / 'memory'} --model {run / 'model'} --texts "
    )
    assert command.endswith(f" --phrases '{tmp_path / 'my phrases.txt'}' --tokens 100 --row-tokens 100 --length 32")


def test_a_second_model_and_text_from_a_file(monkeypatch, capsys, run, tmp_path):
    (tmp_path / "plain.txt").write_text("The memory is addressed.\n<|doc|>\nThe last tokens of the text.\n")
    arguments = ["--texts", tmp_path / "plain.txt", "--what", "cka, logit_lens", "--out", tmp_path / "out", "--length", 16]
    extra = ["--against", tmp_path / "other", "--json", tmp_path / "copy.json"]
    code, said, err = invoke(monkeypatch, capsys, "look", run, *arguments, *extra)
    assert code == 0, err
    assert "a part of the text" not in said
    result = json.loads((tmp_path / "copy.json").read_text())
    assert (result["model"], result["against"]) == ("run", "other")
    assert set(result["logit_lens"]["subjects"]) == {"memory on", "memory off", "against"}
    assert list(result["text"]["kinds"]) == ["plain"]
    assert (tmp_path / "out" / "cka.png").is_file()
    assert not (tmp_path / "out" / "gates.png").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--what", "nonsense"], 2, "got nonsense, expected some of gates"),
        (["--what", ","], 2, "got nothing, expected some of gates"),
        (["nowhere"], 1, "no memory in nowhere"),
        (["--model", "./nowhere"], 1, "cannot load model './nowhere'"),
        (["--texts", "none.yaml"], 2, "cannot read texts none.yaml"),
        (["run", "--phrases", "none.txt"], 2, "cannot read phrases none.txt"),
        (["run", "--phrases", "file"], 2, "holds no phrase"),
        (["run", "--phrases", "file", "--what", "gates"], 2, "expected 'phrases' in it"),
        (["run", "--what", "phrases"], 2, "no phrases were named (--phrases FILE)"),
        (["--out", "file"], 2, "expected a folder that can be made"),
        (["--what", "rows", "--model", "run/model"], 2, "none was given"),
        (["run/memory", "--model", "other/model"], 1, "belongs to base model"),
        (["--tokens", "3"], 2, "Invalid value for '--tokens'"),
    ],
)
def test_mistakes_give_one_message_and_no_traceback(monkeypatch, capsys, run, tmp_path, arguments, code, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    given = [] if "--out" in arguments else ["--out", "out"]
    got, _, err = invoke(monkeypatch, capsys, "look", *arguments, *given)
    assert got == code, err
    assert message in " ".join(err.split())
    assert "Traceback" not in err
