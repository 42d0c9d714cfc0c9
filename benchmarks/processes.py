"""One memory trained by several processes: copies of its tables, tables divided between them, and what DDP alone would do.

All ways take a step in turn, in one run: ``one`` is a single process with the whole batch (the others wait), ``copies`` and ``divided`` are
``replicate_tables`` and ``TableConfig(sharded=True)`` in every process with its part of the batch, ``model`` divides the weights too
(``shard_model``), ``ddp`` leaves tables to
DistributedDataParallel, whose gradients are dense, and to torch's AdamW. Before anything is timed the losses of all ways must agree.
Processes have one thread each and talk by gloo over the loopback device; compare ratios.

With ``--peer-python``, another library's trainer takes steps with tables of the same size, in one process and in several, run after run.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from common import provenance, result_file, spread, write
from peers.compare import peer_version
from peers.protocol import FULL, QUICK, SEED, batches
from torch.nn.parallel import DistributedDataParallel
from train_step import build_model

from engram import EngramAdamW, TableConfig, replicate_tables
from engram.distributed import leave_at_exit, own_part, process_count, process_rank, put_apart, sum_everywhere, wait_for_all
from engram.models import shard_model
from engram.optim import build_param_groups
from engram.tables import row_parameters

WARM_UP = 2
WAYS = ("one", "copies", "divided", "model", "ddp")


class Way:
    """One way to take the same step."""

    def __init__(self, name, rows, sizes):
        self.name, count = name, process_count()
        torch.manual_seed(SEED)
        self.memory = build_model(rows, sizes, TableConfig(sharded=name in ("divided", "model")), "zero")
        self.tables = [engram.table for engram in self.memory.engrams.values()]
        if name == "model":
            shard_model(self.memory)
        groups = build_param_groups(self.memory, self.memory.engrams, lr=1e-3)
        self.optimizer = torch.optim.AdamW(groups, lr=1e-3) if name == "ddp" else EngramAdamW(groups, lr=1e-3)
        if name == "ddp":
            for table in self.tables:
                table.lookup = partial(_dense_lookup, table.weight)
        elif name != "one":
            replicate_tables(self.memory)
        self.model = self.memory if name in ("one", "model") else DistributedDataParallel(self.memory)
        self.works = name != "one" or process_rank() == 0
        self.part = slice(None) if name == "one" else slice(process_rank(), None, count)

    def step(self, ids):
        """Seconds until all processes have stepped, and the mean loss."""
        wait_for_all()
        started, loss = time.perf_counter(), torch.zeros(())
        if self.works:
            own = ids[self.part]
            loss = self.model(input_ids=own, labels=own, use_cache=False).loss
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        wait_for_all()
        seconds = time.perf_counter() - started
        shared = 1 if self.name == "one" else process_count()
        return seconds, float(sum_everywhere(loss.detach())) / shared

    def bytes(self):
        """Of rows, of what the optimiser remembers about them, and of all other weights, in the first process."""
        states, rows = [self.optimizer.state[table.weight] for table in self.tables], row_parameters(self.memory)
        put_apart(self.memory)
        return {
            "rows": sum(table.nbytes for table in self.tables),
            "states": sum(map(_state_bytes, states)),
            "weights": sum(own_part(p).nbytes for p in self.memory.parameters() if id(p) not in rows),
        }


def _dense_lookup(weight, row_ids, dtype=None):
    return F.embedding(row_ids, weight)


def _state_bytes(state):
    tensors = state["row_moments"].state_dict() if "row_moments" in state else state
    return sum(t.nbytes for t in tensors.values() if isinstance(t, torch.Tensor))


def work(args):
    """In each of the processes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    leave_at_exit()
    sizes = QUICK if args.quick else FULL
    ways = [Way(name, args.rows, sizes) for name in WAYS]
    times = {way.name: [] for way in ways}
    for number, ids in zip(range(args.rounds + WARM_UP), batches(sizes)):
        found = {way.name: way.step(ids) for way in (ways if number % 2 else ways[::-1])}
        losses = {name: loss for name, (_, loss) in found.items()}
        if number < WARM_UP and max(losses.values()) - min(losses.values()) > 1e-3:
            sys.exit(f"the ways do not agree: {losses}")
        if number >= WARM_UP:
            for name, (seconds, _) in found.items():
                times[name].append(seconds)
        if process_rank() == 0:
            print(f"round {number + 1} of {args.rounds + WARM_UP}: {losses}", flush=True)
    if process_rank() == 0:
        per_table = [table.rows for table in ways[0].tables]
        result = {way.name: {"seconds": times[way.name], "bytes": way.bytes()} for way in ways}
        Path(args.work).write_text(json.dumps({"rows": per_table, "ways": result}))


def peer(python, args):
    """Seconds of another library's steps in one process and in several, of runs that take turns; the first of each allocate."""
    seconds, environment = {1: [], args.processes: []}, {**os.environ, "OMP_NUM_THREADS": "1"}
    worker = Path(__file__).parent / "peers" / "engram_peft_processes.py"
    for _ in range(3):
        for count, found in seconds.items():
            command = [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count), str(worker)]
            command += [str(args.rows), *(["--quick"] if args.quick else [])]
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
            found.append(json.loads(done.stdout.splitlines()[-1])[WARM_UP:])
            print(f"engram-peft, {count} processes: {found[-1]}", flush=True)
    one, several = ([statistics.median(run) for run in runs] for runs in seconds.values())
    return {"one": spread(one), "several": spread(several), "of_one": spread([b / a for a, b in zip(one, several)])}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows of 64 floats in each of two layers")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--quick", action="store_true", help="a small backbone, to see that it runs; needs --out")
    parser.add_argument("--peer-python", help="Python of an environment with engram-peft")
    parser.add_argument("--out")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(args)
        return
    out = result_file(parser, args, "processes.json", "rows", "processes", "quick")
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder, "found.json")
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(args.processes)]
        command = [*launcher, __file__, "--rows", str(args.rows), "--rounds", str(args.rounds), "--work", str(found)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([*command, *(["--quick"] if args.quick else [])], env=environment, check=True)
        measured = json.loads(found.read_text())
    alone = measured["ways"]["one"]["seconds"]
    for way in measured["ways"].values():
        ratios = [seconds / one for seconds, one in zip(way["seconds"], alone)]
        way["seconds"], way["of_one"] = spread(way["seconds"]), spread(ratios)
    if args.peer_python:
        versions = peer_version("engram-peft", args.peer_python)
        measured["engram_peft"] = {"versions": versions, **peer(args.peer_python, args)}
    hardware = {**provenance(SEED)}
    hardware["hardware"] = hardware["hardware"].rpartition(",")[0] + ", 1 thread in each process"
    write(out, {**hardware, "processes": args.processes, **measured})


if __name__ == "__main__":
    main()
