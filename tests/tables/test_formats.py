import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engram import TableError, native
from engram.tables import FORMATS, DeviceTable, row_format
from engram.tables.formats import _power_of_two

QUANTISED = [name for name, entry in FORMATS.items() if entry.quantised]


def random_rows(data, even=True):
    rng = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    dim = 2 * data.draw(st.integers(1, 70))
    rows = torch.randn(data.draw(st.integers(0, 20)), dim, generator=rng)
    rows *= 10.0 ** data.draw(st.integers(-30, 30))
    rows[torch.rand(len(rows), generator=rng) < 0.1] = 0
    return rows, rng


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(list(FORMATS)), st.data())
def test_rows_are_read_as_the_plain_decoder_reads_them(name, data):
    form = row_format(name)
    rows, rng = random_rows(data)
    if name == "float16":
        rows.clamp_(-65504, 65504)
    stored, scales = form.encode(rows)
    assert stored.shape == (len(rows), form.width(rows.shape[1]))
    assert (scales is None) != form.quantised
    if scales is not None:
        assert scales.shape == form.scale_shape(*rows.shape)
        assert scales.dtype == form.scale_dtype
    used = stored.numel() * stored.element_size() + (0 if scales is None else scales.numel() * scales.element_size())
    assert used == len(rows) * form.row_bytes(rows.shape[1])
    row_ids = torch.randint(max(len(rows), 1), (3, 5 if len(rows) else 0), generator=rng)
    plain = form.decode(stored, scales)
    assert torch.equal(form.read(stored, scales, row_ids), plain[row_ids])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "_core", None)
        assert torch.equal(form.read(stored, scales, row_ids), plain[row_ids])


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([("int8", 1 / 254), ("float8", 1 / 16), ("int4", 1 / 14)]), st.data())
def test_quantised_rows_are_near(case, data):
    """No further than half a step: of the row's largest value, or for float8 relative to each value (or to its block's smallest step)."""
    name, share = case
    rows, _ = random_rows(data)
    back = FORMATS[name].decode(*FORMATS[name].encode(rows))
    error = (back - rows).abs()
    if name == "float8":
        padded = torch.nn.functional.pad(rows.abs(), (0, -rows.shape[1] % 32)).unflatten(1, (-1, 32)).amax(2)
        largest = padded.repeat_interleave(32, dim=1)[:, : rows.shape[1]]
        assert bool((error <= torch.maximum(rows.abs() * share, largest * 2**-17) * 1.001 + 1e-40).all())
    else:
        assert bool((error <= rows.abs().amax(1, keepdim=True) * share * 1.001 + 1e-40).all())


@pytest.mark.parametrize("value", [1e-45, 1e-40, 1e-37, 3e38])
def test_float8_rows_reach_both_ends_of_float32(value):
    form, rows = row_format("float8"), torch.full((1, 33), value)
    error = (form.decode(*form.encode(rows)).double() - rows.double()).abs().max()
    assert error <= max(value / 16, 2.0**-136)


def test_float8_powers_are_exact():
    scales = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(_power_of_two(scales.to(torch.int32) - 127), torch.ldexp(torch.ones(256), scales.to(torch.int32) - 127))


@pytest.mark.parametrize("name", QUANTISED)
def test_storing_twice_changes_nothing(name):
    rows = torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
    once = FORMATS[name].decode(*FORMATS[name].encode(rows))
    assert torch.equal(FORMATS[name].decode(*FORMATS[name].encode(once)), once)


def test_what_cannot_be_stored_is_refused():
    with pytest.raises(TableError, match="expected one of float32"):
        row_format("int3")
    with pytest.raises(TableError, match="a multiple of 2"):
        FORMATS["int4"].width(7)
    too_large, unlimited = torch.tensor([[1.0, 2.0], [-1e5, float("inf")]]), torch.tensor([[float("inf"), -2.0]])
    for store in (FORMATS["float16"].encode, lambda rows: DeviceTable(2, 2, dtype=torch.float16).load_rows(0, rows)):
        with pytest.raises(
            TableError, match=r"got the value -1e.05 \(row 1 of those given\), expected at most 6.55e.04 in float16"
        ):
            store(too_large)
        store(unlimited)
    for name in QUANTISED:
        rows, largest = torch.zeros(2, 32), torch.finfo(torch.float32).max
        rows[1] = largest / 4
        assert bool(FORMATS[name].decode(*FORMATS[name].encode(rows)).isfinite().all())
        rows[1] = largest
        if name == "int4":  # its largest code is 7: the scale is rounded down
            assert bool(FORMATS[name].decode(*FORMATS[name].encode(rows)).isfinite().all())
        else:
            with pytest.raises(
                TableError, match=r"got the value 3.403e.38 \(row 1 of those given\), expected at most 1.701e.38"
            ):
                FORMATS[name].encode(rows)
    for name in QUANTISED:
        with pytest.raises(TableError, match="not finite"):
            FORMATS[name].encode(torch.tensor([[1.0, float("inf")]]))
        with pytest.raises(IndexError, match=r"row number 2 is out of range, expected 0\.\.1"):
            FORMATS[name].read(*FORMATS[name].encode(torch.zeros(2, 4)), torch.tensor([2]))
