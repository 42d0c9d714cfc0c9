"""One suite for all tiers: the same look-ups, gradients and training steps, and rows that survive the way from any tier to any other."""

import copy
import dataclasses
import errno
import gc
import os
import pickle
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engram import (
    CheckpointError,
    ConfigError,
    EngramAdamW,
    EngramModel,
    TableConfig,
    TableError,
    get_engram_model,
    native,
)
from engram.tables import (
    AccessCounts,
    DeviceTable,
    HostTable,
    HybridTable,
    MmapTable,
    QuantisedMmapTable,
    QuantisedTable,
    RowPrefetcher,
    available_memory,
    build_table,
    check_room,
    is_untouched,
    row_file_layout,
    row_format,
    rows_are,
    stamp_rows,
)
from engram.tables.memory import lazy_zeros, take_pages
from engram.testing import tiny_config, tiny_model, tiny_tokenizer
from tests.children import run_python

ROWS, DIM = 300, 16


def random_rows(rows=ROWS, dim=DIM, seed=0):
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed))


FLOATS = ["float32", "bfloat16", "float16"]
PLACEMENTS = {
    "device": TableConfig(),
    "host": TableConfig(tier="host"),
    "mmap": TableConfig(tier="mmap", path="rows"),
    "mmap in parts": TableConfig(tier="mmap", path="rows", resident_bytes=16 << 16),  # two rows at a time
    "hybrid": TableConfig(tier="hybrid", hot_rows=100),
    "hybrid mmap": TableConfig(tier="hybrid", hot_rows=100, path="rows"),
}


@pytest.fixture(params=PLACEMENTS)
def make(request, tmp_path):
    def build(dtype="float32", rows=ROWS):
        placement = PLACEMENTS[request.param]
        path = None if placement.path is None else str(tmp_path / placement.path)
        table = build_table(rows, DIM, dataclasses.replace(placement, dtype=dtype, path=path))
        assert table.tier == placement.tier
        table.load_rows(0, random_rows(rows))
        if isinstance(table, HybridTable):
            table.promote(torch.arange(0, rows, 3))
        return table

    return build


@pytest.mark.parametrize("dtype", FLOATS)
def test_rows_are_looked_up(make, dtype):
    table = make(dtype)
    expected = random_rows().to(getattr(torch, dtype))
    row_ids = torch.randint(ROWS, (3, 7, 2))
    for recording in (True, False):  # a hybrid reads its copies where no gradients are recorded
        with torch.set_grad_enabled(recording):
            assert torch.equal(table.lookup(row_ids), expected[row_ids])
            got = table.lookup(table.prefetch(row_ids), torch.float32)
            assert got.dtype == torch.float32
            assert torch.equal(got, expected[row_ids].float())
            assert table.lookup(row_ids[:0]).shape == (0, 7, 2, DIM)
    assert (table.rows, table.dim, table.dtype, table.format_name) == (ROWS, DIM, expected.dtype, dtype)
    assert table.nbytes == ROWS * DIM * expected.itemsize
    assert str(table.tier) in repr(table) or table.location in repr(table)
    for wrong in (-1, ROWS, -(1 << 40), 1 << 40):
        for core in (native.core(), None):
            with pytest.MonkeyPatch.context() as patch, torch.no_grad():
                patch.setattr(native, "_core", core)
                with pytest.raises(IndexError):
                    table.lookup(torch.tensor([0, wrong]))


@pytest.mark.parametrize("dtype", FLOATS)
def test_gradients_hold_the_touched_rows(make, dtype):
    table, plain = make(dtype), DeviceTable(ROWS, DIM, dtype=getattr(torch, dtype))
    plain.load_rows(0, random_rows())
    row_ids = torch.tensor([[5, 9, 5], [0, 299, 9]])
    weight = torch.randn(2, 3, DIM)
    for each in (table, plain):
        (each.lookup(row_ids, torch.float32) * weight).sum().backward()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "_core", None)
        reference = DeviceTable(ROWS, DIM, dtype=getattr(torch, dtype))
        reference.load_rows(0, random_rows())
        (reference.lookup(row_ids, torch.float32) * weight).sum().backward()
    for each in (table, plain):
        gradient = each.weight.grad
        assert gradient.is_sparse
        assert gradient.dtype == each.weight.dtype
        assert torch.equal(gradient.coalesce().indices(), torch.tensor([[0, 5, 9, 299]]))
        assert torch.equal(gradient.to_dense(), reference.weight.grad.to_dense())


@pytest.mark.parametrize("dtype", FLOATS)
def test_training_steps_are_the_same_everywhere(make, dtype):
    table, plain = make(dtype), DeviceTable(ROWS, DIM, dtype=getattr(torch, dtype))
    plain.load_rows(0, random_rows())
    optimizers = [EngramAdamW([each.weight], lr=0.1) for each in (table, plain)]
    assert [name for name, _ in table.named_parameters()] == ["weight"]
    rng = torch.Generator().manual_seed(1)
    for _ in range(5):
        row_ids, target = torch.randint(ROWS, (20,), generator=rng), torch.randn(20, DIM, generator=rng)
        for each, optimizer in zip((table, plain), optimizers):
            optimizer.zero_grad()
            (each.lookup(row_ids, torch.float32) - target).square().sum().backward()
            optimizer.step()
        with torch.no_grad():  # what is read between two steps is what they made
            assert torch.equal(table.lookup(torch.arange(ROWS)), plain.weight)
    assert torch.equal(table.weight, plain.weight)


def test_rows_are_edited_and_walked(make):
    table = make()
    table.update_rows(torch.tensor([2, 250]), lambda rows: rows * 2)
    expected = random_rows()
    expected[[2, 250]] *= 2
    assert torch.equal(torch.cat([rows for _, rows in table.iter_row_blocks(64)]), expected)
    table.update_rows(torch.tensor([], dtype=torch.int64), lambda rows: rows)
    with pytest.raises(TableError, match=r"expected 0\.\.299"):
        table.update_rows(torch.tensor([ROWS]), lambda rows: rows)
    with pytest.raises(TableError, match="fn returned shape"):
        table.update_rows(torch.tensor([1]), lambda rows: rows[:, :3])
    with torch.no_grad():
        assert torch.equal(table.lookup(torch.arange(ROWS)), expected)
    for start, rows in ((ROWS - 1, 2), (-1, 1)):
        with pytest.raises(TableError, match="up to row 299"):
            table.load_rows(start, random_rows(rows))


