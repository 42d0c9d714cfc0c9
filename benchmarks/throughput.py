"""Training throughput with a memory as a share of the same backbone's without: steps of both take turns in one process.

Backbones: the DeepSeek-V3 of the sweeps (rho 0.6 of the small budget against that very backbone alone), the Llama of
benchmarks/train_step.py, and a Llama of twelve blocks, 384 wide, with memory at blocks 1 and 6. Rows are random and every step reads
other text. The model with a memory also takes steps by the layer's tensor operations, without its native pass. Compare ratios, not
seconds; on a shared machine those of CPU time are the steadier ones.
"""

import argparse
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from common import provenance, result_file, spread, write
from peers.protocol import FULL, QUICK
from peers.protocol import backbone as llama_backbone
from train_step import Vocabulary, build_model

from engram import EngramAdamW, get_engram_model
from engram.experiments import build_backbone, count_model, read_base
from engram.layers import engram as layer
from engram.optim import EngramMuon, build_param_groups

RECIPE = Path(__file__).parents[1] / "recipes" / "sweep_allocation.yaml"
WARM_UP = 2
TENSORS = "with, by tensor operations"


class Arm:
    """A model, with or without its memory, and an optimiser of all it has."""

    def __init__(self, model, optimizer, bf16):
        self.model, self.bf16 = model.train().requires_grad_(True), bf16
        kind = EngramMuon if optimizer == "muon" else EngramAdamW
        groups = build_param_groups(model, getattr(model, "engrams", None), lr=1e-3, backbone_optimizer=optimizer)
        self.optimizer = kind(groups, lr=1e-3)

    def step(self, ids):
        with torch.autocast(ids.device.type, dtype=torch.bfloat16, enabled=self.bf16):
            loss = self.model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def deepseek(rows, quick):
    """The backbone of a sweep's points, alone and with tables."""
    backbone, memory, _ = read_base(RECIPE)
    backbone = backbone.replace(n_routed_experts=8 if quick else 88, intermediate_size=240)
    memory = memory.replace(engram_vocab_size=rows // 8, table_init="normal", pad_id=1)
    with_memory = get_engram_model(build_backbone(backbone), memory, Vocabulary(backbone.vocab_size))
    return build_backbone(backbone), with_memory, backbone.vocab_size, (2, 32) if quick else (16, 128)


def llama(rows, quick):
    """The backbone of benchmarks/train_step.py, alone and with tables."""
    return of_sizes(rows, QUICK if quick else FULL)


def llama_12(rows, quick):
    """Twelve blocks, two of them with a memory: the share that it has in the paper's models rather than half of the blocks."""
    return of_sizes(
        rows, {**(QUICK if quick else FULL), "layers": 12, "memory_at": [1, 6]} | ({} if quick else {"hidden": 384})
    )


def of_sizes(rows, sizes):
    return llama_backbone(sizes), build_model(rows, sizes), sizes["vocab"], (sizes["batch"], sizes["length"])


BUILDERS = {"deepseek_v3": deepseek, "llama": llama, "llama_12": llama_12}
ROWS = {"deepseek_v3": [100_000, 5_000_000], "llama": [10_000_000], "llama_12": [5_000_000]}


@contextmanager
def tensor_operations():
    """The layer without its native pass for training."""
    serve, layer.whole_sequences_serve = layer.whole_sequences_serve, lambda *_: False
    yield
    layer.whole_sequences_serve = serve


def timed_step(arm, ids, way):
    wall, cpu = time.perf_counter(), time.process_time()
    with tensor_operations() if way == TENSORS else nullcontext():
        arm.step(ids)
    return time.perf_counter() - wall, time.process_time() - cpu


def measure(name, rows, optimizer, args):
    torch.manual_seed(0)
    plain, with_memory, vocabulary, shape = BUILDERS[name](rows, args.quick)
    memory = Arm(with_memory, optimizer, True)
    arms = {"without": Arm(plain, optimizer, True), "with": memory, TENSORS: memory}
    generator = torch.Generator().manual_seed(1)
    wall, cpu = ({arm: [] for arm in arms} for _ in range(2))
    for number in range(WARM_UP + args.rounds):
        ids = torch.randint(2, vocabulary, shape, generator=generator)
        for arm in list(arms) if number % 2 else list(arms)[::-1]:
            seconds = timed_step(arms[arm], ids, arm)
            if number >= WARM_UP:
                wall[arm].append(seconds[0])
                cpu[arm].append(seconds[1])
    shares = {
        f"{kind}{label}": spread([a / b for a, b in zip(taken["without"], taken[arm])])
        for kind, taken in (("throughput", wall), ("cpu_time", cpu))
        for arm, label in (("with", ""), (TENSORS, "_by_tensor_operations"))
    }
    entry = {
        "backbone": name,
        "optimizer": optimizer,
        "table_rows": sum(e.table.rows for e in with_memory.engrams.values()),
        "parameters": {"without": count_model(plain).to_dict(), "with": count_model(with_memory).to_dict()},
        "tokens_per_step": shape[0] * shape[1],
        "seconds": {arm: spread(values) for arm, values in wall.items()},
        "cpu_seconds": {arm: spread(values) for arm, values in cpu.items()},
        "share_of_without": shares,
    }
    found = ", ".join(f"{share['median']:.3f} ({label.replace('_', ' ')})" for label, share in shares.items())
    print(f"{name}, {optimizer}, {entry['table_rows']:,} rows: {found} of the backbone's without", flush=True)
    return entry


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: only to see that it runs; needs --out")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--backbones", nargs="+", choices=list(BUILDERS), default=list(BUILDERS))
    parser.add_argument("--rows", nargs="+", type=int, help="rows of all tables together (default: by backbone)")
    parser.add_argument("--optimizers", nargs="+", choices=["adamw", "muon"], default=["adamw", "muon"])
    parser.add_argument("--out")
    args = parser.parse_args()
    out = result_file(parser, args, "throughput.json", "quick")
    args.rounds = 2 if args.quick else args.rounds
    entries = [
        measure(name, count, optimizer, args)
        for name in args.backbones
        for count in args.rows or ([2_000] if args.quick else ROWS[name])
        for optimizer in args.optimizers
    ]
    write(out, {**provenance(0), "threads": torch.get_num_threads(), "rounds": args.rounds, "entries": entries})


if __name__ == "__main__":
    main()
