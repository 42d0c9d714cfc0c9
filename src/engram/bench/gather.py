"""Rows by number from ordinary memory: PyTorch's way, the native gather, and what the machine could do at best."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from engram import native
from engram.bench.setting import RowNumbers, Setting
from engram.ops import lookup_rows
from engram.tables import FORMATS, RowFormat
from engram.tables.formats import chosen

__all__ = ["gather_settings", "random_rows"]

_DIM = 64
_GATHERED = 131_072  # 16 heads x 8,192 tokens
_BLOCK = 1 << 16  # rows that are made at random; the rest are copies, which costs less to make and the same to read


def gather_settings(quick: bool) -> Iterator[Setting]:
    """bfloat16 rows as they are, and every format turned into float32."""
    rows, gathered = (1 << 18, _GATHERED // 8) if quick else (10 << 20, _GATHERED)
    numbers, table = RowNumbers(rows, gathered), random_rows(rows, _DIM).to(torch.bfloat16)
    yield _copying(table, numbers)
    yield _converting(table, numbers)


def random_rows(rows: int, dim: int) -> Tensor:
    """float32 ``[rows, dim]``, random in blocks."""
    block = torch.randn(min(_BLOCK, rows), dim, generator=torch.Generator().manual_seed(1))
    return block.repeat(-(-rows // len(block)), 1)[:rows]


def _copying(table: Tensor, numbers: RowNumbers) -> Setting:
    count = len(numbers.first)
    out = torch.zeros(count, _DIM, dtype=table.dtype)
    calls: dict[str, Callable[[], Any]] = {"F.embedding": lambda: F.embedding(numbers.next(), table)}
    if native.core() is not None:
        calls["engram"] = lambda: lookup_rows(table, numbers.next())
        calls["engram, reused buffer"] = lambda: native.gather_rows(table, numbers.next(), out)
        calls["limit: random read"] = lambda: native.scan_rows(table, numbers.next())

    def verify() -> str | None:
        expected = table[numbers.first]
        if not torch.equal(lookup_rows(table, numbers.first), expected):
            return "engram gives other rows than indexing"
        if native.core() is not None:
            native.gather_rows(table, numbers.first, out)
            if not torch.equal(out, expected):
                return "the reused buffer holds other rows than indexing gives"
        return None

    label = f"bfloat16 rows as they are, {len(table):,} x {_DIM}"
    return Setting(label, calls, "F.embedding", count, verify, size=len(table), repeats=2)


def _converting(table: Tensor, numbers: RowNumbers) -> Setting:
    """Into new tensors, and into one that is used again. The system maps memory for large tensors anew each time, unless somebody keeps it."""
    out = torch.zeros(len(numbers.first), _DIM)
    stored: dict[str, tuple[Tensor, Tensor | None]] = {"bfloat16": (table, None)}
    stored |= {name: _encoded(FORMATS[name], table) for name in ("int8", "float8", "int4")}
    reading = {name: partial(FORMATS[name].read, *tensors) for name, tensors in stored.items()}
    calls: dict[str, Callable[[], Any]] = {
        "F.embedding, then float32": lambda: F.embedding(numbers.next(), table).float(),
        "bfloat16": lambda: reading["bfloat16"](numbers.next()),
    }
    for name, read in reading.items():
        calls[f"{name}, reused buffer"] = lambda read=read: read(numbers.next(), torch.float32, out)  # type: ignore[misc]
    if native.core() is not None:  # no work on the rows, and nothing that makes one wait for the other
        calls["limit: random read, then zeros written"] = lambda: (native.scan_rows(table, numbers.next()), out.zero_())

    def verify() -> str | None:
        for name, (values, scales) in stored.items():
            plain = FORMATS[name].decode(chosen(values, numbers.first), None if scales is None else scales[numbers.first])
            if not torch.equal(reading[name](numbers.first), plain):
                return f"{name} rows come out otherwise than the plain decoding gives"
        return None

    label = f"turned into float32, {len(table):,} x {_DIM}"
    return Setting(label, calls, "F.embedding, then float32", len(numbers.first), verify, size=len(table), repeats=2)


def _encoded(form: RowFormat, table: Tensor) -> tuple[Tensor, Tensor]:
    """The table in another format; as it repeats itself, one block is encoded."""
    block = min(_BLOCK, len(table))
    values, scales = form.encode(table[:block].float())
    assert scales is not None
    copies = -(-len(table) // block)
    whole = values.view(torch.uint8).repeat(copies, 1).view(form.dtype)  # repeat() knows fewer types than tensors do
    return whole[: len(table)], scales.repeat(copies, *[1] * (scales.dim() - 1))[: len(table)]