def test_host_rows_stay_where_they_are():
    table = HostTable(4, 8)
    moved = torch.nn.ModuleList([table]).to(torch.bfloat16).to("meta")[0]
    assert moved.weight.device.type == "cpu"
    assert moved.dtype == torch.float32
    assert copy.deepcopy(table).weight.shape == (4, 8)


# -- files ----------------------------------------------------------------------------------------------------------------------------


def test_mapped_rows_are_in_the_file_and_come_back(tmp_path):
    table = MmapTable(ROWS, DIM, tmp_path / "rows", "r+")
    table.load_rows(0, random_rows())
    table.flush()
    assert (tmp_path / "rows").stat().st_size == ROWS * DIM * 4
    again = MmapTable(ROWS, DIM, tmp_path / "rows")
    assert torch.equal(again.weight, random_rows())
    assert not again.weight.requires_grad
    with pytest.raises(TableError, match="mapped read-only"):
        again.update_rows(torch.tensor([0]), lambda rows: rows)
    with pytest.raises(TableError, match="mapped read-only"):
        again.load_rows(0, random_rows())
    table.update_rows(torch.tensor([3]), lambda rows: rows + 1)
    assert torch.equal(again.lookup(torch.tensor([3])), random_rows()[3:4] + 1)  # one file, two maps
    for use in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TableError, match="cannot be"):
            use(again)


def test_cold_and_warm_rows_are_counted(tmp_path):
    if native.core() is None:
        pytest.skip("the native core is not built")
    table = MmapTable(ROWS, DIM, tmp_path / "rows", "r+")
    table.load_rows(0, random_rows())
    table.count_cold = True
    table.populate()
    table.lookup(torch.arange(ROWS))
    assert (table.warm_rows, table.cold_rows) == (ROWS, 0)


USES = {
    "look-up": "table.lookup(torch.tensor([99999]))",
    "prefetch": "table.lookup(table.prefetch(torch.tensor([99999])))",
    "edit": "table.update_rows(torch.tensor([99999]), lambda rows: rows + 1)",
    "fill": "table.load_rows(99999, torch.zeros(1, 16))",
    "walk": "[rows.sum() for _, rows in table.iter_row_blocks()]",
    "flush": "table.flush()",
    "state": "table.state_dict()",  # its values would be read later, by somebody who cannot know
    "state of hot rows": "hybrid.state_dict()",
    "step": "loss.backward(); optimizer.step()",  # the look-up was before
}


def test_a_truncated_file_is_an_error_not_a_crash(tmp_path):
    file = tmp_path / "rows"
    program = f"""
import os, torch
from engram.tables import HybridTable, MmapTable
from engram import EngramAdamW, TableError
table = MmapTable(100000, 16, {str(file)!r}, "r+")
hybrid = HybridTable(table, hot_rows=2)
optimizer = EngramAdamW(table.parameters())
loss = table.lookup(torch.tensor([99999])).sum()
os.truncate({str(file)!r}, 4096)
for use in {list(USES.values())}:
    try:
        exec(use)
    except TableError as error:
        print("refused:", error)
"""
    done = run_python("-c", program)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("refused: ") == done.stdout.count("got 4,096 bytes, expected at least 6,400,000") == len(USES)
    with pytest.raises(TableError, match="was truncated"):
        MmapTable(100_000, 16, file)


def test_a_second_writer_is_refused_until_the_first_is_gone(tmp_path):
    file = tmp_path / "rows"
    program = f"""
import sys
from engram.tables import MmapTable
table = MmapTable(1000, 16, {str(file)!r}, "r+")
print("locked", flush=True)
sys.stdin.read()
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", program], text=True, **pipes)
    assert process.stdout.readline() == "locked\n"
    with pytest.raises(TableError, match="is locked: another process"):
        MmapTable(1000, 16, file, "r+")
    MmapTable(1000, 16, file)  # readers are welcome
    process.kill()
    process.communicate()
    table = MmapTable(1000, 16, file, "r+")
    with pytest.raises(TableError, match="is locked"):
        MmapTable(1000, 16, file, "r+")
    rows = table.lookup(torch.tensor([3])).detach()  # what leads back to the table would keep it
    del table
    MmapTable(1000, 16, file, "r+")
    assert bool((rows == 0).all())


def test_a_full_disk_leaves_no_file(tmp_path):
    program = f"""
import resource
from engram.tables import MmapTable
from engram import TableError
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
try:
    MmapTable(100000, 16, {str(tmp_path / "rows")!r}, "r+")
except TableError as error:
    print("refused:", error)
