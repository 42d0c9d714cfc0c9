import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engram import TableError
from engram.tables import ABSENT, DraftTable, VerifiedTable


def filled(rows, dim=3, form="float32"):
    """A table with these ``{row: tag}``; the values are the row numbers."""
    table = VerifiedTable(10**12, dim, form)
    ids = torch.tensor(list(rows), dtype=torch.int64)
    values = ids.float().unsqueeze(1).expand(-1, dim)
    table.insert(ids, torch.tensor(list(rows.values()), dtype=torch.int32), values)
    return table


rows_and_tags = st.dictionaries(st.integers(0, 40), st.integers(1, 3), max_size=20)


@settings(max_examples=80, deadline=None)
@given(
    rows_and_tags,
    st.lists(st.tuples(st.integers(0, 40), st.integers(1, 3)), min_size=1, max_size=30),
    st.sets(st.integers(0, 40)),
)
def test_a_verified_table_is_a_dictionary_of_row_and_tag(rows, asked, deleted):
    table = filled(rows)
    ids, tags = (torch.tensor(column) for column in zip(*asked))

    def check(held):
        got = table.gather(table.find(ids, tags.int()))
        for (row, tag), values in zip(asked, got.tolist()):
            assert values == [float(row) if held.get(row) == tag else 0.0] * 3
        assert table.owner_tags(ids).tolist() == [held.get(row, 0) for row, _ in asked]
        assert table.lookup(ids)[:, 0].tolist() == [float(row) if row in held else 0.0 for row, _ in asked]
        assert table.row_ids.tolist() == sorted(held)
        assert table.stored_rows == len(held)

    check(rows)
    table.delete(torch.tensor(sorted(deleted), dtype=torch.int64))
    check({row: tag for row, tag in rows.items() if row not in deleted})


@settings(max_examples=60, deadline=None)
@given(rows_and_tags, rows_and_tags)
def test_rows_that_come_and_go_leave_no_trace(first, second):
    table, second = filled(first), {row: tag for row, tag in second.items() if row not in first}
    before = [table.row_ids.clone(), table.tags.clone(), table.weight.clone()]
    ids = torch.tensor(list(second), dtype=torch.int64)
    table.insert(ids, torch.tensor(list(second.values()), dtype=torch.int32), torch.rand(len(second), 3))
    table.delete(ids)
    assert all(torch.equal(a, b) for a, b in zip(before, [table.row_ids, table.tags, table.weight]))


def test_a_draft_learns_apart_and_is_committed_at_once():
    table = filled({4: 1, 9: 1})
    draft = DraftTable(table, torch.tensor([2, 7]), torch.tensor([1, 2], dtype=torch.int32))
    ids, tags = torch.tensor([[2, 4], [7, 7]]), torch.tensor([[1, 1], [2, 1]], dtype=torch.int32)
    slots = draft.find(ids, tags)
    assert slots.tolist() == [[2, 0], [3, ABSENT]]
    draft.gather(slots).sum().backward()
    gradient = draft.held.grad.coalesce()
    assert gradient.indices().tolist() == [[0, 1]]
    with torch.no_grad():
        draft.held += 5
    assert draft.gather(slots)[:, :, 0].tolist() == [[5, 4], [5, 0]]
    assert table.row_ids.tolist() == [4, 9]
    assert (draft.stored_rows, draft.dtype, draft.location) == (4, torch.float32, "cpu")
    assert [(start, block.shape) for start, block in draft.iter_row_blocks()] == [(0, (2, 3))]
    draft.commit()
    assert table.row_ids.tolist() == [2, 4, 7, 9]
    assert table.tags.tolist() == [1, 1, 2, 1]
    assert table.weight[:, 0].tolist() == [5, 4, 5, 9]
    for call in (lambda: draft.lookup(ids), lambda: draft.update_rows(ids, lambda r: r)):
        with pytest.raises(TableError):
            call()
    with pytest.raises(TableError, match="sorted"):
        DraftTable(table, torch.tensor([4, 3]), torch.tensor([1, 1]))


