"""Page-locking, with the CUDA runtime's two calls stood in for: what is locked, when, and that it is unlocked again."""

import copy
import gc
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch

from engram.tables import HostTable, MmapTable, QuantisedTable, pinned
from engram.tables.pinned import PageLock, through_host

DEVICE = torch.device("cuda", 0)


class Runtime:
    def __init__(self, status=0):
        self.status, self.calls, self.capturing = status, [], False

    def cudaHostRegister(self, pointer, size, flags):
        self.calls.append(("lock", pointer, size))
        assert flags == 3
        return self.status

    def cudaHostUnregister(self, pointer):
        self.calls.append(("unlock", pointer))
        if self.capturing:
            raise RuntimeError("operation not permitted when stream is capturing")
        return 0


@pytest.fixture
def runtime(monkeypatch):
    runtime = Runtime()
    monkeypatch.setattr(pinned, "_cudart", lambda: runtime)
    monkeypatch.setattr(pinned, "_clear_error", lambda: runtime.calls.append(("clear",)))
    monkeypatch.setattr(pinned, "_device_view", lambda tensor, device: tensor.view_as(tensor))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: runtime.calls.append(("wait",)))
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda self: False)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: runtime.capturing)
    return runtime


def test_memory_is_locked_once_and_unlocked_when_the_table_goes(runtime):
    table = HostTable(100, 16)
    pointer = table.weight.data_ptr()
    assert table.is_read_by(DEVICE)
    assert table._view_on(DEVICE).data_ptr() == pointer
    assert runtime.calls == [("lock", pointer, 6400)]
    twin, again = copy.deepcopy(table), pickle.loads(pickle.dumps(table))
    assert not twin._lock.active
    assert not again._lock.active
    table.update_rows(torch.tensor([3]), lambda rows: rows + 1)  # not while a device may be reading
    assert runtime.calls[1:] == [("wait",)]
    runtime.calls.pop()
    table.load_state_dict(twin.state_dict())
    assert runtime.calls[1:] == [("wait",)]
    del table
    gc.collect()
    assert runtime.calls[2:] == [("wait",), ("unlock", pointer)]


def test_memory_that_goes_while_a_graph_is_captured_is_kept_and_unlocked_later(runtime):
    table = HostTable(100, 16)
    assert table.is_read_by(DEVICE)
    pointer, where = table.weight.data_ptr(), len(pinned._waiting)
    runtime.capturing = True
    del table
    gc.collect()
    assert [call[0] for call in runtime.calls] == ["lock"]  # nothing that could wait
    assert [tensor.data_ptr() for tensor, _ in pinned._waiting[where:]] == [pointer]  # not given back either
    runtime.capturing = False
    HostTable(50, 16)  # which may need its memory
    assert runtime.calls[1:] == [("wait",), ("unlock", pointer)]
    assert len(pinned._waiting) == where


def test_what_goes_in_any_thread_during_a_capture_is_unlocked_at_its_end(runtime):
    table = HostTable(100, 16)
    assert table.is_read_by(DEVICE)
    pointer, tables = table.weight.data_ptr(), [table]
    del table
    with pinned.nothing_unlocked():
        other = threading.Thread(target=tables.clear)
        other.start()
        other.join()
        assert [call[0] for call in runtime.calls] == ["lock"]
    assert runtime.calls[1:] == [("wait",), ("unlock", pointer)]


def test_memory_that_cannot_be_unlocked_is_never_given_back(runtime, monkeypatch):
    table = HostTable(100, 16)
    assert table.is_read_by(DEVICE)
    pointer = table.weight.data_ptr()
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda self: self.data_ptr() == pointer)
    del table
    gc.collect()
    assert runtime.calls[-1] == ("unlock", pointer)
    ((kept, _),) = pinned._waiting
    assert kept.data_ptr() == pointer
    pinned._waiting.clear()


def test_a_view_is_of_one_byte_first(monkeypatch):
    """Where torch copies to the device instead of looking at the memory, it must not be the whole table."""
    taken = []

    def as_tensor(named, device):
        size = named.__cuda_array_interface__["shape"][0]
        taken.append(size)
        return torch.zeros(size, dtype=torch.uint8)

    monkeypatch.setattr(torch, "as_tensor", as_tensor)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    with pytest.raises(RuntimeError, match="another address"):
        pinned._device_view(torch.randn(100, 16), DEVICE)
    assert taken == [1]


