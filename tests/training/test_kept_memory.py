"""Memory that training frees is kept until it ends."""

import subprocess
import sys

import pytest

from engram.training import kept_memory as module
from engram.training.kept_memory import kept_memory

GLIBC = module._glibc()

FAULTS = """
import resource
from engram.training.kept_memory import _glibc, kept_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    bytearray(1 << 26)  # 16,384 small pages
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    return int(open("/proc/self/statm").read().split()[1])

faults()
outside = faults()
with kept_memory():
    with kept_memory():
        faults()
    inside = faults()  # the inner one has not ended it
    kept = resident()
takes_it = _glibc().mallopt(-3, 1 << 27)
print(outside, inside, kept - resident(), takes_it)
"""


@pytest.mark.skipif(GLIBC is None or sys.platform != "linux", reason="needs glibc")
def test_pages_are_touched_anew_only_outside_and_given_back_at_the_end():
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    outside, inside, given_back, takes_it = map(int, done.stdout.split())
    if outside < 1000 or not takes_it:
        pytest.skip("the system gives large pages without being asked, or this glibc takes no large threshold")
    assert inside < outside / 10
    assert given_back > 10_000  # pages


def test_nothing_is_done_unless_wanted_or_elsewhere_than_on_glibc(monkeypatch):
    calls = []
    monkeypatch.setattr(module, "_count", lambda library, change: calls.append(change))
    with kept_memory(wanted=False):
        pass
    with monkeypatch.context() as patch:
        patch.setattr(module, "_glibc", lambda: None)
        with kept_memory():
            pass
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")  # somebody has set the allocator up
    with kept_memory():
        pass
    assert calls == []


def test_an_error_ends_it(monkeypatch):
    class Library:
        def __init__(self):
            self.calls = []

        def mallopt(self, what, value):
            self.calls.append((what, value))
            return value <= 1 << 25  # as older glibc: a limit on the threshold for maps

        def malloc_trim(self, pad):
            self.calls.append("trim")

    library = Library()
    monkeypatch.setattr(module, "_glibc", lambda: library)
    with pytest.raises(ValueError, match="within"), kept_memory():
        raise ValueError("within")
    assert library.calls[1] == (-3, 1 << 25)  # asked for less, where more was refused
    assert library.calls[-1] == "trim"
    assert module._users == 0
