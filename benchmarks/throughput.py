"""Training throughput with a memory as a share of the same backbone's without: steps of both take turns in one process.

Backbones: the DeepSeek-V3 of the sweeps (rho 0.6 of the small budget against that very backbone alone), and the Llama of
benchmarks/train_step.py. Rows are random and every step reads other text. Compare ratios, not seconds.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
from common import RESULTS, provenance, spread, write
from peers.protocol import FULL, QUICK
from peers.protocol import backbone as llama_backbone
from train_step import Vocabulary, build_model

from engram import EngramAdamW, get_engram_model
from engram.experiments import build_backbone, count_model, read_base
from engram.optim import EngramMuon, build_param_groups

RECIPE = Path(__file__).parents[1] / "recipes" / "sweep_allocation.yaml"
WARM_UP = 2


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
    backbone, memory = read_base(RECIPE)
    backbone = backbone.replace(n_routed_experts=8 if quick else 88, intermediate_size=240)
    memory = memory.replace(engram_vocab_size=rows // 8, table_init="normal", pad_id=1)
    with_memory = get_engram_model(build_backbone(backbone), memory, Vocabulary(backbone.vocab_size))
    return build_backbone(backbone), with_memory, backbone.vocab_size


def llama(rows, quick):
    """The backbone of benchmarks/train_step.py, alone and with tables."""
    sizes = QUICK if quick else FULL
    return llama_backbone(sizes), build_model(rows, sizes), sizes["vocab"]


BUILDERS = {"deepseek_v3": deepseek, "llama": llama}


def measure(name, rows, optimizer, args):
    torch.manual_seed(0)
    plain, with_memory, vocabulary = BUILDERS[name](rows, args.quick)
    arms = {"without": Arm(plain, optimizer, True), "with": Arm(with_memory, optimizer, True)}
    batch, length = (2, 32) if args.quick else (16, 128) if name == "deepseek_v3" else (8, 256)
    generator = torch.Generator().manual_seed(1)
    seconds = {arm: [] for arm in arms}
    for number in range(WARM_UP + args.rounds):
        ids = torch.randint(2, vocabulary, (batch, length), generator=generator)
        order = list(arms) if number % 2 else list(arms)[::-1]
        for arm in order:
            start = time.perf_counter()
            arms[arm].step(ids)
            if number >= WARM_UP:
                seconds[arm].append(time.perf_counter() - start)
    ratios = [a / b for a, b in zip(seconds["without"], seconds["with"])]
    entry = {
        "backbone": name,
        "optimizer": optimizer,
        "table_rows": sum(e.multi_head_embedding.embedding.rows for e in with_memory.engrams.values()),
        "parameters": {"without": count_model(plain).to_dict(), "with": count_model(with_memory).to_dict()},
        "tokens_per_step": batch * length,
        "seconds": {arm: spread(values) for arm, values in seconds.items()},
        "throughput_with_as_share_of_without": spread(ratios),
    }
    share = statistics.median(ratios)
    print(f"{name}, {optimizer}, {entry['table_rows']:,} rows: {share:.3f} of the throughput without", flush=True)
    return entry


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: only to see that it runs")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--out", default=RESULTS / "throughput.json")
    args = parser.parse_args()
    args.rounds = 2 if args.quick else args.rounds
    rows = {"deepseek_v3": [2_000] if args.quick else [100_000, 5_000_000], "llama": [2_000] if args.quick else [10_000_000]}
    entries = [
        measure(name, count, optimizer, args)
        for name, counts in rows.items()
        for count in counts
        for optimizer in ("adamw", "muon")
    ]
    write(args.out, {**provenance(0), "threads": torch.get_num_threads(), "rounds": args.rounds, "entries": entries})


if __name__ == "__main__":
    main()
