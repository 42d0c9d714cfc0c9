"""What row files are noted to hold, who may have them, and what killed processes leave."""

import copy
import errno
import gc
import os
import pickle
import shutil
import signal
import sys
import threading

import pytest
import torch

from engram import EngramAdamW, EngramModel, TableConfig, TableError, get_engram_model
from engram.optim import build_param_groups
from engram.tables import (
    HostTable,
    HybridTable,
    MmapTable,
    QuantisedTable,
    build_table,
    hybrid,
    is_being_filled,
    is_untouched,
    new_row_file,
    note_form,
    rowfile,
    rows_are,
    stamp_rows,
)
from engram.tables.hidden import hidden_beside, left_beside
from engram.tables.rownotes import left_by_placing, note_beside
from engram.testing import tiny_config, tiny_model, tiny_tokenizer
from tests.children import run_python

ROWS, DIM = 300, 16


def numbered(rows=ROWS, dim=DIM):
    return torch.arange(rows).float().unsqueeze(1).expand(-1, dim)


def full(*_args, **_kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_new_file_is_known_to_be_empty_until_something_is_put_in(tmp_path):
    file = tmp_path / "rows"
    assert MmapTable(ROWS, DIM, file, "r+").is_new
    table = MmapTable(ROWS, DIM, file, "r+")
    assert table.is_new
    table.load_rows(0, numbered())
    assert not is_untouched(file)
    del table
    assert not MmapTable(ROWS, DIM, file, "r+").is_new


def test_rows_that_are_written_past_the_table_are_not_taken_for_none(tmp_path):
    table = MmapTable(ROWS, DIM, tmp_path / "rows", "r+")
    with torch.no_grad():
        table.weight.copy_(numbered())
    table.flush()
    assert not is_untouched(tmp_path / "rows")


def test_a_file_that_cannot_get_its_name_leaves_no_note_and_keeps_that_of_another(tmp_path, monkeypatch):
    file, mine = tmp_path / "rows", tmp_path / "mine"
    mine.write_bytes(b"0" * 100)
    stamp_rows(mine, "a")

    def make(path):
        with new_row_file(path, 100, "b", "me"):
            pass

    with pytest.raises(FileExistsError):
        make(mine)
    assert rows_are(mine, "a")
    monkeypatch.setattr(rowfile, "give_name", full)
    with pytest.raises(OSError, match="No space"):
        make(file)
    with pytest.raises(TableError, match="No space"):
        MmapTable(ROWS, DIM, file, "r+")
    assert sorted(found.name for found in tmp_path.iterdir()) == ["mine", "mine.json"]


def test_a_note_names_the_first_save_and_the_last_ones(tmp_path):
    file = tmp_path / "rows"
    file.write_bytes(b"0" * 100)
    for number in range(40):
        stamp_rows(file, str(number))
    assert [number for number in range(40) if rows_are(file, str(number))] == [0, *range(25, 40)]
    file.write_bytes(b"1" * 100)
    stamp_rows(file, "40")
    assert [number for number in range(41) if rows_are(file, str(number))] == [40]


def test_a_file_is_dated_back_so_that_a_later_change_shows(tmp_path):
    file = tmp_path / "rows"
    file.write_bytes(b"0" * 100)
    before = file.stat().st_mtime_ns
    stamp_rows(file, "a")
    assert file.stat().st_mtime_ns <= before - 900_000_000


def test_a_file_in_the_place_of_a_new_one_is_not_taken_for_it(tmp_path):
    file = tmp_path / "rows"
    MmapTable(ROWS, DIM, file, "r+")
    assert is_untouched(file)
    shutil.copy2(file, tmp_path / "other")
    assert (tmp_path / "other").stat().st_mtime_ns == file.stat().st_mtime_ns
    (tmp_path / "other").replace(file)
    assert not is_untouched(file)


def test_a_placed_file_that_is_stamped_again_is_not_left_over(tmp_path):
    file = tmp_path / "rows"
    with new_row_file(file, 100, "a", "placing"):
        pass
    assert left_by_placing(file, "placing")
    stamp_rows(file, "a")
    assert rows_are(file, "a")
    assert not left_by_placing(file, "placing")


@pytest.mark.parametrize("form", ["float32", "int8"])
def test_blocks_that_another_changes_while_they_are_used_are_refused(form, tmp_path):
    placement = TableConfig(tier="mmap", dtype=form, path=str(tmp_path), stamps={0: "a"})
    writer = build_table(ROWS, DIM, placement)
    with writer.filled_with("a"):
        writer.load_rows(0, numbered())
    blocks = build_table(ROWS, DIM, placement).iter_row_blocks(ROWS)
    next(blocks)
    note_beside(writer.path).unlink()
    with pytest.raises(TableError, match="another process changes its rows"):
        next(blocks)


def test_a_fill_that_is_stopped_is_known(tmp_path):
    file = tmp_path / "rows"
    table = MmapTable(ROWS, DIM, file, "r+")

    def stopped():
        with table.filled_with("a"):
            table.load_rows(0, numbered()[:100])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert is_being_filled(file)
    assert not any((rows_are(file, "a"), is_untouched(file)))
    table.update_rows(torch.tensor([1]), lambda rows: rows + 1)  # somebody goes on with what there is
    assert not is_being_filled(file)
    with table.filled_with("a"):
        table.load_rows(0, numbered())
    assert rows_are(file, "a")


def test_a_maker_that_comes_second_says_nothing_of_the_file_of_the_first(tmp_path, monkeypatch):
    file, made = tmp_path / "rows", []

    def late(hidden, path):
        monkeypatch.undo()
        made.append(MmapTable(ROWS, DIM, file, "r+"))
        made[0].load_rows(0, numbered())
        return give_name(hidden, path)

    give_name = rowfile.give_name
    monkeypatch.setattr(rowfile, "give_name", late)
    with pytest.raises(TableError, match="is locked"):
        MmapTable(ROWS, DIM, file, "r+")
    assert not is_untouched(file)
    assert torch.equal(made[0].lookup(torch.arange(ROWS)), numbered())


@pytest.mark.parametrize("reason", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS])
def test_file_systems_without_links_have_row_files(tmp_path, monkeypatch, reason):
    def refuse(*_):
        raise OSError(reason, os.strerror(reason))

    monkeypatch.setattr(os, "link", refuse)
    table = MmapTable(ROWS, DIM, tmp_path / "rows", "r+")
    table.load_rows(0, numbered())
    table.flush()
    (tmp_path / "other").write_bytes(b"mine")
    with hidden_beside(tmp_path / "other") as hidden, pytest.raises(FileExistsError):
        rowfile.give_name(hidden, tmp_path / "other")
    assert (tmp_path / "other").read_bytes() == b"mine"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["other", "rows"]


