import dataclasses
import gc
import itertools
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from engram import (
    AttachError,
    CheckpointError,
    ConfigError,
    EngramModel,
    FingerprintError,
    TableConfig,
    TableError,
    get_engram_model,
)
from engram.checkpoint import DESCRIPTION_NAME, store
from engram.editing.merge import StoredMemory
from engram.errors import EngramError
from engram.models import files, saved_rows
from engram.models.place import layer_places, place_memory
from engram.tables import DeviceTable, MappedRows
from engram.testing import tiny_config, tiny_memory, tiny_model, tiny_tokenizer
from engram.training.tokenizer import train_tokenizer
from tests.children import run_python


def description(path):
    return json.loads((path / DESCRIPTION_NAME).read_text())


def weights(path):
    return path / description(path)["weights"]["file"]


def load(path, model=None, tokenizer=None, **options):
    return EngramModel.from_pretrained(model or tiny_model(), path, tokenizer or tiny_tokenizer(), **options)


def test_round_trip_is_exact(saved):
    ids = torch.randint(2, 300, (2, 9))
    with torch.no_grad():
        expected = tiny_memory()(input_ids=ids).logits
        memory = load(saved)
        assert torch.equal(memory(input_ids=ids).logits, expected)
    assert not list(saved.glob("*.tmp"))
    assert not list(saved.glob("*.bin")) + list(saved.glob("*.pt")) + list(saved.glob("*.pkl"))


def test_the_description_describes_itself(saved):
    fields = description(saved)
    assert fields["engram_config"]["hidden_size"] == 32
    assert fields["hash_spec"]["name"] == "demo_v1"
    assert len(fields["fingerprint"]) == 64
    assert fields["library_version"]
    assert fields["base_model"]["model_type"] == "llama"
    assert fields["weights"]["bytes"] == weights(saved).stat().st_size


def test_saving_again_replaces_the_pair_and_keeps_other_files(saved):
    (saved / "notes.txt").write_text("mine")
    first = weights(saved)
    memory = tiny_memory(seed=1)
    memory.save_pretrained(saved)
    assert not first.exists()
    assert len(list(saved.glob("*.safetensors"))) == 1
    assert (saved / "notes.txt").read_text() == "mine"


def test_an_error_after_the_save_has_landed_loses_nothing(saved, monkeypatch):
    first, memory = weights(saved), tiny_memory(seed=1)

    def interrupted(path):
        if path == saved:
            raise KeyboardInterrupt
        return sync(path)

    sync = store.sync_to_disk
    monkeypatch.setattr(store, "sync_to_disk", interrupted)
    with pytest.raises(KeyboardInterrupt):
        memory.save_pretrained(saved)
    assert weights(saved).is_file()
    assert not first.exists()
    again = load(saved, allow_other_base=True)
    assert all(torch.equal(a, b) for a, b in zip(again.engrams.state_dict().values(), memory.engrams.state_dict().values()))

    def refused(path):
        if path == saved:
            raise OSError(22, "Invalid argument")  # a file system that has no sync for folders
        return sync(path)

    monkeypatch.setattr(store, "sync_to_disk", refused)
    memory.save_pretrained(saved)
    assert {file.name for file in saved.iterdir()} == {DESCRIPTION_NAME, weights(saved).name, ".engram.lock"}


def test_weights_without_a_description_are_left_alone(saved, tmp_path):
    """A copy that is not finished, its description not yet there."""
    names = {weights(saved).name, "engram-backup.safetensors"}
    (saved / DESCRIPTION_NAME).rename(tmp_path / "later")
    (saved / "engram-backup.safetensors").write_bytes(b"mine")
    for _ in range(2):
        tiny_memory(seed=1).save_pretrained(saved)
    assert names <= {file.name for file in saved.iterdir()}
    (tmp_path / "later").rename(saved / DESCRIPTION_NAME)
    load(saved)


def expect(error, match, path, **options):
    model = options.pop("model", None) or tiny_model()
    with pytest.raises(error, match=match):
        load(path, model, **options)
    assert not any(m._forward_pre_hooks for m in model.modules())  # a refused memory leaves the model alone


