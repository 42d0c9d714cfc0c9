"""Small texts and a sample of them."""

from engram.analysis import sample_texts
from engram.testing import tiny_tokenizer

TEXTS = {
    "prose": [
        "The memory is addressed by the last tokens of the text. The memory, the memory!",
        "Déjà vu: the text is addressed by the tokens.",
        "Paris is the last.",
    ],
    "code": ["def lookup(self, ids):\n    return self.table[ids]  # rows\n", "self.table[ids] = rows 0123456789\n" * 3],
}


def make_sample(tokens=400, length=32):
    return sample_texts(tiny_tokenizer(), TEXTS, tokens, length)
