import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from engram import CheckpointError
from engram.checkpoint import (
    DESCRIPTION_NAME,
    TensorSpec,
    again_if_saved,
    lock_store,
    open_tensors,
    read_description,
    saved_version,
    stream_store,
    write_atomically,
    write_store,
)
from engram.checkpoint import store as store_module
from tests.children import run_python

FIELDS = {"engram_config": {}}


def test_a_link_stays_and_its_target_is_replaced(tmp_path):
    target, link = tmp_path / "below" / "target.json", tmp_path / "link.json"
    target.parent.mkdir()
    link.symlink_to(target)
    for content in (b"new", b"newer"):  # of a link that leads nowhere, too
        write_atomically(link, content)
        assert link.is_symlink()
        assert target.read_bytes() == content
    assert [file.name for file in target.parent.iterdir()] == ["target.json"]


def test_of_saves_at_the_same_time_one_stands_whole(tmp_path):
    """Who comes while another is at it is refused in words."""
    done, refused = [], []

    def save(number):
        for _ in range(8):
            rows = torch.full((500, 16), float(number))
            try:
                write_store(tmp_path / "memory", {"rows": rows, "more": rows + 1}, {**FIELDS, "writer": number})
                done.append(number)
            except CheckpointError as error:
                refused.append(str(error))

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(save, range(3)))
    assert len(done) + len(refused) == 24
    assert all("another process is changing it" in reason for reason in refused)
    description = read_description(tmp_path / "memory")
    with open_tensors(tmp_path / "memory", description) as tensors:
        assert torch.equal(tensors.get_tensor("rows"), torch.full((500, 16), float(description["writer"])))
        assert torch.equal(tensors.get_tensor("more"), tensors.get_tensor("rows") + 1)
    assert len(list((tmp_path / "memory").glob("*.safetensors"))) == 1


def test_a_pipe_is_written_into(tmp_path):
    pipe, read = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()), daemon=True)
    reader.start()
    write_atomically(pipe, b"content")
    assert pipe.is_fifo()
    reader.join(10)
    assert read == [b"content"]


def test_an_open_pipe_is_written_into():
    read, write = os.pipe()
    try:
        write_atomically(Path(f"/dev/fd/{write}"), b"content")
        assert os.read(read, 100) == b"content"
    finally:
        os.close(read)
        os.close(write)


def test_a_description_that_is_a_link_is_replaced_itself(tmp_path):
    kept = tmp_path / "cache.json"
    kept.write_text(json.dumps(FIELDS))
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "engram.json").symlink_to(kept)
    write_store(tmp_path / "memory", {"rows": torch.zeros(1)}, FIELDS)
    assert json.loads(kept.read_text()) == FIELDS
    assert not (tmp_path / "memory" / "engram.json").is_symlink()


def in_a_child(work):
    """What ``work`` says in a forked child, which then waits with what it holds; and what ends it."""
    (told, tell), (ended, end) = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(end)
            os.write(tell, str(work()).encode())
            os.read(ended, 1)
        except BaseException as error:
            os.write(tell, type(error).__name__.encode())
        finally:
            os._exit(0)
    answer = os.read(told, 1000).decode()

    def finish():
        os.close(end)
        os.waitpid(child, 0)

    return answer, finish


def test_a_folder_is_never_held_twice(tmp_path, monkeypatch):
    """B takes the lock in the moment in which A, of whose folder nothing came, gives it back and clears away."""
    place, release, others, held = tmp_path / "new" / "folder", FileLock.release, [], []

    def take():
        held.append(lock_store(place))
        held[0].__enter__()
        return "held"

    def released(lock, *args, **kwargs):
        release(lock, *args, **kwargs)
        if not others:
            others.append(None)
            others[0] = in_a_child(take)

    with monkeypatch.context() as patch:
        patch.setattr(FileLock, "release", released)
        with lock_store(place):
            pass
    answer, finish = others[0]
    try:
        assert answer == "held"
        with pytest.raises(CheckpointError, match="is locked"), lock_store(place):
            pass
    finally:
        finish()
    with lock_store(place):
        pass


def test_a_lock_that_never_has_its_name_is_one_error(tmp_path, monkeypatch):
    monkeypatch.setattr("engram.checkpoint.store._has_its_name", lambda lock: False)
    with pytest.raises(CheckpointError, match=r"cannot write the folder .*is another file at every look"), lock_store(tmp_path):
        pass


def test_a_lock_on_a_file_without_its_name_is_taken_anew(tmp_path, monkeypatch):
    """B had opened the lock file when A removed it: what B gets is a lock that nobody else would ever meet."""
    acquire = FileLock.acquire

    def removed_meanwhile(lock, *args, **kwargs):
        monkeypatch.undo()
        got = acquire(lock, *args, **kwargs)
        os.unlink(lock.lock_file)
        (tmp_path / "new").rmdir()
        return got

    monkeypatch.setattr(FileLock, "acquire", removed_meanwhile)
    with lock_store(tmp_path / "new"):
        code = f"from engram.checkpoint import lock_store\nlock_store({str(tmp_path / 'new')!r}).__enter__()"
        assert "CheckpointError" in run_python("-c", code).stderr


def test_half_descriptions_of_killed_saves_are_removed(tmp_path):
    def killed():
        os.replace = lambda source, target: (
            os.kill(os.getpid(), 9) if str(target).endswith(DESCRIPTION_NAME) else rename(source, target)
        )
        write_store(tmp_path, {"rows": torch.zeros(1)}, FIELDS, {"a": 1})

    rename = os.replace
    child = os.fork()
    if child == 0:
        killed()
    os.waitpid(child, 0)
    assert list(tmp_path.glob(f".{DESCRIPTION_NAME}.*.tmp"))
    write_store(tmp_path, {"rows": torch.zeros(1)}, FIELDS)
    assert {file.name for file in tmp_path.iterdir()} == {".engram.lock", DESCRIPTION_NAME, saved_version(tmp_path)}


