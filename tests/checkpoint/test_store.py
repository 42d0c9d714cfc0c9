import json
import os
import threading
from pathlib import Path

import torch

from engram.checkpoint import write_atomically, write_store

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
