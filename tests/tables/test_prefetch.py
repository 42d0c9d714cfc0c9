"""Rows fetched ahead are the rows that a look-up gives, gradients included."""

import copy
import os
import pickle

import pytest
import torch

from engram import TableConfig, TableError
from engram.tables import DeviceTable, QuantisedTable, RowHandle, RowPrefetcher, VerifiedTable, build_table
from tests.children import run_python

ROWS, DIM = 300, 16
FLOATS = ["float32", "bfloat16", "float16"]


def random_rows(seed=0):
    return torch.randn(ROWS, DIM, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=["device", "host", "mmap", "int8", "float8", "int4", "host int8"])
def table(request, tmp_path):
    tier, _, form = request.param.partition(" ")
    config = TableConfig(
        tier=tier if tier in ("device", "host", "mmap") else "device",
        dtype=form or (tier if tier in ("int8", "float8", "int4") else "float32"),
        path=str(tmp_path) if tier == "mmap" else None,
    )
    table = build_table(ROWS, DIM, config)
    table.load_rows(0, random_rows())
    return table


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prefetched_rows_are_the_rows(table, dtype):
    prefetcher = RowPrefetcher(True)
    numbers = torch.randint(ROWS, (2, 5, 3))
    expected = table.lookup(numbers, dtype).detach()
    handle = table.prefetch(numbers, dtype, prefetcher)
    assert isinstance(handle, RowHandle)
    with torch.no_grad():
        assert torch.equal(table.lookup(handle), expected)
        assert torch.equal(table.read(numbers, dtype), expected)
        out = torch.empty(2, 5, 3, DIM, dtype=dtype)
        assert table.read(numbers, dtype, out) is out
        assert torch.equal(out, expected)
    prefetcher.close()
    assert torch.equal(table.prefetch(numbers, dtype, prefetcher).wait(), expected)


def test_gradients_reach_the_rows(table):
    if isinstance(table, QuantisedTable):
        pytest.skip("rows in fewer bits have no gradient")
    plain = DeviceTable(ROWS, DIM)
    plain.load_rows(0, random_rows())
    numbers, weight = torch.tensor([[5, 9, 5], [0, 299, 9]]), torch.randn(2, 3, DIM)
    rows = table.lookup(table.prefetch(numbers, torch.float32, RowPrefetcher(True)))
    (rows * weight).sum().backward()
    (plain.lookup(numbers) * weight).sum().backward()
    assert table.weight.grad.is_sparse
    assert torch.equal(table.weight.grad.coalesce().indices(), plain.weight.grad.coalesce().indices())
    assert torch.equal(table.weight.grad.to_dense(), plain.weight.grad.to_dense())


def test_two_uses_of_one_handle(table):
    """As when a checkpointed layer is computed again."""
    handle = table.prefetch(torch.tensor([1, 2]), torch.float32, RowPrefetcher(True))
    first, second = table.lookup(handle), table.lookup(handle)
    assert torch.equal(first, second)
    if table.weight.requires_grad:
        (first.sum() + 2 * second.sum()).backward()
        assert torch.equal(table.weight.grad.to_dense()[1:3], torch.full((2, DIM), 3.0))


def test_where_it_pays(tmp_path):
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    device, host = build_table(4, 4), build_table(4, 4, TableConfig(tier="host"))
    mapped = build_table(4, 4, TableConfig(tier="mmap", path=str(tmp_path)))
    pays = {name: [RowPrefetcher().pays(t, d) for t in (device, host, mapped)] for name, d in (("cpu", cpu), ("cuda", cuda))}
    assert pays == {"cpu": [False, False, True], "cuda": [False, True, True]}
    numbers = torch.tensor([1])
    assert device.prefetch(numbers, None, RowPrefetcher()) is numbers
    assert mapped.prefetch(numbers, None, RowPrefetcher(False)) is numbers
    assert mapped.prefetch(numbers) is numbers  # touched, at once
    assert VerifiedTable(4, 4).prefetch(numbers, None, RowPrefetcher(True)) is numbers


