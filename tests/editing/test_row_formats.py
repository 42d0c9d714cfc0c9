"""Taught memories whose rows are stored in every format: read, taught more, forgotten, explained, saved and united."""

import pytest
import torch

from engram import Fact, MemoryEditor, TableError, load_bundled, load_facts
from engram.data.corpus import held_out_standard_library
from engram.data.long_range import after_distraction
from engram.editing import diff_memories, merge_memories
from engram.evaluation import check_facts
from engram.models.bundled_files import BUNDLED_MODEL
from engram.tables import FORMATS, StoredRows, VerifiedTable
from engram.testing import tiny_model, tiny_tokenizer
from tests.editing.helpers import FACTS, make_editor

EXTRA = [Fact(("KEY:gamma 4",), "ninety nine", "number", (), "gamma"), Fact(("KEY:delta 5",), "low tide", "sea", (), "delta")]


def bits(editor):
    return [
        x.clone()
        for layer in editor.memory.engrams
        for x in vars(editor.table(layer).stored).values()
        if isinstance(x, torch.Tensor)
    ]


def same_bits(a, b):
    return len(a) == len(b) and all(torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in zip(a, b))


def convert(editor, form):
    for engram in editor.memory.engrams.values():
        home = engram.multi_head_embedding
        table = VerifiedTable(home.embedding.rows, home.embedding.dim, form)
        table.stored = home.embedding.stored
        home.embedding = table


@pytest.fixture(scope="module")
def knowing():
    """The bundled model with 31 facts of its six categories, in float32 rows; the facts; and its tables."""
    model, tokenizer = load_bundled()
    facts = load_facts(BUNDLED_MODEL.parent / "facts.yaml")[::12]
    editor = MemoryEditor.create(model, tokenizer, dtype="float32")
    assert not editor.teach(facts).not_exact
    return editor, facts, editor.holdings.rows()


@pytest.mark.parametrize("form", ["int8", "float8", "int4"])
def test_facts_survive_in_fewer_bits_and_behind_other_text(knowing, form):
    editor, facts, rows = knowing
    convert(editor, "float32")
    editor.holdings.put_back(rows)
    convert(editor, form)
    assert all(editor.verify().values())  # 4 bits too, on these facts; see the lab notes for its margins
    few = [Fact(fact.prompts[:1], fact.answer, fact.category, (), fact.id) for fact in facts[::6]]
    asked = after_distraction(editor.tokenizer, few, [doc.text for doc in held_out_standard_library()], 400)
    assert all(answer.exact for answer in check_facts(editor.memory, editor.tokenizer, asked))


@pytest.mark.parametrize("form", ["bfloat16", "int8", "float8", "int4"])
def test_more_is_taught_and_forgotten_bit_for_bit(form, tmp_path):
    editor = make_editor(dtype=form)
    assert not editor.teach(FACTS).not_exact
    before = bits(editor)
    assert not editor.teach(EXTRA).not_exact
    held = editor.table("2").stored
    kept = held.select(torch.isin(held.row_ids, before[0]))
    # Rows written earlier were not touched.
    assert same_bits([x for x in vars(kept).values() if isinstance(x, torch.Tensor)], before)
    assert all(editor.verify().values())
    assert list(editor.why("KEY:gamma 4").facts) == ["gamma"]
    editor.save(tmp_path)
    assert editor.memory.table_config.dtype == form
    again = MemoryEditor.load(tiny_model(hidden_size=64, intermediate_size=96), tmp_path, tiny_tokenizer())
    assert again.memory.table_config.dtype == form
    assert same_bits(bits(again), bits(editor))
    again.forget(["gamma", "delta"])
    assert same_bits(bits(again), before)
    with again.without(["alpha"]):
        pass
    assert same_bits(bits(again), before)
    # Stored bits are no floating point weights.
    again.memory.to(torch.bfloat16 if FORMATS[form].quantised else getattr(torch, form))
    assert same_bits(bits(again), before)


def test_memories_of_two_formats_are_compared_and_united(tmp_path):
    for name, form, facts in (("a", "int8", FACTS), ("b", "bfloat16", [FACTS[0], *EXTRA])):
        editor = make_editor(dtype=form)
        editor.teach(facts)
        editor.save(tmp_path / name)
    assert set(diff_memories(tmp_path / "a", tmp_path / "b").only_b) == {"gamma", "delta"}
    for prefer in ("a", "b"):
        report = merge_memories(tmp_path / "a", tmp_path / "b", tmp_path / f"u{prefer}", prefer)
        assert report.facts == 5
        union = MemoryEditor.load(tiny_model(hidden_size=64, intermediate_size=96), tmp_path / f"u{prefer}", tiny_tokenizer())
        assert union.memory.table_config.dtype == "int8"  # as the first of the two
        assert all(union.verify().values())


def test_rows_that_a_format_cannot_hold_are_refused():
    table = VerifiedTable(100, 4, "int8")
    one = torch.ones(1, dtype=torch.int32)
    with pytest.raises(TableError, match="not finite"):
        table.insert(torch.tensor([3]), one, torch.full((1, 4), float("nan")))
    assert table.stored_rows == 0
    table.insert(torch.tensor([3]), one, torch.ones(1, 4))
    with pytest.raises(TableError, match="stored already"):
        StoredRows.join([table.stored, table.stored])
    with pytest.raises(TableError, match="a multiple of 2"):
        VerifiedTable(100, 5, "int4")
