"""Files of one document a line."""

import hashlib
import json

import pytest

from engram import DataError
from engram.data.corpus import DocumentStream, build_corpus, split_of
from engram.data.recipe import parse_corpus
from engram.data.store import build_store
from engram.data.texts import load_documents

STORIES = [f"Story {number}: the river ran past mill number {number * 7} of the valley." for number in range(200)]


def write(file, texts, key="text"):
    file.write_text("".join(json.dumps({"id": n, key: text}) + "\n" for n, text in enumerate(texts)))


def documents(fields, folder):
    return list(DocumentStream(parse_corpus(fields, "recipe"), folder))


@pytest.mark.parametrize("source", [{"texts": ["text/stories.jsonl"]}, {"folders": [{"path": "text", "suffixes": [".jsonl"]}]}])
def test_every_line_is_a_document(tmp_path, source):
    (tmp_path / "text").mkdir()
    write(tmp_path / "text" / "stories.jsonl", STORIES)
    found = documents(source, tmp_path)
    assert [doc.text for doc in found] == STORIES
    prefix = "stories.jsonl" if "texts" in source else "text/stories.jsonl"
    assert [doc.name for doc in found] == [f"{prefix}:{line}" for line in range(1, 201)]
    assert {doc.kind for doc in found} == {"prose"}


def test_records_are_held_out_one_by_one_by_their_text(tmp_path):
    write(tmp_path / "s.jsonl", STORIES)
    recipe = parse_corpus({"texts": ["*.jsonl"], "held_out_percent": 10}, "recipe")
    corpus = build_corpus(recipe, tmp_path)
    held_out = {doc.text for doc in corpus.held_out}
    assert 0.04 < len(held_out) / len(STORIES) < 0.17
    write(tmp_path / "s.jsonl", ["Put before all others.", *reversed(STORIES)])
    again = {doc.text for doc in DocumentStream(recipe, tmp_path) if split_of(doc, recipe) == "held_out"}
    assert again & set(STORIES) == held_out
    by_heart = parse_corpus({"texts": [{"path": "s.jsonl", "weight": 4}], "held_out_percent": 100}, "recipe")
    assert {doc.weight for doc in build_corpus(by_heart, tmp_path).train} == {4}


def test_another_key_and_records_of_any_form_in_a_folder(tmp_path):
    (tmp_path / "mine").mkdir()
    long = "x" * 5000  # a file would be left out for its long lines, or for being large
    write(tmp_path / "mine" / "a#b.ndjson", ["ok", long, "a\r\nb\n", " \n", "\ud800 half"], key="content")
    (tmp_path / "mine" / "empty.ndjson").write_text("\n")
    (tmp_path / "mine" / "file.txt").write_text("A text file that is long enough to be taken.")
    folder = {"path": "mine", "suffixes": [".txt", ".ndjson"], "field": "content", "max_bytes": 1000, "kind": "documentation"}
    stream = DocumentStream(parse_corpus({"folders": [folder]}, "recipe"), tmp_path)
    found = {doc.name: doc.text for doc in stream}
    assert {name: text for name, text in found.items() if name != "mine/file.txt"} == {
        "mine/a%23b.ndjson:1": "ok",
        "mine/a%23b.ndjson:2": long,
        "mine/a%23b.ndjson:3": "a\nb",
        "mine/a%23b.ndjson:5": "? half",
    }
    assert {doc.kind for doc in stream} == {"documentation"}
    assert stream.skipped_names == {"too short": ["mine/empty.ndjson"]}
    texts = documents({"texts": [{"path": "mine/a*", "field": "content"}]}, tmp_path)
    assert [doc.text for doc in texts] == ["ok", long, "a\nb", "? half"]


@pytest.mark.parametrize("source", ["texts", "folders"])
@pytest.mark.parametrize(
    ("line", "got"),
    [
        ('{"text": "no end', "no JSON"),
        ("[" * 100_000, "no JSON"),
        ('["a list"]', "no object but list"),
        ('{"id": 3, "content": "words"}', "an object with the keys 'id', 'content'"),
        ("{}", "an object without keys"),
        ('{"text": ["a"]}', "no text but list under 'text'"),
    ],
    ids=["cut", "deep", "list", "another key", "no key", "no text"],
)
def test_a_wrong_line_is_one_error_with_its_number(tmp_path, source, line, got):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "s.jsonl").write_text('{"text": "fine"}\n\n' + line + "\n")
    fields = {"texts": ["mine/s.jsonl"]} if source == "texts" else {"folders": [{"path": "mine", "suffixes": [".jsonl"]}]}
    with pytest.raises(DataError) as error:
        documents(fields, tmp_path)
    told = str(error.value)
    assert told.startswith(
        f"corpus: {tmp_path / 'mine' / 's.jsonl'}, line 3: got {got}, expected an object with text under 'text'"
    )
    assert told.endswith("mend the line, or name another key by 'field' in the recipe.")
    assert "\n" not in told


def test_a_key_for_files_without_records_is_refused(tmp_path):
    (tmp_path / "a.json").write_text('{"content": "text"}')
    (tmp_path / "e.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(
        DataError, match=r"got field 'content' for .*a\.json, expected a file whose name ends in \.jsonl or \.ndjson"
    ):
        documents({"texts": [{"path": "a.json", "field": "content"}]}, tmp_path)
    with pytest.raises(DataError, match=r"e\.jsonl is empty"):
        documents({"texts": ["e.jsonl"]}, tmp_path)


def test_stores_of_other_text_are_what_they_were_and_those_of_records_are_not_taken_for_older_ones(tmp_path, tokenizer):
    def digest(*files):
        whole = hashlib.sha256()
        for name, content in files:
            whole.update(hashlib.sha256(name.encode()).digest() + hashlib.sha256(content).digest())
        return whole.hexdigest()

    (tmp_path / "a.txt").write_text("text of a")
    write(tmp_path / "b.jsonl", STORIES[:5])
    plain = build_store(parse_corpus({"texts": ["a.txt"]}, "recipe"), tokenizer, tmp_path, tmp_path / "plain")
    assert plain.description["identity"]["source_files"]["sha256"] == digest(("a.txt", b"text of a"))
    assert plain.description["identity"]["recipe"]["texts"] == [{"path": "a.txt", "weight": 1}]
    records = build_store(parse_corpus({"texts": ["b.jsonl"]}, "recipe"), tokenizer, tmp_path, tmp_path / "records")
    older = digest(("b.jsonl", (tmp_path / "b.jsonl").read_bytes()))
    assert records.description["identity"]["source_files"]["sha256"] != older
    recipe = parse_corpus({"texts": [{"path": "b.jsonl", "field": "content"}]}, "recipe")
    assert recipe.to_dict()["texts"] == [{"path": "b.jsonl", "weight": 1, "field": "content"}]
    assert parse_corpus(recipe.to_dict(), "again") == recipe


def test_texts_to_measure_on_may_be_records(tmp_path):
    write(tmp_path / "s.jsonl", STORIES[:3])
    assert load_documents(tmp_path / "s.jsonl") == {"s": STORIES[:3]}
    write(tmp_path / "s.jsonl", STORIES[:3], key="content")
    with pytest.raises(DataError, match=r"s\.jsonl, line 1: got an object with the keys 'id', 'content'.*; mend the line\.$"):
        load_documents(tmp_path / "s.jsonl")