def test_a_save_by_others_while_a_memory_is_read_is_read_then(saved, monkeypatch):
    writer = load(saved)
    real, saves = files.check_memory, []

    def slow_check(model, path, *rest):
        checked = real(model, path, *rest)
        if not saves:  # between the description and the weights
            writer.save_pretrained(path)
            saves.append(1)
        return checked

    for placement in (None, TableConfig(tier="mmap")):
        saves.clear()
        monkeypatch.setattr(files, "check_memory", slow_check)
        memory = load(saved, table_config=placement)
        assert saves
        for name, tensor in writer.engrams.state_dict().items():
            assert torch.equal(memory.engrams.state_dict()[name], tensor)
    weights(saved).unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        load(saved)


def test_missing_and_damaged_files(saved, tmp_path):
    expect(CheckpointError, "no memory in", tmp_path)
    file, content = weights(saved), weights(saved).read_bytes()
    file.write_bytes(content[:-10])
    expect(CheckpointError, "truncated", saved)
    file.write_bytes(b"\xff" * len(content))
    expect(CheckpointError, "its checksum is not the one saved", saved)
    fields = description(saved)
    del fields["weights"]["sha256"]  # as in a memory too large to be checked at every load
    whole = (saved / DESCRIPTION_NAME).read_text()
    (saved / DESCRIPTION_NAME).write_text(json.dumps(fields))
    expect(CheckpointError, "not a readable safetensors file", saved)
    (saved / DESCRIPTION_NAME).write_text(whole)
    file.unlink()
    expect(CheckpointError, "is missing; expected", saved)
    file.write_bytes(content)
    load(saved).unload()
    text = (saved / DESCRIPTION_NAME).read_text()
    for damaged, message in (
        (text[:-20], "cannot read"),
        ("[]", "does not describe a memory"),
        (text.replace('"format_version": 1', '"format_version": 9'), "upgrade engram"),
        (text.replace(file.name, "../elsewhere.safetensors"), "outside the folder"),
        (text.replace('"weights"', '"wights"'), "is malformed: no 'weights'"),
        (text.replace('"engram_config"', '"config"'), "no 'engram_config'"),
    ):
        (saved / DESCRIPTION_NAME).write_text(damaged)
        expect(CheckpointError, message, saved)
    (saved / DESCRIPTION_NAME).write_text(text.replace('"pad_id"', '"pad"'))
    expect(ConfigError, "unknown key", saved)


def test_tensors_that_do_not_fit(saved):
    file = weights(saved)
    good = {
        name: tensor.clone() for name, tensor in load_file(file).items()
    }  # for they would be mapped from the file that is written over
    name = "layers.0.value_proj.weight"

    def write(tensors):
        save_file(tensors, file)
        fields = description(saved)
        fields["weights"] = {"file": file.name, "bytes": file.stat().st_size}
        (saved / DESCRIPTION_NAME).write_text(json.dumps(fields))

    write({k: v for k, v in good.items() if k != name})
    expect(CheckpointError, "missing: .*value_proj", saved)
    write({**good, "extra": torch.zeros(1)})
    expect(CheckpointError, "unknown: .*extra", saved)
    write({**good, name: good[name][:, :1].contiguous()})
    expect(CheckpointError, "has shape", saved)


def test_another_tokenizer_or_base_is_refused(saved):
    other = train_tokenizer(["completely different text, with other words in it " * 9], vocab_size=330, model_max_length=256)
    expect(FingerprintError, "another tokenizer", saved, tokenizer=other)
    expect(FingerprintError, "belongs to base model", saved, model=tiny_model("qwen2"))
    fields = description(saved)
    text = (saved / DESCRIPTION_NAME).read_text()
    fields["engram_config"]["pad_id"] = 5000
    (saved / DESCRIPTION_NAME).write_text(json.dumps(fields))
    expect(FingerprintError, "another tokenizer", saved)
    (saved / DESCRIPTION_NAME).write_text(text)
    changed = tiny_model(seed=5)
    expect(FingerprintError, "allow_other_base=True", saved, model=changed)
    load(saved, changed, allow_other_base=True).unload()
    expect(FingerprintError, "hidden_size", saved, model=tiny_model(hidden_size=64), allow_other_base=True)
    half = tiny_model().to(torch.bfloat16)  # the same weights in another precision are the same model
    load(saved, half).unload()


