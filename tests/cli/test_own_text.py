"""Text of the user's own from folder to picture: what is read, what is left out, what is measured, what is looked at."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import yaml

from engram.data.recipe import CorpusRecipe, FolderSource, TextSource
from engram.data.store import TokenStore
from engram.data.texts import load_documents
from engram.experiments import read_point
from tests.cli.test_cli import invoke

ROOT = Path(__file__).parents[2]
BACKBONE = {"architecture": "llama", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 1, "head_dim": 16}
RUN = {
    "backbone": {**BACKBONE, "intermediate_size": 32},
    "engram": {"engram_vocab_size": 100, "n_embed_per_ngram": 4, "n_head_per_ngram": 1, "layer_ids": [1]},
    "tokens": 512,
    "batch_size": 4,
    "bf16": False,
}
DATA = {"vocab_size": 300, "seq_len": 32, "held_out_tokens": 4000}


def sentence(number):
    return f"The river of valley {number} ran past {number * 3} mills, and nobody counted its stones in winter {number * 7}."


@pytest.fixture
def mine(tmp_path):
    """A folder as a user has it: texts, a file of records, and what cannot be used."""
    folder = tmp_path / "mine"
    folder.mkdir()
    for number in range(40):
        (folder / f"note{number:02}.md").write_text(f"# Note {number}\n\n{sentence(number)}\n")
    (folder / "stories.jsonl").write_text("".join(json.dumps({"text": sentence(n)}) + "\n" for n in range(100, 160)))
    (folder / "table.xlsx").write_bytes(b"PK")
    (folder / "stub.md").write_text("short")
    return folder


def write_run(folder, corpus, **data):
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump({**RUN, "data": {**DATA, "held_out_by": "file", **data, "corpus": corpus}}))
    return file


CORPUS = {"folders": [{"path": "mine", "suffixes": [".md", ".jsonl"]}], "held_out_percent": 30}
LEFT_OUT = "1 of another suffix (mine/table.xlsx), 1 too short (mine/stub.md)"


def test_corpus_names_what_it_leaves_out(monkeypatch, capsys, mine, tmp_path):
    recipe = write_run(tmp_path, CORPUS)  # of a run: its corpus is found there
    options = ("--vocab-size", 300, "--json", tmp_path / "corpus.json")
    code, out, err = invoke(monkeypatch, capsys, "corpus", recipe, "--out", tmp_path / "store", *options)
    assert code == 0, err
    assert f"files left out: {LEFT_OUT}" in out
    told = json.loads((tmp_path / "corpus.json").read_text())
    assert told["skipped_names"] == {"of another suffix": ["mine/table.xlsx"], "too short": ["mine/stub.md"]}
    store = TokenStore(tmp_path / "store")
    assert len(store) == 100
    assert {name.split(":")[0] for name in store.names if "jsonl" in name} == {"mine/stories.jsonl"}


def test_train_says_what_it_leaves_out_and_look_reads_what_the_run_held_out(monkeypatch, capsys, caplog, mine, tmp_path):
    run = tmp_path / "run"
    code, _, err = invoke(monkeypatch, capsys, "train", write_run(tmp_path, CORPUS), "--out", run)
    assert code == 0, err
    assert f"files left out of the text: {LEFT_OUT}" in caplog.text
    assert "held-out text" not in caplog.text  # there is enough
    composition = json.loads((run / "result.json").read_text())["held_out_text"]
    assert min(half["files"] for half in composition.values()) >= 5
    options = ("--what", "gates,gains", "--tokens", 200, "--row-tokens", 200, "--length", 32, "--out", tmp_path / "look")
    store, results = TokenStore(run / "data"), []
    for looked_at in ([run], [run / "memory"], ["--model", run], [run, "--texts", run / "data"]):
        code, out, err = invoke(monkeypatch, capsys, "look", *looked_at, *options)
        assert code == 0, err
        assert f"tokens of held-out text of {run / 'data'}" in out
        results.append(json.loads((tmp_path / "look" / "look.json").read_text()))
    assert all(result["gates"] == results[0]["gates"] for result in results)
    assert results[0]["texts"] == f"held-out text of {run / 'data'}"
    assert list(results[0]["text"]["kinds"]) == ["prose"]
    shown = "".join(token["token"] for token in results[0]["gates"]["texts"][0]["tokens"])
    tokenizer = store.load_tokenizer()
    assert any(shown.strip()[:20] in tokenizer.decode(store.ids(document)) for document in store.split("held_out"))
    (tmp_path / "other.txt").write_text("Other text that nobody trained on at all.")
    code, out, err = invoke(monkeypatch, capsys, "look", run, "--texts", tmp_path / "other.txt", *options)
    assert (code, "tokens of other.txt" in out) == (0, True), err
    assert json.loads((tmp_path / "look" / "look.json").read_text())["texts"] == "other.txt"


def test_a_run_on_the_standard_library_is_looked_at_with_the_standard_texts(monkeypatch, capsys, mine, tmp_path):
    run = tmp_path / "run"
    assert invoke(monkeypatch, capsys, "train", write_run(tmp_path, CORPUS), "--out", run)[0] == 0
    file = run / "data" / "store.json"
    fields = json.loads(file.read_text())
    fields["identity"]["recipe"]["standard_library"] = True
    file.write_text(json.dumps(fields))
    options = ("--what", "gains", "--tokens", 200, "--row-tokens", 200, "--length", 32, "--out", tmp_path / "look")
    code, out, err = invoke(monkeypatch, capsys, "look", run, *options)
    assert (code, "tokens of standard texts" in out) == (0, True), err
    assert json.loads((tmp_path / "look" / "look.json").read_text())["texts"] == "standard texts"


@pytest.mark.parametrize(
    ("corpus", "data", "words"),
    [
        (
            {"texts": ["mine/note0*.md", "long.md"], "held_out_percent": 40},
            {"held_out_by": "document"},
            ["% of the bytes in", "set data.held_out_by: file, raise corpus.held_out_percent (now 40)", "tokens of 2 files"],
        ),
        (
            CORPUS,
            {"held_out_tokens": 64},
            ["validation: ", "raise corpus.held_out_percent (now 30) or data.held_out_tokens (now 64)"],
        ),
    ],
    ids=["few files", "small budget"],
)
def test_held_out_text_of_few_files_is_warned_of(caplog, mine, tmp_path, corpus, data, words):
    from engram.experiments import prepare_data

    (tmp_path / "long.md").write_text(" ".join(map(sentence, range(300, 330))))
    prepare_data(read_point(write_run(tmp_path, corpus, **data)).data, tmp_path, tmp_path / "data")
    assert "losses on so little held-out text say little about other text" in caplog.text
    for each in words:
        assert each in caplog.text


def test_text_passed_over_for_its_size_is_told_where_it_is_most_of_it(caplog, mine, tmp_path):
    from engram.experiments import prepare_data

    for number in range(30):
        (mine / f"book{number}.md").write_text(" ".join(map(sentence, range(number * 100, number * 100 + 80))))
    prepare_data(read_point(write_run(tmp_path, CORPUS, held_out_tokens=8000)).data, tmp_path, tmp_path / "data")
    assert re.search(r"and \d+ larger documents of [\d,]+ tokens passed over", caplog.text)


def test_the_guide_lists_every_key_of_a_corpus():
    guide = (ROOT / "docs" / "guides.md").read_text()
    for cls in (CorpusRecipe, TextSource, FolderSource):
        for field in dataclasses.fields(cls):
            assert re.search(rf"^\s*\|? *`{field.name}`", guide, re.MULTILINE), f"{cls.__name__}.{field.name}"


def test_records_are_texts_to_look_at(mine):
    assert load_documents(mine / "stories.jsonl")["stories"][0] == sentence(100)
