"""A peer and this library, step by step in turn: two workers at a time, so that both fit into memory and share what else the machine does."""

import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from peers.protocol import Worker

HERE, WARM_UP = Path(__file__).parent, 3
PEERS = {"engram-peft": "engram_peft_step.py"}
MODES = ("trainer", "raw")


def peer_version(peer, python):
    code = f"import importlib.metadata as m, torch; print(m.version({peer!r}), torch.__version__)"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{python} has no {peer}: {done.stderr.strip().splitlines()[-1]}")
    version, torch_version = done.stdout.split()
    return {peer: version, "torch": torch_version}


def compare(peer, python, row_counts, rounds, spread, quick):
    """One entry per mode and table size: seconds and peak bytes of both, and their ratios."""
    entries = []
    for rows in row_counts:
        for mode in MODES:
            entries.append(_compare_one(peer, python, mode, rows, rounds, spread, quick))
            e = entries[-1]
            print(
                f"{mode:>7} {rows:>9,} rows: {peer} {e['peer']['seconds']['median']:.3f} s, "
                f"engram {e['engram']['seconds']['median']:.3f} s, x{e['speed_up']:.2f} faster; "
                f"peak {e['peer']['peak_bytes'] / 1e9:.2f} and {e['engram']['peak_bytes'] / 1e9:.2f} GB, x{e['memory']:.2f}",
                flush=True,
            )
    return entries


def _compare_one(peer, python, mode, rows, rounds, spread, quick):
    tail = [mode, str(rows), *(["--quick"] if quick else [])]
    commands = {
        "peer": [python, str(HERE / PEERS[peer]), *tail],
        "engram": [sys.executable, str(HERE / "engram_step.py"), *tail],
    }
    workers, times = {}, {name: [] for name in commands}
    with tempfile.TemporaryFile("w+") as log:
        try:
            for name, command in commands.items():
                workers[name] = Worker(command, log)
            for number in range(rounds + WARM_UP):
                for name, worker in list(workers.items())[:: -1 if number % 2 else 1]:
                    seconds = worker.step()
                    if number >= WARM_UP:
                        times[name].append(seconds)
            peaks = {name: worker.finish() for name, worker in workers.items()}
        except SystemExit:
            log.seek(0)
            print(log.read()[-3000:], file=sys.stderr)
            raise
        finally:
            for worker in workers.values():
                worker.kill()
    return {
        "mode": mode,
        "rows_per_layer": rows,
        **{name: {"rows": workers[name].rows, "seconds": spread(times[name]), "peak_bytes": peaks[name]} for name in commands},
        # Of each round on its own: whatever slows the machine slows both steps of a round.
        "speed_up": statistics.median(theirs / ours for theirs, ours in zip(times["peer"], times["engram"])),
        "memory": peaks["engram"] / peaks["peer"],
    }
