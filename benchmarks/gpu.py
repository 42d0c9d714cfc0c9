"""On a GPU: decoding with a table in page-locked host memory beside no memory and a table on the device, and the gather beside the bus.

The backbone has random weights in the shape of a model of 4 billion parameters: what is measured does not depend on what it says, and the
tokens that it is fed are drawn beforehand. All three variants share its weights and take turns, round after round, in one process; a step is
one replayed CUDA graph. Rows of the host table are fetched by the device itself (unified addressing), on a side stream, when a step starts.
Rows are compared before anything is timed, and the result is written after every part, so that a run cut short keeps what it has. With
`--quick` it runs on the CPU in tiny sizes: only to see that it runs.
"""

import argparse
import collections
import copy
import sys
import time

import torch
from common import provenance, result_file, spread, write
from train_step import Vocabulary
from transformers import LlamaConfig, LlamaForCausalLM

from engram import EngramConfig, TableConfig, get_engram_model
from engram.models import StaticDecoder
from engram.ops.dispatch import triton_gather
from engram.tables.memory import available_memory
from engram.tables.pinned import nothing_unlocked

SEED = 0
FULL = {
    "vocab": 32_000,
    "hidden": 2560,
    "layers": 36,
    "intermediate": 9728,
    "heads": 32,
    "kv_heads": 8,
    "engram_layers": (1, 15),
}
QUICK = {"vocab": 300, "hidden": 32, "layers": 3, "intermediate": 48, "heads": 4, "kv_heads": 2, "engram_layers": (0, 2)}
ROW_BYTES, HEADS = 128, 16  # 64 values in bfloat16; 8 heads for each of two orders
SAMPLE_BLOCKS, SAMPLE_ROWS = 16, 4096
READS = 10  # per timed call
TABLE_BYTES = 1e11  # of the host table, unless another size is asked for or fits


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def allocated(device):
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def backbone(sizes, device):
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=sizes["vocab"],
        hidden_size=sizes["hidden"],
        num_hidden_layers=sizes["layers"],
        intermediate_size=sizes["intermediate"],
        num_attention_heads=sizes["heads"],
        num_key_value_heads=sizes["kv_heads"],
    )
    with torch.device(device):
        return LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()


def taken(device):
    """Bytes of the device that are in use, by whomever: the driver's own tables for page-locked memory too."""
    if device.type != "cuda":
        return 0
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return total - free


def attach(base, sizes, table_bytes, tier, device):
    """A memory of so many bytes, and what it took of the device and of time."""
    all_before, before, started = taken(device), allocated(device), time.perf_counter()
    config = EngramConfig(
        engram_vocab_size=table_bytes // (ROW_BYTES * HEADS * len(sizes["engram_layers"])),
        layer_ids=sizes["engram_layers"],
        pad_id=0,
    )
    memory = get_engram_model(base, config, Vocabulary(sizes["vocab"]), TableConfig(tier=tier, dtype="bfloat16"))
    memory.engrams.to(torch.bfloat16)
    memory.eval()
    tables = [engram.table for engram in memory.engrams.values()]
    for table in tables:  # rows that can be told apart, spread over the table
        for start in sample_starts(table):
            rows = torch.randn(min(SAMPLE_ROWS, table.rows), table.dim, generator=torch.Generator().manual_seed(start))
            table.load_rows(start, rows)
    synchronize(device)
    parameters = [p for engram in memory.engrams.values() for p in engram.parameters()]
    rows = {id(table.weight) for table in tables}
    account = {
        "tier": tier,
        "table_bytes": sum(table.nbytes for table in tables),
        "reader_bytes": sum(p.nbytes for p in parameters if id(p) not in rows),
        "device_bytes": allocated(device) - before,
        "device_bytes_with_driver": taken(device) - all_before,
        "attach_seconds": time.perf_counter() - started,
        "read_by_device": all(table.is_read_by(device) for table in tables),
    }
    return memory, tables, account


