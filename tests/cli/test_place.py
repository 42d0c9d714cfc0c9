import json

import pytest
import torch

from engram import EngramModel, get_engram_model
from engram.models import load_model
from engram.testing import tiny_config, tiny_model, tiny_tokenizer
from tests.cli.test_cli import invoke

TEXT = "The memory is addressed by the last tokens. The memory is addressed by the first tokens.\n"


@pytest.fixture
def engram(tmp_path, monkeypatch, capsys):
    tiny_model().save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    base, tokenizer = load_model(str(tmp_path / "base"))
    memory = get_engram_model(base, tiny_config(table_init="normal"), tokenizer)
    memory.save_pretrained(tmp_path / "m")
    memory.unload()
    (tmp_path / "text.txt").write_text(TEXT)
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: invoke(monkeypatch, capsys, *arguments)


def test_places_are_shown(engram):
    code, out, err = engram("place", "m")
    assert code == 0, err
    assert "where the rows are saved" in out
    assert "what it would cost" in out
    assert "a quick measurement" in out
    fields = json.loads(engram("place", "m", "--json", "--hot-rows", 20, "--hot-from", "text.txt")[1])
    assert {cost["tier"] for cost in fields["costs"]} == {"device", "host", "mmap", "hybrid"}
    assert fields["hot"]["0"]["rows"] == 20
    assert 0 < fields["hot"]["0"]["share_of_look_ups"] < 1


def test_a_memory_is_moved_and_used_there(engram, tmp_path):
    moves = {
        "a": ("--tier", "hybrid", "--hot-rows", 20, "--hot-from", "text.txt", "--path", "rows"),
        "b": ("--tier", "mmap", "--resident-bytes", 1 << 20),
        "c": ("--tier", "host", "--dtype", "bfloat16"),
        "d": ("--tier", "mmap", "--dtype", "float8"),
        "e": ("--tier", "hybrid", "--hot-rows", 20, "--dtype", "int4", "--path", "more"),
        "f": ("--tier", "device", "--dtype", "int8", "--json"),
    }
    ids = torch.arange(2, 12).view(1, 10)
    base, tokenizer = load_model("base")
    seen = {}
    for name, options in moves.items():
        code, out, err = engram("place", "m", *options, "--out", name)
        assert code == 0, err
        memory = EngramModel.from_pretrained(base, name, tokenizer)
        table = memory.engrams["0"].table
        assert table.tier == options[1]
        with torch.no_grad():
            seen[name] = memory(input_ids=ids).logits
        memory.unload()
    assert torch.equal(seen["a"], seen["b"])
    assert f"loads with tier hybrid, path {tmp_path / 'rows'}, hot_rows 20\n" in engram("place", "a")[1]
    assert json.loads(engram("place", "b", "--json")[1])["loads_with"] == {"tier": "mmap", "resident_bytes": 1 << 20}
    assert json.loads(out)["moved"]["dtype_after"] == "int8"
    assert sorted(file.name for file in (tmp_path / "rows").iterdir()) == [
        ".engram.lock",
        "layer-0.rows",
        "layer-0.rows.form",
        "layer-0.rows.json",
        "layer-2.rows",
        "layer-2.rows.form",
        "layer-2.rows.json",
    ]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("nowhere",), 1, "no memory in nowhere"),
        (("m", "--tier", "tape", "--out", "x"), 2, "got 'tape', expected one of device, host, mmap, hybrid"),
        (("m", "--tier", "host"), 2, "got a tier without --out"),
        (("m", "--dtype", "int8"), 2, "got a format without --out"),
        (("m", "--resident-bytes", "4096"), 2, "got bytes without --out"),
        (("m", "--out", "x"), 2, "got a folder without --tier"),
        (("m", "--tier", "hybrid", "--out", "x"), 2, "expected a number of rows"),
        (("m", "--tier", "host", "--hot-from", "text.txt", "--hot-rows", "3", "--out", "x"), 2, "goes with --hot-rows"),
        (("m", "--hot-from", "none.txt", "--hot-rows", "3"), 2, "cannot read none.txt"),
        (
            ("m", "--tier", "host", "--hot-rows", "5", "--out", "x"),
            2,
            "got rows to keep hot and tier 'host', expected --tier hybrid",
        ),
        (("m", "--tier", "hybrid", "--hot-rows", "100000000", "--out", "x"), 2, "hot_rows: got 100,000,000, expected at most"),
        (("m", "--tier", "mmap", "--path", "m/rows", "--out", "x"), 2, "path: got m/rows, inside the memory that is read"),
        (("m", "--tier", "host", "--dtype", "int3", "--out", "x"), 2, "got 'int3'"),
        (("m", "--tier", "host", "--path", "r", "--out", "x"), 2, "expected None unless tier is 'mmap'"),
        (("m", "--tier", "host", "--out", "m"), 2, "expected another folder"),
    ],
)
def test_moves_that_cannot_be_get_one_line(engram, tmp_path, arguments, code, message):
    got, out, err = engram("place", *arguments)
    assert (got, out) == (code, ""), err
    assert message in " ".join(err.split())
    assert "Traceback" not in err
    assert not (tmp_path / "x").exists()
