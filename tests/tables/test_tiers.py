"""One suite for all tiers: the same look-ups, gradients and training steps, and rows that survive the way from any tier to any other."""

import copy
import pickle
import resource
import subprocess
import sys

import pytest
import torch

from engram import ConfigError, EngramAdamW, EngramModel, TableConfig, TableError, get_engram_model, native
from engram.tables import DeviceTable, HostTable, MmapTable, QuantisedTable, build_table
from engram.testing import tiny_config, tiny_model, tiny_tokenizer

ROWS, DIM = 300, 16


def random_rows(rows=ROWS, dim=DIM, seed=0):
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=["device", "host", "mmap"])
def make(request, tmp_path):
    def build(dtype="float32", rows=ROWS, name="t"):
        path = str(tmp_path / name) if request.param == "mmap" else None
        table = build_table(rows, DIM, TableConfig(tier=request.param, dtype=dtype, path=path))
        assert table.tier == request.param
        table.load_rows(0, random_rows(rows))
        return table

    return build


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_rows_are_looked_up(make, dtype):
    table = make(dtype)
    expected = random_rows().to(getattr(torch, dtype))
    row_ids = torch.randint(ROWS, (3, 7, 2))
    assert torch.equal(table.lookup(row_ids), expected[row_ids])
    got = table.lookup(row_ids, torch.float32)
    assert got.dtype == torch.float32
    assert torch.equal(got, expected[row_ids].float())
    assert (table.rows, table.dim, table.dtype, table.format_name) == (ROWS, DIM, expected.dtype, dtype)
    assert table.nbytes == ROWS * DIM * expected.itemsize
    assert str(table.tier) in repr(table) or table.location in repr(table)
    for wrong in (-1, ROWS):
        with pytest.raises(IndexError):
            table.lookup(torch.tensor([0, wrong]))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
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


def test_training_steps_are_the_same_everywhere(make):
    table, plain = make(), DeviceTable(ROWS, DIM)
    plain.load_rows(0, random_rows())
    optimizers = [EngramAdamW([each.weight], lr=0.1) for each in (table, plain)]
    rng = torch.Generator().manual_seed(1)
    for _ in range(5):
        row_ids, target = torch.randint(ROWS, (20,), generator=rng), torch.randn(20, DIM, generator=rng)
        for each, optimizer in zip((table, plain), optimizers):
            optimizer.zero_grad()
            (each.lookup(row_ids) - target).square().sum().backward()
            optimizer.step()
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


