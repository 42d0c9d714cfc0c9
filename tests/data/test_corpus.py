from pathlib import Path

import numpy as np
import pytest

from engram import ConfigError, DataError
from engram.data.corpus import CorpusRecipe, Document, TextSource, build_corpus, held_out_standard_library
from engram.data.packing import pack
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
    with pytest.raises(ConfigError, match=r"expected 0\.\.100"):
        CorpusRecipe(standard_library=True, held_out_percent=101)


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


def test_windows_cover_every_token_once():
    tokenizer = tiny_tokenizer()
    text = (CORPUS / "countries.txt").read_text()[:2000]
    windows = text_windows(tokenizer, [text], 50)
    assert all(w[0] == tokenizer.bos_token_id and len(w) <= 50 for w in windows)
    assert tokenizer.decode([i for w in windows for i in w[1:]]) == text
