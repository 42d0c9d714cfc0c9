"""What a memory adds to a decoding step: a 30-layer Llama (135M parameters) bare, with Engram at two layers, and with a taught memory.

All variants take turns token by token in one process, each with a model and a cache of its own. The token ids are fixed beforehand, so
that everybody reads the same text. The taught memory is asked about text that none of its rows belongs to. With `--peer-python` a process
that has engram-peft takes its turn after each of ours, with a base model and a memory of its own.
"""

import argparse
import copy
import json
import statistics
import subprocess
import time
from pathlib import Path

import torch
from common import provenance, result_file, spread, write
from transformers import LlamaConfig, LlamaForCausalLM

from engram import EngramConfig, TableConfig, get_engram_model, load_bundled
from engram.models.cache import cache_argument, cache_in

LAYERS = (2, 16)
SHAPE = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49_152,
    "tie_word_embeddings": True,
}
PROMPT = 32
TAUGHT_ROWS = 20_000  # a thousand facts


def base_model(layers):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SHAPE, "num_hidden_layers": layers, "pad_token_id": 0})).eval()


def layers_of(base):
    return sorted({min(layer, base.config.num_hidden_layers - 1) for layer in LAYERS})


def jointly_trained(base, tokenizer, rows, tables):
    """A memory of the paper's kind (orders 2 and 3, 8 heads, d_mem 1280) with random rows and an active convolution."""
    config = EngramConfig(
        engram_vocab_size=rows, n_embed_per_ngram=640, layer_ids=layers_of(base), pad_id=0, table_init="normal"
    )
    memory = get_engram_model(copy.deepcopy(base), config, tokenizer, tables)
    for engram in memory.engrams.values():
        torch.nn.init.normal_(engram.short_conv.conv.weight, std=0.02)
    return memory.eval()


def taught(base, tokenizer):
    """A memory of verified rows before the last block, filled with rows of n-grams that nobody says."""
    config = EngramConfig.for_teaching(layer_ids=(base.config.num_hidden_layers - 1,), pad_id=0)
    memory = get_engram_model(copy.deepcopy(base), config, tokenizer)
    table = next(iter(memory.engrams.values())).table
    row_ids = torch.randint(table.rows, (TAUGHT_ROWS,)).unique()
    table.insert(row_ids, torch.randint(1, 1 << 30, row_ids.shape, dtype=torch.int32), torch.randn(len(row_ids), table.dim))
    return memory.eval()


class Peer:
    """engram-peft in an environment of its own; it answers every token with the seconds of its two variants."""

    def __init__(self, python, base, rows, branches):
        self.branches, self.seconds = branches, {"base": [], "engram-peft": []}
        script = Path(__file__).parent / "peers" / "decode_engram_peft.py"
        self.process = subprocess.Popen([python, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        shape = {**SHAPE, "num_hidden_layers": base.config.num_hidden_layers, "pad_token_id": 0}
        request = {"shape": shape, "rows": rows, "d_mem": 1280, "branches": branches, "layer_ids": layers_of(base)}
        answer = self._ask(json.dumps({**request, "threads": torch.get_num_threads(), "prompt": PROMPT}))
        assert answer["memory_speaks"], "engram-peft's memory changes nothing; there is nothing to compare with"

    def step(self, token):
        for name, seconds in self._ask(str(token)).items():
            self.seconds[name].append(seconds)

    def _ask(self, line):
        print(line, file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def result(self):
        base, own = self.seconds["base"], self.seconds["engram-peft"]
        return {"seconds": spread(own), **overheads(own, base), "base_seconds": spread(base)}


class Decoder:
    """One variant, its cache and its clock."""

    def __init__(self, model, ids):
        self.model, self.ids, self.seconds = model, ids, []
        self.name = cache_argument(getattr(model, "base_model", model))
        self.cache = cache_in(model(ids[:, :PROMPT], use_cache=True))

    def step(self, position):
        token = self.ids[:, position : position + 1]
        started = time.perf_counter()
        output = self.model(token, use_cache=True, **{self.name: self.cache})
        self.seconds.append(time.perf_counter() - started)
        self.cache = cache_in(output)
        return output.logits


def check(variants):
    """The taught memory must be the base model, bit for bit; the other must not be."""
    position = PROMPT
    logits = {name: decoder.step(position) for name, decoder in variants.items()}
    assert torch.equal(logits["base"], logits["taught, nothing read"])
    assert not torch.equal(logits["base"], logits["Engram, 2 layers"])
    for decoder in variants.values():
        decoder.seconds.clear()


@torch.no_grad()
def measure(variants, peers, ids, tokens):
    names = list(variants)
    for number in range(tokens):
        position = PROMPT + 1 + number
        for turn in range(len(names)):  # another one begins each time
            variants[names[(number + turn) % len(names)]].step(position)
        for peer in peers:
            peer.step(int(ids[0, position]))
    base = variants["base"].seconds
    own = {name: {"seconds": spread(d.seconds), **overheads(d.seconds, base)} for name, d in variants.items()}
    return {**own, **{f"engram-peft, 2 layers, M = {peer.branches}": peer.result() for peer in peers}}


def overheads(own, base):
    """Two ways to compare on a machine that others use too: medians over the run, and the median of the ratios token by token."""
    return {
        "overhead": statistics.median(own) / statistics.median(base) - 1,
        "overhead_paired": statistics.median(x / b for x, b in zip(own, base)) - 1,
    }


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=300)
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"], help="other than the usual ones needs --out")
    parser.add_argument("--rows", type=int, default=200_000, help="rows per head; other than the usual ones needs --out")
    parser.add_argument("--quick", action="store_true", help="a small model and few tokens, to try the script; needs --out")
    parser.add_argument("--peer-python", help="Python of an environment with engram-peft, to measure it in the same run")
    parser.add_argument("--out")
    args = parser.parse_args()
    out = result_file(parser, args, "decode.json", "quick", "layers", "rows")
    if args.out is None and args.peer_python is None:
        parser.error(f"expected --peer-python PYTHON, or --out FILE: {out.name} compares with engram-peft in one run")
    if args.quick:
        args.tokens, args.layers, args.rows = 4, 3, 1000
    base = base_model(args.layers)
    _, tokenizer = load_bundled()
    ids = torch.randint(3, len(tokenizer), (1, PROMPT + args.tokens + 2))
    models = {
        "base": base,
        "base again": copy.deepcopy(base),
        "Engram, 2 layers": jointly_trained(base, tokenizer, args.rows, TableConfig()),
        "Engram, 2 layers, bf16 rows": jointly_trained(base, tokenizer, args.rows, TableConfig(dtype="bfloat16")),
        "taught, nothing read": taught(base, tokenizer),
    }
    variants = {name: Decoder(model, ids) for name, model in models.items()}
    check(variants)
    branches = (1, 4) if args.peer_python else ()
    peers = [Peer(args.peer_python, base, args.rows, m) for m in branches]
    result = measure(variants, peers, ids, args.tokens)
    for name, entry in result.items():
        print(f"{name}: {entry['seconds']['median'] * 1e3:.2f} ms, {100 * entry['overhead_paired']:+.2f} % (paired)")
    write(out, {**provenance(0), "layers": args.layers, "rows_per_head": args.rows, "variants": result})


if __name__ == "__main__":
    main()
