import io
import json
import os
import sys
from functools import partial
from pathlib import Path

import pytest
import typer
from rich.table import Table

from engram.checkpoint import ConversionReport
from engram.cli import demo, sweep
from engram.cli.convert import print_report
from engram.cli.loading import Running
from engram.cli.outputs import check_writable, is_terminal, new_console, print_folded, print_whole
from engram.cli.place import _print_layers
from engram.cli.trace import _print_table
from engram.evaluation import Trace


def test_a_place_that_can_be_written_is_left_as_it_was(tmp_path):
    check_writable(tmp_path / "new" / "r.json")
    assert list((tmp_path / "new").iterdir()) == []
    (tmp_path / "old.json").write_text("{}")
    check_writable(tmp_path / "old.json")
    assert (tmp_path / "old.json").read_text() == "{}"
    with pytest.raises(typer.BadParameter, match="cannot write"):
        check_writable(tmp_path / "old.json" / "r.json")


def test_what_is_no_regular_file_is_left_alone(tmp_path):
    pipe, link = tmp_path / "pipe", tmp_path / "link"
    os.mkfifo(pipe)
    check_writable(pipe)  # without waiting for a reader
    assert pipe.is_fifo()
    link.symlink_to(tmp_path / "nothing yet")
    check_writable(link)
    assert link.is_symlink()
    assert not (tmp_path / "nothing yet").exists()


def test_a_closed_stream_is_no_terminal(monkeypatch):
    assert not is_terminal(io.StringIO())
    monkeypatch.setattr(sys, "stdout", None)  # what Python makes of `>&-`
    assert not is_terminal(sys.stdout)
    report = ConversionReport(source="a", out="b", dtype_before="float32", dtype_after="int8", layers=[])
    for show in (
        partial(print_report, report),
        partial(_print_layers, []),
        partial(_print_table, Trace("", [], {}, []), False),
    ):
        show()


def cells(page):
    """What the columns of a printed table say, line by line put together."""
    rows = [line[1:-1].split("│") for line in page.splitlines() if line.startswith("│")]
    return ["".join(part.strip() for part in column) for column in zip(*rows)]


@pytest.mark.parametrize("width", [20, 80, 200])
def test_a_folded_table_is_whole_however_narrow_the_terminal(monkeypatch, capsys, width):
    monkeypatch.setattr("engram.cli.outputs.is_terminal", lambda stream: True)
    monkeypatch.setenv("COLUMNS", str(width))
    wanted = [f"{number}{'abcdefghijkl' * number}." for number in range(9)]
    table = Table(show_header=False)
    table.add_row(*wanted)
    print_folded(table)
    page = capsys.readouterr().out
    assert cells(page) == wanted
    assert max(map(len, page.splitlines())) <= max(width, 82)


def test_texts_are_shown_as_they_are(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    table = Table(title=":cat: [bold]1[/bold]")
    table.add_column(":dog:")
    table.add_row("[INST] :cat: 'text' 17 [/INST]")
    for show in (print_whole, print_folded):
        show(table)
        page = capsys.readouterr().out
        assert ":dog:" in page
        assert "[INST] :cat: 'text' 17 [/INST]" in page
        assert ":cat: [bold]1[/bold]" in page
    new_console().print(":cat: [bold]17[/bold]")
    assert capsys.readouterr().out == ":cat: [bold]17[/bold]\n"


def test_commands_that_are_recorded_can_be_typed_as_they_are():
    facts, running = Path("my facts.yaml"), Running("cuda", "bfloat16")
    assert demo._command(facts, "a model", 3, running) == (
        "engram demo --facts 'my facts.yaml' --model 'a model' --seed 3 --device cuda --model-dtype bfloat16"
    )
    assert demo._command(None, "bundled", 0, Running()) == "engram demo --model bundled --seed 0"
    assert sweep._command(Path("my recipe.yaml"), Path("out 1/r.json"), ["budget.rho=[1, 0.5]", "seed=1"]) == (
        "engram sweep 'my recipe.yaml' --out RUN --json 'out 1/r.json' --set 'budget.rho=[1, 0.5]' --set seed=1"
    )


def test_the_result_of_a_sweep_names_the_device_that_worked(monkeypatch, tmp_path):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda *_: "a fast one")
    sweep._write(tmp_path / "r.json", {"points": []}, "engram sweep")
    assert json.loads((tmp_path / "r.json").read_text())["hardware"] == "a fast one"
