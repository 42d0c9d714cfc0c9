"""Held-out loss of a small dense model trained with and without a memory: same steps, same data, several seeds."""

import argparse
import math
import tempfile

import torch
from common import RESULTS, provenance, result_file, spread, write
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

from engram import EngramConfig, EngramTrainer, EngramTrainingArguments, get_engram_model, load_bundled
from engram.data.corpus import CorpusRecipe, build_corpus, held_out_standard_library
from engram.data.packing import pack

LEARNING_RATE = 3e-3
FULL = {"hidden": 128, "steps": 500, "batch": 16, "length": 128, "rows": 25_000, "held_out": 256}
QUICK = {"hidden": 32, "steps": 3, "batch": 2, "length": 32, "rows": 500, "held_out": 8}


def corpus(tokenizer, sizes, quick):
    """Training documents and packed held-out blocks."""
    recipe = CorpusRecipe(standard_library=True, test_percent=0)
    documents = held_out_standard_library(recipe) if quick else build_corpus(recipe, RESULTS).train
    return documents, pack(held_out_standard_library(recipe), tokenizer, sizes["length"], sizes["held_out"], seed=0)


def build(tokenizer, hidden):
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            num_hidden_layers=4,
            intermediate_size=8 * hidden // 3,
            num_attention_heads=4,
            num_key_value_heads=4,
            tie_word_embeddings=True,
        )
    )


@torch.no_grad()
def held_out_loss(model, blocks, batch=16):
    model.eval()
    total = 0.0
    for start in range(0, len(blocks), batch):
        ids = torch.stack([blocks[i]["input_ids"] for i in range(start, min(start + batch, len(blocks)))])
        total += model(input_ids=ids, labels=ids, use_cache=False).loss.item() * ids.shape[0]
    return total / len(blocks)


def trained(kind, seed, tokenizer, train, sizes, lr):
    set_seed(seed)
    model = build(tokenizer, sizes["hidden"])
    common = {
        "max_steps": sizes["steps"],
        "per_device_train_batch_size": sizes["batch"],
        "learning_rate": lr,
        "warmup_steps": sizes["steps"] // 20,
        "lr_scheduler_type": "cosine",
        "weight_decay": 0.1,
        "adam_beta2": 0.95,
        "bf16": True,
        "use_cpu": not torch.cuda.is_available(),
        "save_strategy": "no",
        "logging_steps": 50,
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": seed,
    }
    with tempfile.TemporaryDirectory() as folder:
        if kind == "engram":
            config = EngramConfig(
                engram_vocab_size=sizes["rows"],
                n_embed_per_ngram=sizes["hidden"],
                n_head_per_ngram=4,
                layer_ids=[1, 2],
                pad_id=tokenizer.pad_token_id,
            )
            model = get_engram_model(model, config, tokenizer)
            EngramTrainer(model, EngramTrainingArguments(folder, train_backbone=True, **common), train_dataset=train).train()
        else:
            Trainer(model, TrainingArguments(folder, **common), train_dataset=train).train()
    return model


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: only to see that it runs; needs --out")
    parser.add_argument("--steps", type=int, default=500, help="other than the usual ones needs --out")
    parser.add_argument("--out")
    args = parser.parse_args()
    out = result_file(parser, args, "joint_training.json", "quick", "steps")
    sizes = {**(QUICK if args.quick else FULL), **({} if args.quick else {"steps": args.steps})}
    seeds, lr = [0] if args.quick else [0, 1, 2], LEARNING_RATE
    _, tokenizer = load_bundled()
    documents, held_out = corpus(tokenizer, sizes, args.quick)
    losses = {"dense": [], "engram": []}
    for seed in seeds:
        train = pack(documents, tokenizer, sizes["length"], sizes["steps"] * sizes["batch"], seed)
        for kind in losses:
            losses[kind].append(held_out_loss(trained(kind, seed, tokenizer, train, sizes, lr), held_out))
            print(f"seed {seed} {kind}: held-out loss {losses[kind][-1]:.4f}", flush=True)
    gains = [dense - engram for dense, engram in zip(losses["dense"], losses["engram"])]
    result = {
        **provenance(seeds),
        "sizes": sizes,
        "learning_rate": lr,
        "held_out_loss": {kind: {"seeds": values, **spread(values)} for kind, values in losses.items()},
        "gain": {"seeds": gains, "mean": sum(gains) / len(gains), "min": min(gains)},
        "gain_percent_of_perplexity": 100 * (1 - math.exp(-sum(gains) / len(gains))),
    }
    write(out, result)


if __name__ == "__main__":
    main()
