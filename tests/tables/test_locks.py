import subprocess
import sys
import textwrap

import pytest

from engram.tables import locks

WITHOUT = """
import sys
import filelock
from transformers import PreTrainedModel, TrainerCallback  # these know Windows by its name
sys.modules["fcntl"] = sys.modules["resource"] = None  # as there
from engram import EngramModel, TableConfig, TableError
from engram.testing import tiny_memory, tiny_model, tiny_tokenizer
memory = tiny_memory()
memory.save_pretrained("memory")
memory.unload()
for placement in (TableConfig(), TableConfig(tier="host"), TableConfig(tier="hybrid", hot_rows=4)):
    EngramModel.from_pretrained(tiny_model(), "memory", tiny_tokenizer(), table_config=placement)
for placement in (TableConfig(tier="mmap"), TableConfig(tier="mmap", path="rows")):
    try:
        EngramModel.from_pretrained(tiny_model(), "memory", tiny_tokenizer(), table_config=placement)
    except TableError as error:
        print(error)
"""


@pytest.mark.slow
def test_without_posix_locks_all_works_but_row_files(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(WITHOUT)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("no file locks as Linux and macOS have, expected tier 'device' or 'host'") == 2
    assert not (tmp_path / "rows" / "layer-0.rows").exists()


FOREIGN = """
import os
import torch
from transformers import LlamaForCausalLM, PreTrainedModel, TrainerCallback  # as far as these need the calls
del os.register_at_fork
del os.posix_fallocate
from engram import EngramModel, TableConfig
from engram.testing import tiny_memory, tiny_model, tiny_tokenizer
memory = tiny_memory()
memory.save_pretrained("memory")
memory.unload()
ids = torch.tensor([[5, 6, 7]])
placements = [TableConfig(tier=tier, path=tier) for tier in ("mmap", "mmap")] + [TableConfig(tier="hybrid", hot_rows=4)]
for placement in placements:  # the file is made, and found again
    other = EngramModel.from_pretrained(tiny_model(), "memory", tiny_tokenizer(), table_config=placement)
    print(other(ids).logits.sum().item())
    other.unload()
"""


@pytest.mark.slow
def test_row_files_and_forks_where_the_system_has_fewer_calls(tmp_path):
    """No blocks ahead (macOS), and nothing to be told of forks."""
    done = subprocess.run([sys.executable, "-c", FOREIGN], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(set(done.stdout.split())) == 1
    made = (tmp_path / "mmap" / "layer-0.rows").stat()
    assert made.st_blocks * 512 >= made.st_size


def test_a_lock_keeps_others_out_until_it_is_given_back(tmp_path):
    file = tmp_path / "file"
    file.touch()
    with file.open("r+b") as first, file.open("r+b") as second:
        locks.lock(first)
        with pytest.raises(BlockingIOError):
            locks.lock(second)
        locks.unlock(first.fileno())
        locks.lock(second)