def test_a_truncated_file_is_an_error_not_a_crash(tmp_path):
    file = tmp_path / "rows"
    program = f"""
import os, torch
from engram.tables import MmapTable
from engram import TableError
table = MmapTable(100000, 16, {str(file)!r}, "r+")
os.truncate({str(file)!r}, 4096)
try:
    table.lookup(torch.tensor([99999]))
except TableError as error:
    print("refused:", error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "got 4,096 bytes, expected at least 6,400,000" in done.stdout
    with pytest.raises(TableError, match="was truncated"):
        MmapTable(100_000, 16, file)


def test_files_that_cannot_be_mapped_are_refused(tmp_path):
    with pytest.raises(TableError, match="cannot map"):
        MmapTable(4, 4, tmp_path / "missing")
    with pytest.raises(TableError, match="got mode 'w'"):
        MmapTable(4, 4, tmp_path / "rows", "w")
    with pytest.raises(TableError, match="cannot map"):
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
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    table = MmapTable((2 << 30) // 256, 64, tmp_path / "rows", "r+")
    row_ids = torch.randint(table.rows, (1000,))
    table.update_rows(row_ids.unique(), lambda rows: rows + 1)
    assert bool((table.lookup(row_ids) == 1).all())
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < (1 << 20)  # KiB: far less than the table


# -- quantised rows -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["int8", "float8", "int4"])
@pytest.mark.parametrize("host", [False, True])
def test_quantised_tables_hold_what_their_format_holds(form, host):
    table = QuantisedTable(ROWS, DIM, form, host=host)
    assert bool((table.lookup(torch.arange(ROWS)) == 0).all())
    table.load_rows(0, random_rows())
    expected = table.form.decode(*table.form.encode(random_rows()))
    row_ids = torch.randint(ROWS, (2, 50))
    assert torch.equal(table.lookup(row_ids), expected[row_ids])
    assert table.lookup(row_ids, torch.bfloat16).dtype == torch.bfloat16
    assert torch.equal(torch.cat([rows for _, rows in table.iter_row_blocks(64)]), expected)
    table.update_rows(torch.tensor([7]), lambda rows: rows * 0 + 3)
    assert torch.allclose(table.lookup(torch.tensor([7])), torch.full((1, DIM), 3.0))
    assert torch.equal(table.lookup(torch.tensor([8])), expected[8:9])
    assert table.nbytes < ROWS * DIM * 4 / 2
    table.to(torch.float64)
    assert torch.equal(table.lookup(torch.tensor([8])), expected[8:9])
    with pytest.raises(TableError, match=r"expected 0\.\.299"):
        table.update_rows(torch.tensor([-1]), lambda rows: rows)
    assert (table.tier, table.format_name) == ("host" if host else "device", form)


def test_impossible_placements_are_refused():
    with pytest.raises(ConfigError, match="got 'tape'"):
        TableConfig(tier="tape")
    with pytest.raises(ConfigError, match="got 'int2'"):
        TableConfig(dtype="int2")
    with pytest.raises(ConfigError, match="expected None unless tier is 'mmap'"):
        TableConfig(path="x")
    with pytest.raises(ConfigError, match="tier 'mmap' with dtype 'int8'"):
        TableConfig(tier="mmap", dtype="int8")
    with pytest.raises(ConfigError, match="without a path"):
        build_table(4, 4, TableConfig(tier="mmap"))
    assert float(
        build_table(400, 64, TableConfig(dtype="int8"), init="normal").lookup(torch.arange(400)).std()
    ) == pytest.approx(1, abs=0.05)
    with pytest.raises(ConfigError, match="verified rows"):
        build_table(4, 4, TableConfig(tier="host"), verified=True)
    with pytest.raises(TableError, match="with scales"):
        QuantisedTable(4, 4, "float32")


# -- whole memories -------------------------------------------------------------------------------------------------------------------

IDS = torch.randint(2, 300, (2, 12), generator=torch.Generator().manual_seed(5))


def trained_memory(placement=None):
    memory = get_engram_model(tiny_model(), tiny_config(table_init="normal"), tiny_tokenizer(), placement)
    for engram in memory.engrams.values():
        table = engram.multi_head_embedding.embedding
        table.load_rows(0, random_rows(table.rows, table.dim, 3))
    return memory


def logits(memory):
    with torch.no_grad():
        return memory(input_ids=IDS, use_cache=False).logits


def test_memories_are_carried_between_all_tiers(tmp_path):
    memory = trained_memory()
    expected = logits(memory)
    memory.save_pretrained(tmp_path / "device")
    memory.unload()
    placements = {
        "host": TableConfig(tier="host"),
        "mapped": TableConfig(tier="mmap", path=str(tmp_path / "rows")),
        "in-place": TableConfig(tier="mmap"),
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


@pytest.mark.parametrize("form", ["int8", "float8", "int4"])
def test_memories_are_quantised_saved_and_read_in_any_format(form, tmp_path):
    memory = trained_memory()
    memory.save_pretrained(tmp_path / "float")
    memory.unload()
    quantised = EngramModel.from_pretrained(tiny_model(), tmp_path / "float", tiny_tokenizer(), TableConfig(dtype=form))
    expected = logits(quantised)
    quantised.save_pretrained(tmp_path / form)
    quantised.unload()
    for placement in (None, TableConfig(tier="host", dtype=form), TableConfig(), TableConfig(tier="host")):
        memory = EngramModel.from_pretrained(tiny_model(), tmp_path / form, tiny_tokenizer(), placement)
        assert memory.table_config.dtype == (form if placement is None else placement.dtype)
        assert torch.equal(logits(memory), expected)
        memory.unload()


def test_rows_mapped_in_place_keep_their_type(tmp_path):
    memory = trained_memory()
    memory.save_pretrained(tmp_path)
    memory.unload()
    with pytest.raises(ConfigError, match="expected the saved dtype 'float32'"):
        EngramModel.from_pretrained(tiny_model(), tmp_path, tiny_tokenizer(), TableConfig(tier="mmap", dtype="bfloat16"))


def test_a_memory_is_trained_where_its_rows_are(tmp_path):
    losses = {}
    for name, placement in (
        ("device", None),
        ("host", TableConfig(tier="host")),
        ("mmap", TableConfig(tier="mmap", path=str(tmp_path))),
    ):
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
    assert losses["host"] == losses["mmap"] == losses["device"]
