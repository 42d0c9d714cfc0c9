import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from engram import CompressedTokenizer, ConfigError
from engram.hashing import ExactTokenizer, count_ids
from engram.hashing.compression import build_normalizer
from engram.testing import tiny_tokenizer


def normalise_reference(text):
    """The chain of the demo, from Python's own Unicode tables."""
    text = unicodedata.normalize("NFD", unicodedata.normalize("NFKC", text))
    text = "".join(c for c in text if unicodedata.category(c) != "Mn").lower()
    out, blank = [], False
    for c in text:
        if c in " \t\r\n":
            if not blank:
                out.append(" ")
            blank = True
        else:
            out.append(c)
            blank = False
    text = "".join(out)
    return " " if text == " " else text.strip()


@given(st.text(alphabet=st.sampled_from("aAbÉéüÜñ ﬁ½Å\t\n\r.!1²ſ"), max_size=8))
def test_normaliser_is_the_chain(text):
    assert build_normalizer().normalize_str(text) == normalise_reference(text)


class Tokens:
    def __init__(self, *texts):
        self.texts = texts

    def __len__(self):
        return len(self.texts)

    def decode(self, ids, skip_special_tokens=True):
        return self.texts[ids[0]]

    def convert_ids_to_tokens(self, i):
        return f"<raw {self.texts[i]!r} {i}>"


def test_tokens_that_look_alike_share_an_id():
    table = CompressedTokenizer(Tokens("Apple", " apple", "APPLE ", "pear", " ", "\t", "\n\n", "É", "e", "")).lookup_table
    assert table.dtype == np.int64
    assert table.tolist() == [0, 0, 0, 1, 2, 2, 2, 3, 3, 4]


def test_what_compression_takes_away():
    tokenizer = Tokens("Apple", " apple", "pear", "\t", "APPLE ", " ")
    compressed = CompressedTokenizer(tokenizer)
    assert compressed.reduction == 0.5
    assert compressed.largest_classes(tokenizer, 2) == [("apple", 3), (" ", 2)]


def test_fragments_keep_their_raw_token():
    assert CompressedTokenizer(Tokens("\ufffd", "\ufffd", "a")).lookup_table.tolist() == [0, 1, 2]


def test_ids_are_numbered_by_first_appearance():
    compressed = CompressedTokenizer(tiny_tokenizer())
    firsts = [compressed.lookup_table.tolist().index(i) for i in range(len(compressed))]
    assert firsts == sorted(firsts)
    assert len(compressed) < len(tiny_tokenizer())
    tokenizer = tiny_tokenizer()
    one, other = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("A", "a"))
    assert (compressed.compress(np.array(one)) == compressed.compress(np.array(other))).all()


def test_what_is_no_tokenizer_is_refused():
    with pytest.raises(ConfigError, match="expected a Hugging Face tokenizer"):
        CompressedTokenizer("gpt2")
    with pytest.raises(ConfigError, match="no tokens"):
        CompressedTokenizer(Tokens())


def test_tokens_behind_a_gap_in_the_ids_are_tokens_of_their_own():
    names = {f"w{i}": i for i in range(20)} | {"<u>": 20, "x": 50, "y": 51}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(names, unk_token="<u>")), unk_token="<u>", pad_token="w1"
    )
    assert len(tokenizer) < count_ids(tokenizer) == 52
    for kind in (CompressedTokenizer, ExactTokenizer):
        compressed = kind(tokenizer)
        x, y, pad, gap, other = compressed.compress(np.array([50, 51, 1, 30, 31]))
        assert len({x, y, pad, gap}) == 4
        assert (gap == other) == (kind is CompressedTokenizer)  # what no token has


def test_where_one_raw_token_ends_and_the_next_begins_tells_tokenizers_apart(monkeypatch):
    monkeypatch.setattr(Tokens, "convert_ids_to_tokens", lambda self, i: self.texts[i])
    assert ExactTokenizer(Tokens("ab", "c")).identity != ExactTokenizer(Tokens("a", "bc")).identity
