"""Rows fetched before they are needed: on a side stream of a CUDA device, or by a thread beside the CPU's computation.

Addresses depend on token ids alone, so everything a forward pass will read is known when it starts, and the bus or the disk can work
while the blocks below compute.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from engram.errors import TableError

if TYPE_CHECKING:
    from engram.tables.base import EmbeddingTable

__all__ = ["RowHandle", "RowPrefetcher", "not_in_graphs"]


class RowHandle:
    """Rows on their way. ``EmbeddingTable.lookup`` takes it in place of the numbers.

    Attributes:
        row_ids: int64 ``[...]``, the numbers asked for.
    """

    def __init__(self, row_ids: Tensor, fetched: Future[Any] | tuple[Tensor, Any]) -> None:
        self.row_ids = row_ids
        self._fetched = fetched

    def wait(self) -> Tensor:
        """The rows ``[..., dim]``: at once on the CPU's side where a stream fetches them (the current stream waits), else when they are here.

        Raises:
            IndexError, TableError: what the look-up raised.
        """
        rows, done = self._fetched.result() if isinstance(self._fetched, Future) else self._fetched
        if done is not None:
            current = torch.cuda.current_stream(rows.device)
            current.wait_event(done)
            rows.record_stream(current)  # or the allocator would give the memory away while this stream reads it
        return rows


def not_in_graphs(table: EmbeddingTable) -> TableError:
    """What is wrong with a table in a CUDA graph whose rows the device does not read by itself."""
    return TableError(
        f"CUDA graph: rows in {table.location} pass through the CPU, which a graph cannot repeat; use tier 'device', or 'host' "
        "where its memory can be page-locked."
    )


class RowPrefetcher:
    """Fetches the rows of several tables ahead of their use.

    Args:
        mode: True prefetches from every table, False from none, None where it pays: on CUDA from tables that are elsewhere, on the CPU
            from mapped files, whose rows may have to come from a disk.
        static: keep one buffer of numbers and one of rows for every table and size, and use them again at each call: addresses stay
            what they were and nothing is allocated, as a CUDA graph needs it. Rows are then good until the next call, and have no gradient.
    """

    def __init__(self, mode: bool | None = None, static: bool = False) -> None:
        self.mode, self.static = mode, static
        self._streams: dict[torch.device, Any] = {}
        self._thread: ThreadPoolExecutor | None = None
        self._process = os.getpid()  # whose thread it is: a forked child inherits the object without it
        self._buffers: dict[tuple[Any, ...], Tensor] = {}

    def pays(self, table: EmbeddingTable, device: torch.device) -> bool:
        """Whether rows of ``table``, wanted on ``device``, shall be fetched ahead."""
        if self.mode is not None:
            return self.mode
        return table.tier == "mmap" if device.type == "cpu" else device.type == "cuda" and table.tier != "device"

    def start(self, table: EmbeddingTable, row_ids: Tensor, dtype: torch.dtype) -> RowHandle:
        """Begin to fetch rows in ``dtype`` to the device of ``row_ids`` (int64, any shape).

        Raises:
            TableError: a CUDA graph is being captured and the table cannot be read by the device itself.
        """
        out = None
        if self.static:
            row_ids = self._buffer(table, row_ids.shape, torch.int64, row_ids.device).copy_(row_ids)
            out = self._buffer(table, (*row_ids.shape, table.dim), dtype, row_ids.device)
        if row_ids.device.type == "cuda":
            return self._start_on_stream(table, row_ids, dtype, out)

        def fetch() -> tuple[Tensor, None]:
            with torch.no_grad():  # grad mode belongs to a thread
                return table.read(row_ids, dtype, out), None

        return RowHandle(row_ids, self._in_thread(fetch))

    def close(self) -> None:
        """End the thread and forget streams and buffers; they come back when needed."""
        if self._thread is not None and self._process == os.getpid():
            self._thread.shutdown()
        self._thread = None
        self._streams.clear()
        self._buffers.clear()

    def _start_on_stream(self, table: EmbeddingTable, row_ids: Tensor, dtype: torch.dtype, out: Tensor | None) -> RowHandle:
        device = row_ids.device
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        side, numbers_known = self._streams[device], torch.cuda.Event()
        # Whatever reads the static buffers of the last call was enqueued before this point, too.
        numbers_known.record(torch.cuda.current_stream(device))

        def fetch() -> tuple[Tensor, Any]:
            with torch.no_grad(), torch.cuda.stream(side):
                side.wait_event(numbers_known)
                rows, done = table.read(row_ids, dtype, out), torch.cuda.Event()
                row_ids.record_stream(side)
                done.record(side)
            return rows, done

        if table.is_read_by(device):
            return RowHandle(row_ids, fetch())
        if torch.cuda.is_current_stream_capturing():
            raise not_in_graphs(table)
        # The CPU would wait for the numbers here, and so for all that is enqueued.
        return RowHandle(row_ids, self._in_thread(fetch))

    def _in_thread(self, fetch: Callable[[], tuple[Tensor, Any]]) -> Future[Any]:
        if self._thread is None or self._process != os.getpid():
            self._process = os.getpid()
            self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engram-prefetch")
        return self._thread.submit(fetch)

    def _buffer(self, table: EmbeddingTable, shape: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
        key = (id(table), tuple(shape), dtype, device)
        if key not in self._buffers:
            self._buffers[key] = torch.zeros(tuple(shape), dtype=dtype, device=device)
        return self._buffers[key]

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles leave threads, streams and buffers behind."""
        return {**self.__dict__, "_streams": {}, "_thread": None, "_buffers": {}}
