"""Converting saved memories: every pair of formats, little memory, all or nothing."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from engram import CheckpointError, ConfigError, EngramConfig, EngramModel, TableConfig, TableError
from engram.checkpoint import TensorSpec, convert_memory, read_description, stream_store
from engram.models.place import place_memory
from engram.tables import FORMATS
from engram.testing import tiny_model, tiny_tokenizer
from tests.children import run_python

WEIGHT = "layers.0.multi_head_embedding.embedding.weight"
IDS = torch.randint(2, 300, (2, 9), generator=torch.Generator().manual_seed(1))


def files(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()} if folder.exists() else {}


def logits(folder):
    memory = EngramModel.from_pretrained(tiny_model(), folder, tiny_tokenizer())
    with torch.no_grad():
        return memory(input_ids=IDS, use_cache=False).logits


def weights(folder):
    return load_file(folder / read_description(folder)["weights"]["file"])


def write_table(folder, rows, dim=64):
    """A memory of one layer of random rows, written in parts."""
    config = EngramConfig(layer_ids=[0], n_embed_per_ngram=2 * dim, n_head_per_ngram=2, engram_vocab_size=rows)
    step = 1 << 16
    parts = ((WEIGHT, torch.randn(min(step, rows - start), dim)) for start in range(0, rows, step))
    specs = {WEIGHT: TensorSpec(torch.float32, (rows, dim))}
    stream_store(folder, specs, parts, {"engram_config": config.to_dict(), "table_dtype": "float32"})


@pytest.mark.parametrize("form", list(FORMATS))
def test_rows_are_those_the_format_makes_of_them(saved, tmp_path, form):
    seen = []
    report = convert_memory(saved, tmp_path / "out", form, lambda done, total: seen.append((done, total)))
    before, after = weights(saved), weights(tmp_path / "out")
    for layer in report.layers:
        prefix = f"layers.{layer.layer_id}.multi_head_embedding.embedding."
        rows = before[prefix + "weight"]
        stored, scales = FORMATS[form].encode(rows)
        assert torch.equal(after[prefix + "weight"].view(torch.uint8), stored.view(torch.uint8))
        assert scales is None or torch.equal(after[prefix + "scales"], scales)
        error = FORMATS[form].decode(stored, scales) - rows
        expected = [error.abs().max(), error.square().mean().sqrt(), rows.square().mean().sqrt()]
        assert [layer.max_abs_error, layer.rms_error, layer.rms_rows] == pytest.approx([float(x) for x in expected], rel=1e-5)
        assert (layer.rows, layer.bytes_before) == (len(rows), rows.numel() * 4)
        assert layer.bytes_after == len(rows) * FORMATS[form].row_bytes(rows.shape[1])
    assert seen[-1][0] == seen[-1][1] == sum(layer.bytes_before for layer in report.layers)
    assert read_description(tmp_path / "out")["table_dtype"] == form
    memory = EngramModel.from_pretrained(tiny_model(), tmp_path / "out", tiny_tokenizer())
    assert memory.table_config.dtype == form
    memory.unload()
    # Back again, and once more in its own format: nothing but the first step may lose anything.
    convert_memory(tmp_path / "out", tmp_path / "wide", "float32")
    assert torch.equal(logits(tmp_path / "wide"), logits(tmp_path / "out"))
    convert_memory(tmp_path / "out", tmp_path / "copy", form)
    assert (tmp_path / "copy" / read_description(tmp_path / "copy")["weights"]["file"]).read_bytes() == (
        tmp_path / "out" / read_description(tmp_path / "out")["weights"]["file"]
    ).read_bytes()


def test_where_a_memory_lives_is_not_copied(saved, tmp_path):
    hot = {i: torch.tensor([7, 3, 200]) for i in read_description(saved)["engram_config"]["layer_ids"]}
    place_memory(saved, tmp_path / "placed", TableConfig(tier="hybrid", hot_rows=3, path=str(tmp_path / "rows")), hot)
    assert "placement" in read_description(tmp_path / "placed")
    assert any(name.startswith("placement.") for name in weights(tmp_path / "placed"))
    convert_memory(tmp_path / "placed", tmp_path / "copy", "float32")
    assert "placement" not in read_description(tmp_path / "copy")
    assert weights(tmp_path / "copy").keys() == weights(saved).keys()


def test_memories_are_never_written_over(saved, tmp_path):
    before = files(saved)
    for out in (saved, saved.parent / "." / "memory"):
        with pytest.raises(ConfigError, match="expected another folder"):
            convert_memory(saved, out, "int8")
    with pytest.raises(CheckpointError, match="no memory in"):
        convert_memory(tmp_path / "none", tmp_path / "new", "int8")
    convert_memory(saved, tmp_path / "other", "int8")
    with pytest.raises(ConfigError, match="holds a memory already"):
        convert_memory(saved, tmp_path / "other", "int8")
    assert files(saved) == before
    with pytest.raises(TableError, match="expected one of float32"):
        convert_memory(saved, tmp_path / "new", "int3")
    assert not (tmp_path / "new").exists()


def test_what_a_format_cannot_hold_is_refused(tmp_path):
    write_table(tmp_path / "a", 1000)
    file = tmp_path / "a" / read_description(tmp_path / "a")["weights"]["file"]
    for value, form, message in (
        (1e6, "float16", r"layer 0, in the rows from 0 on: got the value 1e.06 \(row 999"),
        (float("nan"), "int8", "not finite"),
    ):
        with open(file, "r+b") as opened:
            opened.seek(-4, os.SEEK_END)
            opened.write(torch.tensor([value]).numpy().tobytes())
        fields = json.loads((tmp_path / "a" / "engram.json").read_text())
        fields["weights"].pop("sha256", None)
        (tmp_path / "a" / "engram.json").write_text(json.dumps(fields))
        with pytest.raises(TableError, match=message):
            convert_memory(tmp_path / "a", tmp_path / "b", form)
        assert files(tmp_path / "b") == {}


def test_damaged_sources_are_refused(saved, tmp_path):
    text = (saved / "engram.json").read_text()
    (saved / "engram.json").write_text(text.replace('"table_dtype": "float32"', '"table_dtype": "int8"'))
    with pytest.raises(CheckpointError, match="does not fit int8 rows"):
        convert_memory(saved, tmp_path / "b", "int4")
    (saved / "engram.json").write_text(text.replace('"layer_ids": [\n', '"layer_ids": [\n7,'))
    with pytest.raises(CheckpointError, match="the rows of layer 7 are missing"):
        convert_memory(saved, tmp_path / "b", "int4")


_CONVERT = "import sys\nfrom engram.checkpoint import convert_memory\n"


def test_a_full_disk_is_one_error_and_leaves_nothing(tmp_path, monkeypatch):
    """A file size limit makes the kernel itself refuse the write half way."""
    write_table(tmp_path / "a", 100_000)
    before = files(tmp_path / "a")
    code = _CONVERT + (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\nfrom engram import CheckpointError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, 3_000_000))\n"
        "try: convert_memory(sys.argv[1], sys.argv[2], 'int8')\nexcept CheckpointError as e: print('REFUSED', e)\n"
    )
    done = run_python("-c", code, tmp_path / "a", tmp_path / "b")
    assert "REFUSED cannot save the memory" in done.stdout, done.stderr
    assert files(tmp_path / "b") == {}
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(CheckpointError, match=r"6,8\d\d,\d\d\d bytes needed, 1,000 free"):
        convert_memory(tmp_path / "a", tmp_path / "b", "int8")
    assert files(tmp_path / "b") == {}
    assert files(tmp_path / "a") == before


@pytest.mark.slow
def test_a_killed_conversion_leaves_no_memory_and_runs_again(tmp_path):
    write_table(tmp_path / "a", 200_000)
    code = (
        _CONVERT
        + (
            "import signal, time\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"  # tests in the background inherit it ignored
            "def show(done, total):\n    print('block', flush=True); time.sleep(60)\n"
            "convert_memory(sys.argv[1], sys.argv[2], 'int8', show)\n"
        )
    )
    for sign, number in ((signal.SIGKILL, 2), (signal.SIGINT, 0)):  # half a file, and the note that it is ours to remove
        arguments = [sys.executable, "-c", code, str(tmp_path / "a"), str(tmp_path / "b")]
        process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "block\n"
        time.sleep(0.1)
        os.kill(process.pid, sign)
        process.wait()
        process.stdout.close()
        assert not (tmp_path / "b" / "engram.json").exists()
        # An interruption tidies up; a kill cannot, the next run does.
        assert len(set(files(tmp_path / "b")) - {".engram.lock"}) == number
    convert_memory(tmp_path / "a", tmp_path / "b", "int8")
    assert len(set(files(tmp_path / "b")) - {".engram.lock"}) == 2
    assert weights(tmp_path / "b")[WEIGHT].shape == (200_000, 64)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_table(tmp_path):
    """300 MB of rows; the process grows by less than half of them, and stays below a gigabyte with everything it loads."""
    write_table(tmp_path / "a", 1_200_000)
    code = _CONVERT + (  # not by getrusage, whose figure includes that of the process which started this one
        "peak = lambda: next(int(line.split()[1]) for line in open('/proc/self/status') if line.startswith('VmHWM:'))\nbefore = peak()\n"
        "convert_memory(sys.argv[1], sys.argv[2], 'int8')\nprint(before, peak())\n"
    )
    arguments = [sys.executable, "-c", code, str(tmp_path / "a"), str(tmp_path / "b")]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    before, peak = map(int, done.stdout.split())
    assert 0 < peak - before < 150 << 10  # KiB; blocks and what they are turned into, whatever the size
    assert peak < 1 << 20


def test_a_conversion_that_was_stopped_with_adapters_there_can_be_repeated(saved, tmp_path, monkeypatch):
    (saved / "adapters" / "more").mkdir(parents=True)
    for file in ("adapter_config.json", "more/adapter_model.safetensors"):
        (saved / "adapters" / file).write_text(file)

    def stopped(path, content):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("engram.checkpoint.store._replace", stopped)
        with pytest.raises(KeyboardInterrupt):
            convert_memory(saved, tmp_path / "out", "int8")
    assert not (tmp_path / "out" / "adapters").exists()
    shutil.copytree(saved / "adapters", tmp_path / "out" / "adapters")  # as a kill at that moment leaves it
    (tmp_path / "out" / ".adapters.new").mkdir()
    convert_memory(saved, tmp_path / "out", "int8")
    assert (
        tmp_path / "out" / "adapters" / "more" / "adapter_model.safetensors"
    ).read_text() == "more/adapter_model.safetensors"
    assert not (tmp_path / "out" / ".adapters.new").exists()
    (tmp_path / "other" / "adapters").mkdir(parents=True)
    with pytest.raises(ConfigError, match="holds 'adapters' of something else"):
        convert_memory(saved, tmp_path / "other", "int8")


def test_a_conversion_that_fails_leaves_what_others_put_into_the_folder(saved, tmp_path, monkeypatch):
    (tmp_path / "out" / "adapters").mkdir(parents=True)
    (tmp_path / "out" / "adapters" / "mine").write_text("kept")

    def full(path, content):
        raise OSError("no space left")

    monkeypatch.setattr("engram.checkpoint.store._replace", full)
    with pytest.raises((CheckpointError, OSError)):
        convert_memory(saved, tmp_path / "out", "int8")
    assert (tmp_path / "out" / "adapters" / "mine").read_text() == "kept"
