"""The Triton gather equals the plain decoder; run by Triton's interpreter on CPU tensors, so that no GPU is needed."""

import numpy as np
import pytest
import torch

from engram import native
from engram.ops import dispatch, lookup_rows
from engram.tables import FORMATS
from engram.tables.formats import chosen
from tests.ops import interpreted

ROWS = 70


@pytest.fixture(scope="module")
def kernel():
    return interpreted.load("engram.ops.triton_gather").gather_rows_triton


def stored_rows(name, dim, rows=ROWS):
    values = torch.randn(rows, dim, generator=torch.Generator().manual_seed(dim)) * 10
    return FORMATS[name].encode(values)


def wanted_numbers(count):
    numbers = torch.randint(ROWS, (count,), generator=torch.Generator().manual_seed(count))
    if count > 8:
        numbers[:6] = torch.tensor([-1, ROWS, 2**62, -(2**62), 2**31, 0])
    return numbers


def plain(name, stored, scales, numbers, dtype):
    """What the kernel must give: zeros where the number is out of range, and float32 cut to bfloat16 as the interpreter cuts it."""
    there = (numbers >= 0) & (numbers < len(stored))
    rows = torch.zeros(len(numbers), stored.shape[1] * FORMATS[name].values_per_item)
    rows[there] = FORMATS[name].decode(chosen(stored, numbers[there]), None if scales is None else scales[numbers[there]])
    if dtype == torch.bfloat16 and stored.dtype != torch.bfloat16:
        return (rows.view(torch.int32) & -65536).view(torch.float32).to(dtype)
    return rows.to(dtype)


def check(kernel, name, dim, count, dtype=torch.float32):
    stored, scales = stored_rows(name, dim)
    numbers = wanted_numbers(count)
    out = torch.full((count, dim), float("nan"), dtype=dtype)
    kernel(stored, scales, numbers, out)
    expected = plain(name, stored, scales, numbers, dtype)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("dim", [1, 31, 63, 64, 160, 256])
@pytest.mark.parametrize("name", list(FORMATS))
def test_rows_of_every_format_and_size(kernel, name, dim):
    if name == "int4":
        dim += dim % 2
    for count in (0, 1, 63):
        check(kernel, name, dim, count)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", list(FORMATS))
def test_every_type_of_result(kernel, name, dtype):
    check(kernel, name, 66, 40, dtype)


@pytest.mark.parametrize("name", ["bfloat16", "float8"])
def test_many_rows(kernel, name):
    check(kernel, name, 64, 1000)


def test_wide_rows_are_read_in_pieces(kernel):
    check(kernel, "float32", 1300, 9)


def test_every_float8_and_every_exponent(kernel):
    """All 256 bytes under several powers of two, the smallest and the largest among them."""
    stored = torch.arange(256, dtype=torch.uint8).view(8, 32).view(torch.float8_e4m3fn)
    for exponent in (0, 1, 2, 100, 127, 200, 254):
        scales = torch.full((8, 1), exponent, dtype=torch.uint8)
        out = torch.empty(8, 32)
        with np.errstate(over="ignore"):
            kernel(stored, scales, torch.arange(8), out)
        expected = FORMATS["float8"].decode(stored, scales)
        assert torch.equal(out.isnan(), expected.isnan())
        assert torch.equal(out.nan_to_num(7.0), expected.nan_to_num(7.0))


def test_numbers_of_any_shape_into_a_part_of_a_buffer(kernel):
    stored, _ = stored_rows("float32", 16)
    buffer = torch.full((9, 16), 7.0)
    numbers = torch.tensor([[3, 5, -1], [69, 70, 0]])
    kernel(stored, None, numbers, buffer[1:7].view(2, 3, 16))
    expected = torch.zeros(2, 3, 16)
    expected[0, :2], expected[1, 0], expected[1, 2] = stored[[3, 5]], stored[69], stored[0]
    assert torch.equal(buffer[1:7].view(2, 3, 16), expected)
    assert bool((buffer[[0, 7, 8]] == 7).all())


def test_what_does_not_go_together_is_refused(kernel):
    stored, scales = stored_rows("float8", 64)
    numbers, out = torch.zeros(3, dtype=torch.int64), torch.empty(3, 64)
    for arguments in (
        (stored, scales[:, :1], numbers, out),
        (stored, None, numbers, out),
        (stored.float(), scales, numbers, out),
        (stored.float(), None, numbers.int(), out),
        (stored.float(), None, numbers, out[:, :60]),
        (stored.float(), None, numbers, torch.empty(3, 128)[:, ::2]),
        (stored.float(), None, numbers, out.double()),
    ):
        with pytest.raises(ValueError, match="gather_rows_triton"):
            kernel(*arguments)


def test_the_gradient_through_the_kernel_holds_the_touched_rows(kernel, monkeypatch):
    """The dispatch as on CUDA: no native core, the Triton kernel in its place."""
    numbers, weight = torch.tensor([[5, 9, 5], [0, 69, 9]]), torch.randn(2, 3, 16)
    gradients = []
    for with_kernel in (False, True):
        table = torch.nn.Parameter(stored_rows("float32", 16)[0])
        if with_kernel:
            monkeypatch.setattr(dispatch, "kernel_serves", lambda *_: True)
            monkeypatch.setattr("engram.ops.lookup.kernel_serves", lambda *_: True)
            monkeypatch.setattr(dispatch, "gather_rows", lambda d, i, o, scales, dim: kernel(d, scales, i, o))
        else:
            monkeypatch.setattr(native, "_core", None)
        rows = lookup_rows(table, numbers, torch.float32)
        (rows * weight).sum().backward()
        assert table.grad.is_sparse
        gradients.append((rows.detach(), table.grad.coalesce()))
    assert torch.equal(gradients[0][0], gradients[1][0])
    assert torch.equal(gradients[0][1].indices(), torch.tensor([[0, 5, 9, 69]]))
    assert torch.equal(gradients[0][1].to_dense(), gradients[1][1].to_dense())
