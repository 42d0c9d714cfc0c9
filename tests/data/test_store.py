import copy
import dataclasses
import errno
import json
import os
import pickle
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from tokenizers import processors

from engram import CheckpointError, ConfigError, DataError, FingerprintError
from engram.data.corpus import CorpusRecipe, TextSource, build_corpus
from engram.data.recipe import KINDS, parse_corpus
from engram.data.store import TokenStore, begin_token, build_store, tokenizer_digest
from engram.training.token_store import prepare_store
from tests.children import run_python


def text_of(store, tokenizer, document):
    return tokenizer.decode(store.ids(document)[1:])


def test_a_store_holds_the_documents_of_the_corpus(store, text_recipe, tokenizer, text_folder):
    corpus = build_corpus(text_recipe, text_folder)
    for split, documents in (("train", corpus.train), ("held_out", corpus.held_out)):
        chosen = store.split(split)
        assert [store.names[d] for d in chosen] == [doc.name for doc in documents]
        assert [text_of(store, tokenizer, d) for d in chosen] == [doc.text for doc in documents]
        assert [store.kind(d) for d in chosen] == [doc.kind for doc in documents]
        assert [store.documents["weight"][d] for d in chosen] == [doc.weight for doc in documents]
        assert [store.documents["bytes"][d] for d in chosen] == [len(doc.text.encode()) for doc in documents]
        for kind, sizes in store.counts[split].items():
            same = [doc for doc in documents if doc.kind == kind]
            tokens = sum(len(store.ids(d)) for d in chosen if store.kind(d) == kind)
            assert sizes == {"documents": len(same), "bytes": sum(len(d.text.encode()) for d in same), "tokens": tokens}
    files = [{store.names[d].partition("#")[0] for d in store.split(side)} for side in ("train", "held_out")]
    assert not files[0] & files[1]
    assert all(files)
    starts = store.documents["start"]
    assert (store.tokens[starts] == tokenizer.bos_token_id).all()
    assert (store.tokens == tokenizer.bos_token_id).sum() == len(store)  # "<|endoftext|>" in a text starts no document
    assert store.tokens.dtype == np.uint16
    assert not any(p.name.startswith(".") and p.suffix == ".tmp" for p in store.folder.parent.iterdir())


def test_the_same_store_is_opened_and_another_refused(store, text_recipe, tokenizer, text_folder, tmp_path):
    out = shutil.copytree(store.folder, tmp_path / "store")
    before = {file.name: file.stat().st_mtime_ns for file in out.iterdir()}
    calls = []
    again = build_store(text_recipe, tokenizer, text_folder, out, lambda done, total: calls.append(done))
    assert again.fingerprint == store.fingerprint
    assert not calls
    tokenizer(["a b", "c"], padding=True, truncation=True, max_length=2)  # leaves settings behind in the tokenizer
    assert build_store(text_recipe, again.load_tokenizer(), text_folder, out).fingerprint == store.fingerprint
    build_store(text_recipe, tokenizer, text_folder, out)
    with pytest.raises(FingerprintError, match="made with another recipe;"):
        build_store(dataclasses.replace(text_recipe, held_out_percent=41), tokenizer, text_folder, out)
    other = again.load_tokenizer()
    other.add_tokens(["abab"])
    with pytest.raises(FingerprintError, match="made with another tokenizer;"):
        build_store(text_recipe, other, text_folder, out)
    folder = shutil.copytree(text_folder, tmp_path / "texts")
    (folder / "t03.txt").write_text("changed")
    with pytest.raises(FingerprintError, match="made with other source files;"):
        build_store(text_recipe, tokenizer, folder, out)
    assert {file.name: file.stat().st_mtime_ns for file in out.iterdir()} == before
    description = json.loads((out / "store.json").read_text())
    assert description["installed"] == {}  # nothing of the Python installation is read here
    description["installed"] = {f"package{number}": "1.0" for number in range(7)}
    (out / "store.json").write_text(json.dumps(description))
    with pytest.raises(FingerprintError, match=r"other source files \(package0 1\.0, now absent; .*; 2 more\);"):
        build_store(text_recipe, tokenizer, folder, out)


def test_building_twice_gives_the_same_bytes(store, text_recipe, tokenizer, text_folder, tmp_path):
    again = build_store(text_recipe, tokenizer, text_folder, tmp_path / "new" / "store")
    for name in ("tokens.bin", "documents.npy", "names.jsonl", "store.json"):
        assert (again.folder / name).read_bytes() == (store.folder / name).read_bytes()


def test_stores_travel_to_workers_without_their_tokens(store):
    packed = pickle.dumps(store)
    assert len(packed) < 1000
    copy = pickle.loads(packed)
    np.testing.assert_array_equal(copy.tokens, store.tokens)