def test_what_killed_makers_left_is_removed_and_what_others_write_is_not(tmp_path):
    program = f"""
import os
from engram.tables import MmapTable
os.link = lambda *_: os.kill(os.getpid(), 9)
MmapTable({ROWS}, {DIM}, {str(tmp_path / "rows")!r}, "r+")
"""
    assert run_python("-c", program).returncode == -9
    assert len(left_beside(tmp_path / "rows")) == 1
    with hidden_beside(tmp_path / "rows") as mine:
        assert left_beside(tmp_path / "rows") == []  # removed, and this one is being written
        table = MmapTable(ROWS, DIM, tmp_path / "rows", "r+")
        assert os.path.exists(mine.name)
    assert table.is_new
    assert not list(tmp_path.glob("*.tmp")) + list(tmp_path.glob(".*.tmp"))


def test_a_forked_child_does_not_keep_the_lock(tmp_path):
    file = tmp_path / "rows"
    table, (read, write) = MmapTable(ROWS, DIM, file, "r+"), os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(write)
            os.read(read, 1)  # until the parent is done, or gone
        finally:
            os._exit(0)
    try:
        del table
        gc.collect()
        again = MmapTable(ROWS, DIM, file, "r+")
    finally:
        os.close(write)
        os.waitpid(child, 0)
    child = os.fork()
    if child == 0:
        try:
            del again
            gc.collect()  # nor does it give its parent's back
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    with pytest.raises(TableError, match="is locked"):
        MmapTable(ROWS, DIM, file, "r+")
    assert again.mode == "r+"


