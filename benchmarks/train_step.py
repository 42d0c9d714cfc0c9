"""Cost of one training step against the number of table rows: row-sparse Adam, dense Adam, and frozen tables.

All variants live in one process and are timed in interleaved rounds; compare ratios, not seconds. Backbone: Llama, hidden 256,
4 layers, vocabulary 8k; batch 8 x 256; two Engram layers with rows of 64 floats.
"""

import argparse
import time

import torch
from common import RESULTS, provenance, spread, write
from transformers import LlamaConfig, LlamaForCausalLM

from engram import EngramAdamW, EngramConfig, get_engram_model
from engram.optim import build_param_groups

HEADS = 4


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


class Variant:
    """One model with one kind of optimiser."""

    def __init__(self, kind, rows, sizes):
        self.kind, self.rows = kind, rows
        torch.manual_seed(0)
        base = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=sizes["vocab"],
                hidden_size=sizes["hidden"],
                num_hidden_layers=4,
                intermediate_size=2 * sizes["hidden"],
                num_attention_heads=4,
                num_key_value_heads=4,
                tie_word_embeddings=True,
            )
        )
        config = EngramConfig(
            engram_vocab_size=rows // (2 * HEADS),
            n_embed_per_ngram=64 * HEADS,
            n_head_per_ngram=HEADS,
            layer_ids=[1, 2],
            pad_id=0,
        )
        self.model = get_engram_model(base, config, Vocabulary(sizes["vocab"]))
        base.requires_grad_(True)
        self.tables = [e.multi_head_embedding.embedding.weight for e in self.model.engrams.values()]
        if kind == "frozen":
            for table in self.tables:
                table.requires_grad_(False)
        groups = build_param_groups(self.model, self.model.engrams, lr=1e-3)
        self.optimizer = EngramAdamW(groups, lr=1e-3) if kind != "dense" else torch.optim.AdamW(groups, lr=1e-3, foreach=True)

    def step(self, ids):
        started = time.perf_counter()
        self.model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        if self.kind == "dense":
            for table in self.tables:
                table.grad = table.grad.to_dense()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - started


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: only to see that it runs")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", default=RESULTS / "train_step.json")
    args = parser.parse_args()
    row_counts = [1_000, 5_000] if args.quick else [100_000, 1_000_000, 5_000_000]
    sizes = (
        {"vocab": 500, "hidden": 32, "batch": 2, "length": 32}
        if args.quick
        else {"vocab": 8192, "hidden": 256, "batch": 8, "length": 256}
    )
    rounds = 2 if args.quick else args.rounds
    generator = torch.Generator().manual_seed(0)
    variants = [Variant(kind, rows, sizes) for rows in row_counts for kind in ("frozen", "sparse", "dense")]
    times = {(v.kind, v.rows): [] for v in variants}
    for number in range(rounds + 2):
        ids = torch.randint(0, sizes["vocab"], (sizes["batch"], sizes["length"]), generator=generator)
        for variant in variants:
            seconds = variant.step(ids)
            if number >= 2:  # the first steps allocate
                times[variant.kind, variant.rows].append(seconds)
        print(f"round {number + 1} of {rounds + 2}", flush=True)
    first = spread(times["sparse", row_counts[0]])["median"]
    entries = [
        {
            "kind": kind,
            "rows_per_layer": rows,
            "seconds": spread(values),
            "to_smallest_sparse": spread(values)["median"] / first,
        }
        for (kind, rows), values in times.items()
    ]
    for entry in entries:
        print(
            f"{entry['kind']:>7} {entry['rows_per_layer']:>9,} rows: {entry['seconds']['median']:.3f} s  x{entry['to_smallest_sparse']:.2f}"
        )
    write(args.out, {**provenance(0), "entries": entries})


if __name__ == "__main__":
    main()