def test_what_goes_wrong_is_said_when_rows_are_wanted(tmp_path):
    table = build_table(ROWS, DIM, TableConfig(tier="mmap", path=str(tmp_path)))
    handle = table.prefetch(torch.tensor([ROWS]), None, RowPrefetcher())
    with pytest.raises(IndexError, match="row number 300 is out of range"):
        handle.wait()
    (tmp_path / "layer-0.rows").write_bytes(b"")
    with pytest.raises(TableError, match="was truncated"):
        table.prefetch(torch.tensor([0]), None, RowPrefetcher()).wait()


def test_static_buffers_stay_where_they_are(table):
    prefetcher, seen = RowPrefetcher(True, static=True), set()
    for step in range(5):
        numbers = torch.randint(ROWS, (4, 1, 8), generator=torch.Generator().manual_seed(step))
        handle = table.prefetch(numbers, torch.float32, prefetcher)
        with torch.no_grad():
            rows = table.lookup(handle)
            assert torch.equal(rows, table.lookup(numbers))
        seen.add((handle.row_ids.data_ptr(), rows.data_ptr()))
    assert len(seen) == 1


def test_copies_leave_threads_and_buffers_behind():
    prefetcher, table = RowPrefetcher(True, static=True), DeviceTable(4, 4)
    prefetcher.start(table, torch.tensor([1]), torch.float32).wait()
    for twin in (copy.deepcopy(prefetcher), pickle.loads(pickle.dumps(prefetcher))):
        assert (twin.mode, twin.static, twin._thread, twin._buffers) == (True, True, None, {})


class FakeCuda:
    """Streams and events that write down what is asked of them; tensors stay on the CPU."""

    def __init__(self, patch):
        log = self.log = []

        class Event:
            def record(self, stream):
                log.append(("record", id(self), stream.name))

        class Stream:
            def __init__(self, *_, name="side"):
                self.name = name

            def wait_event(self, event):
                log.append(("wait", id(event), self.name))

            def __enter__(self):
                log.append(("enter", self.name))

            def __exit__(self, *_):
                log.append(("leave", self.name))

        main = Stream(name="main")
        patch.setattr(torch.cuda, "Event", Event)
        patch.setattr(torch.cuda, "Stream", Stream)
        patch.setattr(torch.cuda, "stream", lambda stream: stream)
        patch.setattr(torch.cuda, "current_stream", lambda *_: main)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        patch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: log.append(("in use by", stream.name)))


def test_the_order_of_events_on_a_side_stream(monkeypatch):
    """The side stream waits for the numbers, the reader for the rows, and memory used across streams is declared."""
    cuda, table, prefetcher = FakeCuda(monkeypatch), DeviceTable(ROWS, DIM), RowPrefetcher(True)
    monkeypatch.setattr(DeviceTable, "is_read_by", lambda *_: True)
    handle = prefetcher._start_on_stream(table, torch.tensor([1]), torch.float32, None)
    cuda.log.append("elsewhere")
    handle.wait()
    numbers_known, rows_here = cuda.log[0][1], cuda.log[4][1]
    assert cuda.log == [
        ("record", numbers_known, "main"),
        ("enter", "side"),
        ("wait", numbers_known, "side"),
        ("in use by", "side"),
        ("record", rows_here, "side"),
        ("leave", "side"),
        "elsewhere",
        ("wait", rows_here, "main"),
        ("in use by", "main"),
    ]
    monkeypatch.setattr(DeviceTable, "is_read_by", lambda *_: False)
    with pytest.raises(TableError, match="which a graph cannot repeat"):
        prefetcher._start_on_stream(table, torch.tensor([1]), torch.float32, None)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_fetches_by_a_thread_of_its_own():
    """The child of a process that has prefetched: it inherits the executor, and no thread."""
    script = """
import os, signal, torch
from engram.tables import DeviceTable, RowPrefetcher
table, prefetcher, numbers = DeviceTable(9, 4), RowPrefetcher(True), torch.tensor([1, 2])
table.load_rows(0, torch.arange(36.0).view(9, 4))
before = table.prefetch(numbers, torch.float32, prefetcher).wait()
child = os.fork()
if child == 0:
    signal.alarm(20)
    same = torch.equal(table.prefetch(numbers, torch.float32, prefetcher).wait(), before)
    prefetcher.close()
    os._exit(0 if same else 1)
prefetcher.close()
print(os.waitpid(child, 0)[1])
"""
    done = run_python("-c", script, check=True)
    assert done.stdout.split() == ["0"]