class BadMap:
    def __init__(self, good):
        self.good = good

    flush = full

    def __getattr__(self, name):
        return getattr(self.good, name)


def test_disks_that_refuse_are_named(tmp_path, monkeypatch):
    file = tmp_path / "rows"
    table = MmapTable(ROWS, DIM, file, "r+")
    with monkeypatch.context() as patch:
        patch.setattr(table._file, "map", BadMap(table._file.map))
        with pytest.raises(TableError, match=r"cannot write the rows of .*rows to its disk: No space left on device\. Check"):
            table.flush()
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        for noting in (
            lambda: stamp_rows(file, "a"),
            lambda: note_form(file, "float32", ROWS, DIM),
            lambda: table.filled_with("a").__enter__(),
        ):
            with pytest.raises(
                TableError, match=r"cannot note in .*rows\.(json|form) what .* No space left .*Free space there"
            ):
                noting()
        with pytest.raises(TableError, match="cannot note in"):
            MmapTable(ROWS, DIM, tmp_path / "new", "r+")
    with pytest.raises(TableError, match=r"cannot note in .*gone what"):
        stamp_rows(tmp_path / "gone", "a")
    assert sorted(found.name for found in tmp_path.iterdir()) == ["rows", "rows.json"]


@pytest.mark.parametrize("form", ["float32", "int8"])
def test_rows_that_are_known_are_read_while_another_has_them_and_never_half_written(form, tmp_path):
    placement = TableConfig(tier="mmap", dtype=form, path=str(tmp_path), stamps={0: "a"})
    writer = build_table(ROWS, DIM, placement)
    with pytest.raises(TableError, match="is locked"):  # what it holds is not known yet
        build_table(ROWS, DIM, placement)
    with writer.filled_with("a"):
        writer.load_rows(0, numbered())
    expected = writer.lookup(torch.arange(ROWS)).detach()
    reader = build_table(ROWS, DIM, placement)
    assert (writer.mode, reader.mode, reader.can_be_trained) == ("r+", "r", False)
    assert torch.equal(reader.lookup(torch.arange(ROWS)), expected)
    for change in (
        lambda: reader.update_rows(torch.tensor([1]), lambda rows: rows),
        lambda: reader.load_rows(0, numbered()),
    ):
        with pytest.raises(TableError, match="mapped read-only: its rows cannot be changed"):
            change()
    gather = type(reader)._gather

    def slow(table, row_ids, dtype, out):  # the writer begins when this look-up has begun
        rows = gather(table, row_ids, dtype, out)
        if table is reader:
            writer.update_rows(torch.arange(ROWS), lambda rows: rows + 1)
        return rows

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(reader), "_gather", slow)
        with pytest.raises(TableError, match="another process changes its rows"):
            reader.lookup(torch.arange(ROWS))
    stamp_rows(writer.path, "a")  # saved: other rows all the same
    for use in (
        lambda: reader.lookup(torch.arange(ROWS)),
        lambda: list(reader.stored_blocks()),
        lambda: list(reader.iter_row_blocks()),
        lambda: reader.read_stored(torch.tensor([1])),
    ):
        with pytest.raises(TableError, match="another process changes its rows"):
            use()
    with pytest.raises(TableError, match="is locked"):
        build_table(ROWS, DIM, TableConfig(tier="mmap", dtype=form, path=str(tmp_path), stamps={0: "b"}))


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes somebody else")
def test_rows_that_cannot_be_written_are_read(tmp_path):
    placement = TableConfig(tier="mmap", path=str(tmp_path), stamps={0: "a"})
    table = build_table(ROWS, DIM, placement)
    with table.filled_with("a"):
        table.load_rows(0, numbered())
    del table
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_mode & 0o005 != 0o005:
            folder.chmod(0o755)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setuid(65534)
            found = build_table(ROWS, DIM, placement)
            os.write(write, b"1" if torch.equal(found.lookup(torch.arange(ROWS)), numbered()) and found.mode == "r" else b"0")
        except BaseException as error:
            os.write(write, str(error).encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert os.read(read, 1000) == b"1"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_does_not_wait_for_a_thread_that_exchanged_hot_rows():
    table = HybridTable(HostTable(ROWS, DIM), 5)
    with hybrid._SWAPPING:
        child = os.fork()
        if child == 0:
            try:
                signal.alarm(20)
                table.promote(torch.arange(5))
                os._exit(0)
            finally:
                os._exit(1)
    assert os.waitpid(child, 0)[1] == 0


def test_hot_rows_may_change_while_others_look_them_up(monkeypatch):
    cold = HostTable(ROWS, DIM)
    cold.load_rows(0, numbered())
    cold.weight.requires_grad_(False)
    table = HybridTable(cold, 50)
    table.promote(torch.arange(50))
    table.lookup(torch.arange(5))
    searched, others = torch.searchsorted, torch.arange(50, 100)

    def late(ids, asked):  # between the numbers of the hot rows and the rows themselves
        found = searched(ids, asked)
        if len(others):
            table.promote(others)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(torch, "searchsorted", searched)
                table.lookup(torch.arange(5))
        return found

    monkeypatch.setattr(torch, "searchsorted", late)
    assert torch.equal(table.lookup(torch.arange(ROWS)), numbered())
    assert torch.equal(table.hot_ids, others)  # the look-up that was under way puts nothing back
    assert torch.equal(table.hot, numbered()[50:100])


def test_many_look_ups_and_promotions_at_once():
    cold = HostTable(ROWS, DIM)
    cold.load_rows(0, numbered())
    cold.weight.requires_grad_(False)
    table, wrong, stop = HybridTable(cold, 200), [], threading.Event()
    interval = sys.getswitchinterval()

    def read():
        generator = torch.Generator().manual_seed(1)
        while not stop.is_set():
            row_ids = torch.randint(0, ROWS, (64,), generator=generator)
            with torch.no_grad():
                if not torch.equal(table.lookup(row_ids)[:, 0], row_ids.float()):
                    wrong.append(row_ids)

    thread = threading.Thread(target=read)
    sys.setswitchinterval(1e-5)
    try:
        thread.start()
        for number in range(2000):
            table.promote(torch.randperm(ROWS)[: 100 + number % 100])
    finally:
        stop.set()
        thread.join()
        sys.setswitchinterval(interval)
    assert not wrong


def test_a_hybrid_page_locks_when_it_is_moved(monkeypatch):
    asked = []
    monkeypatch.setattr(HostTable, "is_read_by", lambda table, device: asked.append(device) or True)
    table = HybridTable(HostTable(ROWS, DIM), 4)
    table.to("cpu")
    assert asked == []

    class Moved:
        device = torch.device("cuda", 0)

    monkeypatch.setattr(type(table._copies), "to", lambda copies, device: copies)
    table._apply(lambda tensor: Moved())
    assert asked == [torch.device("cuda", 0)]


def test_a_step_after_a_save_withdraws_the_note_of_the_save(tmp_path):
    """Not every file system's times tell of writes through a map, so the optimiser does."""
    placed = TableConfig(tier="mmap", path=str(tmp_path / "rows"))
    memory = get_engram_model(tiny_model(), tiny_config(), tiny_tokenizer(), placed).requires_grad_(True)
    optimizer = EngramAdamW(build_param_groups(memory, memory, lr=1e-2))
    ids = torch.randint(2, 300, (2, 12))

    def noted():
        return [note_beside(table.path).exists() for table in tables]

    tables = [engram.table for engram in memory.engrams.values()]
    memory(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    memory.save_pretrained(tmp_path / "memory")
    assert all(noted())
    optimizer.step()
    assert not any(noted())


@pytest.mark.parametrize("tier", ["device", "host", "hybrid"])
def test_a_memory_made_in_inference_mode_is_one_like_others(tier):
    with torch.inference_mode():
        options = {"hot_rows": 5} if tier == "hybrid" else {}
        memory = get_engram_model(tiny_model(), tiny_config(), tiny_tokenizer(), TableConfig(tier=tier, **options))
        memory(input_ids=torch.tensor([[5, 6, 7]]))
    parameters = list(memory.engrams.parameters())
    assert parameters
    assert not any(parameter.is_inference() for parameter in parameters)


def test_a_save_is_done_even_if_a_row_file_is_gone(tmp_path, caplog):
    placed = TableConfig(tier="mmap", path=str(tmp_path / "rows"))
    memory = get_engram_model(tiny_model(), tiny_config(table_init="normal"), tiny_tokenizer(), placed)
    expected = [engram.table.weight.detach().clone() for engram in memory.engrams.values()]
    (tmp_path / "rows" / "layer-0.rows").unlink()
    memory.save_pretrained(tmp_path / "memory")
    assert "saved, but not noted beside the row file" in caplog.text
    assert note_beside(tmp_path / "rows" / "layer-2.rows").exists()
    again = EngramModel.from_pretrained(tiny_model(), tmp_path / "memory", tiny_tokenizer(), TableConfig())
    found = [engram.table.weight for engram in again.engrams.values()]
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("take", [copy.deepcopy, pickle.dumps])
def test_a_hybrid_over_a_file_is_not_copied_and_not_read_for_it(tmp_path, monkeypatch, take):
    table = build_table(ROWS, DIM, TableConfig(tier="hybrid", path=str(tmp_path / "rows"), hot_rows=5))
    monkeypatch.setattr(torch.Tensor, "__deepcopy__", None)
    monkeypatch.setattr(torch.Tensor, "__reduce_ex__", None)
    with pytest.raises(TableError, match=r"cannot be (copied|pickled)"):
        take(table)


def test_blocks_to_be_saved_stay_within_a_bound(tmp_path):
    table = MmapTable(1 << 12, 64, tmp_path / "rows", "r+", resident_bytes=1 << 16)
    table.update_rows(torch.arange(1 << 12), lambda old: torch.arange(1 << 12).float()[:, None].expand_as(old))
    blocks = [block for (block,) in table.stored_blocks()]
    assert max(block.nbytes for block in blocks) <= 1 << 13
    assert torch.equal(torch.cat(blocks), table.weight)


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="needs holes")
def test_a_sparse_copy_gets_its_blocks(tmp_path):
    """What is written into a hole of a map on a full disk ends the process."""
    rows = 1 << 12
    with open(tmp_path / "rows", "wb") as file:
        file.truncate(rows * DIM * 4)
    if os.stat(tmp_path / "rows").st_blocks * 512 >= rows * DIM * 4:
        pytest.skip("this file system has no holes")
    table = MmapTable(rows, DIM, tmp_path / "rows", "r+")
    assert os.stat(tmp_path / "rows").st_blocks * 512 >= rows * DIM * 4
    assert not table.weight.any()


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="needs holes")
def test_a_single_hole_gets_its_blocks(tmp_path):
    rows = 1 << 12
    size = rows * DIM * 4
    with open(tmp_path / "rows", "wb") as file:
        file.write(bytes(range(256)) * (3 * size // 4 // 256))
        file.truncate(size)
    if os.stat(tmp_path / "rows").st_blocks * 512 >= size:
        pytest.skip("this file system has no holes")
    MmapTable(rows, DIM, tmp_path / "rows", "r+")
    assert os.stat(tmp_path / "rows").st_blocks * 512 >= size


def test_a_note_that_cannot_be_withdrawn_keeps_the_rows_as_they_are(tmp_path, monkeypatch):
    """Whoever reads the file by that note would get rows of which some are changed."""
    table = MmapTable(ROWS, DIM, tmp_path / "rows", "r+")
    with table.filled_with("a"):
        table.load_rows(0, numbered())
    unlink = os.unlink

    def refused(path, **options):
        if str(path).endswith("rows.json"):
            raise PermissionError(errno.EACCES, "Permission denied")
        unlink(path, **options)

    monkeypatch.setattr(os, "unlink", refused)
    with pytest.raises(TableError, match=r"rows\.json says what they are, and cannot be removed \(Permission denied\)"):
        table.update_rows(torch.tensor([1]), lambda rows: rows + 1)
    assert rows_are(tmp_path / "rows", "a")
    assert torch.equal(table.lookup(torch.arange(ROWS)), numbered())


def test_a_file_behind_a_link_has_its_note_beside_it(tmp_path):
    (tmp_path / "there").mkdir()
    file, link = tmp_path / "there" / "rows", tmp_path / "link"
    with (table := MmapTable(ROWS, DIM, file, "r+")).filled_with("a"):
        table.load_rows(0, numbered())
    del table
    link.symlink_to(file)
    reader = MmapTable(ROWS, DIM, file, unchanged="a")
    writer = MmapTable(ROWS, DIM, link, "r+")
    writer.update_rows(torch.tensor([1]), lambda rows: rows + 1)
    with pytest.raises(TableError, match="another process changes its rows"):
        reader.lookup(torch.tensor([1]))


def test_rows_that_were_half_filled_are_filled_whatever_for(tmp_path, monkeypatch):
    """They are nobody's training, which ``changed_rows='keep'`` is for."""
    memory = get_engram_model(tiny_model(), tiny_config(table_init="normal"), tiny_tokenizer())
    for name in ("a", "b"):
        memory.save_pretrained(tmp_path / name)
    placed = TableConfig(tier="mmap", path=str(tmp_path / "rows"), changed_rows="keep")
    load_rows = MmapTable.load_rows

    def stopped(self, start, rows):
        load_rows(self, start, rows[: len(rows) // 2])
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(MmapTable, "load_rows", stopped)
        with pytest.raises(KeyboardInterrupt):
            EngramModel.from_pretrained(tiny_model(), tmp_path / "a", tiny_tokenizer(), placed)
    gc.collect()
    again = EngramModel.from_pretrained(tiny_model(), tmp_path / "b", tiny_tokenizer(), placed)
    for layer, engram in memory.engrams.items():
        found = again.engrams[layer].table.weight
        assert torch.equal(found, engram.table.weight)


def test_a_dense_step_after_a_save_withdraws_the_note_too(tmp_path):
    table = MmapTable(ROWS, DIM, tmp_path / "rows", "r+")
    optimizer = EngramAdamW([table.weight], lr=1e-2)
    table.weight.grad = torch.ones(ROWS, DIM)
    table.flush()
    stamp_rows(tmp_path / "rows", "a")
    optimizer.step()
    assert not note_beside(tmp_path / "rows").exists()


@pytest.mark.parametrize("change", ["update_rows", "load_rows", "load_stored"])
def test_hot_rows_in_fewer_bits_follow_changes_in_inference_mode(change):
    cold = QuantisedTable(ROWS, DIM, "int8", host=True)
    cold.load_rows(0, numbered())
    table = HybridTable(cold, hot_rows=4)
    table.promote(torch.arange(4))
    ids = torch.arange(8)
    with torch.no_grad():
        table.lookup(ids)
    other = QuantisedTable(ROWS, DIM, "int8", host=True)
    other.load_rows(0, 2 * numbered())
    with torch.inference_mode():
        if change == "update_rows":
            table.update_rows(ids, lambda rows: 2 * rows)
        elif change == "load_rows":
            table.load_rows(0, 2 * numbered())
        else:
            cold.load_stored(0, *other.read_stored(torch.arange(ROWS)))
        got = table.lookup(ids)
    assert torch.equal(got, other.lookup(ids))


def test_a_hybrid_made_in_inference_mode_is_read():
    with torch.inference_mode():
        table = build_table(100, 8, TableConfig(tier="hybrid", hot_rows=3))
        table.promote(torch.arange(3))
        assert not table.lookup(torch.arange(5)).any()
