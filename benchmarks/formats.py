"""What rows in fewer bits cost: held-out loss of a jointly trained memory, and exact answers of a taught one, in every row format.

Memories are trained (taught) with float32 rows, saved, converted by `engram convert`'s own function and loaded again.
"""

import argparse
import tempfile
from pathlib import Path

from common import provenance, result_file, write
from joint_training import FULL, LEARNING_RATE, QUICK, corpus, held_out_loss, trained

from engram import EngramModel, MemoryEditor, load_bundled, load_facts
from engram.checkpoint import convert_memory
from engram.data.packing import pack
from engram.tables import FORMATS

FACTS = Path(__file__).parents[1] / "src" / "engram" / "bundled" / "facts.yaml"


def in_every_format(source, folder, measure):
    """What `measure` finds in the memory of `source`, converted to each format."""
    result = {}
    for name in FORMATS:
        report = convert_memory(source, folder / name, name)
        error = max(layer.relative_error for layer in report.layers)
        size = sum(layer.bytes_after for layer in report.layers)
        result[name] = {"bytes": size, "relative_error": error, **measure(folder / name)}
    return result


def joint(seed, tokenizer, documents, held_out, sizes, folder):
    memory = trained(
        "engram",
        seed,
        tokenizer,
        pack(documents, tokenizer, sizes["length"], sizes["steps"] * sizes["batch"], seed),
        sizes,
        LEARNING_RATE,
    )
    memory.save_pretrained(folder / "source")
    model = memory.unload()

    def measure(path):
        loaded = EngramModel.from_pretrained(model, path, tokenizer)
        loss = held_out_loss(loaded, held_out)
        loaded.unload()
        return {"held_out_loss": loss}

    return in_every_format(folder / "source", folder, measure)


def taught(seed, facts, folder):
    model, tokenizer = load_bundled()
    editor = MemoryEditor.create(model, tokenizer, seed=seed, dtype="float32")
    editor.teach(facts)
    editor.save(folder / "source")
    editor.memory.unload()

    def measure(path):
        loaded = MemoryEditor.load(model, path, tokenizer)
        exact = sum(loaded.verify().values())
        loaded.memory.unload()
        return {"facts": len(loaded.facts), "exact": exact}

    return in_every_format(folder / "source", folder, measure)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: only to see that it runs; needs --out")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="other than the usual ones need --out")
    parser.add_argument("--steps", type=int, default=300, help="other than the usual ones needs --out")
    parser.add_argument("--out")
    args = parser.parse_args()
    out = result_file(parser, args, "formats.json", "quick", "seeds", "steps")
    sizes = QUICK if args.quick else {**FULL, "steps": args.steps}
    facts = load_facts(FACTS)
    _, tokenizer = load_bundled()
    documents, held_out = corpus(tokenizer, sizes, args.quick)
    runs = []
    for seed in args.seeds[:1] if args.quick else args.seeds:
        with tempfile.TemporaryDirectory() as a, tempfile.TemporaryDirectory() as b:
            run = {
                "joint": joint(seed, tokenizer, documents, held_out, sizes, Path(a)),
                "taught": taught(seed, facts[:5] if args.quick else facts, Path(b)),
            }
        runs.append({"seed": seed, **run})
        print(seed, run, flush=True)
    write(out, {**provenance(args.seeds), "sizes": sizes, "runs": runs})


if __name__ == "__main__":
    main()
