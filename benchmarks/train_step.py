"""Cost of one training step against the number of table rows: frozen tables, row-sparse Adam, dense gradients with torch's AdamW.

All kinds of step at all table sizes live in one process and are timed in interleaved rounds; compare ratios, not seconds. The kinds at
one size share model and tables (so that all of them fit into 24 GB) and keep optimiser states of their own. Rows start as N(0, 1):
tables of zeros would be one lazily mapped page, always in cache. Peak memory comes from a fresh process for each kind and size.
Backbone: Llama, hidden 256, 4 layers, vocabulary 8k; batch 8 x 256; two Engram layers with rows of 64 floats.

With ``--peer``, another library trains the same backbone with tables of the same size: a worker of its own Python and one of ours take
steps in turn, by either library's trainer and in a plain loop.
"""

import argparse
import statistics
import subprocess
import sys
import time

import torch
from common import provenance, result_file, spread, write
from peers.compare import PEERS, compare, peer_version
from peers.protocol import FULL, HEADS, QUICK, SEED, backbone, batches, peak_resident_bytes

from engram import EngramAdamW, EngramConfig, get_engram_model
from engram.optim import build_param_groups

WARM_UP = 2
ROW_STATES = {"sparse": "adam", "rowwise_adam": "rowwise_adam", "rowwise_adagrad": "rowwise_adagrad"}
KINDS = ("frozen", "sparse", "dense", "dense_fused")  # measured unless told otherwise
ALL_KINDS = (*KINDS, "rowwise_adam", "rowwise_adagrad")


class Vocabulary:
    """A tokenizer of numbered words: enough for the hash."""

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def decode(self, ids, skip_special_tokens=False):
        return f"w{ids[0]}"

    def convert_ids_to_tokens(self, i):
        return f"w{i}"


def build_model(rows, sizes, placement=None, table_init="normal"):
    base = backbone(sizes)
    config = EngramConfig(
        engram_vocab_size=rows // (2 * HEADS),
        n_embed_per_ngram=64 * HEADS,
        n_head_per_ngram=HEADS,
        layer_ids=sizes.get("memory_at", [1, 2]),
        pad_id=0,
        table_init=table_init,
    )
    model = get_engram_model(base, config, Vocabulary(sizes["vocab"]), placement)
    base.requires_grad_(True)
    return model


class Bench:
    """One model whose step can be taken in several ways."""

    def __init__(self, rows, sizes):
        self.model = build_model(rows, sizes)
        self.tables = [e.table.weight for e in self.model.engrams.values()]
        self.rows = [table.shape[0] for table in self.tables]
        self.optimizers = {kind: EngramAdamW(self._groups(), lr=1e-3, row_state=state) for kind, state in ROW_STATES.items()}
        self.optimizers["frozen"] = self.optimizers["sparse"]
        self.optimizers["dense"] = self.optimizers["dense_fused"] = torch.optim.AdamW(self._groups(), lr=1e-3)

    def _groups(self):
        return build_param_groups(self.model, self.model.engrams, lr=1e-3)

    def step(self, kind, ids):
        optimizer = self.optimizers[kind]
        for table in self.tables:
            table.requires_grad_(kind != "frozen")
        for group in optimizer.param_groups:  # one set of dense moments for both of torch's implementations
            group["foreach"], group["fused"] = kind == "dense", kind == "dense_fused"
        started = time.perf_counter()
        self.model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        if kind.startswith("dense"):
            for table in self.tables:
                table.grad = table.grad.to_dense()  # what the backward of an ordinary embedding allocates and fills
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - started


def print_peak_memory(kind, rows, sizes):
    """Run alone in this process, print the peak resident bytes."""
    bench = Bench(rows, sizes)
    for _, ids in zip(range(WARM_UP + 1), batches(sizes)):
        bench.step(kind, ids)
    print(peak_resident_bytes())


