"""Moving saved memories: what it costs, what is written, and that nothing but the place changes."""

import gc
import os
import shutil

import pytest
import torch

from engram import CheckpointError, ConfigError, EngramModel, FingerprintError, TableConfig, TableError
from engram.checkpoint import read_description
from engram.checkpoint.convert import StoredTable, convert_memory
from engram.models import place
from engram.models.place import check_fit, count_rows_read, layer_places, place_memory, placement_costs
from engram.tables import FORMATS, DeviceTable, HybridTable, MappedRows, QuantisedMmapTable, build_table, rows_are
from engram.tables.rownotes import row_stamp
from engram.testing import tiny_config, tiny_memory, tiny_model, tiny_tokenizer
from engram.training.tokenizer import train_tokenizer
from tests.children import run_python

IDS = torch.randint(2, 300, (2, 9), generator=torch.Generator().manual_seed(1))
TEXT = "The memory is addressed by the last tokens. The memory is addressed by the first tokens."


def load(folder, placement=None):
    return EngramModel.from_pretrained(tiny_model(), folder, tiny_tokenizer(), placement)


@torch.no_grad()
def logits(memory):
    return memory(input_ids=IDS, use_cache=False).logits


def table_of(memory, layer="0"):
    return memory.engrams[layer].table


def test_places_and_costs_are_told(saved):
    layers = layer_places(saved)
    assert [layer.layer_id for layer in layers] == list(tiny_config().layer_ids)
    for layer in layers:
        with open(layer.file, "rb") as file:
            file.seek(layer.offset)
            rows = torch.frombuffer(bytearray(file.read(layer.bytes)), dtype=torch.float32).view(layer.rows, layer.dim)
        assert torch.equal(rows, table_of(load(saved), str(layer.layer_id)).weight)
    costs = {(cost.tier, cost.dtype): cost for cost in placement_costs(saved, hot_rows=10)}
    assert len(costs) == 4 * len(FORMATS)
    size = sum(layer.bytes for layer in layers)
    assert costs["device", "float32"].device_bytes == costs["host", "float32"].host_bytes == size
    assert costs["host", "bfloat16"].host_bytes == size // 2
    assert (costs["mmap", "float32"].disk_bytes, costs["mmap", "float16"].disk_bytes) == (0, size // 2)  # in place, or a copy
    assert (costs["hybrid", "float32"].device_bytes, costs["hybrid", "float32"].host_bytes) == (2 * 10 * 16, size)
    assert all(cost.rows_per_second > 0 and cost.fits for cost in costs.values())


def test_what_does_not_fit_is_refused_with_both_figures(saved, monkeypatch):
    monkeypatch.setattr("engram.models.place.available_memory", lambda: 1000)
    assert {cost.tier for cost in placement_costs(saved, measure=False) if cost.fits} == {"mmap"}
    size = sum(layer.bytes for layer in layer_places(saved))
    for placement in (TableConfig(), TableConfig(tier="host"), TableConfig(tier="hybrid", hot_rows=4)):
        with pytest.raises(TableError, match=rf"needs {size:,} bytes \((device|host)\), 1,000 are available"):
            place_memory(saved, saved.parent / "out", placement)
    check_fit(saved, TableConfig(tier="mmap"))
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 2000}))
    with pytest.raises(TableError, match=rf"needs {size:,} bytes \(disk\), 2,000 are available"):
        check_fit(saved, TableConfig(tier="mmap", path=str(saved.parent / "rows")))
    assert not (saved.parent / "out").exists()


def test_row_files_and_the_copy_beside_them_must_fit_together(saved, monkeypatch):
    size, whole = sum(layer.bytes for layer in layer_places(saved)), (saved / layer_places(saved)[0].file).stat().st_size
    form, (width,) = FORMATS["int8"], {layer.dim for layer in layer_places(saved)}
    small = sum(layer.rows for layer in layer_places(saved)) * form.row_bytes(width)
    placement = TableConfig(tier="mmap", dtype="int8", path=str(saved.parent / "rows"))
    needed = small + whole - size + small  # row files, and a copy whose rows are small too
    for free, fits in ((needed - 1, False), (needed, True)):
        monkeypatch.setattr("shutil.disk_usage", lambda path, free=free: type("Usage", (), {"free": free}))
        check_fit(saved, placement)
        if fits:
            check_fit(saved, placement, saved.parent / "out")
            continue
        with pytest.raises(TableError, match=rf"needs {needed:,} bytes \(disk\), {free:,} are available"):
            place_memory(saved, saved.parent / "out", placement)
    assert not (saved.parent / "out").exists()


