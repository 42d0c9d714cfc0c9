import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from engram import __version__
from engram.cli.main import app, main
from engram.plots.report import gate_colour

SNAPSHOTS = Path(__file__).parent / "help"
FACTS = '- {prompt: "KEY:one", answer: "red"}\n- {prompt: "KEY:two", answer: "blue"}\n'


def invoke(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["engram", *map(str, arguments)])
    try:
        main()
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    captured = capsys.readouterr()
    return code, captured.out, captured.err


COMMANDS = [
    "demo",
    "teach",
    "ask",
    "why",
    "facts",
    "forget",
    "diff",
    "merge",
    "convert",
    "place",
    "eval",
    "recall",
    "route",
    "generate",
    "trace",
    "recipe",
    "corpus",
    "look",
    "plot",
    "pretrain",
    "train",
    "budget",
    "sweep",
    "bench",
]


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_is_as_recorded(command):
    """Run with ENGRAM_UPDATE_SNAPSHOTS=1 to record the help texts anew."""
    result = CliRunner().invoke(app, [*command.split(), "--help"], env={"COLUMNS": "100", "TERM": "dumb"}, prog_name="engram")
    assert result.exit_code == 0
    file = SNAPSHOTS / f"{command or 'engram'}.txt"
    if os.environ.get("ENGRAM_UPDATE_SNAPSHOTS"):
        file.parent.mkdir(exist_ok=True)
        file.write_text(result.output)
    assert result.output == file.read_text()


def test_every_command_is_in_a_group_of_the_help_with_its_whole_first_sentence():
    shown = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "80", "TERM": "dumb"}, prog_name="engram").output
    for name, command in typer.main.get_command(app).commands.items():
        sentence = command.help.split("\n\n")[0].replace("\n", " ")
        assert re.search(rf"^  {name} +{re.escape(sentence)}$", shown, re.MULTILINE), name


def test_version(monkeypatch, capsys):
    assert invoke(monkeypatch, capsys, "--version") == (0, f"{__version__}\n", "")


@pytest.mark.slow
def test_demo_on_the_users_own_facts(monkeypatch, capsys, tmp_path):
    facts = tmp_path / "facts.yaml"
    facts.write_text(FACTS)
    code, out, _ = invoke(monkeypatch, capsys, "demo", "--facts", facts, "--out", tmp_path / "out")
    assert code == 0, out
    places = [str(tmp_path / "out" / name) for name in ("report.html", "result.json", "memory")]
    assert any(all(place in line for place in places) for line in out.splitlines())  # one line, however long
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["categories"] == [{"category": "fact", "prompts": 2, "before": 0, "after": 2}]
    assert result["capitals"]["still_right"] == result["capitals"]["known"]
    assert [(e["prompt"], e["on"]) for e in result["examples"]] == [("KEY:one", "red"), ("KEY:two", "blue")]
    assert result["bits_per_byte"]["change_percent"] == 0
    assert (result["drift"]["mean_kl"], result["drift"]["untouched"]) == (0, 1)
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("class='tok") > 10
    assert "http://" not in page
    assert "https://" not in page
    assert "<script" not in page
    assert (tmp_path / "out" / "memory" / "engram.json").is_file()
    code, out, _ = invoke(monkeypatch, capsys, "trace", "KEY:one", "--memory", tmp_path / "out" / "memory", "--json")
    assert json.loads(out)["tokens"][-1]["layers"][0]["written"]


def test_trace_of_a_sentence(monkeypatch, capsys):
    sentence = "Only Alexander the Great could tame the horse Bucephalus."
    code, out, _ = invoke(monkeypatch, capsys, "trace", sentence, "--json")
    trace = json.loads(out)
    assert code == 0
    assert "".join(token["token"] for token in trace["tokens"][1:]) == sentence
    first = trace["tokens"][3]
    assert len(first["layers"]) == 2
    assert len(first["layers"][0]["rows"]) == 16
    assert all(0 <= gate <= 1 for token in trace["tokens"] for layer in token["layers"] for gate in layer["gate"])
    assert trace["output_shape"][1] == len(trace["tokens"])
    code, out, _ = invoke(monkeypatch, capsys, "trace", sentence)
    assert code == 0
    assert "tokens -> output [1," in out
    assert "untrained" in out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["demo", "--facts", "none.yaml"], 2, "does not exist"),
        (["demo", "--facts", "empty.yaml"], 2, "expected a list"),
        (["demo", "--facts", "latin.yaml"], 2, "not UTF-8"),
        (["demo", "--facts", "two.yaml"], 2, "different answers"),
        (["demo", "--facts", "long.yaml", "--out", "out"], 2, "expected at most 1024"),
        (["demo", "--out", "file/below"], 1, "cannot write to file/below"),
        (["demo", "--model", "./nowhere"], 1, "cannot load model './nowhere'"),
        (["trace", " "], 2, "text is empty"),
        (["trace", "a", "--memory", "nowhere"], 1, "no memory in nowhere"),
        (["trace", "a", "--tokenizer", "x"], 2, "goes with --demo-size"),
        (["trace", "a", "--demo-size", "--memory", "x"], 2, "cannot be combined"),
        (["trace", "a", "--demo-size", "--model", "x"], 2, "got a model beside --demo-size"),
        (["pretrain", "none.yaml", "--out", "run"], 2, "does not exist"),
        (["recall", "--tasks", "needle,haystack"], 2, "tasks: got haystack, expected some of needle"),
        (["recall", "--lengths", "256,4096"], 2, "lengths: got 4096, expected at most 1024"),
        (["recall", "--lengths", "long"], 2, "expected numbers of tokens"),
        (["recall", "--lengths", "20"], 2, "a length of 20 tokens has no room"),
        (["recall", "--memory", "nowhere"], 1, "no memory in nowhere"),
        (["nonsense"], 2, "No such command"),
    ],
)
def test_mistakes_give_one_message_and_no_traceback(monkeypatch, capsys, tmp_path, arguments, code, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "empty.yaml").write_text("")
    (tmp_path / "latin.yaml").write_bytes(b'- {prompt: "\xe9", answer: "e"}')
    (tmp_path / "two.yaml").write_text("- {prompt: a, answer: b}\n- {prompt: a, answer: c}")
    (tmp_path / "long.yaml").write_text(f"- {{prompt: a, answer: {'word ' * 1200}}}")
    (tmp_path / "file").write_text("")
    got, _, err = invoke(monkeypatch, capsys, *arguments)
    assert got == code, err
    assert message in " ".join(err.split())
    assert "Traceback" not in err


