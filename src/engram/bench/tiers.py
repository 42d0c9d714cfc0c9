"""The same look-up through every tier, warm and cold."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from engram import native
from engram.bench.gather import random_rows
from engram.bench.setting import RowNumbers, Setting
from engram.tables import DeviceTable, HostTable, MmapTable

__all__ = ["cold_settings", "tier_settings"]

_DIM = 64
_GATHERED = 65_536
_COLD_GATHERED = 4096


def tier_settings(quick: bool) -> Iterator[Setting]:
    """float32 rows, tables from what fits the cache to what does not."""
    for rows in (1 << 14, 1 << 17) if quick else (1 << 14, 1 << 17, 1 << 20, 1 << 22, 1 << 23):
        with tempfile.TemporaryDirectory() as folder:
            yield _warm(rows, Path(folder))


def _warm(rows: int, folder: Path) -> Setting:
    values = random_rows(rows, _DIM)
    numbers = RowNumbers(rows, _GATHERED)
    tables = {
        "device": DeviceTable(rows, _DIM),
        "host": HostTable(rows, _DIM),
        "mmap": MmapTable(rows, _DIM, folder / "r", "r+"),
    }
    for table in tables.values():
        table.load_rows(0, values)
        table.requires_grad_(False)
    tables["mmap"].populate()  # type: ignore[operator]
    plain = tables["device"].weight
    calls: dict[str, Callable[[], object]] = {"F.embedding": lambda: F.embedding(numbers.next(), plain)}
    for name, table in tables.items():
        calls[name] = lambda table=table: table.lookup(numbers.next())  # type: ignore[misc]
    if native.core() is not None:
        calls["limit: random read"] = lambda: native.scan_rows(plain, numbers.next())

    def verify() -> str | None:
        expected = values[numbers.first]
        wrong = [name for name, table in tables.items() if not torch.equal(table.lookup(numbers.first), expected)]
        return f"{', '.join(wrong)}: other rows than indexing gives" if wrong else None

    return Setting(f"{rows:,} rows x {_DIM} float32", calls, "F.embedding", _GATHERED, verify, size=rows, repeats=2)


def cold_settings(quick: bool) -> Iterator[Setting]:
    """Rows of a file that is driven out of memory before every call: touched by many threads, and one after the other."""
    rows = 1 << 17 if quick else 1 << 23
    with tempfile.TemporaryDirectory(dir=os.environ.get("ENGRAM_BENCH_DIR")) as folder:
        table = MmapTable(rows, _DIM, Path(folder) / "rows", "r+")
        values = random_rows(rows, _DIM)
        table.load_rows(0, values)
        table.flush()
        table.requires_grad_(False)
        yield _cold(table, values, RowNumbers(rows, _COLD_GATHERED))


def _cold(table: MmapTable, values: Tensor, numbers: RowNumbers) -> Setting:
    calls: dict[str, Callable[[], Tensor]] = {
        "one after the other": lambda: torch.stack([table.weight[number] for number in numbers.next().tolist()]),
        "engram": lambda: table.lookup(numbers.next()),
    }

    def verify() -> str | None:
        right = torch.equal(table.lookup(numbers.first), values[numbers.first])
        return None if right else "engram gives other rows than were written"

    label = f"{_COLD_GATHERED:,} of {table.rows:,} rows x {_DIM} float32"
    return Setting(label, calls, "one after the other", _COLD_GATHERED, verify, size=table.rows, before=table.evict)
