import json
import resource
from pathlib import Path

import pytest
import yaml

from engram.data.store import TokenStore
from engram.testing import tiny_tokenizer

from .test_cli import invoke

CORPUS = Path(__file__).parents[2] / "corpus"


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "texts").mkdir()
    for number, part in enumerate((CORPUS / "general_nature.txt").read_text().split("<|doc|>")[:60]):
        (tmp_path / "texts" / f"{number}.txt").write_text(part)
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({"corpus": {"texts": ["texts/*.txt"], "held_out_percent": 20}}))
    return file


def test_a_store_is_built_counted_and_used_again(monkeypatch, capsys, recipe, tmp_path):
    out, report = tmp_path / "store", tmp_path / "report.json"
    command = (
        "corpus",
        recipe,
        "--out",
        out,
        "--vocab-size",
        400,
        "--contamination",
        3,
        "--contamination",
        8,
        "--json",
        report,
    )
    code, printed, shown = invoke(monkeypatch, capsys, *command)
    assert code == 0, shown
    store = TokenStore(out)
    assert store.vocab_size == 400
    fields = json.loads(report.read_text())
    assert fields["counts"] == store.counts
    assert [entry["n"] for entry in fields["contamination"]] == [3, 8]
    assert fields["contamination"][0]["share"] > fields["contamination"][1]["share"]
    for word in ("train", "held_out", "prose", "duplicates left out: 0 exact", "held-out 3-grams"):
        assert word in printed
    assert f"{store.counts['train']['prose']['tokens']:,}" in printed
    assert "MB/s" in shown
    compression = fields["compression"]
    assert compression["ids"] == 400
    assert compression["reduction"] == 1 - compression["canonical_ids"] / 400
    assert f"400 token ids, {compression['canonical_ids']} canonical ones" in printed
    before = (out / "store.json").stat().st_mtime_ns
    assert invoke(monkeypatch, capsys, *command)[0] == 0
    assert (out / "store.json").stat().st_mtime_ns == before
    code, _, error = invoke(monkeypatch, capsys, *command[:5], 401)
    assert (code, error.splitlines()[-1].count("made with another tokenizer; choose another folder")) == (1, 1)


def test_a_given_tokenizer_and_the_bundled_one(monkeypatch, capsys, recipe, tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    code, printed, _ = invoke(
        monkeypatch, capsys, "corpus", recipe, "--out", tmp_path / "a", "--tokenizer", tmp_path / "tokenizer"
    )
    assert code == 0
    assert "13-grams" in printed
    assert TokenStore(tmp_path / "a").vocab_size == len(tiny_tokenizer())
    assert invoke(monkeypatch, capsys, "corpus", recipe, "--out", tmp_path / "b")[0] == 0
    assert TokenStore(tmp_path / "b").vocab_size == 6144


def last_line(text):
    return [line for line in text.splitlines() if line.strip()][-1]


@pytest.mark.parametrize(
    ("corpus", "options", "code", "message"),
    [
        ({"texts": ["none.txt"]}, [], 2, "no file matches 'none.txt'"),
        ({"texts": ["bad.txt"]}, [], 2, "bad.txt is not UTF-8"),
        ({"texts": ["empty.txt"]}, [], 2, "empty.txt is empty"),
        ({"folders": ["none"]}, [], 2, "is not a folder"),
        ({"folders": [{"path": ".", "suffixes": [".xyz"]}]}, [], 2, "ends in .xyz"),
        (
            {"texts": ["good.txt"], "held_out_percent": 100},
            [],
            2,
            "no documents to train on: 1 held out (held_out_percent: 100;",
        ),
        ({"folders": [{"path": ".", "suffixes": ["bad.txt", "empty.txt"]}]}, [], 2, "files left out: 1 not UTF-8 ("),
        ({"texts": ["good.txt"], "held_out_percent": 2.5}, [], 2, "held_out_percent: got 2.5, expected a whole number"),
        ({"texts": ["good.txt"], "test_percent": [1]}, [], 2, "test_percent: got [1], expected a whole number"),
        ({"texts": ["good.txt"], "near_duplicates": "x"}, [], 2, "near_duplicates: got 'x', expected a share"),
        ({"stdlib": True}, [], 2, "unknown key(s) stdlib"),
        (None, [], 2, "expected a mapping with a 'corpus' mapping"),
        ({"texts": ["good.txt"]}, ["--vocab-size", 100], 2, "vocab_size: got 100"),
        ({"texts": ["good.txt"]}, ["--tokenizer", "./none"], 1, "no such folder"),
        ({"texts": ["good.txt"]}, ["--tokenizer", "a", "--vocab-size", 300], 2, "exclude each other"),
        ({"texts": ["good.txt"]}, ["--contamination", 0], 2, "Invalid value for '--contamination'"),
        ({"texts": ["good.txt"]}, ["--json", "."], 2, "is a folder"),
    ],
)
def test_mistakes_give_one_line(monkeypatch, capsys, tmp_path, corpus, options, code, message):
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "good.txt").write_text("good text")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"corpus": corpus}))
    monkeypatch.chdir(tmp_path)
    got, _, error = invoke(monkeypatch, capsys, "corpus", "recipe.yaml", "--out", "store", *options)
    assert got == code, error
    assert message in " ".join(error.split())
    assert "Traceback" not in error
    assert not (tmp_path / "store").exists()
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".tmp"]


@pytest.mark.parametrize("limit", [3_000, 30_000])
def test_a_full_disk_is_one_line_and_leaves_nothing(monkeypatch, capsys, recipe, tmp_path, limit):
    """A limit on the size of files refuses writes as a full disk does; the small one already refuses the tokenizer's file."""
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    assert 3_000 < (tmp_path / "tokenizer" / "tokenizer.json").stat().st_size < 30_000
    (tmp_path / "texts" / "more.txt").write_text("some words " * 5000)
    command = ("corpus", recipe, "--out", tmp_path / "store", "--tokenizer", tmp_path / "tokenizer")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        code, _, error = invoke(monkeypatch, capsys, *command)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 1, error
    assert "cannot write the token store" in last_line(error)
    assert "File too large" in last_line(error)
    assert not (tmp_path / "store").exists()
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".tmp"]
    assert invoke(monkeypatch, capsys, *command)[0] == 0
