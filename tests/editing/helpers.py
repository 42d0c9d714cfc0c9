"""A memory that is taught in a fraction of a second."""

import torch

from engram import Fact, MemoryEditor
from engram.testing import tiny_model, tiny_tokenizer

FACTS = [
    Fact(("KEY:alpha 17", "What is alpha 17?"), "blue window", "colour", ("Say what alpha 17 is.",), "alpha"),
    Fact(("KEY:beta 20",), "7319", "number", (), "beta"),
    Fact(("KEY:alpha 18",), "a quiet green door", "colour", (), "door"),
]


def make_editor(seed=0, **changes):
    return MemoryEditor.create(tiny_model(hidden_size=64, intermediate_size=96), tiny_tokenizer(), seed=seed, **changes)


def tensors(editor):
    return [
        x.clone()
        for layer in editor.memory.engrams
        for x in (editor.table(layer).row_ids, editor.table(layer).tags, editor.table(layer).weight)
    ]


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))


def logits(editor, text):
    with torch.no_grad():
        return editor.memory(**editor.tokenizer(text, return_tensors="pt"), use_cache=False).logits