"""
    done = run_python("-c", program)
    assert done.returncode == 0, done.stderr
    assert "refused: cannot map" in done.stdout
    assert "File too large" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_row_files_are_known_again_until_they_change(tmp_path):
    file = tmp_path / "rows"
    table = MmapTable(ROWS, DIM, file, "r+")
    table.load_rows(0, random_rows())
    table.flush()
    assert not rows_are(file, "a")
    stamp_rows(file, "a")
    assert rows_are(file, "a")
    assert not rows_are(file, "b")
    with torch.no_grad():
        table.lookup(torch.arange(ROWS))
    assert rows_are(file, "a")
    table.lookup(torch.arange(ROWS)).sum().backward()
    assert not rows_are(file, "a")  # a step may follow, of which not every file system's times tell
    stamp_rows(file, "a")
    table.update_rows(torch.tensor([3]), lambda rows: rows + 1)
    assert not rows_are(file, "a")


def test_row_files_are_found_from_another_folder(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    table = MmapTable(ROWS, DIM, "rows", "r+")
    stamp_rows(table.path, "a")
    monkeypatch.chdir(tmp_path / "elsewhere")
    MmapTable(ROWS, DIM, "rows", "r+").flush()
    stamp_rows(Path("rows"), "another's")
    table.lookup(torch.arange(3)).sum().backward()
    assert not (tmp_path / "rows.json").exists()
    assert rows_are(Path("rows"), "another's")


def test_a_state_is_not_loaded_into_rows_that_are_read_only(tmp_path):
    table = MmapTable(ROWS, DIM, tmp_path / "rows", "r+")
    stamp_rows(table.path, "a")
    table.load_state_dict({"weight": random_rows()})
    assert torch.equal(table.read(torch.arange(ROWS), torch.float32), random_rows())
    assert not rows_are(table.path, "a")
    del table
    gc.collect()
    read_only = MmapTable(ROWS, DIM, tmp_path / "rows")
    with pytest.raises(TableError, match="mapped read-only"):
        read_only.load_state_dict({"weight": torch.zeros(ROWS, DIM)})
    assert torch.equal(read_only.read(torch.arange(ROWS), torch.float32), random_rows())


def test_a_hybrid_loads_a_state_as_its_cold_table_does(tmp_path):
    new = random_rows() + 1
    for cold in (HostTable(ROWS, DIM), MmapTable(ROWS, DIM, tmp_path / "rows", "r+")):
        hybrid = HybridTable(cold, 4)
        hybrid.promote(torch.arange(4))
        hybrid.read(torch.arange(4), torch.float32)  # copies are made
        hybrid.load_state_dict({"weight": new})
        for table in (hybrid, cold):
            assert torch.equal(table.read(torch.arange(ROWS), torch.float32), new)
        for table in (hybrid, cold) if isinstance(cold, MmapTable) else (hybrid,):
            with pytest.raises(TableError, match="load without assign"):
                table.load_state_dict({"weight": new}, assign=True)
    stamp_rows(cold.path, "a")
    hybrid.load_state_dict({"weight": new})
    assert not rows_are(cold.path, "a")
    del table, cold, hybrid
    gc.collect()
    with pytest.raises(TableError, match="mapped read-only"):
        HybridTable(MmapTable(ROWS, DIM, tmp_path / "rows"), 4).load_state_dict({"weight": new})


def test_a_file_that_another_took_the_place_of_is_noticed_when_rows_are_written(tmp_path):
    table = MmapTable(ROWS, DIM, tmp_path / "rows", "r+")
    table.load_rows(0, random_rows())
    table.flush()
    (tmp_path / "other").write_bytes((tmp_path / "rows").read_bytes())
    os.replace(tmp_path / "other", tmp_path / "rows")
    with pytest.raises(TableError, match="another file is there now"):
        table.flush()
    (tmp_path / "rows").unlink()
    with pytest.raises(TableError, match="or none"):
        table.flush()


@pytest.mark.parametrize("form", ["float32", "int8"])
def test_a_refused_change_leaves_a_row_file_known(form, tmp_path):
    path = tmp_path / "rows"
    table = MmapTable(8, 4, path, "r+") if form == "float32" else QuantisedMmapTable(8, 4, form, path, "r+")
    stamp_rows(path, "save")
    refused = [
        lambda: table.update_rows(torch.tensor([9]), lambda old: old),
        lambda: table.update_rows(torch.tensor([1]), lambda old: old[:, :2]),
        lambda: table.update_rows(torch.tensor([1]), lambda old: 1 / 0),
        lambda: table.load_rows(7, torch.ones(2, 4)),
        *([lambda: table.load_stored(7, table.weight[:2], table.scales[:2])] if form == "int8" else []),
    ]
    for change in refused:
        with pytest.raises((TableError, ZeroDivisionError)):
            change()
        assert rows_are(path, "save")
    table.update_rows(torch.tensor([1]), lambda old: old + 1)
    assert not rows_are(path, "save")


def test_pages_are_let_go_within_a_budget(tmp_path):
    """A table four times the budget: read, trained and walked; the process keeps about the budget, and nothing is lost."""
    program = f"""
import torch
from engram import EngramAdamW
from engram.tables import DeviceTable, MmapTable, rowfile
BUDGET = 32 << 20
# Pages of libraries count as files of the process, too: have those in that the work below needs.
warm = DeviceTable(500, 64)
step = EngramAdamW(warm.parameters(), lr=1.0)
(-warm.lookup(torch.randint(500, (100,)))).sum().backward()
step.step()
warm.load_rows(0, torch.arange(500).float().unsqueeze(1).expand(-1, 64))
table = MmapTable(2 * BUDGET // 128, 64, {str(tmp_path / "rows")!r}, "r+", resident_bytes=BUDGET)
assert table.nbytes == 4 * BUDGET
start, peak, ids = rowfile._resident(), 0, torch.arange(table.rows)
def look():
    global peak
    peak = max(peak, rowfile._resident() - start)
for part in ids.split(1 << 14):
    table.load_rows(int(part[0]), part.float().unsqueeze(1).expand(-1, 64))
    look()
optimizer = EngramAdamW(table.parameters(), lr=1.0)
for seed in range(20):
    rows = torch.randint(table.rows, (100,))
    (-table.lookup(rows)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    look()
total = 0
for part in ids.split(1 << 14):
    with torch.no_grad():
        got = table.lookup(part)[:, 0] - part
    total += int((got > 0.1).sum())
    assert float(got.min()) >= 0
    look()
assert 1900 < total <= 2000, total
for first, rows in table.iter_row_blocks(1 << 14):
    rows.sum()
    look()
print(peak / BUDGET)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1.1


@pytest.mark.parametrize(("piece", "mode"), [(1 << 18, "r"), (1 << 22, "r+")])
def test_a_budget_holds_for_files_that_lie_in_large_pages(tmp_path, piece, mode):
    content = torch.arange(1 << 20, dtype=torch.float32).numpy().tobytes() * 16  # 64 MB
    with open(tmp_path / "rows", "wb", buffering=0) as file:
        for start in range(0, len(content), piece):
            file.write(content[start : start + piece])
    program = f"""
import torch
from engram.tables import MmapTable, rowfile

let_go, seen = rowfile.RowFile.touched, []


def touched(file, rows, in_order=False):  # looks before pages go
    seen.append(rowfile._resident())
    let_go(file, rows, in_order)


rowfile.RowFile.touched = touched
torch.zeros(100)[torch.arange(50)]  # what the libraries need is in memory now
table = MmapTable(16 << 14, 64, {str(tmp_path / "rows")!r}, {mode!r}, resident_bytes=8 << 20)
table.requires_grad_(False)
start = rowfile._resident()
for seed in range(50):
    ids = torch.randint(table.rows, (100,))
    assert torch.equal(table.lookup(ids)[:, 0], (ids % (1 << 14) * 64).float())
assert max(seen) - start < 9 << 20, max(seen) - start
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_disk_that_refuses_rows_is_one_error(tmp_path, monkeypatch):
    table = MmapTable(8, 4, tmp_path / "rows", "r+")

    def refuse(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pwrite", refuse)
    with pytest.raises(TableError, match=r"cannot write rows to .*rows: Input/output error"):
        table.load_rows(0, torch.ones(2, 4))


def test_files_that_cannot_be_mapped_are_refused(tmp_path):
    with pytest.raises(TableError, match="cannot map"):
        MmapTable(4, 4, tmp_path / "missing")
    with pytest.raises(TableError, match="got mode 'w'"):
        MmapTable(4, 4, tmp_path / "rows", "w")
    with pytest.raises(TableError, match=r"got 288,230,376,151,711,744 bytes of rows, expected at most the [\d,]+ bytes free"):
        MmapTable(1 << 50, 64, tmp_path / "huge", "r+")


def test_a_table_larger_than_the_memory_given_is_refused_in_host_memory_and_works_mapped(tmp_path):
    """The address space is limited to what torch needs and half a gigabyte; the table has two, sparse in its file."""
    program = """
import resource, torch
from pathlib import Path
from engram import TableError
from engram.tables import HostTable, MmapTable
ROWS = (2 << 30) // 256
try:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (512 << 20), used + (512 << 20)))
    HostTable(ROWS, 64)
