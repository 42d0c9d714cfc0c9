import copy
from pathlib import Path

import numpy as np
import pytest

from engram import ConfigError, DataError
from engram.data.corpus import (
    CorpusRecipe,
    Document,
    DocumentStream,
    TextSource,
    build_corpus,
    held_out_standard_library,
    split_of,
)
from engram.data.packing import pack
from engram.data.recipe import FolderSource
from engram.evaluation.bits_per_byte import text_windows
from engram.testing import tiny_tokenizer

CORPUS = Path(__file__).parents[2] / "corpus"


def test_the_standard_library_is_split_by_file():
    recipe = CorpusRecipe(standard_library=True, texts=(TextSource("countries.txt", 3),), test_percent=1)
    corpus = build_corpus(recipe, CORPUS)
    files = [{doc.name.partition("#")[0] for doc in part} for part in (corpus.train, corpus.held_out)]
    assert not files[0] & files[1]
    assert 0.01 < len(files[1]) / len(files[0] | files[1]) < 0.06
    names = {doc.name for doc in corpus.held_out}
    assert {doc.name for doc in held_out_standard_library(recipe)} <= names
    assert all(doc.weight == 3 for doc in corpus.train if doc.name.startswith("countries"))
    assert not any(name.startswith("countries") for name in names)  # known by heart: never held out
    texts = [doc.text for doc in corpus.train + corpus.held_out]
    assert len(set(texts)) == len(texts)
    assert not any("site-packages" in doc.name for doc in corpus.train)


def test_bad_sources(tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "empty.txt").write_text("\n\n")
    for path, message in (("none.txt", "no file matches"), ("bad.txt", "not UTF-8"), ("empty.txt", "is empty")):
        with pytest.raises(DataError, match=message):
            build_corpus(CorpusRecipe(texts=(TextSource(path),)), tmp_path)
    with pytest.raises(ConfigError, match="at least one source"):
        CorpusRecipe()
    with pytest.raises(ConfigError, match=r"expected a whole number, 0\.\.100"):
        CorpusRecipe(standard_library=True, held_out_percent=101)


def test_the_largest_weight_of_a_text_counts(tmp_path):
    for name, content in {"a.txt": "fact\n<|doc|>\nother", "facts.txt": "fact\n<|doc|>\nfact two", "later.txt": "last"}.items():
        (tmp_path / name).write_text(content)
    texts = (TextSource("*.txt"), TextSource("facts.txt", 20), TextSource("f*.txt", 3))
    stream = DocumentStream(CorpusRecipe(texts=texts, held_out_percent=100), tmp_path)
    documents = list(stream)
    by_heart = [("facts.txt#0", 20), ("facts.txt#1", 20)]
    assert [(doc.name, doc.weight) for doc in documents] == [("a.txt#1", 1), ("later.txt#0", 1), *by_heart]
    assert stream.duplicates == 5
    assert [split_of(doc, stream.recipe) for doc in documents] == ["held_out", "held_out", "train", "train"]
    assert [(doc.name, doc.weight) for doc in build_corpus(stream.recipe, tmp_path).train] == by_heart


def test_a_text_by_heart_is_trained_on_whatever_else_has_its_name(tmp_path):
    for folder in "ab":
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "n.txt").write_text(f"text in {folder}")
    recipe = CorpusRecipe(texts=(TextSource("a/n.txt"), TextSource("b/n.txt", 5)), held_out_percent=100)
    corpus = build_corpus(recipe, tmp_path)
    assert [[doc.text for doc in side] for side in (corpus.train, corpus.held_out)] == [["text in b"], ["text in a"]]


def test_packing_is_exact_seeded_and_weighted():
    tokenizer = tiny_tokenizer()
    documents = [Document("a", "The memory"), Document("b", "rows and rows", weight=3)]
    one, two = pack(documents, tokenizer, 16, 40, seed=0), pack(documents, tokenizer, 16, 40, seed=0)
    assert len(one) == 40
    np.testing.assert_array_equal(one.stream, two.stream)
    assert not np.array_equal(one.stream, pack(documents, tokenizer, 16, 40, seed=1).stream)
    assert one[0]["input_ids"].shape == (16,)
    text = tokenizer.decode(one.stream)
    assert text.startswith("<|endoftext|>")
    assert abs(text.count("rows and rows") - 3 * text.count("The memory")) <= 4
    with pytest.raises(DataError, match="no documents"):
        pack([], tokenizer, 16, 1, 0)