def peak_memory(kind, rows, quick):
    command = [sys.executable, __file__, "--peak-of", kind, str(rows), *(["--quick"] if quick else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"peak memory of {kind} at {rows:,} rows: exit {done.returncode}\n{done.stderr[-2000:]}")
    return int(done.stdout.split()[-1])


def timed_rounds(row_counts, kinds, sizes, rounds):
    benches = {rows: Bench(rows, sizes) for rows in row_counts}
    times = {(kind, rows): [] for rows in row_counts for kind in kinds}
    for number, ids in zip(range(rounds + WARM_UP), batches(sizes)):
        for kind, rows in times:
            seconds = benches[rows].step(kind, ids)
            if number >= WARM_UP:  # the first steps allocate
                times[kind, rows].append(seconds)
        print(f"round {number + 1} of {rounds + WARM_UP}", flush=True)
    return times, {rows: bench.rows for rows, bench in benches.items()}


def entry(kind, rows, actual, values, smallest, frozen, peak):
    # A step now and then doubles the moment buffers; the mean has its share of that, the median has not.
    seconds = {**spread(values), "mean": statistics.fmean(values)}
    # Round by round, for whatever slows the machine slows all steps of a round.
    over_frozen = statistics.median(a / b for a, b in zip(values, frozen)) - 1 if frozen else None
    return {
        "kind": kind,
        "rows_per_layer": rows,
        "actual_rows": actual,
        "seconds": seconds,
        "to_smallest_sparse": seconds["median"] / statistics.median(smallest),
        "mean_to_smallest_sparse": seconds["mean"] / statistics.fmean(smallest),
        "over_frozen": over_frozen,
        "peak_bytes": peak,
    }


def measure_peer(args, sizes):
    row_counts = args.rows or ([1_000] if args.quick else [100_000, 5_000_000])
    versions = peer_version(args.peer, args.peer_python)
    entries = compare(args.peer, args.peer_python, row_counts, args.rounds, spread, args.quick)
    result = {**provenance(SEED), "peer": args.peer, "peer_versions": versions, "sizes": sizes, "entries": entries}
    write(args.out, result)


def measure(args, sizes):
    row_counts = args.rows or ([1_000, 5_000] if args.quick else [100_000, 1_000_000, 5_000_000])
    peaks = {}
    for kind, rows in (
        [("sparse", row_counts[0])] if args.quick else [(kind, rows) for rows in row_counts for kind in args.kinds]
    ):
        peaks[kind, rows] = peak_memory(kind, rows, args.quick)
        print(f"peak memory, {kind:>11} {rows:>9,} rows: {peaks[kind, rows] / 1e9:.2f} GB", flush=True)
    times, actual = timed_rounds(row_counts, args.kinds, sizes, 2 if args.quick else args.rounds)
    smallest = times["sparse", row_counts[0]]
    entries = [
        entry(kind, rows, actual[rows], values, smallest, times.get(("frozen", rows)), peaks.get((kind, rows)))
        for (kind, rows), values in times.items()
    ]
    for e in entries:
        added = "" if e["over_frozen"] is None else f"; tables and optimiser add {e['over_frozen']:.1%}"
        print(
            f"{e['kind']:>11} {e['rows_per_layer']:>9,} rows: median {e['seconds']['median']:.3f} s "
            f"({e['seconds']['min']:.3f}-{e['seconds']['max']:.3f}), x{e['to_smallest_sparse']:.2f}; "
            f"mean {e['seconds']['mean']:.3f} s, x{e['mean_to_smallest_sparse']:.2f}{added}"
        )
    write(args.out, {**provenance(SEED), "sizes": sizes, "entries": entries})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: only to see that it runs; needs --out")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--rows", type=int, nargs="+", help="rows per layer; other than the usual ones needs --out")
    parser.add_argument("--kinds", nargs="+", choices=ALL_KINDS, default=list(KINDS), help="must include sparse; needs --out")
    parser.add_argument("--peer", choices=sorted(PEERS), help="compare with this library instead")
    parser.add_argument("--peer-python", help="Python of an environment that has the peer installed")
    parser.add_argument("--out")
    parser.add_argument("--peak-of", nargs=2, metavar=("KIND", "ROWS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    sizes = QUICK if args.quick else FULL
    if args.peak_of:
        print_peak_memory(args.peak_of[0], int(args.peak_of[1]), sizes)
        return
    name = "train_step_peer.json" if args.peer else "train_step.json"
    args.out = result_file(parser, args, name, "quick", "rows", "kinds")
    if "sparse" not in args.kinds:
        parser.error("--kinds: got none that others are compared with, expected sparse among them")
    if bool(args.peer) != bool(args.peer_python):
        parser.error("--peer and --peer-python go together")
    (measure_peer if args.peer else measure)(args, sizes)


if __name__ == "__main__":
    main()
