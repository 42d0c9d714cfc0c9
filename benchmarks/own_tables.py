"""A model that was published with n-gram tables of its own (Qwen4-Exp's shape, random weights), its tables placed: memory, speed, same answers.

Every variant is a process of its own that loads the saved model, and decodes; they take turns for several rounds. Peak memory is what a process
held beyond what it held before it loaded, mapped files included. Where memory control groups can be made (version 1), two variants also run in
one whose limit is half of the table: transformers', which is to be killed, and the one with rows in a file.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from statistics import median

import torch
from common import provenance, result_file, spread, write
from larger_than_memory import Peak, group_of
from transformers import AutoConfig, AutoModelForCausalLM

from engram import TableConfig
from engram.models import load_placed

HEADS, DIM = 16, 32
SIZES = {"gigabytes": 2.0, "tokens": 64, "rounds": 5}
QUICK = {"gigabytes": 0.01, "tokens": 8, "rounds": 1}
VARIANTS = {
    "transformers": None,
    "host": {"tier": "host"},
    "host, int8": {"tier": "host", "dtype": "int8"},
    "file": {"tier": "mmap"},
    "file, int8": {"tier": "mmap", "dtype": "int8"},
    "file, at most 64 MB of it resident": {"tier": "mmap", "resident_bytes": 64 << 20},
}


def saved_model(folder, sizes):
    """A small model with one layer of tables, of the shape that transformers has for it."""
    rows = int(sizes["gigabytes"] * (1 << 30)) // (4 * DIM * HEADS)
    config = AutoConfig.for_model(
        "qwen4_exp_text",
        vocab_size=2048,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=32,
        linear_value_head_dim=32,
        layer_types=["linear_attention"] * 3 + ["full_attention"],
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=64,
        hc_count=4,
        hc_lowrank=32,
        ple_layer_ids=[2],
        ple_embed_dim=HEADS * DIM,
        heads_per_ngram=HEADS // 2,
        ngram_vocab_size_base=rows,
        split_ngram_parts=8,
        indexer_n_heads=2,
        indexer_kv_heads=1,
        indexer_head_dim=32,
        indexer_budget=256,
        indexer_compress_ratio=16,
        eos_token_id=0,
        pad_token_id=1,
        bos_token_id=0,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    table = model.model.layers[1].ple.ple_embedding.ngram_embedding.weight
    with torch.no_grad():
        for block in table.split(1 << 18):  # as loud as trained rows, so that they matter
            block.normal_()
    model.save_pretrained(folder)
    return table.numel() * 4


@torch.no_grad()
def decode(model, tokens):
    """Greedy tokens after a fixed prompt, seconds for each, and what the last logits add up to."""
    ids, cache, said, seconds = torch.arange(2, 34)[None], None, [], []
    for _ in range(tokens):
        started = time.perf_counter()
        out = model(input_ids=ids, past_key_values=cache, use_cache=True)
        ids, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
        seconds.append(time.perf_counter() - started)
        said.append(int(ids))
    return {"said": said, "seconds": seconds[1:], "logits": out.logits.double().sum().item()}


def child(folder, name, rows, tokens):
    """One variant; prints its figures as JSON."""
    peak, started = Peak(), time.perf_counter()
    if VARIANTS[name] is None:
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
    else:
        places = {"path": rows} if VARIANTS[name]["tier"] == "mmap" else {}
        model = load_placed(folder, TableConfig(**VARIANTS[name], **places)).eval()
    loaded = time.perf_counter() - started
    found = decode(model, tokens)
    peak.stopped = True
    print(json.dumps({**found, "loaded": loaded, "peak_bytes": peak.most, "peak_bytes_of_files": peak.most_files}))


def run(folder, name, rows, tokens, join=None):
    """A variant's figures; None if it was killed."""
    options = {"--child": name, "--folder": folder, "--rows": rows, "--tokens": str(tokens)}
    command = [sys.executable, "-W", "ignore", __file__, *(word for option in options.items() for word in option)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, preexec_fn=join, check=False)
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None


def same_tokens(one, other):
    return sum(a == b for a, b in zip(one["said"], other["said"]))


def measure(sizes, variants):
    with tempfile.TemporaryDirectory() as place:
        folder = f"{place}/model"
        table_bytes = saved_model(folder, sizes)
        found = {name: [] for name in variants}
        for number in range(sizes["rounds"]):
            for name in variants:
                found[name].append(run(folder, name, f"{place}/{name}", sizes["tokens"]))
                print(name, number, {k: v for k, v in found[name][-1].items() if k not in ("said", "seconds")}, flush=True)
        limit = max(table_bytes // 2, 512 << 20)  # PyTorch alone takes half of that
        with group_of(limit) as join:
            told = ("transformers", "file") if join and "file" in variants else ()
            tight = {name: run(folder, name, f"{place}/{name}", sizes["tokens"], join) for name in told}
    own = found["transformers"]
    entries = {}
    for name, rounds in found.items():
        ratios = [median(mine["seconds"]) / median(theirs["seconds"]) for mine, theirs in zip(rounds, own)]
        entries[name] = {
            "table_config": VARIANTS[name],
            "peak_bytes": spread([r["peak_bytes"] for r in rounds]),
            "seconds_per_token": spread([t for r in rounds for t in r["seconds"]]),
            "times_transformers": spread(ratios),
            "load_seconds": [r["loaded"] for r in rounds],
            "same_tokens": same_tokens(rounds[0], own[0]),
            "same_logits": all(r["logits"] == own[0]["logits"] for r in rounds),
        }
    limited = {
        "memory_limit_bytes": limit if tight else None,
        **{name: None if r is None else {"same_tokens": same_tokens(r, own[0])} for name, r in tight.items()},
    }
    return {"sizes": sizes, "table_bytes": table_bytes, "variants": entries, "in_half_of_the_memory": limited}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: only to see that it runs; needs --out")
    parser.add_argument(
        "--gigabytes", type=float, default=SIZES["gigabytes"], help="of the table; other than usual needs --out"
    )
    parser.add_argument("--out")
    for name in ("--child", "--folder", "--rows"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    parser.add_argument("--tokens", type=int, default=SIZES["tokens"], help="decoded by each variant in each round")
    args = parser.parse_args()
    if args.child:
        child(args.folder, args.child, args.rows, args.tokens)
        return
    out = result_file(parser, args, "own_tables.json", "quick", "gigabytes", "tokens")
    sizes = QUICK if args.quick else {**SIZES, "gigabytes": args.gigabytes, "tokens": args.tokens}
    variants = ("transformers", "file, int8") if args.quick else tuple(VARIANTS)
    write(out, {**provenance(0), **measure(sizes, variants)})


if __name__ == "__main__":
    main()