def test_layers_outside_the_model_are_refused(saved):
    fields = description(saved)
    fields["engram_config"]["layer_ids"] = [0, 7]
    (saved / DESCRIPTION_NAME).write_text(json.dumps(fields))
    expect((ConfigError, FingerprintError), ".", saved)


def test_loading_into_a_memory_of_another_configuration(saved):
    memory = get_engram_model(tiny_model(), tiny_config(kernel_size=2), tiny_tokenizer())
    with pytest.raises(ConfigError, match="kernel_size: saved 4, present 2"):
        memory.load_memory(saved)
    with pytest.raises(AttachError, match="has a memory already"):
        load(saved, memory.base_model)


def test_unwritable_folder_keeps_what_was_saved(saved, monkeypatch):
    before = {p.name: p.read_bytes() for p in saved.iterdir()}

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("engram.checkpoint.store.write_tensors", full)
    with pytest.raises(CheckpointError, match=r"No space left on device.*Nothing saved before was changed"):
        tiny_memory(seed=1).save_pretrained(saved)
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before
    (saved.parent / "file").write_text("")
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="choose a folder that can be written"):
        tiny_memory(seed=1).save_pretrained(saved.parent / "file")


def test_a_really_full_disk_keeps_what_was_saved(saved):
    """A file size limit makes the kernel itself refuse the write half way."""
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from engram.testing import tiny_memory\nfrom engram import CheckpointError\n"
        "m = tiny_memory(seed=1)\nresource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "try: m.save_pretrained(sys.argv[1])\nexcept CheckpointError as e: print('REFUSED', e)\n"
    )
    before = {p.name: p.read_bytes() for p in saved.iterdir()}
    done = run_python("-c", code, saved)
    assert "REFUSED" in done.stdout, done.stderr
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before


_SAVER = """
import os, signal, sys, time
import torch
torch.set_num_threads(1)
from engram.testing import tiny_memory
memories = [tiny_memory(seed=s, engram_vocab_size=20000) for s in (1, 2)]
for line in sys.stdin:  # how long a process may save before it is killed
    child = os.fork()
    if child == 0:
        n = 0
        while True:
            memories[n % 2].save_pretrained(sys.argv[1]); n += 1
    time.sleep(float(line))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    print("killed" if os.WIFSIGNALED(status) else "ended by itself", flush=True)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killing_a_save_leaves_the_old_or_the_new_memory(tmp_path):
    path = tmp_path / "memory"
    ids = torch.arange(2, 12).view(1, 10)
    with torch.no_grad():
        whole = []
        for seed in (1, 2):
            memory = tiny_memory(seed=seed, engram_vocab_size=20000)
            whole.append(memory(input_ids=ids).logits)
    memory.save_pretrained(path)
    delays = (0.3 * torch.rand(60, generator=torch.Generator().manual_seed(0))).tolist()
    found = []
    options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", _SAVER, str(path)], **options) as saver:
        for number, delay in enumerate(delays):
            if number >= 6 and [True, False] in found:
                break
            print(delay * (1 + number // 6), file=saver.stdin, flush=True)  # a busy machine saves more slowly
            assert saver.stdout.readline() == "killed\n"
            with torch.no_grad():
                loaded = load(path)
                got = loaded(input_ids=ids).logits
            found.append([torch.equal(got, one) for one in whole])
    assert all(any(one) for one in found)
    assert [True, False] in found  # the second was there to begin with
    loaded.save_pretrained(path)
    assert len(list(path.glob("*.safetensors"))) == 1  # what the kills left over is cleaned up


ROW_FILES = TableConfig(tier="mmap", path="rows")


@torch.no_grad()
def logits_of(memory):
    return memory(input_ids=torch.arange(2, 12).view(1, 10), use_cache=False).logits


@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_fill_that_was_killed_is_begun_again(saved, tmp_path, monkeypatch, after):
    """Killed before the first block of the first table, before the first of the second, after all of them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(saved_rows, "_ROWS_AT_ONCE", 1 << 20)  # one block for a table
    fills, load_rows = [], DeviceTable.load_rows

    def killed(table, start, rows):
        fills.append(1)
        if len(fills) > after:
            raise KeyboardInterrupt
        load_rows(table, start, rows)

    with monkeypatch.context() as patch:
        patch.setattr(DeviceTable, "load_rows", killed)
        if after == 3:
            patch.setattr("engram.tables.rowfile.stamp_rows", lambda *_: os._exit)
            load(saved, table_config=ROW_FILES)
        else:
            with pytest.raises(KeyboardInterrupt):
                load(saved, table_config=ROW_FILES)
    gc.collect()
    expected = logits_of(load(saved))
    assert torch.equal(logits_of(load(saved, table_config=ROW_FILES)), expected)
    gc.collect()
    with monkeypatch.context() as patch:
        patch.setattr(DeviceTable, "load_rows", None)  # nothing is left to be filled
        assert torch.equal(logits_of(load(saved, table_config=ROW_FILES)), expected)