except TableError as error:
    print("refused:", error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "got a table of 2,147,483,648 bytes, expected at most the" in done.stdout
    before = _resident_bytes()
    table = MmapTable((2 << 30) // 256, 64, tmp_path / "rows", "r+")
    row_ids = torch.randint(table.rows, (1000,))
    table.update_rows(row_ids.unique(), lambda rows: rows + 1)
    assert bool((table.lookup(row_ids) == 1).all())
    assert _resident_bytes() - before < table.nbytes // 8


def _resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


_LARGE = """
import sys, torch
from engram import EngramAdamW
from engram.tables import MmapTable, available_memory
path, rows, budget = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
def held():
    lines = open("/proc/self/status").read().splitlines()
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith(("RssAnon:", "RssFile:", "RssShmem:")))
table = MmapTable(rows, 64, path, "r+", resident_bytes=budget)
before, peak, generator = held(), 0, torch.Generator().manual_seed(0)
assert len(sys.argv) == 4 or available_memory() < table.nbytes // 4
changed = torch.randint(rows, (20_000,), generator=generator).unique()
for part in changed.split(1000):
    table.update_rows(part, lambda old: part.float().unsqueeze(1).expand(-1, 64))
    peak = max(peak, held() - before)
optimizer = EngramAdamW(table.parameters(), lr=0.5)
for part in changed[:2000].split(500):
    (-table.lookup(part)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    peak = max(peak, held() - before)
with torch.no_grad():
    for _ in range(20):
        table.lookup(torch.randint(rows, (5000,), generator=generator))
        peak = max(peak, held() - before)
    assert torch.equal(table.lookup(changed[2000:])[:, 3], changed[2000:].float())
    assert bool((table.lookup(changed[:2000])[:, 0] > changed[:2000]).all())
print(peak)
"""


def memory_group(limit):
    """A memory control group with a limit that a process may join, or None where groups cannot be made."""
    group = Path(f"/sys/fs/cgroup/memory/engram-test-{os.getpid()}")
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(limit))
    except OSError:
        return None
    return group


@pytest.mark.slow
@pytest.mark.skipif(
    "libasan" in os.environ.get("LD_PRELOAD", ""), reason="the address sanitiser itself takes most of that memory"
)
def test_a_table_four_times_the_memory_works_within_it(tmp_path):
    """2 GB of rows for a process that may use 512 MB, files in the system's cache included (where control groups can be made; elsewhere
    only what the process holds is looked at)."""
    table, limit, budget = 2 << 30, 512 << 20, 64 << 20
    group = memory_group(limit)

    def join():
        if group is not None:
            (group / "cgroup.procs").write_text(str(os.getpid()))

    arguments = [
        sys.executable,
        "-c",
        _LARGE,
        str(tmp_path / "rows"),
        str(table // 256),
        str(budget),
        *(["limited"] if group else []),
    ]
    try:
        done = subprocess.run(arguments, capture_output=True, text=True, check=False, preexec_fn=join)
    finally:
        if group is not None:
            group.rmdir()
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 3 * budget  # and the rows of a training step, the optimiser's moments


# -- quantised rows -------------------------------------------------------------------------------------------------------------------


QUANTISED = ["int8", "float8", "int4"]


@pytest.mark.parametrize("form", QUANTISED)
def test_quantised_rows_are_what_their_format_holds_in_every_tier(make, form):
    table = make(form)
    expected = row_format(form).decode(*row_format(form).encode(random_rows()))
    row_ids = torch.randint(ROWS, (2, 50))
    assert torch.equal(table.lookup(row_ids), expected[row_ids])
    assert torch.equal(table.lookup(table.prefetch(row_ids), torch.bfloat16), expected[row_ids].bfloat16())
    with RowPrefetcherThread() as through:
        assert torch.equal(table.lookup(table.prefetch(row_ids, through=through)), expected[row_ids])
    assert table.lookup(row_ids[:0]).shape == (0, 50, DIM)
    assert torch.equal(torch.cat([rows for _, rows in table.iter_row_blocks(64)]), expected)
    table.update_rows(torch.tensor([6]), lambda rows: rows * 0 + 3)  # a hot row of a hybrid
    assert torch.allclose(table.lookup(torch.tensor([6])), torch.full((1, DIM), 3.0))
    assert torch.equal(table.lookup(torch.tensor([5, 7])), expected[[5, 7]])
    table.to(torch.float64)
    assert torch.equal(table.lookup(torch.tensor([8])), expected[8:9])
    assert table.nbytes == ROWS * row_format(form).row_bytes(DIM) < ROWS * DIM * 4 / 2
    assert table.format_name == form
    assert not list(table.parameters())
    assert sorted(table.state_dict()) == ["scales", "weight"]
    with pytest.raises(TableError, match=r"expected 0\.\.299"):
        table.update_rows(torch.tensor([-1]), lambda rows: rows)
    with pytest.raises(TableError, match="up to row 299"):
        table.load_rows(ROWS - 1, random_rows(2))
    with pytest.raises(IndexError):
        table.lookup(torch.tensor([0, ROWS]))


class RowPrefetcherThread:
    """A prefetcher that is used whatever the table, and closed."""

    def __enter__(self):
        self.prefetcher = RowPrefetcher(mode=True)
        return self.prefetcher

    def __exit__(self, *_):
        self.prefetcher.close()


@pytest.mark.parametrize("form", QUANTISED)
def test_quantised_rows_are_in_the_file_and_come_back(form, tmp_path):
    table = build_table(ROWS, DIM, TableConfig(tier="mmap", dtype=form, path=str(tmp_path)), layer_id=4)
    table.load_rows(0, random_rows())
    table.flush()
    file = tmp_path / "layer-4.rows"
    places, size = row_file_layout(ROWS, DIM, row_format(form))
    assert file.stat().st_size == size
    assert places[1] % 64 == 0
    again = QuantisedMmapTable(ROWS, DIM, form, file)
    assert torch.equal(again.lookup(torch.arange(ROWS)), table.lookup(torch.arange(ROWS)))
    for change in (lambda: again.update_rows(torch.tensor([0]), lambda rows: rows), lambda: again.load_rows(0, random_rows())):
        with pytest.raises(TableError, match="mapped read-only"):
            change()
    with pytest.raises(TableError, match="cannot be"):
        copy.deepcopy(again)
    with pytest.raises(TableError, match="is locked"):
        QuantisedMmapTable(ROWS, DIM, form, file, "r+")
    os.truncate(file, size - 1)
    uses = (
        lambda: again.lookup(torch.tensor([0])),
        lambda: next(again.iter_row_blocks()),
        lambda: table.update_rows(torch.tensor([0]), lambda rows: rows),
        table.flush,
    )
    for use in uses:
        with pytest.raises(TableError, match="was truncated"):
            use()


def test_hot_rows_are_counted_chosen_and_copied_again(tmp_path):
    table = build_table(ROWS, DIM, TableConfig(tier="hybrid", hot_rows=3))
    table.load_rows(0, random_rows())
    table.count_accesses = True
    with torch.no_grad():
        for row_ids in ([[5, 9, 5], [7, 5, 9]], [[200, 7, 9]]):
            assert torch.equal(table.lookup(torch.tensor(row_ids)), random_rows()[torch.tensor(row_ids)])
        assert (table.counts.rows.tolist(), table.counts.counts.tolist()) == ([5, 7, 9, 200], [3, 2, 3, 1])
        assert table.rebalance() == 3
        assert table.hot_ids.tolist() == [5, 7, 9]
        table.lookup(torch.tensor([5, 250]))
        assert torch.equal(table.hot, random_rows()[[5, 7, 9]])
        table.weight[7] = 4.0  # as an optimiser does
        assert bool((table.lookup(torch.tensor([7])) == 4).all())
        copied = copy.deepcopy(table)
        copied.update_rows(torch.tensor([5]), lambda rows: rows * 0)
        assert bool((copied.lookup(torch.tensor([5])) == 0).all())
        assert torch.equal(table.lookup(torch.tensor([5])), random_rows()[5:6])
    table.to(torch.bfloat16)
    assert (table.hot.dtype, table.weight.dtype) == (torch.float32, torch.float32)
    assert "3 hot rows on cpu" in repr(table)
    assert list(table.state_dict()) == ["weight"]
    for rows, message in ([[1, 2, 3, 4]], "at most hot_rows = 3"), ([[ROWS]], r"expected 0\.\.299"):
        with pytest.raises(TableError, match=message):
            table.promote(torch.tensor(rows))
    with pytest.raises(TableError, match="expected at least 1"):
        HybridTable(HostTable(4, 4), 0)
    counts = AccessCounts()
    for number in range(50):
        counts.add(torch.arange(number))
    assert counts.counts.tolist() == list(range(49, 0, -1))
    assert counts.most_frequent(3).tolist() == [0, 1, 2]


def test_prefetched_training_of_a_hybrid_reads_the_cold_table():
    """Optimisers write in ways that torch does not count: copies made for a prefetch would be old after a step."""
    table, plain = build_table(ROWS, DIM, TableConfig(tier="hybrid", hot_rows=3)), DeviceTable(ROWS, DIM)
    optimizers = []
    for each in (table, plain):
        each.load_rows(0, random_rows())
        optimizers.append(EngramAdamW(each.parameters(), lr=0.1))
    table.promote(torch.tensor([5, 7, 9]))
    row_ids = torch.tensor([5, 7, 200])
    with RowPrefetcherThread() as through:
        with torch.no_grad():
            table.lookup(row_ids)
        for _ in range(3):
            for each, optimizer in zip((table, plain), optimizers):
                optimizer.zero_grad()
                each.lookup(each.prefetch(row_ids, through=through)).square().sum().backward()
                optimizer.step()
            assert table._copies.version is None
            with torch.no_grad():
                assert torch.equal(table.lookup(table.prefetch(row_ids, through=through)), plain.weight[row_ids])


def test_a_hybrid_counts_rows_that_are_fetched_ahead_in_training(tmp_path):
    table = build_table(ROWS, DIM, TableConfig(tier="hybrid", hot_rows=2, path=str(tmp_path)))
    table.load_rows(0, random_rows())
    table.count_accesses = True
    row_ids = torch.tensor([5, 7, 5])
    with RowPrefetcherThread() as through:
        for ids in (table.prefetch(row_ids, through=through), row_ids):
            table.lookup(ids).sum().backward()
    assert table.rebalance() == 2
    assert sorted(table.hot_ids.tolist()) == [5, 7]
    assert table.counts.counts.tolist() == [4, 2]


def test_a_copied_hybrid_has_the_rows_of_now():
    table = build_table(ROWS, DIM, TableConfig(tier="hybrid", hot_rows=3))
    table.load_rows(0, random_rows())
    table.promote(torch.tensor([5]))
    with torch.no_grad():
        table.lookup(torch.tensor([5]))
        table.update_rows(torch.tensor([5]), lambda rows: rows * 0 + 5)
        assert bool((copy.deepcopy(table).lookup(torch.tensor([5])) == 5).all())


@pytest.mark.parametrize("tier", ["host", "mmap"])
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_hot_rows_follow_when_rows_are_loaded(tmp_path, tier, dtype):
    files = {"path": str(tmp_path)} if tier == "mmap" else {}
    table = build_table(ROWS, DIM, TableConfig(tier="hybrid", hot_rows=3, dtype=dtype, **files))
    table.load_rows(0, torch.ones(ROWS, DIM))
    table.promote(torch.tensor([0, 5]))
    rows = torch.tensor([0, 1, 5])
    with torch.no_grad():
        assert bool((table.lookup(rows) == 1).all())
        table.load_rows(0, torch.full((ROWS, DIM), 7.0))
        assert bool((table.lookup(rows) == 7).all())


@pytest.mark.parametrize("mapped", [False, True])
def test_stored_rows_come_in_any_layout_and_only_in_their_number(tmp_path, mapped):
    form = row_format("float8")
    table = QuantisedMmapTable(9, 32, "float8", tmp_path / "rows", "r+") if mapped else QuantisedTable(9, 32, "float8")
    values, scales = form.encode(random_rows()[:8, :1].repeat(1, 32) + torch.arange(32))
    bits = values.view(torch.uint8)
    table.load_stored(0, bits[::2], scales[::2])  # as bytes, with gaps between them
    assert torch.equal(table.weight[:4].view(torch.uint8), bits[::2])
    assert torch.equal(table.scales[:4], scales[::2])
    table.load_stored(4, values[:1], scales[::8])
    assert torch.equal(table.weight[4].view(torch.uint8), bits[0])
    assert torch.equal(table.scales[4], scales[0])
    before = table.scales.clone()
    with pytest.raises(TableError, match=r"got scales \[5, 1\] of 2 rows, expected \[2, 1\]"):
        table.load_stored(0, values[:2], scales[:5])
    assert torch.equal(table.scales, before)


def test_read_only_rows_are_not_trained(tmp_path):
    """Steps would be lost with the pages that they went into."""
    MmapTable(ROWS, DIM, tmp_path / "rows", "r+").load_rows(0, random_rows())
    table = MmapTable(ROWS, DIM, tmp_path / "rows")
    assert not table.can_be_trained
    table.requires_grad_(True)
    with pytest.raises(TableError, match="mapped read-only: its rows cannot be trained"):
        table.lookup(torch.tensor([3]))
    with torch.no_grad():
        assert torch.equal(table.lookup(torch.tensor([3])), random_rows()[3:4])


@pytest.mark.parametrize("form", QUANTISED)
def test_stored_rows_are_put_in_bit_for_bit(make, form):
    """Values and scales that no encoder would choose: the largest value is not the largest code."""
    table = make(form)
    cold = table.cold if isinstance(table, HybridTable) else table
    values = torch.randint(1, 5, (20, cold.weight.shape[1])).to(torch.uint8).view(cold.weight.dtype)
    scales = torch.full_like(cold.scales[:20], 100)
    cold.load_stored(7, values, scales)
    stored, of_them = cold.read_stored(torch.arange(7, 27))
    assert torch.equal(stored.view(torch.uint8), values.view(torch.uint8))
    assert torch.equal(of_them, scales)
    assert torch.equal(table.lookup(torch.arange(7, 27)), row_format(form).decode(values, scales))


def test_row_files_of_another_format_are_refused(tmp_path):
    def build(dtype, rows=ROWS):
        return build_table(rows, DIM, TableConfig(tier="mmap", dtype=dtype, path=str(tmp_path)))

    build("float16").load_rows(0, random_rows())
    for dtype, rows in (("bfloat16", ROWS), ("int8", ROWS), ("float16", ROWS - 1)):
        with pytest.raises(TableError, match=r"got rows stored as \{'format': 'float16', 'rows': 300, 'dim': 16\}"):
            build(dtype, rows)
    assert torch.equal(build("float16").lookup(torch.arange(ROWS)), random_rows().half())
    (tmp_path / "layer-0.rows").unlink()
    build("bfloat16")  # its rows are gone, so it is nobody's


def test_one_budget_of_pages_for_all_tables(tmp_path):
    program = f"""
import torch
from engram.tables import MmapTable, rowfile
BUDGET = 16 << 20
tables = [MmapTable(4 * BUDGET // 256, 64, f"{tmp_path}/{{i}}", "r+", resident_bytes=BUDGET) for i in range(4)]
start, peak = rowfile._resident(), 0
for part in torch.arange(tables[0].rows).split(1 << 12):
    for table in tables:
        table.load_rows(int(part[0]), part.float().unsqueeze(1).expand(-1, 64))
        peak = max(peak, rowfile._resident() - start)
for table in tables:
    with torch.no_grad():
        assert torch.equal(table.lookup(torch.arange(0, table.rows, 999))[:, 3], torch.arange(0, table.rows, 999).float())
print(peak / BUDGET)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1.5


@pytest.mark.skipif(sys.platform != "linux", reason="counts resident pages as Linux does")
def test_pages_are_taken_before_they_are_written(monkeypatch):
    monkeypatch.setattr("engram.tables.memory._PART", 24 << 20)  # more than one
    rows = lazy_zeros((70 << 18,), torch.float32, "test")
    rows[7], rows[-1] = 3.0, 5.0
    before = _resident_bytes()
    take_pages(rows)
    if _resident_bytes() == before:
        pytest.skip("this kernel cannot take pages ahead")
    assert _resident_bytes() - before > 60 << 20
    assert (rows[7], rows[-1], rows.sum()) == (3.0, 5.0, 8.0)
    take_pages(torch.zeros(5))  # too small to be worth a thread


def test_what_memory_there_is_may_be_told(monkeypatch):
    monkeypatch.setenv("ENGRAM_AVAILABLE_MEMORY", "1e8")
    assert available_memory() == 100_000_000
    with pytest.raises(TableError, match="expected at most the 100,000,000 bytes available"):
        HostTable(1_000_000, 64)
    for wrong in ("much", "inf", "nan"):
        monkeypatch.setenv("ENGRAM_AVAILABLE_MEMORY", wrong)
        with pytest.raises(ConfigError, match="expected a number of bytes"):
            available_memory()


def test_tables_that_do_not_fit_are_refused_before_they_are_made(monkeypatch):
    monkeypatch.setattr("engram.tables.memory.available_memory", lambda: 100 << 20)
    rows = (101 << 20) // 256
    for make in (
        lambda: DeviceTable(rows, 64),
        lambda: HostTable(rows, 64),
        lambda: QuantisedTable(rows * 4, 64, "int8"),
        lambda: build_table(rows, 64, TableConfig(tier="hybrid", hot_rows=3)),
    ):
        with pytest.raises(
            TableError, match=r"got a table of 1\d\d,\d\d\d,\d\d\d bytes, expected at most the 104,857,600 bytes available"
        ):
            make()
    DeviceTable(rows, 32)
    config = tiny_config(engram_vocab_size=450_000)  # two layers, each of which would fit
    for placement in (None, TableConfig(tier="host")):
        model = tiny_model()
        with pytest.raises(TableError, match="expected at most the 104,857,600 bytes available"):
            get_engram_model(model, config, tiny_tokenizer(), placement)
        assert not any(m._forward_pre_hooks for m in model.modules())


def test_room_is_asked_for_where_the_rows_will_be(monkeypatch):
    monkeypatch.setattr("engram.tables.memory.available_memory", lambda: 100 << 20)
    monkeypatch.setattr("engram.tables.memory._accelerator_memory", lambda device: 300 << 20)
    rows = [(101 << 20) // 256] * 2
    check_room(rows, 64, TableConfig(), device="cuda:1")
    for fields, device in (({}, "cpu"), ({"tier": "host"}, "cuda:1"), ({"tier": "hybrid", "hot_rows": 1}, "cuda:1")):
        with pytest.raises(TableError, match="expected at most the 104,857,600 bytes available"):
            check_room(rows, 64, TableConfig(**fields), device=device)
    with pytest.raises(TableError, match="expected at most the 314,572,800 bytes available"):
        check_room(rows * 2, 64, TableConfig(), device="cuda:1")


def test_impossible_placements_are_refused():
    with pytest.raises(ConfigError, match="got 'tape'"):
        TableConfig(tier="tape")
    with pytest.raises(ConfigError, match="got 'int2'"):
        TableConfig(dtype="int2")
    with pytest.raises(ConfigError, match="expected None unless tier is 'mmap'"):
        TableConfig(path="x")
    for fields, message in (
        ({"tier": "hybrid"}, "expected a number of rows when tier is 'hybrid'"),
        ({"hot_rows": 3}, "expected None unless tier is 'hybrid'"),
        ({"tier": "hybrid", "hot_rows": 0}, "hot_rows: got 0, expected a positive int"),
        ({"tier": "mmap", "resident_bytes": -1}, "resident_bytes: got -1"),
        ({"resident_bytes": 1 << 20}, "expected None unless rows are in files"),
    ):
        with pytest.raises(ConfigError, match=message):
            TableConfig(**fields)
    with pytest.raises(ConfigError, match="without a path"):
        build_table(4, 4, TableConfig(tier="mmap"))
    assert float(
        build_table(400, 64, TableConfig(dtype="int8"), init="normal").lookup(torch.arange(400)).std()
    ) == pytest.approx(1, abs=0.05)
    with pytest.raises(ConfigError, match="verified rows"):
        build_table(4, 4, TableConfig(tier="host"), verified=True)
    with pytest.raises(TableError, match="with scales"):
        QuantisedTable(4, 4, "float32")
    with pytest.raises(TableError, match="with scales"):
        QuantisedMmapTable(4, 4, "float32", "nowhere")


# -- whole memories -------------------------------------------------------------------------------------------------------------------

IDS = torch.randint(2, 300, (2, 12), generator=torch.Generator().manual_seed(5))


def trained_memory(placement=None):
    memory = get_engram_model(tiny_model(), tiny_config(table_init="normal"), tiny_tokenizer(), placement)
    for engram in memory.engrams.values():
        table = engram.table
        table.load_rows(0, random_rows(table.rows, table.dim, 3))
    return memory


def logits(memory):
    with torch.no_grad():
        return memory(input_ids=IDS, use_cache=False).logits


def test_a_new_memory_does_not_start_with_the_rows_of_another(tmp_path):
    placement = TableConfig(tier="mmap", path=str(tmp_path / "rows"))

    def new(**changes):
        config = tiny_config(table_init="zero")
        return get_engram_model(tiny_model(), config, tiny_tokenizer(), dataclasses.replace(placement, **changes))

    def rows(memory):
        return [memory.engrams[layer].table.lookup(torch.arange(5)) for layer in memory.engrams]

    memory = new()
    for engram in memory.engrams.values():
        engram.table.update_rows(torch.arange(5), lambda values: values + 1)
    with pytest.raises(TableError, match=r"layer-0\.rows exists: .*changed_rows='keep'"):
        new()
    assert all(bool((part == 1).all()) for part in rows(memory))
    del memory, engram
    assert all(bool((part == 1).all()) for part in rows(new(changed_rows="keep")))


def test_memories_are_carried_between_all_tiers(tmp_path):
    memory = trained_memory()
    expected = logits(memory)
    memory.save_pretrained(tmp_path / "device")
    memory.unload()
    placements = {
        "host": TableConfig(tier="host"),
        "mapped": TableConfig(tier="mmap", path=str(tmp_path / "rows")),
        "hybrid": TableConfig(tier="hybrid", hot_rows=9),
        "hybrid-mapped": TableConfig(tier="hybrid", hot_rows=9, path=str(tmp_path / "cold"), resident_bytes=1 << 20),
        "in-place": TableConfig(tier="mmap"),
        "in-place-in-parts": TableConfig(tier="mmap", resident_bytes=1 << 20),
    }
    source = "device"
    for name, placement in placements.items():
        memory = EngramModel.from_pretrained(tiny_model(), tmp_path / source, tiny_tokenizer(), placement)
        assert memory.table_config.tier == placement.tier
        assert torch.equal(logits(memory), expected)
        memory.save_pretrained(tmp_path / name)
        memory.unload()
        source = name
    assert torch.equal(logits(EngramModel.from_pretrained(tiny_model(), tmp_path / source, tiny_tokenizer())), expected)


@pytest.mark.parametrize("form", QUANTISED)
def test_memories_are_quantised_saved_and_read_in_any_format(form, tmp_path):
    memory = trained_memory()
    memory.save_pretrained(tmp_path / "float")
    memory.unload()
    quantised = EngramModel.from_pretrained(tiny_model(), tmp_path / "float", tiny_tokenizer(), TableConfig(dtype=form))
    expected = logits(quantised)
    quantised.save_pretrained(tmp_path / form)
    quantised.unload()
    for placement in (
        None,
        TableConfig(tier="host", dtype=form),
        TableConfig(tier="mmap", dtype=form),
        TableConfig(tier="mmap", dtype=form, path=str(tmp_path / "rows"), resident_bytes=1 << 20),
        TableConfig(tier="hybrid", dtype=form, hot_rows=9),
        TableConfig(tier="hybrid", dtype=form, hot_rows=9, path=str(tmp_path / "cold")),
        TableConfig(),
        TableConfig(tier="host"),
    ):
        memory = EngramModel.from_pretrained(tiny_model(), tmp_path / form, tiny_tokenizer(), placement)
        assert memory.table_config.dtype == (form if placement is None else placement.dtype)
        assert torch.equal(logits(memory), expected)
        memory.unload()


@pytest.mark.parametrize("placement", [TableConfig(tier="mmap"), TableConfig(tier="mmap", path="rows", resident_bytes=1 << 20)])
def test_mapped_rows_are_saved_and_a_truncated_file_is_an_error_then(placement, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    memory = trained_memory()
    expected = logits(memory)
    memory.save_pretrained(tmp_path / "a")
    memory.unload()
    memory = EngramModel.from_pretrained(tiny_model(), tmp_path / "a", tiny_tokenizer(), placement)
    memory.save_pretrained(tmp_path / "b")
    assert torch.equal(logits(EngramModel.from_pretrained(tiny_model(), tmp_path / "b", tiny_tokenizer())), expected)
    table = memory.engrams["0"].table
    os.truncate(table.path, 4096)
    with pytest.raises(TableError, match="was truncated"):
        memory.save_pretrained(tmp_path / "b")
    assert torch.equal(logits(EngramModel.from_pretrained(tiny_model(), tmp_path / "b", tiny_tokenizer())), expected)


def test_rows_mapped_in_place_are_those_of_one_memory_only(tmp_path):
    memory = trained_memory()
    memory.save_pretrained(tmp_path / "a")
    with torch.no_grad():
        list(memory.engrams.values())[-1].table.weight[-1] += 1
    memory.save_pretrained(tmp_path / "b")
    memory.unload()
    memory = EngramModel.from_pretrained(tiny_model(), tmp_path / "a", tiny_tokenizer(), TableConfig(tier="mmap"))
    with pytest.raises(CheckpointError, match="mapped where they lie"):
        memory.load_memory(tmp_path / "b")
    memory.load_memory(tmp_path / "a")


def test_loading_into_a_memory_leaves_rows_that_nobody_saved(tmp_path):
    placement = TableConfig(tier="mmap", path=str(tmp_path / "rows"), resident_bytes=1 << 24)
    trained_memory().save_pretrained(tmp_path / "a")
    memory = EngramModel.from_pretrained(tiny_model(), tmp_path / "a", tiny_tokenizer(), placement)
    assert memory.table_config == placement  # usable as it is
    weight = next(iter(memory.engrams.values())).table.weight
    saved = weight[0].clone()
    with torch.no_grad():
        weight[0] += 1
    with pytest.raises(CheckpointError, match="trained or edited and not saved"):
        memory.load_memory(tmp_path / "a")
    memory.load_memory(tmp_path / "a", changed_rows="keep")
    assert torch.equal(weight[0], saved + 1)
    memory.load_memory(tmp_path / "a", changed_rows="refill")
    assert torch.equal(weight[0], saved)


def test_rows_mapped_in_place_keep_their_type(tmp_path):
    memory = trained_memory()
    memory.save_pretrained(tmp_path)
    memory.unload()
    with pytest.raises(ConfigError, match="expected the saved dtype 'float32'"):
        EngramModel.from_pretrained(tiny_model(), tmp_path, tiny_tokenizer(), TableConfig(tier="mmap", dtype="bfloat16"))


def test_a_memory_is_trained_where_its_rows_are(tmp_path):
    losses = {}
    for name, placement in PLACEMENTS.items():
        if placement.path is not None:
            placement = dataclasses.replace(placement, path=str(tmp_path / name))
        torch.manual_seed(0)
        memory = trained_memory(placement)
        optimizer = EngramAdamW([p for p in memory.parameters() if p.requires_grad], lr=1e-2)
        losses[name] = []
        for _ in range(4):
            loss = memory(input_ids=IDS, labels=IDS, use_cache=False).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[name].append(loss.item())
    assert losses["device"][-1] < losses["device"][0]
    assert all(found == losses["device"] for found in losses.values())


def test_row_files_are_filled_once_and_trained_rows_are_not_overwritten(tmp_path):
    memory = trained_memory()
    expected = logits(memory)
    memory.save_pretrained(tmp_path / "saved")
    memory.unload()
    placement = TableConfig(tier="mmap", path=str(tmp_path / "rows"))

    def load(**changes):
        return EngramModel.from_pretrained(
            tiny_model(), tmp_path / "saved", tiny_tokenizer(), dataclasses.replace(placement, **changes)
        )

    with pytest.MonkeyPatch.context() as patch:
        filled = []
        patch.setattr(
            MmapTable, "load_rows", lambda table, start, rows: filled.append(start) or DeviceTable.load_rows(table, start, rows)
        )
        memory = load()
        assert torch.equal(logits(memory), expected)
        first = len(filled)
        assert first > 0
        del memory
        memory = load()
        assert torch.equal(logits(memory), expected)
        assert len(filled) == first  # nothing had changed
        optimizer = EngramAdamW([p for p in memory.parameters() if p.requires_grad], lr=1e-2)
        memory(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        optimizer.step()
        trained = logits(memory)
        assert not torch.equal(trained, expected)
        reader = {n: p.clone() for n, p in memory.engrams.named_parameters() if "embedding" not in n}
        del memory, optimizer
        with pytest.raises(CheckpointError, match=r"trained or edited and not saved.*changed_rows='keep'"):
            load()
        memory = load(changed_rows="keep")
        with torch.no_grad():
            for name, parameter in memory.engrams.named_parameters():
                if name in reader:
                    parameter.copy_(reader[name])
        assert torch.equal(logits(memory), trained)
        memory.save_pretrained(tmp_path / "saved")
        del memory
        memory = load()  # what was saved is what the files hold
        assert torch.equal(logits(memory), trained)
        assert len(filled) == first
        del memory
        with open(tmp_path / "rows" / "layer-0.rows", "r+b") as file:
            file.write(b"else")
        assert torch.equal(logits(load(changed_rows="refill")), trained)
        assert len(filled) > first
        for name in ("layer-0.rows", "layer-0.rows.json"):
            (tmp_path / "rows" / name).unlink()
        with open(tmp_path / "rows" / "layer-2.rows", "r+b") as file:
            file.write(b"else")
        with pytest.raises(CheckpointError, match=r"layer-2\.rows holds other rows"):
            load()
        assert is_untouched(tmp_path / "rows" / "layer-0.rows")  # layer 0 was not begun
