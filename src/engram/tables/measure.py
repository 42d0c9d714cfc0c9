"""A quick look at how fast rows come from a tier on this machine."""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace

import torch

from engram.config import TableConfig
from engram.tables.build import build_table
from engram.tables.hybrid import HybridTable

__all__ = ["rows_per_second"]

_SAMPLE_BYTES = 16 << 20
_BATCH, _SECONDS = 4096, 0.03


def rows_per_second(config: TableConfig, rows: int, dim: int, device: torch.device | str = "cpu") -> float:
    """Rows looked up per second, read as float32, from a small table of this placement that is in memory; a large one is slower.

    Of a hybrid table, half of the rows are hot.

    Args:
        config: tier and format; a path is not used.
        rows: rows of the real table; at most some megabytes of them are made.
        dim: values per row.
        device: of the model.
    """
    rows = max(1, min(rows, _SAMPLE_BYTES // (4 * dim)))
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        in_file = config.tier == "mmap" or (config.tier == "hybrid" and config.path is not None)
        hot_rows = None if config.hot_rows is None else max(1, rows // 2)
        placed = replace(config, path=folder if in_file else None, hot_rows=hot_rows, resident_bytes=None)
        table = build_table(rows, dim, placed).to(device)
        generator = torch.Generator().manual_seed(0)
        table.load_rows(0, torch.randn((rows, dim), generator=generator))
        if isinstance(table, HybridTable):
            table.promote(torch.arange(0, rows, 2)[: table.hot_rows])
        batches = [torch.randint(rows, (_BATCH,), generator=generator).to(device) for _ in range(8)]
        table.lookup(batches[0], torch.float32)
        done, started = 0, time.perf_counter()
        while time.perf_counter() - started < _SECONDS:
            table.lookup(batches[done % len(batches)], torch.float32)
            done += 1
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize()
        return done * _BATCH / (time.perf_counter() - started)
