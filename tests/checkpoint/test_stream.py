import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from engram import CheckpointError
from engram.checkpoint import TensorReader, TensorSpec, write_tensors

TYPES = [
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.int64,
    torch.int32,
    torch.int8,
    torch.uint8,
]
shapes = st.lists(st.integers(0, 7), min_size=0, max_size=3)


def random_tensor(dtype, shape):
    return (torch.randn(shape) * 10).to(dtype)


def same(a, b):
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
    )


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(TYPES), shapes), min_size=1, max_size=5), st.integers(1, 9))
def test_files_written_in_parts_are_those_the_library_reads(tmp_path_factory, wanted, step):
    folder = tmp_path_factory.mktemp("files")
    tensors = {f"t{number}": random_tensor(dtype, shape) for number, (dtype, shape) in enumerate(wanted)}
    flat = {name: tensor.reshape(-1) for name, tensor in tensors.items()}
    longest = max(tensor.numel() for tensor in tensors.values())
    parts = ((name, part[start : start + step]) for start in range(0, longest, step) for name, part in flat.items())
    write_tensors(folder / "file", {name: TensorSpec.of(tensor) for name, tensor in tensors.items()}, parts)  # alternating
    loaded = load_file(folder / "file")
    assert set(loaded) == set(tensors)
    assert all(same(loaded[name], tensors[name]) for name in tensors)
    save_file(tensors, folder / "theirs", metadata={"a": "b"})
    for file in ("file", "theirs"):
        with TensorReader(folder / file) as reader:
            for name, tensor in tensors.items():
                assert same(reader.read(name), tensor)
                assert sum(part.numel() for _, part in reader.parts(name)) == tensor.numel()
                if tensor.dim():
                    assert same(reader.read(name, 1, 3), tensor[1:3])


def test_parts_that_do_not_fit_are_refused(tmp_path):
    specs = {"a": TensorSpec(torch.float32, (4,))}
    for parts, message in (
        ([("a", torch.zeros(3))], "fewer values"),
        ([("a", torch.zeros(3)), ("a", torch.zeros(2))], "more or other values"),
        ([("a", torch.zeros(4, dtype=torch.int32))], "more or other values"),
    ):
        with pytest.raises(CheckpointError, match=message):
            write_tensors(tmp_path / "file", specs, parts)


def test_hostile_headers_are_refused(tmp_path):
    file = tmp_path / "file"

    def write(header, data=b"\0" * 16):
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text + data)

    entry = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
    for header in (
        b"{",
        [],
        {"a": {**entry, "dtype": "F31"}},
        {"a": {**entry, "data_offsets": [0, 20]}},
        {"a": {**entry, "data_offsets": [-4, 12]}},
        {"a": {**entry, "shape": [5]}},
        {"a": {**entry, "shape": ["x"]}},
        {"a": 3},
    ):
        write(header)
        with pytest.raises(CheckpointError, match="not a readable safetensors file"):
            TensorReader(file)
    file.write_bytes(b"\xff" * 30)
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        TensorReader(file)
    write({"a": entry})
    with TensorReader(file) as reader:
        file.write_bytes(file.read_bytes()[:-8])
        with pytest.raises(CheckpointError, match="became shorter"):
            reader.read("a")