def test_quantised_rows_lock_their_scales_too(runtime):
    table = QuantisedTable(100, 16, "int8", host=True)
    assert table.is_read_by(DEVICE)
    assert [call[0] for call in runtime.calls] == ["lock", "lock"]
    assert not QuantisedTable(100, 16, "int8").is_read_by(DEVICE)


def test_a_refusal_is_said_once_and_not_tried_again(runtime, caplog):
    runtime.status = 2
    table = HostTable(100, 16)
    with caplog.at_level("WARNING", logger="engram"):
        assert not table.is_read_by(DEVICE)
        assert not table.is_read_by(DEVICE)
    assert [call[0] for call in runtime.calls] == ["lock", "clear"]
    assert len(caplog.records) == 1
    assert "6,400 bytes of host memory could not be page-locked for cuda:0 (cudaHostRegister answered 2)" in caplog.text


def test_a_device_that_sees_another_address_is_not_used(runtime, monkeypatch, caplog):
    def elsewhere(tensor, device):
        raise RuntimeError("cuda:0 sees page-locked memory under another address")

    monkeypatch.setattr(pinned, "_device_view", elsewhere)
    with caplog.at_level("WARNING", logger="engram"):
        assert not HostTable(100, 16).is_read_by(DEVICE)
    assert "another address" in caplog.text


def test_one_device_that_sees_another_address_leaves_the_others_alone(runtime, monkeypatch):
    second, see = torch.device("cuda", 1), pinned._device_view

    def view(tensor, device):
        if device == second:
            raise RuntimeError("cuda:1 sees page-locked memory under another address")
        return see(tensor, device)

    monkeypatch.setattr(pinned, "_device_view", view)
    table = HostTable(100, 16)
    assert [table.is_read_by(device) for device in (DEVICE, second, DEVICE, second)] == [True, False, True, False]


def test_every_device_that_reads_is_waited_for(runtime, monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: waited.append(device))
    devices = {DEVICE, torch.device("cuda", 1)}
    table = HostTable(100, 16)
    assert all(table.is_read_by(device) for device in devices)
    table.update_rows(torch.tensor([3]), lambda rows: rows + 1)
    assert set(waited) == devices
    waited.clear()
    del table
    gc.collect()
    assert set(waited) == devices


def test_threads_lock_memory_once(runtime, monkeypatch):
    register = runtime.cudaHostRegister

    def slowly(*args):
        time.sleep(0.05)
        return register(*args)

    monkeypatch.setattr(runtime, "cudaHostRegister", slowly)
    table = HostTable(100, 16)
    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(lambda _: table.is_read_by(DEVICE), range(4)))
    assert [call[0] for call in runtime.calls] == ["lock"]


def test_files_are_never_locked(runtime, tmp_path):
    assert not MmapTable(100, 16, tmp_path / "rows", "r+").is_read_by(DEVICE)
    assert not HostTable(0, 16).is_read_by(DEVICE)
    assert runtime.calls == []


def test_what_is_page_locked_already_is_left_alone(runtime, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda self: True)
    lock = PageLock()
    assert lock.view(torch.ones(3), DEVICE) is not None
    assert not lock.active


def test_bytes_are_named_to_torch_as_they_lie():
    rows = torch.randn(5, 8).to(torch.bfloat16)
    named = pinned._HostBytes(rows).__cuda_array_interface__
    assert named["shape"] == (80,)
    assert named["data"] == (rows.data_ptr(), False)


def test_rows_through_the_cpu():
    data, numbers = torch.randn(20, 4), torch.tensor([[3, 0], [19, 3]])
    fetch = lambda wanted, rows: torch.index_select(data, 0, wanted.view(-1), out=rows.view(-1, 4)).view(2, 2, 4)  # noqa: E731
    assert torch.equal(through_host(fetch, numbers, 4, torch.float32), data[numbers])
    out = torch.empty(2, 2, 4)
    assert through_host(fetch, numbers, 4, torch.float32, out) is out
    assert torch.equal(out, data[numbers])