def test_a_full_disk_at_the_note_is_no_hindrance_later(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expected, replace, notes, said = logits_of(load(saved)), os.replace, 0, []
    while True:
        notes += 1
        left = [notes]

        def full(*args, left=left):
            left[0] -= 1
            if left[0] == 0:
                raise OSError(28, "No space left on device")
            return replace(*args)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", full)
            try:
                load(saved, table_config=TableConfig(tier="mmap", path=f"rows-{notes}")).unload()
                break
            except TableError as error:
                said.append(str(error))
        gc.collect()
        memory = load(saved, table_config=TableConfig(tier="mmap", path=f"rows-{notes}"))
        assert torch.equal(logits_of(memory), expected)
    assert all("No space left on device" in error for error in said)
    assert notes == 2 * 4 + 1  # empty, form, being filled, filled; of each table


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_copied_row_files_are_those_of_the_memory(saved, tmp_path, monkeypatch, dtype):
    """A copy has other times; it is compared, row by row, and known from then on."""
    monkeypatch.chdir(tmp_path)
    placement = TableConfig(tier="mmap", dtype=dtype, path=str(tmp_path / "rows"))
    expected = logits_of(load(saved, table_config=placement))
    gc.collect()
    shutil.copytree(tmp_path / "rows", tmp_path / "copied", copy_function=shutil.copyfile)
    for file in (tmp_path / "copied").glob("*.rows"):
        os.utime(file, (1, 1))
    with monkeypatch.context() as patch:
        patch.setattr(MappedRows, "load_rows", None)
        for compared in (True, False):
            if not compared:
                patch.setattr(saved_rows, "holds_the_same", None)
            memory = load(saved, table_config=dataclasses.replace(placement, path=str(tmp_path / "copied")))
            assert torch.equal(logits_of(memory), expected)
            del memory
            gc.collect()
    with open(tmp_path / "copied" / "layer-0.rows", "r+b") as file:
        file.write(b"else")
    with pytest.raises(CheckpointError, match=r"layer-0\.rows holds other rows .*delete that file: it is made anew"):
        load(saved, table_config=dataclasses.replace(placement, path=str(tmp_path / "copied")))
    gc.collect()
    (tmp_path / "copied" / "layer-0.rows").unlink()
    assert torch.equal(
        logits_of(load(saved, table_config=dataclasses.replace(placement, path=str(tmp_path / "copied")))), expected
    )


def test_a_save_without_its_note_is_known_again(saved, tmp_path, monkeypatch):
    """Killed between the save and the note of what the row files hold."""
    monkeypatch.chdir(tmp_path)
    memory = load(saved, table_config=ROW_FILES)
    memory.engrams["0"].table.update_rows(torch.tensor([1, 2]), lambda rows: rows + 1)
    expected = logits_of(memory)
    with monkeypatch.context() as patch:
        patch.setattr(files, "stamp_rows", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            memory.save_pretrained(saved)
    memory.unload()
    del memory
    gc.collect()
    assert torch.equal(logits_of(load(saved, table_config=ROW_FILES)), expected)


def test_two_processes_read_one_placed_memory_and_one_trains_it(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = load(saved, table_config=ROW_FILES)
    expected = logits_of(first)
    script = """
import sys
import torch
from engram import EngramModel, EngramTrainer, EngramTrainingArguments, TableConfig, TableError, ConfigError
from engram.testing import tiny_model, tiny_tokenizer
memory = EngramModel.from_pretrained(tiny_model(), sys.argv[1], tiny_tokenizer(), TableConfig(tier="mmap", path="rows"))
ids = torch.arange(2, 12).view(1, 10)
with torch.no_grad():
    torch.save(memory(input_ids=ids, use_cache=False).logits, "logits")
try:
    EngramTrainer(model=memory, args=EngramTrainingArguments(output_dir="out", use_cpu=True, report_to=[]), train_dataset=[{}])
except ConfigError as error:
    print("trained:", "could not be opened for writing" in str(error) and "is locked" in str(error), flush=True)
print("ready", flush=True)
sys.stdin.readline()
try:
    with torch.no_grad():
        memory(input_ids=ids, use_cache=False)
except TableError as error:
    print("changed:", error, flush=True)
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", script, str(saved)], **pipes) as reader:
        assert reader.stdout.readline() == "trained: True\n"
        assert reader.stdout.readline() == "ready\n"
        assert torch.equal(torch.load("logits"), expected)
        first.engrams["0"].table.update_rows(torch.tensor([1]), lambda rows: rows + 1)
        said, _ = reader.communicate("go\n")
    assert "another process changes its rows" in said


def test_copies_that_a_writer_saves_take_nothing_from_readers(saved, tmp_path, monkeypatch):
    """A checkpoint, a backup or what is pushed to a hub is one more save of the same rows; the memory's own stays known."""
    monkeypatch.chdir(tmp_path)
    writer, reader = load(saved, table_config=ROW_FILES), load(saved, table_config=ROW_FILES)
    expected = logits_of(writer)
    for number in range(20):
        writer.save_pretrained(tmp_path / f"checkpoint-{number}")
        assert torch.equal(logits_of(reader), expected)
    for folder in (saved, tmp_path / "checkpoint-19"):
        assert torch.equal(logits_of(load(folder, table_config=ROW_FILES)), expected)
    writer.engrams["0"].table.update_rows(torch.tensor([1]), lambda rows: rows + 1)
    writer.save_pretrained(tmp_path / "checkpoint-20")
    with pytest.raises(TableError, match="another process changes its rows"):
        logits_of(reader)
    with pytest.raises(TableError, match="is locked"):
        load(saved, table_config=ROW_FILES)
    assert torch.equal(logits_of(load(tmp_path / "checkpoint-20", table_config=ROW_FILES)), logits_of(writer))


def test_a_save_while_a_second_reader_loads_is_read(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    writer, read, loads = load(saved, table_config=ROW_FILES), files.load_memory, []

    def overtaken(*args, **kwargs):
        loads.append(args)
        if len(loads) == 1:
            for engram in writer.engrams.values():
                engram.table.update_rows(torch.tensor([1, 2]), lambda rows: rows + 1)
            writer.save_pretrained(saved)
        return read(*args, **kwargs)

    monkeypatch.setattr(files, "load_memory", overtaken)
    reader = load(saved, table_config=ROW_FILES)
    assert len(loads) == 2
    assert torch.equal(logits_of(reader), logits_of(writer))


def mutations(fields, path=()):
    """Every key of a JSON object, dropped and with each of a few values that are wrong for most."""
    for key, value in fields.items():
        for wrong in (None, -1, "x", [], {}, 1 << 70, 10**400, True, 1.5, "\0", [1 << 70], ".."):
            yield (*path, key), {**fields, key: wrong}
        yield (*path, key, "dropped"), {name: other for name, other in fields.items() if name != key}
        if isinstance(value, dict):
            yield from ((at, {**fields, key: inner}) for at, inner in mutations(value, (*path, key)))


@pytest.mark.parametrize("placed", [False, True])
def test_a_damaged_description_is_an_error_of_ours(saved, tmp_path, placed):
    if placed:
        place_memory(saved, tmp_path / "placed", TableConfig(tier="hybrid", hot_rows=3, path=str(tmp_path / "rows")))
        saved = tmp_path / "placed"
    model, tokenizer, whole, refused = tiny_model(), tiny_tokenizer(), description(saved), 0
    for at, fields in itertools.islice(mutations(whole), 20 * placed, None, 40):  # of 800; each costs three attempts to read
        (saved / DESCRIPTION_NAME).write_text(json.dumps(fields))
        for read in (
            lambda: EngramModel.from_pretrained(model, saved, tokenizer).unload(),
            lambda: layer_places(saved),
            lambda: StoredMemory(saved),
        ):
            try:
                read()
            except EngramError:
                refused += 1
            except BaseException as error:
                raise AssertionError(f"{at}: {error!r}") from error
        gc.collect()
    assert refused > 5
