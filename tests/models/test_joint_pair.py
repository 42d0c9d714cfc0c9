"""The pair in models/joint: what results/bundle.json says of it holds on a part of the text."""

from pathlib import Path

import pytest

from engram import EngramModel, load_bundled
from engram.data.corpus import held_out_standard_library
from engram.evaluation.bits_per_byte import bits_per_byte
from engram.models import load_model

PAIR = Path(__file__).parents[2] / "models" / "joint"


@pytest.fixture(scope="module")
def pair():
    model, tokenizer = load_model(str(PAIR / "model"))
    return EngramModel.from_pretrained(model, PAIR / "memory", tokenizer), tokenizer


def test_it_is_small_enough_to_ship():
    assert sum(file.stat().st_size for file in PAIR.rglob("*") if file.is_file()) < 24e6


def test_it_predicts_better_with_the_memory_and_without_than_the_bundled_model(pair):
    memory, tokenizer = pair
    texts = [doc.text[:3000] for doc in held_out_standard_library()[::4]]
    on = bits_per_byte(memory, tokenizer, texts)
    with memory.disable_engram():
        off = bits_per_byte(memory, tokenizer, texts)
    bundled, bundled_tokenizer = load_bundled()
    assert on < off < bits_per_byte(bundled, bundled_tokenizer, texts) - 0.05