def names_in(folder):
    return {file.name for file in folder.iterdir()}


def test_what_a_save_replaced_and_did_not_remove_goes_with_the_next(tmp_path, monkeypatch):
    def killed(*files):
        if files:
            raise KeyboardInterrupt

    write_store(tmp_path, {"rows": torch.zeros(1)}, FIELDS, {"a": 1})
    with monkeypatch.context() as patch:
        patch.setattr(store_module, "_discard", killed)
        with pytest.raises(KeyboardInterrupt):
            write_store(tmp_path, {"rows": torch.zeros(1)}, FIELDS, {"a": 2})
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    write_store(tmp_path, {"rows": torch.zeros(1)}, FIELDS, {"a": 3})
    weights = saved_version(tmp_path)
    ledger = weights.replace(".safetensors", ".ledger.json")
    assert names_in(tmp_path) == {".engram.lock", DESCRIPTION_NAME, weights, ledger}


def test_a_save_that_fails_at_its_end_leaves_no_file(tmp_path):
    def failing(_):
        raise OSError("no more")

    rows = torch.zeros(1)
    write_store(tmp_path, {"rows": rows}, FIELDS, {"a": 1})
    before = names_in(tmp_path)
    with pytest.raises(CheckpointError, match="no more"):
        stream_store(tmp_path, {"rows": TensorSpec.of(rows)}, [("rows", rows)], FIELDS, {"a": 2}, failing)
    assert names_in(tmp_path) == before


def test_files_are_on_the_disk_before_a_description_names_them(tmp_path, monkeypatch):
    seen, sync, replace = [], store_module.sync_to_disk, os.replace

    def renamed(source, target):
        seen.append(("named", Path(target).name))
        replace(source, target)

    monkeypatch.setattr(store_module, "sync_to_disk", lambda path: (seen.append(("synced", Path(path).name)), sync(path)))
    monkeypatch.setattr(os, "replace", renamed)
    write_store(tmp_path, {"rows": torch.zeros(1)}, FIELDS, {"a": 1})
    weights = saved_version(tmp_path)
    temporary = next(name for _, name in seen if name.startswith(f".{DESCRIPTION_NAME}."))
    assert seen == [
        ("named", weights),
        ("synced", weights),
        ("synced", weights.replace(".safetensors", ".ledger.json")),
        ("synced", temporary),
        ("named", DESCRIPTION_NAME),
        ("synced", tmp_path.name),
    ]


def test_nothing_beside_a_description_that_cannot_be_read_is_removed(tmp_path):
    write_store(tmp_path, {"rows": torch.zeros(1)}, FIELDS)
    weights = saved_version(tmp_path)
    (tmp_path / DESCRIPTION_NAME).write_text("{")
    (tmp_path / f".{weights.replace('.safetensors', '.pending.tmp')}").write_text("[]")
    before = names_in(tmp_path)
    write_store(tmp_path, {"rows": torch.ones(1)}, FIELDS)
    assert names_in(tmp_path) == before | {saved_version(tmp_path)}


def test_what_is_read_while_others_save_is_read_again(tmp_path):
    def save(value):
        write_store(tmp_path, {"rows": torch.full((1,), value)}, FIELDS)

    def read():
        description = read_description(tmp_path)
        if saves:
            save(saves.pop())
        with open_tensors(tmp_path, description) as tensors:
            return float(tensors.get_tensor("rows"))

    save(0.0)
    saves = [2.0, 1.0]
    assert again_if_saved(tmp_path, read) == 2
    saves = [float(n) for n in range(9)]
    with pytest.raises(CheckpointError, match="is missing"):
        again_if_saved(tmp_path, read)  # not for ever
    saves = []
    (tmp_path / saved_version(tmp_path)).unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        again_if_saved(tmp_path, read)


def test_descriptions_are_checked(tmp_path):
    write_store(tmp_path, {"rows": torch.zeros(1)}, {**FIELDS, "table_dtype": "int8", "vocab_size": 9, "base_model": {}})
    whole = json.loads((tmp_path / DESCRIPTION_NAME).read_text())
    read_description(tmp_path)
    for fields, message in (
        ({"weights": []}, "weights is list, expected dict"),
        ({"engram_config": None}, "engram_config is NoneType, expected dict"),
        ({"placement": "x"}, "placement is str, expected dict"),
        ({"table_dtype": "int3"}, "table_dtype is 'int3', expected one of float32"),
        ({"vocab_size": True}, "vocab_size is bool, expected int"),
        ({"vocab_size": 1 << 40}, "vocab_size is 1099511627776, expected 1 to"),
        ({"base_model": {"name_or_path": 3}}, "the name of base_model is no text"),
    ):
        (tmp_path / DESCRIPTION_NAME).write_text(json.dumps(whole | fields))
        with pytest.raises(CheckpointError, match=f"is malformed: {message}"):
            read_description(tmp_path)
    del whole["engram_config"], whole["weights"]
    (tmp_path / DESCRIPTION_NAME).write_text(json.dumps(whole))
    with pytest.raises(CheckpointError, match="no 'engram_config'; no 'weights'"):
        read_description(tmp_path)
    (tmp_path / DESCRIPTION_NAME).write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match="nested too deeply"):
        read_description(tmp_path)
