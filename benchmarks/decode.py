"""What a memory adds to a decoding step: a 30-layer Llama (135M parameters) bare, with Engram at two layers, and with a taught memory.

All variants take turns token by token in one process, each with a model and a cache of its own. The token ids are fixed beforehand, so
that everybody reads the same text. The taught memory is asked about text that none of its rows belongs to.
"""

import argparse
import copy
import statistics
import time
from pathlib import Path

import torch
from common import RESULTS, provenance, spread, write
from transformers import LlamaConfig, LlamaForCausalLM

from engram import EngramConfig, TableConfig, get_engram_model, load_bundled

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


def jointly_trained(base, tokenizer, rows, tables):
    """A memory of the paper's kind (orders 2 and 3, 8 heads, d_mem 1280) with random rows and an active convolution."""
    layers = [min(layer, base.config.num_hidden_layers - 1) for layer in LAYERS]
    config = EngramConfig(
        engram_vocab_size=rows, n_embed_per_ngram=640, layer_ids=sorted(set(layers)), pad_id=0, table_init="normal"
    )
    memory = get_engram_model(copy.deepcopy(base), config, tokenizer, tables)
    for engram in memory.engrams.values():
        torch.nn.init.normal_(engram.short_conv.conv.weight, std=0.02)
    return memory.eval()


def taught(base, tokenizer):
    """A memory of verified rows before the last block, filled with rows of n-grams that nobody says."""
    config = EngramConfig.for_teaching(layer_ids=(base.config.num_hidden_layers - 1,), pad_id=0)
    memory = get_engram_model(copy.deepcopy(base), config, tokenizer)
    table = next(iter(memory.engrams.values())).multi_head_embedding.embedding
    row_ids = torch.randint(table.rows, (TAUGHT_ROWS,)).unique()
    table.insert(row_ids, torch.randint(1, 1 << 30, row_ids.shape, dtype=torch.int32), torch.randn(len(row_ids), table.dim))
    return memory.eval()


class Decoder:
    """One variant, its cache and its clock."""

    def __init__(self, model, ids):
        self.model, self.ids, self.seconds = model, ids, []
        self.cache = model(ids[:, :PROMPT], use_cache=True).past_key_values

    def step(self, position):
        token = self.ids[:, position : position + 1]
        started = time.perf_counter()
        output = self.model(token, past_key_values=self.cache, use_cache=True)
        self.seconds.append(time.perf_counter() - started)
        self.cache = output.past_key_values
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
def measure(variants, tokens):
    names = list(variants)
    for number in range(tokens):
        for turn in range(len(names)):  # another one begins each time
            variants[names[(number + turn) % len(names)]].step(PROMPT + 1 + number)
    base = variants["base"].seconds
    return {
        name: {
            "seconds": spread(decoder.seconds),
            "overhead": statistics.median(decoder.seconds) / statistics.median(base) - 1,
            "overhead_paired": statistics.median(x / b for x, b in zip(decoder.seconds, base)) - 1,
        }
        for name, decoder in variants.items()
    }


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=300)
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"])
    parser.add_argument("--rows", type=int, default=200_000, help="rows per head")
    parser.add_argument("--quick", action="store_true", help="a small model and few tokens, to try the script")
    parser.add_argument("--out", type=Path, default=RESULTS / "decode.json")
    args = parser.parse_args()
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
    result = measure(variants, args.tokens)
    for name, entry in result.items():
        print(f"{name}: {entry['seconds']['median'] * 1e3:.2f} ms, {100 * entry['overhead_paired']:+.2f} % (paired)")
    write(args.out, {**provenance(0), "layers": args.layers, "rows_per_head": args.rows, "variants": result})


if __name__ == "__main__":
    main()