def test_a_placed_memory_loads_where_it_was_placed(saved, tmp_path):
    expected = logits(load(saved))
    place_memory(saved, tmp_path / "inside", TableConfig(tier="mmap", resident_bytes=1 << 20))
    memory = load(tmp_path / "inside")
    assert (table_of(memory).tier, table_of(memory).mode) == ("mmap", "r")
    assert torch.equal(logits(memory), expected)
    hot = {i: torch.tensor([7, 3, 200, 5]) for i in tiny_config().layer_ids}
    place_memory(saved, tmp_path / "mixed", TableConfig(tier="hybrid", hot_rows=3, path=str(tmp_path / "rows")), hot)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MappedRows, "load_rows", None)  # the row files are there: nothing is filled
        memory = load(tmp_path / "mixed")
    assert isinstance(table_of(memory), HybridTable)
    assert table_of(memory).hot_ids.tolist() == [3, 7, 200]
    assert torch.equal(logits(memory), expected)
    memory.save_pretrained(tmp_path / "again")  # where it lives is not what it is
    assert "placement" not in read_description(tmp_path / "again")
    del memory
    for file in (tmp_path / "rows").iterdir():
        file.unlink()
    assert torch.equal(logits(load(tmp_path / "mixed")), expected)  # made anew from the saved rows
    assert isinstance(table_of(load(tmp_path / "mixed", TableConfig())), DeviceTable)
    with pytest.raises(ConfigError, match="exists already"):
        place_memory(saved, tmp_path / "other", TableConfig(tier="mmap", path=str(tmp_path / "rows")))
    for fields in ({"tier": "tape"}, {"hot_rows": 3}, {"shelf": 1}, {"tier": "mmap", "path": 5}):
        text = (tmp_path / "inside" / "engram.json").read_text()
        (tmp_path / "inside" / "engram.json").write_text(text.replace('"tier": "mmap"', str(fields)[1:-1].replace("'", '"')))
        with pytest.raises(ConfigError):
            load(tmp_path / "inside")
        (tmp_path / "inside" / "engram.json").write_text(text)


def test_row_files_that_are_gone_are_written_anew_with_a_word(saved, tmp_path, caplog, monkeypatch):
    expected, out, rows = logits(load(saved)), tmp_path / "placed", tmp_path / "rows"
    place_memory(saved, out, TableConfig(tier="mmap", dtype="int8", path=str(rows)))

    def said(placement=None):
        caplog.clear()
        with caplog.at_level("WARNING", logger="engram"):
            memory = load(out, placement)
        assert torch.allclose(logits(memory), expected, atol=0.02)
        return [record.getMessage() for record in caplog.records]

    assert said() == []
    gc.collect()
    size, other = ((rows / f"layer-{i}.rows").stat().st_size for i in (0, 2))
    (rows / "layer-0.rows").unlink()
    assert said(TableConfig(dtype="float32")) == []
    assert not (rows / "layer-0.rows").exists()
    (message,) = said()
    assert f"{out}: row files" in message
    assert f"writing {size:,} bytes of saved rows into layer-0.rows in {rows}." in message
    assert "TableConfig(...)" in message
    assert "engram place" in message
    assert "\n" not in message
    gc.collect()
    assert said() == []
    gc.collect()
    shutil.rmtree(rows)
    with monkeypatch.context() as patch:
        patch.setattr(MappedRows, "load_rows", None)
        patch.setattr(QuantisedMmapTable, "load_stored", None)
        with pytest.raises(TypeError):  # killed while it is filled
            said()
    gc.collect()
    (message,) = said()
    assert f"writing {size + other:,} bytes of saved rows into layer-0.rows, layer-2.rows in {rows}." in message
    assert said(TableConfig(tier="mmap", dtype="int8", path=str(tmp_path / "asked"))) == []  # who names the place knows it
    gc.collect()
    shutil.rmtree(rows)
    rows.write_text("no folder")
    with pytest.raises(
        TableError, match=r"cannot map .*layer-0\.rows: .*have the rows elsewhere: .*TableConfig.*`engram place`"
    ):
        load(out)
    rows.unlink()
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": size - 1}))
    with pytest.raises(TableError, match=rf"at most the {size - 1:,} bytes free .*have the rows elsewhere"):
        load(out)


@pytest.mark.parametrize("rows", ["rows", "memory/rows"])
def test_a_memory_and_its_row_files_are_moved_together(saved, tmp_path, rows):
    expected = logits(load(saved))
    (tmp_path / "here").mkdir()
    place_memory(saved, tmp_path / "here" / "memory", TableConfig(tier="mmap", path=tmp_path / "here" / rows))
    (tmp_path / "here").rename(tmp_path / "there")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MappedRows, "load_rows", None)  # they are found: nothing is filled
        memory = load(tmp_path / "there" / "memory")
    assert table_of(memory).path == tmp_path / "there" / rows / "layer-0.rows"
    assert torch.equal(logits(memory), expected)