KILLED = """
import os, signal, sys
from engram.data.recipe import parse_corpus
from engram.data.store import build_store
from engram.testing import tiny_tokenizer
recipe = parse_corpus({"texts": ["t*.txt"]}, "recipe")
build_store(recipe, tiny_tokenizer(), sys.argv[1], sys.argv[2], lambda done, total: os.kill(os.getpid(), signal.SIGKILL))
"""


def test_a_killed_build_leaves_no_store_and_the_next_one_cleans_up(tokenizer, text_folder, tmp_path):
    out = tmp_path / "store"
    child = run_python("-c", KILLED, text_folder, out)
    assert child.returncode == -signal.SIGKILL
    assert not out.exists()
    assert [path for path in tmp_path.iterdir() if path.suffix == ".tmp"]
    with pytest.raises(CheckpointError, match="no token store"):
        TokenStore(out)
    build_store(CorpusRecipe(texts=(TextSource("t*.txt"),)), tokenizer, text_folder, out)
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".tmp"]


def test_interruption_and_changing_files_leave_nothing(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("some text")
    recipe, out = CorpusRecipe(texts=(TextSource("a.txt"), TextSource("a*.txt")), held_out_percent=0), tmp_path / "store"

    def interrupt(done, total):
        raise KeyboardInterrupt

    def change(done, total):
        (tmp_path / "a.txt").write_text("other text")

    with pytest.raises(KeyboardInterrupt):
        build_store(recipe, tokenizer, tmp_path, out, interrupt)
    many = CorpusRecipe(texts=(TextSource("b*.txt"),), held_out_percent=0)
    for number in range(130):  # three batches, so that one is read after the first was written
        (tmp_path / f"b{number:03}.txt").write_text(f"text {number}")
    with pytest.raises(DataError, match="files changed while they were read"):
        build_store(many, tokenizer, tmp_path, out, lambda done, total: (tmp_path / "b129.txt").write_text("other"))
    assert {p.name for p in tmp_path.iterdir() if not p.name.endswith(".txt")} <= {".store.lock"}
    change(0, 0)
    assert len(build_store(recipe, tokenizer, tmp_path, out)) == 1


def test_places_that_cannot_be_used(text_recipe, tokenizer, text_folder, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for out in (tmp_path / "full", tmp_path / "full" / "file"):
        with pytest.raises(CheckpointError, match="is not a token store"):
            build_store(text_recipe, tokenizer, text_folder, out)
    with pytest.raises(CheckpointError, match="cannot write"):
        build_store(text_recipe, tokenizer, text_folder, tmp_path / "full" / "file" / "store")
    with FileLock(tmp_path / ".busy.lock"), pytest.raises(CheckpointError, match="another process is building"):
        build_store(text_recipe, tokenizer, text_folder, tmp_path / "busy")
    nothing = CorpusRecipe(texts=(TextSource("t*.txt"),), held_out_percent=100)
    with pytest.raises(DataError, match="no documents to train on"):
        build_store(nothing, tokenizer, text_folder, tmp_path / "none")
    assert not (tmp_path / "none").exists()
    (tmp_path / "empty").mkdir()
    assert len(build_store(text_recipe, tokenizer, text_folder, tmp_path / "empty"))


def test_a_store_may_be_built_through_a_link(text_recipe, tokenizer, text_folder, tmp_path):
    (tmp_path / "disk" / "empty").mkdir(parents=True)
    for name in ("empty", "missing"):
        link = tmp_path / name
        link.symlink_to(tmp_path / "disk" / name)
        assert len(build_store(text_recipe, tokenizer, text_folder, link))
        assert link.is_symlink()
        assert TokenStore(tmp_path / "disk" / name).fingerprint == TokenStore(link).fingerprint
    assert {path.name for path in tmp_path.iterdir()} == {"disk", "empty", "missing"}


def test_a_mount_point_is_refused_before_the_work(text_recipe, tokenizer, text_folder, tmp_path, monkeypatch):
    out, rename, shown = tmp_path / "volume", os.rename, []
    out.mkdir()

    def as_of_a_mount_point(source, target, **options):
        if Path(source) == out:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        rename(source, target, **options)

    monkeypatch.setattr(os, "rename", as_of_a_mount_point)
    with pytest.raises(CheckpointError, match=r"a mount point.*choose a folder inside it"):
        build_store(text_recipe, tokenizer, text_folder, out, lambda *done: shown.append(done))
    assert not shown
    assert not list(out.iterdir())
    assert len(build_store(text_recipe, tokenizer, text_folder, out / "store"))


def damage_tokens(folder):
    os.truncate(folder / "tokens.bin", 100)


def damage_documents(folder):
    records = np.load(folder / "documents.npy")
    records["start"][3] += 1
    np.save(folder / "documents.npy", records)


def damage_kinds(folder):
    records = np.load(folder / "documents.npy")
    records["kind"][3] = len(KINDS)
    np.save(folder / "documents.npy", records)


def damage_pickle(folder):
    np.save(folder / "documents.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)


def damage_json(folder):
    (folder / "store.json").write_text("[]")


def damage_weight(folder):
    records = np.load(folder / "documents.npy")
    records["weight"][0] = 0
    np.save(folder / "documents.npy", records)


def damage_field(folder):
    fields = json.loads((folder / "store.json").read_text())
    del fields["begin_id"]
    (folder / "store.json").write_text(json.dumps(fields))


def damage_version(folder):
    fields = json.loads((folder / "store.json").read_text())
    fields["identity"]["format_version"] = 99
    (folder / "store.json").write_text(json.dumps(fields))


@pytest.mark.parametrize(
    "damage",
    [damage_tokens, damage_documents, damage_kinds, damage_pickle, damage_json, damage_weight, damage_field, damage_version],
    ids=lambda f: f.__name__,
)
def test_damaged_stores_are_refused(store, tmp_path, damage):
    folder = shutil.copytree(store.folder, tmp_path / "store")
    damage(folder)
    with pytest.raises(CheckpointError, match=r"is damaged|format version 99"):
        TokenStore(folder)


def test_names_and_splits_are_checked(store, tmp_path):
    folder = shutil.copytree(store.folder, tmp_path / "store")
    (folder / "names.jsonl").write_text('"a"\n')
    with pytest.raises(CheckpointError, match="has 1 names"):
        TokenStore(folder).names  # noqa: B018
    with pytest.raises(ConfigError, match="split: got 'test'"):
        store.split("test")


def test_a_tokenizer_is_trained_once(tmp_path, text_folder, text_recipe):
    shown = []
    store = prepare_store(text_recipe, text_folder, tmp_path / "s", 300, lambda what, *_: shown.append(what))
    assert store.vocab_size == 300
    assert set(shown) == {"tokenizer", "tokens"}
    assert store.load_tokenizer().bos_token_id == store.begin_id
    shown.clear()
    assert prepare_store(text_recipe, text_folder, tmp_path / "s", 300, lambda what, *_: shown.append(what)).fingerprint
    assert not shown
    with pytest.raises(FingerprintError, match="another tokenizer"):
        prepare_store(text_recipe, text_folder, tmp_path / "s", 290)
    with pytest.raises(ConfigError, match="at least 258"):
        prepare_store(text_recipe, text_folder, tmp_path / "s", 257)


def test_files_left_out_are_named(tmp_path, tokenizer, text_folder):
    folder = tmp_path / "mine"
    folder.mkdir()
    for number in range(7):
        (folder / f"short{number}.txt").write_text("short")
    (folder / "data.csv").write_text("1,2")
    (folder / "text.txt").write_text("A line of text that is long enough.\n" * 2)
    recipe = parse_corpus({"folders": ["mine"], "held_out_percent": 0}, "recipe")
    store = build_store(recipe, tokenizer, tmp_path, tmp_path / "store")
    names = ", ".join(f"mine/short{number}.txt" for number in range(5))
    assert store.left_out == ["1 of another suffix (mine/data.csv)", f"7 too short ({names}, ...)"]
    del store.description["skipped_names"]  # as in stores of earlier versions
    assert store.left_out == ["1 of another suffix", "7 too short"]
    assert build_store(parse_corpus({"texts": ["t*.txt"]}, "recipe"), tokenizer, text_folder, tmp_path / "all").left_out == []


def test_what_ends_and_begins_texts_for_others_is_no_other_tokenizer(tokenizer):
    """Special tokens are asked for by nobody here; one whose id is zero begins a document like any other."""
    other = copy.deepcopy(tokenizer)
    end = (other.eos_token, other.eos_token_id)
    other._tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {end[0]}", special_tokens=[end])
    assert tokenizer_digest(other) == tokenizer_digest(tokenizer)
    first, other_end = (other.convert_ids_to_tokens(number) for number in (0, 5))
    other.bos_token, other.eos_token = first, other_end
    assert (begin_token(other), other.eos_token_id) == (0, 5)


def test_a_store_that_was_opened_by_a_relative_path_is_read_from_any_directory(store, tmp_path, monkeypatch):
    monkeypatch.chdir(store.folder.parent)
    opened = TokenStore(store.folder.name)
    monkeypatch.chdir(tmp_path)
    assert opened.names == store.names
    assert pickle.loads(pickle.dumps(opened)).fingerprint == store.fingerprint