def test_demo_sizes_are_checked_against_the_papers():
    """The real thing needs 9 GB; here its configuration alone."""
    from engram import EngramConfig

    config = EngramConfig(hidden_size=1024, hc_mult=4)
    assert (config.layer_ids, config.d_mem, config.num_heads, config.head_dim) == ((1, 15), 1024, 16, 64)
    assert config.engram_vocab_size == (646400, 646400)


def test_importing_engram_is_light():
    code = (
        "import engram, engram.layers, engram.optim, engram.checkpoint, sys\n"
        "sys.exit(any(m in sys.modules for m in ('transformers', 'peft', 'accelerate')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_gate_colours_run_from_white_to_red():
    assert gate_colour(0.0) == "rgb(255,255,255)"
    assert gate_colour(1.0) == "rgb(103,0,13)"
    assert gate_colour(7.0) == gate_colour(1.0)


def test_a_seed_repeats_the_trace(monkeypatch, capsys):
    outs = [invoke(monkeypatch, capsys, "trace", "the memory", "--json", "--seed", s)[1] for s in (1, 1, 2)]
    assert outs[0] == outs[1] != outs[2]
    assert torch.initial_seed() == 2


@pytest.mark.parametrize("command", ["teach", "facts", "pretrain", "sweep"])
def test_a_launcher_that_starts_a_command_several_times_is_told(monkeypatch, capsys, tmp_path, command):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    code, out, err = invoke(
        monkeypatch,
        capsys,
        command,
        tmp_path / "facts.yaml",
        "--out" if command in ("pretrain", "sweep") else "--memory",
        tmp_path / "memory",
    )
    assert code == 2
    assert out == ""
    assert f"engram {command}: got 2 processes, expected one" in err
    assert not list(tmp_path.iterdir())


def test_an_interruption_of_the_first_imports_is_one_line():
    code = (
        "import sys\n"
        "class Interrupted:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'typer':\n"
        "            raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupted())\n"
        "from engram.__main__ import main\n"
        "main()\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (130, "engram: interrupted\n")
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    assert project["project"]["scripts"] == {"engram": "engram.__main__:main"}


@pytest.mark.parametrize(
    "arguments", ["--help", "--version", "facts --help", "bench --list", "budget --total 4.3M --active 416k"]
)
def test_a_pipe_that_nobody_reads_ends_a_command_quietly(arguments):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "engram", *arguments.split()]
    ended = subprocess.run(command, check=False, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (141, "")


def test_an_interruption_says_what_is_true_of_every_command(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("engram.data.facts.load_facts", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    code, _, err = invoke(monkeypatch, capsys, "demo", "--out", tmp_path / "demo")
    assert (code, err) == (130, "engram: interrupted; what was saved by then is whole\n")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), "MemoryError"),
        (RuntimeError("unable to mmap 410268688 bytes: Cannot allocate memory (12)"), "unable to mmap 410268688 bytes"),
    ],
)
def test_too_little_memory_is_one_line(monkeypatch, capsys, error, message):
    def fails():
        raise error

    monkeypatch.setattr("engram.cli.main._run", fails)
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 1
    said = capsys.readouterr().err
    assert said.startswith("engram: this needs more memory than there is: ")
    assert message in said


def test_a_bug_is_no_lack_of_memory(monkeypatch):
    def fails():
        raise RuntimeError("a bug")

    monkeypatch.setattr("engram.cli.main._run", fails)
    with pytest.raises(RuntimeError, match="a bug"):
        main()
