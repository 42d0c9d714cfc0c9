"""A power cut at any moment of saving or merging leaves the old memory or the new one, never a mixture."""

import json
import os

import pytest

from tests.children import run_python

_SCRIPT = """
import json, os, random, shutil, signal, sys, time
import torch
torch.set_num_threads(1)
from engram import Fact
from engram.checkpoint import lock_store
from engram.editing import TeachSettings, merge_memories
from engram.editing.merge import StoredMemory
from tests.editing.helpers import FACTS, make_editor

folder, kills = sys.argv[1], int(sys.argv[2])
editor = make_editor()
editor.teach(FACTS[:2]); editor.save(folder + "/m"); editor.save(folder + "/old")
extra = Fact(("KEY:gamma 4",), "ninety", id="gamma")
other = make_editor(); other.teach([FACTS[2]]); other.save(folder + "/other")
editor.teach([extra], TeachSettings(contexts=1, margin=0.5))  # what is not written yet a kill cannot hurt: children save it
editor.save(folder + "/new")
merge_memories(folder + "/old", folder + "/other", folder + "/union")

def write(number, target):
    # In a child: what was taught over the old memory, or another memory merged into it.
    child = os.fork()
    if child == 0:
        try:
            with lock_store(target):
                if number % 2:
                    merge_memories(target, folder + "/other", target)
                else:
                    editor.save(target)
        finally:
            os._exit(0)
    return child

longest = []
for number in range(2):
    shutil.copytree(folder + "/old", folder + f"/whole{number}")
    started = time.perf_counter()
    os.waitpid(write(number, folder + f"/whole{number}"), 0)
    longest.append(1.3 * (time.perf_counter() - started))  # kills fall before, during and after the writing

def fingerprint(path):
    memory = StoredMemory(path)
    tensors = {k: v.float().tolist() if v.is_floating_point() else v.tolist() for k, v in memory.tensors.items()}
    return json.dumps([[fact.id for fact in memory.ledger], tensors])

shared = {"old": 0, "new": 0, "union": 0}
names = {fingerprint(folder + "/" + name): name for name in shared}
rng = random.Random(0)
for number in range(kills):
    target = folder + ("/m2" if number % 2 else "/m")
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(folder + "/old", target)
    child = write(number, target)
    time.sleep(rng.random() * longest[number % 2])
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    shared[names[fingerprint(target)]] += 1  # a key error is a mixture; unreadable files raise too
    with lock_store(target):
        pass  # the lock died with its owner
print(json.dumps(shared))
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_two_hundred_kills(tmp_path):
    done = run_python("-c", _SCRIPT, tmp_path, 200)
    assert done.returncode == 0, done.stdout + done.stderr
    states = json.loads(done.stdout.splitlines()[-1])
    assert all(count > 0 for count in states.values()), states  # kills fell before and after the rename