def test_plain_texts_are_packed_like_documents():
    tokenizer, texts = tiny_tokenizer(), ["The memory", "rows and rows"]
    documents = [Document(str(number), text) for number, text in enumerate(texts)]
    expected = pack(documents, tokenizer, 16, 10, seed=0).stream
    np.testing.assert_array_equal(pack(texts, tokenizer, 16, 10, seed=0).stream, expected)
    np.testing.assert_array_equal(pack([documents[0], texts[1]], tokenizer, 16, 10, seed=0).stream, expected)
    for given, message in (("The memory", "got one text, expected a list"), ([b"rows"], "got bytes among the documents")):
        with pytest.raises(DataError, match=message):
            pack(given, tokenizer, 16, 10, seed=0)


def test_text_cannot_fake_the_start_of_a_packed_document():
    tokenizer = tiny_tokenizer()
    ids = pack([Document("a", "one <|endoftext|> two")], tokenizer, 8, 8, seed=0).stream
    starts = np.flatnonzero(ids == tokenizer.bos_token_id)
    assert tokenizer.decode(ids[starts[0] + 1 : starts[1]]) == "one <|endoftext|> two"
    bare = copy.deepcopy(tokenizer)
    bare.bos_token = bare.eos_token = None
    with pytest.raises(ConfigError, match="beginning- or end-of-text"):
        pack([Document("a", "text")], bare, 8, 8, seed=0)


def test_windows_cover_every_token_once():
    tokenizer = tiny_tokenizer()
    text = (CORPUS / "countries.txt").read_text()[:2000]
    windows = text_windows(tokenizer, [text], 50)
    assert all(w[0] == tokenizer.bos_token_id and len(w) <= 50 for w in windows)
    assert tokenizer.decode([i for w in windows for i in w[1:]]) == text


def test_windows_of_a_tokenizer_with_nothing_to_lead_them_are_refused():
    bare = copy.deepcopy(tiny_tokenizer())
    bare.bos_token = bare.eos_token = None
    with pytest.raises(ConfigError, match="beginning- or end-of-text"):
        text_windows(bare, ["text"], 8)


@pytest.mark.parametrize(
    ("texts", "changes", "words"),
    [
        (["some text"], {"blocks": 0}, "pack: got blocks=0, expected a whole number of at least 1"),
        (["some text"], {"seq_len": True}, "pack: got seq_len=True"),
        (["", " \n"], {}, "nothing but white space"),
        (["fine", "half \ud800"], {}, "text 1 holds .* half of a character"),
    ],
)
def test_what_cannot_be_packed_is_refused(texts, changes, words):
    with pytest.raises((ConfigError, DataError), match=words):
        pack(texts, tiny_tokenizer(), **{"seq_len": 8, "blocks": 2, "seed": 0, **changes})


def test_a_file_that_is_named_and_lies_in_a_folder_is_one_text(tmp_path):
    """Empty lines at its end stay in one case and not in the other; else its copies could stand on both sides of the split."""
    (tmp_path / "t").mkdir()
    for number in range(20):
        (tmp_path / "t" / f"{number}.txt").write_text(f"Text number {number} says that {number} is a number. " * 10 + "\n\n")
    corpus = build_corpus(
        CorpusRecipe(texts=(TextSource("t/*.txt"),), folders=(FolderSource("t"),), held_out_percent=30), tmp_path
    )
    held_out, train = ([doc.text.strip() for doc in side] for side in (corpus.held_out, corpus.train))
    assert len(held_out) + len(train) == 20
    assert held_out
    assert not set(held_out) & set(train)


def test_folders_behind_links_are_left_out_and_told(tmp_path):
    """They may lead in circles."""
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a.txt").write_text("some text " * 50)
    (tmp_path / "d" / "sub").symlink_to(tmp_path / "d")
    stream = DocumentStream(CorpusRecipe(folders=(FolderSource("d"),)), tmp_path)
    assert [document.name for document in stream] == ["d/a.txt"]
    assert dict(stream.skipped_names) == {"a link to a folder": ["d/sub"]}