@pytest.mark.parametrize("form", ["int8", "float8", "int4"])
def test_quantised_rows_are_placed_in_files_and_hybrids(saved, tmp_path, form):
    place_memory(saved, tmp_path / "mapped", TableConfig(tier="mmap", dtype=form))
    memory = load(tmp_path / "mapped")
    assert (table_of(memory).tier, table_of(memory).format_name, table_of(memory).mode) == ("mmap", form, "r")
    expected = logits(memory)
    assert torch.equal(logits(load(saved, TableConfig(dtype=form))), expected)
    hot = {i: torch.tensor([7, 3, 200, 5]) for i in tiny_config().layer_ids}
    placement = TableConfig(tier="hybrid", hot_rows=3, dtype=form, path=str(tmp_path / "rows"))
    place_memory(tmp_path / "mapped", tmp_path / "mixed", placement, hot)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MappedRows, "load_rows", None)  # the row files are there: nothing is filled
        memory = load(tmp_path / "mixed")
    assert table_of(memory).hot_ids.tolist() == [3, 7, 200]
    assert torch.equal(logits(memory), expected)


def row_placement(tmp_path, **fields):
    return TableConfig(tier="mmap", path=str(tmp_path / "r"), **fields)


@pytest.mark.parametrize("failing", ["fsync", "posix_fallocate", "write"])
def test_row_files_that_cannot_be_written_leave_nothing(saved, tmp_path, monkeypatch, failing):
    """The second of two fails, when it is asked for, written or synced; the same works once there is room."""
    calls = []

    def full(*_):
        raise OSError(28, "No space left on device")

    def second_full(handle, *rest):
        name = os.readlink(f"/proc/self/fd/{handle}")
        calls.append(name)
        return full() if "layer-2.rows" in name else real(handle, *rest)

    def blocks(table, tensors):
        yield from list(real_blocks(table, tensors))[:0] if table.layer_id == 2 else real_blocks(table, tensors)
        if table.layer_id == 2:
            full()

    with monkeypatch.context() as patch:
        if failing == "write":
            real_blocks, written = StoredTable.blocks, []
            patch.setattr(
                StoredTable, "blocks", lambda *args: blocks(*args) if "out" in str(args[1].file) else real_blocks(*args)
            )
            calls.append(written)
        else:
            real = getattr(os, failing)
            patch.setattr(os, failing, second_full)
        with pytest.raises(CheckpointError, match=r"layer-2\.rows .*No space left on device"):
            place_memory(saved, tmp_path / "out", row_placement(tmp_path))
        assert calls
    assert not (tmp_path / "r").exists()
    assert not (tmp_path / "out").exists()
    place_memory(saved, tmp_path / "out", row_placement(tmp_path))
    load(tmp_path / "out")


PLACE_AND_DIE = """
import os, sys
from engram import TableConfig
from engram.checkpoint import DESCRIPTION_NAME
from engram.models.place import place_memory
source, out, rows, die = sys.argv[1:]
real = {name: getattr(os, name) for name in ("replace", "link", "posix_fallocate", "utime")}
left = int(die)
def counted(name):
    def call(*args, **kwargs):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), 9)
        return real[name](*args, **kwargs)
    return call
for name in real:
    setattr(os, name, counted(name))
place_memory(source, out, TableConfig(tier="mmap", path=rows))
"""


def test_a_killed_placing_is_done_again(saved, tmp_path):
    expected, kills = logits(load(saved)), -1
    while True:
        kills += 2  # every second place that it can be killed at
        out, rows = tmp_path / f"out-{kills}", tmp_path / f"rows-{kills}"
        done = run_python("-c", PLACE_AND_DIE, saved, out, rows, kills)
        if done.returncode == 0:
            break
        notes = rows.glob(".*.json.*.tmp")
        if not (out / "engram.json").exists():
            place_memory(saved, out, TableConfig(tier="mmap", path=str(rows)))
            notes = ()
        assert {*out.glob(".*.tmp"), *rows.glob(".*.tmp")} <= {*notes}  # half a note goes when the next one is written
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(MappedRows, "load_rows", None)  # the row files are there: nothing is filled
            assert torch.equal(logits(load(out)), expected)
    assert kills > 8