def sample_starts(table):
    last = max(table.rows - SAMPLE_ROWS, 0)
    return sorted({last * i // (SAMPLE_BLOCKS - 1) for i in range(SAMPLE_BLOCKS)})


def check(memories, sizes, device):
    """Rows as the CPU reads them, and the same logits with and without prefetch; nothing is timed unless this holds."""
    ids = torch.randint(sizes["vocab"], (4, 16), generator=torch.Generator().manual_seed(SEED)).to(device)
    for memory, tables in memories:
        for table in tables:
            starts = torch.tensor(sample_starts(table))
            numbers = (starts[:, None] + torch.randint(min(SAMPLE_ROWS, table.rows), (len(starts), 64))).clamp_max(
                table.rows - 1
            )
            wanted = torch.cat([table.weight[part] for part in numbers.to(table.weight.device)]).cpu()
            got = table.read(numbers.to(device), torch.float32).cpu().flatten(0, 1)
            assert torch.equal(got, wanted.float()), "the device reads other rows than the CPU"
        logits = []
        for mode in (False, True):
            memory.prefetch_rows = mode
            logits.append(memory(input_ids=ids, use_cache=False).logits)
        assert torch.equal(*logits), "prefetched rows give other logits"
        memory.prefetch_rows = None


def seconds_of(call, device, repeats):
    synchronize(device)
    started = time.perf_counter()
    for _ in range(repeats):
        call()
    synchronize(device)
    return (time.perf_counter() - started) / repeats


class Reads:
    """Gathers of so many rows, other ones at every call: the same would come from caches. On a GPU they are one graph, or small ones would be
    timed by what it takes Python to launch them."""

    def __init__(self, table, count, device):
        self.table, self.graph = table, None
        self.numbers = torch.empty((READS, count), dtype=torch.int64, device=device)
        self.out = torch.empty((count, table.dim), dtype=table.dtype, device=device)
        self.draw()
        self.read()  # compiles
        if device.type == "cuda":
            synchronize(device)
            self.graph = torch.cuda.CUDAGraph()
            with nothing_unlocked(), torch.cuda.graph(self.graph):
                self.read()

    def draw(self):
        self.numbers.random_(self.table.rows)

    def read(self):
        for numbers in self.numbers:
            self.table.read(numbers, self.table.dtype, self.out)

    def __call__(self):
        if self.graph is None:
            self.read()
        else:
            self.graph.replay()


def gather_and_copy(table, device, rounds, copied_bytes, counts):
    """Rows per second out of the table, beside a plain copy of page-locked memory: the bus."""
    pinned = torch.empty(copied_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
    target = torch.empty(copied_bytes, dtype=torch.uint8, device=device)
    torch.manual_seed(SEED)
    reads = {count: Reads(table, count, device) for count in counts}
    seconds = {name: [] for name in ("copy", *counts)}
    for _ in range(rounds):
        seconds["copy"].append(seconds_of(lambda: target.copy_(pinned, non_blocking=True), device, READS))
        for count, call in reads.items():
            call.draw()
            seconds[count].append(seconds_of(call, device, 1) / READS)
    copy_rate = copied_bytes / spread(seconds["copy"])["median"]
    result = {"copy": {"bytes": copied_bytes, "seconds": spread(seconds["copy"]), "bytes_per_second": copy_rate}, "gather": []}
    for count in counts:
        median = spread(seconds[count])["median"]
        rate = count * table.dim * table.dtype.itemsize / median
        result["gather"].append(
            {
                "rows": count,
                "seconds": spread(seconds[count]),
                "rows_per_second": count / median,
                "bytes_per_second": rate,
                "to_copy": rate / copy_rate,
            }
        )
        print(f"gather of {count:>9,} rows: {count / median / 1e6:8.1f} M rows/s, {rate / copy_rate:.2f} of the copy's bytes/s")
    return result


class Variant:
    """One way to decode, on buffers of its own."""

    def __init__(self, memory, on, prompts, max_length, tokens):
        self.memory, self.on, self.seconds = memory, on, []
        self.decoder = StaticDecoder(memory, max_length)
        self.tokens = iter(tokens)
        with self.mode():
            self.decoder.prefill(prompts)
        self.run(2)  # the graph is captured

    def mode(self):
        return torch.no_grad() if self.on else self.memory.disable_engram()

    @torch.no_grad()
    def run(self, steps):
        with self.mode():
            for _ in range(steps):
                # Drawn before, not what was said: a random model repeats itself, and its rows would come from caches.
                self.decoder.step(next(self.tokens)).argmax(-1)

    def timed(self, steps, device):
        self.seconds.append(seconds_of(lambda: self.run(steps), device, 1) / steps)


def decode(host, device_memory, sizes, args, device):
    prompts = torch.randint(1, sizes["vocab"], (args.sequences, args.context), generator=torch.Generator().manual_seed(SEED))
    length = args.context + args.rounds * args.steps + 2
    generator = torch.Generator().manual_seed(SEED + 1)
    tokens = torch.randint(1, sizes["vocab"], (length - args.context, args.sequences), generator=generator).to(device)
    variants = {
        "off": Variant(host, False, prompts.to(device), length, tokens),
        "host, prefetched": Variant(host, True, prompts.to(device), length, tokens),
        "device": Variant(device_memory, True, prompts.to(device), length, tokens),
    }
    order = collections.deque(variants.values())
    for number in range(args.rounds):
        for variant in order:
            variant.timed(args.steps, device)
        order.rotate(1)
        print(f"round {number + 1} of {args.rounds}", flush=True)
    entries = {}
    for name, variant in variants.items():
        ratios, seconds = _to(variant, variants["off"]), spread(variant.seconds)
        entries[name] = {
            "seconds_per_step": seconds,
            "tokens_per_second": args.sequences / seconds["median"],
            "to_off": ratios,
            "to_device": _to(variant, variants["device"]),  # what it costs that rows are elsewhere, whatever else a step takes
            "staging_bytes": sum(buffer.nbytes for buffer in variant.decoder.prefetcher._buffers.values()),
            "seconds_over_off": spread([one - other for one, other in zip(variant.seconds, variants["off"].seconds)]),
        }
        print(
            f"{name:>16}: {args.sequences / seconds['median']:,.0f} tokens/s, x{ratios['median']:.3f} of the time of a step without"
        )
    return entries


def _to(variant, other):
    return spread([mine / theirs for mine, theirs in zip(variant.seconds, other.seconds)])


def parsed():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--table-bytes", type=float, help="host table; 1e11, or four fifths of the free memory where that is less"
    )
    parser.add_argument("--device-bytes", type=float, default=4e9, help="device table")
    parser.add_argument("--sequences", type=int, default=512)
    parser.add_argument("--context", type=int, default=32, help="tokens of each prompt")
    parser.add_argument("--steps", type=int, default=16, help="steps per round and variant")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", "--tiny", action="store_true", help="tiny sizes, on the CPU too; needs --out")
    parser.add_argument("--out")
    args = parser.parse_args()
    args.out = result_file(parser, args, "gpu.json", "quick")
    if not args.quick and not torch.cuda.is_available():
        parser.error("no CUDA device; --quick runs without one")
    if args.quick:
        args.table_bytes, args.device_bytes, args.sequences, args.context, args.steps, args.rounds = 4e5, 2e5, 3, 4, 2, 2
    return args


def main():
    args = parsed()
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    sizes = QUICK if args.quick else FULL
    table_bytes = int(args.table_bytes or min(TABLE_BYTES, 0.8 * (available_memory() or TABLE_BYTES)))
    print(f"host table of {table_bytes:,} bytes; free: {available_memory() or 0:,}", flush=True)
    base = backbone(sizes, device)
    twin = copy.deepcopy(base, {id(p): p for p in base.parameters()})  # hooks of its own, the same weights
    host, host_tables, host_account = attach(base, sizes, table_bytes, "host", device)
    print(f"host table: {host_account}", flush=True)
    if device.type == "cuda" and not host_account["read_by_device"]:
        sys.exit(f"{table_bytes:,} bytes could not be page-locked, so the device cannot read them: try a smaller --table-bytes")
    small, small_tables, small_account = attach(twin, sizes, int(args.device_bytes), "device", device)
    result = {
        **provenance(SEED),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "triton": triton_gather() is not None,
        "attention": base.config._attn_implementation,
        "sizes": sizes,
        "parameters": sum(p.numel() for p in base.parameters()),
        "sequences": args.sequences,
        "asked_table_bytes": int(args.table_bytes or TABLE_BYTES),
        "tables": {"host": host_account, "device": small_account},
    }
    write(args.out, result)
    with torch.no_grad():
        check([(host, host_tables), (small, small_tables)], sizes, device)
        counts = (64, 512) if args.quick else (512 * HEADS, 131_072, 1_048_576)
        result["bus"] = gather_and_copy(host_tables[0], device, args.rounds, 1 << (12 if args.quick else 28), counts)
        write(args.out, result)
    result["decoding"] = decode(host, small, sizes, args, device)
    write(args.out, result)


if __name__ == "__main__":
    main()
