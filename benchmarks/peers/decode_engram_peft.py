"""Decoding steps of a Llama bare and with engram-peft, one of each whenever a line comes in; runs in an environment that has engram-peft.

Started by `benchmarks/decode.py --peer-python PATH`. The first line in is the JSON of the model's shape; every answer is a line of JSON.
"""

import copy
import json
import sys
import time
import typing

import torch

if not hasattr(typing, "override"):  # engram-peft 1.2.7 takes it from there, where Python has it since 3.12
    typing.override = lambda method: method

from engram_peft import EngramConfig, get_engram_model
from transformers import LlamaConfig, LlamaForCausalLM


def with_memory(base, request):
    config = EngramConfig(
        engram_vocab_size_per_ngram=[request["rows"] * 8] * 2,
        ngram_sizes=[2, 3],
        n_head_per_ngram=8,
        embedding_dim=request["d_mem"],
        enable_tokenizer_compression=False,
        compressed_vocab_size=base.config.vocab_size,
        target_layers=request["layer_ids"],
        hidden_size=base.config.hidden_size,
        hc_mult=request["branches"],
        pad_id=0,
        conv_zero_init=False,
        gating_zero_init=False,
    )
    return get_engram_model(copy.deepcopy(base), config).eval()


class Decoder:
    def __init__(self, model, ids):
        self.model = model
        self.cache = model(input_ids=ids, use_cache=True).past_key_values

    def step(self, token):
        started = time.perf_counter()
        output = self.model(input_ids=token, past_key_values=self.cache, use_cache=True)
        seconds = time.perf_counter() - started
        self.cache = output.past_key_values
        return seconds


@torch.no_grad()
def main():
    out = sys.stdout
    sys.stdout = sys.stderr  # the library prints
    request = json.loads(sys.stdin.readline())
    torch.set_num_threads(request["threads"])
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**request["shape"])).eval()
    ids = torch.randint(3, 6000, (1, request["prompt"]))
    models = {"base": base, "engram-peft": with_memory(base, request)}
    differ = not torch.equal(*(model(input_ids=ids).logits for model in models.values()))
    variants = {name: Decoder(model, ids) for name, model in models.items()}
    print(json.dumps({"ready": True, "memory_speaks": differ}), file=out, flush=True)
    for number, line in enumerate(sys.stdin):
        token = torch.tensor([[int(line)]])
        names = list(variants)[:: 1 if number % 2 else -1]
        print(json.dumps({name: variants[name].step(token) for name in names}), file=out, flush=True)


if __name__ == "__main__":
    main()