def test_values_change_and_bad_rows_are_refused():
    table = filled({4: 1, 9: 1})
    table.update_rows(torch.tensor([9]), lambda rows: rows + 1)
    table.update_rows(torch.tensor([], dtype=torch.int64), lambda rows: rows)
    assert table.weight[:, 0].tolist() == [4, 10]
    one = torch.ones(1, dtype=torch.int32)
    for call, message in [
        (lambda: table.insert(torch.tensor([4]), one, torch.zeros(1, 3)), "stored already"),
        (lambda: table.insert(torch.tensor([10**12]), one, torch.zeros(1, 3)), "expected 0"),
        (lambda: table.insert(torch.tensor([5]), one, torch.zeros(1, 2)), "expected .n., .n. and .n, 3."),
        (lambda: table.insert(torch.tensor([5]), one[:0], torch.zeros(1, 3)), "got .1. rows, .0. tags"),
        (lambda: DraftTable(table, torch.tensor([5, 5]), torch.tensor([1, 2])), "no row twice"),
        (lambda: table.update_rows(torch.tensor([5]), lambda rows: rows), "not written yet"),
        (lambda: table.update_rows(torch.tensor([9]), lambda rows: rows[:, :1]), "fn returned"),
    ]:
        with pytest.raises(TableError, match=message):
            call()
    assert table.nbytes == 2 * 3 * 4
    assert "stored_rows=2" in repr(table)
    assert table.location == "cpu"
    assert [start for start, _ in table.iter_row_blocks(1)] == [0, 1]
    other = VerifiedTable(10**12, 3)
    other.load_state_dict(table.state_dict())
    assert torch.equal(other.weight, table.weight)


@pytest.mark.parametrize("form", ["int8", "float8", "int4", "bfloat16", "float32"])
def test_reading_without_waiting_is_reading(form):
    """What layers do on a GPU, where picking the present slots first would make the host wait."""
    table = VerifiedTable(100, 8, form)
    table.insert(torch.tensor([3, 7, 50]), torch.tensor([1, 2, 3], dtype=torch.int32), torch.randn(3, 8))
    slots = torch.tensor([[0, ABSENT, 2], [ABSENT, 1, 1]])
    got = table.gather_without_waiting(slots)
    assert torch.equal(got, table.gather(slots))
    assert got.dtype == table.gather(slots).dtype


@pytest.mark.parametrize("form", ["int8", "float8", "int4", "bfloat16"])
def test_rows_in_fewer_bits_are_read_changed_and_kept(form):
    table = filled({4: 1, 9: 2, 16: 1}, 4, form)
    slots = table.find(torch.tensor([4, 9, 9, 5]), torch.tensor([1, 2, 1, 1], dtype=torch.int32))
    assert slots.tolist() == [0, 1, ABSENT, ABSENT]
    assert table.gather(slots).tolist() == [[4.0] * 4, [9.0] * 4, [0.0] * 4, [0.0] * 4]
    assert table.lookup(torch.tensor([16, 17]), torch.float32)[:, 0].tolist() == [16, 0]
    assert table.nbytes == 3 * table.form.row_bytes(4)
    assert table.format_name == form
    version = table.version
    table.update_rows(torch.tensor([9]), lambda rows: rows + 1)
    assert table.version > version
    assert torch.cat([rows for _, rows in table.iter_row_blocks(2)])[:, 0].tolist() == [4, 10, 16]
    assert table.owner_tags(torch.tensor([9])).tolist() == [2]
    other = VerifiedTable(10**12, 4, form)
    other.load_state_dict(table.state_dict())
    assert bool(other.stored.equal_to(table.stored).all())


def without(name):
    return lambda state: state.pop(name)


def shorter(state):
    state["tags"] = state["tags"][:2]


def of_other_width(state):
    state["weight"] = state["weight"].repeat(1, 2)


def not_sorted(state):
    state["row_ids"] = state["row_ids"].flip(0)


def not_owned(state):
    state["tags"] = torch.zeros_like(state["tags"])


def of_a_larger_table(state):
    state["row_ids"] = state["row_ids"] + 10**12


def in_fewer_bits(state):
    state["scales"] = torch.ones(3, 1)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without("tags"), "got row_ids, weight, expected row_ids, tags, weight"),
        (shorter, "got parts of 2, 3 entries"),
        (of_other_width, r"weight: got entries of shape \[6\], expected \[3\]"),
        (not_sorted, "do not ascend"),
        (not_owned, "got a tag below 1"),
        (of_a_larger_table, "do not ascend from 0 to at most 999999999999"),
        (in_fewer_bits, "it is of another format"),
    ],
)
def test_what_is_no_saved_table_changes_nothing(damage, message, strict):
    table, state = filled({3: 1, 5: 2}), dict(filled({1: 1, 2: 2, 9: 1}).state_dict())
    damage(state)
    before, version = {name: part.clone() for name, part in table.state_dict().items()}, table.version
    with pytest.raises(RuntimeError, match=message):
        table.load_state_dict(state, strict=strict)
    assert table.version == version
    assert all(torch.equal(part, before[name]) for name, part in table.state_dict().items())
    table.load_state_dict(filled({1: 1, 2: 2, 9: 1}).state_dict())
    assert table.row_ids.tolist() == [1, 2, 9]
