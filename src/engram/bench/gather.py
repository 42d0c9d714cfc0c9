"""Rows by number from ordinary memory: PyTorch's way, the native gather, and what the machine could do at best."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from engram import native
from engram.bench.setting import Setting
from engram.ops import lookup_rows
from engram.tables import FORMATS, RowFormat

__all__ = ["gather_settings", "random_rows"]

_DIM = 64
_GATHERED = 131_072  # 16 heads x 8,192 tokens
_BLOCK = 1 << 16  # rows that are made at random; the rest are copies, which costs less to make and the same to read


def gather_settings(quick: bool) -> Iterator[Setting]:
    """bfloat16 rows as they are, and every format turned into float32."""
    rows, gathered = (1 << 18, _GATHERED // 8) if quick else (10 << 20, _GATHERED)
    row_ids = torch.randint(rows, (gathered,), generator=torch.Generator().manual_seed(0))
    table = random_rows(rows, _DIM).to(torch.bfloat16)
    yield _copying(table, row_ids)
    yield _converting(table, row_ids)


def random_rows(rows: int, dim: int) -> Tensor:
    """float32 ``[rows, dim]``, random in blocks."""
    block = torch.randn(min(_BLOCK, rows), dim, generator=torch.Generator().manual_seed(1))
    return block.repeat(-(-rows // len(block)), 1)[:rows]


def _copying(table: Tensor, row_ids: Tensor) -> Setting:
    out = torch.empty(len(row_ids), _DIM, dtype=table.dtype)
    calls: dict[str, Callable[[], Any]] = {"F.embedding": lambda: F.embedding(row_ids, table)}
    if native.core() is not None:
        calls["engram"] = lambda: lookup_rows(table, row_ids)
        calls["engram, reused buffer"] = lambda: native.gather_rows(table, row_ids, out)
        calls["limit: random read"] = lambda: native.scan_rows(table, row_ids)

    def verify() -> str | None:
        expected = table[row_ids]
        if not torch.equal(lookup_rows(table, row_ids), expected):
            return "engram gives other rows than indexing"
        if native.core() is not None:
            calls["engram, reused buffer"]()
            if not torch.equal(out, expected):
                return "the reused buffer holds other rows than indexing gives"
        return None

    label = f"bfloat16 rows as they are, {len(table):,} x {_DIM}"
    return Setting(label, calls, "F.embedding", len(row_ids), verify, size=len(table), repeats=2)


def _converting(table: Tensor, row_ids: Tensor) -> Setting:
    stored = {name: _encoded(FORMATS[name], table) for name in ("int8", "float8", "int4")}
    calls: dict[str, Callable[[], Tensor]] = {
        "F.embedding, then float32": lambda: F.embedding(row_ids, table).float(),
        "bfloat16": lambda: lookup_rows(table, row_ids, torch.float32),
    }
    for name, (values, scales) in stored.items():
        calls[name] = lambda form=FORMATS[name], v=values, s=scales: form.read(v, s, row_ids)  # type: ignore[misc]

    def verify() -> str | None:
        if not torch.equal(calls["bfloat16"](), table[row_ids].float()):
            return "bfloat16 rows come out changed"
        for name, (values, scales) in stored.items():
            if not torch.equal(calls[name](), FORMATS[name].decode(values[row_ids], scales[row_ids])):
                return f"{name} rows come out otherwise than the plain decoding gives"
        return None

    label = f"turned into float32, {len(table):,} x {_DIM}"
    return Setting(label, calls, "F.embedding, then float32", len(row_ids), verify, size=len(table), repeats=2)


def _encoded(form: RowFormat, table: Tensor) -> tuple[Tensor, Tensor]:
    """The table in another format; as it repeats itself, one block is encoded."""
    block = min(_BLOCK, len(table))
    values, scales = form.encode(table[:block].float())
    assert scales is not None
    copies = -(-len(table) // block)
    whole = values.view(torch.uint8).repeat(copies, 1).view(form.dtype)  # repeat() knows fewer types than tensors do
    return whole[: len(table)], scales.repeat(copies, *[1] * (scales.dim() - 1))[: len(table)]