def test_two_placings_do_not_write_into_one_folder(saved, tmp_path, monkeypatch):
    other, real, refused = tmp_path / "other", place.convert_memory, []
    shutil.copytree(saved, other)
    placement = row_placement(tmp_path)

    def slow(*args):
        monkeypatch.setattr(place, "convert_memory", real)
        code = f"from engram.models.place import *; from engram import TableConfig; place_memory({str(other)!r}, {str(tmp_path / 'b')!r}, "
        code += f"TableConfig(tier='mmap', path={placement.path!r}))"
        refused.append(run_python("-c", code).stderr)
        return real(*args)

    monkeypatch.setattr(place, "convert_memory", slow)
    place_memory(saved, tmp_path / "a", placement)
    assert "r is locked: another process" in refused[0]
    assert not (tmp_path / "b").exists()
    with pytest.raises(ConfigError, match="exists already"):
        place_memory(other, tmp_path / "b", placement)
    assert rows_are(
        tmp_path / "r" / "layer-0.rows", row_stamp(read_description(tmp_path / "a")["weights"]["file"], 0, "float32")
    )


def test_a_row_file_that_comes_meanwhile_is_not_replaced(saved, tmp_path, monkeypatch):
    """One that a training makes, which knows nothing of placings."""
    real = place.convert_memory

    def slow(*args):
        build_table(300, 16, row_placement(tmp_path), layer_id=2).load_rows(0, torch.ones(300, 16))
        return real(*args)

    monkeypatch.setattr(place, "convert_memory", slow)
    with pytest.raises(ConfigError, match=r"layer-2\.rows exists already"):
        place_memory(saved, tmp_path / "out", row_placement(tmp_path))
    assert not (tmp_path / "out").exists()
    assert bool((build_table(300, 16, row_placement(tmp_path), layer_id=2).lookup(torch.arange(300)) == 1).all())
    assert not (tmp_path / "r" / "layer-0.rows").exists()


def test_places_are_read_while_somebody_saves(saved, monkeypatch):
    writer, real, saves = load(saved), place.read_description, []

    def late(path):
        description = real(path)
        if not saves:
            saves.append(writer.save_pretrained(path))
        return description

    for read in (layer_places, lambda path: placement_costs(path, measure=False), lambda path: check_fit(path, TableConfig())):
        saves.clear()
        monkeypatch.setattr(place, "read_description", late)
        read(saved)
        assert saves
    saves.clear()
    monkeypatch.setattr("engram.checkpoint.convert.read_description", late)
    place_memory(saved, saved.parent / "copy", TableConfig(tier="host"))
    assert saves


def test_rows_that_texts_ask_for_are_counted(saved):
    counts = count_rows_read(saved, tiny_tokenizer(), [TEXT])
    memory = load(saved)
    for layer_id, engram in memory.engrams.items():
        table = engram.multi_head_embedding
        ids = tiny_tokenizer()(TEXT, return_tensors="pt")["input_ids"]
        rows = table.row_ids(memory.mapping.hash(ids)[int(layer_id)]).flatten()
        expected, number = rows.unique(return_counts=True)
        assert torch.equal(counts[int(layer_id)].rows, expected)
        assert torch.equal(counts[int(layer_id)].counts, number)
    other = train_tokenizer(["completely different text, with other words in it " * 9], vocab_size=330, model_max_length=256)
    with pytest.raises(FingerprintError, match="another tokenizer"):
        count_rows_read(saved, other, [TEXT])


@pytest.mark.parametrize("dtype", ["float32", "float8"])
def test_rows_that_no_save_holds_are_not_left_behind(tmp_path, dtype):
    """What reads a save alone refuses where its row files hold others; files that were copied are known by what is in them."""
    memory = tiny_memory()
    model = memory.base_model
    memory.save_pretrained(tmp_path / "plain")
    memory.unload()
    place_memory(tmp_path / "plain", tmp_path / "placed", TableConfig(tier="mmap", dtype=dtype, path=str(tmp_path / "rows")))
    placed = EngramModel.from_pretrained(model, tmp_path / "placed", tiny_tokenizer())
    convert_memory(tmp_path / "placed", tmp_path / "same", dtype)
    placed.unload()
    del placed
    file = tmp_path / "rows" / "layer-2.rows"
    os.utime(file, (1, 1))
    convert_memory(tmp_path / "placed", tmp_path / "copied", dtype)
    with open(file, "r+b") as rows:
        rows.write(b"\x01\x02\x03")
    with pytest.raises(
        CheckpointError, match=r"layer-2.rows holds other rows than the save.*call save_pretrained.*delete that file"
    ):
        convert_memory(tmp_path / "placed", tmp_path / "other", "float32")
    with pytest.raises(CheckpointError, match="holds other rows"):
        place_memory(tmp_path / "placed", tmp_path / "other", TableConfig(tier="host", dtype=dtype))
    assert not (tmp_path / "other").exists()
    file.unlink()
    convert_memory(tmp_path / "placed", tmp_path / "other", "float32")
