"""Moving saved memories: what it costs, what is written, and that nothing but the place changes."""

import os

import pytest
import torch

from engram import CheckpointError, ConfigError, EngramModel, FingerprintError, TableConfig, TableError
from engram.checkpoint import read_description
from engram.models.place import check_fit, count_rows_read, layer_places, place_memory, placement_costs
from engram.tables import FORMATS, DeviceTable, HybridTable, MappedRows
from engram.testing import tiny_config, tiny_model, tiny_tokenizer
from engram.training.tokenizer import train_tokenizer

IDS = torch.randint(2, 300, (2, 9), generator=torch.Generator().manual_seed(1))
TEXT = "The memory is addressed by the last tokens. The memory is addressed by the first tokens."


def load(folder, placement=None):
    return EngramModel.from_pretrained(tiny_model(), folder, tiny_tokenizer(), placement)


@torch.no_grad()
def logits(memory):
    return memory(input_ids=IDS, use_cache=False).logits


def table_of(memory, layer="0"):
    return memory.engrams[layer].multi_head_embedding.embedding


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


def test_row_files_that_cannot_be_written_leave_nothing(saved, tmp_path, monkeypatch):
    def full(handle):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        real = os.fsync
        patch.setattr(
            os, "fsync", lambda handle: full(handle) if "rows" in os.readlink(f"/proc/self/fd/{handle}") else real(handle)
        )
        with pytest.raises(CheckpointError, match="No space left on device"):
            place_memory(saved, tmp_path / "out", TableConfig(tier="mmap", path=str(tmp_path / "r")))
    assert list((tmp_path / "r").iterdir()) == []
    load(tmp_path / "out")  # the memory itself is whole, and makes its row files when it is loaded


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
