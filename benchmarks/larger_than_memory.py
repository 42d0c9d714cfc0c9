"""A mapped table larger than the memory there is: filled, read at random, trained and walked, with and without a budget of resident pages.

Each variant is a process of its own, in a memory control group (version 1, where groups can be made) whose limit counts what the process
holds and the files in the system's cache: rows then really come from the disk. Without groups only the process's own pages are bounded.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from common import RESULTS, provenance, write

from engram import EngramAdamW
from engram.tables import MmapTable, available_memory

DIM, BATCH = 64, 4096
GROUPS = Path("/sys/fs/cgroup/memory")


def held(kinds=("RssAnon:", "RssFile:", "RssShmem:")):
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith(kinds))


class Peak(threading.Thread):
    """The most that the process held beyond what it held before (optimiser's moments included), and of that mapped files; looked at a hundred
    times a second."""

    def __init__(self):
        super().__init__(daemon=True)
        self.before, self.most, self.stopped = held(), 0, False
        self.files_before, self.most_files = held(("RssFile:",)), 0
        self.start()

    def run(self):
        while not self.stopped:
            self.most = max(self.most, held() - self.before)
            self.most_files = max(self.most_files, held(("RssFile:",)) - self.files_before)
            time.sleep(0.01)


def timed(rows, work):
    started = time.perf_counter()
    work()
    return rows / (time.perf_counter() - started)


def child(path, size, budget, seconds):
    """One variant; prints its figures as JSON."""
    available, peak, generator = available_memory(), Peak(), torch.Generator().manual_seed(0)
    table = MmapTable(size // (4 * DIM), DIM, path, "r+", resident_bytes=budget)
    block = torch.randn(1 << 14, DIM)
    found = {"available_bytes": available, "table_bytes": table.nbytes, "rows_per_second": {}}

    def random_rows():
        return torch.randint(table.rows, (BATCH,), generator=generator)

    def repeat(step):
        done, started = 0, time.perf_counter()
        while time.perf_counter() - started < seconds:
            step()
            done += 1
        return done * BATCH / (time.perf_counter() - started)

    def fill():
        for start in range(0, table.rows, len(block)):
            table.load_rows(start, block[: table.rows - start])
        table.flush()

    def train():
        table.lookup(random_rows()).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    def look_up():
        with torch.no_grad():
            table.lookup(random_rows())

    rates = found["rows_per_second"]
    rates["filled in order"] = timed(table.rows, fill)
    rates["looked up at random"] = repeat(look_up)
    optimizer = EngramAdamW(table.parameters(), lr=1e-3)
    rates["trained at random"] = repeat(train)
    rates["walked in order"] = timed(table.rows, lambda: [float(rows.sum()) for _, rows in table.iter_row_blocks(1 << 14)])
    peak.stopped = True
    found |= {"peak_bytes": peak.most, "peak_bytes_of_files": peak.most_files, "resident_bytes": budget}
    print(json.dumps(found))


@contextmanager
def group_of(limit):
    """What a process does to join a control group of so much memory; None where there are no groups."""
    group = GROUPS / f"engram-bench-{os.getpid()}"
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(limit))
    except OSError:
        yield None
        return
    try:
        yield lambda: (group / "cgroup.procs").write_text(str(os.getpid()))
    finally:
        group.rmdir()


def run(size, limit, budget, seconds):
    arguments = ["--child", "--seconds", str(seconds), "--gigabytes", str(size / (1 << 30)), "--budget", str(budget or 0)]
    with group_of(limit) as join, tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, *arguments, "--file", f"{folder}/rows"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, preexec_fn=join)
    return {"memory_limit_bytes": limit if join else None, **json.loads(done.stdout)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2, help="size of the table")
    parser.add_argument("--limit", type=float, default=0.5, help="gigabytes of memory for the process and its files in cache")
    parser.add_argument("--seconds", type=float, default=10, help="of each measurement at random rows")
    parser.add_argument("--out", default=RESULTS / "larger_than_memory.json")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--budget", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--file", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    size = int(arguments.gigabytes * (1 << 30))
    if arguments.child:
        return child(arguments.file, size, arguments.budget or None, arguments.seconds)
    variants = []
    for budget in (None, 256 << 20, 64 << 20):
        variants.append(run(size, int(arguments.limit * (1 << 30)), budget, arguments.seconds))
        print(json.dumps(variants[-1]))
    return write(arguments.out, {"dim": DIM, "batch": BATCH, "variants": variants, **provenance(0)})


if __name__ == "__main__":
    main()
