import json

import numpy as np
import pytest

from engram.analysis import sample_texts
from engram.analysis.intervals import as_interval, document_mean, document_statistic
from engram.analysis.sample import iter_batches
from engram.data.recipe import parse_corpus
from engram.data.store import build_store
from engram.data.texts import held_out_texts, load_documents, standard_texts
from engram.errors import DataError
from engram.testing import tiny_tokenizer
from tests.analysis.helpers import TEXTS, make_sample


def test_all_of_a_short_text_is_read():
    sample, tokenizer = make_sample(tokens=10_000, length=16), tiny_tokenizer()
    assert sample.complete
    for number, text in enumerate(text for texts in TEXTS.values() for text in texts):
        ids = [i for window in sample.windows if window.document == number for i in window.ids[1:]]
        whole = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids == whole
    assert max(len(window.ids) for window in sample.windows) == 16
    assert sum(kind["tokens"] for kind in sample.to_dict()["kinds"].values()) == sample.tokens


def test_kinds_get_equal_shares_and_beginnings_come_first():
    sample = sample_texts(tiny_tokenizer(), {"long": ["the memory " * 500], "short": ["the text"] * 50}, tokens=200, length=32)
    assert not sample.complete
    shares = {kind: entry["tokens"] for kind, entry in sample.to_dict()["kinds"].items()}
    assert abs(shares["long"] - shares["short"]) <= 32
    assert 200 <= sample.tokens < 232
    assert len([w for w in sample.windows if w.kind == "short"]) == len(
        {w.document for w in sample.windows if w.kind == "short"}
    )


def test_batches_hold_every_window_once():
    sample, done = make_sample(), []
    batches = list(iter_batches(sample, 1 << 20, done.append))
    assert len(batches) > 1
    assert sorted(place for batch in batches for place in batch.places) == list(range(len(sample.windows)))
    for batch in batches:
        for row, place in enumerate(batch.places):
            assert tuple(batch.ids[row][batch.mask[row].bool()].tolist()) == sample.windows[place].ids
    assert sum(done) == sample.tokens


def test_text_without_tokens_is_refused():
    with pytest.raises(DataError, match="no window of two tokens"):
        sample_texts(tiny_tokenizer(), {"none": [""]}, 100)


def test_intervals_shrink_with_documents_and_hold_the_mean():
    random = np.random.default_rng(0)
    counts = np.full(400, 10)
    sums = random.normal(2.0, 1.0, size=400) * 10
    wide, narrow = document_mean(sums[:25], counts[:25]), document_mean(sums, counts)
    assert narrow["mean"] == pytest.approx(sums.sum() / 4000)
    assert narrow["low"] < narrow["mean"] < narrow["high"]
    # The standard error of a mean of 400 documents with spread 1 is 0.05.
    assert narrow["high"] - narrow["low"] == pytest.approx(4 * 0.05, rel=0.15)
    assert wide["high"] - wide["low"] > 2.5 * (narrow["high"] - narrow["low"])
    assert document_mean(sums[:1], counts[:1]) == {"mean": sums[0] / 10, "low": None, "high": None}


def test_documents_are_drawn_whole():
    """Two documents of one value each: every drawing is one, the other or both."""
    value, low, high = document_statistic(np.array([[0.0, 10], [30.0, 10]]), lambda t: t[:, 0] / t[:, 1])
    assert (value, low, high) == (1.5, 0.0, 3.0)


def test_documents_from_files(tmp_path):
    (tmp_path / "a.txt").write_text("one\n<|doc|>\ntwo\nlines\n<|doc|>\n\n")
    assert load_documents(tmp_path / "a.txt") == {"a": ["one", "two\nlines"]}
    (tmp_path / "b.yaml").write_text("x: [one]\ny: [two]")
    assert load_documents(tmp_path / "b.yaml") == {"x": ["one"], "y": ["two"]}
    (tmp_path / "c.txt").write_text("\n")
    (tmp_path / "d.txt").write_bytes(b"\xff\xfe")
    for name, message in (("c.txt", "empty"), ("d.txt", "cannot read"), ("e.txt", "cannot read")):
        with pytest.raises(DataError, match=message):
            load_documents(tmp_path / name)


def test_held_out_texts_of_a_store_are_its_documents_and_no_more_than_are_read(tmp_path):
    tokenizer = tiny_tokenizer()
    texts = [f"Text {number}: déjà vu, the rows of <|endoftext|> table {number}." for number in range(60)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    store = build_store(parse_corpus({"texts": ["a.jsonl"], "held_out_percent": 50}, "r"), tokenizer, tmp_path, tmp_path / "s")
    everything = held_out_texts(store, 1 << 30, 32)
    assert set(everything) == {"prose"}
    assert len(everything["prose"]) == len(store.split("held_out")) > 10
    assert set(everything["prose"]) < set(texts)
    few = held_out_texts(store, 100, 8)["prose"]
    assert few == everything["prose"][: len(few)]
    assert 100 / 8 <= len(few) <= 100 / 8 + 2
    for tokens in (50, 100):
        samples = [sample_texts(tokenizer, {"prose": part}, tokens, 8) for part in (few, everything["prose"])]
        assert samples[0] == samples[1]


def test_standard_texts_have_kinds_and_no_text_twice():
    texts = standard_texts()
    assert set(texts) == {"code", "docstrings", "manual", "prose", "story", "facts"}
    assert "The capital of France is Paris." in texts["facts"]
    flat = [text for kind in texts.values() for text in kind]
    assert len(flat) == len(set(flat))


def test_a_ratio_to_nothing_has_no_value():
    value, low, high = document_statistic(np.array([[1.0, 0.0], [1.0, 0.0]]), lambda t: t[:, 0] / t[:, 1])
    assert as_interval("mean", value, low, high) == {"mean": None, "low": None, "high": None}
    value, low, high = document_statistic(np.array([[1.0, 0.0], [1.0, 2.0]]), lambda t: t[:, 0] / t[:, 1])
    assert as_interval("mean", value, low, high) == {"mean": 1.0, "low": None, "high": None}
