"""What every benchmark records beside its figures."""

import json
import multiprocessing
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import transformers
from filelock import FileLock

from engram import __version__
from engram.bench import machine
from engram.checkpoint import write_atomically

RESULTS = Path(__file__).parents[1] / "results"
MADE_WITH = ("command", "hardware", "versions")


def provenance(seed):
    return {
        "command": "python benchmarks/" + " ".join([Path(sys.argv[0]).name, *_arguments()]),
        "seed": seed,
        "hardware": machine()["hardware"],
        "versions": {"engram": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
    }


def _arguments():
    """As they were given, but for the place of somebody's environment."""
    before = [None, *sys.argv[1:]]
    return ["PYTHON" if flag == "--peer-python" else argument for flag, argument in zip(before, sys.argv[1:])]


def spread(values):
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "rounds": len(values)}


def result_file(parser, args, name, *trial):
    """``--out``, or the file of ``results/`` that is quoted; not that one if an option in ``trial`` is other than usual."""
    given = ["--" + option.replace("_", "-") for option in trial if getattr(args, option) != parser.get_default(option)]
    if args.out is None and given:
        parser.error(f"{', '.join(given)}: needs --out FILE, for such figures must not replace those of results/{name}")
    return Path(args.out or RESULTS / name)


def write(path, result):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(result, indent=1) + "\n").encode())
    print(f"written: {path}")


def write_so_far(path, result, complete):
    """Write to ``path`` once the result is complete; until then beside it, under a name that `engram plot` and readers of results pass over."""
    partial = Path(f"{path}.partial")
    write(path if complete else partial, result)
    if complete:
        partial.unlink(missing_ok=True)


def entries_of(path, name):
    """The list ``name`` of a result file; empty before there is one."""
    return json.loads(path.read_text())[name] if path.exists() else []


def add_entries(path, name, new, *key):
    """Add to the list ``name`` of a result file, in place of entries of equal ``key``; other processes may add to it at the same time.

    What the file was made with is told for all its entries together, and for each of them if calls differ.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        now = provenance(None)
        before = json.loads(path.read_text()) if path.exists() else {**now, name: []}
        entries = [*_with_call(before, before[name]), *_with_call(now, new)]
        entries = list({tuple(entry[field] for field in key): entry for entry in entries}.values())
        calls = [entry["made_with"] for entry in entries]
        if all(call == calls[0] for call in calls):
            entries = [{field: value for field, value in entry.items() if field != "made_with"} for entry in entries]
        seeds = sorted({entry["seed"] for entry in entries})
        write(path, {**before, **_together(calls), "seed": seeds, name: entries})


def _with_call(result, entries):
    """Entries that say what they were made with; what the result says, if they do not."""
    return [{"made_with": {field: result[field] for field in MADE_WITH}, **entry} for entry in entries]


def _together(values):
    """What several calls say, field by field: once if they agree, else one after the other."""
    if isinstance(values[0], dict):
        return {field: _together([value[field] for value in values if field in value]) for field in values[0]}
    return "; ".join(dict.fromkeys(values))


def add_workers(parser, what):
    """``--workers`` of ``side_by_side``."""
    told = f"{what} at a time, in processes of their own (OMP_NUM_THREADS says how many threads each has)"
    parser.add_argument("--workers", type=int, default=1, help=told)


def side_by_side(one, tasks, workers):
    """``one`` of every task, in their order as they are done; by several processes if there are to be some."""
    if workers == 1:
        yield from map(one, tasks)
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(one, tasks)
