"""Facts on the bundled model alone, and on top of the memory that was trained together with it: is either in the other's way?

Exact answers, what moved on text nobody taught (beside what the facts were put on), and held-out bits per byte of all four: the model,
with its memory, each with the facts on top.
"""

import argparse
import time

import torch
from common import add_entries, result_file

from engram import MemoryEditor, load_bundled, load_facts
from engram.data.corpus import held_out_standard_library
from engram.data.texts import load_texts
from engram.evaluation import evaluate_memory
from engram.models.bundled_files import BUNDLED_MODEL

BUNDLED = BUNDLED_MODEL.parent


def measure(seed, over, every):
    torch.manual_seed(seed)
    model, tokenizer = load_bundled(memory=over)
    facts = [*load_facts(BUNDLED / "facts.yaml"), *load_facts(BUNDLED / "patterns.yaml")][::every]
    texts = {kind: some[::every] for kind, some in load_texts(BUNDLED / "none_of_its_business.yaml").items()}
    held_out = [document.text[:1500] for document in held_out_standard_library()][: max(1, 40 // every)]
    editor, started = MemoryEditor.create(model, tokenizer, seed=seed), time.process_time()
    report = editor.teach(facts)
    seconds = time.process_time() - started
    result = evaluate_memory(editor.memory, tokenizer, facts, texts, held_out, load_facts(BUNDLED / "capitals.yaml")[::every])
    drift = result.harm.values()
    return {
        "over": "trained memory" if over else "model",
        "seed": seed,
        "prompts": sum(share.prompts for share in result.categories.values()),
        "exact": sum(share.exact for share in result.categories.values()),
        "not_exact": report.not_exact,
        "kl": result.kl_to_base,
        "tokens": sum(kind["tokens"] for kind in drift),
        "tokens_changed": sum(kind["tokens_changed"] for kind in drift),
        "bits_per_byte": result.bits_per_byte,
        "known": result.known,
        "cpu_seconds": seconds,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--every", type=int, default=1, help="only every n-th fact and text, to see that it runs; needs --out")
    parser.add_argument("--out")
    args = parser.parse_args()
    out = result_file(parser, args, "stacked.json", "every")
    for seed in args.seeds:
        for over in (False, True):
            entry = measure(seed, over, args.every)
            print({name: value for name, value in entry.items() if name != "not_exact"}, flush=True)
            add_entries(out, "runs", [entry], "over", "seed")


if __name__ == "__main__":
    main()
