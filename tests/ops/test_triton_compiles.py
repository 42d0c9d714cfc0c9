"""The kernels go through Triton's whole compiler, to machine code for two generations of GPUs; none is needed for that."""

import pytest
import torch

pytest.importorskip("triton", minversion="3.3", reason="Triton is not installed, or compiles by an older interface")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from engram.hashing import triton_hash
from engram.ops import triton_gather

TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.int64: "*i64",
}


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def machine_code(kernel, types, constants, architecture):
    signature = {**types, **dict.fromkeys(constants, "constexpr")}
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(types.values()) if kind.startswith("*")}
    source = ASTSource(kernel, {name: signature[name] for name in kernel.arg_names}, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options={"enable_fp_fusion": False}).asm


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize(
    ("kind", "data", "scales"),
    [(0, "*bf16", "*i64"), (1, "*i8", "*fp32"), (2, "*u8", "*u8"), (3, "*u8", "*fp32")],
    ids=["plain", "int8", "float8", "int4"],
)
def test_the_gather_compiles(kind, data, scales, architecture):
    types = {"data": data, "scales": scales, "row_ids": "*i64", "out": "*bf16", "rows": "i64", "count": "i32"}
    constants = {
        "KIND": kind,
        "DIM": 64,
        "WIDTH": 32 if kind == 3 else 64,
        "SCALES": 2,
        "BLOCK_N": 8,
        "BLOCK_D": 64,
    }
    code = machine_code(triton_gather._gather_kernel, types, constants, architecture)
    assert len(code["cubin"]) > 0
    assert ".ftz" not in code["ptx"]  # subnormal scales and values must survive
    del types["rows"]  # a table of one row
    assert len(machine_code(triton_gather._gather_kernel, types, {**constants, "rows": 1}, architecture)["cubin"]) > 0


@pytest.mark.parametrize("ones", [(), ("raw_pad", "modulus"), ("vocabulary",)], ids=["", "pad of 1", "one word"])
@pytest.mark.parametrize("orders", [3, 31])
@pytest.mark.parametrize("architecture", [80, 90])
def test_the_hash_compiles(architecture, orders, ones):
    """Triton makes a constant of every number that is 1."""
    pointers = {"ids": "*i64", "mask": "*i8", "history": "*i64", "lookup": "*i64", "multipliers": "*i64", "primes": "*i64"}
    numbers = {"length": "i32", "past": "i32", "count": "i32", "vocabulary": "i32", "raw_pad": "i32", "modulus": "i32"}
    constants = {
        "ORDERS": orders,
        "HEADS": 6,
        "MASKED": True,
        "TAGGED": True,
        "UNROLL": min(orders, triton_hash._UNROLLED),
        "BLOCK": 64,
        "BLOCK_K": 8,
    }
    constants |= dict.fromkeys(ones, 1)
    types = {**pointers, "out": "*i64", "tags": "*i32", **{name: kind for name, kind in numbers.items() if name not in ones}}
    assert len(machine_code(triton_hash._hash_kernel, types, constants, architecture)["cubin"]) > 0
